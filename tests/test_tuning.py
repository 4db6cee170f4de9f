"""Tuning: the times of the dynamic programme, the numbers of linear samplers, and that learning helps on new noise."""

import json
from pathlib import Path

import pytest
import torch

from sfumato.errors import ConfigError
from sfumato.exact import three_modes
from sfumato.grids import logistic
from sfumato.paths import Linear, VariancePreserving, log_snr
from sfumato.samplers import drive
from sfumato.samplers.adams import ipndm
from sfumato.samplers.ddim import ddim
from sfumato.samplers.dpm_solver import dpmpp_2m
from sfumato.samplers.learned import learned, rows_of
from sfumato.tuning import Problem, best_times, solved, tune
from sfumato.tuning.teacher import _shortest

PATH = VariancePreserving()


def problem(n: int, seed: int, path: object = PATH) -> Problem:
    noise = torch.randn(n, 1, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return Problem(noise, three_modes().denoiser(path))  # type: ignore[arg-type]


@pytest.mark.parametrize("fn", [ddim, dpmpp_2m, ipndm], ids=lambda fn: fn.__name__)
@pytest.mark.parametrize("path", [Linear(), PATH], ids=["linear", "vp"])
def test_any_linear_sampler_is_its_numbers(fn, path) -> None:  # type: ignore[no-untyped-def]
    times, exact = logistic(path, 7), problem(16, 0, path)
    rows = rows_of(fn(path, torch.eye(8, dtype=torch.float64)[0], times), 7)
    assert [len(row) for row in rows] == [i + 2 for i in range(7)]
    told = drive(learned(path, exact.x, times, rows=rows), exact.denoise)
    torch.testing.assert_close(told, drive(fn(path, exact.x, times), exact.denoise), rtol=1e-9, atol=1e-10)


def test_without_numbers_learned_is_ddim() -> None:
    times, exact = logistic(PATH, 5), problem(8, 1)
    told = drive(learned(PATH, exact.x, times), exact.denoise)
    torch.testing.assert_close(told, drive(ddim(PATH, exact.x, times), exact.denoise))


def test_numbers_of_another_length_are_refused() -> None:
    with pytest.raises(ConfigError, match="another number of steps"):
        drive(learned(PATH, torch.zeros(1, 1), logistic(PATH, 4), rows=[[1.0, 0.0]] * 3), problem(1, 0).denoise)


def test_the_shortest_path_is_the_one_that_all_paths_show() -> None:
    cost = torch.full((5, 5), torch.inf, dtype=torch.float64)
    for i in range(5):
        for j in range(i + 1, 5):
            cost[i, j] = float((j - i) ** 2 + (i * 7 + j * 3) % 5)
    three = [(a, b) for a in range(1, 4) for b in range(a + 1, 4)]
    best = min(three, key=lambda ab: float(cost[0, ab[0]] + cost[ab[0], ab[1]] + cost[ab[1], 4]))
    assert _shortest(cost, 3) == [0, *best, 4]


def test_the_teacher_ends_where_the_ode_does() -> None:
    exact = problem(32, 2)
    found = solved(exact, 200)
    truth = three_modes().flow(PATH, exact.x, 1.0, 0.0)
    assert float((found.x[-1] - truth).abs().median()) < 1e-3
    assert found.x.shape == (201, 32, 1) and found.x0.shape == (200, 32, 1)


def test_times_of_the_dynamic_programme_lie_where_trajectories_bend() -> None:
    times = best_times([problem(64, 3)], 8)
    assert len(times) == 9 and float(times[0]) == 1 and float(times[-1]) == 0 and bool((times.diff() < 0).all())
    level = log_snr(PATH, times[1:-1]) / 2
    assert float(level.median().abs()) < 1.5  # the modes' spread is near 1: neither all noise nor all data


def test_more_steps_than_candidates_are_refused() -> None:
    with pytest.raises(ConfigError, match="can be tuned"):
        best_times([problem(4, 0)], 50)


@pytest.fixture(scope="module")
def tuned():  # type: ignore[no-untyped-def]
    return tune([problem(128, 4)], [problem(128, 5)], 5, iterations=80, teacher_steps=100)


def test_tuning_ends_when_its_time_is_over() -> None:
    """With what it has: at worst the sampler that it began with."""
    steps: list[int] = []
    given = [problem(16, 4)], [problem(16, 5)]
    found = tune(*given, 3, iterations=50, teacher_steps=20, seconds=0.0, progress=lambda i, n: steps.append(i))
    assert steps == [1] and found.error <= found.before and found.steps == 3
    tune(*given, 3, iterations=3, teacher_steps=20, seconds=1e6, progress=lambda i, n: steps.append(i))
    assert steps == [1, 1, 2, 3]


def test_tuning_helps_on_noise_it_never_saw(tuned) -> None:  # type: ignore[no-untyped-def]
    fresh = problem(256, 6)
    truth = three_modes().flow(PATH, fresh.x, 1.0, 0.0)

    def error(end: torch.Tensor) -> float:
        return float((end - truth).abs().median())

    times = torch.tensor(tuned.times, dtype=torch.float64)
    ours = error(drive(learned(PATH, fresh.x, times, rows=tuned.rows), fresh.denoise))
    start = error(drive(ipndm(PATH, fresh.x, logistic(PATH, 5), variable="angle"), fresh.denoise))
    assert tuned.error < 0.7 * tuned.before
    assert ours < 0.7 * start


def test_what_was_tuned_is_plain_data_that_builds_again(tuned, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    from sfumato.catalogue import build

    said = json.loads(json.dumps(tuned.settings()))
    times = build(said["grid"], "Grid")(PATH, said["steps"])
    assert times.tolist() == pytest.approx(tuned.times, abs=1e-15)
    fresh = problem(8, 7)
    again = drive(build(said["sampler"], "Sampler")(PATH, fresh.x, times), fresh.denoise)
    direct = drive(learned(PATH, fresh.x, times, rows=tuned.rows), fresh.denoise)
    torch.testing.assert_close(again, direct)


def test_gradients_reach_the_times_through_guidance_and_network() -> None:
    from sfumato.denoiser import Denoiser
    from sfumato.guidance import CFG, guided
    from sfumato.predictions import VELOCITY

    class Net(torch.nn.Module):
        def forward(self, x: torch.Tensor, t: torch.Tensor, *, shift: torch.Tensor) -> torch.Tensor:
            return x * torch.sin(t)[:, None] + shift

    path, x = Linear(), torch.randn(3, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    one, none = ({"shift": torch.full((3, 2), v, dtype=torch.float64)} for v in (1.0, 0.0))
    model = Denoiser(Net(), path, VELOCITY)
    denoise = guided(model, path, CFG(one, none, 2.5))
    t = torch.tensor(0.6, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(denoise(x, t).sum(), t)
    h = 1e-6
    numeric = (denoise(x, 0.6 + h).sum() - denoise(x, 0.6 - h).sum()) / (2 * h)
    torch.testing.assert_close(slope, numeric, rtol=1e-6, atol=1e-6)

"""What every deterministic sampler keeps to, driven by the registry: what it asks and where, and what it depends on."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from bed import (
    DETERMINISTIC,
    DOWNWARD,
    FIXED,
    PATHS,
    STARTS,
    Recorder,
    levels,
    path_free,
    scales,
    three_modes_at,
)
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from sfumato.catalogue import SAMPLERS
from sfumato.denoiser import Bound
from sfumato.guidance import Unguided
from sfumato.paths import Path, VariancePreserving
from sfumato.samplers import Ask, Job, drive, drive_many, sample
from sfumato.samplers.ddim import ddim

OPTIONS = [(name, {}) for name in DETERMINISTIC] + [
    ("ipndm", {"variable": "sigma"}),
    ("ipndm", {"coefficients": "published"}),
    ("euler", {"variable": "time"}),
    ("heun", {"variable": "time"}),
    ("rk4", {"variable": "sigma"}),
    ("rk4", {"variable": "angle"}),
    ("unipc", {"order": 3, "start": "runge_kutta"}),
    ("exp_ab", {"order": 4, "start": "runge_kutta"}),
    ("deis", {"order": 4, "lower_order_final": False}),
    ("dpmpp_2m", {"of": "noise"}),
    ("pndm", {"start": "runge_kutta"}),
    ("ddim_inversion", {"refine": 2}),
]


def asked(name: str, path: Path, times: Tensor, **options: Any) -> tuple[list[float], Tensor]:
    """The times that a sampler asks at, and its result."""
    line = SAMPLERS[name]
    recorder = Recorder(three_modes_at(path))
    x = STARTS * scales(path, float(times[-1 if line.inverse else 0])).radius
    return recorder.times, drive(line.fn(path, x, times, **options), recorder)


@pytest.mark.parametrize("name", FIXED)
def test_it_asks_as_often_as_the_registry_says(name) -> None:
    line = SAMPLERS[name]
    for n in (4, 9):
        times, _ = asked(name, PATHS["vp"], levels(PATHS["vp"], n))
        assert len(times) == line.calls * n + line.extra


@pytest.mark.parametrize("name", FIXED)
def test_steps_at_the_ends_of_a_path_ask_at_least_once_and_no_more_than_others(name) -> None:
    line, n = SAMPLERS[name], 8
    count = len(asked(name, PATHS["linear"], torch.linspace(1, 0, n + 1, dtype=torch.float64))[0])
    assert line.calls * (n - 2) + 2 + line.extra <= count <= line.calls * n + line.extra


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(("name", "options"), OPTIONS, ids=str)
def test_nothing_is_asked_at_the_data_or_off_the_grid(name, options, path) -> None:
    """And what comes out is of finite numbers, for one step and for many, from pure noise to the data."""
    on = PATHS[path]
    for grid in ([1.0, 0.0], [1.0, 0.4, 0.0], [1.0, 0.95, 0.8, 0.55, 0.3, 0.1, 0.01, 0.0], [0.8, 0.6, 0.5, 0.2]):
        times, end = asked(name, on, torch.tensor(grid, dtype=torch.float64), **options)
        assert all(grid[-1] <= t <= grid[0] and scales(on, t).sigma > 0 for t in times)
        assert bool(end.isfinite().all())


@pytest.mark.parametrize("name", DOWNWARD)
def test_one_step_to_the_data_is_the_answer_itself(name) -> None:
    """Of the methods that ask once there; Runge-Kutta's ask on the way."""
    for path in (PATHS["linear"], PATHS["ve"]):
        x, seen = STARTS * scales(path, 1.0).radius, []
        running = SAMPLERS[name].fn(path, x, torch.tensor([1.0, 0.0], dtype=torch.float64))
        end = drive(running, Bound(path, lambda x, t: seen.append(x * 0.25) or seen[-1]))
        if len(seen) == 1:
            torch.testing.assert_close(end, seen[0], rtol=1e-12, atol=1e-12)
        else:
            assert SAMPLERS[name].calls > 2


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_it_is_the_same_on_every_path(name) -> None:
    """At the same noise levels and in the same units, whatever the path does with time and scale."""
    line = SAMPLERS[name]
    results = {}
    for path, on in PATHS.items():
        recorder = Recorder(three_modes_at(on))
        times = levels(on, 12)
        first, last = (-1, 0) if line.inverse else (0, -1)
        x = STARTS * scales(on, float(times[first])).radius
        end = drive(line.fn(on, x, times, **path_free(line)), recorder)
        results[path] = end / scales(on, float(times[last])).radius
    for path in PATHS:
        torch.testing.assert_close(results[path], results["linear"], rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", FIXED)
def test_an_image_does_not_depend_on_its_batch_mates(name) -> None:
    path = PATHS["linear"]
    times = torch.linspace(1, 0, 8, dtype=torch.float64)
    x = torch.randn(5, 3, 4, 4, dtype=torch.float64)
    net = torch.nn.Linear(4, 4, dtype=torch.float64)
    denoise = Bound(path, lambda x, t: torch.tanh(net(x)) * (1 - float(t)))
    together = drive(SAMPLERS[name].fn(path, x, times), denoise)
    for i in range(5):
        alone = drive(SAMPLERS[name].fn(path, x[i : i + 1], times), denoise)
        torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-12, atol=1e-12)


def test_driven_together_they_end_where_each_ends_alone() -> None:
    """Every sampler at once, at different lengths: one forward a round, rows of different times in it."""
    path = PATHS["cosine"]

    def forward(x: Tensor, t: Tensor, cond: Any) -> Tensor:
        return torch.tanh(cond["shift"][:, None] + x * (1.5 - t.to(x)[:, None]))

    jobs, alone, rounds = [], [], []
    for k, name in enumerate(DETERMINISTIC):
        times = torch.linspace(1, 0, 4 + k % 5, dtype=torch.float64)
        x = torch.randn(1 + k % 3, 6, dtype=torch.float64)
        cond = {"shift": torch.full((len(x),), 0.1 * k, dtype=torch.float64)}
        jobs.append(Job(SAMPLERS[name].fn(path, x, times), path, Unguided(cond)))
        alone.append(
            drive(
                SAMPLERS[name].fn(path, x, times),
                Bound(path, lambda x, t, cond=cond: forward(x, x.new_full((len(x),), float(t)), cond)),
            )
        )
    together = drive_many(jobs, lambda x, t, cond: rounds.append(len(x)) or forward(x, t, cond))
    for one, other in zip(together, alone, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    assert max(rounds) == sum(len(end) for end in alone)


class Watch(TorchDispatchMode):
    """Counts what is computed, and refuses whatever waits for the device or copies from it."""

    def __init__(self) -> None:
        super().__init__()
        self.passes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func)
        assert not any(word in name for word in ("_local_scalar_dense", "_to_copy", "item", "nonzero")), name
        self.passes += 1
        return func(*args, **(kwargs or {}))


def watched(running: Any, answer: Callable[[Ask], Tensor]) -> Iterator[int]:
    """Run a sampler; yields how many operations it needs from each answer to its next question."""
    ask, told = next(running), None  # the plan is made before the first question
    while True:
        told = answer(ask)
        try:
            with Watch() as watch:
                ask = running.send(told)
        except StopIteration:
            yield watch.passes
            return
        yield watch.passes


@pytest.mark.parametrize(("name", "options"), [case for case in OPTIONS if case[0] in FIXED], ids=str)
@pytest.mark.parametrize("path", ["linear", "vp"])
def test_a_step_never_waits_for_the_device(name, options, path) -> None:
    on = PATHS[path]
    times = torch.linspace(1, 0, 21, dtype=torch.float64)
    running = SAMPLERS[name].fn(on, torch.randn(2, 3), times, **options)
    assert len(list(watched(running, lambda ask: torch.tanh(ask.x)))) >= 20


@pytest.mark.parametrize(
    ("name", "options", "most"),
    [
        ("ddim", {}, 2),
        ("dpm_1", {}, 2),
        ("dpmpp_2m", {}, 3),
        ("dpmpp_2m", {"of": "noise"}, 4),
        ("dpmpp_3m", {}, 4),
        ("exp_ab", {"order": 4}, 5),
        ("deis", {"order": 3}, 5),
        ("ipndm", {}, 6),
        ("unipc", {}, 7),
        ("unipc", {"order": 3}, 9),
        ("exp_abm", {}, 8),
        ("dpm_3", {}, 4),
        ("rk4", {}, 6),
    ],
    ids=str,
)
def test_a_step_costs_what_its_formula_needs(name, options, most) -> None:
    """One pass over memory for each state or answer in it; a pass is one operation on the whole state."""
    times = torch.linspace(1, 0, 21, dtype=torch.float64)
    running = SAMPLERS[name].fn(PATHS["linear"], torch.randn(2, 3), times, **options)
    assert max(watched(running, lambda ask: torch.tanh(ask.x))) <= most


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_gradients_flow_through_it(name) -> None:
    """The derivative by a parameter of the denoiser, against central differences."""
    path, line = PATHS["linear"], SAMPLERS[name]
    times = torch.linspace(1, 0, 7, dtype=torch.float64)
    x = torch.randn(3, 2, dtype=torch.float64)
    options = {"rtol": 1e-9, "atol": 1e-9} if line.adaptive else {}

    def result(theta: Tensor) -> Tensor:
        end = drive(line.fn(path, x, times, **options), Bound(path, lambda x, t: theta * torch.tanh(x + theta * t)))
        return end.square().sum()

    theta = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(result(theta), theta)
    h = 1e-4
    with torch.no_grad():
        numeric = (result(theta + h) - result(theta - h)) / (2 * h)
    torch.testing.assert_close(gradient, numeric, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", DOWNWARD)
def test_float32_follows_float64(name) -> None:
    path, line = PATHS["tabulated"], SAMPLERS[name]
    times = torch.linspace(1, 0, 13, dtype=torch.float64)
    denoise = Bound(path, lambda x, t: torch.tanh(2 * x))
    x = torch.randn(8, 4, dtype=torch.float64)
    exact = drive(line.fn(path, x, times), denoise)
    single = drive(line.fn(path, x.float(), times), denoise)
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), exact, rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_a_step_is_shown_for_each_question_and_one_for_the_result(name) -> None:
    path = PATHS["linear"]
    times = levels(path, 5)
    at, end = asked(name, path, times)
    x = STARTS * scales(path, float(times[-1 if SAMPLERS[name].inverse else 0])).radius
    steps = list(sample(SAMPLERS[name].fn(path, x, times), three_modes_at(path)))
    assert [step.t for step in steps] == [*at, 0.0]
    assert torch.equal(steps[0].x, x) and torch.equal(steps[-1].x, end)


def test_the_noise_of_a_clipped_answer_is_its_own_or_the_answers() -> None:
    """By hand: ADM takes what is in x beside the clamped x0 for noise, diffusers what the model took for it."""
    path, times = VariancePreserving(), torch.tensor([0.8, 0.4], dtype=torch.float64)
    x = torch.linspace(-4, 4, 9, dtype=torch.float64)[:, None]
    denoise = Bound(path, lambda x, t: x * 0.9)
    (a, b), (s, r) = path.alpha(times), path.sigma(times)
    clipped = (x * 0.9).clamp(-1, 1)
    for own, noise in ((False, (x - a * x * 0.9) / s), (True, (x - a * clipped) / s)):
        got = drive(ddim(path, x, times, clip=1.0, clipped_noise=own), denoise)
        torch.testing.assert_close(got, b * clipped + r * noise)

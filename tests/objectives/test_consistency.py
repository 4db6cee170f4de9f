"""Consistency: exact functions are fixed points, schedules have the published ends, and what is pulled to what."""

import math
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from taught import knows, lesson, rng, teacher_of
from torch import Tensor, nn

from oracles import SHAPES, gaussian_like
from sfumato.catalogue import SAMPLERS
from sfumato.denoiser import Denoiser
from sfumato.errors import ConfigError
from sfumato.grids import consistency as published
from sfumato.grids import karras, logistic
from sfumato.objectives import ConsistencyDistillation, ConsistencyTraining
from sfumato.objectives.consistency import HUBER, apart, end_of
from sfumato.paths import Cosine, Linear, Path, Tabulated, VarianceExploding
from sfumato.predictions import EPS, VELOCITY, X0, Prediction, V, bounded, edm

PATHS: tuple[Path, ...] = (Linear(), Cosine(), Tabulated(zero_terminal_snr=True), VarianceExploding(20.0))
paths = pytest.mark.parametrize("path", PATHS, ids=str)
FINE = partial(logistic, level=0.5, spread=1.3)


def exact_step(exact: Any) -> Any:
    """A sampler that steps by the exact flow."""

    def walk(path: Path, x: Tensor, times: Tensor) -> Any:
        if False:
            yield
        return exact.flow(path, x, float(times[0]), float(times[-1]))

    return walk


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("prediction", [X0, VELOCITY, V, edm(), bounded()], ids=lambda p: p.name)
@paths
def test_the_exact_ends_are_a_fixed_point(path: Path, prediction: Prediction, shape: tuple[int, ...]) -> None:
    """Of every prediction, that of x0 too, from pure noise to the data: no loss, and nothing pulls."""
    exact = gaussian_like(shape)
    student = knows(lambda x, t: exact.flow(path, x, t, 0.0), path, prediction)
    objective = ConsistencyDistillation(FINE, 6, exact_step(exact), 0.0, metric="l2")
    x0 = exact.draw(24, rng(1))
    loss = objective(lesson(student, teacher_of(exact, path)), x0, rng=rng(2))
    loss.value.backward()
    assert float(loss.each.max()) < 1e-10 and float(loss.value.detach()) < 1e-10
    assert abs(float(student.net.by.grad)) < 1e-6  # type: ignore[union-attr, arg-type]
    wrong = knows(lambda x, t: exact.x0(path, x, t), path, prediction)
    assert float(objective(lesson(wrong, teacher_of(exact, path)), x0, rng=rng(2)).each.max()) > 1e-4


@paths
def test_solvers_near_the_flow_leave_little(path: Path) -> None:
    """One step of the sampler that is asked for, from each row's own time: the loss falls with its order."""
    exact, found = gaussian_like((4, 3)), {}
    student = knows(lambda x, t: exact.flow(path, x, t, 0.0), path)
    grid = partial(logistic, level=1.0, spread=1.0)
    for name in ("ddim", "heun"):
        for n in (21, 41):
            solver = partial(SAMPLERS[name].fn, variable="angle") if name == "heun" else SAMPLERS[name].fn
            objective = ConsistencyDistillation(grid, n, solver, 0.0, metric="l2")
            with torch.no_grad():
                loss = objective(lesson(student, teacher_of(exact, path)), exact.draw(2048, rng(1)), rng=rng(2))
            found[name, n] = float(loss.value) ** 0.5
    assert found["heun", 21] < found["ddim", 21] / 3
    assert found["ddim", 41] < found["ddim", 21] / 1.7 and found["heun", 41] < found["heun", 21] / 2.5


@paths
def test_without_a_teacher_the_mean_of_what_is_said_is_the_next_ends(path: Path) -> None:
    """Where what is said at the lower point is linear in x, the minimiser is E[it | x_t], by the same noise in both."""
    exact, objective = gaussian_like((4, 1)), ConsistencyTraining(FINE, 2, 10, metric="l2")
    times = FINE(path, 11)
    t, s = float(times[5]), float(times[6])

    def best(x: Tensor, at: Tensor) -> Tensor:
        """The exact ends at s, and at t their mean over what x_t leaves open."""
        x0 = exact.x0(path, x, at)
        eps = (x - path.alpha(at)[:, None] * x0) / path.sigma(at)[:, None]
        below = path.alpha(torch.tensor(s)).double() * x0 + path.sigma(torch.tensor(s)).double() * eps
        here = (at - t).abs()[:, None] < 1e-5
        return torch.where(here, exact.flow(path, below, s, 0.0), exact.flow(path, x, at, 0.0))

    pair = replace(objective, grid=lambda path, n: torch.tensor([t, s, 0.0], dtype=torch.float64), first=3, last=3)
    student = knows(best, path)
    x0 = exact.draw(40_000, rng(1))
    pulls = []
    for seed in range(2):
        student.net.by.grad = None
        loss = pair(lesson(student, None, step=0, steps=10), x0, rng=rng(seed))
        rows = (loss.t - t).abs() < 1e-5
        value = loss.each[rows].mean()
        loss.value.backward()
        pulls.append(float(student.net.by.grad) / float(value) ** 0.5)
    assert max(map(abs, pulls)) < 0.05  # a few standard errors of a mean of 20000


@pytest.mark.parametrize("metric", ["huber", "l2", "l1"])
def test_metrics(metric: str) -> None:
    error = torch.randn(3, 2, 5, generator=rng(), dtype=torch.float64)
    zeros = torch.zeros_like(error, requires_grad=True)
    found = apart(zeros, error, metric, HUBER)  # type: ignore[arg-type]
    d, length = 10, error.flatten(1).norm(dim=1)
    c = 0.00054 * math.sqrt(d)
    want = {
        "huber": (torch.sqrt(length**2 + c**2) - c) / math.sqrt(d),
        "l2": length**2 / d,
        "l1": error.abs().flatten(1).mean(1),
    }
    torch.testing.assert_close(found, want[metric])
    apart(zeros, torch.zeros_like(error), metric, 0.0).sum().backward()  # type: ignore[arg-type]
    assert zeros.grad is not None and bool(zeros.grad.isfinite().all())


def test_the_published_schedules_have_their_ends() -> None:
    """N(0) = s0, N(K) = s1 + 1 and their law between; mu from mu0 towards 1, its half life in steps of N."""
    training = ConsistencyTraining(first=2, last=150, keep=0.9)
    assert [training.points(p) for p in (0.0, 1.0)] == [2, 151]
    assert training.points(0.25) == math.ceil(math.sqrt(0.25 * (151**2 - 4) + 4) - 1) + 1
    ns = [training.points(p / 100) for p in range(101)]
    assert ns == sorted(ns)
    assert training.follow(0, 100) == pytest.approx(math.exp(2 * math.log(0.9) / 1))
    assert training.follow(100, 100) == pytest.approx(math.exp(2 * math.log(0.9) / 150))
    assert ConsistencyTraining(keep=0).follow(3, 10) == 0 and ConsistencyDistillation(keep=0.95).follow(3, 10) == 0.95


def test_the_points_are_those_of_published_grids() -> None:
    """All but the last of ours, which is the data, and not the smallest level."""
    path = VarianceExploding(80.0)
    ours = karras(path, 40)
    torch.testing.assert_close(ours[:-1], published(path, 40)[:-1])


class Drops(nn.Module):
    """A network that is all dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.drop = nn.Parameter(torch.ones(())), nn.Dropout(0.5)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.scale * self.drop(torch.ones_like(x))


def test_both_branches_drop_the_same() -> None:
    student = Denoiser(Drops(), Linear(), X0).train()
    pair = lambda path, n: torch.tensor([0.8, 0.6, 0.4], dtype=torch.float64)
    loss = ConsistencyTraining(pair, 2, 2, 0.0)(lesson(student, None), torch.randn(4, 64), rng=rng())
    assert float(loss.each.max()) == 0
    said = student(torch.ones(4, 64), 0.5)
    assert 0 < float((said == 0).float().mean()) < 1  # it does drop, and another call drops others
    assert not torch.equal(said, student(torch.ones(4, 64), 0.5))


def test_gradients_go_through_the_noisier_branch_alone_and_the_slow_copy_is_asked() -> None:
    path, exact = Linear(), gaussian_like((4, 3))
    student, slow = knows(lambda x, t: 0 * x, path), knows(lambda x, t: 0 * x, path, by=1.0)
    loss = ConsistencyTraining(FINE, 8, 8, metric="l2")(lesson(student, None, slow), exact.draw(64, rng()), rng=rng())
    loss.value.backward()
    assert slow.net.by.grad is None and student.net.by.grad is not None
    inner = loss.t > float(FINE(path, 8)[-2]) + 1e-6
    torch.testing.assert_close(loss.each[inner], torch.ones_like(loss.each[inner]))


def test_at_the_data_the_end_is_there_whatever_a_network_says() -> None:
    student = knows(lambda x, t: x * torch.nan, Linear(), X0)
    x, s = torch.randn(2, 3, generator=rng(), dtype=torch.float64), torch.tensor([0.0, 0.0])
    torch.testing.assert_close(end_of(student, x, s, torch.tensor([0.2, 0.4]), None), x)


def test_what_cannot_be_is_refused() -> None:
    for bad, where in (
        (lambda: ConsistencyDistillation(points=1), "points"),
        (lambda: ConsistencyDistillation(keep=1.0), "keep"),
        (lambda: ConsistencyTraining(metric="mse"), "metric"),  # type: ignore[arg-type]
        (lambda: ConsistencyTraining(first=1), "first"),
        (lambda: ConsistencyTraining(first=20, last=10), "first"),
    ):
        with pytest.raises(ConfigError) as caught:
            bad()
        assert caught.value.where == f"objective.{where}"
    exact = gaussian_like((4, 3))
    noisy = knows(lambda x, t: exact.flow(Linear(), x, t, 0.0), Linear(), EPS)
    with pytest.raises(ConfigError, match="says nothing of the data"):
        ConsistencyTraining(FINE)(lesson(noisy, None), exact.draw(4, rng()), rng=rng())
    ConsistencyTraining()(lesson(noisy, None), exact.draw(4, rng()), rng=rng())  # which begins below pure noise
    with pytest.raises(ConfigError, match="needs a teacher"):
        ConsistencyDistillation()(lesson(noisy, None), exact.draw(4, rng()), rng=rng())

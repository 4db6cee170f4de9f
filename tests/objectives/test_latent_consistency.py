"""Latent consistency: its fixed point, its boundaries, what the student is told; and that it learns."""

import copy
import math
from itertools import pairwise

import pytest
import torch
from taught import Small, four_modes, knows, lesson, rng, sliced_wasserstein, teacher_of
from torch import Tensor

from oracles import SHAPES, Gaussian, gaussian_like
from sfumato.denoiser import Bound, Denoiser
from sfumato.errors import ConfigError
from sfumato.grids import linear, trailing
from sfumato.guidance import CFG
from sfumato.objectives.latent_consistency import LatentConsistency
from sfumato.objectives.teaching import Teacher
from sfumato.paths import Cosine, Linear, Path, Tabulated, VariancePreserving, along, noised
from sfumato.predictions import EPS, VELOCITY, X0, Prediction, V
from sfumato.samplers import SeededNoise, drive
from sfumato.samplers.consistency import lcm

PATHS: tuple[Path, ...] = (Linear(), Cosine(), VariancePreserving(), Tabulated("scaled_linear"))
L2 = LatentConsistency(loss="l2", points=20)


def endpoint(exact: Gaussian, path: Path, prediction: Prediction = X0, by: float = 0.0) -> Denoiser:
    """A student that knows where the flow ends."""
    return knows(lambda x, t: exact.flow(path, x, t, 0.0), path, prediction, by)


@pytest.mark.parametrize("path", PATHS, ids=str)
def test_where_ddim_is_exact_the_flow_itself_has_no_loss(path: Path) -> None:
    """Data of one point: a straight flow, which DDIM solves whatever its step."""
    exact = Gaussian(torch.tensor([0.3, -0.7], dtype=torch.float64), torch.zeros(2, dtype=torch.float64))
    x0 = exact.draw(64, rng(1))
    for skip in (1, 7, 20):
        objective = LatentConsistency(loss="l2", points=20, skip=skip)
        loss = objective(lesson(knows(lambda x, t: exact.x0(path, x, t), path), teacher_of(exact, path)), x0, rng=rng())
        assert float(loss.value.detach()) < 1e-20 and loss.each.shape == loss.t.shape == (64,)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("prediction", [X0, EPS, V, VELOCITY], ids=lambda p: p.name)
@pytest.mark.parametrize("path", PATHS, ids=str)
def test_of_a_gaussian_the_loss_is_the_error_of_a_step(
    path: Path, prediction: Prediction, shape: tuple[int, ...]
) -> None:
    """DDIM multiplies the distance from the mean by r where the flow multiplies it by sqrt(V_s / V_t)."""
    exact, n = gaussian_like(shape), 16
    if prediction == EPS:
        path = Tabulated("scaled_linear")  # where there is signal in the noise
    x0 = exact.draw(n, rng(1))
    loss = L2(lesson(endpoint(exact, path, prediction), teacher_of(exact, path)), x0, rng=rng(2))
    draws, times = rng(2), trailing(path, 20)
    i = torch.randint(20, (n,), generator=draws)
    eps = torch.randn(x0.shape, generator=draws, dtype=torch.float64)
    t, s = (along(one, x0) for one in (times[i], times[i + 1]))
    y = noised(path, x0, eps, times[i]) - path.alpha(t) * exact.mean
    before, after = exact.variance(path, x0, t), exact.variance(path, x0, s)
    kept = path.sigma(s) / path.sigma(t)
    r = kept + (path.alpha(s) - kept * path.alpha(t)) * path.alpha(t) * exact.std**2 / before
    error = exact.std * (r / after.sqrt() - 1 / before.sqrt()) * y
    torch.testing.assert_close(loss.each, error.square().flatten(1).mean(1), rtol=1e-6, atol=1e-12)
    torch.testing.assert_close(loss.value.detach(), error.square().mean(), rtol=1e-6, atol=1e-12)


def test_a_finer_grid_has_less_of_it() -> None:
    exact = gaussian_like((1, 3))
    losses = [
        LatentConsistency(loss="l2", points=n, grid=linear)(
            lesson(endpoint(exact, Linear()), teacher_of(exact, Linear())), exact.draw(4000, rng(1)), rng=rng()
        ).value.item()
        for n in (20, 40, 80)
    ]
    # an interval's error falls by 4, and its square by 16
    assert [math.log2(a / b) for a, b in pairwise(losses)] == pytest.approx([4, 4], abs=0.35)


def test_skipping_is_a_longer_step_on_the_same_points() -> None:
    exact, path = gaussian_like((1, 3)), Tabulated("scaled_linear")
    student, x0 = endpoint(exact, path), exact.draw(256, rng(1))
    fine = LatentConsistency(points=1000, skip=20)(lesson(student, teacher_of(exact, path)), x0, rng=rng(3))
    assert fine.t is not None and len(fine.t.unique()) > 150
    seen = student.net.seen[0][0]  # type: ignore[index]
    jumped = fine.t - seen
    over = fine.t <= 0.020001
    torch.testing.assert_close(jumped[~over], torch.full_like(jumped[~over], 0.02))
    assert torch.equal(seen[over], fine.t[over])  # asked where it began, and not used


def test_the_target_of_the_last_interval_is_the_end_of_the_step() -> None:
    """A network is never asked at the data, where it would say nothing of use."""
    exact, path = gaussian_like((1, 3)), Linear()

    def never(x: Tensor, t: Tensor) -> Tensor:
        assert bool((t > 0).all())
        return exact.flow(path, x, t, 0.0)

    objective = LatentConsistency(points=1, loss="l2")
    x0 = exact.draw(32, rng(1))
    loss = objective(lesson(knows(never, path), teacher_of(exact, path)), x0, rng=rng(2))
    eps = _noise_after_points(2, x0)
    error = exact.flow(path, eps, 1.0, 0.0) - exact.x0(path, eps, 1.0)
    torch.testing.assert_close(loss.value.detach(), error.square().mean())


def _noise_after_points(seed: int, x0: Tensor) -> Tensor:
    draws = rng(seed)
    torch.randint(1, (len(x0),), generator=draws)
    return torch.randn(x0.shape, generator=draws, dtype=torch.float64)


# the slow copy, and gradients


def test_the_target_is_the_slow_copys_and_teaches_the_student_alone() -> None:
    exact, path = gaussian_like((1, 3)), Linear()
    student, slow = endpoint(exact, path, by=0.5), endpoint(exact, path, by=-0.25)
    x0 = exact.draw(256, rng(1))
    loss = L2(lesson(student, teacher_of(exact, path), slow), x0, rng=rng(2))
    loss.value.backward()
    assert slow.net.by.grad is None and float(student.net.by.grad) != 0  # type: ignore[union-attr, arg-type]
    alone = L2(lesson(student, teacher_of(exact, path)), x0, rng=rng(2))
    assert float(alone.value.detach()) < float(loss.value.detach())
    assert L2.follow(3, 10) == 0.95 and LatentConsistency(keep=0.5).follow(0, 10) == 0.5


def test_dropout_is_the_same_on_both_sides() -> None:
    path, masks = Linear(), []

    class Net(torch.nn.Module):
        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            masks.append(torch.nn.functional.dropout(torch.ones_like(x), 0.5))
            return x

    exact = gaussian_like((1, 3))
    L2(lesson(Denoiser(Net(), path, X0), teacher_of(exact, path)), exact.draw(64, rng()), rng=rng())
    assert len(masks) == 2 and torch.equal(masks[0], masks[1]) and 0 < float((masks[0] == 0).double().mean()) < 1


def test_huber_is_of_each_element() -> None:
    exact, path = gaussian_like((1, 3)), Linear()
    student, slow, x0 = endpoint(exact, path, by=0.5), endpoint(exact, path), exact.draw(64, rng(1))
    of = [LatentConsistency(points=1, loss=loss, c=c) for loss, c in (("l2", 1.0), ("huber", 1e-9), ("huber", 1e4))]  # type: ignore[arg-type]
    square, narrow, wide = (one(lesson(student, teacher_of(exact, path), slow), x0, rng=rng(2)) for one in of)
    eps = _noise_after_points(2, x0)
    error = exact.flow(path, eps, 1.0, 0.0) + 0.5 - exact.x0(path, eps, 1.0)
    torch.testing.assert_close(narrow.value.detach(), error.abs().mean(), rtol=1e-6, atol=0)
    torch.testing.assert_close(2e4 * wide.value.detach(), square.value.detach(), rtol=1e-6, atol=0)
    torch.testing.assert_close(square.value.detach(), error.square().mean())


# guidance


def test_the_student_is_told_the_scale_that_the_teacher_steps_with() -> None:
    """Two conditions that answer with 1 and 0: a guided teacher answers with the scale, and so is the data's end."""
    path = Linear()

    class Net(torch.nn.Module):
        def forward(self, x: Tensor, t: Tensor, *, on: Tensor, guidance: Tensor | None = None) -> Tensor:
            return (on.double() if guidance is None else guidance.double())[:, None].expand_as(x)

    cond, null = {"on": torch.ones(64)}, {"on": torch.zeros(64)}
    objective = LatentConsistency(points=8, loss="l2", scales=(1.5, 4.0))
    assert objective.told == ("guidance",)
    student = Denoiser(Net(), path, X0)
    teacher = Teacher(Denoiser(Net(), path, X0), cond, lambda: null, CFG(scale=3.0))
    x0 = torch.zeros(64, 2, dtype=torch.float64)
    assert float(objective(lesson(student, teacher), x0, cond, rng()).value) < 1e-12
    fixed = LatentConsistency(points=8, loss="l2")
    knowing = knows(lambda x, t: torch.full_like(x, 3.0), path)
    assert fixed.told == () and float(fixed(lesson(knowing, teacher), x0, cond, rng()).value.detach()) < 1e-12


# boundaries


def test_the_published_boundary_is_the_samplers() -> None:
    path = Tabulated("scaled_linear")
    net = knows(lambda x, t: torch.tanh(x + along(t, x)), path)
    objective, x = LatentConsistency(boundary=10.0), torch.randn(4, 3, generator=rng(), dtype=torch.float64)
    for index in (0.0, 1.0, 19.0, 999.0):
        t = float(path.at(torch.tensor(index)))
        ours = objective.end(net, x, torch.full((4,), t, dtype=torch.float64), {}).detach()
        jump = lcm(path, x, torch.tensor([t, 0.0], dtype=torch.float64), boundary=10.0)
        theirs = drive(jump, Bound(path, lambda z, now: net(z, now), ("endpoint",)), SeededNoise.of([0] * 4)).detach()
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
        if index == 0:
            torch.testing.assert_close(ours, x, rtol=0, atol=1e-6)


@pytest.mark.parametrize("prediction", [EPS, V, VELOCITY], ids=lambda p: p.name)
@pytest.mark.parametrize("path", PATHS, ids=str)
def test_without_one_the_formula_of_x0_is_a_boundary(path: Path, prediction: Prediction) -> None:
    net = Denoiser(Small(path).double(), path, prediction)
    x = torch.randn(4, 2, generator=rng(), dtype=torch.float64)
    with torch.no_grad():
        end = LatentConsistency().end(net, x, torch.zeros(4, dtype=torch.float64), {})
    torch.testing.assert_close(end, x, rtol=0, atol=1e-9)


def test_what_cannot_be_meant_is_named() -> None:
    for wrong, where in (
        ({"skip": 0}, "skip"),
        ({"skip": 51}, "skip"),
        ({"keep": 1.0}, "keep"),
        ({"loss": "l1"}, "loss"),
    ):
        with pytest.raises(ConfigError) as error:
            LatentConsistency(**wrong)  # type: ignore[arg-type]
        assert error.value.where == f"objective.{where}"
    with pytest.raises(ConfigError, match="scales"):
        LatentConsistency(scales=(3.0, 1.0))
    exact = gaussian_like((1, 3))
    with pytest.raises(ConfigError, match="table of betas"):
        objective = LatentConsistency(boundary=10.0)
        objective(lesson(endpoint(exact, Linear()), teacher_of(exact, Linear())), exact.draw(4, rng()))
    with pytest.raises(ConfigError, match="needs a teacher"):
        LatentConsistency()(lesson(endpoint(exact, Linear()), None), exact.draw(4, rng()))


# it learns


def test_it_draws_a_mixture_in_a_few_steps() -> None:
    """The flow of four modes, learned by a small network from the exact teacher: 1, 2 and 4 calls."""
    torch.manual_seed(0)
    path, exact, n = Linear(), four_modes(), 4096
    objective = LatentConsistency(grid=linear, points=16, keep=0.9, c=0.03)
    student = Denoiser(Small(path), path, VELOCITY)
    slow, teacher = copy.deepcopy(student), teacher_of(exact, path)
    steps, draws = 1200, rng(1)
    optimizer = torch.optim.Adam(student.parameters(), 4e-3)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: 1 - k / steps)
    for step in range(steps):
        loss = objective(
            lesson(student, teacher, slow, step=step, steps=steps), exact.draw(256, draws).float(), rng=draws
        )
        optimizer.zero_grad()
        loss.value.backward()
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            pairs = list(zip(slow.parameters(), student.parameters(), strict=True))
            torch._foreach_lerp_([a for a, _ in pairs], [b for _, b in pairs], 1 - objective.follow(step, steps))
    real = exact.draw(n, rng(7))
    noise, ends = SeededNoise.of(range(n)), []
    with torch.no_grad():
        z = noise(torch.empty(n, 2))
        for calls in (1, 2, 4):
            jumps = lcm(path, z, linear(path, calls))
            ends.append(drive(jumps, Bound(path, lambda x, t: student(x, t), ("endpoint",)), noise))
    # the teacher's own 16 steps are 0.036 from the data, and its answer to one call 0.7
    assert max(sliced_wasserstein(real, end) for end in ends) < 0.08
    assert sliced_wasserstein(real, exact.x0(path, z.double(), 1.0)) > 0.5

"""Progressive distillation: what one step must answer to land where two do, rounds, grids that nest; and it learns."""

import copy
from functools import partial
from itertools import pairwise

import pytest
import torch
from taught import Small, four_modes, knows, lesson, rng, sliced_wasserstein, teacher_of
from torch import Tensor

from oracles import SHAPES, gaussian_like
from sfumato.denoiser import Bound, Denoiser
from sfumato.errors import ConfigError
from sfumato.grids import karras, linear, logistic, trailing
from sfumato.guidance import CFG
from sfumato.objectives.progressive import Progressive, lands
from sfumato.objectives.teaching import Teacher
from sfumato.objectives.weights import SNRPlusOne, Weight
from sfumato.paths import Cosine, Linear, Path, Tabulated, VariancePreserving
from sfumato.predictions import EPS, VELOCITY, X0, Prediction, V
from sfumato.samplers import drive
from sfumato.samplers.ddim import ddim

PATHS: tuple[Path, ...] = (Linear(), Cosine(), VariancePreserving(), Tabulated("scaled_linear"))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("path", PATHS, ids=str)
def test_one_step_to_what_it_must_answer_lands_where_two_do(path: Path, shape: tuple[int, ...]) -> None:
    """Salimans & Ho's x0, in the sampler's own step, at both ends of a path too."""
    exact = gaussian_like(shape)
    x = torch.randn(shape, generator=rng(), dtype=torch.float64)
    for times in ([1.0, 0.8, 0.6], [0.5, 0.3, 0.1], [0.2, 0.1, 0.0], [1.0, 0.5, 0.0]):
        grid = torch.tensor(times, dtype=torch.float64)
        two = drive(ddim(path, x, grid), exact.denoiser(path))
        t, s = (torch.full((len(x),), times[k], dtype=torch.float64) for k in (0, 2))
        wanted = lands(path, x, t, two, s)
        one = drive(ddim(path, x, grid[::2]), Bound(path, lambda z, now, wanted=wanted: wanted))
        torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-9)
        if times[2] == 0:
            torch.testing.assert_close(wanted, two, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("prediction", [X0, EPS, V, VELOCITY], ids=lambda p: p.name)
@pytest.mark.parametrize("path", PATHS, ids=str)
def test_who_answers_so_has_no_loss(path: Path, prediction: Prediction) -> None:
    """Of a Gaussian a step multiplies the distance from the mean by a number, and so does what one step must answer."""
    if prediction == EPS:
        path = Tabulated("scaled_linear")
    exact, objective = gaussian_like((1, 3)), Progressive(first=8, last=2)
    fine = objective.times(path, 2)
    pairs = {float(fine[2 * i]): (float(fine[2 * i + 1]), float(fine[2 * i + 2])) for i in range(2)}
    half = knows(lambda x, t: exact.x0(path, x, t), path)

    def answer(x: Tensor, t: Tensor) -> Tensor:
        rows = []
        for one, time in zip(x, t.tolist(), strict=True):
            middle, end = pairs[min(pairs, key=lambda known: abs(known - time))]
            grid = torch.tensor([time, middle, end], dtype=torch.float64)
            two = drive(ddim(path, one[None], grid), exact.denoiser(path))
            rows.append(lands(path, one[None], grid[:1], two, grid[2:]))
        return torch.cat(rows)

    x0 = exact.draw(32, rng(1))
    student = knows(answer, path, prediction)
    last = objective(lesson(student, teacher_of(exact, path), half), x0, rng=rng(2))
    last.value.backward()
    assert float(last.value.detach()) < 1e-15 and last.t is not None and last.each.shape == (32,)
    assert abs(float(student.net.by.grad)) < 1e-6  # type: ignore[union-attr, arg-type]
    off = objective(lesson(knows(answer, path, prediction, by=0.1), teacher_of(exact, path), half), x0, rng=rng(2))
    expected = objective_factor(objective, student, last.t) * 0.01 * prediction.gain(path, last.t) ** 2
    torch.testing.assert_close(off.value.detach(), expected.mean(), rtol=1e-6, atol=0)


def objective_factor(objective: Progressive, student: Denoiser, t: Tensor) -> Tensor:
    """max(SNR, 1) of the error in x0, for the error of the network's own answer."""
    path = student.path
    snr = (path.alpha(t) / path.sigma(t)) ** 2
    return snr.clamp(min=1) / student.prediction.gain(path, t) ** 2


@pytest.mark.parametrize("weight", [Progressive().weight, SNRPlusOne()], ids=str)
def test_weights_are_of_the_error_in_x0(weight: Weight) -> None:
    exact, path = gaussian_like((1, 3)), Cosine()
    objective, x0 = (
        Progressive(2, 2, weight=weight, grid=partial(logistic, level=1.0, spread=1.0)),
        exact.draw(64, rng(1)),
    )
    values = [
        objective(lesson(knows(lambda x, t: torch.tanh(x), path, p), teacher_of(exact, path), step=0), x0, rng=rng())
        for p in (V, VELOCITY, X0)
    ]
    for value in values[1:]:
        torch.testing.assert_close(value.value.detach(), values[0].value.detach(), rtol=1e-6, atol=0)


# rounds


def test_steps_are_halved_and_each_student_teaches_the_next() -> None:
    objective = Progressive(first=32, last=4)
    assert objective.rounds == 4 and objective.round(None, 10) == 3
    numbers = [objective.round(step, 10) for step in range(10)]
    assert numbers == [0, 0, 0, 1, 1, 2, 2, 2, 3, 3]
    copies = [step for step in range(10) if objective.follow(step, 10) == 0]
    assert copies == [2, 4, 7]  # the last step of each round but the last
    assert all(objective.follow(step, 10) in (0.0, 1.0) for step in range(10))
    assert [Progressive(4, 4).rounds, Progressive(8, 4).rounds, Progressive(64, 1).rounds] == [1, 2, 7]


def test_the_first_round_asks_the_teacher_and_others_the_slow_copy() -> None:
    exact, path, asked = gaussian_like((1, 3)), Linear(), []

    def of(name: str) -> Denoiser:
        def answer(x: Tensor, t: Tensor) -> Tensor:
            asked.append((name, sorted(set(t.tolist()))))
            return exact.x0(path, x, t)

        return knows(answer, path)

    teacher = Teacher(of("teacher"), {}, dict, CFG())
    for step, who, steps in ((0, "teacher", 4), (3, "slow", 2)):
        asked.clear()
        Progressive(4, 2)(
            lesson(of("student"), teacher, of("slow"), step=step, steps=4), exact.draw(64, rng()), rng=rng()
        )
        assert [name for name, _ in asked] == [who, who, "student"]
        starts = [k / steps for k in range(1, steps + 1)]
        assert asked[2][1] == pytest.approx(starts) and asked[0][1] == pytest.approx(starts)
        assert asked[1][1] == pytest.approx([time - 0.5 / steps for time in starts])


def test_the_student_and_its_copies_are_told_the_scale() -> None:
    path, told = Linear(), []

    class Net(torch.nn.Module):
        def forward(self, x: Tensor, t: Tensor, *, on: Tensor, guidance: Tensor | None = None) -> Tensor:
            told.append(guidance)
            return (on.double() if guidance is None else guidance.double())[:, None].expand_as(x)

    cond, null = {"on": torch.ones(32)}, {"on": torch.zeros(32)}
    objective = Progressive(4, 2, scales=(1.5, 4.0))
    assert objective.told == ("guidance",) and Progressive().told == ()
    net = Denoiser(Net(), path, X0)
    x0 = torch.zeros(32, 2, dtype=torch.float64)
    for step, silent in ((0, 2), (9, 0)):
        told.clear()
        loss = objective(
            lesson(net, Teacher(net, cond, lambda: null, CFG()), net, step=step, steps=10), x0, cond, rng()
        )
        assert float(loss.value) < 1e-12 and sum(one is None for one in told) == silent


# grids


@pytest.mark.parametrize("grid", [linear, logistic, trailing, partial(logistic, level=1.5, spread=1.5)], ids=str)
@pytest.mark.parametrize("path", PATHS, ids=str)
def test_grids_that_nest(path: Path, grid: object) -> None:
    objective = Progressive(first=16, last=1, grid=grid)  # type: ignore[arg-type]
    fine = [objective.times(path, 16 >> k) for k in range(5)]
    for more, fewer in pairwise(fine):
        torch.testing.assert_close(more[::2], fewer, rtol=0, atol=1e-6)


def test_what_cannot_be_meant_is_named() -> None:
    for first, last in ((30, 4), (4, 8), (4, 0)):
        with pytest.raises(ConfigError, match="halved"):
            Progressive(first=first, last=last)
    with pytest.raises(ConfigError, match=r"half of this grid's times[\s\S]*karras"):
        Progressive(grid=karras).times(Linear(), 4)
    exact = gaussian_like((1, 3))
    student = knows(lambda x, t: x, Linear(), EPS)
    with pytest.raises(
        ConfigError, match=r"student's answer says nothing of the data[\s\S]*grid=\{kind: linear, start"
    ):
        Progressive()(lesson(student, teacher_of(exact, Linear()), step=0), exact.draw(2, rng()))
    with pytest.raises(ConfigError, match="needs a teacher"):
        Progressive()(lesson(knows(lambda x, t: x, Linear()), None, step=0), exact.draw(2, rng()))


# it learns


def test_it_draws_a_mixture_in_a_few_steps() -> None:
    """Four modes from the exact teacher's 16 steps: rounds of 8, 4, 2 and 1, and DDIM with the last of each."""
    torch.manual_seed(0)
    path, exact, n = Linear(), four_modes(), 4096
    objective, steps, draws = Progressive(8, 1, weight=SNRPlusOne(30.0)), 1200, rng(1)
    student, teacher = Denoiser(Small(path), path, VELOCITY), teacher_of(exact, path)
    slow = copy.deepcopy(student)
    optimizer = torch.optim.Adam(student.parameters(), 4e-3)
    each = steps // objective.rounds
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: 1 - (k % each) / each)
    real, z = exact.draw(n, rng(7)), torch.randn(n, 2, generator=rng(9))
    far = {}
    for step in range(steps):
        now = lesson(student, teacher, slow, step=step, steps=steps)
        loss = objective(now, exact.draw(256, draws).float(), rng=draws)
        optimizer.zero_grad()
        loss.value.backward()
        optimizer.step()
        schedule.step()
        if (step + 1) % each == 0:
            calls = objective.first >> objective.round(step, steps)
            with torch.no_grad():
                drawn = drive(ddim(path, z, linear(path, calls)), Bound(path, lambda x, t: student(x, t)))
            far[calls] = sliced_wasserstein(real, drawn)
        if objective.follow(step, steps) == 0:
            slow = copy.deepcopy(student)
    # the teacher's own 16 steps are 0.036 from the data, and its answer to one call 0.7
    assert far.keys() == {8, 4, 2, 1} and max(far.values()) < 0.1

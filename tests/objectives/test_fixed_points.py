"""On one Gaussian the exact solution of each method of few steps is where it stands still, to 1e-6 or far below.

Of a method that learns from data alone the expectation is taken exactly, see `corners`. A method with a grid solves the
relation between its points, not the flow: what it finds is a recursion of slopes, which is the fixed point, and whose
end comes to the flow's as the grid grows finer. What a teacher's flow leaves to no chance has no loss at all.
"""

from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import torch
from corners import (
    At,
    fixed,
    lines,
    pull,
    pulls,
    slope_of_ends,
    slope_of_means,
    slopes_of_one_noise,
    slopes_of_steps,
)
from flowmaps import DATA, exact_student, exact_teacher
from taught import knows, lesson, rng, teacher_of
from test_adversarial import Linearly
from test_reflow import MEAN, STD, Straight
from torch import Tensor, nn

from sfumato.denoiser import Denoiser
from sfumato.exact import Gaussian
from sfumato.grids import logistic
from sfumato.objectives import (
    Adversarial,
    ConsistencyDistillation,
    ConsistencyTraining,
    ContinuousConsistency,
    Denoising,
    EasyConsistencyTraining,
    ImprovedConsistencyTraining,
)
from sfumato.objectives.couplings import OptimalTransport
from sfumato.objectives.latent_consistency import LatentConsistency
from sfumato.objectives.meanflow import ImprovedMeanFlow, MeanFlow
from sfumato.objectives.shortcut import Shortcut
from sfumato.objectives.teaching import Lesson
from sfumato.objectives.weights import EDM, ELBO, MinSNR, Weight
from sfumato.paths import Cosine, Linear, Path, Tabulated, VarianceExploding, VariancePreserving, along, noised
from sfumato.predictions import EPS, VELOCITY, X0, Prediction, V, bounded, edm
from sfumato.samplers.ddim import ddim

PATHS: tuple[Path, ...] = (Linear(), Cosine(), Tabulated(zero_terminal_snr=True), VarianceExploding(20.0))
paths = pytest.mark.parametrize("path", PATHS, ids=str)
predictions = pytest.mark.parametrize("prediction", [X0, VELOCITY, edm(), bounded()], ids=lambda p: p.name)
GRID = partial(logistic, level=0.5, spread=1.3)
ZERO = 1e-6


def off(student: Denoiser, by: float = 1.02) -> Denoiser:
    """With slopes that are a little wrong, those next to the data too."""
    with torch.no_grad():
        student.net.slopes.mul_(by)  # type: ignore[union-attr, operator]
    return student


# Flow matching


@pytest.mark.parametrize("weight", [Denoising().weight, MinSNR(), EDM(), ELBO()], ids=str)
@pytest.mark.parametrize("prediction", [X0, EPS, V, VELOCITY], ids=lambda p: p.name)
@paths
def test_denoising_and_flow_matching(
    path: Path, prediction: Prediction, weight: Weight, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The means, and so the velocity, at every time."""
    data, times = fixed(monkeypatch), torch.tensor([0.95, 0.5, 0.1], dtype=torch.float64)
    student = lines(path, prediction, times, slope_of_means(path, times))

    def losses() -> Any:
        return (Denoising(At(t), weight)(student, data()).value for t in times.tolist())

    assert pulls(student, losses()) < ZERO
    off(student)
    assert pulls(student, losses()) > 1e-4


@pytest.mark.parametrize("path", [Linear(), Cosine(), VarianceExploding(20.0)], ids=str)
@pytest.mark.parametrize("prediction", [X0, V, VELOCITY], ids=lambda p: p.name)
def test_optimal_transport(path: Path, prediction: Prediction) -> None:
    """Of one element the pairing is monotone: noise whose quantiles the data has is paired with it, in any order."""
    noise = torch.linspace(-2.5, 2.5, 33, dtype=torch.float64)[:, None]
    x0 = (MEAN + STD * noise)[torch.randperm(33, generator=rng())]
    for element in range(3):
        net = Straight(path, prediction)
        student = Denoiser(Of(net, element), path, prediction)
        objective = Denoising(At(0.6), coupling=Drawn(noise))
        loss = objective(student, x0[:, element : element + 1])
        loss.value.backward()
        assert float(loss.value.detach()) < 1e-20 and pull(student) < ZERO
        apart = replace(objective, coupling=Drawn(noise, paired=False))
        assert float(apart(student, x0[:, element : element + 1]).value.detach()) > 0.1


class Of(nn.Module):
    """One element of a flow of three."""

    def __init__(self, net: nn.Module, element: int) -> None:
        super().__init__()
        self.net, self.element = net, element

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        said: Tensor = self.net(x.expand(-1, 3), t)
        return said[:, self.element : self.element + 1]


class Drawn:
    """A coupling of given noise."""

    def __init__(self, noise: Tensor, paired: bool = True) -> None:
        self.noise, self.paired = noise, paired

    def __call__(self, path: Path, x0: Tensor, eps: Tensor, t: Tensor, rng: Any = None) -> Any:
        return OptimalTransport()(path, x0, self.noise, t) if self.paired else (x0, self.noise)


# Consistency


def pair(times: Tensor, i: int) -> Any:
    """A grid that is one pair of neighbours."""
    return lambda path, n: times[i : i + 2]


@predictions
@paths
@pytest.mark.parametrize("name", ["CT", "iCT"])
def test_consistency_training(name: str, path: Path, prediction: Prediction, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the recursion's slopes nothing pulls, at any point of the grid; where they are off, or the flow's, it does."""
    data, times = fixed(monkeypatch), GRID(path, 6).double()

    def losses(student: Denoiser) -> Any:
        for i in range(6):
            objective: Any = ConsistencyTraining(pair(times, i), metric="l2")
            if name == "iCT":
                objective = ImprovedConsistencyTraining(pair(times, i), 1, 1, span="angle", metric="l2")
            yield objective(lesson(student, None, step=0, steps=9), data(), rng=rng()).value

    found = lines(path, prediction, times, slopes_of_one_noise(path, times))
    assert pulls(found, losses(found)) < ZERO
    for wrong in (off(found), lines(path, prediction, times, slope_of_ends(path, times))):
        assert pulls(wrong, losses(wrong)) > 1e-3


def test_by_a_pseudo_huber_too_although_it_is_no_square(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is left of the error there does not depend on the state, and is as often above as below: so any even
    distance has the same fixed point. The mean for one element, by twenty nodes for the data and for the noise.
    """
    path, times = Linear(), torch.tensor([0.7, 0.5, 0.2, 0.0], dtype=torch.float64)
    nodes, weights = hermite(20)
    both = torch.cartesian_prod(nodes, nodes)
    shares = torch.cartesian_prod(weights, weights).prod(1)
    student = lines(path, X0, times, slopes_of_one_noise(path, times)[:, :1])
    mean, std = DATA.mean[:1], DATA.std[:1]

    def gradient(metric: Any) -> Tensor:
        objective = ImprovedConsistencyTraining(pair(times, 0), 1, 1, metric=metric, c=1.0)
        student.zero_grad()
        for (of_data, of_noise), share in zip(both.tolist(), shares.tolist(), strict=True):
            noise = torch.full((1, 1), of_noise, dtype=torch.float64)
            monkeypatch.setattr("sfumato.objectives.consistency.noise_like", lambda x0, rng, noise=noise: noise)
            loss = objective(lesson(student, None), (mean + std * of_data)[None], rng=rng())
            (share * loss.value).backward()
        return student.net.slopes.grad[0].clone()  # type: ignore[union-attr, index]

    assert float(gradient("l2").abs().max()) < 1e-9
    assert float(gradient("huber").abs().max()) < ZERO
    with torch.no_grad():
        student.net.slopes[0] *= 1.02  # type: ignore[union-attr, operator, index]
    assert float(gradient("huber").abs().max()) > 1e-3


def hermite(n: int) -> tuple[Tensor, Tensor]:
    """Nodes and weights for a standard normal (Golub & Welsch: the eigenvalues of Hermite's recurrence)."""
    beside = torch.arange(1, n, dtype=torch.float64).sqrt()
    values, vectors = torch.linalg.eigh(torch.diag(beside, 1) + torch.diag(beside, -1))
    return values, vectors[0] ** 2


def falling(objective: EasyConsistencyTraining, path: Path, t: float) -> Tensor:
    """A time, the one that it is pulled to, and so on down to the data."""
    times = [torch.tensor([t], dtype=torch.float64)]
    while float(times[-1]) > 0:
        low = objective.lower(path.sigma(times[-1]) / path.alpha(times[-1]), 1.0)
        times.append(torch.where(low > 1e-7, path.time(-2 * torch.log(low.clamp(min=1e-12))), 0 * low))
    return torch.cat(times)


@predictions
@paths
def test_easy_consistency_training(path: Path, prediction: Prediction, monkeypatch: pytest.MonkeyPatch) -> None:
    data = fixed(monkeypatch)
    objective = EasyConsistencyTraining(base=4.0, stages=1, span="angle", metric="l2")  # which ends at the data
    times = falling(objective, path, 0.9)
    assert 4 < len(times) < 40 and float(times[-1]) == 0

    def losses(student: Denoiser) -> Any:
        for t in times[:-1].tolist():
            yield replace(objective, times=At(t))(lesson(student, None), data(), rng=rng()).value

    found = lines(path, prediction, times, slopes_of_one_noise(path, times))
    assert pulls(found, losses(found)) < ZERO
    for wrong in (off(found), lines(path, prediction, times, slope_of_ends(path, times))):
        assert pulls(wrong, losses(wrong)) > 1e-3


@paths
def test_what_training_finds_comes_to_the_flow_as_pairs_come_nearer(path: Path) -> None:
    """In proportion to their distance: of grids, of shares of a level, and of DDIM's steps for a teacher's."""

    def far(times: Tensor, slopes: Any) -> float:
        ends = slope_of_ends(path, times[:1])
        return float((slopes(path, times)[:1] - ends).abs().max())

    grids = [GRID(path, n).double() for n in (64, 128, 256)]
    shares = [falling(EasyConsistencyTraining(base=q, stages=1), path, 0.9) for q in (64.0, 128.0, 256.0)]
    for family, slopes in ((grids, slopes_of_one_noise), (shares, slopes_of_one_noise), (grids, slopes_of_steps)):
        errors = [far(times, slopes) for times in family]
        assert errors[-1] < 0.02
        for more, less in pairwise(errors):
            assert less < more / 1.7, errors


@predictions
@paths
def test_distillation_by_steps_of_ddim(path: Path, prediction: Prediction) -> None:
    """A teacher's steps leave nothing to chance: where its steps end there is no loss, for any draws and any metric."""
    times = GRID(path, 8).double()
    teacher, x0 = teacher_of(DATA, path), DATA.draw(64, rng(1))
    methods: list[Any] = [ConsistencyDistillation(lambda p, n: times, 9, ddim, 0.0, metric=m) for m in ("l2", "huber")]
    methods += [LatentConsistency(lambda p, n: times, 8, loss=loss) for loss in ("l2", "huber")]
    for objective in methods:
        student = lines(path, prediction, times, slopes_of_steps(path, times))
        loss = objective(lesson(student, teacher), x0, rng=rng(2))
        loss.value.backward()
        assert float(loss.value.detach()) < 1e-12 and pull(student) < ZERO
        student.zero_grad()
        loss = objective(lesson(off(student), teacher), x0, rng=rng(2))
        loss.value.backward()
        assert float(loss.value.detach()) > 1e-6 and pull(student) > 1e-4


class Scaled(nn.Module):
    """The exact end, its spread times a power t of a weight, and shifted by another: what is wrong grows with time, for
    a multiple of the ends is as constant along flows as they are, and only the data tell it.
    """

    def __init__(self, path: Path, prediction: Prediction) -> None:
        super().__init__()
        self.path, self.prediction = path, prediction
        self.weight = nn.Parameter(torch.ones(3, dtype=torch.float64))
        self.shift = nn.Parameter(torch.zeros(3, dtype=torch.float64))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        apart = self.weight ** along(t, x) * (DATA.flow(self.path, x, t, 0.0) - DATA.mean)
        end = DATA.mean + along(t, x) * self.shift + apart
        return self.prediction.answer(self.path, end, x, t)


@pytest.mark.parametrize("t", [0.15, 0.5003, 0.93])
@predictions
@paths
def test_continuous_consistency_of_data(
    path: Path, prediction: Prediction, t: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = fixed(monkeypatch)
    objective = ContinuousConsistency(At(t), warmup=0, tangent="raw", adaptive=False)
    student = Denoiser(Scaled(path, prediction), path, prediction)
    loss = objective(lesson(student, None), data(), rng=rng())
    loss.value.backward()
    assert float(loss.each.max()) > 1e-5 and pull(student) < ZERO  # each row has a tangent, and their mean has none
    with torch.no_grad():
        student.net.weight.mul_(1.1)  # type: ignore[union-attr, operator]
    student.zero_grad()
    objective(lesson(student, None), data(), rng=rng()).value.backward()
    assert pull(student) > 10 * ZERO


# Jumps


@pytest.mark.parametrize("span", [(0.9, 0.3), (0.6003, 0.05), (0.5, 0.5), (0.4, 0.35)], ids=str)
@pytest.mark.parametrize("prediction", [X0, VELOCITY, V], ids=lambda p: p.name)
@pytest.mark.parametrize("method", [MeanFlow(), ImprovedMeanFlow()], ids=["meanflow", "improved"])
@paths
def test_mean_flows_of_data(
    path: Path, method: Any, prediction: Prediction, span: tuple[float, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """For jumps of every length, and of none."""
    data = fixed(monkeypatch)
    objective = replace(method, times=At(*span), still=0.0, power=0.0)
    found = []
    for weight in (1.0, 1.02):
        student = exact_student(path, prediction)
        with torch.no_grad():
            student.net.weight.fill_(weight)  # type: ignore[union-attr, operator]
        loss = objective(Lesson(student), data())
        loss.value.backward()
        assert float(loss.each.max()) > 1e-4
        found.append(pull(student))
    assert found[0] < ZERO and found[1] > 1e-4, found


class Steps(nn.Module):
    """A network that knows where DDIM's steps of 1 / n lead, times a weight that is 1; and the means."""

    def __init__(self, path: Path, n: int) -> None:
        super().__init__()
        self.path, self.n = path, n
        self.kept = slopes_of_steps(path, torch.linspace(1, 0, n + 1, dtype=torch.float64)).flip(0)
        self.weight = nn.Parameter(torch.ones((), dtype=torch.float64))

    def forward(self, x: Tensor, t: Tensor, *, until: Tensor) -> Tensor:
        at, end = ((self.n * one).round().long() for one in (t, until))
        factor = self.kept[at] / self.kept[end]  # of the distance from the mean, by the steps between
        alpha, sigma, alpha_, sigma_ = (along(f(s), x) for s in (t, until) for f in (self.path.alpha, self.path.sigma))
        q = sigma_ / sigma
        slope = torch.where(at[:, None] == end[:, None], 0.0, (factor - q) / (alpha_ - q * alpha))
        slope = torch.where(along(t == until, x), slope_of_means(self.path, t), slope)
        return self.weight * (DATA.mean + slope * (x - alpha * DATA.mean))


@pytest.mark.parametrize("finest", [2, 8, 64])
@paths
def test_shortcuts_of_steps(path: Path, finest: int) -> None:
    """Whatever the shortest steps are, jumps of where they lead have no loss, and no gradient."""
    student = Denoiser(Steps(path, finest), path, X0, answers=("jump",))
    method = Shortcut(finest=finest, bootstrap=0.5, times=At(0.37))
    taught = Lesson(student, exact_teacher(path), slow=student)
    loss = method(taught, DATA.draw(256, rng(1)), rng=rng(2))
    loss.value.backward()
    assert float(loss.value.detach()) < 1e-15 and pull(student) < ZERO
    student.net.weight.data.fill_(1.02)  # type: ignore[union-attr, operator]
    student.zero_grad()
    method(taught, DATA.draw(256, rng(1)), rng=rng(2)).value.backward()
    assert pull(student) > 1e-4


# Adversarial distillation


@pytest.mark.parametrize("prediction", [X0, VELOCITY, V], ids=lambda p: p.name)
@pytest.mark.parametrize("path", [Linear(), Cosine(), VariancePreserving(), VarianceExploding(4.0)], ids=str)
def test_adversarial_distillation_of_a_point(path: Path, prediction: Prediction) -> None:
    """Where all flows end in one point, the student that says so is held to it by no one: neither term moves it."""
    exact = Gaussian(torch.tensor([0.3, -0.7], dtype=torch.float64), torch.zeros(2, dtype=torch.float64))
    objective = Adversarial(Linearly, at=(0.9, 0.5), adversarial=0.0, r1=0.0)
    x0, teacher = exact.draw(32, rng(1)), teacher_of(exact, path)
    for by, most, least in ((0.0, ZERO, 0.0), (0.05, 1.0, 1e-3)):
        student = knows(lambda x, t: exact.flow(path, x, t, 0.0), path, prediction, by)
        taught = Lesson(student, teacher, critic=objective.critic(teacher.denoiser), step=0)
        loss = objective(taught, x0, rng=rng(2))
        loss.value.backward()
        assert least <= pull(student) < most and least**2 <= float(loss.value.detach()) < most


@pytest.mark.parametrize("path", [Linear(), Cosine(), VarianceExploding(4.0)], ids=str)
def test_adversarial_distillation_at_its_balance(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A student of the exact ends draws the data itself, and heads that know nothing cannot tell them apart: so none
    of them moves, the penalty included; and if the ends are too narrow, the heads learn it.
    """
    data = fixed(monkeypatch, noises=3)
    objective = Adversarial(Squares, at=(0.8,), times=At(0.6), distillation=0.0, r1=0.1)
    for weight, most, least in ((1.0, ZERO, 0.0), (0.8, 1.0, 1e-2)):
        student = Denoiser(Scaled(path, X0), path, X0)
        with torch.no_grad():
            student.net.weight.fill_(weight)  # type: ignore[union-attr, operator]
        teacher = teacher_of(DATA, path)
        critic = objective.critic(teacher.denoiser)
        objective(Lesson(student, teacher, critic=critic, step=0), data(), rng=rng()).value.backward()
        assert pull(student) < ZERO and least <= pull(critic) < most


class Squares(Linearly):
    """Heads of what the teacher says and of its square, which know nothing yet."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__(net)
        self.weight = nn.Parameter(torch.zeros(6, dtype=torch.float64))

    def forward(self, heard: dict[str, Tensor], t: Tensor, pooled: Tensor | None = None) -> Tensor:
        return torch.cat([heard["said"], heard["said"] ** 2], 1) @ self.weight[:, None]


def test_corners_have_the_moments_that_are_asked_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Means, spreads and products of data and noises, all to second order."""
    import sfumato.objectives.adversarial as module

    data = fixed(monkeypatch, noises=2)
    x0 = (data() - DATA.mean) / DATA.std
    first, second = (module.noise_like(x0, None) for _ in range(2))
    joined = torch.stack([x0[:, 0], first[:, 0], second[:, 0]])
    torch.testing.assert_close(joined.mean(1), torch.zeros(3).double(), rtol=0, atol=1e-12)
    torch.testing.assert_close(joined @ joined.T / 8, torch.eye(3).double(), rtol=0, atol=1e-12)
    assert joined.shape == (3, 8)
    x_t = noised(Linear(), data(), first, torch.full((8,), 0.4, dtype=torch.float64))
    torch.testing.assert_close(x_t.square().mean(0), (0.36 * (DATA.std**2 + DATA.mean**2) + 0.16).expand(3))

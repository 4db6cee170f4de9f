"""Reflow: an exact coupling is its fixed point, in every prediction and on every path, and it makes flows straight."""

import copy
import math

import pytest
import torch
from taught import sliced_wasserstein
from torch import Generator, Tensor, nn

from sfumato.denoiser import Denoiser
from sfumato.errors import ConfigError
from sfumato.exact import Mixture
from sfumato.objectives import Denoising
from sfumato.objectives.couplings import Independent, OptimalTransport
from sfumato.objectives.distances import Laplacian
from sfumato.objectives.reflow import Reflow, time_on
from sfumato.objectives.teaching import Lesson
from sfumato.paths import Cosine, Linear, Path, VarianceExploding, VariancePreserving, along, log_snr
from sfumato.predictions import EPS, VELOCITY, X0, Prediction, V, edm
from sfumato.samplers.ddim import ddim
from sfumato.samplers.drive import drive
from sfumato.samplers.runge_kutta import rk4
from sfumato.straightness import straightness
from sfumato.times import Uniform, UShaped, linear

PATHS: tuple[Path, ...] = (Linear(), Cosine(), VariancePreserving(), VarianceExploding())
PREDICTIONS: tuple[Prediction, ...] = (X0, VELOCITY, V, edm())
MEAN = torch.tensor([0.7, -0.3, 0.1], dtype=torch.float64)
STD = torch.tensor([0.5, 0.3, 1.2], dtype=torch.float64)


def rng(seed: int = 0) -> Generator:
    return Generator().manual_seed(seed)


class Straight(nn.Module):
    """What a network says that knows the flow from noise z to MEAN + STD z, straight on every path. by: its error."""

    def __init__(self, path: Path, prediction: Prediction, by: float = 0.0) -> None:
        super().__init__()
        self.path, self.prediction = path, prediction
        self.by = nn.Parameter(torch.full((3,), by, dtype=torch.float64))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = self.path.alpha(along(t, x)), self.path.sigma(along(t, x))
        z = (x - alpha * MEAN) / (alpha * STD + sigma)
        return self.prediction.answer(self.path, MEAN + STD * z + self.by, x, t)


def lesson(path: Path, prediction: Prediction, noise: Tensor | None, by: float = 0.0) -> Lesson:
    return Lesson(Denoiser(Straight(path, prediction, by), path, prediction), noise=noise)


NOISE = torch.randn(64, 3, generator=rng(), dtype=torch.float64)
DATA = MEAN + STD * NOISE
OBJECTIVES = (Reflow(), Reflow(huber=None), Reflow(Uniform(0.01, 0.99), falling=False), Reflow(steps=4))


@pytest.mark.parametrize("objective", OBJECTIVES, ids=str)
@pytest.mark.parametrize("path", PATHS, ids=lambda path: type(path).__name__)
def test_an_exact_coupling_leaves_its_flow_unchanged(path: Path, objective: Reflow) -> None:
    """Pairs of a straight flow: no error and no gradient, whatever the network predicts; and of another, some."""
    for prediction in PREDICTIONS:
        exact = lesson(path, prediction, NOISE)
        loss = objective(exact, DATA, rng=rng(1))
        loss.value.backward()
        assert float(loss.value.detach()) < 1e-9 and float(loss.each.max()) < 1e-9, prediction.name
        assert float(exact.student.net.by.grad.abs().max()) < 1e-6, prediction.name  # type: ignore[union-attr]
        assert float(objective(lesson(path, prediction, NOISE, 0.1), DATA, rng=rng(1)).value.detach()) > 1e-4
        mixed = objective(lesson(path, prediction, NOISE.flip(0)), DATA, rng=rng(1))
        assert float(mixed.value.detach()) > 0.01


@pytest.mark.parametrize("objective", OBJECTIVES, ids=str)
def test_the_same_error_costs_the_same_in_every_prediction_and_on_every_path(objective: Reflow) -> None:
    paths = PATHS[:2] if objective.steps else PATHS  # the others end a little before pure noise
    losses = [objective(lesson(a, b, NOISE, 0.1), DATA, rng=rng(1)).value.detach() for a in paths for b in PREDICTIONS]
    for loss in losses[1:]:
        torch.testing.assert_close(loss, losses[0], rtol=0.01, atol=0)
    ends = [objective(lesson(Linear(), one, NOISE, 0.1), DATA, rng=rng(1)).value.detach() for one in PREDICTIONS]
    torch.testing.assert_close(torch.stack(ends), ends[0].expand(len(ends)), rtol=1e-6, atol=0)


def test_the_published_loss() -> None:
    """(1 - t) (sqrt(|e|^2 + c^2) - c) / d with c = 0.00054 d, for the error e of the velocity."""
    by, s = 0.1, UShaped()(64, Linear(), rng(1)).double()
    e = torch.full((64, 3), by, dtype=torch.float64) / s[:, None]  # x0 = z - s u
    c = 0.00054 * 3
    published = (1 - s) * (torch.sqrt(e.square().sum(1) + c**2) - c) / 3
    loss = Reflow()(lesson(Linear(), VELOCITY, NOISE, by), DATA, rng=rng(1))
    assert float(loss.value.detach()) == pytest.approx(float(published.mean()), rel=1e-5)
    torch.testing.assert_close(loss.each, e.square().mean(1), rtol=1e-5, atol=0)
    plain = Reflow(huber=None, falling=False)(lesson(Linear(), VELOCITY, NOISE, by), DATA, rng=rng(1))
    assert float(plain.value.detach()) == pytest.approx(float(e.square().mean()), rel=1e-5)


def test_a_student_of_few_steps_is_asked_where_it_will_be() -> None:
    seen: list[Tensor] = []

    class Net(Straight):
        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            seen.append(t)
            return super().forward(x, t)

    Reflow(steps=4)(Lesson(Denoiser(Net(Linear(), X0), Linear(), X0), noise=NOISE), DATA, rng=rng(1))
    assert set(seen[0].tolist()) == {0.25, 0.5, 0.75, 1.0}
    Reflow(steps=1)(Lesson(Denoiser(Net(Cosine(), X0), Cosine(), X0), noise=NOISE), DATA, rng=rng(1))
    assert set(seen[1].tolist()) == {1.0}


@pytest.mark.parametrize("path", PATHS, ids=lambda path: type(path).__name__)
def test_times_on_a_path_are_those_of_the_noise_level(path: Path) -> None:
    s = torch.linspace(0.01, 0.98, 40, dtype=torch.float64)
    t = time_on(path, s)
    torch.testing.assert_close(log_snr(path, t), log_snr(Linear(), s), rtol=1e-6, atol=1e-6)
    ends = time_on(path, torch.tensor([0.0, 1.0], dtype=torch.float64))
    assert ends.tolist() == pytest.approx([0, 1], abs=1e-6)


def test_a_distance_of_pictures_counts_too() -> None:
    class Off(nn.Module):
        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return 0 * x

    noise, x0 = (torch.rand(4, 3, 16, 16, generator=rng(i)) * 2 - 1 for i in range(2))
    taught = Lesson(Denoiser(Off(), Linear(), X0), noise=noise)
    plain = Reflow()(taught, x0, rng=rng(1))
    both = Reflow(distance=Laplacian(), distance_weight=0.5)(taught, x0, rng=rng(1))
    apart = float(Laplacian()(torch.zeros_like(x0), x0).mean())
    assert float(both.value) == pytest.approx(float(plain.value) + apart / 2, rel=1e-5)
    assert float(both.parts["distance"]) == pytest.approx(apart, rel=1e-5)
    assert float(both.parts["velocity"]) == pytest.approx(float(plain.parts["velocity"]))


def test_noise_predictions_too_but_at_pure_noise() -> None:
    loss = Reflow(UShaped(high=0.95))(lesson(Linear(), EPS, NOISE), DATA, rng=rng(1))
    assert float(loss.value.detach()) < 1e-9


def test_what_cannot_be() -> None:
    with pytest.raises(ConfigError, match="learns from pairs"):
        Reflow()(lesson(Linear(), X0, None), DATA)
    for wrong in ({"huber": 0.0}, {"steps": 0}):
        with pytest.raises(ConfigError):
            Reflow(**wrong)
    for wrong in ({"a": 0.0}, {"low": 0.5, "high": 0.4}):
        with pytest.raises(ConfigError):
            UShaped(**wrong)


def test_the_density_is_the_papers() -> None:
    """exp(a u) a / (exp(a) - 1) on [0, 1], and the same from the other end, each half of the time."""
    t = torch.linspace(0.02, 0.98, 25, dtype=torch.float64)
    one = 4 * torch.exp(4 * t) / (math.exp(4) - 1)
    torch.testing.assert_close(UShaped(low=0, high=1).pdf(Linear(), t), (one + one.flip(0)) / 2, rtol=1e-9, atol=0)


class Small(nn.Module):
    """A network of a point in the plane and a time."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(3, 96), nn.SiLU(), nn.Linear(96, 96), nn.SiLU(), nn.Linear(96, 2))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        said: Tensor = self.body(torch.cat([x, t[:, None]], 1))
        return said


PROBE = torch.randn(512, 2, generator=rng(9))


CORNERS = torch.tensor([[1, 1], [1, -1], [-1, 1], [-1, -1]], dtype=torch.float64)
MODES = Mixture(torch.full((4,), 0.25, dtype=torch.float64), 1.2 * CORNERS, torch.full((4, 2), 0.15).double())


@pytest.fixture(scope="module")
def modes() -> Tensor:
    """Draws of four modes around a circle."""
    return MODES.draw(8192, rng()).float()


@pytest.fixture(scope="module")
def first(modes: Tensor) -> Denoiser:
    """A flow to them that was learned from noise and data, drawn apart."""
    return flow_to(modes, Denoising(), 500, 512)


def flow_to(modes: Tensor, objective: Denoising, steps: int, batch: int) -> Denoiser:
    torch.manual_seed(0)
    model = Denoiser(Small(), Linear(), VELOCITY)
    _trained(model, lambda rows, draws: objective(model, modes[rows], rng=draws), steps, batch)
    return model


def ends_of(model: Denoiser, noise: Tensor) -> Tensor:
    with torch.no_grad():
        return drive(rk4(Linear(), noise, linear(Linear(), 12)), model)


def one_step_error(model: Denoiser, truth: Tensor) -> float:
    with torch.no_grad():
        return float((drive(ddim(Linear(), PROBE, linear(Linear(), 1)), model) - truth).square().mean())


def far(model: Denoiser) -> dict[int, float]:
    """The sliced Wasserstein distance of the data and of what Euler's method draws in 1, 2 and 4 steps.

    Of as many draws of the data itself it is 0.02.
    """
    real, noise, found = MODES.draw(4096, rng(21)), torch.randn(4096, 2, generator=rng(22)), {}
    for n in (1, 2, 4):
        with torch.no_grad():
            found[n] = sliced_wasserstein(drive(ddim(Linear(), noise, linear(Linear(), n)), model), real)
    return found


def again(model: Denoiser, objective: Reflow, steps: int) -> Denoiser:
    """A copy of a model that learns from its pairs."""
    noise = torch.randn(8192, 2, generator=rng(3))
    ends, student = ends_of(model, noise), copy.deepcopy(model)
    _trained(student, lambda rows, draws: objective(Lesson(student, noise=noise[rows]), ends[rows], rng=draws), steps)
    return student


def test_a_mixtures_flow_is_straighter_after_reflow(first: Denoiser) -> None:
    """The flow that is learned first bends; learned again from its own ends it hardly does, and one step of Euler's
    method then draws what many did; still more so, once it has looked only where that step asks. And in few steps it
    is nearer to the data than its teacher, which learned by flow matching, in as many.
    """
    second = again(first, Reflow(UShaped(low=0.02), huber=None, falling=False), 500)
    before, after = (straightness(one, PROBE, 40) for one in (first, second))
    assert float(after.each.mean()) < float(before.each.mean()) / 10
    truth = ends_of(first, PROBE)
    assert one_step_error(second, truth) < one_step_error(first, truth) / 10
    third, truth = again(second, Reflow(huber=None, steps=1), 200), ends_of(second, PROBE)
    assert one_step_error(third, truth) < one_step_error(second, truth)
    taught, straight, once = far(first), far(second), far(third)
    assert 0.8 < taught[1] < 1.1 and 0.35 < taught[2] < 0.55 and 0.12 < taught[4] < 0.22, taught
    assert straight[1] < 0.2 and straight[2] < 0.15 and straight[4] < 0.12, straight
    assert once[1] < 0.14 and once[1] < straight[1], once


def test_noise_that_is_paired_makes_the_first_flow_straighter(modes: Tensor) -> None:
    """And nearer to the data in 1, 2 and 4 steps of Euler's method than one whose noise is not."""
    models = [
        flow_to(modes, Denoising(coupling=coupling), 400, 128) for coupling in (Independent(), OptimalTransport())
    ]
    apart, paired = (straightness(model, PROBE, 40) for model in models)
    plain, best = (far(model) for model in models)
    assert plain[1] > 0.7 and plain[2] > 0.35 and plain[4] > 0.18, plain
    assert best[1] < 0.24 and best[2] < 0.17 and best[4] < 0.14, best
    assert float(paired.each.mean()) < float(apart.each.mean()) / 3
    off = paired.x0.abs() - 1.2  # where the modes are
    assert float(off.abs().median()) < 0.2


def _trained(model: Denoiser, loss_of: object, steps: int, batch: int = 512) -> None:
    optimizer, draws = torch.optim.Adam(model.parameters(), 4e-3), rng(7)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 4e-3 * (1 - step / steps)
        rows = torch.randint(8192, (batch,), generator=draws)
        optimizer.zero_grad()
        loss_of(rows, draws).value.backward()  # type: ignore[operator]
        optimizer.step()

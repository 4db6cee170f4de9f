"""Continuous consistency: the tangent is 0 at the exact ends, is the paper's in TrigFlow, and rises and is tamed."""

import math
from collections.abc import Callable

import pytest
import torch
from taught import knows, lesson, rng, teacher_of
from torch import Tensor

from oracles import SHAPES, Gaussian, gaussian_like, mixture_like
from sfumato.denoiser import Denoiser
from sfumato.errors import ConfigError
from sfumato.nets.dit import DiT, DiTConfig
from sfumato.objectives import ContinuousConsistency
from sfumato.objectives.continuous_consistency import Uncertainty, by_log_level
from sfumato.objectives.teaching import Lesson
from sfumato.objectives.weights import EDM, Flat
from sfumato.paths import Cosine, Linear, Path, Tabulated, VarianceExploding, along, log_snr, noised
from sfumato.predictions import EPS, VELOCITY, X0, Prediction, V, bounded, edm
from sfumato.times import Uniform

PATHS: tuple[Path, ...] = (Linear(), Cosine(), Tabulated(), VarianceExploding(20.0))
paths = pytest.mark.parametrize("path", PATHS, ids=str)
predictions = pytest.mark.parametrize("prediction", [X0, EPS, VELOCITY, V, edm(), bounded()], ids=lambda p: p.name)


def states(path: Path, exact: Gaussian, n: int = 6) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x0 = exact.draw(n, rng(1))
    eps = torch.randn(x0.shape, generator=rng(2), dtype=torch.float64)
    t = torch.linspace(0.05, 0.95, n, dtype=torch.float64)
    return noised(path, x0, eps, t), t, x0, eps


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@predictions
@paths
def test_the_tangent_is_zero_at_the_exact_ends(path: Path, prediction: Prediction, shape: tuple[int, ...]) -> None:
    exact = gaussian_like(shape)
    x_t, t, x0, eps = states(path, exact)
    taught = lesson(knows(lambda x, t: exact.flow(path, x, t, 0.0), path, prediction), teacher_of(exact, path))
    tangent = ContinuousConsistency().tangent_of(taught, x_t, t, x0, eps)
    assert float(tangent.abs().max()) < 1e-9
    wrong = lesson(knows(lambda x, t: exact.x0(path, x, t), path, prediction), teacher_of(exact, path))
    assert float(ContinuousConsistency().tangent_of(wrong, x_t, t, x0, eps).abs().max()) > 1e-2


@paths
def test_a_difference_is_near_the_tangent_and_blind_to_ripples(path: Path) -> None:
    exact = gaussian_like((4, 3))
    x_t, t, x0, eps = states(path, exact)

    def rippled(x: Tensor, t: Tensor) -> Tensor:
        return exact.flow(path, x, t, 0.0) + 1e-3 * torch.sin(2e3 * along(t, x))

    def largest(end: Callable[[Tensor, Tensor], Tensor], difference: float) -> float:
        objective = ContinuousConsistency(difference=difference)
        taught = lesson(knows(end, path), teacher_of(exact, path))
        return float(objective.tangent_of(taught, x_t, t, x0, eps).abs().max())

    assert largest(lambda x, t: exact.flow(path, x, t, 0.0), 1e-3) < 5e-3  # a table has corners
    assert largest(lambda x, t: exact.x0(path, x, t), 1e-3) > 1e-2
    assert largest(rippled, 0.2) < largest(rippled, 0.0) / 10


@predictions
@paths
def test_nothing_pulls_at_the_exact_ends(path: Path, prediction: Prediction) -> None:
    exact = gaussian_like((4, 3))
    student = knows(lambda x, t: exact.flow(path, x, t, 0.0), path, prediction)
    objective = ContinuousConsistency(Uniform(0.1, 0.9), tangent="raw")
    loss = objective(lesson(student, teacher_of(exact, path)), exact.draw(64, rng()), rng=rng(1))
    loss.value.backward()
    assert float(loss.each.max()) < 1e-15 and abs(float(student.net.by.grad)) < 1e-6  # type: ignore[union-attr, arg-type]


@paths
def test_of_data_alone_the_tangent_is_zero_in_the_mean(path: Path) -> None:
    """At a state, over the data that may lie behind it: here by regression of it on functions of the state."""
    exact = gaussian_like((4, 1))
    t = torch.full((40_000,), 0.5, dtype=torch.float64)
    x0 = exact.draw(len(t), rng(1))
    eps = torch.randn(x0.shape, generator=rng(2), dtype=torch.float64)
    x_t = noised(path, x0, eps, t)
    student = knows(lambda x, t: exact.flow(path, x, t, 0.0), path)
    found = ContinuousConsistency().tangent_of(lesson(student, None), x_t, t, x0, eps)
    for by in (torch.ones_like(x_t), x_t / x_t.std(), torch.sin(x_t)):
        product = found * by
        assert abs(float(product.mean())) < 4 * float(product.std()) / math.sqrt(len(t)) + 1e-9
    assert float(found.std()) > 1e-3


@pytest.mark.parametrize("r", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("teacher", [False, True])
@paths
def test_it_is_the_papers_tangent_in_trigflow(path: Path, teacher: bool, r: float) -> None:
    """g = -cos^2 (s F - dx/dtheta) - r cos sin (x + s dF/dtheta), its derivative here by a central difference of F."""
    data = mixture_like((4, 3))
    gaussian = gaussian_like((4, 3))
    spread, n = 0.7, 6
    x_t, t, x0, eps = states(path, gaussian, n)

    def end(x: Tensor, at: Tensor) -> Tensor:
        return torch.tanh(x) * torch.cos(along(log_snr(path, at), x) / 5)  # of no exact flow at all

    taught = lesson(
        knows(end, path, VELOCITY), teacher_of(data, path) if teacher else None, step=round(100 * r), steps=1000
    )
    found = ContinuousConsistency(sigma_data=spread, warmup=100).tangent_of(taught, x_t, t, x0, eps)

    theta = torch.atan2(path.sigma(t), spread * path.alpha(t))
    cos, sin = along(theta.cos(), x_t), along(theta.sin(), x_t)
    clean = data.x0(path, x_t, t) if teacher else x0
    noise = (x_t - along(path.alpha(t), x_t) * clean) / along(path.sigma(t), x_t)

    def network(x: Tensor, angle: Tensor) -> Tensor:
        """s F of TrigFlow's state and angle: from f = cos x - sin s F."""
        at = path.time(-2 * torch.log(spread * torch.tan(angle)))
        own = x * along(path.alpha(at) / angle.cos(), x)
        return (along(angle.cos(), x) * x - end(own, at)) / along(angle.sin(), x)

    x = x_t * cos / along(path.alpha(t), x_t)
    rate = cos * spread * noise - sin * clean
    h = 1e-5
    change = (network(x + h * rate, theta + h) - network(x - h * rate, theta - h)) / (2 * h)
    want = -(cos**2) * (network(x, theta) - rate) - r * cos * sin * (x + change)
    torch.testing.assert_close(found, want, rtol=1e-5, atol=1e-6)


@paths
def test_the_loss_is_the_papers(path: Path) -> None:
    """w |F - (F + g)|^2 of F of unit weight, by the noise level; what F is told is minus g, divided by its size."""
    exact, objective = gaussian_like((4, 3)), ContinuousConsistency(Uniform(0.1, 0.9), 0.7, 0, weight=EDM(0.7))
    student = knows(lambda x, t: torch.tanh(x), path, X0)
    x0 = exact.draw(8, rng())
    loss = objective(lesson(student, None), x0, rng=rng(1))
    chance = rng(1)
    t = Uniform(0.1, 0.9)(8, path, chance).double()
    eps = torch.randn(x0.shape, generator=chance, dtype=torch.float64)
    g = objective.tangent_of(lesson(student, None), noised(path, x0, eps, t), t, x0, eps)
    size = g.square().mean(1, keepdim=True).sqrt()
    torch.testing.assert_close(loss.each, g.square().mean(1), rtol=1e-5, atol=1e-9)
    w = path.alpha(t) / path.sigma(t)
    torch.testing.assert_close(loss.value, (w * (g / (size + 0.1)).square().mean(1)).mean(), rtol=1e-5, atol=0)
    loss.value.backward()
    theta = torch.atan2(path.sigma(t), 0.7 * path.alpha(t))[:, None]
    want = (w[:, None] * 2 * (g / (size + 0.1)) / (0.7 * theta.sin())).mean(1).mean()  # f = ... - sin s F
    torch.testing.assert_close(student.net.by.grad, want, rtol=1e-4, atol=1e-7)


def test_tangents_are_tamed() -> None:
    exact, x0 = gaussian_like((4, 3)), gaussian_like((4, 3)).draw(64, rng())
    student = knows(lambda x, t: 5 * torch.tanh(3 * x), Linear(), VELOCITY)
    values = {}
    for tangent in ("normalised", "clipped", "raw"):
        objective = ContinuousConsistency(Uniform(0.1, 0.9), tangent=tangent, by_level=False)  # type: ignore[arg-type]
        values[tangent] = float(objective(lesson(student, teacher_of(exact, Linear())), x0, rng=rng()).value.detach())
    assert values["normalised"] < 1 and values["clipped"] <= 1 < values["raw"]


def test_warm_up_and_weights() -> None:
    objective = ContinuousConsistency(warmup=10)
    student = knows(lambda x, t: x, Linear())
    assert [objective.risen(lesson(student, None, step=k, steps=99)) for k in (0, 5, 10, 20)] == [0, 0.5, 1, 1]
    assert objective.risen(lesson(student, None)) == 1
    t = torch.tensor([0.2, 0.5], dtype=torch.float64)
    level = t / (1 - t)
    for prediction in (X0, VELOCITY, edm()):
        own = knows(lambda x, t: x, Linear(), prediction)
        torch.testing.assert_close(objective.factor(own, t, level), 1 / level)
        plain = ContinuousConsistency(weight=Flat(), by_level=False).factor(own, t, level)
        torch.testing.assert_close(plain, (prediction.gain(Linear(), t) / edm().gain(Linear(), t)) ** 2)


@paths
def test_times_by_the_log_noise_level(path: Path) -> None:
    t = torch.linspace(0.1003, 0.8993, 5, dtype=torch.float64)  # between the times of a table
    h = 1e-6
    low, high = (path.time(log_snr(path, t) - 2 * k * h) for k in (-1, 1))
    torch.testing.assert_close(by_log_level(path, t), (high - low) / (2 * h), rtol=1e-5, atol=1e-8)


def test_the_adaptive_weight_learns_the_log_of_the_error() -> None:
    """Its stationary point, and that the number which is judged by has no such weight."""
    torch.manual_seed(0)
    exact = gaussian_like((4, 3))
    student = knows(lambda x, t: torch.tanh(x), Linear(), VELOCITY)
    objective = ContinuousConsistency(Uniform(0.4, 0.6), warmup=0)
    critic = objective.critic(student)
    assert isinstance(critic, Uncertainty) and float(critic(torch.tensor([0.3, 5.0])).detach().abs().max()) == 0
    optimizer = torch.optim.Adam(critic.parameters(), lr=0.03)
    x0 = exact.draw(512, rng())
    taught = Lesson(student, None, critic=critic, step=5, steps=9)
    for k in range(200):
        optimizer.zero_grad()
        objective(taught, x0, rng=rng(k)).value.backward()
        optimizer.step()
    alone = float(objective(Lesson(student, None, step=5, steps=9), x0, rng=rng(0)).value.detach())
    assert float(critic(torch.ones(1)).detach()) == pytest.approx(math.log(alone), abs=0.25)
    judged = objective(Lesson(student, None, critic=critic), x0, rng=rng(0)).value
    assert float(judged.detach()) == pytest.approx(alone, rel=1e-6)


def test_under_half_precision_tangents_are_of_single_precision() -> None:
    net = DiT(DiTConfig(size=8, patch=4, dim=32, depth=1, heads=2, qk_norm=True, pooled_dim=6))
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=rng(3)))
    student = Denoiser(net, Linear(), VELOCITY, lambda path, t: 1000 * t)
    objective = ContinuousConsistency(Uniform(0.2, 0.8), warmup=0)
    x0, pooled = torch.randn(4, 3, 8, 8, generator=rng()), torch.randn(4, 6, generator=rng()).bfloat16()
    plain = objective(Lesson(student), x0, {"pooled": pooled.float()}, rng=rng(1))
    with torch.autocast("cpu", torch.bfloat16):
        half = objective(Lesson(student), x0, {"pooled": pooled}, rng=rng(1))
    torch.testing.assert_close(half.each, plain.each, rtol=1e-6, atol=0)
    half.value.backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in net.parameters())


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ConfigError, match="no such tangent"):
        ContinuousConsistency(tangent="long")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="spread"):
        ContinuousConsistency(sigma_data=0.0)
    with pytest.raises(ConfigError, match="difference is not negative") as refused:
        ContinuousConsistency(difference=-0.1)
    assert refused.value.fix == "objective.difference=0"

"""The denoising objective: what it weighs equally, what minimises it, where its draws come from, and its ends."""

from itertools import product

import pytest
import torch
from torch import Generator, Tensor, nn

from oracles import SHAPES, Gaussian, gaussian_like
from sfumato.denoiser import Denoiser, unit_variance
from sfumato.objectives import Denoising
from sfumato.objectives.weights import (
    EDM,
    ELBO,
    P2,
    Flat,
    MinSNR,
    Sigmoid,
    SNRPlusOne,
    SoftMinSNR,
    TruncatedSNR,
    Weight,
)
from sfumato.paths import Cosine, Linear, Path, Tabulated, VarianceExploding, VariancePreserving, noised
from sfumato.predictions import EPS, SCORE, VELOCITY, X0, Prediction, V, edm
from sfumato.times import Density, LogitNormal, LogNormal, Stratified, Uniform

PATHS: tuple[Path, ...] = (
    Linear(),
    Cosine(),
    VarianceExploding(3.0),
    VariancePreserving(),
    Tabulated(),
    Tabulated("scaled_linear", zero_terminal_snr=True),
)
PREDICTIONS = (X0, EPS, V, VELOCITY, SCORE, edm())
WEIGHTS: tuple[Weight, ...] = (
    MinSNR(),
    SoftMinSNR(),
    TruncatedSNR(),
    SNRPlusOne(),
    EDM(),
    P2(),
    P2(1.0, 0.5),
    ELBO(),
    Sigmoid(),
)
paths = pytest.mark.parametrize("path", PATHS, ids=str)
predictions = pytest.mark.parametrize("prediction", PREDICTIONS, ids=lambda p: p.name)
weights = pytest.mark.parametrize("weight", WEIGHTS, ids=str)


class At:
    """Given times, of density 1: to look at one place."""

    def __init__(self, *times: float) -> None:
        self.times = torch.tensor(times, dtype=torch.float64)

    def __call__(self, n: int, path: Path, rng: Generator | None = None) -> Tensor:
        return self.times.expand(n) if len(self.times) == 1 else self.times

    def pdf(self, path: Path, t: Tensor) -> Tensor:
        return torch.ones_like(t)


class Says(nn.Module):
    """A network that knows a Gaussian, moved by parameters that are 0 where it is right."""

    def __init__(self, exact: Gaussian, path: Path, prediction: Prediction, by: float = 0.0) -> None:
        super().__init__()
        self.exact, self.path, self.prediction = exact, path, prediction
        self.by = nn.Parameter(torch.full((3,), by, dtype=torch.float64))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        x0 = self.exact.x0(self.path, x, t)
        time = t.reshape(-1, *(1,) * (x.ndim - 1))
        moved = x0 + self.by[0] + self.by[1] * torch.tanh(x) + self.by[2] * time * x0
        return self.prediction.answer(self.path, moved, x, t)


def says(path: Path, prediction: Prediction, by: float = 0.0, shape: tuple[int, ...] = (5, 3)) -> Denoiser:
    return Denoiser(Says(gaussian_like(shape), path, prediction, by), path, prediction)


def data(n: int, shape: tuple[int, ...] = (5, 3)) -> Tensor:
    return gaussian_like(shape).draw(n, Generator().manual_seed(7))


def rng(seed: int = 0) -> Generator:
    return Generator().manual_seed(seed)


# one loss, whatever the network predicts


@weights
@paths
def test_the_same_error_costs_the_same_in_every_prediction(path: Path, weight: Weight) -> None:
    objective = Denoising(Uniform(0.02, 0.97), weight)
    losses = [objective(says(path, p, 0.3), data(32), rng=rng()) for p in PREDICTIONS]
    for loss in losses[1:]:
        torch.testing.assert_close(
            loss.value, losses[0].value, rtol=1e-5, atol=0
        )  # times are drawn in single precision
        assert torch.equal(loss.t, losses[0].t)
    assert float(losses[0].value.detach()) > 0


@predictions
@pytest.mark.parametrize("space", PREDICTIONS, ids=lambda p: p.name)
def test_a_space_may_be_chosen(space: Prediction, prediction: Prediction) -> None:
    """Flat in a space is the plain square error of what the answer means there, averaged over elements, then rows."""
    for shape in SHAPES:
        path, x0 = Cosine(), data(5, shape)
        model = says(path, prediction, 0.3, shape)
        loss = Denoising(Uniform(0.05, 0.95), space=space)(model, x0, rng=rng())
        draws = rng()
        t = Uniform(0.05, 0.95)(5, path, draws).double()
        eps = torch.randn(x0.shape, generator=draws, dtype=torch.float64)
        x_t = noised(path, x0, eps, t)
        meant = space.answer(path, model(x_t, t), x_t, t)
        expected = (meant - space.target(path, x0, eps, t)).square().flatten(1).mean(1)
        torch.testing.assert_close(loss.value, expected.mean(), rtol=1e-9, atol=0)


def test_a_weight_may_be_moved_to_another_space() -> None:
    """min(SNR, 5), said of the velocity's error instead of the data's."""
    moved, plain = Denoising(weight=MinSNR(), space=VELOCITY), Denoising(weight=MinSNR())
    t = torch.linspace(0.1, 0.9, 9, dtype=torch.float64)
    model = says(Linear(), V)
    torch.testing.assert_close(moved.factor(model, t), plain.factor(model, t) / t**2, rtol=1e-9, atol=0)


def test_rows_are_reduced_before_they_are_weighed() -> None:
    """The value is the mean of factor times error, one of each a row; `each` is the plain error, without gradient."""
    model, objective = says(Linear(), VELOCITY, 0.3), Denoising(Uniform(0.1, 0.9), MinSNR())
    loss = objective(model, data(64), rng=rng())
    assert loss.each.shape == loss.t.shape == (64,) and not loss.each.requires_grad and loss.value.requires_grad
    torch.testing.assert_close(loss.value, (objective.factor(model, loss.t) * loss.each).mean())


def test_the_network_is_given_its_condition_and_its_scaled_input() -> None:
    seen: list[tuple[Tensor, Tensor]] = []

    class Net(nn.Module):
        def forward(self, x: Tensor, t: Tensor, *, label: Tensor) -> Tensor:
            seen.append((x, label))
            return x

    path, label, x0 = Linear(), torch.arange(6), torch.randn(6, 2, dtype=torch.float64)
    Denoising(At(0.5))(Denoiser(Net(), path, V, scale_input=unit_variance()), x0, {"label": label}, rng())
    draws = rng()
    x_t = (x0 + torch.randn(x0.shape, generator=draws, dtype=torch.float64)) / 2
    assert seen[0][1] is label
    torch.testing.assert_close(seen[0][0], x_t / (0.25 * 0.25 + 0.25) ** 0.5)


# what minimises it


class Affine(nn.Module):
    """y = w x + c, element by element: enough, at one time, for a Gaussian's every answer."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.w, self.c = (nn.Parameter(torch.zeros(shape, dtype=torch.float64)) for _ in range(2))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.w * x + self.c


@predictions
@pytest.mark.parametrize("path", [Linear(), VarianceExploding(3.0), Tabulated()], ids=str)
def test_training_finds_the_posterior_mean(path: Path, prediction: Prediction) -> None:
    exact, x0 = gaussian_like((1, 3)), data(10_000)
    model, objective = Denoiser(Affine((3,)), path, prediction), Denoising(At(0.4))
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=30, line_search_fn="strong_wolfe")

    def closure() -> float:
        optimizer.zero_grad()
        loss = objective(model, x0, rng=rng(3)).value
        loss.backward()
        return float(loss.detach())

    optimizer.step(closure)
    x = torch.linspace(-1.5, 1.5, 7, dtype=torch.float64)[:, None].expand(7, 3)
    # a regression on 10,000 draws: its standard error is at most about 0.01 in x0 within these bounds
    torch.testing.assert_close(model(x, 0.4).detach(), exact.x0(path, x, 0.4), rtol=0, atol=0.04)


@pytest.mark.parametrize(
    "times", [Uniform(0.05, 0.95), LogitNormal(0, 0.7), Stratified(), LogNormal(-0.5, 0.6)], ids=str
)
@pytest.mark.parametrize("weight", [Flat(), *WEIGHTS], ids=str)
def test_the_exact_answer_is_stationary_for_every_weight_and_density(weight: Weight, times: Density) -> None:
    """The gradient's mean is 0 at the posterior mean, within five standard errors, whatever moves it."""
    path, blocks = Cosine(), 20
    model, x0, draws = says(path, EPS), data(1000 * blocks), rng(5)
    gradients = []
    for part in x0.chunk(blocks):
        loss = Denoising(times, weight)(model, part, rng=draws).value
        gradients.append(torch.autograd.grad(loss, model.net.by)[0])  # type: ignore[arg-type]
    stacked = torch.stack(gradients)
    assert bool((stacked.mean(0).abs() < 5 * stacked.std(0) / blocks**0.5).all())
    away = says(path, EPS, 0.1)
    (pull,) = torch.autograd.grad(Denoising(times, weight)(away, x0, rng=rng(5)).value, away.net.by)  # type: ignore[arg-type]
    assert bool((pull > 5 * stacked.std(0) / blocks**0.5).all())  # and such a mean would be seen


@predictions
@paths
def test_errors_of_the_exact_answer_are_the_conditional_variance(path: Path, prediction: Prediction) -> None:
    """E|y - E[y | x_t]|^2 is gain^2 Var(x0 | x_t) = gain^2 S^2 sigma^2 / V, an element at a time."""
    exact, n, t = gaussian_like((1, 3)), 20_000, torch.tensor([0.35], dtype=torch.float64)
    loss = Denoising(At(0.35))(says(path, prediction), data(n), rng=rng())
    alpha, sigma = path.alpha(t), path.sigma(t)
    variance = exact.std**2 * sigma**2 / (alpha**2 * exact.std**2 + sigma**2)
    expected = float(prediction.gain(path, t) ** 2 * variance.mean())
    assert abs(float(loss.value.detach()) - expected) < 4 * float(loss.each.std()) / n**0.5


# the ends


@pytest.mark.parametrize("weight", [Flat(), *WEIGHTS], ids=str)
@predictions
def test_no_end_of_any_path_is_not_a_number(prediction: Prediction, weight: Weight) -> None:
    for path, end, dtype in product(PATHS, (0.0, 1.0), (torch.float32, torch.float64)):
        model = Denoiser(Zero(), path, prediction)
        objective = Denoising(At(end), weight)
        assert float(objective.factor(model, torch.tensor([end], dtype=dtype))) >= 0, path  # which NaN is not
        loss = objective(model, torch.randn(4, 2, generator=rng()).to(dtype), rng=rng())
        assert not bool(loss.value.isnan()) and bool(loss.each.isfinite().all()), path


class Zero(nn.Module):
    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return 0 * x


ZERO_TERMINAL = [Linear(), Cosine(), Tabulated("linear", zero_terminal_snr=True)]


@pytest.mark.parametrize(
    ("weight", "prediction", "limit"),
    [
        (MinSNR(), EPS, 1),  # min(SNR, 5) / SNR
        (SoftMinSNR(), EPS, 1),  # 4 / (SNR + 4)
        (P2(2.0, 1.0), EPS, 0.5),  # 1 / (2 + SNR)
        (MinSNR(), X0, 0),
        (MinSNR(), V, 0),  # min(SNR, 5) / (SNR + 1)
        (TruncatedSNR(), X0, 1),
        (TruncatedSNR(), V, 1),
        (SNRPlusOne(), V, 1),
        (EDM(), edm(), 1),
        (ELBO(), V, 0),  # SNR / (SNR + 1) |d log_snr / dt| / 2, which falls as 1 - t
        (ELBO(), VELOCITY, 0),
        (Sigmoid(), V, 0),
        (MinSNR(), VELOCITY, 0),
    ],
    ids=str,
)
def test_at_pure_noise_weights_are_their_limits(weight: Weight, prediction: Prediction, limit: float) -> None:
    for path, dtype in product(ZERO_TERMINAL, (torch.float32, torch.float64)):
        factor = Denoising(At(1.0), weight).factor(Denoiser(Zero(), path, prediction), torch.ones(1, dtype=dtype))
        assert float(factor) == pytest.approx(limit, rel=1e-4, abs=1e-6), path


# where the draws come from


def test_draws_come_from_the_generator_that_is_given() -> None:
    model, objective, x0 = says(Cosine(), V, 0.2), Denoising(), data(16)
    first = objective(model, x0, rng=rng(4))
    torch.manual_seed(99)
    torch.rand(3)
    again = objective(model, x0, rng=rng(4))
    assert torch.equal(first.value, again.value) and torch.equal(first.t, again.t)
    assert not torch.equal(objective(model, x0, rng=rng(5)).t, first.t)
    torch.manual_seed(4)
    assert torch.equal(objective(model, x0).value, first.value)  # without one: the global generator of the CPU


def test_draws_do_not_come_from_the_device() -> None:
    """On the meta device nothing can be drawn: times and noise must have been made on the CPU, and as many of them."""
    objective = Denoising(LogitNormal(), MinSNR())
    here, there = rng(), rng()
    x0 = torch.zeros(4, 3)
    objective(Denoiser(Zero(), Linear(), VELOCITY), x0, rng=here)
    loss = objective(Denoiser(Zero(), Linear(), VELOCITY), x0.to("meta"), rng=there)
    assert loss.value.device.type == loss.t.device.type == "meta"
    assert torch.equal(here.get_state(), there.get_state())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no accelerator")
@predictions
def test_a_device_gives_the_same_loss(prediction: Prediction) -> None:
    objective, x0 = Denoising(LogitNormal(), MinSNR()), torch.randn(16, 3, 4, 4, generator=rng())
    here = objective(Denoiser(Zero(), Cosine(), prediction), x0, rng=rng())
    there = objective(Denoiser(Zero(), Cosine(), prediction), x0.cuda(), rng=rng())
    torch.testing.assert_close(there.each.cpu(), here.each)
    torch.testing.assert_close(there.value.cpu(), here.value)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_data_has_a_loss_of_single_precision(dtype: torch.dtype) -> None:
    x0 = torch.randn(64, 3, generator=rng())
    objective = Denoising(weight=MinSNR())
    low = objective(Denoiser(Zero(), Linear(), VELOCITY), x0.to(dtype), rng=rng())
    assert low.value.dtype == low.each.dtype == low.t.dtype == torch.float32
    assert bool(low.value.isfinite())
    seen = []

    class Net(nn.Module):
        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            seen.append((x.dtype, t.dtype))
            return x

    objective(Denoiser(Net(), Linear(), VELOCITY), x0.to(dtype), rng=rng())
    assert seen == [(dtype, torch.float32)]

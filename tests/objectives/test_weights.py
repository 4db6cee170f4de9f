"""Weights and densities: the published table, column by column; integrals over log_snr; draws against their pdf."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Generator, Tensor, nn

from sfumato.denoiser import Denoiser
from sfumato.errors import ConfigError
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
from sfumato.paths import Cosine, Linear, Path, Tabulated, VarianceExploding, VariancePreserving, log_snr
from sfumato.predictions import EPS, SCORE, VELOCITY, X0, Prediction, V, edm
from sfumato.times import Density, LogitNormal, LogNormal, Stratified, Uniform, UShaped

Column = Callable[[Tensor], Tensor]
T = torch.linspace(0.02, 0.98, 97, dtype=torch.float64)


def sg(x: Tensor) -> Tensor:
    return 1 / (1 + torch.exp(-x))


@dataclass(frozen=True)
class Line:
    """A line of the published table: a weight and its columns, as functions of the SNR or, for a velocity, of t."""

    weight: Weight
    on_x0: Column
    on_eps: Column
    on_v: Column  # where variance is preserved
    on_velocity: Column  # on the linear path, where SNR = ((1 - t) / t)^2
    space: Prediction | None = None

    def __str__(self) -> str:
        return f"{self.weight}, {self.space.name}" if self.space else str(self.weight)


def snr_of(t: Tensor) -> Tensor:
    return ((1 - t) / t) ** 2


LINES = (
    Line(Flat(), lambda r: r, lambda r: 1 + 0 * r, lambda r: r / (r + 1), lambda t: (1 - t) ** 2, EPS),
    Line(
        MinSNR(5.0),
        lambda r: r.clamp(max=5),
        lambda r: r.clamp(max=5) / r,
        lambda r: r.clamp(max=5) / (r + 1),
        lambda t: t**2 * snr_of(t).clamp(max=5),
    ),
    Line(
        SoftMinSNR(4.0),
        lambda r: 4 * r / (r + 4),
        lambda r: 4 / (4 + r),
        lambda r: 4 * r / ((r + 4) * (r + 1)),
        lambda t: t**2 * 4 * snr_of(t) / (snr_of(t) + 4),
    ),
    Line(
        TruncatedSNR(),
        lambda r: r.clamp(min=1),
        lambda r: (1 / r).clamp(min=1),
        lambda r: r.clamp(min=1) / (r + 1),
        lambda t: t**2 * snr_of(t).clamp(min=1),
    ),
    Line(SNRPlusOne(), lambda r: r + 1, lambda r: 1 + 1 / r, lambda r: 1 + 0 * r, lambda t: t**2 + (1 - t) ** 2),
    Line(
        EDM(0.5),
        lambda r: r + 4,
        lambda r: 1 + 4 / r,
        lambda r: (r + 4) / (r + 1),
        lambda t: t**2 * (snr_of(t) + 4),
    ),
    Line(
        P2(1.0, 0.5),
        lambda r: r / (1 + r) ** 0.5,
        lambda r: (1 + r) ** -0.5,
        lambda r: r / (r + 1) ** 1.5,
        lambda t: (1 - t) ** 2 / (1 + snr_of(t)) ** 0.5,
    ),
    Line(ELBO(), lambda r: r, lambda r: 1 + 0 * r, lambda r: r / (r + 1), lambda t: (1 - t) ** 2),
    Line(
        Sigmoid(1.5),
        lambda r: math.exp(1.5) * sg(torch.log(r) - 1.5),
        lambda r: sg(1.5 - torch.log(r)),
        lambda r: sg(1.5 - torch.log(r)) * r / (r + 1),
        lambda t: (1 - t) ** 2 * sg(1.5 - torch.log(snr_of(t))),
    ),
)
lines = pytest.mark.parametrize("line", LINES, ids=str)


def model(path: Path, prediction: Prediction) -> Denoiser:
    return Denoiser(nn.Identity(), path, prediction)


def factor(line: Line, path: Path, prediction: Prediction, times: Density = Uniform(0.0, 1.0)) -> Tensor:
    """The factor, without what turns draws over t into a density over log_snr: the table is stated per log_snr."""
    found = Denoising(times, line.weight, line.space).factor(model(path, prediction), T)
    if line.weight.per_log_snr:
        level = T.clone().requires_grad_()
        (rate,) = torch.autograd.grad(log_snr(path, level).sum(), level)
        found = found / (rate.abs() / 2 / times.pdf(path, T))
    return found


def close(a: Tensor, b: Tensor, tolerance: float = 1e-9) -> None:
    torch.testing.assert_close(a, b, rtol=tolerance, atol=0)


@lines
@pytest.mark.parametrize(
    "path", [Linear(), Cosine(), VarianceExploding(3.0), VariancePreserving(), Tabulated()], ids=str
)
def test_the_columns_of_x0_and_eps_on_any_path(path: Path, line: Line) -> None:
    snr = (path.alpha(T) / path.sigma(T)) ** 2
    close(factor(line, path, X0), line.on_x0(snr))
    close(factor(line, path, EPS), line.on_eps(snr))


@lines
@pytest.mark.parametrize("path", [Cosine(), VariancePreserving(), Tabulated("cosine")], ids=str)
def test_the_column_of_v_where_variance_is_preserved(path: Path, line: Line) -> None:
    close(factor(line, path, V), line.on_v((path.alpha(T) / path.sigma(T)) ** 2))


@lines
def test_the_column_of_the_velocity_on_the_linear_path(line: Line) -> None:
    close(factor(line, Linear(), VELOCITY), line.on_velocity(T))


def test_flat_on_the_velocity_is_rectified_flow_whatever_the_network_predicts() -> None:
    flow = Denoising(space=VELOCITY)
    close(flow.factor(model(Linear(), VELOCITY), T), torch.ones_like(T))
    close(flow.factor(model(Linear(), X0), T), 1 / T**2)
    close(flow.factor(model(Linear(), EPS), T), 1 / (1 - T) ** 2)


@pytest.mark.parametrize("path", [Linear(), Cosine(), VarianceExploding(), Tabulated()], ids=str)
def test_edms_weight_is_one_on_f(path: Path) -> None:
    for sigma_data in (0.5, 1.3):
        own = Denoising(weight=EDM(sigma_data)).factor(model(path, edm(sigma_data)), T)
        close(own, torch.ones_like(T))


def test_the_soft_minimum_is_edms_in_disguise() -> None:
    """Crowson et al. 2024 weigh EDM's own loss by (sigma sigma_data)^2 / (sigma^2 + sigma_data^2)^2."""
    path, level, data = VarianceExploding(3.0), 3 * T, 0.5
    own = Denoising(weight=SoftMinSNR(data**-2)).factor(model(path, edm(data)), T)
    close(own, (level * data / (level**2 + data**2)) ** 2)


def test_weights_without_a_space_of_their_own_take_the_networks() -> None:
    for prediction in (X0, EPS, V, VELOCITY, SCORE, edm()):
        close(Denoising().factor(model(Linear(), prediction), T), torch.ones_like(T))


# densities

SMOOTH = (
    Uniform(),
    Uniform(0.0, 0.6),
    LogitNormal(),
    LogitNormal(-0.4, 0.7, 3.0),
    LogNormal(),
    LogNormal(0.3, 0.8),
    UShaped(),
    UShaped(2.0, 0.1),
)
DENSITIES: tuple[Density, ...] = (
    *SMOOTH,
    Stratified(),
    Stratified(Uniform(0.2, 0.7)),
    Stratified(LogitNormal(0.5, 1.2)),
    Stratified(LogNormal(-0.5, 0.9)),
)
densities = pytest.mark.parametrize("density", DENSITIES, ids=str)
paths = pytest.mark.parametrize("path", [Linear(), VarianceExploding(), VariancePreserving(), Tabulated()], ids=str)


def logit_grid(n: int = 100_000) -> tuple[Tensor, Tensor]:
    """Midpoints in the logit of t, and the widths of t that they stand for: fine at both ends."""
    z = -22 + 44 * (torch.arange(n, dtype=torch.float64) + 0.5) / n
    t = torch.sigmoid(z)
    return t, t * torch.sigmoid(-z) * (44 / n)


def mass(density: Density, path: Path) -> tuple[Tensor, Tensor]:
    """Times, and the share of the density around each."""
    t, width = logit_grid()
    of = density.of if isinstance(density, Stratified) else density
    inside = (
        (t >= of.low) & (t <= of.high) if isinstance(of, Uniform | UShaped) else torch.ones_like(t, dtype=torch.bool)
    )
    return t, density.pdf(path, t) * width * inside


@densities
@paths
def test_a_density_has_mass_one(path: Path, density: Density) -> None:
    assert float(mass(density, path)[1].sum()) == pytest.approx(1, abs=2e-4)


def distance(density: Density, path: Path, n: int, seed: int = 0) -> float:
    """Kolmogorov's: the largest gap between the share of draws below a time and the density's own."""
    drawn = density(n, path, Generator().manual_seed(seed)).double().sort().values
    t, share = mass(density, path)
    i = torch.searchsorted(t, drawn).clamp(max=len(t) - 1)
    expected = torch.cumsum(share, 0)[i]
    empirical = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    return float((expected - empirical).abs().max())


@densities
@paths
def test_draws_follow_their_density(path: Path, density: Density) -> None:
    n = 40_000
    t = density(n, path, Generator().manual_seed(0))
    assert t.shape == (n,) and t.dtype == torch.float32 and bool(((t > 0) & (t <= 1)).all())
    # Kolmogorov's 0.1 % point, and what the grid and single precision add
    assert distance(density, path, n) < 1.95 / n**0.5 + 5e-4


def test_a_slice_each() -> None:
    """Stratified draws have one time in every slice, in an order that says nothing."""
    n = 500
    shares: tuple[tuple[Uniform | LogitNormal | LogNormal, Column], ...] = (
        (Uniform(0.2, 0.7), lambda t: (t - 0.2) / 0.5),
        (LogitNormal(), lambda t: torch.special.ndtr(torch.logit(t))),
        (
            LogNormal(-1.0, 0.5),
            lambda t: torch.special.ndtr((torch.logit(t) + 1) / 0.5),
        ),  # sigma / alpha is t / (1 - t)
    )
    for of, share in shares:
        t = Stratified(of)(n, Linear(), Generator().manual_seed(0)).double()
        level = share(t)
        slices = level.sort().values * n - torch.arange(n)  # how far into its own slice each lies
        assert float(slices.min()) > -1e-3 and float(slices.max()) < 1 + 1e-3
        order = torch.arange(n, dtype=torch.float64)
        assert abs(float(torch.corrcoef(torch.stack([t, order]))[0, 1])) < 4 / n**0.5


def test_what_has_no_quantiles_cannot_be_stratified() -> None:
    with pytest.raises(ConfigError, match="cannot be stratified"):
        Stratified(Stratified())  # type: ignore[arg-type]


def test_lognormal_is_normal_in_the_noise_level_on_any_path() -> None:
    for path in (Linear(), Cosine(), VarianceExploding(), Tabulated()):
        t = LogNormal(-1.0, 0.5)(20_000, path, Generator().manual_seed(0)).double()
        level = -log_snr(path, t) / 2
        assert abs(float(level.mean()) + 1) < 5 * 0.5 / 20_000**0.5
        assert float(level.std()) == pytest.approx(0.5, rel=0.03)


def test_a_shift_of_the_logit_normal_multiplies_the_odds() -> None:
    rng = [Generator().manual_seed(1) for _ in range(2)]
    plain, moved = (LogitNormal(shift=by)(1000, Linear(), one) for by, one in zip((1.0, 3.0), rng, strict=True))
    torch.testing.assert_close(moved, 3 * plain / (1 + 2 * plain), rtol=1e-5, atol=0)


# integrals over log_snr, of the error of the exact denoiser of N(0, S^2)

S2 = 0.7


def irreducible(path: Path, prediction: Prediction, t: Tensor) -> Tensor:
    """E|y - E[y | x_t]|^2 an element: the variance of x0 given x_t, S^2 sigma^2 / V, in the prediction's own space."""
    alpha, sigma = path.alpha(t), path.sigma(t)
    return prediction.gain(path, t) ** 2 * S2 * sigma**2 / (alpha**2 * S2 + sigma**2)


def information(r: Tensor, bias: float | None) -> Tensor:
    """Half the integral of w(l) E|eps - E[eps | x_t]|^2 dl up to e^l = r: with w = 1, what x_t tells of x0, in nats.

    The error is r S^2 / (r S^2 + 1); with w = 1 / (1 + k r), k = e^-bias, partial fractions give the second form.
    """
    if bias is None:
        return torch.log1p(S2 * r) / 2
    k = math.exp(-bias)
    return S2 / (S2 - k) * (torch.log1p(S2 * r) - torch.log1p(k * r)) / 2


BOUNDS = [(ELBO(), None), (Sigmoid(2.0), 2.0), (Sigmoid(-1.0), -1.0)]


@pytest.mark.parametrize("prediction", [X0, EPS, V, VELOCITY, SCORE, edm()], ids=lambda p: p.name)
@pytest.mark.parametrize("density", [Uniform(0.05, 0.9), LogitNormal(0.3), LogNormal(), Stratified()], ids=str)
@pytest.mark.parametrize(
    "path", [Linear(), Cosine(), VarianceExploding(3.0), VariancePreserving(), Tabulated()], ids=str
)
def test_a_weight_over_log_snr_integrates_the_same_whatever_draws_the_times(path, density, prediction) -> None:
    t = 0.05 + 0.85 * (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000
    ends = torch.exp(log_snr(path, torch.tensor([0.05, 0.9], dtype=torch.float64)))
    for weight, bias in BOUNDS:
        weighed = Denoising(density, weight).factor(model(path, prediction), t) * irreducible(path, prediction, t)
        total = (weighed * density.pdf(path, t)).mean() * 0.85
        expected = information(ends[0], bias) - information(ends[1], bias)
        assert float(total) == pytest.approx(float(expected), rel=1e-5)


class Exact(nn.Module):
    """The posterior mean of N(0, S^2), said in a prediction's words."""

    def __init__(self, path: Path, prediction: Prediction) -> None:
        super().__init__()
        self.path, self.prediction = path, prediction

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        t = t[:, None]
        alpha, sigma = self.path.alpha(t), self.path.sigma(t)
        return self.prediction.answer(self.path, alpha * S2 / (alpha**2 * S2 + sigma**2) * x, x, t)


@pytest.mark.parametrize(("weight", "bias"), BOUNDS, ids=str)
@pytest.mark.parametrize(
    ("path", "prediction"), [(Linear(), VELOCITY), (Cosine(), V), (VarianceExploding(3.0), edm()), (Tabulated(), EPS)]
)
@pytest.mark.parametrize("density", [Uniform(0.05, 0.9), Stratified(Uniform(0.05, 0.9))], ids=str)
def test_the_loss_itself_is_that_integral(density, path, prediction, weight, bias) -> None:
    """By Monte Carlo, from the data on: 20,000 times, eight elements each."""
    rng, n = Generator().manual_seed(0), 20_000
    x0 = math.sqrt(S2) * torch.randn(n, 8, generator=rng, dtype=torch.float64)
    denoiser = Denoiser(Exact(path, prediction), path, prediction)
    objective = Denoising(density, weight)
    loss = objective(denoiser, x0, rng=rng)
    ends = torch.exp(log_snr(path, torch.tensor([0.05, 0.9], dtype=torch.float64)))
    expected = float(information(ends[0], bias) - information(ends[1], bias))
    spread = float((objective.factor(denoiser, loss.t) * loss.each).std()) / n**0.5
    assert abs(float(loss.value) - expected) < 4 * spread
    assert spread < 0.02 * expected  # so that the line above says something


def test_snr_plus_one_has_an_end_where_it_is_given_one() -> None:
    log_snr = torch.tensor([-4.0, 0.0, 2.0, 9.0], dtype=torch.float64)
    plain, ended = SNRPlusOne()(log_snr), SNRPlusOne(most=20.0)(log_snr)
    torch.testing.assert_close(ended[:3], plain[:3])
    assert float(ended[3]) == 21 < float(plain[3])

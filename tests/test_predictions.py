"""Predictions: inverses, the textbook's formulas, and the ends of a path, for any path and any shape of data."""

import copy
import math
from dataclasses import dataclass

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from oracles import SHAPES, gaussian_like
from sfumato.paths import (
    Cosine,
    Linear,
    Path,
    Tabulated,
    VarianceExploding,
    VariancePreserving,
    along,
    log_snr,
    noised,
)
from sfumato.predictions import EPS, SCORE, VELOCITY, X0, Prediction, V, bounded, edm

PREDICTIONS = (X0, EPS, V, VELOCITY, SCORE, edm(), edm(1.0), edm(1.7), edm(0.5, 1e-4), bounded(), bounded(0.4))
ZERO_TERMINAL = (
    Tabulated("scaled_linear", zero_terminal_snr=True),
    Tabulated("cosine", 50, zero_terminal_snr=True),
    Tabulated((0.1, 0.2), zero_terminal_snr=True),
)
PRESERVING = (Cosine(), VariancePreserving(), Tabulated(), Tabulated("cosine"), ZERO_TERMINAL[0])
PATHS: tuple[Path, ...] = (
    Linear(),
    VarianceExploding(),
    VarianceExploding(3.0),
    *PRESERVING,
    Tabulated("sigmoid"),
    Tabulated((0.1, 0.2, 0.4)),
    *ZERO_TERMINAL[1:],
)
paths = pytest.mark.parametrize("path", PATHS, ids=str)
predictions = pytest.mark.parametrize("prediction", PREDICTIONS, ids=lambda p: p.name)


@dataclass(frozen=True)
class Still:
    """A path seen at one instant: any two scales and any two rates."""

    a: float
    s: float
    a_rate: float = -1.0
    s_rate: float = 1.0

    def alpha(self, t: Tensor) -> Tensor:
        return torch.full_like(t, self.a)

    def sigma(self, t: Tensor) -> Tensor:
        return torch.full_like(t, self.s)

    def rates(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return torch.full_like(t, self.a_rate), torch.full_like(t, self.s_rate)

    def time(self, log_snr: Tensor) -> Tensor:
        raise NotImplementedError


def close(a: Tensor, b: Tensor, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def drawn(shape: tuple[int, ...], seed: int = 0) -> tuple[Tensor, Tensor]:
    """Data and noise of a shape."""
    rng = torch.Generator().manual_seed(seed)
    x0, eps = (torch.randn(shape, generator=rng, dtype=torch.float64) for _ in range(2))
    return x0, eps


def times(n: int) -> Tensor:
    """Times inside (0, 1) that no table's index falls on."""
    return torch.linspace(0.0213, 0.9787, n, dtype=torch.float64)


NOW = torch.tensor(0.5, dtype=torch.float64)


# inverses


@paths
@predictions
def test_an_answer_stands_for_the_data_it_was_made_of(prediction: Prediction, path: Path) -> None:
    for shape in SHAPES:
        (x0, eps), t = drawn(shape), times(shape[0])
        x_t, y = noised(path, x0, eps, t), prediction.target(path, x0, eps, t)
        close(prediction.x0(path, y, x_t, t), x0, 1e-10)
        close(prediction.answer(path, x0, x_t, t), y, 1e-10)
        other = drawn(shape, 1)[0]  # the two are inverses for what no network ought to say, too
        close(prediction.answer(path, prediction.x0(path, other, x_t, t), x_t, t), other, 1e-9)


@predictions
def test_one_time_for_all_is_the_same_time_for_each(prediction: Prediction) -> None:
    for shape in SHAPES:
        (x0, eps), path = drawn(shape), Cosine()
        one, each = torch.tensor(0.3, dtype=torch.float64), torch.full(shape[:1], 0.3, dtype=torch.float64)
        y = prediction.target(path, x0, eps, one)
        assert torch.equal(y, prediction.target(path, x0, eps, each))
        assert torch.equal(prediction.x0(path, y, eps, one), prediction.x0(path, y, eps, each))


@predictions
def test_a_row_depends_on_its_own_time_only(prediction: Prediction) -> None:
    """Every axis is as long as the batch, so that a time on the wrong axis would go unseen by shapes alone."""
    (x0, eps), t, path = drawn((4, 4, 4, 4)), times(4), Linear()
    x_t, y = noised(path, x0, eps, t), prediction.target(path, x0, eps, t)
    for i in range(4):
        close(prediction.target(path, x0[i : i + 1], eps[i : i + 1], t[i]), y[i : i + 1])
        close(prediction.x0(path, y[i : i + 1], x_t[i : i + 1], t[i]), x0[i : i + 1])


number = st.floats(-3, 3)


@settings(max_examples=200, deadline=None)
@given(st.floats(0.01, 2), st.floats(0.01, 100), st.floats(-5, 0), st.floats(0, 50), number, number, st.floats(0.1, 3))
def test_the_textbook_on_any_path(alpha, sigma, alpha_rate, sigma_rate, x, y, sigma_data) -> None:
    """Each conversion written out by hand, without a 2x2 system; EDM's in its own c_skip, c_out form."""
    path, level = Still(alpha, sigma, alpha_rate, sigma_rate), sigma / alpha
    det = alpha * sigma_rate - alpha_rate * sigma
    assume(abs(det) > 1e-3)
    c_skip = sigma_data**2 / (level**2 + sigma_data**2)
    c_out = level * sigma_data / math.sqrt(level**2 + sigma_data**2)
    by_hand = {
        X0: y,
        EPS: (x - sigma * y) / alpha,
        V: (alpha * x - sigma * y) / (alpha**2 + sigma**2),
        VELOCITY: (sigma_rate * x - sigma * y) / det,
        SCORE: (x + sigma**2 * y) / alpha,
        edm(sigma_data): c_skip * x / alpha + c_out * y,
    }
    low = level / 3  # consistency models count from a boundary, but for the root of c_out (Song et al. 2023)
    skip = sigma_data**2 / ((level - low) ** 2 + sigma_data**2)
    out = sigma_data * (level - low) / math.sqrt(level**2 + sigma_data**2)
    by_hand[edm(sigma_data, low)] = skip * x / alpha + out * y
    x_t, said = (torch.tensor([[value]], dtype=torch.float64) for value in (x, y))
    for prediction, expected in by_hand.items():
        found = float(prediction.x0(path, said, x_t, NOW))
        assert found == pytest.approx(expected, rel=1e-9, abs=1e-9 * (1 + level**2)), prediction.name


# what the names mean


@paths
def test_velocity_is_the_derivative_of_x_t(path: Path) -> None:
    for shape in SHAPES:
        (x0, eps), t, along_which = drawn(shape), times(shape[0]).requires_grad_(), drawn(shape, 2)[0]
        (rate,) = torch.autograd.grad((along_which * noised(path, x0, eps, t)).sum(), t)  # a row's, in some direction
        close((along_which * VELOCITY.target(path, x0, eps, t)).flatten(1).sum(1).detach(), rate, 1e-9)


@paths
def test_the_answers_of_the_exact_posterior_mean(path: Path) -> None:
    """Noise, score and the flow's velocity of a Gaussian, and the flow's drift from its score (Song et al. 2021)."""
    for shape in SHAPES:
        exact, t = gaussian_like(shape), times(shape[0])
        x_t = noised(path, exact.draw(shape[0], torch.Generator().manual_seed(3)), drawn(shape)[1], t)
        x0 = exact.x0(path, x_t, t)
        close(EPS.answer(path, x0, x_t, t), exact.eps(path, x_t, t), 1e-9)
        close(VELOCITY.answer(path, x0, x_t, t), exact.velocity(path, x_t, t), 1e-9)
        score = SCORE.answer(path, x0, x_t, t)
        mean, variance = path.alpha(along(t, x_t)) * exact.mean, exact.variance(path, x_t, t)
        close(score, (mean - x_t) / variance, 1e-9)
        alpha, sigma, (alpha_rate, sigma_rate) = path.alpha(t), path.sigma(t), path.rates(t)
        drift = alpha_rate / alpha
        diffusion = 2 * sigma * (sigma_rate - drift * sigma)  # g^2
        flow = along(drift, x_t) * x_t - along(diffusion, x_t) / 2 * score
        close(VELOCITY.answer(path, x0, x_t, t), flow, 1e-8)


@pytest.mark.parametrize("path", PRESERVING, ids=str)
def test_v_is_a_rotation_where_variance_is_preserved(path: Path) -> None:
    """Salimans & Ho 2022, appendix D: x0 = alpha x - sigma v, eps = sigma x + alpha v."""
    (x0, eps), t = drawn((7, 3)), times(7)
    x_t, v, alpha, sigma = noised(path, x0, eps, t), V.target(path, x0, eps, t), path.alpha(t), path.sigma(t)
    close(alpha[:, None] * x_t - sigma[:, None] * v, x0)
    close(sigma[:, None] * x_t + alpha[:, None] * v, eps)
    close(x_t**2 + v**2, x0**2 + eps**2)


def test_velocity_is_v_on_the_cosine_path_alone() -> None:
    (x0, eps), t = drawn((7, 3)), times(7)
    close(VELOCITY.target(Cosine(), x0, eps, t), math.pi / 2 * V.target(Cosine(), x0, eps, t))
    close(VELOCITY.target(Linear(), x0, eps, t), eps - x0)
    ratio = VELOCITY.target(Linear(), x0, eps, t) / V.target(Linear(), x0, eps, t)
    assert float(ratio.std()) > 0.1


@paths
def test_edm_is_v_upside_down_for_data_of_unit_variance(path: Path) -> None:
    (x0, eps), t = drawn((7, 3)), times(7)
    norm = torch.sqrt(path.alpha(t) ** 2 + path.sigma(t) ** 2)[:, None]
    close(edm(1.0).target(path, x0, eps, t), -V.target(path, x0, eps, t) / norm)


@pytest.mark.parametrize("sigma_data", [0.3, 0.5, 2.0])
@paths
def test_edm_has_unit_variance_and_says_nothing_of_x_t(path: Path, sigma_data: float) -> None:
    """What Karras et al. 2022 (appendix B.6) ask of F, for data of standard deviation sigma_data."""
    a, b = edm(sigma_data).mix(path, times(101))
    close((a * sigma_data) ** 2 + b**2, torch.ones_like(a))
    alpha, sigma = path.alpha(times(101)), path.sigma(times(101))
    close(a * alpha * sigma_data**2 + b * sigma, torch.zeros_like(a))


def test_a_boundary_is_where_the_state_is_the_answer() -> None:
    """At sigma_min and below, whatever the network says, and there are no holes at the data."""
    path, said = VarianceExploding(80.0), torch.randn(5, 3, dtype=torch.float64)
    x = torch.randn(5, 3, dtype=torch.float64)
    level = torch.tensor([0.0, 0.001, 0.002, 0.00200001, 0.5], dtype=torch.float64)
    for dtype in (torch.float64, torch.float32):
        found = edm(0.5, 0.002).x0(path, said.to(dtype), x.to(dtype), (level / 80).to(dtype))
        torch.testing.assert_close(found[:3].double(), x[:3], rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(found[3].double(), x[3], rtol=0, atol=1e-6)
        assert float((found[4].double() - x[4]).abs().min()) > 0.01


def test_names_tell_predictions_apart() -> None:
    assert len({p.name for p in PREDICTIONS}) == len(PREDICTIONS)
    assert edm().name == "edm(0.5)"


# the size of errors


@paths
@predictions
def test_gain_is_how_an_error_of_x0_grows(prediction: Prediction, path: Path) -> None:
    for shape in SHAPES:
        (x0, eps), t = drawn(shape), times(shape[0])
        x_t, error = noised(path, x0, eps, t), drawn(shape, 5)[0]
        moved = prediction.answer(path, x0 + error, x_t, t) - prediction.answer(path, x0, x_t, t)
        scale = along(prediction.gain(path, t), error)
        close(moved.abs() / scale, error.abs(), 1e-9)


@paths
def test_gains_are_the_published_transfers(path: Path) -> None:
    """|d x0|^2 = |d eps|^2 / SNR = (sigma / det)^2 |d velocity|^2 = c_out^2 |d F|^2, and on v: |d v|^2 / (SNR + 1)."""
    t = times(101)
    alpha, sigma, (alpha_rate, sigma_rate) = path.alpha(t), path.sigma(t), path.rates(t)
    snr = torch.exp(log_snr(path, t))
    close(X0.gain(path, t), torch.ones_like(t))
    close(EPS.gain(path, t) ** 2 / snr, torch.ones_like(t), 1e-9)
    close(VELOCITY.gain(path, t) * sigma / (alpha * sigma_rate - alpha_rate * sigma), torch.ones_like(t), 1e-9)
    close(SCORE.gain(path, t) / EPS.gain(path, t) * sigma, torch.ones_like(t), 1e-9)
    close(edm(0.7).gain(path, t) ** 2 / (snr + 0.7**-2), torch.ones_like(t), 1e-9)
    close(V.gain(path, t) ** 2 / (snr + 1) / (alpha**2 + sigma**2), torch.ones_like(t), 1e-9)


# the ends of a path


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("path", [*PATHS, Still(0.5, 0.0, -0.3, 0.7)], ids=str)
@predictions
def test_at_the_data_the_answer_does_not_matter(prediction: Prediction, path: Path, dtype: torch.dtype) -> None:
    x_t, t = torch.tensor([[1.5, -0.25]], dtype=dtype), torch.zeros(1, dtype=dtype)
    for y in (torch.zeros_like(x_t), torch.full_like(x_t, 1e4), -x_t):
        expected = y if prediction == X0 else x_t / path.alpha(t)[:, None]
        torch.testing.assert_close(prediction.x0(path, y, x_t, t), expected)
    assert bool(prediction.determines(path, t).all())


@predictions
def test_targets_are_finite_at_the_data(prediction: Prediction) -> None:
    x0, eps = drawn((2, 3))
    for path in PATHS:
        for dtype in (torch.float32, torch.float64):
            target = prediction.target(path, x0.to(dtype), eps.to(dtype), torch.zeros(2, dtype=dtype))
            assert target.dtype == dtype and bool(target.isfinite().all())


@pytest.mark.parametrize("path", [Linear(), Cosine(), *ZERO_TERMINAL], ids=str)
@predictions
def test_at_pure_noise_only_noise_predictions_are_silent(prediction: Prediction, path: Path) -> None:
    t = torch.ones(2, dtype=torch.float64)
    silent = prediction in (EPS, SCORE)
    assert bool((prediction.determines(path, t) == (not silent)).all())
    assert bool(prediction.determines(path, times(99)).all())
    x0, eps = drawn((2, 3))
    x_t, y = noised(path, x0, eps, t), prediction.target(path, x0, eps, t)
    assert torch.equal(x_t, eps)
    found = prediction.x0(path, y, x_t, t)
    if silent:
        assert not bool(found.isfinite().any())
    else:
        close(found, x0, 1e-10)


# numbers and objects


@paths
@predictions
def test_single_precision_is_kept_and_follows_double(prediction: Prediction, path: Path) -> None:
    (x0, eps), t = drawn((9, 4)), times(9)
    x_t, y = noised(path, x0, eps, t), prediction.target(path, x0, eps, t)
    low = prediction.x0(path, y.float(), x_t.float(), t.float())
    assert low.dtype == torch.float32
    level = float((path.sigma(t) / path.alpha(t)).max())  # what rounding of the answer grows by
    torch.testing.assert_close(low.double(), x0, rtol=0, atol=1e-4 * (1 + level))


@predictions
def test_a_copied_prediction_is_the_same_prediction(prediction: Prediction) -> None:
    """Copies of models are made with all that belongs to them."""
    twin, path, t = copy.deepcopy(prediction), Linear(), torch.zeros(2)
    assert twin == prediction
    x, y = torch.randn(2, 3), torch.randn(2, 3)
    assert torch.equal(twin.x0(path, y, x, t), prediction.x0(path, y, x, t))
    assert torch.equal(twin.determines(path, t), prediction.determines(path, t))

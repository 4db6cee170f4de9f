"""Paths: inverses, rates, kernels and tables, against autograd, Bayes' rule and published numbers."""

import math

import pytest
import torch
from torch import Tensor

from oracles import SHAPES, gaussian_like
from sfumato.errors import ConfigError
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
    posterior,
    transition,
)

SMOOTH: tuple[Path, ...] = (
    Linear(),
    Cosine(),
    VarianceExploding(),
    VarianceExploding(3.0),
    VariancePreserving(),
    VariancePreserving(0.5, 8.0),
)
TABLES = (
    Tabulated(),
    Tabulated(steps=100),
    Tabulated("scaled_linear"),
    Tabulated("cosine"),
    Tabulated("sigmoid"),
    Tabulated("scaled_linear", zero_terminal_snr=True),
    Tabulated((0.1, 0.2, 0.4)),
    Tabulated((0.1, 0.2), zero_terminal_snr=True),
)
PATHS = SMOOTH + TABLES
paths = pytest.mark.parametrize("path", PATHS, ids=str)


def f64(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def close(a: Tensor, b: Tensor, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def inner(n: int = 997) -> Tensor:
    """Times inside (0, 1) that no table's index falls on."""
    return (torch.arange(n, dtype=torch.float64) + 0.5) / n


@paths
def test_the_data_is_at_0_and_log_snr_falls_strictly(path: Path) -> None:
    zero = f64(0.0)
    assert float(path.alpha(zero)) == 1 and float(path.sigma(zero)) == 0
    t = torch.linspace(0, 1, 4001, dtype=torch.float64)
    assert bool((log_snr(path, t).diff()[1:] < 0).all())
    assert math.isinf(float(log_snr(path, zero)))


@pytest.mark.parametrize("path", [Linear(), Cosine(), *(p for p in TABLES if p.zero_terminal_snr)], ids=str)
def test_pure_noise_is_exact_at_1(path: Path) -> None:
    assert float(path.alpha(f64(1.0))) == 0 and float(path.sigma(f64(1.0))) == 1


@pytest.mark.parametrize("path", [Cosine(), *SMOOTH[4:], *TABLES], ids=str)
def test_variance_preserving_paths_keep_unit_variance(path: Path) -> None:
    t = torch.linspace(0, 1, 2001, dtype=torch.float64)
    close(path.alpha(t) ** 2 + path.sigma(t) ** 2, torch.ones_like(t))


@paths
def test_time_inverts_log_snr(path: Path) -> None:
    close(path.time(log_snr(path, inner())), inner(), 1e-9)
    levels = torch.linspace(-3, 3, 101, dtype=torch.float64)  # of every path but the mildest
    inside = levels > log_snr(path, f64(1.0))
    close(log_snr(path, path.time(levels))[inside], levels[inside], 1e-9)
    assert float(path.time(f64(math.inf))) == 0


def test_time_survives_extreme_noise_on_the_continuous_schedule() -> None:
    path = VariancePreserving(0.1, 80.0)  # log_snr falls to -40, past the threshold of torch's softplus
    close(path.time(log_snr(path, inner())), inner(), 1e-9)


@paths
def test_rates_are_the_derivatives(path: Path) -> None:
    t = inner().requires_grad_()
    for rate, scale in zip(path.rates(t.detach()), (path.alpha, path.sigma), strict=True):
        (expected,) = torch.autograd.grad((scale(t) + 0 * t).sum(), t)  # alpha may be constant
        close(rate, expected, 1e-10)


@paths
def test_single_precision_follows_double(path: Path) -> None:
    t = inner()
    for scale in (path.alpha, path.sigma):
        low = scale(t.float())
        assert low.dtype == torch.float32
        torch.testing.assert_close(low.double(), scale(t), rtol=2e-4, atol=1e-5)


# kernels


def _triples() -> tuple[Tensor, Tensor, Tensor]:
    return f64(0.0005, 0.2, 0.31, 0.5), f64(0.02, 0.35, 0.4, 0.9), f64(0.9, 0.7, 0.41, 0.97)


@paths
def test_transitions_compose(path: Path) -> None:
    """Chapman-Kolmogorov: r to s to t is r to t; and from the data it is the path itself."""
    r, s, t = _triples()
    first, second, both = transition(path, r, s), transition(path, s, t), transition(path, r, t)
    close(second.scale * first.scale, both.scale)
    close((second.scale * first.std) ** 2 + second.std**2, both.std**2)
    whole = transition(path, torch.zeros_like(t), t)
    close(whole.scale, path.alpha(t))
    close(whole.std, path.sigma(t))


@paths
def test_the_posterior_is_bayes_rule(path: Path) -> None:
    """The product of N(x_s; alpha x0, sigma^2) and N(x_t; scale x_s, std^2), by adding precisions."""
    _, s, t = _triples()
    kernel, q = transition(path, s, t), posterior(path, s, t)
    precision = path.sigma(s) ** -2 + (kernel.scale / kernel.std) ** 2
    close(q.std, precision**-0.5, 1e-10)
    close(q.x0, path.alpha(s) / path.sigma(s) ** 2 / precision, 1e-10)
    close(q.x_t, kernel.scale / kernel.std**2 / precision, 1e-10)


@paths
def test_posteriors_compose(path: Path) -> None:
    """q(x_s | x_t, x0) then q(x_r | x_s, x0) is q(x_r | x_t, x0)."""
    r, s, t = _triples()
    near, far, both = posterior(path, s, t), posterior(path, r, s), posterior(path, r, t)
    close(far.x_t * near.x_t, both.x_t, 1e-10)
    close(far.x_t * near.x0 + far.x0, both.x0, 1e-10)
    close((far.x_t * near.std) ** 2 + far.std**2, both.std**2, 1e-10)


@paths
def test_the_posterior_of_the_data_is_the_data(path: Path) -> None:
    q = posterior(path, torch.zeros(3, dtype=torch.float64), f64(0.1, 0.5, 1.0))
    close(q.x0, torch.ones(3, dtype=torch.float64))
    assert not q.x_t.any() and not q.std.any()


@pytest.mark.parametrize("path", [p for p in TABLES if not p.zero_terminal_snr], ids=str)
def test_neighbouring_indices_give_ddpms_own_formulas(path: Tabulated) -> None:
    """Ho et al. 2020: q(x_t | x_{t-1}) with beta_t, and equations 6 and 7."""
    abar, i = path.alphas_cumprod, torch.arange(1, path.steps)
    before, beta = abar[i - 1], 1 - abar[i] / abar[i - 1]
    s, t = path.at(i.double() - 1), path.at(i.double())
    kernel, q = transition(path, s, t), posterior(path, s, t)
    close(kernel.scale, (1 - beta).sqrt(), 1e-9)
    close(kernel.std, beta.sqrt(), 1e-9)
    close(q.x0, before.sqrt() * beta / (1 - abar[i]), 1e-9)
    close(q.x_t, (1 - beta).sqrt() * (1 - before) / (1 - abar[i]), 1e-9)
    close(q.std, (beta * (1 - before) / (1 - abar[i])).sqrt(), 1e-9)


@pytest.mark.parametrize("shape", SHAPES)
def test_noising_has_the_right_moments_for_any_shape_of_data(shape: tuple[int, ...]) -> None:
    exact, path, rng = gaussian_like(shape), Cosine(), torch.Generator().manual_seed(0)
    x0 = exact.draw(20_000, rng)
    eps = torch.randn(x0.shape, generator=rng, dtype=torch.float64)
    t = torch.tensor(0.3, dtype=torch.float64)
    x_t = noised(path, x0, eps, t)
    spread = exact.variance(path, x_t, t).expand(x_t.shape[1:])
    assert bool(((x_t.mean(0) - path.alpha(t) * exact.mean).abs() < 5 * (spread / 20_000).sqrt()).all())
    torch.testing.assert_close(x_t.var(0), spread.contiguous(), rtol=0.05, atol=0)
    rows = torch.rand(len(x0), generator=rng, dtype=torch.float64)
    close(noised(path, x0, eps, rows)[7], noised(path, x0[7:8], eps[7:8], rows[7])[0])


def test_along_never_mixes_rows_with_other_axes() -> None:
    t, x = torch.arange(3.0), torch.zeros(3, 3, 3, 3)  # every axis is as long as the batch
    assert along(t, x).shape == (3, 1, 1, 1)
    assert along(torch.tensor(0.5), x).ndim == 0


# tables


@pytest.mark.parametrize(
    ("betas", "first", "last", "last_log_snr"),
    [
        ("linear", 0.999900, 4.036e-5, -10.118),
        ("scaled_linear", 0.999150, 4.660e-3, -5.364),
        ("cosine", 0.999959, 2.429e-9, -19.836),
    ],
)
def test_published_ends(betas: str, first: float, last: float, last_log_snr: float) -> None:
    path = Tabulated(betas)
    assert float(path.alphas_cumprod[0]) == pytest.approx(first, abs=1e-6)
    assert float(path.alphas_cumprod[-1]) == pytest.approx(last, rel=1e-3)
    assert float(log_snr(path, f64(1.0))) == pytest.approx(last_log_snr, abs=1e-3)


def _by_hand(betas: str, steps: int) -> list[float]:
    """The cumulative products with plain floats, straight from the papers."""

    def cosine(u: float) -> float:
        return math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2

    def sigmoid(u: float) -> float:
        low, high, here = (1 / (1 + math.exp(-v)) for v in (-3, 3, -3 + 6 * u))
        return (high - here) / (high - low)

    table, product = [], 1.0
    for i in range(steps):
        u = i / (steps - 1)
        if betas == "linear":
            beta = 1000 / steps * (1e-4 + u * (0.02 - 1e-4))
        elif betas == "scaled_linear":
            beta = (math.sqrt(8.5e-4) + u * (math.sqrt(0.012) - math.sqrt(8.5e-4))) ** 2
        else:
            abar = cosine if betas == "cosine" else sigmoid
            beta = min(1 - abar((i + 1) / steps) / abar(i / steps), 0.999)
        product *= 1 - beta
        table.append(product)
    return table


@pytest.mark.parametrize("steps", [1000, 250])
@pytest.mark.parametrize("betas", ["linear", "scaled_linear", "cosine", "sigmoid"])
def test_tables_are_their_formulas(betas: str, steps: int) -> None:
    torch.testing.assert_close(Tabulated(betas, steps).alphas_cumprod, f64(*_by_hand(betas, steps)), rtol=1e-9, atol=0)


def test_ends_may_be_chosen() -> None:
    path = Tabulated("scaled_linear", start=0.0015, end=0.0195)  # latent diffusion's own
    assert float(path.alphas_cumprod[0]) == pytest.approx(1 - 0.0015)
    assert float(path.alphas_cumprod[-1] / path.alphas_cumprod[-2]) == pytest.approx(1 - 0.0195)


@pytest.mark.parametrize("path", TABLES, ids=str)
def test_every_index_stands_on_its_entry(path: Tabulated) -> None:
    """The last one too: t = 1 is the last entry of the table, for training and sampling alike."""
    index = torch.arange(path.steps, dtype=torch.float64)
    torch.testing.assert_close(path.alpha(path.at(index)) ** 2, path.alphas_cumprod, rtol=1e-9, atol=1e-30)
    close(path.index(path.at(index)), index, 1e-9)


@pytest.mark.parametrize("path", TABLES, ids=str)
def test_between_two_indices_log_snr_is_linear(path: Tabulated) -> None:
    abar = path.alphas_cumprod
    table = torch.log(abar) - torch.log1p(-abar)
    last = path.steps - 2 if path.zero_terminal_snr else path.steps - 1
    i = torch.arange(last, dtype=torch.float64)
    for part in (0.25, 0.5, 0.9):
        expected = (1 - part) * table[:last] + part * table[1 : last + 1]
        close(log_snr(path, path.at(i + part)), expected, 1e-8)


@pytest.mark.parametrize("path", TABLES, ids=str)
def test_the_first_interval_runs_straight_to_the_data(path: Tabulated) -> None:
    t = torch.linspace(0.05, 1, 20, dtype=torch.float64) / path.steps
    level = path.sigma(t) / path.alpha(t)
    close(level / t, (level / t)[-1:].expand_as(t), 1e-9)


def test_zero_terminal_snr_keeps_the_first_entry_and_empties_the_last() -> None:
    plain, path = Tabulated("scaled_linear"), Tabulated("scaled_linear", zero_terminal_snr=True)
    assert float(path.alphas_cumprod[-1]) == 0
    close(path.alphas_cumprod[0], plain.alphas_cumprod[0])
    root, new = plain.alphas_cumprod.sqrt(), path.alphas_cumprod.sqrt()
    close(new, (root - root[-1]) * root[0] / (root[0] - root[-1]))
    t = 1 - torch.linspace(0.05, 1, 20, dtype=torch.float64) / 1000
    ratio = path.alpha(t) / path.sigma(t) / (1 - t)
    close(ratio, ratio[-1:].expand_as(t), 1e-9)


@pytest.mark.parametrize(
    "options",
    [
        {"betas": "square"},
        {"steps": 1},
        {"betas": (0.1, 0.0)},
        {"betas": (0.1, 1.5)},
        {"betas": (0.5, 1.0)},
        {"betas": (-0.1, 0.2)},
        {"betas": (0.1, math.nan)},
        {"betas": "linear", "steps": 10},
    ],
)
def test_impossible_tables_are_refused(options: dict) -> None:
    with pytest.raises(ConfigError, match="beta"):
        Tabulated(**options)


def test_a_table_first_used_for_sampling_can_still_be_differentiated() -> None:
    path = Tabulated("linear", 321)
    with torch.inference_mode():
        path.alpha(torch.tensor([0.3]))
    t = torch.tensor([0.3], requires_grad=True)
    (path.alpha(t) + path.time(log_snr(path, t))).sum().backward()
    assert t.grad is not None and bool(torch.isfinite(t.grad).all())

"""Likelihood: of data whose density is known, to rounding and the solver's tolerance; its estimate, and its ends."""

import math

import pytest
import torch
from torch import Generator, Tensor

from oracles import SHAPES, FullMixture, gaussian_like, mixture_like, three_modes
from sfumato.denoiser import Bound
from sfumato.errors import ConfigError, DataError
from sfumato.learned import Learned
from sfumato.likelihood import Adaptive, Fixed, bits_per_dim, bits_through_noise, dequantised, log_likelihood
from sfumato.paths import Cosine, Linear, OptimalTransport, Path, Tabulated, VarianceExploding, VariancePreserving

PATHS: tuple[Path, ...] = (
    Linear(),
    Cosine(),
    VariancePreserving(),
    VarianceExploding(),
    Tabulated("scaled_linear", zero_terminal_snr=True),
    OptimalTransport(1e-6),
)
TIGHT = Adaptive(1e-10, 1e-10)
paths = pytest.mark.parametrize("path", PATHS, ids=lambda path: type(path).__name__)


def rng(seed: int = 0) -> Generator:
    return Generator().manual_seed(seed)


def normal_log(x: Tensor, mean: Tensor | float, variance: Tensor | float) -> Tensor:
    variance = torch.as_tensor(variance, dtype=x.dtype)
    return (-((x - mean) ** 2) / (2 * variance) - torch.log(2 * math.pi * variance) / 2).flatten(1).sum(1)


def prior_error(path: Path, exact: object, x: Tensor) -> Tensor:
    """How much the density of the end differs from the normal that it is taken for."""
    one = torch.ones((), dtype=torch.float64)
    spread = path.alpha(one) ** 2 + path.sigma(one) ** 2
    return normal_log(x, 0.0, spread) - exact.log_density(path, x, 1.0)  # type: ignore[attr-defined]


@paths
@pytest.mark.parametrize("shape", SHAPES[:3], ids=str)
def test_one_gaussian(path: Path, shape: tuple[int, ...]) -> None:
    exact = gaussian_like(shape)
    x0 = exact.draw(shape[0], rng(1))
    found = log_likelihood(exact.denoiser(path), x0, solver=TIGHT, level=1e-6)
    one = torch.ones((), dtype=torch.float64)
    taken = normal_log(found.noise, 0.0, path.alpha(one) ** 2 + path.sigma(one) ** 2)
    there = normal_log(found.noise, path.alpha(one) * exact.mean, exact.variance(path, found.noise, 1.0))
    torch.testing.assert_close(found.log_p, normal_log(x0, exact.mean, exact.std**2) + taken - there, rtol=0, atol=2e-6)
    torch.testing.assert_close(found.noise, exact.flow(path, x0, 0.0, 1.0), rtol=1e-6, atol=1e-5)


@paths
def test_a_mixture(path: Path) -> None:
    for exact in (three_modes(), mixture_like((4, 2, 2))):
        x0 = exact.draw(6, rng(1))
        found = log_likelihood(exact.denoiser(path), x0, solver=TIGHT, level=1e-6)
        known = exact.log_density(Linear(), x0, 0.0)
        torch.testing.assert_close(found.log_p - prior_error(path, exact, found.noise), known, rtol=0, atol=5e-6)


def test_a_learned_path() -> None:
    torch.manual_seed(0)
    path = Learned(log_snr_min=-12.0).double()
    exact = three_modes()
    x0 = exact.draw(6, rng(1))
    found = log_likelihood(exact.denoiser(path), x0, solver=Adaptive(1e-8, 1e-8), level=0.05)
    with torch.no_grad():
        low = path.time(torch.tensor(-2 * math.log(0.05), dtype=torch.float64))
        known = exact.log_density(path, x0 * path.alpha(low), float(low)) + torch.log(path.alpha(low))
        error = prior_error(path, exact, found.noise)
    torch.testing.assert_close(found.log_p - error, known, rtol=0, atol=1e-5)
    assert not found.log_p.requires_grad


def turned() -> tuple[FullMixture, Tensor]:
    """One Gaussian with a whole covariance, whose Jacobian is not diagonal, and some of its draws."""
    root = torch.tensor([[0.6, 0.0, 0.0], [0.3, 0.5, 0.0], [-0.4, 0.2, 0.7]], dtype=torch.float64)
    mean = torch.tensor([[0.5, -0.2, 0.1]], dtype=torch.float64)
    exact = FullMixture(torch.ones(1, dtype=torch.float64), mean, (root @ root.T)[None])
    return exact, exact.draw(4, rng(2))


def test_whole_covariances_and_the_estimate_of_the_trace() -> None:
    exact, x0 = turned()
    known = torch.distributions.MultivariateNormal(exact.means[0], exact.covariances[0]).log_prob(x0)
    denoise = exact.denoiser(Linear())
    found = log_likelihood(denoise, x0, solver=TIGHT, level=1e-6)
    torch.testing.assert_close(found.log_p, known, rtol=0, atol=5e-6)
    draws = rng(3)
    guesses = torch.stack([log_likelihood(denoise, x0, probes=1, solver=Fixed(20), rng=draws).log_p for _ in range(40)])
    error = guesses.std(0) / 40**0.5
    assert bool((error > 0.01).all()) and bool(((guesses.mean(0) - known).abs() < 4 * error + 2e-3).all())
    many = torch.stack([log_likelihood(denoise, x0, probes=8, solver=Fixed(20), rng=draws).log_p for _ in range(20)])
    assert bool((many.std(0) < 0.6 * guesses.std(0)).all())  # the root of 1 / 8, and its own error


def test_a_fixed_grid_is_of_fourth_order() -> None:
    data, x0 = three_modes(), three_modes().draw(8, rng(1))
    known = log_likelihood(data.denoiser(Linear()), x0, solver=TIGHT)
    errors = [
        float((log_likelihood(data.denoiser(Linear()), x0, solver=Fixed(n)).log_p - known.log_p).abs().max())
        for n in (40, 80)
    ]
    assert 3.5 < math.log2(errors[0] / errors[1]) < 4.5
    assert log_likelihood(data.denoiser(Linear()), x0, solver=Fixed(7)).calls == 28


def test_the_density_of_a_flow_that_is_no_diffusion() -> None:
    """Optimal transport's flow between Gaussians: its x0-hat is no posterior mean, and its density is the same."""
    mean, std = 0.7, 0.5

    def x0_hat(x: Tensor, t: float) -> Tensor:
        return (x + t * mean / std) / ((1 - t) + t / std)

    x0 = mean + std * torch.randn(5, 3, generator=rng(), dtype=torch.float64)
    found = log_likelihood(Bound(Linear(), x0_hat), x0, solver=TIGHT, level=1e-7)
    torch.testing.assert_close(found.log_p, normal_log(x0, mean, std**2), rtol=0, atol=1e-5)
    torch.testing.assert_close(found.noise, (x0 - mean) / std, rtol=0, atol=1e-5)


def test_the_model_is_asked_in_the_type_of_the_data_and_may_be_driven_without_gradients() -> None:
    exact, seen = gaussian_like((4, 3)), []

    def x0_hat(x: Tensor, t: float) -> Tensor:
        seen.append(x.dtype)
        return exact.x0(Linear(), x.double(), t).float()

    x0 = exact.draw(4, rng(1))
    known = normal_log(x0, exact.mean, exact.std**2)
    with torch.inference_mode():
        single = x0.float().clone()
    for guard in (torch.no_grad(), torch.inference_mode()):
        with guard:
            found = log_likelihood(Bound(Linear(), x0_hat), single.clone(), solver=Fixed(60))
        assert set(seen) == {torch.float32} and found.log_p.dtype == torch.float64 and not found.log_p.requires_grad
        torch.testing.assert_close(found.log_p, known, rtol=0, atol=0.02)


def test_rows_do_not_meet_on_a_fixed_grid() -> None:
    exact = mixture_like((5, 3))
    x0 = exact.draw(5, rng(1))
    whole = log_likelihood(exact.denoiser(Cosine()), x0, solver=Fixed(10)).log_p
    parts = [log_likelihood(exact.denoiser(Cosine()), x0[i : i + 1], solver=Fixed(10)).log_p for i in range(5)]
    torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-12, atol=0)


def test_even_values_take_eight_bits() -> None:
    """256 levels, all alike, with noise that fills their cells: the density is even, and takes log2 256."""
    log_p = torch.tensor([-12 * math.log(256 / 127.5)], dtype=torch.float64)
    assert float(bits_per_dim(log_p, 12)) == pytest.approx(8.0, rel=1e-12)
    levels = torch.arange(256.0).repeat(40, 1) / 127.5 - 1
    noisy = dequantised(levels, rng())
    assert torch.equal(((noisy + 1) * 127.5).round(), torch.arange(256.0).repeat(40, 1))
    off = ((noisy - levels) * 127.5).flatten()
    assert abs(float(off.mean())) < 0.012 and abs(float(off.var()) - 1 / 12) < 0.004


def test_what_has_no_likelihood() -> None:
    exact = gaussian_like((4, 3))
    x0 = exact.draw(4, rng(1))
    endpoint = Bound(Linear(), lambda x, t: x, ("endpoint",))
    with pytest.raises(ConfigError, match="has a flow"):
        log_likelihood(endpoint, x0)
    with pytest.raises(DataError, match="not finite"):
        log_likelihood(Bound(Linear(), lambda x, t: x * torch.nan), x0)
    for wrong in ({"probes": 0}, {"level": 0.0}, {"solver": Adaptive(1e-12, 1e-12, max_steps=3)}):
        with pytest.raises(ConfigError):
            log_likelihood(exact.denoiser(Linear()), x0, **wrong)
    with pytest.raises(ConfigError):
        log_likelihood(exact.denoiser(VarianceExploding(0.5)), x0, level=0.6)
    for make in (lambda: Adaptive(rtol=0.0), lambda: Fixed(0)):
        with pytest.raises(ConfigError):
            make()


def test_bits_through_noise_bound_the_bits_of_discrete_data() -> None:
    """Of eight levels drawn evenly and on their own, 3 bits each: by the exact denoiser the bound is near."""
    cell, n = 2 / 7, 400
    values = (torch.arange(8, dtype=torch.float64) * cell - 1)[:, None]
    data = mixture_like((1, 1), 8)
    exact = type(data)(torch.full((8,), 1 / 8, dtype=torch.float64), values, torch.zeros(8, 1, dtype=torch.float64))
    x0 = values[torch.randint(8, (n,), generator=rng())]
    bits = {}
    for level in (0.03, 0.15, 0.4):
        noisy = x0 + level * torch.randn(n, 1, generator=rng(1), dtype=torch.float64)
        said = log_likelihood(exact.denoiser(Linear()), noisy, solver=Adaptive(1e-6, 1e-6), level=level)
        each = bits_through_noise(said.log_p, x0, noisy, level, cell)
        bits[level] = float(each.mean())
        assert bits[level] > 3 - 4 * float(each.std()) / n**0.5
    assert bits[0.03] == pytest.approx(3, abs=5e-3) and bits[0.15] < 3.2 and bits[0.15] < bits[0.4]

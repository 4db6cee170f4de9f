"""The oracles against what they do not use: autograd, each other, and the one-dimensional flow map by quantiles."""

import pytest
import torch

from oracles import SHAPES, Mixture, gaussian_like, mixture_like, three_modes
from sfumato.paths import Cosine, Linear, VarianceExploding, VariancePreserving, noised

PATHS = (Linear(), Cosine(), VarianceExploding(3.0), VariancePreserving())


def _x(shape: tuple[int, ...]) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("make", [gaussian_like, mixture_like])
def test_score_is_the_gradient_of_the_log_density(make, path, shape) -> None:
    exact, x = make(shape), _x(shape).requires_grad_()
    t = torch.linspace(0.1, 0.9, shape[0], dtype=torch.float64)
    (gradient,) = torch.autograd.grad(exact.log_density(path, x, t).sum(), x)
    torch.testing.assert_close(exact.score(path, x.detach(), t), gradient, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("path", PATHS)
def test_a_mixture_of_one_is_a_gaussian(path) -> None:
    one, x = gaussian_like((5, 2, 3)), _x((5, 2, 3))
    same = Mixture(torch.ones(1, dtype=torch.float64), one.mean[None], one.std[None])
    for t, s in ((0.9, 0.2), (0.5, 0.0), (0.3, 0.8)):
        torch.testing.assert_close(same.x0(path, x, t), one.x0(path, x, t), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(same.flow(path, x, t, s, 400), one.flow(path, x, t, s), rtol=1e-7, atol=1e-7)


def _cdf(mixture: Mixture, path, x: torch.Tensor, t: float) -> torch.Tensor:
    time = torch.tensor(t, dtype=torch.float64)
    alpha, sigma = path.alpha(time), path.sigma(time)
    std = torch.sqrt((alpha * mixture.stds) ** 2 + sigma**2)
    return (
        mixture.weights[:, None, None] * torch.special.ndtr((x - alpha * mixture.means[:, None]) / std[:, None])
    ).sum(0)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(("t", "s"), [(0.95, 0.1), (0.7, 0.0), (0.2, 0.6)])
def test_the_flow_of_a_mixture_keeps_the_quantiles(path, t, s) -> None:
    mixture, x = three_modes(), torch.linspace(-2, 2, 21, dtype=torch.float64)[:, None]
    there = mixture.flow(path, x, t, s, 1000)
    torch.testing.assert_close(_cdf(mixture, path, there, s), _cdf(mixture, path, x, t), rtol=0, atol=1e-8)


def test_x0_is_the_mean_of_what_made_x_t() -> None:
    """E[x0 | x_t] by brute force: draws whose x_t fell near one value."""
    mixture, path, rng = three_modes(), Linear(), torch.Generator().manual_seed(0)
    x0 = mixture.draw(2_000_000, rng)
    x_t = noised(
        path, x0, torch.randn(x0.shape, generator=rng, dtype=torch.float64), torch.tensor(0.4, dtype=torch.float64)
    )
    for value in (-0.7, 0.1, 0.6):
        near = (x_t - value).abs() < 0.02
        expected = mixture.x0(path, torch.tensor([[value]], dtype=torch.float64), 0.4)
        assert abs(float(x0[near].mean() - expected)) < 5 * float(x0[near].std()) / float(near.sum()) ** 0.5 + 1e-3

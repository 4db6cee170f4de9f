"""The exact test beds: whole covariances agree with diagonal ones, and with the one Gaussian's closed form."""

import pytest
import torch

from sfumato.exact import FullMixture, Gaussian, Mixture
from sfumato.paths import Linear, VarianceExploding, VariancePreserving

PATHS = [Linear(), VariancePreserving(), VarianceExploding()]
paths = pytest.mark.parametrize("path", PATHS, ids=lambda path: type(path).__name__)


def beds(turn: torch.Tensor) -> tuple[Mixture, FullMixture]:
    """The same mixture, once diagonal, once turned by a rotation."""
    rng = torch.Generator().manual_seed(0)
    means, u = (torch.randn(3, 4, generator=rng, dtype=torch.float64) for _ in range(2))
    stds, weights = 0.2 + torch.sigmoid(u), torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64)
    covariances = turn @ torch.diag_embed(stds**2) @ turn.T
    return Mixture(weights, means, stds), FullMixture(weights, means @ turn.T, covariances)


@paths
def test_a_turned_mixture_is_the_mixture_turned(path) -> None:  # type: ignore[no-untyped-def]
    rng = torch.Generator().manual_seed(1)
    turn, _ = torch.linalg.qr(torch.randn(4, 4, generator=rng, dtype=torch.float64))
    plain, turned = beds(turn)
    x = torch.randn(16, 4, generator=rng, dtype=torch.float64)
    for t in (0.05, 0.4, 0.9):
        torch.testing.assert_close(turned.x0(path, x @ turn.T, t), plain.x0(path, x, t) @ turn.T)


@paths
def test_a_mixture_of_one_flows_as_a_gaussian(path) -> None:  # type: ignore[no-untyped-def]
    rng = torch.Generator().manual_seed(2)
    mean, std = torch.randn(3, generator=rng, dtype=torch.float64), torch.tensor([0.3, 0.5, 0.8], dtype=torch.float64)
    full = FullMixture(torch.ones(1, dtype=torch.float64), mean[None], torch.diag(std**2)[None])
    x = torch.randn(8, 3, generator=rng, dtype=torch.float64)
    truth = Gaussian(mean, std).flow(path, x, 0.9, 0.1)
    torch.testing.assert_close(full.flow(path, x, 0.9, 0.1, steps=400), truth, rtol=1e-7, atol=1e-7)


def test_draws_have_the_covariance() -> None:
    a = torch.tensor([[1.0, 0.6], [0.6, 0.5]], dtype=torch.float64)
    full = FullMixture(torch.ones(1, dtype=torch.float64), torch.zeros(1, 2, dtype=torch.float64), a[None])
    drawn = full.draw(40_000, torch.Generator().manual_seed(3))
    torch.testing.assert_close(drawn.T.cov(), a, rtol=0, atol=0.03)  # 4 standard errors of a variance of 1

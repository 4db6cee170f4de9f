"""The exact denoisers that tests compare with, and some made to order; see `sfumato.exact`."""

import torch

from sfumato.exact import FullMixture, Gaussian, Mixture, three_modes

__all__ = ["SHAPES", "FullMixture", "Gaussian", "Mixture", "gaussian_like", "mixture_like", "three_modes"]

SHAPES = ((5, 3), (5, 2, 4), (5, 2, 3, 2), (5, 2, 2, 2, 3))  # (B, D), (B, C, L), (B, C, H, W), (B, C, T, H, W)


def gaussian_like(shape: tuple[int, ...], seed: int = 0) -> Gaussian:
    """A Gaussian over samples of shape[1:], its mean and standard deviation different at every element."""
    rng = torch.Generator().manual_seed(seed)
    mean, u = (torch.randn(shape[1:], generator=rng, dtype=torch.float64) for _ in range(2))
    return Gaussian(mean, 0.3 + torch.sigmoid(u))


def mixture_like(shape: tuple[int, ...], k: int = 3, seed: int = 0) -> Mixture:
    """A mixture of k components over samples of shape[1:]."""
    rng = torch.Generator().manual_seed(seed)
    means, u = (torch.randn(k, *shape[1:], generator=rng, dtype=torch.float64) for _ in range(2))
    weights = torch.arange(1, k + 1, dtype=torch.float64)
    return Mixture(weights / weights.sum(), means, 0.2 + torch.sigmoid(u) / 2)

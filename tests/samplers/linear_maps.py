"""Exact moments of a stochastic sampler: on a Gaussian every step is linear in the state and in what it draws.

One run tells all: row 0 starts at 0 and draws nothing, row 1 starts at 1, and row k + 2 draws 1 the k-th time. What
comes out are the coefficients of result = a start + sum_k c_k z_k + b, element by element, so the mean and the variance
of the result are known to rounding, without a single random number.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from oracles import Gaussian
from sfumato.denoiser import Bound
from sfumato.paths import Path
from sfumato.samplers import drive

DATA = Gaussian(torch.tensor([0.7, -0.3, 0.0], dtype=torch.float64), torch.tensor([0.3, 0.8, 1.0], dtype=torch.float64))


def exact(path: Path, data: Gaussian = DATA) -> Bound:
    return Bound(path, lambda x, t: data.x0(path, x, t))


def coefficients(sampler: Callable[..., object], path: Path, times: Tensor, data: Gaussian = DATA, **options: object):
    """a (D,), b (D,) and c (K, D) of a sampler over the exact denoiser."""
    draws = _count(sampler, path, times, data, options)
    x = torch.zeros(draws + 2, *data.mean.shape, dtype=torch.float64)
    x[1] = 1
    rows = iter(range(2, draws + 2))

    def noise(like: Tensor) -> Tensor:
        z = torch.zeros_like(like)
        z[next(rows)] = 1
        return z

    out = drive(sampler(path, x, times, **options), exact(path, data), noise)
    return out[1] - out[0], out[0], out[2:] - out[0]


def moments(
    sampler: Callable[..., object], path: Path, times: Tensor, data: Gaussian = DATA, **options: object
) -> tuple[Tensor, Tensor]:
    """The mean and variance (D,) of the result, started from the true marginal at the first time."""
    a, b, c = coefficients(sampler, path, times, data, **options)
    start = float(times[0])
    mean = path.alpha(times[0]) * data.mean
    return a * mean + b, a**2 * data.variance(path, mean, start) + c.square().sum(0)


def errors(sampler: Callable[..., object], path: Path, times: Tensor, **options: object) -> tuple[float, float]:
    """How far the mean and the variance of the result are from the true ones at the last time, at most."""
    mean, variance = moments(sampler, path, times, **options)
    end = float(times[-1])
    return (
        float((mean - path.alpha(times[-1]) * DATA.mean).abs().max()),
        float((variance - DATA.variance(path, DATA.mean, end)).abs().max()),
    )


def _count(sampler: Callable[..., object], path: Path, times: Tensor, data: Gaussian, options: dict) -> int:
    count = 0

    def noise(like: Tensor) -> Tensor:
        nonlocal count
        count += 1
        return torch.zeros_like(like)

    drive(
        sampler(path, torch.zeros(1, *data.mean.shape, dtype=torch.float64), times, **options), exact(path, data), noise
    )
    return count

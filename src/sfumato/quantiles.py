"""Quantiles of the beta distribution, which some grids lie at (Lee et al. 2024), in float64 and without SciPy.

The share of a beta distribution below x is the regularised incomplete beta function, by its continued fraction. Its
inverse has no formula: Newton's method finds it, and a bracket that shrinks keeps it from leaving [0, 1].
"""

import math

import torch
from torch import Tensor


def beta_quantile(u: Tensor, a: float, b: float) -> Tensor:
    """The numbers that shares u (n,) of a beta distribution lie below, (n,) float64. a, b: its parameters, above 0."""
    log_norm = math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b)
    return torch.tensor([_root(v, a, b, log_norm) for v in u.tolist()], dtype=torch.float64)


def _root(u: float, a: float, b: float, log_norm: float) -> float:
    """One such number, by Newton's method, which is not let out of a shrinking bracket."""
    if u > 0.5:  # a small number keeps its digits, a number near 1 does not
        return 1 - _root(1 - u, b, a, log_norm)
    if u <= 0:
        return 0.0
    low, high = 0.0, 1.0
    x = min(math.exp((math.log(u * a) - log_norm) / a), 0.5)  # its leading term
    for _ in range(200):
        error = _share(x, a, b, log_norm) - u
        low, high = (x, high) if error < 0 else (low, x)
        density = math.exp(log_norm + (a - 1) * math.log(x) + (b - 1) * math.log1p(-x))
        step = x - error / density
        new = step if low < step < high else (low + high) / 2
        if abs(new - x) <= 1e-15 * new:
            return new
        x = new
    return x


def _share(x: float, a: float, b: float, log_norm: float) -> float:
    """The regularised incomplete beta function, by its continued fraction (Lentz), where it converges fast."""
    if x > (a + 1) / (a + b + 2):
        return 1 - _share(1 - x, b, a, log_norm)
    tiny = 1e-300
    c, d = 1.0, 1 / _away(1 - (a + b) * x / (a + 1), tiny)
    whole = d
    for m in range(1, 300):
        for top in (
            m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m)),
            -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1)),
        ):
            d = 1 / _away(1 + top * d, tiny)
            c = _away(1 + top / c, tiny)
            factor = c * d
            whole *= factor
        if abs(factor - 1) < 1e-16:
            break
    return math.exp(log_norm + a * math.log(x) + b * math.log1p(-x)) * whole / a


def _away(value: float, tiny: float) -> float:
    return value if abs(value) > tiny else tiny

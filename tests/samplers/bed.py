"""The test bed of deterministic samplers: the paths, the three modes answering on them, and where the ODE really ends.

Half log_snr from -3 to 3, 64 starts in one dimension, where the ODE's solution is known: no two trajectories cross, so
it keeps the share of the probability below it. In x / sqrt(alpha^2 + sigma^2) it depends on the two noise levels alone.
"""

import inspect
import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from oracles import three_modes
from sfumato.catalogue import SAMPLERS, Sampler
from sfumato.denoiser import Bound
from sfumato.paths import Cosine, Linear, Path, Tabulated, VarianceExploding, VariancePreserving
from sfumato.samplers import drive

PATHS: dict[str, Path] = {
    "linear": Linear(),
    "cosine": Cosine(),
    "vp": VariancePreserving(),
    "ve": VarianceExploding(),
    "tabulated": Tabulated("linear"),
    "zero_terminal_snr": Tabulated("scaled_linear", zero_terminal_snr=True),
}
MODES = three_modes()
STARTS = torch.linspace(-2, 2, 64, dtype=torch.float64)[:, None]
DETERMINISTIC = {name: line for name, line in SAMPLERS.items() if not line.stochastic and line.asks == "x0"}
FIXED = {name: line for name, line in DETERMINISTIC.items() if not line.adaptive}
DOWNWARD = {name: line for name, line in FIXED.items() if not line.inverse}


class Scales(NamedTuple):
    alpha: float
    sigma: float

    @property
    def radius(self) -> float:
        return math.hypot(self.alpha, self.sigma)


@lru_cache(maxsize=100_000)
def scales(path: Path, t: float) -> Scales:
    time = torch.tensor(t, dtype=torch.float64)
    return Scales(float(path.alpha(time)), float(path.sigma(time)))


def levels(path: Path, n: int, low: float = -3.0, high: float = 3.0) -> Tensor:
    """A grid of n steps, even in half log_snr."""
    return path.time(2 * torch.linspace(low, high, n + 1, dtype=torch.float64))


def three_modes_at(path: Path) -> Bound:
    """E[x0 | x_t] of the three modes, in one dimension: the oracle's formula in fewer operations."""
    means, variances, weights = (part.reshape(3) for part in (MODES.means, MODES.stds**2, MODES.weights))

    def x0(x: Tensor, t: float | Tensor) -> Tensor:
        alpha, sigma = scales(path, float(t))
        total = alpha**2 * variances + sigma**2
        gain = alpha * variances / total
        away = x - alpha * means
        share = torch.softmax(away**2 * (-0.5 / total) + torch.log(weights / total.sqrt()), -1)
        return (share * (means + gain * away)).sum(-1, keepdim=True)

    return Bound(path, x0)


@lru_cache(maxsize=8)
def truth(low: float = -3.0, high: float = 3.0) -> Tensor:
    """Where the ODE takes the starts, over the radius, between two values of half log_snr: by equal quantiles."""
    share = _below(STARTS, low)
    left, right = torch.full_like(STARTS, -9.0), torch.full_like(STARTS, 9.0)
    for _ in range(64):
        middle = (left + right) / 2
        less = _below(middle, high) < share
        left, right = torch.where(less, middle, left), torch.where(less, right, middle)
    return (left + right) / 2


def _below(y: Tensor, level: float) -> Tensor:
    """The probability below y of the three modes at a noise level, over the radius."""
    angle = math.atan(math.exp(-level))
    alpha, sigma = math.cos(angle) if level > -math.inf else 0.0, math.sin(angle)
    std = torch.sqrt((alpha * MODES.stds) ** 2 + sigma**2).reshape(3)
    return (MODES.weights * torch.special.ndtr((y - alpha * MODES.means.reshape(3)) / std)).sum(-1, keepdim=True)


class Recorder:
    """A denoiser that notes the times it is asked at."""

    def __init__(self, denoise: Bound) -> None:
        self.denoise, self.path = denoise, denoise.path
        self.times: list[float] = []

    def __call__(self, x: Tensor, t: float | Tensor) -> Tensor:
        self.times.append(float(t))
        return self.denoise(x, t)


def solved(fn: Callable[..., Any], path: Path, times: Tensor, **options: Any) -> Tensor:
    """The starts at the grid's first noise level, carried to its last; both over the radius."""
    x = STARTS * scales(path, float(times[0])).radius
    return drive(fn(path, x, times, **options), three_modes_at(path)) / scales(path, float(times[-1])).radius


def error(name: str, path: Path, n: int, low: float = -3.0, **options: Any) -> float:
    """The largest error of n steps over the bed, of the way back for a sampler that inverts."""
    line, times = SAMPLERS[name], levels(path, n, low)
    if not line.inverse:
        return float((solved(line.fn, path, times, **options) - truth(low)).abs().max())
    x = truth(low) * scales(path, float(times[-1])).radius
    back = drive(line.fn(path, x, times, **options), three_modes_at(path)) / scales(path, float(times[0])).radius
    return float((back - STARTS).abs().max())


def order(name: str, path: Path, n: int = 80, **options: Any) -> float:
    """The order of convergence that n and 2 n steps show."""
    return math.log2(error(name, path, n, **options) / error(name, path, 2 * n, **options))


def full_start(line: Sampler) -> dict[str, Any]:
    """The option that keeps a short past from capping the order, for the methods that need it."""
    capped = line.order > 2 and "start" in inspect.signature(line.fn).parameters
    return {"start": "runge_kutta"} if capped else {}


def path_free(line: Sampler) -> dict[str, Any]:
    """The option that makes a sampler know a path by its noise levels alone."""
    return {"variable": "angle"} if "variable" in inspect.signature(line.fn).parameters else {}

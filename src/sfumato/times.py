"""Times: the grids that samplers walk, and the densities that training draws from.

A grid of n steps has n + 1 times, float64 on the CPU, falling from the noise to 0 = the data; the last step always
lands on the data, and no sampler asks anything there. Grids given in noise level (sigma / alpha) are turned into
times by the path, so every grid works on every path. A density gives n times for n samples, and its pdf, which
weights stated per unit of log_snr need (Kingma & Gao 2023).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Generator, Tensor

from sfumato.errors import ConfigError
from sfumato.paths import Linear, Path, Tabulated, log_snr

Grid = Callable[..., Tensor]  # (path, n, **options) -> (n + 1,) float64, strictly falling, ending in 0


def linear(path: Path, n: int, *, start: float = 1.0) -> Tensor:
    """Even in t, from `start` to 0."""
    return torch.linspace(start, 0, n + 1, dtype=torch.float64)


def karras(
    path: Path, n: int, *, start: float = 1.0, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0
) -> Tensor:
    """Karras et al. 2022, eq. 5: the noise level even in its rho-th root, then 0. Kept within the path's own range."""
    high, low = _range(path, start, sigma_min, sigma_max)
    u = torch.linspace(0, 1, n, dtype=torch.float64)
    return _to_data(path, (high ** (1 / rho) + u * (low ** (1 / rho) - high ** (1 / rho))) ** rho)


def uniform_log_snr(
    path: Path, n: int, *, start: float = 1.0, sigma_min: float = 0.002, sigma_max: float = 80.0
) -> Tensor:
    """Even in log_snr (DPM-Solver's "logSNR" grid), then 0."""
    high, low = _range(path, start, sigma_min, sigma_max)
    u = torch.linspace(0, 1, n, dtype=torch.float64)
    return _to_data(path, torch.exp(math.log(high) + u * (math.log(low) - math.log(high))))


def trailing(path: Path, n: int) -> Tensor:
    """Indices counted back from the end of the table: starts at pure noise (Lin et al. 2023, table 2)."""
    steps = _table(path, n).steps
    return _at_indices(path, torch.round(torch.arange(steps, 0, -steps / n, dtype=torch.float64))[:n] - 1)


def leading(path: Path, n: int, *, offset: int = 0) -> Tensor:
    """Every (steps // n)-th index counted from the data, plus `offset` (Stable Diffusion: 1): never visits the end."""
    steps = _table(path, n).steps
    return _at_indices(path, (torch.arange(n, dtype=torch.float64) * (steps // n)).flip(0) + offset)


def linspace(path: Path, n: int) -> Tensor:
    """Indices even from the last to the first, both included."""
    return _at_indices(path, torch.linspace(0, _table(path, n).steps - 1, n, dtype=torch.float64).round().flip(0))


def shifted(path: Path, n: int, *, by: float = 3.0, start: float = 1.0) -> Tensor:
    """An even grid with the resolution shift (Esser et al. 2024, eq.

    23): more of the steps at high noise for by > 1.
    """
    times = shift(path, linear(path, n, start=start), by)
    if bool((times.diff() >= 0).any()):
        raise ConfigError(
            f"a shift of {by:g} pushes several steps past the end of this path",
            where="grid.by",
            fix="use a smaller shift, or a path that reaches pure noise",
        )
    return times


def shift(path: Path, t: Tensor, by: float) -> Tensor:
    """Multiply sigma / alpha by `by`: log_snr falls by 2 ln(by). On the linear path t' = by t / (1 + (by - 1) t)."""
    if isinstance(path, Linear):
        return by * t / (1 + (by - 1) * t)
    return path.time(log_snr(path, t) - 2 * math.log(by)).clamp(0, 1)


def _range(path: Path, start: float, sigma_min: float, sigma_max: float) -> tuple[float, float]:
    """The noise levels a grid may run between: what was asked for, within what the path has at `start`."""
    level = math.exp(-float(log_snr(path, torch.tensor(start, dtype=torch.float64))) / 2)
    return min(sigma_max, level), min(sigma_min, level / 2)


def _to_data(path: Path, levels: Tensor) -> Tensor:
    times = path.time(-2 * torch.log(levels)).clamp(max=1)
    return torch.cat([times, times.new_zeros(1)])


def _table(path: Path, n: int) -> Tabulated:
    if not isinstance(path, Tabulated):
        raise ConfigError(
            "this grid counts the indices of a table of betas",
            where="grid",
            seen=f"path {path}",
            fix="grid=linear, karras or uniform_log_snr",
        )
    if not 1 <= n <= path.steps:
        raise ConfigError(f"a table of {path.steps} has no grid of {n} steps", where="steps", fix=f"1 to {path.steps}")
    return path


def _at_indices(path: Path, indices: Tensor) -> Tensor:
    assert isinstance(path, Tabulated)  # `_table` has checked
    return torch.cat([path.at(indices), indices.new_zeros(1)])


class Density(Protocol):
    """Where in time training looks."""

    def __call__(self, n: int, path: Path, rng: Generator | None = None) -> Tensor:
        """n times, (n,) float32 in (0, 1]."""
        ...

    def pdf(self, path: Path, t: Tensor) -> Tensor:
        """The density per unit of t."""
        ...


@dataclass(frozen=True)
class Uniform:
    """Even in t. `low` keeps clear of t = 0, where noise predictions and log_snr are infinite."""

    low: float = 1e-3
    high: float = 1.0

    def __call__(self, n: int, path: Path, rng: Generator | None = None) -> Tensor:
        return self.low + (self.high - self.low) * torch.rand(n, generator=rng)

    def pdf(self, path: Path, t: Tensor) -> Tensor:
        return torch.full_like(t, 1 / (self.high - self.low))


@dataclass(frozen=True)
class Stratified:
    """One time from each of n equal slices of another density's quantiles, in random order: less noise in the loss.

    Kingma et al. 2021, appendix I.1, with independent draws in each slice. `of` is uniform by default; any density
    with a `quantile` will do.
    """

    of: "Uniform | LogitNormal" = Uniform()

    def __call__(self, n: int, path: Path, rng: Generator | None = None) -> Tensor:
        u = (torch.randperm(n, generator=rng) + torch.rand(n, generator=rng)) / n
        return quantile(self.of, u)

    def pdf(self, path: Path, t: Tensor) -> Tensor:
        return self.of.pdf(path, t)


@dataclass(frozen=True)
class LogitNormal:
    """The logistic of a normal, then shifted on the linear path (Esser et al. 2024, eq. 19): the middle, mostly."""

    mean: float = 0.0
    std: float = 1.0
    shift: float = 1.0

    def __call__(self, n: int, path: Path, rng: Generator | None = None) -> Tensor:
        return self._of_normal(torch.randn(n, generator=rng))

    def _of_normal(self, z: Tensor) -> Tensor:
        # a shift multiplies the odds t / (1 - t), so in logits it is a change of the mean
        return torch.sigmoid(self.mean + math.log(self.shift) + self.std * z).clamp(1e-5, 1 - 1e-5)

    def pdf(self, path: Path, t: Tensor) -> Tensor:
        z = (torch.logit(t) - self.mean - math.log(self.shift)) / self.std
        return torch.exp(-(z**2) / 2) / (self.std * math.sqrt(2 * math.pi) * t * (1 - t))


@dataclass(frozen=True)
class LogNormal:
    """EDM: log(sigma / alpha) is normal, on any path (Karras et al. 2022, section 5)."""

    mean: float = -1.2
    std: float = 1.2

    def __call__(self, n: int, path: Path, rng: Generator | None = None) -> Tensor:
        level = self.mean + self.std * torch.randn(n, generator=rng)
        return path.time(-2 * level).clamp(max=1)

    def pdf(self, path: Path, t: Tensor) -> Tensor:
        z = (-log_snr(path, t) / 2 - self.mean) / self.std
        return torch.exp(-(z**2) / 2) / (self.std * math.sqrt(2 * math.pi)) * log_snr_rate(path, t).abs() / 2


def quantile(density: "Uniform | LogitNormal", u: Tensor) -> Tensor:
    """The time below which a share `u` of a density's draws lies."""
    if isinstance(density, Uniform):
        return density.low + (density.high - density.low) * u
    return density._of_normal(torch.special.ndtri(u.double().clamp(1e-7, 1 - 1e-7)).to(u))


def log_snr_rate(path: Path, t: Tensor) -> Tensor:
    """d log_snr / dt, negative."""
    (alpha_rate, sigma_rate), alpha, sigma = path.rates(t), path.alpha(t), path.sigma(t)
    return 2 * (alpha_rate / alpha - sigma_rate / sigma)

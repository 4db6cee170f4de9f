"""Times: the densities that training draws from.

A density gives n times for n samples, and its pdf, which weights stated per unit of log_snr need (Kingma & Gao 2023).
Where in time training looks and how much each noise level counts are one choice in two factors. The grids that
samplers walk are in `sfumato.grids`, and can be had from here too.
"""

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Generator, Tensor

from sfumato.errors import ConfigError
from sfumato.grids import Grid as Grid
from sfumato.grids import karras as karras
from sfumato.grids import leading as leading
from sfumato.grids import linear as linear
from sfumato.grids import linspace as linspace
from sfumato.grids import shift as shift
from sfumato.grids import shifted as shifted
from sfumato.grids import trailing as trailing
from sfumato.grids import uniform_log_snr as uniform_log_snr
from sfumato.paths import Path, log_snr


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
        return self.quantile(path, torch.rand(n, generator=rng))

    def quantile(self, path: Path, u: Tensor) -> Tensor:
        return self.low + (self.high - self.low) * u

    def pdf(self, path: Path, t: Tensor) -> Tensor:
        return torch.full_like(t, 1 / (self.high - self.low))


@dataclass(frozen=True)
class Stratified:
    """One time from each of n equal slices of another density's quantiles, in random order: less noise in the loss.

    Kingma et al. 2021, appendix I.1, with independent draws in each slice. `of` is uniform by default; any density
    with a `quantile(path, u)`, the time below which a share u of its draws lies, will do.
    """

    of: "Uniform | LogitNormal | LogNormal | UShaped" = Uniform()

    def __post_init__(self) -> None:
        if not hasattr(self.of, "quantile"):
            raise ConfigError(
                "this density cannot be stratified: it has no quantiles",
                where="objective.times.of",
                seen=str(self.of),
                fix="uniform, logit_normal, u_shaped or log_normal",
            )

    def __call__(self, n: int, path: Path, rng: Generator | None = None) -> Tensor:
        u = (torch.randperm(n, generator=rng) + torch.rand(n, generator=rng)) / n
        return self.of.quantile(path, u)

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

    def quantile(self, path: Path, u: Tensor) -> Tensor:
        return self._of_normal(_normal_quantile(u))

    def _of_normal(self, z: Tensor) -> Tensor:
        # a shift multiplies the odds t / (1 - t), so in logits it is a change of the mean
        return torch.sigmoid(self.mean + math.log(self.shift) + self.std * z).clamp(1e-5, 1 - 1e-5)

    def pdf(self, path: Path, t: Tensor) -> Tensor:
        z = (torch.logit(t) - self.mean - math.log(self.shift)) / self.std
        return torch.exp(-(z**2) / 2) / (self.std * math.sqrt(2 * math.pi) * t * (1 - t))


@dataclass(frozen=True)
class UShaped:
    """The ends of time more than its middle: exp(a t) + exp(a (1 - t)), for pairs whose lines hardly cross.

    Lee et al. 2024, section 4.1, whose a is 4: where the target hardly varies, what is hard is noise and data.
    """

    a: float = 4.0
    low: float = 1e-5
    high: float = 1 - 1e-5

    def __post_init__(self) -> None:
        if not (self.a > 0 and 0 <= self.low < self.high <= 1):
            seen = f"a={self.a:g}, low={self.low:g}, high={self.high:g}"
            raise ConfigError("a U has a rate, and a range of times", where="objective.times", seen=seen, fix="a=4")

    def __call__(self, n: int, path: Path, rng: Generator | None = None) -> Tensor:
        return self.quantile(path, torch.rand(n, generator=rng))

    def quantile(self, path: Path, u: Tensor) -> Tensor:
        inside = 0.5 + torch.asinh((2 * u - 1) * math.sinh(self.a / 2)) / self.a
        return (self.low + (self.high - self.low) * inside).clamp(self.low, self.high)

    def pdf(self, path: Path, t: Tensor) -> Tensor:
        inside = (t - self.low) / (self.high - self.low)
        whole = 2 * math.sinh(self.a / 2) / self.a * (self.high - self.low)
        return torch.cosh(self.a * (inside - 0.5)) / whole


@dataclass(frozen=True)
class LogNormal:
    """EDM: log(sigma / alpha) is normal, on any path (Karras et al. 2022, section 5)."""

    mean: float = -1.2
    std: float = 1.2

    def __call__(self, n: int, path: Path, rng: Generator | None = None) -> Tensor:
        return self._of_normal(path, torch.randn(n, generator=rng))

    def quantile(self, path: Path, u: Tensor) -> Tensor:
        return self._of_normal(path, _normal_quantile(u))

    def _of_normal(self, path: Path, z: Tensor) -> Tensor:
        return path.time(-2 * (self.mean + self.std * z)).clamp(max=1)

    def pdf(self, path: Path, t: Tensor) -> Tensor:
        z = (-log_snr(path, t) / 2 - self.mean) / self.std
        return torch.exp(-(z**2) / 2) / (self.std * math.sqrt(2 * math.pi)) * log_snr_rate(path, t).abs() / 2


def _normal_quantile(u: Tensor) -> Tensor:
    z: Tensor = torch.special.ndtri(u.double().clamp(1e-7, 1 - 1e-7))
    return z.to(u)


def log_snr_rate(path: Path, t: Tensor) -> Tensor:
    """d log_snr / dt, negative."""
    (alpha_rate, sigma_rate), alpha, sigma = path.rates(t), path.alpha(t), path.sigma(t)
    return 2 * (alpha_rate / alpha - sigma_rate / sigma)

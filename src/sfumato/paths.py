"""Gaussian paths: x_t = alpha(t) x0 + sigma(t) eps, with the data at t = 0 and the noise at t = 1.

A path is two functions of time. Everything else follows from them: the signal-to-noise ratio
log_snr = log(alpha^2 / sigma^2), which falls strictly as t rises; the kernel that adds the noise between two times;
and the posterior of an earlier state given a later one and the data (Ho et al. 2020, eq. 6-7, on any path;
Kingma et al. 2021, appendix A). Nothing here knows the shape of the data.
"""

import math
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn.functional import softplus

from sfumato.errors import ConfigError


class Path(Protocol):
    """The signal and noise scales over time, elementwise in t of any shape. Rates are analytic."""

    def alpha(self, t: Tensor) -> Tensor:
        """How much of the data is left."""
        ...

    def sigma(self, t: Tensor) -> Tensor:
        """How much noise there is."""
        ...

    def rates(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """(d alpha / dt, d sigma / dt)."""
        ...

    def time(self, log_snr: Tensor) -> Tensor:
        """The inverse of `log_snr(path, t)`."""
        ...


@dataclass(frozen=True)
class Linear:
    """Rectified flow and flow matching: a straight line from data to noise (Liu et al. 2022; Lipman et al. 2022)."""

    def alpha(self, t: Tensor) -> Tensor:
        return 1 - t

    def sigma(self, t: Tensor) -> Tensor:
        return t

    def rates(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return -torch.ones_like(t), torch.ones_like(t)

    def time(self, log_snr: Tensor) -> Tensor:
        return torch.sigmoid(-log_snr / 2)


@dataclass(frozen=True)
class OptimalTransport:
    """Flow matching's conditional optimal transport: alpha = 1 - t, sigma from `sigma_min` to 1 (Lipman et al. 2022).

    The only path that never quite reaches the data: at t = 0 `sigma_min` of noise is left (eq. 20-23, time reversed).
    """

    sigma_min: float = 1e-5

    def __post_init__(self) -> None:
        if not 0 <= self.sigma_min < 1:
            raise ConfigError("sigma_min lies between 0 and 1", where="path.sigma_min", seen=f"{self.sigma_min:g}")

    def alpha(self, t: Tensor) -> Tensor:
        return 1 - t

    def sigma(self, t: Tensor) -> Tensor:
        return self.sigma_min + (1 - self.sigma_min) * t

    def rates(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return -torch.ones_like(t), torch.full_like(t, 1 - self.sigma_min)

    def time(self, log_snr: Tensor) -> Tensor:
        # sigma / alpha - sigma_min is t / (1 - t)
        return torch.sigmoid(torch.log((torch.exp(-log_snr / 2) - self.sigma_min).clamp(min=0)))


@dataclass(frozen=True)
class Cosine:
    """A quarter turn: alpha = cos(pi t / 2), sigma = sin(pi t / 2). SiT's GVP, TrigFlow with time rescaled."""

    def alpha(self, t: Tensor) -> Tensor:
        return torch.sin((1 - t) * (math.pi / 2))  # the cosine, but exactly 0 at t = 1

    def sigma(self, t: Tensor) -> Tensor:
        return torch.sin(t * (math.pi / 2))

    def rates(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return -math.pi / 2 * self.sigma(t), math.pi / 2 * self.alpha(t)

    def time(self, log_snr: Tensor) -> Tensor:
        return torch.atan(torch.exp(-log_snr / 2)) * (2 / math.pi)


@dataclass(frozen=True)
class VarianceExploding:
    """EDM: alpha = 1 and sigma rises in a line to `sigma_max` (Karras et al. 2022). Spacing is the grid's affair."""

    sigma_max: float = 80.0

    def alpha(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)

    def sigma(self, t: Tensor) -> Tensor:
        return self.sigma_max * t

    def rates(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return torch.zeros_like(t), torch.full_like(t, self.sigma_max)

    def time(self, log_snr: Tensor) -> Tensor:
        return torch.exp(-log_snr / 2) / self.sigma_max


@dataclass(frozen=True)
class VariancePreserving:
    """DDPM in continuous time: beta rises in a line (Song et al. 2021, eq. 32-33)."""

    beta_min: float = 0.1
    beta_max: float = 20.0

    def alpha(self, t: Tensor) -> Tensor:
        return torch.exp(_log_alpha(self, t))

    def sigma(self, t: Tensor) -> Tensor:
        return torch.sqrt(-torch.expm1(2 * _log_alpha(self, t)))

    def rates(self, t: Tensor) -> tuple[Tensor, Tensor]:
        alpha, beta = self.alpha(t), _beta(self, t)
        sigma = self.sigma(t).clamp(
            min=1e-18
        )  # sigma rises infinitely fast at the data; the velocity's x0 is finite there
        return -beta / 2 * alpha, beta / 2 * alpha**2 / sigma

    def time(self, log_snr: Tensor) -> Tensor:
        y = softplus(
            -log_snr
        )  # -2 log alpha; torch's softplus is exact only below its threshold of 20, as y is linear above
        return _time_of(self, y)


@dataclass(frozen=True)
class SubVariancePreserving:
    """The sub-VP SDE: alpha as on `VariancePreserving`, but sigma = 1 - alpha^2 (Song et al. 2021, section 3.4)."""

    beta_min: float = 0.1
    beta_max: float = 20.0

    def alpha(self, t: Tensor) -> Tensor:
        return torch.exp(_log_alpha(self, t))

    def sigma(self, t: Tensor) -> Tensor:
        return -torch.expm1(2 * _log_alpha(self, t))

    def rates(self, t: Tensor) -> tuple[Tensor, Tensor]:
        alpha, beta = self.alpha(t), _beta(self, t)
        return -beta / 2 * alpha, beta * alpha**2

    def time(self, log_snr: Tensor) -> Tensor:
        # alpha / (1 - alpha^2) = r is a square in alpha, whose root is exp(-asinh(1 / 2 r))
        return _time_of(self, 2 * torch.asinh(torch.exp(-log_snr / 2) / 2))


def _beta(path: VariancePreserving | SubVariancePreserving, t: Tensor) -> Tensor:
    return path.beta_min + t * (path.beta_max - path.beta_min)


def _log_alpha(path: VariancePreserving | SubVariancePreserving, t: Tensor) -> Tensor:
    """Minus half the integral of beta."""
    return -0.25 * t**2 * (path.beta_max - path.beta_min) - 0.5 * t * path.beta_min


def _time_of(path: VariancePreserving | SubVariancePreserving, y: Tensor) -> Tensor:
    """The time at which -2 log alpha is y: a square in t, solved without cancellation."""
    return 2 * y / (path.beta_min + torch.sqrt(path.beta_min**2 + 2 * (path.beta_max - path.beta_min) * y))


Betas = Literal["linear", "scaled_linear", "cosine", "sigmoid"]


@dataclass(frozen=True)
class Tabulated:
    """A discrete DDPM schedule made continuous, so that any time may be asked for.

    `steps` betas give the cumulative products abar_i, i = 0 .. steps - 1. Index i stands at t = (i + 1) / steps,
    because index 0 already holds one step of noise; t = 0 is the data itself. Between two indices log_snr is linear
    in t (as k-diffusion does); in the first interval sigma / alpha is linear, so that it reaches 0 at t = 0, and with
    zero terminal SNR (Lin et al. 2023) alpha / sigma is linear in the last one, so that it reaches 0 at t = 1.

    betas: "linear" (Ho et al. 2020; `start` and `end` are for 1000 steps and scale with 1000 / steps),
        "scaled_linear" (Stable Diffusion: linear in sqrt(beta)), "cosine" (Nichol & Dhariwal 2021), "sigmoid"
        (Jabri et al. 2022, from -3 to 3 at temperature 1), or the numbers themselves.
    """

    betas: Betas | tuple[float, ...] = "linear"
    steps: int = 1000
    start: float | None = None
    end: float | None = None
    zero_terminal_snr: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.betas, (tuple, list)):
            object.__setattr__(self, "betas", tuple(float(b) for b in self.betas))
            object.__setattr__(self, "steps", len(self.betas))
        elif self.betas not in _DEFAULT_ENDS:
            raise ConfigError(
                f"unknown betas {self.betas!r}", where="path.betas", fix=f"one of {', '.join(_DEFAULT_ENDS)}"
            )
        if self.steps < 2:
            raise ConfigError("a table of betas needs at least 2 steps", where="path.steps", seen=str(self.steps))
        table = self.alphas_cumprod
        above_zero = float(table[-1]) > 0 or self.zero_terminal_snr
        if not bool((table[1:] < table[:-1]).all()) or not 0 < float(table[0]) < 1 or not above_zero:
            raise ConfigError(
                "betas must lie between 0 and 1, so that the noise rises at every step", where="path.betas"
            )

    @cached_property
    def alphas_cumprod(self) -> Tensor:
        """abar: (steps,), float64."""
        abar = torch.cumprod(1 - _betas(self), 0)
        if self.zero_terminal_snr:
            root = abar.sqrt()
            abar = ((root - root[-1]) * (root[0] / (root[0] - root[-1]))) ** 2
        return abar

    def alpha(self, t: Tensor) -> Tensor:
        return self._interpolate(t)[0]

    def sigma(self, t: Tensor) -> Tensor:
        return self._interpolate(t)[1]

    def rates(self, t: Tensor) -> tuple[Tensor, Tensor]:
        _, _, alpha_rate, sigma_rate = self._interpolate(t)
        return alpha_rate, sigma_rate

    def index(self, t: Tensor) -> Tensor:
        """The DDPM index, fractional between two of them: what networks trained on tables are given for a time."""
        return t * self.steps - 1

    def at(self, index: Tensor) -> Tensor:
        """The time of a DDPM index."""
        return (index + 1) / self.steps

    def time(self, log_snr: Tensor) -> Tensor:
        table = _log_snrs(self, log_snr.device, log_snr.dtype)
        # right=True puts a value equal to an entry into the segment that ends there
        i = torch.searchsorted(-table, -log_snr.contiguous(), right=True).clamp(1, self.steps - 1)
        high, low = table[i - 1], table[i]
        inside = i + (high - log_snr) / (high - low)
        first = torch.exp((table[0] - log_snr) / 2)
        index = torch.where(log_snr >= table[0], first, inside)
        if self.zero_terminal_snr:
            last = self.steps - torch.exp((log_snr - table[-2]) / 2)
            index = torch.where(log_snr <= table[-2], last, index)
        return index / self.steps

    def _interpolate(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """alpha, sigma and their rates: three formulas by segment, chosen without a branch on the data."""
        table, n = _log_snrs(self, t.device, t.dtype), self.steps
        i = torch.ceil(t * n).long().clamp(2, n)  # the segment from index i - 2 to index i - 1, in 0-based indices
        low, high = table[i - 1], table[i - 2]
        if self.zero_terminal_snr:
            low = torch.where(i >= n, high, low)
        log_snr = high + (low - high) * (t * n - (i - 1))
        slope = (low - high) * n
        alpha, sigma = torch.sigmoid(log_snr).sqrt(), torch.sigmoid(-log_snr).sqrt()
        inside = (alpha, sigma, slope * alpha * sigma**2 / 2, -slope * sigma * alpha**2 / 2)
        rate = torch.exp(-table[0] / 2) * n
        noise, signal, noise_rate, signal_rate = _from_ratio(t * rate, rate)
        parts = [
            torch.where(t * n < 1, a, b) for a, b in zip((signal, noise, signal_rate, noise_rate), inside, strict=True)
        ]
        if self.zero_terminal_snr:
            rate = torch.exp(table[-2] / 2) * n
            end = _from_ratio((1 - t) * rate, -rate)
            parts = [torch.where(t * n >= n - 1, a, b) for a, b in zip(end, parts, strict=True)]
        return parts[0], parts[1], parts[2], parts[3]


_DEFAULT_ENDS = {"linear": (1e-4, 0.02), "scaled_linear": (8.5e-4, 0.012), "cosine": (0.0, 0.0), "sigmoid": (-3.0, 3.0)}


def _betas(path: Tabulated) -> Tensor:
    if not isinstance(path.betas, str):
        return torch.tensor(path.betas, dtype=torch.float64)
    default = _DEFAULT_ENDS[path.betas]
    start, end = (d if given is None else given for given, d in zip((path.start, path.end), default, strict=True))
    if path.betas == "linear":
        return torch.linspace(start, end, path.steps, dtype=torch.float64) * (1000 / path.steps)
    if path.betas == "scaled_linear":
        return torch.linspace(math.sqrt(start), math.sqrt(end), path.steps, dtype=torch.float64) ** 2
    u = torch.linspace(0, 1, path.steps + 1, dtype=torch.float64)
    if path.betas == "cosine":
        abar = torch.cos((u + 0.008) / 1.008 * (math.pi / 2)) ** 2
    else:
        abar = torch.sigmoid(torch.tensor(end, dtype=torch.float64)) - torch.sigmoid(start + u * (end - start))
    return (1 - abar[1:] / abar[:-1]).clamp(max=0.999)


@lru_cache(maxsize=64)
def _log_snrs(path: Tabulated, device: torch.device, dtype: torch.dtype) -> Tensor:
    """The table on the device that asks, copied there once."""
    abar = path.alphas_cumprod
    return (torch.log(abar) - torch.log1p(-abar)).to(device, dtype)


def _from_ratio(ratio: Tensor, rate: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(small, large) of unit length with small / large = ratio, and their rates when the ratio moves at `rate`."""
    large = torch.rsqrt(1 + ratio**2)
    return ratio * large, large, rate * large**3, -ratio * rate * large**3


def log_snr(path: Path, t: Tensor) -> Tensor:
    """log(alpha^2 / sigma^2): infinite at t = 0."""
    return 2 * (torch.log(path.alpha(t)) - torch.log(path.sigma(t)))


def spread(path: Path, t: Tensor) -> float:
    """The standard deviation of x_t for data of unit variance, at one time: what a grid begins with that begins below
    pure noise, as the "leading" ones of published models do; at t = 1 it is sigma, but for a table's rest of signal.
    """
    t = t.to("cpu", torch.float64)
    return math.hypot(float(path.alpha(t)), float(path.sigma(t)))


def diffusion_squared(path: Path, t: Tensor) -> Tensor:
    """g^2 of the SDE dx = (alpha' / alpha) x dt + g dW that has these kernels, for t > 0: infinite where alpha is 0."""
    (alpha_rate, sigma_rate), alpha, sigma = path.rates(t), path.alpha(t), path.sigma(t)
    return 2 * sigma * (sigma_rate - alpha_rate / alpha * sigma)


def along(t: Tensor, like: Tensor) -> Tensor:
    """Per-sample times (B,), shaped (B, 1, ...) to multiply `like`. The only place that broadcasts time."""
    return t.reshape(t.shape + (1,) * (like.ndim - t.ndim)) if t.ndim else t


def noised(path: Path, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
    """A draw of x_t: x0 and eps (B, ...), t (B,) or ()."""
    t = along(t, x0)
    return path.alpha(t) * x0 + path.sigma(t) * eps


class Kernel(NamedTuple):
    """x_t | x_s is normal with mean `scale` * x_s and standard deviation `std`."""

    scale: Tensor
    std: Tensor


class Posterior(NamedTuple):
    """x_s | x_t, x0 is normal with mean `x_t` * x_t + `x0` * x0 and standard deviation `std`."""

    x_t: Tensor
    x0: Tensor
    std: Tensor


def transition(path: Path, s: Tensor, t: Tensor) -> Kernel:
    """The kernel that adds the noise between s and t, s <= t. Exact for any two times, not only near ones."""
    scale = path.alpha(t) / path.alpha(s)
    return Kernel(scale, (path.sigma(t) ** 2 - (scale * path.sigma(s)) ** 2).clamp(min=0).sqrt())


def posterior(path: Path, s: Tensor, t: Tensor) -> Posterior:
    """q(x_s | x_t, x0) for s < t: DDPM's "fixed small" reverse step when x0 is the model's guess."""
    scale, std = transition(path, s, t)
    sigma_s, sigma_t = path.sigma(s), path.sigma(t)
    return Posterior(
        x_t=scale * sigma_s**2 / sigma_t**2,
        x0=path.alpha(s) * std**2 / sigma_t**2,
        std=std * sigma_s / sigma_t,
    )

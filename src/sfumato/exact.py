"""Data whose diffusion is known exactly: one Gaussian, and mixtures of them, the test beds of samplers.

With V = alpha^2 std^2 + sigma^2 everything about a Gaussian is a closed form; a mixture weighs its components by their
responsibilities. All work on any path, with one time or one a row, and are meant for float64. The flow map of a mixture
integrates x / sigma in l = log(alpha / sigma) by RK4, where the ODE is e^l E[x0 | x_t].
"""

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from sfumato.denoiser import JUMP, Bound, answered
from sfumato.errors import ConfigError
from sfumato.paths import Path, along, log_snr


def _scales(path: Path, x: Tensor, t: float | Tensor) -> tuple[Tensor, Tensor]:
    t = along(torch.as_tensor(t, dtype=x.dtype), x)
    return path.alpha(t), path.sigma(t)


class _Exact:
    """What follows from E[x0 | x_t] alone (Tweedie)."""

    def x0(self, path: Path, x: Tensor, t: float | Tensor) -> Tensor:
        raise NotImplementedError

    def denoiser(self, path: Path) -> Bound:
        """The exact model, as samplers' drivers want it."""
        return Bound(path, lambda x, t: self.x0(path, x, t))

    def eps(self, path: Path, x: Tensor, t: float | Tensor) -> Tensor:
        """E[eps | x_t]."""
        alpha, sigma = _scales(path, x, t)
        return (x - alpha * self.x0(path, x, t)) / sigma

    def score(self, path: Path, x: Tensor, t: float | Tensor) -> Tensor:
        """The gradient of the log density of x_t."""
        alpha, sigma = _scales(path, x, t)
        return (alpha * self.x0(path, x, t) - x) / sigma**2

    def velocity(self, path: Path, x: Tensor, t: float | Tensor) -> Tensor:
        """dx/dt of the probability-flow ODE."""
        rates = path.rates(along(torch.as_tensor(t, dtype=x.dtype), x))
        return rates[0] * self.x0(path, x, t) + rates[1] * self.eps(path, x, t)


@dataclass(frozen=True)
class Gaussian(_Exact):
    """x0 ~ N(mean, diag(std^2)), mean and std of the shape of one sample (or broadcastable to it)."""

    mean: Tensor
    std: Tensor

    def draw(self, n: int, rng: torch.Generator) -> Tensor:
        mean = self.mean + torch.zeros_like(self.std)
        return mean + self.std * torch.randn(n, *mean.shape, generator=rng, dtype=torch.float64)

    def variance(self, path: Path, x: Tensor, t: float | Tensor) -> Tensor:
        """The variance of x_t."""
        alpha, sigma = _scales(path, x, t)
        return (alpha * self.std) ** 2 + sigma**2

    def x0(self, path: Path, x: Tensor, t: float | Tensor) -> Tensor:
        alpha, _ = _scales(path, x, t)
        return self.mean + alpha * self.std**2 / self.variance(path, x, t) * (x - alpha * self.mean)

    def log_density(self, path: Path, x: Tensor, t: float | Tensor) -> Tensor:
        """log p(x_t), up to a constant in x: (B,)."""
        alpha, _ = _scales(path, x, t)
        each = -((x - alpha * self.mean) ** 2) / (2 * self.variance(path, x, t))
        return each.flatten(1).sum(1)

    def flow(self, path: Path, x: Tensor, t: float | Tensor, s: float | Tensor) -> Tensor:
        """The exact solution at s of the ODE that passes through x at t."""
        (here, _), (there, _) = _scales(path, x, t), _scales(path, x, s)
        ratio = torch.sqrt(self.variance(path, x, s) / self.variance(path, x, t))
        return there * self.mean + ratio * (x - here * self.mean)

    def jump(self, path: Path, x: Tensor, t: float | Tensor, until: float | Tensor) -> Tensor:
        """The x0 for which DDIM's step from t to `until` is exact, see `Denoise`: (B, ...). E[x0 | x_t] for until = t.

        The step multiplies x - alpha x0 by q = sigma' / sigma, the flow x - alpha mean by sqrt(r), r = V' / V. So the
        answer is mean + (x - alpha mean) (sqrt(r) - q) / (alpha' - q alpha), which is made regular for until = t by
        r - q^2 = (std / sigma)^2 (alpha'^2 sigma^2 - alpha^2 sigma'^2) / V.
        """
        (alpha, sigma), (alpha_, sigma_) = _scales(path, x, t), _scales(path, x, until)
        both = torch.sqrt(self.variance(path, x, until) * self.variance(path, x, t)) * sigma
        gain = self.std**2 * (alpha_ * sigma + alpha * sigma_) / (both + self.variance(path, x, t) * sigma_)
        return self.mean + gain * (x - alpha * self.mean)

    def jumper(self, path: Path) -> Bound:
        """The exact model of two times: it answers "jump", and what follows from it."""

        def fn(x: Tensor, t: float | Tensor, to: str = "x0", until: float | Tensor | None = None) -> Tensor:
            ends: dict[str, float | Tensor | None] = {"x0": t, "endpoint": 0.0, JUMP: until}
            end = ends[to]
            if end is None:
                raise ConfigError("a jump ends at a time", where="until", seen="none", fix="until=0.0")
            return self.jump(path, x, t, end)

        return Bound(path, fn, answered([JUMP]))


@dataclass(frozen=True)
class Mixture(_Exact):
    """sum_k weight_k N(mean_k, diag(std_k^2)): weights (K,), means and stds (K, ...) over the shape of one sample."""

    weights: Tensor
    means: Tensor
    stds: Tensor

    def draw(self, n: int, rng: torch.Generator) -> Tensor:
        k = torch.multinomial(self.weights, n, replacement=True, generator=rng)
        noise = torch.randn(n, *self.means.shape[1:], generator=rng, dtype=torch.float64)
        return self.means[k] + self.stds.expand_as(self.means)[k] * noise

    def _log_terms(self, path: Path, x: Tensor, t: float | Tensor) -> tuple[Tensor, Tensor]:
        """log of weight times density of each component, and E[x0 | x_t, component]: (K, B) and (K, B, ...)."""
        alpha, sigma = _scales(path, x, t)
        means, variances = self.means[:, None], self.stds[:, None] ** 2
        total = alpha**2 * variances + sigma**2
        square = ((x - alpha * means) ** 2 / total + torch.log(2 * math.pi * total)).expand(-1, *x.shape)
        log_terms = torch.log(self.weights)[:, None] - square.flatten(2).sum(2) / 2
        return log_terms, (means * sigma**2 + alpha * variances * x) / total

    def log_density(self, path: Path, x: Tensor, t: float | Tensor) -> Tensor:
        """log p(x_t): (B,)."""
        return torch.logsumexp(self._log_terms(path, x, t)[0], 0)

    def x0(self, path: Path, x: Tensor, t: float | Tensor) -> Tensor:
        log_terms, parts = self._log_terms(path, x, t)
        share = torch.softmax(log_terms, 0)
        return (share.reshape(share.shape + (1,) * (x.ndim - 1)) * parts).sum(0)

    def flow(self, path: Path, x: Tensor, t: float, s: float, steps: int = 2000) -> Tensor:
        """The ODE's solution at s through x at t, by RK4; from pure noise and to the data within 1e-9 or so."""
        return _flow(self, path, x, t, s, steps)


@dataclass(frozen=True)
class FullMixture(_Exact):
    """A mixture with whole covariances over vectors: weights (K,), means (K, D), covariances (K, D, D)."""

    weights: Tensor
    means: Tensor
    covariances: Tensor

    @cached_property
    def _axes(self) -> tuple[Tensor, Tensor]:
        """The principal variances (K, D) and directions (K, D, D), one a column."""
        values, vectors = torch.linalg.eigh(self.covariances)
        return values.clamp(min=0), vectors

    def draw(self, n: int, rng: torch.Generator) -> Tensor:
        values, vectors = self._axes
        k = torch.multinomial(self.weights, n, replacement=True, generator=rng)
        noise = torch.randn(n, self.means.shape[1], generator=rng, dtype=self.means.dtype)
        return self.means[k] + torch.einsum("bij,bj->bi", vectors[k], values[k].sqrt() * noise)

    def x0(self, path: Path, x: Tensor, t: float | Tensor) -> Tensor:
        """x: (B, D)."""
        alpha, sigma = _scales(path, x, t)
        values, vectors = self._axes
        turned = (x - alpha * self.means[:, None]) @ vectors  # (K, B, D), along the axes
        total = alpha**2 * values[:, None] + sigma**2
        terms = torch.log(self.weights)[:, None] - (turned**2 / total + torch.log(total)).sum(-1) / 2
        gained = (alpha * values[:, None] / total * turned) @ vectors.mT
        share = torch.softmax(terms, 0)[..., None]
        return (share * (self.means[:, None] + gained)).sum(0)

    def flow(self, path: Path, x: Tensor, t: float, s: float, steps: int = 1500) -> Tensor:
        """As of `Mixture`."""
        return _flow(self, path, x, t, s, steps)


def _flow(exact: _Exact, path: Path, x: Tensor, t: float, s: float, steps: int) -> Tensor:
    t_, s_ = torch.tensor([t, s], dtype=torch.float64)
    start, end = (float(log_snr(path, v).clamp(-40, 40)) / 2 for v in (t_, s_))
    end = min(end, 11.0) if s == 0 else end
    level = torch.linspace(start, end, 2 * steps + 1, dtype=torch.float64)
    at = path.time(2 * level).tolist()
    sigma, rate = path.sigma(torch.tensor(at, dtype=torch.float64)).tolist(), torch.exp(level).tolist()
    sigma[0] = float(path.sigma(t_))

    def slope(y: Tensor, i: int) -> Tensor:
        return float(rate[i]) * exact.x0(path, sigma[i] * y, at[i])

    h, y = float(level[2] - level[0]), x / sigma[0]
    for i in range(0, 2 * steps, 2):
        a = slope(y, i)
        b = slope(y + h / 2 * a, i + 1)
        c = slope(y + h / 2 * b, i + 1)
        y = y + h / 6 * (a + 2 * b + 2 * c + slope(y + h * c, i + 2))
    last = sigma[-1] * y
    result: Tensor = exact.x0(path, last, at[-1]) if s == 0 else last
    return result


def three_modes() -> Mixture:
    """The test bed for orders of convergence: one dimension, three unequal modes."""
    rows = torch.tensor([[-1.0, 0.25], [0.3, 0.4], [1.2, 0.3]], dtype=torch.float64)
    return Mixture(torch.tensor([0.3, 0.4, 0.3], dtype=torch.float64), rows[:, :1], rows[:, 1:])

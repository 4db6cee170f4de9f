"""What a network is trained to say. Every choice is y = a x0 + b eps, for two numbers a and b.

With x_t = alpha x0 + sigma eps that is a 2x2 system with determinant alpha b - sigma a, so one formula turns any
prediction into x0 and back, on any path, and a new parameterisation is one line. V is Salimans & Ho 2022;
VELOCITY is dx_t/dt (flow matching), which is *not* V except, up to a constant, on the cosine path.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from sfumato.errors import ConfigError
from sfumato.paths import Path, along


@dataclass(frozen=True)
class Prediction:
    """A parameterisation: `mix(path, t)` gives (a, b). Times are (B,) or (); data is (B, ...)."""

    name: str
    mix: Callable[[Path, Tensor], tuple[Tensor, Tensor]]

    def target(self, path: Path, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """What a perfect network would answer, were x0 and eps known."""
        a, b = self.mix(path, along(t, x0))
        return a * x0 + b * eps

    def x0(self, path: Path, y: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """The data that an answer `y` at x_t stands for. At sigma = 0 it is x_t / alpha, whatever y says; X0's is y."""
        if self == X0:
            return y
        t = along(t, x_t)
        (a, b), alpha, sigma = self.mix(path, t), path.alpha(t), path.sigma(t)
        return (b * x_t - sigma * y) / (alpha * b - sigma * a)

    def answer(self, path: Path, x0: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """The inverse of `x0`: what the network would have said. Undefined at sigma = 0."""
        if self == X0:
            return x0
        t = along(t, x_t)
        (a, b), alpha, sigma = self.mix(path, t), path.alpha(t), path.sigma(t)
        return a * x0 + b * (x_t - alpha * x0) / sigma

    def gain(self, path: Path, t: Tensor) -> Tensor:
        """How much an error in x0 is magnified in this prediction, at fixed x_t: converts losses between spaces."""
        if self == X0:
            return torch.ones_like(t)
        a, b = self.mix(path, t)
        return (b * path.alpha(t) / path.sigma(t) - a).abs()

    def determines(self, path: Path, t: Tensor) -> Tensor:
        """Whether x0 follows from an answer at t: noise predictions say nothing where alpha = 0."""
        if self == X0:
            return torch.ones_like(t, dtype=torch.bool)
        a, b = self.mix(path, t)
        return (path.alpha(t) * b - path.sigma(t) * a).abs() > 0


def edm(sigma_data: float = 0.5, sigma_min: float = 0.0) -> Prediction:
    """Karras et al. 2022, table 1: F, of unit variance at every noise level, on any path.

    With s = sigma / alpha, D(x / alpha) = c_skip x / alpha + c_out F; written without dividing by alpha or sigma.
    sigma_min: the noise level at and below which D is x itself, where the published consistency models have their
    boundary, and not at the data (Song et al. 2023, appendix C). c_skip and c_out then count s from there, but for
    c_out's root.
    """

    def mix(path: Path, t: Tensor) -> tuple[Tensor, Tensor]:
        alpha, sigma = path.alpha(t), path.sigma(t)
        norm = torch.sqrt(sigma**2 + (sigma_data * alpha) ** 2)
        if not sigma_min:
            return sigma / (sigma_data * norm), -sigma_data * alpha / norm
        above = (sigma - sigma_min * alpha).clamp(min=1e-18)  # b is infinite at the boundary; x0 is x there
        inside = above**2 + (sigma_data * alpha) ** 2
        sigma = sigma.clamp(min=1e-18)
        return above * norm / (sigma_data * inside), -sigma_data * alpha * sigma * norm / (inside * above)

    return Prediction(f"edm({sigma_data:g})" if not sigma_min else f"edm({sigma_data:g}, {sigma_min:g})", mix)


def bounded(level: float = 0.03) -> Prediction:
    """x0, but for a share w of x / alpha itself: D = w x / alpha + (1 - w) y, where w = level^2 / (s^2 + level^2).

    A network that predicts x0 has no word of its own at the data that is sure to be x. With this it has, as consistency
    models need; above `level`, a noise level s = sigma / alpha, it is nearly what it was (Luo et al. 2023, eq. 9).
    """
    if not level > 0:
        raise ConfigError("a boundary lies at a noise level", where="prediction.level", seen=f"{level:g}", fix="0.03")

    def mix(path: Path, t: Tensor) -> tuple[Tensor, Tensor]:
        sigma = path.sigma(t)
        return torch.ones_like(sigma), -(level**2) * path.alpha(t) / _tiny(sigma)

    return Prediction(f"bounded({level:g})", mix)


def _tiny(sigma: Tensor) -> Tensor:
    return sigma.clamp(min=1e-18)  # the score is infinite at the data; x0 = (x + sigma^2 score) / alpha is not


X0 = Prediction("x0", lambda path, t: (torch.ones_like(t), torch.zeros_like(t)))
EPS = Prediction("eps", lambda path, t: (torch.zeros_like(t), torch.ones_like(t)))
V = Prediction("v", lambda path, t: (-path.sigma(t), path.alpha(t)))
VELOCITY = Prediction("velocity", lambda path, t: path.rates(t))
SCORE = Prediction("score", lambda path, t: (torch.zeros_like(t), -1 / _tiny(path.sigma(t))))

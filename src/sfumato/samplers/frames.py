"""Frames: the variable in which a general ODE solver sees the probability-flow ODE.

With y = x / scale the ODE is dy/dtau = slope * (x0 + mix * x), whatever tau is:
  time   tau = t, y = x: dx/dt is the velocity alpha' x0 + sigma' eps of flow matching, smooth where the path is;
  sigma  tau = sigma / alpha, y = x / alpha: dy/dtau is the noise (EDM; DDIM is Euler's method), infinite at alpha = 0;
  angle  tau = atan(sigma / alpha), y = x / sqrt(alpha^2 + sigma^2): dy/dtau is v, smooth from pure noise to data.
The last two know a path only by its noise levels, so that a solver does the same on all of them.
"""

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from sfumato.paths import Linear, Path
from sfumato.samplers.plan import checked_choice

Variable = Literal["auto", "time", "angle", "sigma"]  # auto: time on the linear path, whose flows are straight in it


class Frame(NamedTuple):
    """The ODE at some times, all of the shape of the times. slope and mix are not finite at sigma = 0."""

    tau: Tensor
    scale: Tensor
    slope: Tensor
    mix: Tensor

    @classmethod
    def of(cls, path: Path, t: Tensor, variable: Variable) -> "Frame":
        """t: float64 on the CPU. ConfigError for an unknown variable."""
        variable, alpha, sigma = resolved(path, variable), path.alpha(t), path.sigma(t)
        if variable == "time":
            alpha_rate, sigma_rate = path.rates(t)
            det = alpha * sigma_rate - alpha_rate * sigma
            return cls(t, torch.ones_like(t), -det / sigma, -sigma_rate / det)
        if variable == "sigma":
            return cls(sigma / alpha, alpha, -alpha / sigma, -1 / alpha)
        radius = torch.hypot(alpha, sigma)
        return cls(torch.atan2(sigma, alpha), radius, -radius / sigma, -alpha / radius**2)


def resolved(path: Path, variable: Variable) -> Literal["time", "angle", "sigma"]:
    """The variable meant on this path."""
    checked_choice("variable", variable, ("auto", "time", "angle", "sigma"))
    if variable == "auto":
        return "time" if isinstance(path, Linear) else "angle"
    return variable


def time_at(path: Path, tau: Tensor, variable: Variable) -> Tensor:
    """The inverse of tau, for tau > 0 and, if an angle, below pi / 2."""
    variable = resolved(path, variable)
    if variable == "time":
        return tau
    level = tau if variable == "sigma" else torch.tan(tau.clamp(max=math.pi / 2))
    return path.time(-2 * torch.log(level)).clamp(0, 1)

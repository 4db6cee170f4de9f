"""Stochastic differential equations that keep the marginals of the path, with any strength of noise.

For every D(t) >= 0 the SDE dx = velocity dt + D score dt + sqrt(2 D) dW has the marginals of the probability-flow ODE
(Song et al. 2021, appendix D; Ma et al. 2024 (SiT), eq. 6-7, where D is w / 2). D = 0 is the ODE, D = g^2 / 2 the
reverse-time SDE, infinite where alpha = 0. Since any D will do, it is kept so low that one step replaces at most half
of the noise: beyond that explicit steps are unstable. The default does not come there on an even grid of the linear
path.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from sfumato.errors import ConfigError
from sfumato.paths import Path, diffusion_squared
from sfumato.samplers.core import Ask, Draw, Running, Table
from sfumato.samplers.plan import checked_choice

Form = Literal["constant", "sigma", "linear", "decreasing", "increasing_decreasing", "diffusion"]


def sde_em(path: Path, x: Tensor, times: Tensor, *, diffusion: Form = "sigma", strength: float = 1.0) -> Running:
    """Euler-Maruyama, of weak order 1. The step to the data is x0 itself.

    diffusion: D(t) = `strength` times 1, sigma(t), t, (1 - cos pi t)^2 / 4, sin^2 pi t, or g(t)^2 / 2 ("diffusion").
    """
    equation = _Equation.of(path, times, diffusion, strength)
    table = equation.table
    for i in table.steps:
        x0 = yield Ask(x, table.t[i])
        if table.sigma[i + 1] == 0:
            return x0
        dt, noise = table.t[i] - table.t[i + 1], equation.noise(i, i)
        x = torch.add(x, equation.drift(i, i, x, x0), alpha=dt)
        if noise > 0:
            x = yield Draw(x, math.sqrt(2 * dt * noise))
    return x


def sde_heun(path: Path, x: Tensor, times: Tensor, *, diffusion: Form = "sigma", strength: float = 1.0) -> Running:
    """Heun's method with one draw and two calls a step: of weak order 2, because the noise is additive.

    Kloeden & Platen 1992, section 15.1. The step to the data is x0 itself. diffusion, strength: as for `sde_em`.
    """
    equation = _Equation.of(path, times, diffusion, strength)
    table = equation.table
    for i in table.steps:
        x0 = yield Ask(x, table.t[i])
        if table.sigma[i + 1] == 0:
            return x0
        dt, noise = table.t[i] - table.t[i + 1], (equation.noise(i, i) + equation.noise(i, i + 1)) / 2
        here = equation.drift(i, i, x, x0)
        x = torch.add(x, here, alpha=dt)
        if noise > 0:
            x = yield Draw(x, math.sqrt(2 * dt * noise))
        ahead = yield Ask(x, table.t[i + 1])
        x = torch.add(x, equation.drift(i, i + 1, x, ahead) - here, alpha=dt / 2)
    return x


@dataclass(frozen=True)
class _Equation:
    """The SDE at the times of a grid, in plain floats, run from noise to data."""

    table: Table
    alpha_rate: list[float]
    sigma_rate: list[float]
    noises: list[float]

    @classmethod
    def of(cls, path: Path, times: Tensor, form: Form, strength: float) -> "_Equation":
        checked_choice("diffusion", form, tuple(_FORMS))
        if not 0 <= strength < math.inf:
            raise ConfigError(
                "the noise of this sampler has a strength from 0",
                where="sampler.strength",
                seen=f"{strength:g}",
                fix="strength=1",
            )
        table = Table.of(path, times)
        t = torch.tensor(table.t, dtype=torch.float64)
        noises = (strength * _FORMS[form](path, t)).tolist() if strength else [0.0] * len(table.t)
        alpha_rate, sigma_rate = path.rates(t)
        return cls(table, alpha_rate.tolist(), sigma_rate.tolist(), noises)

    def noise(self, step: int, i: int) -> float:
        """D at time i, as far as the length of a step allows."""
        dt = self.table.t[step] - self.table.t[step + 1]
        return min(self.noises[i], self.table.sigma[i] ** 2 / (2 * dt))

    def drift(self, step: int, i: int, x: Tensor, x0: Tensor) -> Tensor:
        """Minus the velocity, plus D times the score, at time i."""
        alpha, sigma = self.table.alpha[i], self.table.sigma[i]
        shrink = self.sigma_rate[i] / sigma + self.noise(step, i) / sigma**2  # of the noise, x - alpha x0
        return torch.add(x * -shrink, x0, alpha=alpha * shrink - self.alpha_rate[i])


_FORMS: Mapping[Form, Callable[[Path, Tensor], Tensor]] = {
    "constant": lambda path, t: torch.ones_like(t),
    "sigma": lambda path, t: path.sigma(t),
    "linear": lambda path, t: t,
    "decreasing": lambda path, t: (1 - torch.cos(math.pi * t)) ** 2 / 4,
    "increasing_decreasing": lambda path, t: torch.sin(math.pi * t) ** 2,
    "diffusion": lambda path, t: diffusion_squared(path, t) / 2,
}

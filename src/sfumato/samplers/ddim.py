"""DDIM and Euler: first-order steps of the probability-flow ODE, with any share of DDPM's noise.

DDIM (Song et al. 2021, eq. 12) keeps x0-hat and eps-hat of the current state and moves to the next noise level. On
every path it is Euler's method in sigma / alpha; Euler in t agrees with it exactly on the linear path only.
"""

import torch
from torch import Tensor

from sfumato.errors import ConfigError
from sfumato.paths import Path
from sfumato.samplers.core import Ask, Noise, Running, Table, ddim_step


def ddim(path: Path, x: Tensor, times: Tensor, noise: Noise = torch.randn_like, *, eta: float = 0.0) -> Running:
    """eta = 0 is deterministic; eta = 1 is DDPM's ancestral step with the posterior's variance, on any grid."""
    if not 0 <= eta <= 1:
        raise ConfigError(
            "DDIM's eta lies between 0 and 1",
            where="sampler.eta",
            seen=f"{eta:g}",
            fix="eta=0 (deterministic) or eta=1 (ancestral)",
        )
    table = Table.of(path, times)
    alpha, sigma = table.alpha, table.sigma
    for i in table.steps:
        x0 = yield Ask(x, table.t[i])
        fresh = eta * posterior_std(table, i)
        if fresh == 0:
            x = ddim_step(x, x0, table, i, i + 1)
        else:  # what is left of the old noise keeps the variance at sigma^2
            kept = max(sigma[i + 1] ** 2 - fresh**2, 0.0) ** 0.5 / sigma[i]
            x = torch.add(x * kept, x0, alpha=alpha[i + 1] - kept * alpha[i])
            x = torch.add(x, noise(x), alpha=fresh)
    return x


def euler(path: Path, x: Tensor, times: Tensor, noise: Noise = torch.randn_like) -> Running:
    """Euler's method on dx/dt = alpha' x0 + sigma' eps, in the path's own time (flow matching's sampler)."""
    table = Table.of(path, times)
    rates = [rate.tolist() for rate in path.rates(torch.tensor(table.t, dtype=torch.float64))]
    for i in table.steps:
        x0 = yield Ask(x, table.t[i])
        h = table.t[i + 1] - table.t[i]
        # velocity = alpha' x0 + sigma' (x - alpha x0) / sigma
        per_x = rates[1][i] / table.sigma[i]
        x = torch.add(x * (1 + h * per_x), x0, alpha=h * (rates[0][i] - per_x * table.alpha[i]))
    return x


def posterior_std(table: Table, i: int) -> float:
    """The standard deviation of x_s given x_t and x0, from time i to the next."""
    scale = table.alpha[i] / table.alpha[i + 1]
    added = max(table.sigma[i] ** 2 - (scale * table.sigma[i + 1]) ** 2, 0.0)
    return float(table.sigma[i + 1] * added**0.5 / table.sigma[i])

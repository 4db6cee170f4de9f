"""EDM's sampler: Heun's method in sigma / alpha, with optional churn (Karras et al. 2022, algorithm 2), on any path.

Each step may first raise the noise a little with fresh noise ("churn"), which corrects earlier errors, and then takes
an Euler step and averages the slopes at its two ends. In the coordinates x / alpha, sigma / alpha every path is EDM's.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from sfumato.paths import Path
from sfumato.samplers.core import Draw, Running, Table
from sfumato.samplers.frames import Variable
from sfumato.samplers.plan import SingleStep, ddim_single, single_step
from sfumato.samplers.runge_kutta import HEUN, runge_kutta_step


class _Raise(NamedTuple):
    """Raising the noise: how much of x is kept, and the standard deviation of what is added."""

    scale: float
    std: float


def heun(
    path: Path,
    x: Tensor,
    times: Tensor,
    *,
    churn: float = 0.0,
    churn_min: float = 0.0,
    churn_max: float = math.inf,
    churn_noise: float = 1.0,
    variable: Variable = "sigma",
) -> Running:
    """churn is the paper's S_churn, spread over the steps whose noise level lies in [churn_min, churn_max].

    variable: what Heun's method is made in, see `Frame`; "time" on the linear path is the Heun of flow matching. At the
    data there is nothing to ask, and at pure noise sigma / alpha is infinite: there it is one slope, which is DDIM's.
    """
    grid = Table.of(path, times)
    plan = [_planned(path, grid, i, churn, churn_min, churn_max, churn_noise, variable) for i in grid.steps]
    for raised, step in plan:
        if raised is not None:
            x = yield Draw(x * raised.scale, raised.std)
        x, _ = yield from single_step(x, step)
    return x


def _planned(
    path: Path, grid: Table, i: int, churn: float, low: float, high: float, noise: float, variable: Variable
) -> tuple[_Raise | None, SingleStep]:
    """What step i does: raise the noise or not, and a step of Heun's from there."""
    table, start, raised = grid, i, None
    factor = 1 + min(churn / len(grid.steps), math.sqrt(2) - 1)
    if churn > 0 and grid.alpha[i] > 0 and low <= grid.sigma[i] / grid.alpha[i] <= high:
        t = path.time(torch.tensor(2 * (grid.half_log_snr[i] - math.log(factor)), dtype=torch.float64))
        if float(t) <= 1:
            table, start = Table.of(path, torch.tensor([float(t), grid.t[i + 1]], dtype=torch.float64)), 0
            scale = table.alpha[0] / grid.alpha[i]
            added = max(table.sigma[0] ** 2 - (scale * grid.sigma[i]) ** 2, 0.0)
            raised = _Raise(scale, noise * math.sqrt(added))
    if table.sigma[start + 1] == 0:
        return raised, ddim_single(table, start)
    return raised, runge_kutta_step(path, table, start, HEUN, variable)

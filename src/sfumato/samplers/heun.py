"""EDM's sampler: Heun's method in sigma / alpha, with optional churn (Karras et al. 2022, algorithm 2), on any path.

Each step may first raise the noise a little with fresh noise ("churn"), which corrects earlier errors, and then takes
an Euler step and averages the slopes at its two ends. In the coordinates x / alpha, sigma / alpha every path is EDM's.
"""

import math

import torch
from torch import Tensor

from sfumato.paths import Path
from sfumato.samplers.core import Ask, Noise, Running, Table, ddim_step


def heun(
    path: Path,
    x: Tensor,
    times: Tensor,
    noise: Noise = torch.randn_like,
    *,
    churn: float = 0.0,
    churn_min: float = 0.0,
    churn_max: float = math.inf,
    churn_noise: float = 1.0,
) -> Running:
    """churn is the paper's S_churn, spread over the steps whose noise level lies in [churn_min, churn_max]."""
    grid = Table.of(path, times)
    last = grid.steps[-1]
    for i in grid.steps:
        table, start = grid, i
        raised = _raised(path, grid, i, churn, churn_min, churn_max)
        if raised is not None:
            table, start = raised, 0
            scale = table.alpha[0] / grid.alpha[i]
            added = table.sigma[0] ** 2 - (scale * grid.sigma[i]) ** 2
            x = torch.add(x * scale, noise(x), alpha=churn_noise * math.sqrt(max(added, 0.0)))
        x0 = yield Ask(x, table.t[start])
        step = ddim_step(x, x0, table, start, start + 1)
        if (i == last and table.sigma[start + 1] == 0) or table.alpha[start] == 0:
            x = step  # at the data there is nothing to ask, at pure noise sigma / alpha is infinite: one slope it is
            continue
        ahead = yield Ask(step, table.t[start + 1])
        x = _averaged(x, x0, step, ahead, table, start)
    return x


def _raised(path: Path, grid: Table, i: int, churn: float, low: float, high: float) -> Table | None:
    """The two times of step i with the first raised by the churn, or None where there is none."""
    if churn <= 0 or grid.alpha[i] == 0 or not low <= grid.sigma[i] / grid.alpha[i] <= high:
        return None
    factor = 1 + min(churn / len(grid.steps), math.sqrt(2) - 1)
    t = path.time(torch.tensor(2 * (grid.half_log_snr[i] - math.log(factor)), dtype=torch.float64))
    return Table.of(path, torch.stack([t, torch.tensor(grid.t[i + 1], dtype=torch.float64)])) if float(t) <= 1 else None


def _averaged(x: Tensor, x0: Tensor, step: Tensor, ahead: Tensor, table: Table, i: int) -> Tensor:
    """Heun's correction. The slope of x / alpha in sigma / alpha is the noise, (x - alpha x0) / sigma."""
    (a, b), (s, r) = table.alpha[i : i + 2], table.sigma[i : i + 2]
    here = torch.add(x, x0, alpha=-a) / s
    there = torch.add(step, ahead, alpha=-b) / r
    return torch.add(x * (b / a), here + there, alpha=(r - s * b / a) / 2)

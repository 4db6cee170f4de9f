"""Restart sampling (Xu et al. 2023): a deterministic sampler that goes back and does a part again.

Where the main grid comes to the lower end of an interval of noise levels, noise is added up to its upper end, and the
ODE is solved back down; that is repeated. The added noise contracts the errors of the steps before, as an SDE does,
and the steps themselves stay deterministic and long. In x / alpha and sigma / alpha every path is the paper's.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from sfumato.errors import ConfigError
from sfumato.paths import Path
from sfumato.samplers.core import Draw, Running, SamplerFn, Table
from sfumato.samplers.ddim import ddim
from sfumato.samplers.heun import heun
from sfumato.samplers.plan import checked_choice

Solver = Literal["heun", "ddim"]
_SOLVERS: Mapping[Solver, SamplerFn] = {"heun": heun, "ddim": ddim}


class Interval(NamedTuple):
    """Go back from noise level `low` to `high` (sigma / alpha) `times` times, each time down again in `steps` steps.

    The published lists count the points of the way down, which are one more than the steps.
    """

    steps: int
    times: int
    low: float
    high: float


def restart(
    path: Path,
    x: Tensor,
    times: Tensor,
    *,
    intervals: Sequence[tuple[int, int, float, float]] = ((3, 1, 0.59, 1.09), (5, 1, 0.06, 0.3)),
    noise: float = 1.0,
    solver: Solver = "heun",
) -> Running:
    """intervals: see `Interval`; each begins at the time of the grid that is nearest to its lower end, and below its
    upper one. The default are the two lowest of the paper's for ImageNet, once each. noise: a factor on what is drawn.

    Raises ConfigError if the grid has no time inside an interval, or the path no noise at its upper end.
    """
    checked_choice("solver", solver, tuple(_SOLVERS))
    table, solve = Table.of(path, times), _SOLVERS[solver]
    places = _placed(path, table, intervals)
    start, grid = 0, torch.tensor(table.t, dtype=torch.float64)
    for end in sorted({*places, len(grid) - 1}):
        x = yield from solve(path, x, grid[start : end + 1])
        for interval in places.get(end, ()):
            down = _down(path, table, end, interval)
            back = Table.of(path, down)
            scale = back.alpha[0] / back.alpha[-1]
            added = math.sqrt(max(back.sigma[0] ** 2 - (scale * back.sigma[-1]) ** 2, 0.0))
            for _ in range(interval.times):
                x = yield Draw(x * scale, noise * added)
                x = yield from solve(path, x, down)
        start = end
    return x


def _placed(
    path: Path, table: Table, intervals: Sequence[tuple[int, int, float, float]]
) -> Mapping[int, list[Interval]]:
    """The intervals by the index of the grid's time that each begins at."""
    levels = {i: table.sigma[i] / table.alpha[i] for i in table.steps if i and table.alpha[i] > 0}
    most = (
        float(path.alpha(torch.ones((), dtype=torch.float64))),
        float(path.sigma(torch.ones((), dtype=torch.float64))),
    )
    places: dict[int, list[Interval]] = {}
    for given in intervals:
        interval = _checked(given)
        if interval.high * most[0] > most[1]:
            raise ConfigError(
                "a restart goes back to more noise than the path has",
                where="sampler.intervals",
                seen=f"up to {interval.high:g}, the path ends at {most[1] / most[0]:g}",
                fix=f"an upper end of {most[1] / most[0]:g} or less",
            )
        below = {i: level for i, level in levels.items() if level < interval.high}
        if not below:
            raise ConfigError(
                "the grid has no time inside a restart's interval",
                where="sampler.intervals",
                seen=f"{len(table.steps)} steps, the interval ends at a noise level of {interval.high:g}",
                fix="more steps, or intervals further up",
            )
        place = min(below, key=lambda i: abs(below[i] - interval.low))
        places.setdefault(place, []).append(interval)
    return places


def _checked(given: Sequence[float]) -> Interval:
    """An interval, if the numbers can be one."""
    if len(given) == 4:
        steps, times, low, high = given
        if steps == int(steps) and steps >= 1 and times == int(times) and times >= 0 and 0 < low < high < math.inf:
            return Interval(int(steps), int(times), low, high)
    raise ConfigError(
        "a restart is four numbers: steps, times, and a lower and a higher noise level",
        where="sampler.intervals",
        seen=str(given),
        fix="[5, 1, 0.06, 0.3]",
    )


def _down(path: Path, table: Table, i: int, interval: Interval, rho: float = 7.0) -> Tensor:
    """The times of the way down to time i, spaced as Karras et al. 2022 do."""
    low, high = table.sigma[i] / table.alpha[i], interval.high
    u = torch.linspace(0, 1, interval.steps + 1, dtype=torch.float64)
    levels = (high ** (1 / rho) + u * (low ** (1 / rho) - high ** (1 / rho))) ** rho
    times = path.time(-2 * torch.log(levels)).clamp(max=1)
    times[-1] = table.t[i]
    return times

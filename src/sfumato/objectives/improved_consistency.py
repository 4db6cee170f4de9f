"""Consistency training that needs no slow copy: improved (Song & Dhariwal 2024) and easy (Geng et al. 2024).

Both draw noise levels from EDM's log-normal density and pull what is said at a level to what the network itself says,
as a constant, at a lower one, with the same noise. The improved one has a grid whose number of points doubles now and
then; the easy one has none: the lower level is a share of the upper one, at first none, which is denoising, so that it
goes on where a diffusion model ends. A pair counts by the inverse of how far apart its levels are.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Generator, Tensor

from sfumato.denoiser import Cond, Denoiser
from sfumato.errors import ConfigError
from sfumato.grids import SIGMA_MAX, Grid, karras
from sfumato.objectives.consistency import (
    HUBER,
    Metric,
    checked,
    checked_growth,
    end_of,
    levels,
    noised_twice,
    points_of,
    pulled,
)
from sfumato.objectives.denoising import Loss
from sfumato.objectives.distances import Distance
from sfumato.objectives.teaching import Lesson
from sfumato.paths import Path
from sfumato.times import Density, LogNormal

Span = Literal["level", "angle", "flat"]


@dataclass(frozen=True)
class ImprovedConsistencyTraining:
    """From data alone, by pairs of neighbouring points of a grid of `first` + 1 points, which doubles up to `last` + 1.

    mean, std: of the log of the noise level, by which pairs are drawn: as much as a normal density has between the two.
    span: what pairs count by the inverse of: "level", the difference of their noise levels, which is the paper's;
    "angle", that of the angles atan(sigma / alpha), which at little noise is the same and near pure noise still counts;
    "flat", nothing. metric, c, distance: as for `ConsistencyDistillation`.
    """

    grid: Grid = karras
    first: int = 10
    last: int = 1280
    mean: float = -1.1
    std: float = 2.0
    span: Span = "level"
    metric: Metric = "huber"
    c: float = HUBER
    distance: Distance | None = None

    def __post_init__(self) -> None:
        checked(self.metric, self.c)
        checked_growth(self.first, self.last, least=1)
        _checked_span(self.span)

    def points(self, progress: float) -> int:
        """N(k) of the grid, the data included: `first` + 1, doubled after equal parts of training, at most last + 1."""
        parts = math.floor(math.log2(self.last // self.first)) + 1
        return int(min(self.first * 2 ** math.floor(progress * parts), self.last)) + 1

    def suits(self, student: Denoiser, teacher: Denoiser | None) -> None:
        points_of(self.grid, self.points(1.0), student)

    def shares(self, path: Path, times: Tensor) -> Tensor:
        """How often each pair of neighbouring times is drawn: (n,), of n + 1 falling times."""
        z = (torch.log(levels(path, times)) - self.mean) / self.std
        below: Tensor = torch.special.ndtr(z)
        return -below.diff()

    def __call__(self, lesson: Lesson, x0: Tensor, cond: Cond | None = None, rng: Generator | None = None) -> Loss:
        """x0: (B, ...). Points and noise come from `rng` on the CPU."""
        times = points_of(self.grid, self.points(lesson.progress), lesson.student)
        shares = self.shares(lesson.path, times)
        i = torch.multinomial(shares, len(x0), replacement=True, generator=rng)
        level = levels(lesson.path, times)
        weight = per_span(self.span, level[i], level[i + 1])
        x_t, t, x_s, s = noised_twice(lesson.path, x0, times[i], times[i + 1], rng)
        target = end_of(lesson.student, x_s, s, t, cond)
        return pulled(lesson.student(x_t, t, cond), target, t, self.metric, self.c, self.distance, weight)


@dataclass(frozen=True)
class EasyConsistencyTraining:
    """From data, going on from a diffusion model: a level t is pulled to r(t) = t (1 - (1 + k sigmoid(-b t)) / q^j).

    j counts the stages of training from 1; where r(t) would be negative it is 0, and the target the data itself.
    times: of the upper ends. base: q, 2 for slow training in many stages, 256 with a single one for short training.
    stages: how many, of equal length. k, b: how much wider apart pairs are where there is little noise. c: 0, the plain
    length of the error. span, metric, distance: as for `ImprovedConsistencyTraining`. Levels count up to 80: pure
    noise is pulled to where that is.
    """

    times: Density = LogNormal(-1.1, 2.0)
    base: float = 2.0
    stages: int = 8
    k: float = 8.0
    b: float = 1.0
    span: Span = "level"
    metric: Metric = "huber"
    c: float = 0.0
    distance: Distance | None = None

    def __post_init__(self) -> None:
        checked(self.metric, self.c)
        _checked_span(self.span)
        if not self.base > 1 or self.stages < 1:
            seen = f"base {self.base:g}, {self.stages} stages"
            raise ConfigError("pairs come nearer in stages", where="objective.base", seen=seen, fix="base=2, stages=8")

    def lower(self, level: Tensor, progress: float) -> Tensor:
        """r(t), a noise level, of a noise level t (B,)."""
        stage = min(math.floor(progress * self.stages) + 1, self.stages)
        level = level.clamp(max=SIGMA_MAX)
        away = (1 + self.k * torch.sigmoid(-self.b * level)) / self.base**stage
        return (level * (1 - away)).clamp(min=0)

    def __call__(self, lesson: Lesson, x0: Tensor, cond: Cond | None = None, rng: Generator | None = None) -> Loss:
        """x0: (B, ...). Times and noise come from `rng` on the CPU."""
        path = lesson.path
        t = self.times(len(x0), path, rng).double()
        high = levels(path, t)
        low = self.lower(high, lesson.progress)
        s = torch.where(low > 0, path.time(-2 * torch.log(low.clamp(min=1e-12))), torch.zeros_like(t))
        weight = per_span(self.span, high.clamp(max=SIGMA_MAX), low)
        x_t, t, x_s, s = noised_twice(path, x0, t, s, rng)
        target = end_of(lesson.student, x_s, s, t, cond)
        return pulled(lesson.student(x_t, t, cond), target, t, self.metric, self.c, self.distance, weight)


def per_span(span: Span, high: Tensor, low: Tensor) -> Tensor:
    """How much a pair of noise levels counts: (B,). From pure noise nothing does, by "level"."""
    if span == "flat":
        return torch.ones_like(high)
    return 1 / (high - low if span == "level" else torch.atan(high) - torch.atan(low))


def _checked_span(span: str) -> None:
    if span not in ("level", "angle", "flat"):
        raise ConfigError("no such span", where="objective.span", seen=repr(span), fix="level, angle or flat")

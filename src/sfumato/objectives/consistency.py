"""Consistency models: one function that says, from anywhere on a flow, where the flow ends (Song et al. 2023).

It is learned from pairs of neighbouring points of a flow, which end at the same place: what is said at the noisier one
is pulled to what a frozen copy says at the other. The last point is the data, where there is nothing to be said: its
end is itself. A teacher makes the step between the two (distillation), or the same noise in a picture at two levels
stands for one, which is right in the mean for short steps (training). All is said of noise levels sigma / alpha, so any
path will do; and the boundary is held by the target, so any prediction will do, that of x0 too, which has none itself.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Generator, Tensor

from sfumato.denoiser import Cond, Denoiser
from sfumato.devices import same_chance
from sfumato.errors import ConfigError
from sfumato.grids import Grid, karras
from sfumato.objectives.denoising import Loss
from sfumato.objectives.distances import Distance
from sfumato.objectives.draws import beside, noise_like
from sfumato.objectives.teaching import Lesson, check_said
from sfumato.paths import Path, along, noised
from sfumato.samplers.core import SamplerFn as Sampler
from sfumato.samplers.heun import heun
from sfumato.samplers.rows import walked

Metric = Literal["huber", "l2", "l1"]
HUBER = 0.00054  # Song & Dhariwal 2024: c = 0.00054 sqrt(d) for the length of a vector of d elements


@dataclass(frozen=True)
class ConsistencyDistillation:
    """From a teacher: its step between two neighbouring points of a grid, from every row's own to the next.

    grid: its points; where it begins, sampling may begin. points: of it, the data included (40 for ImageNet, 18 for
    CIFAR-10). solver: any sampler without chance, one step of which is the teacher's. keep: how much of the slow copy
    stays after a step; 0 for none, the student itself.
    metric: "huber" is sqrt(e^2 + c^2) - c of the root mean square e of the whole picture, smooth near 0 and straight
    far from it; "l2" its square, "l1" the mean of absolute differences. distance: of pictures, in place of all these.
    """

    grid: Grid = karras
    points: int = 40
    solver: Sampler = heun
    keep: float = 0.95
    metric: Metric = "huber"
    c: float = HUBER
    distance: Distance | None = None

    def __post_init__(self) -> None:
        checked(self.metric, self.c, self.keep)
        if self.points < 2:
            raise ConfigError("a grid has two points", where="objective.points", seen=str(self.points), fix="40")

    def suits(self, student: Denoiser, teacher: Denoiser | None) -> None:
        begins = points_of(self.grid, self.points, student)[0]
        if teacher is not None:
            check_said(teacher, student.path, begins, "objective.grid", "teacher")

    def follow(self, step: int, steps: int) -> float:
        return self.keep

    def __call__(self, lesson: Lesson, x0: Tensor, cond: Cond | None = None, rng: Generator | None = None) -> Loss:
        """x0: (B, ...). Points and noise come from `rng` on the CPU."""
        path, teacher = lesson.path, lesson.taught.bound()
        times = points_of(self.grid, self.points, lesson.student)
        i = torch.randint(self.points - 1, (len(x0),), generator=rng)
        pairs = torch.stack([times[i], times[i + 1]], 1)
        t, s = (beside(x0, one) for one in pairs.unbind(1))
        x_t = noised(path, x0, noise_like(x0, rng), t).to(x0.dtype)
        with torch.no_grad():
            x_s = walked(self.solver, path, x_t, pairs, teacher)
        target = end_of(lesson.slow or lesson.student, x_s, s, t, cond)
        return pulled(lesson.student(x_t, t, cond), target, t, self.metric, self.c, self.distance)


@dataclass(frozen=True)
class ConsistencyTraining:
    """From data alone: the same noise at two neighbouring points of a grid that grows finer while the student learns.

    The number of points rises from `first` to `last` + 1, like the root of the steps made, and the slow copy is kept
    the more, from `keep` on: the published schedules N(k) and mu(k) (appendix C). grid, metric, c, distance: as for
    `ConsistencyDistillation`. first: 2; last: 150 for CIFAR-10 and LSUN, 200 for ImageNet; keep: 0.9 to 0.95.
    """

    grid: Grid = karras
    first: int = 2
    last: int = 150
    keep: float = 0.95
    metric: Metric = "huber"
    c: float = HUBER
    distance: Distance | None = None

    def __post_init__(self) -> None:
        checked(self.metric, self.c, self.keep)
        checked_growth(self.first, self.last, least=2)

    def points(self, progress: float) -> int:
        """N(k) of the grid, the data included, where `progress` is k / K: `first` at 0, `last` + 1 at 1."""
        square = progress * ((self.last + 1) ** 2 - self.first**2) + self.first**2
        return math.ceil(math.sqrt(square) - 1 - 1e-9) + 1

    def suits(self, student: Denoiser, teacher: Denoiser | None) -> None:
        points_of(self.grid, self.points(1.0), student)

    def follow(self, step: int, steps: int) -> float:
        """mu(k): keep^(first / (N(k) - 1)), of which `keep` is left after `first` of N - 1 steps."""
        if self.keep == 0:
            return 0.0
        return math.exp(self.first * math.log(self.keep) / (self.points(step / max(1, steps)) - 1))

    def __call__(self, lesson: Lesson, x0: Tensor, cond: Cond | None = None, rng: Generator | None = None) -> Loss:
        """x0: (B, ...). Points and noise come from `rng` on the CPU."""
        n = self.points(lesson.progress)
        times = points_of(self.grid, n, lesson.student)
        i = torch.randint(n - 1, (len(x0),), generator=rng)
        x_t, t, x_s, s = noised_twice(lesson.path, x0, times[i], times[i + 1], rng)
        target = end_of(lesson.slow or lesson.student, x_s, s, t, cond)
        return pulled(lesson.student(x_t, t, cond), target, t, self.metric, self.c, self.distance)


# What all of them are made of


def checked(metric: str, c: float, keep: float = 0.0) -> None:
    """ConfigError for a metric that there is not, and for shares that are none."""
    if metric not in ("huber", "l2", "l1"):
        raise ConfigError("no such metric", where="objective.metric", seen=repr(metric), fix="huber, l2 or l1")
    if not c >= 0:
        raise ConfigError("c is a distance", where="objective.c", seen=f"{c:g}", fix=f"{HUBER}")
    if not 0 <= keep < 1:
        raise ConfigError(
            "what stays of the slow copy is a share", where="objective.keep", seen=f"{keep:g}", fix="0.95"
        )


def checked_growth(first: int, last: int, least: int) -> None:
    """ConfigError for numbers of points that do not grow."""
    if not least <= first <= last:
        seen = f"{first} to {last}"
        raise ConfigError("a grid grows finer", where="objective.first", seen=seen, fix=f"{least} and more, to last")


def points_of(grid: Grid, n: int, student: Denoiser) -> Tensor:
    """The n points of a grid, float64: falling, to the data. ConfigError where the student has no word of the first."""
    times = grid(student.path, n - 1).to(torch.float64)
    check_said(student, student.path, times[0], "objective.grid")
    return times


def levels(path: Path, t: Tensor) -> Tensor:
    """The noise levels sigma / alpha at times: infinite where there is only noise."""
    return path.sigma(t) / path.alpha(t)


def noised_twice(
    path: Path, x0: Tensor, t: Tensor, s: Tensor, rng: Generator | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Data with the same noise at times t and s (B,): x_t, t, x_s, s. Times as the network wants them."""
    t, s = (beside(x0, one) for one in (t, s))
    eps = noise_like(x0, rng)
    return noised(path, x0, eps, t).to(x0.dtype), t, noised(path, x0, eps, s).to(x0.dtype), s


@torch.no_grad()
def end_of(denoiser: Denoiser, x_s: Tensor, s: Tensor, t: Tensor, cond: Cond | None) -> Tensor:
    """Where the flow through x_s (B, ...) at times s (B,) ends: at s = 0 there, else where a denoiser says.

    A network has not learned to be asked at the data: there it is asked at t, and its answer is not used.
    """
    over = s <= 0
    with same_chance(x_s.device):
        said: Tensor = denoiser(x_s, torch.where(over, t, s), cond)
    return torch.where(along(over, x_s), x_s / along(denoiser.path.alpha(s), x_s), said)


def apart(said: Tensor, target: Tensor, metric: Metric, c: float, distance: Distance | None = None) -> Tensor:
    """How far apart two ends are: (B,). At most c of a "huber" is taken from the root mean square of the difference."""
    if distance is not None:
        return distance(said, target)
    if metric == "l1":
        return (said - target).abs().flatten(1).mean(1)
    square = (said - target).square().flatten(1).mean(1)
    if metric == "l2":
        return square
    c = max(c, 1e-8)  # a root has no derivative at 0
    return torch.sqrt(square + c**2) - c


def pulled(
    said: Tensor,
    target: Tensor,
    t: Tensor,
    metric: Metric,
    c: float,
    distance: Distance | None = None,
    weight: Tensor | None = None,
) -> Loss:
    """The loss of what was said at times t against targets, whose rows count by `weight` (B,)."""
    each = apart(said, target, metric, c, distance)
    square = (said.detach() - target).square().flatten(1).mean(1)
    return Loss((each if weight is None else weight.to(each) * each).mean(), square, t)

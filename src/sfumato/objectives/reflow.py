"""Reflow: a flow made straight by learning again from its own ends.

Liu et al. 2022: a teacher's flow takes noise z1 to z0. Regress the velocity z1 - z0 on the lines between just these
pairs, and the new flow has the same ends, crosses less, and is straighter; of pairs whose lines do not cross, one step
is the flow. Lee et al. 2024 find once to be enough with times in a U, a loss that forgives outliers, and a distance of
pictures. Lines are those of the linear path, z = (1 - s) z0 + s z1. Every path walks them, at a speed of its own and
rescaled by alpha + sigma, so the student keeps the path and prediction of its teacher, and only errors are converted.
"""

from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from sfumato.denoiser import Cond, Denoiser
from sfumato.errors import ConfigError
from sfumato.objectives.denoising import Inside, Loss
from sfumato.objectives.distances import Distance
from sfumato.objectives.draws import beside
from sfumato.objectives.teaching import Lesson, check_said
from sfumato.paths import Linear, Path, log_snr, noised
from sfumato.predictions import VELOCITY
from sfumato.times import Density, UShaped


@dataclass(frozen=True)
class Reflow:
    """The error of the velocity of a straight line, for pairs of data and noise.

    times: where on the line to look, in its own time, whatever the path. huber: the square error becomes a pseudo-Huber
    one of the whole picture, (sqrt(|e|^2 + c^2) - c) / d with c = huber * d, d its elements (Lee et al. 2024, whose
    huber is 0.00054); None is the plain mean square. falling: times 1 - s (there too). distance: of the pictures that
    the answer means from those of the pair, times distance_weight. steps: for a student of so many steps of Euler's
    method, which looks only where it will be asked, s = 1 / steps ... 1, each alike (Liu et al. 2022, section 2.3).
    """

    times: Density = UShaped()
    huber: float | None = 0.00054
    falling: bool = True
    distance: Distance | None = None
    distance_weight: float = 1.0
    steps: int | None = None

    def __post_init__(self) -> None:
        if self.huber is not None and not self.huber > 0:
            seen = f"{self.huber:g}"
            raise ConfigError("Huber's constant is above 0", where="objective.huber", seen=seen, fix="huber=0.00054")
        if self.steps is not None and self.steps < 1:
            raise ConfigError("a student takes a step", where="objective.steps", seen=str(self.steps), fix="steps=1")

    def suits(self, student: Denoiser, teacher: Denoiser | None) -> None:
        if self.steps is not None:  # at the first of its times there is only noise
            check_said(student, Linear(), 1.0, "objective")

    def __call__(self, lesson: Lesson, x0: Tensor, cond: Cond | None = None, rng: Generator | None = None) -> Loss:
        """x0: (B, ...), where the flow from `lesson.noise` ends. Times come from `rng` on the CPU."""
        student, noise = lesson.student, lesson.paired
        path, own = student.path, student.prediction
        s = beside(x0, self._when(len(x0), rng))
        t = time_on(path, s)
        x_t = noised(path, x0, noise, t).to(x0.dtype)
        said = student.predict(x_t, t, cond)
        square = (said - own.target(path, x0, noise, t)).square().flatten(1).sum(1)
        square = square * (VELOCITY.gain(Linear(), s) / own.gain(Inside(path), t)) ** 2  # of the line's velocity
        elements = x0[0].numel()
        cost = square / elements if self.huber is None else _pseudo_huber(square, self.huber * elements) / elements
        parts = {"velocity": cost.mean().detach()}
        if self.falling and self.steps is None:
            cost = (1 - s) * cost
        value = cost.mean()
        if self.distance is not None:
            apart = self.distance(own.x0(path, said, x_t, t), x0.to(said)).mean()
            parts["distance"] = apart.detach()
            value = value + self.distance_weight * apart
        return Loss(value, square.detach() / elements, t, parts)

    def _when(self, n: int, rng: Generator | None) -> Tensor:
        if self.steps is None:
            return self.times(n, Linear(), rng)
        return torch.randint(1, self.steps + 1, (n,), generator=rng) / self.steps


def time_on(path: Path, s: Tensor) -> Tensor:
    """The times (B,) of a path at which its noise level is the linear path's at s: at most 1, where it ends before."""
    if isinstance(path, Linear):
        return s
    t = path.time(log_snr(Linear(), s.clamp(max=1 - 1e-6)))
    return torch.where(s >= 1, torch.ones_like(s), t.clamp(max=1).to(s))


def _pseudo_huber(square: Tensor, c: float) -> Tensor:
    """sqrt(square + c^2) - c, without losing a small square beside a large c."""
    return square / (torch.sqrt(square + c**2) + c)

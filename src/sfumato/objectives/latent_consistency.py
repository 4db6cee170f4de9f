"""Latent consistency models: where the guided flow of a teacher ends, in one call from anywhere on it.

Luo et al. 2023a. A grid of n points cuts the flow into intervals. From a noised picture at one point the teacher, under
guidance, makes one DDIM step to a further point; there a slow copy of the student says where the flow ends, and the
student learns to say the same from where the step began. The last interval ends at the data, where there is nothing to
be said: its target is where the step ended. Latents have no part in it: any path and any data will do. As a low-rank
change of the teacher it is LCM-LoRA (Luo et al. 2023b), which has no slow copy and one fixed guidance.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Generator, Tensor

from sfumato.denoiser import Cond, Denoiser
from sfumato.devices import moved, same_chance
from sfumato.errors import ConfigError
from sfumato.grids import Grid, trailing
from sfumato.objectives.denoising import Loss
from sfumato.objectives.draws import beside, noise_like
from sfumato.objectives.teaching import Lesson, check_said, checked_scales, drawn_scales
from sfumato.paths import along, noised
from sfumato.samplers.consistency import boundary_shares
from sfumato.samplers.ddim import ddim
from sfumato.samplers.rows import walked


@dataclass(frozen=True)
class LatentConsistency:
    """How far apart the ends are that are said from both ends of a step.

    points: of the grid; published ones have 50, every 20th index. skip: the intervals of a step: 20 with 1000 points is
    the paper's form. scales: the range that scales of classifier-free guidance are drawn from, evenly, and that the
    student is told; None for the teacher's own guidance, of any kind, which the student then has within.
    boundary: 10 for the published c_skip and c_out, see `sfumato.samplers.consistency.lcm`; 0 for none.
    keep: how much of the slow copy stays after a step; 0 for none, the student itself. loss: "huber" is
    sqrt(e^2 + c^2) - c of each element, "l2" its square.
    """

    grid: Grid = trailing
    points: int = 50
    skip: int = 1
    scales: tuple[float, float] | None = None
    boundary: float = 0.0
    keep: float = 0.95
    loss: Literal["huber", "l2"] = "huber"
    c: float = 0.001

    def __post_init__(self) -> None:
        checked_scales(self.scales)
        if not 1 <= self.skip <= self.points:
            seen = f"{self.skip} of {self.points}"
            raise ConfigError("a step spans one interval or more", where="objective.skip", seen=seen, fix="1")
        if not 0 <= self.keep < 1:
            raise ConfigError(
                "what stays of the slow copy is a share", where="objective.keep", seen=f"{self.keep:g}", fix="0.95"
            )
        if self.loss not in ("huber", "l2"):
            raise ConfigError("no such loss", where="objective.loss", seen=repr(self.loss), fix="huber or l2")

    @property
    def told(self) -> tuple[str, ...]:
        return () if self.scales is None else ("guidance",)

    def suits(self, student: Denoiser, teacher: Denoiser | None) -> None:
        begins = self._times(student)[0]
        if teacher is not None:
            check_said(teacher, student.path, begins, "objective.grid", "teacher")
        if self.boundary:
            boundary_shares(student.path, begins, self.boundary)

    def follow(self, step: int, steps: int) -> float:
        return self.keep

    def __call__(self, lesson: Lesson, x0: Tensor, cond: Cond | None = None, rng: Generator | None = None) -> Loss:
        """x0: (B, ...). Points, noise and scales come from `rng` on the CPU."""
        student, teacher = lesson.student, lesson.taught
        times = self._times(student)
        start = torch.randint(self.points, (len(x0),), generator=rng)
        ends = (start + self.skip).clamp(max=self.points)
        pairs = torch.stack([times[start], times[ends]], 1)
        t, s = (beside(x0, one) for one in pairs.unbind(1))
        eps = noise_like(x0, rng)
        scale, told = drawn_scales(self.scales, cond, t, rng)
        x_t = noised(student.path, x0, eps, t).to(x0.dtype)
        with torch.no_grad():
            x_s = walked(ddim, student.path, x_t, pairs, lambda x, now: teacher(x, now, scale))
            over = moved(ends == self.points, x0.device)  # nothing is asked at the end of the grid
            with same_chance(x0.device):
                said = self.end(lesson.slow or student, x_s, torch.where(over, t, s), told)
            target = torch.where(along(over, x_s), x_s, said)
        error = self.end(student, x_t, t, told) - target
        square = error.square()
        each = square if self.loss == "l2" else torch.sqrt(square + self.c**2) - self.c
        return Loss(each.mean(), square.detach().flatten(1).mean(1), t)

    def _times(self, student: Denoiser) -> Tensor:
        times = self.grid(student.path, self.points).to(torch.float64)
        check_said(student, student.path, times[0], "objective.grid")
        return times

    def end(self, denoiser: Denoiser, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """Where a student says that the flow through x_t (B, ...) at times (B,) ends."""
        x0: Tensor = denoiser(x_t, t, cond)
        if not self.boundary:
            return x0
        skip, out = boundary_shares(denoiser.path, t, self.boundary)
        return along(skip, x_t) * x_t + along(out, x_t) * x0

"""Progressive distillation: two DDIM steps of a teacher in one of a student, who teaches the next (Salimans & Ho 2022).

A round is a student of so many steps. It learns, at the times of its own grid, the x0 for which one step lands where
two steps of its teacher do; then its copy becomes the teacher, and the steps are half as many. The first teacher is
the one that is given, under guidance (Meng et al. 2023, stage two), so all students have it within. The last student
answers with x0 like any model, but at the times of its grid only, and for DDIM's steps.
"""

from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from sfumato.denoiser import Cond, Denoiser
from sfumato.errors import ConfigError
from sfumato.grids import Grid, linear
from sfumato.objectives.denoising import Denoising, Loss
from sfumato.objectives.draws import beside, noise_like
from sfumato.objectives.teaching import Lesson, check_said, checked_scales, drawn_scales
from sfumato.objectives.weights import TruncatedSNR, Weight
from sfumato.paths import Path, along, noised
from sfumato.predictions import Prediction
from sfumato.samplers.ddim import ddim
from sfumato.samplers.rows import walked


@dataclass(frozen=True)
class Progressive:
    """The weighted square error of the student's answer against the x0 of two steps.

    first, last: the steps of the first and the last student, each half of the one before; rounds are equally long, so
    `optim.cycles`, their number, gives each a learning rate that falls anew. grid: whose half is itself, with half as
    many steps: linear, trailing, logistic. scales: as of `LatentConsistency`. weight, space: as of `Denoising`; the
    paper's are max(SNR, 1), "truncated_snr", and SNR + 1, "snr_plus_one".
    """

    first: int = 32
    last: int = 4
    grid: Grid = linear
    scales: tuple[float, float] | None = None
    weight: Weight = TruncatedSNR()
    space: Prediction | None = None

    def __post_init__(self) -> None:
        checked_scales(self.scales)
        if self.last < 1 or self.first not in [self.last * 2**k for k in range(30)]:
            seen = f"{self.first} to {self.last}"
            what = "steps are halved from round to round"
            raise ConfigError(what, where="objective.first", seen=seen, fix="objective.first=32 objective.last=4")

    @property
    def told(self) -> tuple[str, ...]:
        return () if self.scales is None else ("guidance",)

    @property
    def rounds(self) -> int:
        """How many students there are."""
        return (self.first // self.last).bit_length()

    def round(self, step: int | None, steps: int) -> int:
        """Which round a step (from 0) of so many is in; the last, where nothing is said."""
        return self.rounds - 1 if step is None else min(self.rounds - 1, step * self.rounds // max(1, steps))

    def suits(self, student: Denoiser, teacher: Denoiser | None) -> None:
        for number in range(self.rounds):
            begins = self.times(student.path, self.first >> number)[0]
            check_said(student, student.path, begins, "objective.grid")
            if teacher is not None:
                check_said(teacher, student.path, begins, "objective.grid", "teacher")

    def phase(self, step: int, steps: int) -> int:
        """The round: each has a target of its own."""
        return self.round(step, steps)

    def follow(self, step: int, steps: int) -> float:
        """0 at the end of a round, which copies the student, and 1 else."""
        return float(self.round(step, steps) == self.round(step + 1, steps))

    def times(self, path: Path, steps: int) -> Tensor:
        """The grid of so many steps and the times between, (2 steps + 1,). ConfigError for grids that do not nest."""
        fine, coarse = self.grid(path, 2 * steps).to(torch.float64), self.grid(path, steps).to(torch.float64)
        if not torch.allclose(fine[::2], coarse, rtol=0, atol=1e-6):
            name = getattr(self.grid, "func", self.grid).__name__
            what, fix = "half of this grid's times are not those of half as many steps", "objective.grid=linear"
            raise ConfigError(what, where="objective.grid", seen=f"{name}, {2 * steps} steps", fix=fix)
        return fine

    def __call__(self, lesson: Lesson, x0: Tensor, cond: Cond | None = None, rng: Generator | None = None) -> Loss:
        """x0: (B, ...). Times, noise and scales come from `rng` on the CPU."""
        student, number = lesson.student, self.round(lesson.step, lesson.steps)
        steps = self.first >> number
        times = self.times(student.path, steps)
        check_said(student, student.path, times[0], "objective.grid")
        start = 2 * torch.randint(steps, (len(x0),), generator=rng)
        grids = torch.stack([times[start], times[start + 1], times[start + 2]], 1)
        t, s = beside(x0, grids[:, 0]), beside(x0, grids[:, 2])
        eps = noise_like(x0, rng)
        scale, told = drawn_scales(self.scales, cond, t, rng)
        x_t = noised(student.path, x0, eps, t).to(x0.dtype)

        def teacher(x: Tensor, now: Tensor) -> Tensor:
            if number == 0:
                return lesson.taught(x, now, scale)
            assert lesson.slow is not None  # it is the student of the round before
            answer: Tensor = lesson.slow(x, now, told)
            return answer

        with torch.no_grad():
            two = walked(ddim, student.path, x_t, grids, teacher)
            wanted = lands(student.path, x_t, t, two, s)
        target = student.prediction.answer(student.path, wanted, x_t, t)
        said = student.predict(x_t, t, told)
        each = (said - target).square().flatten(1).mean(1)
        factor = Denoising(weight=self.weight, space=self.space).factor(student, t)
        return Loss((factor * each).mean(), each.detach(), t)


def lands(path: Path, x_t: Tensor, t: Tensor, x_s: Tensor, s: Tensor) -> Tensor:
    """The x0 (B, ...) for which DDIM's step from x_t at times (B,) to times s lands on x_s (Salimans & Ho, eq. 9)."""
    t, s = along(t, x_t), along(s, x_t)
    ratio = path.sigma(s) / path.sigma(t)
    return (x_s - ratio * x_t) / (path.alpha(s) - ratio * path.alpha(t))

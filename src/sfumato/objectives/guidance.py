"""Guidance distillation: what a guided teacher answers with two calls, a student answers with one.

Meng et al. 2023, stage one: at every time the student's answer is pulled to the teacher's guided one, under a scale
that it is told, drawn anew for each sample; or under the teacher's own guidance, of any kind, which it then has within.
Guided answers are a denoiser like any other, so the student has the teacher's path, prediction and samplers.
"""

from dataclasses import dataclass

from torch import Generator, Tensor

from sfumato.denoiser import Cond
from sfumato.objectives.denoising import Denoising, Loss
from sfumato.objectives.draws import noise_like, times_for
from sfumato.objectives.teaching import Lesson, checked_scales, drawn_scales
from sfumato.objectives.weights import Flat, Weight
from sfumato.paths import noised
from sfumato.predictions import Prediction
from sfumato.times import Density, Uniform


@dataclass(frozen=True)
class GuidanceDistillation:
    """The weighted square error of the student's answer against the teacher's guided one.

    scales: the range that scales are drawn from, evenly, and that the student is told; None for the guidance that the
    teacher is configured with. times, weight, space: as of `Denoising`.
    """

    scales: tuple[float, float] | None = None
    times: Density = Uniform()
    weight: Weight = Flat()
    space: Prediction | None = None

    def __post_init__(self) -> None:
        checked_scales(self.scales)

    @property
    def told(self) -> tuple[str, ...]:
        return () if self.scales is None else ("guidance",)

    def __call__(self, lesson: Lesson, x0: Tensor, cond: Cond | None = None, rng: Generator | None = None) -> Loss:
        """x0: (B, ...). Times, noise and scales come from `rng` on the CPU."""
        student, teacher = lesson.student, lesson.taught
        t = times_for(x0, self.times, student.path, rng)
        eps = noise_like(x0, rng)
        scale, told = drawn_scales(self.scales, cond, t, rng)
        x_t = noised(student.path, x0, eps, t).to(x0.dtype)
        guided = teacher(x_t, t, scale)
        said = student.predict(x_t, t, told)
        target = student.prediction.answer(student.path, guided, x_t, t)
        each = (said - target).square().flatten(1).mean(1)
        factor = Denoising(self.times, self.weight, self.space).factor(student, t)
        return Loss((factor * each).mean(), each.detach(), t)

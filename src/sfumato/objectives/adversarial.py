"""Adversarial diffusion distillation (Sauer et al. 2023, "ADD"; Sauer et al. 2024, "LADD", fast synthesis in latents).

A student answers a noised picture in one jump. Its answer is noised again, and so is the picture; the frozen teacher
reads both, and small heads on its features learn by the hinge loss to tell them apart, at every noise level, so what
they object to is structure where there is much noise and texture where there is little. The student learns to pass, and
is held to its prompt by the teacher's guided answer to its own picture noised, which counts alpha(t).
"""

from dataclasses import dataclass, replace
from typing import cast

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from sfumato.denoiser import Cond, Denoiser
from sfumato.devices import moved
from sfumato.objectives.critics import (
    Heads,
    Listening,
    check_counts,
    check_not_negative,
    check_times,
    detached,
    drawn_which,
    ended,
    unmoved,
    valued,
    wide,
)
from sfumato.objectives.denoising import Loss
from sfumato.objectives.draws import beside, noise_like, times_for
from sfumato.objectives.endpoints import regression, teacher_of
from sfumato.objectives.teaching import Lesson, check_said
from sfumato.paths import noised
from sfumato.times import Density, LogitNormal, Uniform


@dataclass(frozen=True)
class Adversarial:
    """How a student of a few steps learns from heads on its teacher.

    heads: the discriminator. at: the times of its steps, falling; the sampler's grid is these and 0. times: where the
    teacher reads pictures for the heads, on its own path. distillation: how much the teacher's answers count, whose
    times are `scored`; adversarial: how much the heads do. r1: of the penalty on the slope of the heads in the features
    of real pictures, which keeps them smooth; it is half the square of its norm.
    """

    heads: Heads
    at: tuple[float, ...] = (1.0, 0.75, 0.5, 0.25)
    times: Density = LogitNormal(1.0, 1.0)
    distillation: float = 2.5
    scored: Density = Uniform(0.02, 0.98)
    adversarial: float = 1.0
    r1: float = 1e-5
    warmup: int = 0
    flow: int = 2

    def __post_init__(self) -> None:
        check_times(self.at)
        check_not_negative(self, "distillation", "adversarial", "r1", "warmup")
        check_counts(self, "flow")

    def suits(self, student: Denoiser, teacher: Denoiser | None) -> None:
        check_said(student, student.path, self.at[0], "objective.at")
        if teacher is not None and self.warmup:
            check_said(teacher, student.path, self.at[0], "objective.at", "teacher")
        if teacher is not None:
            self.heads(teacher.net)

    def critic(self, denoiser: Denoiser) -> nn.Module:
        return cast(nn.Module, self.heads(denoiser.net))

    def phase(self, step: int, steps: int) -> int:
        """0 in the warm-up, 1 from then on."""
        return int(step >= self.warmup)

    def __call__(self, lesson: Lesson, x0: Tensor, cond: Cond | None = None, rng: Generator | None = None) -> Loss:
        """x0: (B, ...). All draws come from `rng` on the CPU.

        The value's number is the distance to the teacher's answers, weighted, or to the pictures that were noised where
        `distillation` is 0; its gradient is that of everything. In the warm-up it is the square error.
        """
        if lesson.step is not None and lesson.step < self.warmup:
            return self._begun(lesson, x0, cond, rng)
        t, drawn = self.answers(lesson.student, x0, cond, rng)
        apart = (drawn - x0).square().flatten(1).mean(1)
        if self.distillation:
            t, apart = self._distilled(lesson, drawn, rng)
        said, each = apart.mean(), apart.detach()
        if lesson.step is None:
            return Loss(said, each, t)
        parts = {"distillation": said} if self.distillation else {}
        contest = self._contest(lesson, drawn, x0, rng, parts)
        return Loss(valued(said, self.distillation * said + contest), each, t, detached(parts))

    def _begun(self, lesson: Lesson, x0: Tensor, cond: Cond | None, rng: Generator | None) -> Loss:
        """A step of the warm-up, in which the heads learn already what the student answers."""
        shown, drawn, rows = regression(lesson, x0, cond, rng, self.at, self.flow)
        parts = dict(shown.parts)
        few = replace(lesson, teacher=teacher_of(lesson.taught, rows))
        contest = self._contest(few, drawn.detach(), x0[moved(rows, x0.device)], rng, parts)
        return shown._replace(value=valued(shown.value, shown.value + contest), parts=detached(parts))

    def answers(self, student: Denoiser, x0: Tensor, cond: Cond | None, rng: Generator | None) -> tuple[Tensor, Tensor]:
        """Times (B,), as evenly drawn as the batch allows, and the student's answers there to pictures noised."""
        check_said(student, student.path, self.at[0], "objective.at")
        t = beside(x0, torch.tensor(self.at, dtype=torch.float64)[drawn_which(len(x0), len(self.at), rng)])
        eps = noise_like(x0, rng)
        return t, ended(student, noised(student.path, x0, eps, t).to(x0.dtype), t, cond)

    def _distilled(self, lesson: Lesson, drawn: Tensor, rng: Generator | None) -> tuple[Tensor, Tensor]:
        """Times and alpha(t) |drawn - the teacher's answer to it, noised|^2, means over each sample: (B,) and (B,)."""
        path, still = lesson.path, drawn.detach()
        t = times_for(drawn, self.scored, path, rng)
        eps = noise_like(drawn, rng)
        taught = lesson.taught(noised(path, still, eps, t).to(drawn.dtype), t)
        return t, path.alpha(t) * (drawn - taught).square().flatten(1).mean(1)

    def _contest(
        self, lesson: Lesson, drawn: Tensor, x0: Tensor, rng: Generator | None, parts: dict[str, Tensor]
    ) -> Tensor:
        """What the heads add for the student, and their own loss, both to be minimised at once."""
        assert isinstance(lesson.critic, nn.Module)
        heads, pooled = cast(Listening, lesson.critic), lesson.taught.cond.get("pooled")
        t, heard = self._read(lesson, drawn, rng)
        parts["adversarial"] = -unmoved(lesson.critic, heard, t, pooled).mean()
        of_drawn = heads({name: one.detach() for name, one in heard.items()}, t, pooled)
        with torch.no_grad():
            t, heard = self._read(lesson, x0, rng)
        features = {name: one.detach().requires_grad_(self.r1 > 0) for name, one in heard.items()}
        of_real = heads(features, t, pooled)
        parts["discriminator"] = F.relu(1 + of_drawn).mean() + F.relu(1 - of_real).mean()
        contest = self.adversarial * parts["adversarial"] + parts["discriminator"]
        if self.r1:
            slopes = torch.autograd.grad(of_real.mean(1).sum(), list(features.values()), create_graph=True)
            parts["slope"] = torch.stack([wide(one).square().sum() for one in slopes]).sum() / len(x0)
            contest = contest + self.r1 / 2 * parts["slope"]
        return contest

    def _read(self, lesson: Lesson, pictures: Tensor, rng: Generator | None) -> tuple[Tensor, dict[str, Tensor]]:
        """Times (B,), and what the teacher says inside of pictures noised, under its conditions and no guidance."""
        teacher, heads = lesson.taught, cast(Listening, lesson.critic)
        path = teacher.denoiser.path
        t = times_for(pictures, self.times, path, rng)
        eps = noise_like(pictures, rng)
        with heads.listening(teacher.denoiser.net) as heard:
            teacher.denoiser(noised(path, pictures, eps, t).to(pictures.dtype), t, teacher.cond)
        return t, heard

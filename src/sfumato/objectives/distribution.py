"""Distribution matching distillation (Yin et al. 2024, "DMD", and 2024, "DMD2").

A student of a few steps draws a picture; the teacher and a second model, the fake score, which learns by denoising what
the student draws, are both asked at a random noise level, and where they differ lies the gradient of the divergence
between the student's distribution and the teacher's guided one. The fake score moves at every step, the student at
every n-th, so that it follows a critic that knows it. Before each jump the student walks as it will when it is used
(backward simulation), and heads on the fake score's features may tell its pictures from real ones besides.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from sfumato.denoiser import Cond, Denoiser, translated
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
    rows_of,
    unmoved,
    valued,
)
from sfumato.objectives.denoising import Denoising, Loss
from sfumato.objectives.draws import beside, noise_like, times_for
from sfumato.objectives.endpoints import begun_with, regression, teacher_of
from sfumato.objectives.teaching import Lesson, Teacher, check_said
from sfumato.objectives.weights import Flat, Weight
from sfumato.paths import Path, along, noised
from sfumato.predictions import Prediction
from sfumato.times import Density, Uniform


class FakeScore(nn.Module):
    """The critic: a copy of the teacher's denoiser that learns the student's distribution, perhaps with heads on it."""

    def __init__(self, denoiser: Denoiser, heads: Heads | None) -> None:
        super().__init__()
        self.denoiser = copy.deepcopy(denoiser).requires_grad_(False)
        self.denoiser.net.requires_grad_(True)
        self.heads: Listening | None = None if heads is None else heads(self.denoiser.net)

    @contextmanager
    def listening(self) -> Iterator[dict[str, Tensor]]:
        """What the denoiser says inside; nothing without heads."""
        if self.heads is None:
            yield {}
            return
        with self.heads.listening(self.denoiser.net) as heard:
            yield heard

    def logits(self, heard: dict[str, Tensor], t: Tensor, cond: Cond) -> Tensor:
        """(B, N), high where pictures look real. t: of the denoiser's own path."""
        assert self.heads is not None
        return self.heads(heard, t, cond.get("pooled"))

    def forward(self, path: Path, x_t: Tensor, t: Tensor, cond: Cond) -> tuple[Tensor, Tensor | None]:
        """x0-hat (B, ...) at a state of another path, and the logits if it has heads."""
        if path != self.denoiser.path:
            x_t, t = translated(path, self.denoiser.path, x_t, t)
        with self.listening() as heard:
            x0: Tensor = self.denoiser(x_t, t, cond)
        return x0, None if self.heads is None else self.logits(heard, t, cond)


@dataclass(frozen=True)
class DistributionMatching:
    """How a student of a few steps is matched to its teacher.

    at: the times of its steps, falling; the sampler's grid is these and 0. every: it moves at every n-th step, the
    fake score at all. simulate: it learns on states that it comes to by its own steps; else on noised data.
    times: where teacher and fake score are compared. fake_times, weight, space: how the fake score learns, as of
    `Denoising`. heads: of a discriminator on the fake score's features, or None; adversarial and contest: how much it
    counts for the student, and for the fake score's network. warmup: steps before all this, in which the student
    learns where the teacher's flow ends, see `endpoints`; flow: the teacher's steps between two of the times.
    """

    at: tuple[float, ...] = (1.0, 0.75, 0.5, 0.25)
    every: int = 5
    simulate: bool = True
    times: Density = Uniform(0.02, 0.98)
    fake_times: Density = Uniform()
    weight: Weight = Flat()
    space: Prediction | None = None
    heads: Heads | None = None
    adversarial: float = 1e-3
    contest: float = 1e-2
    warmup: int = 0
    flow: int = 2

    def __post_init__(self) -> None:
        check_times(self.at)
        check_not_negative(self, "adversarial", "contest", "warmup")
        check_counts(self, "every", "flow")

    def suits(self, student: Denoiser, teacher: Denoiser | None) -> None:
        check_said(student, student.path, self.at[0], "objective.at")
        if teacher is not None and self.warmup:
            check_said(teacher, student.path, self.at[0], "objective.at", "teacher")
        if teacher is not None and self.heads is not None:
            self.heads(teacher.net)

    def critic(self, denoiser: Denoiser) -> FakeScore:
        return FakeScore(denoiser, self.heads)

    def phase(self, step: int, steps: int) -> int:
        """0 in the warm-up, 1 from then on."""
        return int(step >= self.warmup)

    def __call__(self, lesson: Lesson, x0: Tensor, cond: Cond | None = None, rng: Generator | None = None) -> Loss:
        """x0: (B, ...). All draws come from `rng` on the CPU.

        While it learns, the value's number is the fake score's loss; judged, it is the mean square difference of fake
        score and teacher, which is none where the distributions are equal. In the warm-up it is the square error.
        """
        critic, step = lesson.critic, lesson.step
        assert isinstance(critic, FakeScore)
        if step is not None and step < self.warmup:
            return self._begun(lesson, critic, x0, cond, rng)
        moves = step is not None and (step - self.warmup) % self.every == 0
        with torch.set_grad_enabled(moves):
            drawn = self.generated(lesson.student, x0, cond, rng)
        parts: dict[str, Tensor] = {}
        if step is None:
            t, gradient, _, each = self._compared(lesson, critic, drawn, rng)
            return Loss(each.mean(), each, t, {"distance": each.mean(), "gradient": _size(gradient)})
        minimised = self._towards(lesson, critic, drawn, rng, parts) if moves else x0.new_zeros(())
        learned, said = self._learning(lesson.taught, critic, drawn.detach(), x0, rng, parts)
        return Loss(valued(said.value, minimised + learned), said.each, said.t, detached(parts))

    def _begun(self, lesson: Lesson, critic: FakeScore, x0: Tensor, cond: Cond | None, rng: Generator | None) -> Loss:
        """A step of the warm-up, in which the fake score learns already what the student answers."""
        shown, drawn, rows = regression(lesson, x0, cond, rng, self.at, self.flow)
        parts = dict(shown.parts)
        teacher = teacher_of(lesson.taught, rows)
        learned, _ = self._learning(teacher, critic, drawn.detach(), x0[moved(rows, x0.device)], rng, parts)
        return shown._replace(value=valued(shown.value, shown.value + learned), parts=detached(parts))

    def generated(self, student: Denoiser, x0: Tensor, cond: Cond | None, rng: Generator | None) -> Tensor:
        """What the student draws at one of its steps, as evenly drawn as the batch allows: like x0 (B, ...).

        Without gradients it walks from noise to that step, as `samplers.consistency` does, with new noise each time.
        """
        check_said(student, student.path, self.at[0], "objective.at")
        path = student.path
        which = drawn_which(len(x0), len(self.at), rng)
        t = beside(x0, torch.tensor(self.at, dtype=torch.float64)[which])

        if not self.simulate:
            return ended(student, noised(path, x0, noise_like(x0, rng), t).to(x0.dtype), t, cond)
        x = begun_with(path, noise_like(x0, rng), self.at[0])
        for i, (here, there) in enumerate(pairwise(self.at)):
            rows = (which > i).nonzero()[:, 0]
            places, n = moved(rows, x0.device), len(rows)
            if not n:
                break
            with torch.no_grad():
                end = ended(student, x[places], t.new_full((n,), here), rows_of(cond, rows))
            x = x.index_copy(0, places, noised(path, end, noise_like(x0[:n], rng), t.new_full((n,), there)).to(x.dtype))
        return ended(student, x, t, cond)

    def _compared(
        self, lesson: Lesson, critic: FakeScore, drawn: Tensor, rng: Generator | None
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
        """Times (B,), the gradient (B, ...) (DMD2, eq. 2, normalised per sample as in DMD, eq. 8), the logits of what
        was drawn, and the mean square differences (B,) of the two.
        """
        path, teacher = lesson.path, lesson.taught
        t = times_for(drawn, self.times, path, rng)
        eps = noise_like(drawn, rng)
        x_t = noised(path, drawn, eps, t).to(drawn.dtype)
        real = teacher(x_t.detach(), t)
        if critic.heads is None or not drawn.requires_grad:
            with torch.no_grad():
                fake, logits = critic(path, x_t.detach(), t, teacher.cond)
        else:
            fake, logits = unmoved(critic, path, x_t, t, teacher.cond)
        apart = fake.detach() - real
        size = (drawn.detach() - real).abs().flatten(1).mean(1).clamp(min=1e-6)
        return t, apart / along(size, apart), logits, apart.square().flatten(1).mean(1)

    def _towards(
        self, lesson: Lesson, critic: FakeScore, drawn: Tensor, rng: Generator | None, parts: dict[str, Tensor]
    ) -> Tensor:
        """What moves the student."""
        _, gradient, logits, each = self._compared(lesson, critic, drawn, rng)
        parts["distance"], parts["gradient"] = each.mean(), _size(gradient)
        minimised = (gradient * drawn).flatten(1).mean(1).mean()
        if logits is not None:
            parts["adversarial"] = F.softplus(-logits).mean()
            minimised = minimised + self.adversarial * parts["adversarial"]
        return minimised

    def _learning(
        self,
        teacher: Teacher,
        critic: FakeScore,
        drawn: Tensor,
        x0: Tensor,
        rng: Generator | None,
        parts: dict[str, Tensor],
    ) -> tuple[Tensor, Loss]:
        """What moves the fake score and its heads, and its denoising alone."""
        denoiser, cond = critic.denoiser, teacher.cond
        with critic.listening() as heard:
            said = Denoising(self.fake_times, self.weight, self.space)(denoiser, drawn, cond, rng)
        parts["fake"] = said.value
        if critic.heads is None:
            return said.value, said
        assert said.t is not None
        of_drawn = critic.logits(heard, said.t, cond)
        t = self.fake_times(len(x0), denoiser.path, rng).to(said.t)
        eps = noise_like(x0, rng)
        _, of_real = critic(denoiser.path, noised(denoiser.path, x0, eps, t).to(x0.dtype), t, cond)
        parts["discriminator"] = F.softplus(of_drawn).mean() + F.softplus(-of_real).mean()
        return said.value + self.contest * parts["discriminator"], said


def _size(gradient: Tensor) -> Tensor:
    return gradient.square().mean().sqrt()

"""Shortcut models: a long jump is two of half its length, down to steps so short that any denoiser can make them.

Frans et al. 2025. Most of a batch learns E[x0 | x_t], as ever; the rest learns jumps whose length is a power of 1/2,
from two jumps of half the length by a slow copy of the network. The shortest halves are DDIM's steps with E[x0 | x_t],
where guidance has its only place. On any path two straight steps are one, whose x0 is an average of theirs, so no
target is divided by small numbers. The network is told where a jump ends, not the logarithm of its length: it is a
model of "jump" like any other (see `sfumato.denoiser.Denoise`), and a jump of no length is the mean.
"""

from dataclasses import dataclass, replace

import torch
from torch import Generator, Tensor

from sfumato.denoiser import JUMP, Cond, Denoiser
from sfumato.errors import ConfigError
from sfumato.objectives.denoising import Denoising, Loss
from sfumato.objectives.draws import noise_like, times_for
from sfumato.objectives.meanflow import Means, checked_means, some, taught
from sfumato.objectives.teaching import Lesson, Teacher, check_said
from sfumato.objectives.weights import Flat, Weight
from sfumato.paths import Path, along, noised
from sfumato.predictions import Prediction
from sfumato.times import Density, Uniform


@dataclass(frozen=True)
class Shortcut:
    """The weighted square error of means and of jumps of dyadic lengths.

    finest: how many of the shortest steps make up the whole of time, a power of 2; jumps are of 2, 4, ... of them, up
    to all. bootstrap: the share of a batch that learns jumps. decay: of the slow copy, which makes the targets.
    guidance: a scale for targets that are made of the shortest steps, 1 is off. means: as of `MeanFlow`: the teacher,
    where there is one, under its own guidance, for means and for shortest steps. clip: states and targets of jumps are
    clamped to [-clip, clip], as the paper does in latents (4). times: of the means. weight, space: as of `Denoising`.
    """

    finest: int = 128
    bootstrap: float = 0.125
    decay: float = 0.999
    guidance: float = 1.0
    means: Means | None = None
    clip: float | None = None
    times: Density = Uniform()
    weight: Weight = Flat()
    space: Prediction | None = None

    def __post_init__(self) -> None:
        if self.finest < 2 or self.finest & (self.finest - 1):
            what, seen = "the number of shortest steps is a power of 2", str(self.finest)
            raise ConfigError(what, where="objective.finest", seen=seen, fix="objective.finest=128")
        for name, share in (("bootstrap", self.bootstrap), ("decay", self.decay)):
            if not 0 <= share <= 1:
                seen, where = f"{share:g}", f"objective.{name}"
                raise ConfigError(f"{name} lies between 0 and 1", where=where, seen=seen, fix=f"{where}=0.5")

    @property
    def told(self) -> tuple[str, ...]:
        return ("until",)

    def suits(self, student: Denoiser, teacher: Denoiser | None) -> None:
        check_said(student, student.path, 1.0, "objective")
        if checked_means(self.means, teacher) and teacher is not None:
            check_said(teacher, student.path, 1.0, "objective", "teacher")

    def follow(self, step: int, steps: int) -> float:
        return self.decay

    def __call__(self, lesson: Lesson, x0: Tensor, cond: Cond | None = None, rng: Generator | None = None) -> Loss:
        """x0: (B, ...). Times, jumps and noise come from `rng` on the CPU. The first rows learn jumps."""
        student, told = lesson.student, dict(cond or {})
        path, own, count = student.path, student.prediction, round(self.bootstrap * len(x0))
        t = times_for(x0, self.times, path, rng)
        begins, lengths, shortest = self.jumps(count, rng)
        t = torch.cat([begins.to(t), t[count:]])
        until = torch.cat([(begins - lengths).to(t), t[count:]])
        eps = noise_like(x0, rng)
        x_t = noised(path, x0, eps, t).to(x0.dtype)
        with torch.no_grad():
            target = lesson.taught(x_t, t) if taught(lesson, self.means) else x0.to(t.dtype)
            if count:
                jumps = self.halves(lesson, x_t[:count], t[:count], until[:count], shortest, some(told, slice(count)))
                target = torch.cat([jumps, target[count:]])
        said = student.predict(x_t, t, told, until=until)
        error = (said - own.answer(path, target, x_t, t)).square().flatten(1).mean(1)
        factor, each = Denoising(self.times, self.weight, self.space).factor(student, t), error.detach()
        parts = {"jumps": each[:count], "means": each[count:]}
        return Loss((factor * error).mean(), each, t, {name: one.mean() for name, one in parts.items() if len(one)})

    def jumps(self, n: int, rng: Generator | None) -> tuple[Tensor, Tensor, int]:
        """Where n jumps begin, and their lengths: powers of 1/2, at multiples of themselves, float64; the shortest ones
        come first, so many.
        """
        level = torch.randint(0, self.finest.bit_length() - 1, (n,), generator=rng).sort(descending=True).values
        lengths = 0.5 ** level.double()
        begins = (torch.rand(n, generator=rng, dtype=torch.float64) / lengths).floor().add(1) * lengths
        return begins, lengths, int((lengths * self.finest == 2).sum())

    def halves(self, lesson: Lesson, x_t: Tensor, t: Tensor, until: Tensor, shortest: int, cond: Cond) -> Tensor:
        """The x0 of jumps that are made of two of half the length: (B, ...). The first `shortest` are the shortest."""
        middle = (t + until) / 2
        first = self._answer(lesson, x_t, t, middle, shortest, cond)
        x = self._clipped(straight(lesson.path, x_t, first, t, middle)).to(x_t.dtype)
        second = self._answer(lesson, x, middle, until, shortest, cond)
        return self._clipped(averaged(lesson.path, first, second, t, middle, until))

    def _answer(self, lesson: Lesson, x: Tensor, t: Tensor, until: Tensor, shortest: int, cond: Cond) -> Tensor:
        """The slow copy's jumps. In the shortest steps there stand means, guided, or the teacher's."""
        slow, rows = lesson.slow or lesson.student, slice(shortest)
        until = torch.cat([t[rows], until[shortest:]])
        jump: Tensor = slow(x, t, cond, to=JUMP, until=until)
        if taught(lesson, self.means) and shortest:
            return torch.cat([rows_of(lesson.taught, rows)(x[rows], t[rows]), jump[shortest:]])
        if self.guidance != 1 and cond and shortest:
            silent: Tensor = slow(x[rows], t[rows], some(lesson.null(), rows), to="x0")
            return torch.cat([silent + self.guidance * (jump[rows] - silent), jump[shortest:]])
        return jump

    def _clipped(self, x: Tensor) -> Tensor:
        return x if self.clip is None else x.clamp(-self.clip, self.clip)


def straight(path: Path, x_t: Tensor, x0: Tensor, t: Tensor, until: Tensor) -> Tensor:
    """DDIM's step from times (B,) to others."""
    q = path.sigma(until) / path.sigma(t)
    return along(q, x_t) * x_t + along(path.alpha(until) - q * path.alpha(t), x_t) * x0


def averaged(path: Path, first: Tensor, second: Tensor, t: Tensor, middle: Tensor, end: Tensor) -> Tensor:
    """The x0 of one straight step that goes as far as two, from t to the middle and from there to the end."""
    (a, s), (b, r), (c, q) = ((path.alpha(one), path.sigma(one)) for one in (t, middle, end))
    share = along(q * (b * s - r * a) / (r * (c * s - q * a)), first)
    return share * first + (1 - share) * second


def rows_of(teacher: Teacher, rows: slice) -> Teacher:
    """A teacher of some samples of the batch."""
    return replace(teacher, cond=some(teacher.cond, rows), null=lambda: some(teacher.null(), rows))

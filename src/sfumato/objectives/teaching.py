"""What objectives for students share: a teacher that answers under its guidance, and a lesson, which is a step.

Distillation turns a model into one that needs fewer calls. The teacher stands still and is asked as a sampler would ask
it; a slow copy of the student may stand for its past; a critic may learn beside it and be thrown away. All of them are
denoisers or are made from one, so a method knows nothing of networks, conditions or devices: it is given a `Lesson`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Protocol, runtime_checkable

import torch
from torch import Generator, Tensor, nn

from sfumato.denoiser import Bound, Cond, Denoiser, joined, times_like, translated
from sfumato.errors import ConfigError
from sfumato.guidance import CFG, Guidance, Unguided, Variants, all_within, combined, given, started, varied
from sfumato.guidance.core import ALWAYS, Interval
from sfumato.paths import Path, log_snr

Scale = float | Tensor  # of classifier-free guidance: one for all, or one a sample (B,)
PROBES = 32  # times at which a guidance is tried
Scales = tuple[float, float] | None  # the range that scales are drawn from, where the student is told them


@dataclass(frozen=True)
class Teacher:
    """A frozen model with the conditions of a batch filled in.

    denoiser: any model that answers "x0". cond: of each sample; null: makes the absence of it, once. guidance: how it
    is guided unless it is asked otherwise, its conditions not filled in; any but CFG++, which must know the grid.
    spoken: the path on which it is asked, where that is not its own. variants: what answers for a weaker variant of
    the network, or for another model, which some guidance steers away from; see `sfumato.guidance.guided`.
    """

    denoiser: Denoiser
    cond: Cond
    null: Callable[[], Cond]
    guidance: Guidance
    spoken: Path | None = None
    variants: Variants | None = None

    @property
    def path(self) -> Path:
        """The path on which it is asked: its student's."""
        return self.spoken or self.denoiser.path

    @torch.no_grad()
    def __call__(self, x_t: Tensor, t: float | Tensor, guidance: Scale | None = None) -> Tensor:
        """x0-hat (B, ...) at x_t and times (B,). guidance: a scale of classifier-free guidance in place of its own.

        ConfigError for a guidance that cannot answer rows of different times, or needs a variant that is not there.
        """
        t = times_like(t, x_t)
        if self.spoken is not None and self.spoken != self.denoiser.path:  # x0-hat is of no path
            x_t, t = translated(self.spoken, self.denoiser.path, x_t, t)
        if guidance is not None:
            return self._by_scale(x_t, t, guidance)
        if isinstance(self.guidance, Unguided) or not self.cond:
            return self._by_scale(x_t, t, 1.0)
        guide = self.guidance
        if isinstance(guide, CFG) and guide == CFG(scale=guide.scale, interval=guide.interval):
            return self._by_scale(x_t, t, guide.scale, guide.interval)  # of which time only says where it is on
        return self._by_rows(x_t, t)

    def check(self) -> None:
        """ConfigError for a guidance by which no teacher can answer, samples and times as they come, or for a variant
        of the network that cannot be.
        """
        guide = started(given(self.guidance, self.cond, self.null))
        x = torch.zeros(1, 1, 2, 2)
        for time in torch.linspace(1, 0, PROBES + 1)[:-1].tolist():
            asked = guide.branches(self.denoiser.path, time)
            for name in {branch.variant for branch in asked}:
                varied(self.denoiser, self.variants, name)
            combined(guide, self.denoiser.path, x, time, [x] * len(asked))

    def bound(self, guidance: Scale | None = None) -> Bound:
        """What samplers ask: x0-hat under one guidance."""
        return Bound(self.path, lambda x, t: self(x, t, guidance))

    def _by_scale(self, x_t: Tensor, t: Tensor, scale: Scale, interval: Interval = ALWAYS) -> Tensor:
        """Classifier-free guidance of all rows by one forward, which asks for nothing where guidance is off."""
        if not self.cond or (not isinstance(scale, Tensor) and scale == 1):
            plain: Tensor = self.denoiser(x_t, t, self.cond)
            return plain
        if interval != ALWAYS:
            on = all_within(interval, self.denoiser.path, t.cpu().double())  # samplers' times are floats, too
            return self._by_interval(x_t, t, scale, on.nonzero()[:, 0].to(x_t.device))
        rows, times = torch.cat([x_t, x_t]), torch.cat([t, t])
        said, silent = self.denoiser(rows, times, joined([self.cond, self.null()])).chunk(2)
        return _guided(said, silent, scale)

    def _by_interval(self, x_t: Tensor, t: Tensor, scale: Scale, on: Tensor) -> Tensor:
        """The same, of some rows (n,) alone: the others are asked under their condition only."""
        if not len(on):
            return self._by_scale(x_t, t, 1.0)
        conds = [self.cond, {name: value[on.to(value.device)] for name, value in self.null().items()}]
        both: Tensor = self.denoiser(torch.cat([x_t, x_t[on]]), torch.cat([t, t[on]]), joined(conds))
        said, silent = both[: len(x_t)], both[len(x_t) :]
        much = scale[on.to(scale.device)] if isinstance(scale, Tensor) else scale
        return said.index_copy(0, on, _guided(said[on], silent, much))

    def _by_rows(self, x_t: Tensor, t: Tensor) -> Tensor:
        """Each sample has a time of its own, and so what its guidance wants may differ: one forward for all rows of the
        network, and one for those of each variant.
        """
        path, times, null = self.denoiser.path, t.tolist(), cache(self.null)
        guides = [self._guide(i, null) for i in range(len(times))]
        wanted = [guide.branches(path, time) for guide, time in zip(guides, times, strict=True)]
        places: dict[str | None, list[tuple[int, int]]] = {}
        for i, branches in enumerate(wanted):
            for k, branch in enumerate(branches):
                places.setdefault(branch.variant, []).append((i, k))
        said: dict[tuple[int, int], Tensor] = {}
        for variant, some in places.items():
            rows = torch.tensor([i for i, _ in some], device=x_t.device)
            forward = varied(self.denoiser, self.variants, variant)
            answers = forward(x_t[rows], t[rows], joined([wanted[i][k].cond for i, k in some]))
            said |= zip(some, torch.split(answers, 1), strict=True)
        parts = [[said[i, k] for k in range(len(branches))] for i, branches in enumerate(wanted)]
        each = enumerate(zip(guides, times, parts, strict=True))
        return torch.cat([combined(guide, path, x_t[i : i + 1], time, some) for i, (guide, time, some) in each])

    def _guide(self, i: int, null: Callable[[], Cond]) -> Guidance:
        """The guidance of one sample, in a run of its own."""
        own = {name: value[i : i + 1] for name, value in self.cond.items()}
        return started(given(self.guidance, own, lambda: {name: value[i : i + 1] for name, value in null().items()}))


def _guided(said: Tensor, silent: Tensor, scale: Scale) -> Tensor:
    """Classifier-free guidance of answers with and without the condition, (B, ...)."""
    much = scale.to(said).reshape(-1, *(1,) * (said.ndim - 1)) if isinstance(scale, Tensor) else scale
    return silent + much * (said - silent)


@dataclass(frozen=True)
class Lesson:
    """A step of a student: everything that a method may ask for.

    student: learns. teacher: None where the configuration names none. slow: follows the student, frozen, where the
    method says how fast. critic: learns with the student, and is not kept. step: the updates made, of `steps`; None is
    for judging, when nothing learns. null: makes the absence of the student's condition. noise: of each sample, (B,
    ...), where data are pairs of noise and of where the teacher's flow takes it.
    """

    student: Denoiser
    teacher: Teacher | None = None
    slow: Denoiser | None = None
    critic: nn.Module | None = None
    step: int | None = None
    steps: int = 1
    null: Callable[[], Cond] = dict
    noise: Tensor | None = None

    @property
    def path(self) -> Path:
        """The student's path."""
        return self.student.path

    @property
    def progress(self) -> float:
        """How much of training is done, 0 to 1. Judging is done by the end's measure."""
        return 1.0 if self.step is None else min(1.0, self.step / max(1, self.steps))

    @property
    def taught(self) -> Teacher:
        """The teacher, of a method that cannot do without. ConfigError where there is none."""
        if self.teacher is None:
            raise ConfigError(
                "this method needs a teacher", where="teacher", seen="none", fix="teacher=runs/quickstart"
            )
        return self.teacher

    @property
    def paired(self) -> Tensor:
        """The noise of each sample, of a method that cannot do without. ConfigError where data are no pairs."""
        if self.noise is None:
            fix = "sfumato distill rectified-flow teacher=RUN"
            raise ConfigError("this method learns from pairs", where="objective", seen="data alone", fix=fix)
        return self.noise


def checked_scales(scales: Scales) -> None:
    """ConfigError for a range of scales that is none."""
    if scales is not None and not 0 <= scales[0] <= scales[1]:
        seen = str(scales)
        raise ConfigError("scales lie between a low and a high", where="objective.scales", seen=seen, fix="[1, 6]")


def drawn_scales(
    scales: Scales, cond: Cond | None, like: Tensor, rng: Generator | None
) -> tuple[Tensor | None, dict[str, Tensor]]:
    """Scales of guidance drawn evenly from a range, one for each of `like` (B,), and the student's condition, which
    tells them. No scale, and the condition as it is, where there is no range.
    """
    told = dict(cond or {})
    if scales is None:
        return None, told
    low, high = scales
    scale = (low + (high - low) * torch.rand(len(like), generator=rng)).to(like)
    return scale, {**told, "guidance": scale}


@runtime_checkable
class Tells(Protocol):
    """A method whose student is told more than the time."""

    @property
    def told(self) -> Sequence[str]:
        """The numbers that its network is told: "guidance", "until"."""
        ...


@runtime_checkable
class Suits(Protocol):
    """A method that not everybody can learn by, or teach by."""

    def suits(self, student: Denoiser, teacher: Denoiser | None) -> None:
        """ConfigError for a student that cannot, or a teacher; of both the path, the prediction and the answers count,
        and where the method hears what is said inside of it the network.
        """
        ...


def check_said(denoiser: Denoiser, path: Path, t: float | Tensor, where: str, who: str = "student") -> None:
    """ConfigError where an answer says nothing of the data: predictions of noise at pure noise, of a student or a
    "teacher". t (): on `path`; where: of the configuration, says that the method begins there.
    """
    at = torch.as_tensor(t, dtype=torch.float64)
    if denoiser.path != path:
        at = denoiser.path.time(log_snr(path, at))
    if bool(denoiser.prediction.determines(denoiser.path, at).all()):
        return
    what = f"the {who}'s answer says nothing of the data where the method begins"
    seen = f"the prediction {denoiser.prediction.name} at t = {float(at):g}"
    begins = "[0.99, 0.7]" if where == "objective.at" else "{kind: linear, start: 0.99}"
    other = f"a {who} that predicts x0, v or velocity"
    raise ConfigError(
        what, where=where, seen=seen, fix=other if where == "objective" else f"{where}={begins}, or {other}"
    )


@runtime_checkable
class Follows(Protocol):
    """A method with a slow copy of the student."""

    def follow(self, step: int, steps: int) -> float:
        """How much of the slow copy stays after step `step` (from 0) of `steps`: 0 copies the student, 1 keeps all."""
        ...


@runtime_checkable
class Judges(Protocol):
    """A method with a critic."""

    def critic(self, denoiser: Denoiser) -> nn.Module:
        """A new critic, made of the teacher's denoiser or the student's, as its line of `METHODS` says."""
        ...

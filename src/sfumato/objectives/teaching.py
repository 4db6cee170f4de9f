"""What objectives for students share: a teacher that answers under its guidance, and a lesson, which is a step.

Distillation turns a model into one that needs fewer calls. The teacher stands still and is asked as a sampler would ask
it; a slow copy of the student may stand for its past; a critic may learn beside it and be thrown away. All of them are
denoisers or are made from one, so a method knows nothing of networks, conditions or devices: it is given a `Lesson`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Generator, Tensor, nn

from sfumato.denoiser import Bound, Cond, Denoiser, joined, times_like, translated
from sfumato.errors import ConfigError
from sfumato.guidance import CFG, Branch, Guidance, Unguided, combined, given, started
from sfumato.paths import Path, log_snr

Scale = float | Tensor  # of classifier-free guidance: one for all, or one a sample (B,)
PROBES = 32  # times at which a guidance is tried
Scales = tuple[float, float] | None  # the range that scales are drawn from, where the student is told them


@dataclass(frozen=True)
class Teacher:
    """A frozen model with the conditions of a batch filled in.

    denoiser: any model that answers "x0". cond: of each sample; null: makes the absence of it, once. guidance: how it
    is guided unless it is asked otherwise, its conditions not filled in. spoken: the path on which it is asked, where
    that is not its own.
    """

    denoiser: Denoiser
    cond: Cond
    null: Callable[[], Cond]
    guidance: Guidance
    spoken: Path | None = None

    @property
    def path(self) -> Path:
        """The path on which it is asked: its student's."""
        return self.spoken or self.denoiser.path

    @torch.no_grad()
    def __call__(self, x_t: Tensor, t: float | Tensor, guidance: Scale | None = None) -> Tensor:
        """x0-hat (B, ...) at x_t and times (B,). guidance: a scale of classifier-free guidance in place of its own."""
        t = times_like(t, x_t)
        if self.spoken is not None and self.spoken != self.denoiser.path:  # x0-hat is of no path
            x_t, t = translated(self.spoken, self.denoiser.path, x_t, t)
        if guidance is not None:
            return self._by_scale(x_t, t, guidance)
        if isinstance(self.guidance, Unguided) or not self.cond:
            return self._by_scale(x_t, t, 1.0)
        if isinstance(self.guidance, CFG) and self.guidance == CFG(scale=self.guidance.scale):
            return self._by_scale(x_t, t, self.guidance.scale)  # which means the same at all times
        return self._by_rows(x_t, t)

    def check(self) -> None:
        """ConfigError for a guidance by which no teacher can answer, samples and times as they come."""
        guide = started(given(self.guidance, self.cond, self.null))
        x = torch.zeros(1, 1, 2, 2)
        for time in torch.linspace(1, 0, PROBES + 1)[:-1].tolist():
            asked = asked_of(guide, self.denoiser.path, time)
            combined(guide, self.denoiser.path, x, time, [x] * len(asked))

    def bound(self, guidance: Scale | None = None) -> Bound:
        """What samplers ask: x0-hat under one guidance."""
        return Bound(self.path, lambda x, t: self(x, t, guidance))

    def _by_scale(self, x_t: Tensor, t: Tensor, scale: Scale) -> Tensor:
        if not self.cond or (not isinstance(scale, Tensor) and scale == 1):
            plain: Tensor = self.denoiser(x_t, t, self.cond)
            return plain
        rows, times = torch.cat([x_t, x_t]), torch.cat([t, t])
        said, silent = self.denoiser(rows, times, joined([self.cond, self.null()])).chunk(2)
        much = scale.to(said).reshape(-1, *(1,) * (said.ndim - 1)) if isinstance(scale, Tensor) else scale
        guided: Tensor = silent + much * (said - silent)
        return guided

    def _by_rows(self, x_t: Tensor, t: Tensor) -> Tensor:
        """Each sample has a time of its own, and so what its guidance wants may differ: one forward for all."""
        null, conds, asked = self.null(), list[Cond](), list[int]()
        guides, wanted = [], []
        for i, time in enumerate(t.tolist()):
            own = {name: value[i : i + 1] for name, value in self.cond.items()}
            none = {name: value[i : i + 1] for name, value in null.items()}
            guide = started(given(self.guidance, own, lambda none=none: none))  # type: ignore[misc]
            branches = asked_of(guide, self.denoiser.path, time)
            guides.append(guide)
            wanted.append(range(len(conds), len(conds) + len(branches)))
            conds += [branch.cond for branch in branches]
            asked += [i] * len(branches)
        rows = torch.tensor(asked, device=x_t.device)
        said: Tensor = self.denoiser(x_t[rows], t[rows], joined(conds))
        each = zip(guides, wanted, t.tolist(), strict=True)
        return torch.cat(
            [
                combined(guide, self.denoiser.path, x_t[i : i + 1], time, [said[k : k + 1] for k in which])
                for i, (guide, which, time) in enumerate(each)
            ]
        )


def asked_of(guidance: Guidance, path: Path, t: float) -> tuple[Branch, ...]:
    """What a guidance asks of a teacher at a time. ConfigError for one that asks for another network."""
    branches = guidance.branches(path, t)
    if any(branch.variant is not None for branch in branches):
        seen, fix = type(guidance).__name__, "teacher_guidance=2, or any that asks the network itself"
        raise ConfigError("a teacher has no variants of its network", where="teacher_guidance", seen=seen, fix=fix)
    return branches


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

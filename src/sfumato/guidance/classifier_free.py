"""Classifier-free guidance and its refinements: they ask the same network with and without the condition.

The difference of the two answers points to what the condition adds; every method here goes along it by another rule.
Because all predictions are linear in x0 at a fixed x_t, CFG is the same in each of them; what is not linear says in
which it is measured.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sfumato.denoiser import Cond
from sfumato.errors import ConfigError
from sfumato.guidance.adjust import rescaled
from sfumato.guidance.core import (
    ALWAYS,
    Branch,
    FilledIn,
    Interval,
    check_interval,
    check_share,
    dot,
    scales,
    within,
)
from sfumato.paths import Path
from sfumato.predictions import VELOCITY, X0, Prediction


@dataclass(frozen=True)
class CFG:
    """Classifier-free guidance: null + scale (cond - null) (Ho & Salimans 2022, with scale = 1 + w).

    cond, null: the condition and its absence (or a negative prompt). scale: 1 is off.
    interval: noise levels sigma / alpha, (low, high], within which guidance is on (Kynkaanniemi et al. 2024); outside,
        the null branch is not even evaluated. Never a count of steps, so that it means the same on every grid.
    rescale: 0..1, how far to bring the standard deviation of the guided answer back to the conditional one's
        (Lin et al. 2023, section 3.4), measured in `space`: the published form measures it on V or EPS.
    channels: the first so many are guided, the rest are the conditional answer's; None is all. DiT's and SiT's
        published figures were drawn with 3 of the 4 latent channels guided, which was not meant.
    """

    cond: FilledIn[Cond] = field(default_factory=dict)
    null: FilledIn[Cond] = field(default_factory=dict)
    scale: float = 3.0
    interval: tuple[float, float | None] = ALWAYS
    rescale: float = 0.0
    space: Prediction = X0
    channels: int | None = None

    def __post_init__(self) -> None:
        check_interval(self.interval)
        check_share(self.rescale, "rescale", "guidance rescale")
        if self.channels is not None and self.channels < 1:
            seen = str(self.channels)
            raise ConfigError("at least one channel is guided", where="guidance.channels", seen=seen, fix="channels=3")

    def branches(self, path: Path, t: float) -> tuple[Branch, ...]:
        return _pair(self.cond, self.null, self.scale, self.interval, path, t)

    def combine(self, path: Path, x_t: Tensor, t: float, answers: Sequence[Tensor]) -> Tensor:
        if len(answers) == 1:
            return answers[0]
        cond, null = answers
        guided = torch.lerp(null, cond, self.scale)
        if self.channels is not None:
            guided = torch.cat([guided[:, : self.channels], cond[:, self.channels :]], 1)
        return rescaled(path, x_t, t, guided, cond, self.rescale, self.space) if self.rescale else guided


def _pair(cond: Cond, null: Cond, scale: float, interval: Interval, path: Path, t: float) -> tuple[Branch, ...]:
    """With and without the condition, or only with it where guidance is off."""
    if scale == 1 or not within(interval, path, t):
        return (Branch(cond),)
    return Branch(cond), Branch(null)


@dataclass(frozen=True)
class Weighted:
    """Several prompts at once, each with a weight: null + scale sum_i w_i (cond_i - null) (Liu et al. 2022).

    also: pairs of a further prompt and its weight, which is relative to 1, the weight of the rows' own; a negative one
        steers away. scale, interval: as of `CFG`; 1 is off only as far as the rows' own prompt goes.
    others: the conditions of those prompts.
    """

    cond: FilledIn[Cond] = field(default_factory=dict)
    null: FilledIn[Cond] = field(default_factory=dict)
    scale: float = 3.0
    also: tuple[tuple[str | int, float], ...] = ()
    interval: tuple[float, float | None] = ALWAYS
    others: FilledIn[tuple[Cond, ...]] = ()

    def __post_init__(self) -> None:
        check_interval(self.interval)

    def branches(self, path: Path, t: float) -> tuple[Branch, ...]:
        if (self.scale == 1 and not self.also) or not within(self.interval, path, t):
            return (Branch(self.cond),)
        if len(self.others) != len(self.also):
            raise ConfigError("a further prompt has no condition", where="guidance.also", seen=str(self.also))
        return Branch(self.cond), Branch(self.null), *(Branch(one) for one in self.others)

    def combine(self, path: Path, x_t: Tensor, t: float, answers: Sequence[Tensor]) -> Tensor:
        if len(answers) == 1:
            return answers[0]
        cond, null, *others = answers
        guided = torch.lerp(null, cond, self.scale)
        for (_, weight), one in zip(self.also, others, strict=True):
            guided = torch.add(guided, one - null, alpha=self.scale * weight)
        return guided


@dataclass(frozen=True)
class CFGPlusPlus:
    """CFG++ (Chung et al. 2024): x0 = null + strength (cond - null), but the noise is that of the null answer.

    strength: 0..1, from unconditional to the conditional x0; about 0.6 does what a CFG scale of 7.5 does. It is no
    `scale`: none of its values is off. A DDIM step to time s keeps x0 and the noise of one answer, and so equals CFG
    with a scale that depends on the step, strength / (1 - (alpha_t sigma_s) / (sigma_t alpha_s)): exact for DDIM
    without fresh noise, a definition for other samplers that ask at the times of their grid.
    times: the grid. interval: as of `CFG`.
    """

    cond: FilledIn[Cond] = field(default_factory=dict)
    null: FilledIn[Cond] = field(default_factory=dict)
    strength: float = 0.6
    interval: tuple[float, float | None] = ALWAYS
    times: FilledIn[tuple[float, ...]] = ()

    def __post_init__(self) -> None:
        check_interval(self.interval)
        check_share(self.strength, "strength", "the strength of CFG++")

    def branches(self, path: Path, t: float) -> tuple[Branch, ...]:
        if not within(self.interval, path, t):
            return (Branch(self.cond),)
        return Branch(self.cond), Branch(self.null)

    def combine(self, path: Path, x_t: Tensor, t: float, answers: Sequence[Tensor]) -> Tensor:
        if len(answers) == 1:
            return answers[0]
        cond, null = answers
        return torch.lerp(null, cond, self.scale(path, t))

    def scale(self, path: Path, t: float) -> float:
        """The CFG scale of the step that starts at t. ConfigError if the grid has no such step."""
        here = next((i for i, time in enumerate(self.times[:-1]) if abs(time - t) <= 1e-9), None)
        if here is None:
            grid = "no grid" if not self.times else "a sampler that asks between the times of its grid"
            raise ConfigError("CFG++ must know where a step ends", where="guidance", seen=grid, fix="sampler=ddim")
        (alpha, sigma), (end, noise) = scales(path, t), scales(path, self.times[here + 1])
        return self.strength / (1 - alpha * noise / (sigma * end))


@dataclass(frozen=True)
class CFGZero:
    """CFG-Zero* (Fan et al. 2025): the null answer is first scaled to fit the conditional one best, sample by sample.

    v = s null + scale (cond - s null) with s = <cond, null> / |null|^2, measured in `space`; scale: 1 is off.
    zero_above: above this noise level the velocity is taken to be zero, for an early network is worse than no step
        at all there: 99 is t > 0.99 on the linear path, the first step from pure noise.
    interval: as of `CFG`.
    """

    cond: FilledIn[Cond] = field(default_factory=dict)
    null: FilledIn[Cond] = field(default_factory=dict)
    scale: float = 3.0
    interval: tuple[float, float | None] = ALWAYS
    zero_above: float = 99.0
    space: Prediction = VELOCITY

    def __post_init__(self) -> None:
        check_interval(self.interval)

    def branches(self, path: Path, t: float) -> tuple[Branch, ...]:
        if self._stands(path, t):
            return (Branch(self.cond),)
        return _pair(self.cond, self.null, self.scale, self.interval, path, t)

    def combine(self, path: Path, x_t: Tensor, t: float, answers: Sequence[Tensor]) -> Tensor:
        time = torch.tensor(t, dtype=torch.float64)
        if self._stands(path, t):
            return VELOCITY.x0(path, torch.zeros_like(x_t), x_t, time).to(x_t)
        if len(answers) == 1:
            return answers[0]
        cond, null = (self.space.answer(path, x0, x_t, time).to(x_t) for x0 in answers)
        null = null * (dot(cond, null) / dot(null, null).clamp(min=1e-30)).to(null)
        return self.space.x0(path, torch.lerp(null, cond, self.scale), x_t, time).to(x_t)

    def _stands(self, path: Path, t: float) -> bool:
        return self.scale != 1 and within(self.interval, path, t) and within((self.zero_above, None), path, t)


@dataclass(frozen=True)
class APG:
    """Adaptive projected guidance (Sadat et al. 2024): cond + (scale - 1) d, where d is a tamed cond - null.

    momentum: how much of the last d is added to the next; a negative one pushes away from where it went.
    limit: the most that d's norm may be (2.5 to 15 in the paper, growing with the data); none by default.
    parallel: how much is kept of d's part along cond, which only saturates. With 0, infinity and 1 this is CFG, and at
    scale 1 it is cond, whatever d; the common form null + scale d is not.
    memory: the last d of this run. scale, interval: as of `CFG`.
    """

    cond: FilledIn[Cond] = field(default_factory=dict)
    null: FilledIn[Cond] = field(default_factory=dict)
    scale: float = 4.0
    momentum: float = -0.5
    limit: float | None = None
    parallel: float = 0.0
    interval: tuple[float, float | None] = ALWAYS
    memory: list[Tensor] = field(default_factory=list, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        check_interval(self.interval)
        if self.limit is not None and not self.limit > 0:
            raise ConfigError("the limit of a norm is above 0", where="guidance.limit", seen=f"{self.limit:g}")

    def branches(self, path: Path, t: float) -> tuple[Branch, ...]:
        return _pair(self.cond, self.null, self.scale, self.interval, path, t)

    def combine(self, path: Path, x_t: Tensor, t: float, answers: Sequence[Tensor]) -> Tensor:
        if len(answers) == 1:
            return answers[0]
        cond, null = answers
        d = cond - null
        if self.momentum:
            d = torch.add(d, self.memory[0], alpha=self.momentum) if self.memory else d
            self.memory[:] = [d]
        if self.limit is not None:
            d = d * (self.limit / dot(d, d).sqrt().clamp(min=1e-30)).clamp(max=1).to(d)
        along = cond * (dot(d, cond) / dot(cond, cond).clamp(min=1e-30)).to(d)
        return torch.add(cond, torch.add(d, along, alpha=self.parallel - 1), alpha=self.scale - 1)

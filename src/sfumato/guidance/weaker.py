"""Guidance away from a weaker model: another network, or this one with a part of it switched off.

Where a weak and a strong model agree to err, their difference points towards the data: bad + scale (good - bad)
(Karras et al. 2024). The weak model may be a smaller or less trained one; or the same network with some of its
self-attention looking at nothing but itself (Ahn et al. 2024), or with some of its blocks skipped (Stability AI, 2024).
Neither needs a condition, so they add to classifier-free guidance: `of` is what they are added to.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sfumato.denoiser import Cond
from sfumato.errors import ConfigError
from sfumato.guidance.core import ALWAYS, Branch, FilledIn, Guidance, check_interval, within
from sfumato.paths import Path


@dataclass(frozen=True)
class Away:
    """What these kinds share: good + (scale - 1) (good - bad), with `bad` from the variant of that name.

    scale: 1 is off. interval: noise levels (low, high] within which it is on. of: the guidance that it is added to.
    """

    cond: FilledIn[Cond] = field(default_factory=dict)
    scale: float = 2.0
    interval: tuple[float, float | None] = ALWAYS
    of: Guidance | None = None

    def __post_init__(self) -> None:
        check_interval(self.interval)

    @property
    def variant(self) -> str:
        """The name of the weaker model."""
        raise NotImplementedError

    def branches(self, path: Path, t: float) -> tuple[Branch, ...]:
        base = (Branch(self.cond),) if self.of is None else self.of.branches(path, t)
        return (*base, Branch(base[0].cond, self.variant)) if self._on(path, t) else base

    def combine(self, path: Path, x_t: Tensor, t: float, answers: Sequence[Tensor]) -> Tensor:
        base, on = list(answers), self._on(path, t)
        bad = base.pop() if on else base[0]
        guided = base[0] if self.of is None else self.of.combine(path, x_t, t, base)
        return torch.add(guided, base[0] - bad, alpha=self.scale - 1) if on else guided

    def _on(self, path: Path, t: float) -> bool:
        return self.scale != 1 and within(self.interval, path, t)


@dataclass(frozen=True)
class Autoguidance(Away):
    """Away from a smaller or less trained model under the same condition (Karras et al. 2024).

    model: where that one is, a model directory or a run. scale, interval, of: 1 is off; noise levels (low, high]; the
    guidance that it is added to.
    """

    model: str = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.model:
            fix = "guidance.model=runs/weaker"
            raise ConfigError("autoguidance needs a second, weaker model", where="guidance.model", seen="none", fix=fix)

    @property
    def variant(self) -> str:
        return f"model:{self.model}"


@dataclass(frozen=True)
class PerturbedAttention(Away):
    """Away from the same network with identity for some self-attention maps (Ahn et al. 2024).

    blocks: which of its attention blocks, counted in the order in which they are run; none given, the middle one.
    scale: 1 is off, and the published 3 is 4 here. interval, of: noise levels (low, high]; what it is added to.
    """

    scale: float = 4.0
    blocks: tuple[int, ...] = ()

    @property
    def variant(self) -> str:
        return f"perturb:{_listed(self.blocks)}"


@dataclass(frozen=True)
class SkipLayers(Away):
    """Away from the same network without some of its blocks (Stability AI's skip-layer guidance, 2024).

    blocks: which, counted in the order in which they are run; none given, the middle one; SD3.5-medium: 7, 8 and 9.
    scale: 1 is off, and the published 2.5 is 3.5 here. interval, of: noise levels (low, high]; what it is added to.
    """

    scale: float = 3.5
    blocks: tuple[int, ...] = ()

    @property
    def variant(self) -> str:
        return f"skip:{_listed(self.blocks)}"


def models_of(guidance: Guidance | None) -> list[str]:
    """Where the weaker models are that a guidance reads, those of what it wraps too."""
    found = list[str]()
    while guidance is not None:
        found += [guidance.model] if isinstance(guidance, Autoguidance) else []
        guidance = getattr(guidance, "of", None)
    return found


def _listed(blocks: Sequence[int]) -> str:
    return ",".join(str(block) for block in blocks) or "middle"

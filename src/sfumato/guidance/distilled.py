"""Guidance that was distilled into the network, which is told the scale as one more condition (Meng et al. 2023).

One branch a step: FLUX.1-dev and latent consistency models have learned what CFG would answer. Which number they are
told is a matter of their training, and is converted here and nowhere else.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from sfumato.denoiser import Cond
from sfumato.errors import ConfigError
from sfumato.guidance.core import Branch, FilledIn
from sfumato.paths import Path


@dataclass(frozen=True)
class Distilled:
    """One evaluation, with the scale as the condition `key`, (B,) float32.

    scale: 1 is off, as far as the network has learned it. told: what the network takes for it, "scale" (FLUX.1-dev) or
    the "weight" scale - 1 (latent consistency models).
    """

    cond: FilledIn[Cond] = field(default_factory=dict)
    scale: float = 3.5
    told: Literal["scale", "weight"] = "scale"
    key: str = "guidance"

    def branches(self, path: Path, t: float) -> tuple[Branch, ...]:
        if not self.cond:
            what = "a guidance that the network is told needs a model with conditions"
            raise ConfigError(what, where="guidance", seen="no conditions", fix="guidance=1")
        like = next(iter(self.cond.values()))
        value = self.scale - 1 if self.told == "weight" else self.scale
        said = like.new_full((len(like),), value, dtype=torch.float32)
        return (Branch({**self.cond, self.key: said}),)

    def combine(self, path: Path, x_t: Tensor, t: float, answers: Sequence[Tensor]) -> Tensor:
        return answers[0]

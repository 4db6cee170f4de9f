"""Exponential moving averages of the weights: what is sampled, kept and exported.

a <- d a + (1 - d) w after every update. A fixed d leaves d^n of the first, random weights in an average after n
updates; the warm-up min(d, (1 + n) / (10 + n)) forgets them as fast as a plain mean would. Several averages may run
at once: each is in the checkpoint (`ema-0`, `ema-1`, ...) and has a model directory of its own.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from sfumato.config import EMASection


class EMA:
    """An average of some named weights, in float32 at least; it begins as a copy of them."""

    def __init__(self, weights: Mapping[str, Tensor], section: EMASection) -> None:
        self.section = section
        self.names = list(weights)
        self.average = [value.detach().clone().to(_wide(value)) for value in weights.values()]

    def decay(self, n: int) -> float:
        """The decay of update number n (from 0)."""
        return min(self.section.decay, (1 + n) / (10 + n)) if self.section.warmup else self.section.decay

    @torch.no_grad()
    def update(self, weights: Sequence[Tensor], n: int) -> None:
        """Takes in the weights after update number n (from 0)."""
        wide = [w.to(a.dtype) for w, a in zip(weights, self.average, strict=True)]
        torch._foreach_lerp_(self.average, wide, 1 - self.decay(n))

    def state(self) -> dict[str, Tensor]:
        """The averages by name."""
        return dict(zip(self.names, self.average, strict=True))

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """The inverse of `state`; of weights, it begins anew from them."""
        for name, value in zip(self.names, self.average, strict=True):
            value.copy_(state[name].detach())

    @contextmanager
    def applied(self, weights: Sequence[Tensor]) -> Iterator[None]:
        """The averages stand in for the weights for a while."""
        with torch.no_grad():
            kept = [w.detach().clone() for w in weights]
            for w, average in zip(weights, self.average, strict=True):
                w.copy_(average)
        try:
            yield
        finally:
            with torch.no_grad():
                for w, old in zip(weights, kept, strict=True):
                    w.copy_(old)


def _wide(value: Tensor) -> torch.dtype:
    return torch.float32 if value.dtype in (torch.float16, torch.bfloat16) else value.dtype

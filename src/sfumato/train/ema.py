"""Exponential moving averages of the weights: what is sampled, kept and exported. Several may run at once."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from sfumato.config import EMASection


class EMA:
    """An average of some named weights, in float32. After n updates the decay is min(decay, (1 + n) / (10 + n))."""

    def __init__(self, weights: Mapping[str, Tensor], section: EMASection) -> None:
        self.section = section
        self.names = list(weights)
        self.average = [value.detach().clone().to(_wide(value)) for value in weights.values()]

    @torch.no_grad()
    def update(self, weights: Sequence[Tensor], n: int) -> None:
        """Takes in the weights after update number n (from 0)."""
        decay = min(self.section.decay, (1 + n) / (10 + n)) if self.section.warmup else self.section.decay
        torch._foreach_lerp_(
            self.average, [w.to(a.dtype) for w, a in zip(weights, self.average, strict=True)], 1 - decay
        )

    def state(self) -> dict[str, Tensor]:
        """The averages by name."""
        return dict(zip(self.names, self.average, strict=True))

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """The inverse of `state`."""
        for name, value in zip(self.names, self.average, strict=True):
            value.copy_(state[name])

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

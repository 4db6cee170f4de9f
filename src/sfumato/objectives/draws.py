"""What every objective draws: times, and noise for its data, from a generator on the CPU, so that no device changes
them.
"""

import torch
from torch import Generator, Tensor

from sfumato.devices import moved
from sfumato.paths import Path
from sfumato.times import Density


def times_for(x0: Tensor, density: Density, path: Path, rng: Generator | None) -> Tensor:
    """A time of a density for each sample of x0 (B, ...), (B,), beside it, in float32 at least."""
    return beside(x0, density(len(x0), path, rng))


def noise_like(x0: Tensor, rng: Generator | None) -> Tensor:
    """Standard normal noise like x0 (B, ...)."""
    return moved(torch.randn(x0.shape, generator=rng, dtype=x0.dtype), x0.device)


def beside(x0: Tensor, times: Tensor) -> Tensor:
    """Times of the CPU on the device of x0, in float32 at least."""
    return moved(times, x0.device, torch.promote_types(x0.dtype, torch.float32))

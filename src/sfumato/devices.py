"""What is made on the CPU and used on an accelerator: noise, times, pictures, moved without waiting for the device.

A copy from ordinary memory waits until the device has done all that it was given before. From page-locked memory it
only joins the queue, so the CPU can be steps ahead. What a network drops at random is drawn where the network is.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


def moved(host: Tensor, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """A tensor of the CPU on a device, as a number type; itself, where it is there already."""
    if device.type == "cuda" and host.device.type == "cpu":
        host = host.pin_memory()
    return host.to(device, dtype or host.dtype, non_blocking=True)


@contextmanager
def same_chance(device: torch.device) -> Iterator[None]:
    """What a network drops at random inside, it will drop again after it."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        yield

"""Pictures, which are bytes, as the numbers that networks and codecs take."""

import torch
from torch import Tensor

from sfumato.data.picture import Image
from sfumato.devices import moved


def pixels(images: Image, device: torch.device) -> Tensor:
    """Pictures (B, H, W, 3) uint8 as (B, 3, H, W) in [-1, 1], on a device."""
    there = moved(torch.from_numpy(images), device).permute(0, 3, 1, 2)
    return there.float().div(127.5).sub(1).contiguous()

"""A discriminator of patches (Isola et al. 2017, "PatchGAN"): is each patch of a picture drawn, or reconstructed?

Strided convolutions answer a map of logits, each of which sees a patch of fixed size; nothing sees the whole picture,
so what it can object to is texture and sharpness. It stands beside an autoencoder while that is trained and is not
kept. The normalisation is by groups, where the paper has batch norms: a picture's answer then does not depend on what
shares its batch, and there is no running state.
"""

from dataclasses import dataclass
from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn

from sfumato.errors import ConfigError


@dataclass(frozen=True)
class PatchDiscriminatorConfig:
    """The shape of a discriminator.

    channels: of the first layer; each of the next doubles them, up to eight times. layers: that halve the picture:
    with 1, 2, 3 and 4 a logit sees a patch of 16, 34, 70 and 142 pixels. groups: of the group norms, at most.
    """

    in_channels: int = 3
    channels: int = 64
    layers: int = 3
    groups: int = 32


class PatchDiscriminator(nn.Module):
    """Pictures (B, in_channels, H, W) in [-1, 1] to logits (B, 1, h, w): high where a patch looks drawn."""

    def __init__(self, config: PatchDiscriminatorConfig) -> None:
        super().__init__()
        for name in ("channels", "layers", "groups"):
            if getattr(config, name) < 1:
                where, seen = f"objective.discriminator.{name}", str(getattr(config, name))
                raise ConfigError("a discriminator has one of these at least", where=where, seen=seen)
        self.config = config
        widths = [config.channels * min(2**i, 8) for i in range(config.layers + 1)]
        self.entry = nn.Conv2d(config.in_channels, widths[0], 4, stride=2, padding=1)
        self.stages = nn.ModuleList(
            Stage(before, width, 2 if i + 1 < config.layers else 1, config.groups)
            for i, (before, width) in enumerate(pairwise(widths))
        )
        self.exit = nn.Conv2d(widths[-1], 1, 4, padding=1)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0.0, 0.02)  # as published

    def forward(self, images: Tensor) -> Tensor:
        h = F.leaky_relu(self.entry(images), 0.2)
        for stage in self.stages:
            h = stage(h)
        out: Tensor = self.exit(h)
        return out


class Stage(nn.Module):
    """A convolution of 4x4, a norm, a leaky rectifier."""

    def __init__(self, width: int, out: int, stride: int, groups: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, out, 4, stride=stride, padding=1, bias=False)
        self.norm = nn.GroupNorm(_divisor(out, groups), out)

    def forward(self, x: Tensor) -> Tensor:
        return F.leaky_relu(self.norm(self.conv(x)), 0.2)


def _divisor(width: int, most: int) -> int:
    """The largest number of groups, up to `most`, that divides the width."""
    return next(n for n in range(min(width, most), 0, -1) if width % n == 0)

"""The tiny autoencoder (Boer Bohan 2023, "TAESD"): latents of Stable Diffusion, FLUX and others to pictures, fast.

Convolutions and rectifiers alone, 64 channels wide at every size, distilled from a large autoencoder: 1.2 million
weights a half instead of 34 or 49. There is no distribution and no attention; its latents are those of the large one,
scaled to about unit variance already. For previews, and where memory or time is short.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sfumato.errors import ConfigError

BOUND = 3.0  # latents are bent into (-3, 3) before they are decoded


@dataclass(frozen=True)
class TinyAutoencoderConfig:
    """The shape of a tiny autoencoder.

    latent: channels of the latent map. width: of every layer. encoder, decoder: residual blocks at each size, in the
    order of running; between two sizes is a factor of 2.
    """

    in_channels: int = 3
    latent: int = 4
    width: int = 64
    encoder: tuple[int, ...] = (1, 3, 3, 3)
    decoder: tuple[int, ...] = (3, 3, 3, 1)

    @property
    def factor(self) -> int:
        """Pixels a side of a place of the latent map."""
        return 2 ** (len(self.encoder) - 1)


PRESETS = {
    "taesd": TinyAutoencoderConfig(),
    "taesdxl": TinyAutoencoderConfig(),
    "taesd3": TinyAutoencoderConfig(latent=16),
    "taef1": TinyAutoencoderConfig(latent=16),
}


def preset(name: str, **changes: object) -> TinyAutoencoderConfig:
    """A published shape, with changes: "taesd", "taesdxl", "taesd3", "taef1"."""
    if name not in PRESETS:
        raise ConfigError("no such preset", where="preset", seen=name, fix=", ".join(PRESETS))
    return replace(PRESETS[name], **changes)  # type: ignore[arg-type]


class TinyAutoencoder(nn.Module):
    """Pictures (B, in_channels, H, W) in [-1, 1] to latents (B, latent, H/f, W/f) of about unit variance, and back."""

    def __init__(self, config: TinyAutoencoderConfig) -> None:
        super().__init__()
        _checked(config)
        self.config = config
        self.encoder, self.decoder = Encoder(config), Decoder(config)

    def encode(self, images: Tensor) -> Tensor:
        out: Tensor = self.encoder((images + 1) / 2)  # it was trained on pictures in [0, 1]
        return out

    def decode(self, z: Tensor) -> Tensor:
        out: Tensor = self.decoder(torch.tanh(z / BOUND) * BOUND)
        return out * 2 - 1

    def forward(self, images: Tensor) -> Tensor:
        """The reconstruction."""
        return self.decode(self.encode(images))


class Encoder(nn.Module):
    """Pictures in [0, 1] to latents. stages: one for each size, each but the first begins by halving."""

    def __init__(self, config: TinyAutoencoderConfig) -> None:
        super().__init__()
        width = config.width
        self.entry = nn.Conv2d(config.in_channels, width, 3, padding=1)
        self.stages = nn.ModuleList(
            Stage(width, count, nn.Conv2d(width, width, 3, stride=2, padding=1, bias=False) if i else nn.Identity())
            for i, count in enumerate(config.encoder)
        )
        self.exit = nn.Conv2d(width, config.latent, 3, padding=1)

    def forward(self, images: Tensor) -> Tensor:
        h = self.entry(images)
        for stage in self.stages:
            h = stage(h)
        out: Tensor = self.exit(h)
        return out


class Decoder(nn.Module):
    """Latents to pictures in [0, 1]. stages: one for each size, each but the first begins by doubling."""

    def __init__(self, config: TinyAutoencoderConfig) -> None:
        super().__init__()
        width = config.width
        self.entry = nn.Conv2d(config.latent, width, 3, padding=1)
        self.stages = nn.ModuleList(
            Stage(width, count, Double(width) if i else nn.Identity()) for i, count in enumerate(config.decoder)
        )
        self.exit = nn.Conv2d(width, config.in_channels, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        h = F.relu(self.entry(z))
        for stage in self.stages:
            h = stage(h)
        out: Tensor = self.exit(h)
        return out


class Stage(nn.Module):
    """A change of size, and residual blocks."""

    def __init__(self, width: int, blocks: int, resample: nn.Module) -> None:
        super().__init__()
        self.resample = resample
        self.blocks = nn.ModuleList(Block(width) for _ in range(blocks))

    def forward(self, x: Tensor) -> Tensor:
        x = self.resample(x)
        for block in self.blocks:
            x = block(x)
        return x


class Double(nn.Module):
    """Twice the size, by repeating pixels, and a convolution."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return out


class Block(nn.Module):
    """Three convolutions with rectifiers between them, added to the input, rectified."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second, self.third = (nn.Conv2d(width, width, 3, padding=1) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.second(F.relu(self.first(x))))
        return F.relu(self.third(h) + x)


def _checked(config: TinyAutoencoderConfig) -> None:
    where = "model.codec"
    for name in ("in_channels", "latent", "width"):
        if getattr(config, name) < 1:
            raise ConfigError(f"{name} is at least 1", where=f"{where}.{name}", seen=str(getattr(config, name)))
    for name in ("encoder", "decoder"):
        counts: Sequence[int] = getattr(config, name)
        if not counts or min(counts) < 0:
            raise ConfigError("blocks are counted for each size", where=f"{where}.{name}", seen=str(list(counts)))
    if len(config.encoder) != len(config.decoder):
        seen = f"{len(config.encoder)} and {len(config.decoder)} sizes"
        raise ConfigError("both halves have as many sizes", where=f"{where}.decoder", seen=seen)

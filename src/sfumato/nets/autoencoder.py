"""The autoencoder of latent diffusion (Rombach et al. 2022, "AutoencoderKL"): pictures to small maps and back.

A convolutional encoder halves the picture level by level and answers, for each place of the latent map, the mean and
the log-variance of a normal distribution; a decoder draws the picture from a latent. It was trained to reconstruct,
with a light pull of the distribution to the standard normal one, a perceptual loss and a discriminator. The same
network, with 4 or 16 channels, is inside Stable Diffusion, SDXL, SD3 and FLUX; what they do to latents is the codec's.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sfumato.errors import ConfigError
from sfumato.nets.layers import attended, through


@dataclass(frozen=True)
class AutoencoderConfig:
    """The shape of an autoencoder.

    channels: the width of each level, from the picture's size down; every level but the last halves it.
    blocks: residual blocks a level; the decoder has one more. latent: channels of the latent map. groups: of the group
    norms. attention: whether the bottom has a self-attention. quant: whether 1x1 convolutions stand between the two
    halves and the latent, as in SD 1, SD 2 and SDXL.
    """

    in_channels: int = 3
    latent: int = 4
    channels: tuple[int, ...] = (128, 256, 512, 512)
    blocks: int = 2
    groups: int = 32
    attention: bool = True
    quant: bool = True

    @property
    def factor(self) -> int:
        """Pixels a side of a place of the latent map."""
        return 2 ** (len(self.channels) - 1)


PRESETS = {
    "sd": AutoencoderConfig(),
    "sdxl": AutoencoderConfig(),
    "sd3": AutoencoderConfig(latent=16, quant=False),
    "flux": AutoencoderConfig(latent=16, quant=False),
}


class Posterior(NamedTuple):
    """The distribution of a latent (B, latent, h, w): normal, with this mean and this logarithm of the variance."""

    mean: Tensor
    logvar: Tensor

    def sample(self, noise: Tensor) -> Tensor:
        """A latent from standard normal noise of its shape."""
        return torch.addcmul(self.mean, torch.exp(self.logvar / 2), noise)

    def kl(self) -> Tensor:
        """The divergence from the standard normal distribution, in nats, for each picture (B,)."""
        each = self.mean.square() + self.logvar.exp() - 1 - self.logvar
        return each.flatten(1).sum(1) / 2


class Autoencoder(nn.Module):
    """Pictures (B, in_channels, H, W) in [-1, 1] to `Posterior`s of latents (B, latent, H/f, W/f), and back."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        _checked(config)
        self.config = config
        self.encoder, self.decoder = Encoder(config), Decoder(config)
        self.quant = nn.Conv2d(2 * config.latent, 2 * config.latent, 1) if config.quant else nn.Identity()
        self.post_quant = nn.Conv2d(config.latent, config.latent, 1) if config.quant else nn.Identity()

    @property
    def checkpointing(self) -> bool:
        """Whether activations are made anew in the backward pass, level by level."""
        return self.encoder.checkpointing

    @checkpointing.setter
    def checkpointing(self, recompute: bool) -> None:
        self.encoder.checkpointing = self.decoder.checkpointing = recompute

    @property
    def last(self) -> Tensor:
        """The weight of the decoder's last layer, by which adversaries are weighed."""
        return self.decoder.exit.weight

    def encode(self, images: Tensor) -> Posterior:
        mean, logvar = self.quant(self.encoder(images)).chunk(2, 1)
        return Posterior(mean, logvar.clamp(-30, 20))

    def decode(self, z: Tensor) -> Tensor:
        out: Tensor = self.decoder(self.post_quant(z))
        return out

    def forward(self, images: Tensor) -> Tensor:
        """The reconstruction by way of the mean."""
        return self.decode(self.encode(images).mean)


class Encoder(nn.Module):
    """(B, in_channels, H, W) to the moments (B, 2 latent, H/f, W/f)."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        self.checkpointing = False
        widths, groups = config.channels, config.groups
        self.entry = nn.Conv2d(config.in_channels, widths[0], 3, padding=1)
        self.levels = nn.ModuleList()
        for i, width in enumerate(widths):
            ins = [widths[max(i - 1, 0)], *[width] * (config.blocks - 1)]
            resample = Down(width) if i + 1 < len(widths) else None
            self.levels.append(Level([Block(one, width, groups) for one in ins], resample))
        self.middle = Middle(widths[-1], groups, config.attention)
        self.norm = nn.GroupNorm(groups, widths[-1], eps=1e-6)
        self.exit = nn.Conv2d(widths[-1], 2 * config.latent, 3, padding=1)

    def forward(self, images: Tensor) -> Tensor:
        h = self.entry(images)
        for level in self.levels:
            h = through(level, self.checkpointing, h)
        out: Tensor = self.exit(F.silu(self.norm(through(self.middle, self.checkpointing, h))))
        return out


class Decoder(nn.Module):
    """(B, latent, h, w) to pictures (B, in_channels, f h, f w). Its levels stand in the order in which they run."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        self.checkpointing = False
        widths, groups = config.channels[::-1], config.groups
        self.entry = nn.Conv2d(config.latent, widths[0], 3, padding=1)
        self.middle = Middle(widths[0], groups, config.attention)
        self.levels = nn.ModuleList()
        for i, width in enumerate(widths):
            ins = [widths[max(i - 1, 0)], *[width] * config.blocks]
            resample = Up(width) if i + 1 < len(widths) else None
            self.levels.append(Level([Block(one, width, groups) for one in ins], resample))
        self.norm = nn.GroupNorm(groups, widths[-1], eps=1e-6)
        self.exit = nn.Conv2d(widths[-1], config.in_channels, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        h = through(self.middle, self.checkpointing, self.entry(z))
        for level in self.levels:
            h = through(level, self.checkpointing, h)
        out: Tensor = self.exit(F.silu(self.norm(h)))
        return out


class Level(nn.Module):
    """Residual blocks at one size, and the change to the next."""

    def __init__(self, blocks: list["Block"], resample: nn.Module | None) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.resample = nn.Identity() if resample is None else resample

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        out: Tensor = self.resample(x)
        return out


class Block(nn.Module):
    """Norm, swish, convolution, twice, added to its input."""

    def __init__(self, width: int, out: int, groups: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, width, eps=1e-6)
        self.conv1 = nn.Conv2d(width, out, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, out, eps=1e-6)
        self.conv2 = nn.Conv2d(out, out, 3, padding=1)
        self.skip = nn.Conv2d(width, out, 1) if width != out else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        out: Tensor = self.skip(x) + self.conv2(F.silu(self.norm2(h)))
        return out


class Down(nn.Module):
    """Half the size. The picture is padded to the right and below only, as it was published."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(F.pad(x, (0, 1, 0, 1)))
        return out


class Up(nn.Module):
    """Twice the size, by repeating pixels."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return out


class Middle(nn.Module):
    """The bottom: two residual blocks, and a self-attention between them."""

    def __init__(self, width: int, groups: int, attention: bool) -> None:
        super().__init__()
        self.first, self.second = Block(width, width, groups), Block(width, width, groups)
        self.attention = PlaceAttention(width, groups) if attention else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.second(self.attention(self.first(x)))
        return out


class PlaceAttention(nn.Module):
    """One head of attention of all places to each other, added to its input."""

    def __init__(self, width: int, groups: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(groups, width, eps=1e-6)
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.norm(x).flatten(2).transpose(1, 2)
        q, k, v = (part(tokens)[:, None] for part in (self.q, self.k, self.v))
        y: Tensor = self.out(attended(q, k, v)[:, 0])
        return x + y.transpose(1, 2).unflatten(2, x.shape[2:])


def _checked(config: AutoencoderConfig) -> None:
    where = "model.codec"
    if not config.channels or min(config.channels) < 1:
        raise ConfigError("every level has a width", where=f"{where}.channels", seen=str(list(config.channels)))
    for name in ("in_channels", "latent", "blocks", "groups"):
        if getattr(config, name) < 1:
            raise ConfigError(f"{name} is at least 1", where=f"{where}.{name}", seen=str(getattr(config, name)))
    if any(width % config.groups for width in config.channels):
        seen = f"{list(config.channels)}, groups {config.groups}"
        raise ConfigError("widths divide into the groups", where=f"{where}.channels", seen=seen, fix="groups=8")

"""The U-Net of DDPM (Ho et al. 2020), ADM (Dhariwal & Nichol 2021) and consistency models, for published weights.

Residual blocks on every level, self-attention over the places of the levels that have any, and every feature map of
the way down joined to its partner on the way up. DDPM adds the time between a block's two convolutions, and halves and
doubles the size by convolutions; ADM sets the scale and shift of a block's second norm, resamples inside a residual
block, adds a class to the time and gives every head a fixed width. To train from nothing there is `sfumato.nets.unet`,
which also reads words; this one is for checkpoints, and its layers are theirs one by one.
"""

from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sfumato.errors import ConfigError
from sfumato.nets.layers import Attention, Numbers, resampled, sinusoid, through, zeroed


@dataclass(frozen=True)
class PixelUNetConfig:
    """The shape of a U-Net of the DDPM family.

    channels: the width of each level, from the full size down; every level but the last halves the picture.
    blocks: residual blocks a level; the way up has one more. heads: attention heads of each level, 0 for no attention.
    middle: those at the bottom. modulation: how blocks take time and class, "add" (DDPM) or "scale" (ADM). resample:
    how sizes change, by a "convolution" (DDPM) or inside a residual "block" (ADM). pad_after: the halving convolution
    pads only right and below, as in DDPM's own code.
    frequencies: of the time's sinusoid, 0 for as many as the first level is wide; the embedding is 4 times as wide.
    sines_first, include_end: see `sfumato.nets.layers.sinusoid`; DDPM has both.
    classes: 0 for none. unlabelled: whether there is one more, for "no class". context_dim: this net reads no words.
    told: numbers beside the time, see `sfumato.nets.layers.Numbers`.
    """

    size: int | tuple[int, int] = 32
    in_channels: int = 3
    out_channels: int | None = None
    channels: tuple[int, ...] = (128, 256, 256, 256)
    blocks: int = 2
    heads: tuple[int, ...] = (0, 1, 0, 0)
    middle: int = 1
    modulation: Literal["add", "scale"] = "add"
    resample: Literal["convolution", "block"] = "convolution"
    pad_after: bool = False
    frequencies: int = 0
    sines_first: bool = False
    include_end: bool = False
    classes: int = 0
    unlabelled: bool = True
    context_dim: int = 0
    groups: int = 32
    eps: float = 1e-5
    dropout: float = 0.0
    told: tuple[Literal["guidance", "until"], ...] = ()


_DDPM = PixelUNetConfig(pad_after=True, sines_first=True, include_end=True, eps=1e-6)
_ADM = PixelUNetConfig(
    size=64,
    out_channels=6,
    channels=(192, 384, 576, 768),
    blocks=3,
    heads=(0, 6, 9, 12),
    middle=12,
    modulation="scale",
    resample="block",
    classes=1000,
    unlabelled=False,
)
_ADM_256 = replace(
    _ADM, size=256, channels=(256, 256, 512, 512, 1024, 1024), blocks=2, heads=(0, 0, 0, 8, 16, 16), middle=16
)
PRESETS = {
    "ddpm-32": _DDPM,
    "ddpm-256": replace(_DDPM, size=256, channels=(128, 128, 256, 256, 512, 512), heads=(0, 0, 0, 0, 1, 0)),
    "adm-64": _ADM,
    "adm-128": replace(_ADM, size=128, channels=(256, 256, 512, 768, 1024), blocks=2, heads=(0, 0, 4, 4, 4), middle=4),
    "adm-256": _ADM_256,
    "adm-256-unconditional": replace(_ADM_256, classes=0),
    "adm-512": replace(
        _ADM_256,
        size=512,
        channels=(128, 256, 256, 512, 512, 1024, 1024),
        heads=(0, 0, 0, 0, 8, 16, 16),
        frequencies=256,
    ),
    "consistency-64": replace(_ADM, out_channels=3),
    "consistency-256": replace(_ADM_256, out_channels=3, modulation="add", classes=0),
}


def preset(name: str, **changes: object) -> PixelUNetConfig:
    """A published shape, with changes: those of `PRESETS`, Google's DDPM, OpenAI's ADM and consistency models."""
    if name not in PRESETS:
        raise ConfigError("no such preset", where="preset", seen=name, fix=", ".join(PRESETS))
    return replace(PRESETS[name], **changes)  # type: ignore[arg-type]


class PixelUNet(nn.Module):
    """Pictures (B, in_channels, H, W) and times (B,) to (B, out_channels, H, W); sizes divide by 2^(levels - 1).

    label: (B,) from 0 to classes - 1, or `classes` for none where that is known. ConfigError without a label where it
    is not.
    """

    def __init__(self, config: PixelUNetConfig) -> None:
        super().__init__()
        _checked(config)
        self.config, self.checkpointing = config, False
        widths, frequencies = config.channels, _frequencies(config)
        dim = 4 * frequencies
        self.time = nn.Sequential(nn.Linear(frequencies, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.numbers = Numbers(config.told, dim)
        self.label = nn.Embedding(config.classes + config.unlabelled, dim) if config.classes else None
        self.entry = nn.Conv2d(config.in_channels, widths[0], 3, padding=1)
        self.down, kept = self._way_down(dim)
        self.middle = Middle(config, dim)
        self.up = self._way_up(dim, kept)
        self.norm = nn.GroupNorm(config.groups, widths[0], eps=config.eps)
        self.exit = zeroed(nn.Conv2d(widths[0], config.out_channels or config.in_channels, 3, padding=1))

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        *,
        label: Tensor | None = None,
        guidance: Tensor | None = None,
        until: Tensor | None = None,
    ) -> Tensor:
        self._check_size(x)
        summary, recompute = self._summary(x, t, label, guidance, until), self.checkpointing
        h = self.entry(x)
        kept = [h]
        for stage in self.down:
            h = through(stage, recompute, h, summary)
            kept.append(h)
        h = through(self.middle, recompute, h, summary)
        for stage in self.up:
            h = through(stage, recompute, torch.cat([h, kept.pop()], 1), summary)
        out: Tensor = self.exit(F.silu(self.norm(h)))
        return out

    def _summary(self, x: Tensor, t: Tensor, label: Tensor | None, *numbers: Tensor | None) -> Tensor:
        """What residual blocks are told, (B, dim)."""
        config = self.config
        waves = sinusoid(t, _frequencies(config), sines_first=config.sines_first, include_end=config.include_end)
        summary: Tensor = self.numbers(self.time(waves.to(x.dtype)), t, *numbers)
        if self.label is not None:
            if label is None and not config.unlabelled:
                raise ConfigError("this network draws no picture without a class", where="label", fix="a label")
            none = torch.full_like(t, config.classes, dtype=torch.long) if label is None else label
            summary = summary + self.label(none)
        return F.silu(summary)

    def _way_down(self, dim: int) -> tuple[nn.ModuleList, list[int]]:
        config, stages, kept = self.config, nn.ModuleList(), [self.config.channels[0]]
        for level, width in enumerate(config.channels):
            for _ in range(config.blocks):
                stages.append(Stage(config, kept[-1], level, dim))
                kept.append(width)
            if level + 1 < len(config.channels):
                stages.append(resampler(config, width, dim, "down"))
                kept.append(width)
        return stages, kept

    def _way_up(self, dim: int, kept: list[int]) -> nn.ModuleList:
        config, stages, width = self.config, nn.ModuleList(), self.config.channels[-1]
        for level in reversed(range(len(config.channels))):
            for i in range(config.blocks + 1):
                last = i == config.blocks and level > 0
                stages.append(Stage(config, width + kept.pop(), level, dim, grows=last))
                width = config.channels[level]
        return stages

    def _check_size(self, x: Tensor) -> None:
        whole = 2 ** (len(self.config.channels) - 1)
        if x.shape[-2] % whole or x.shape[-1] % whole:
            raise ConfigError(
                "a picture cannot be halved as often as this U-Net does",
                where="size",
                seen=f"{x.shape[-2]}x{x.shape[-1]}",
                fix=f"sizes that are multiples of {whole}",
            )


def _frequencies(config: PixelUNetConfig) -> int:
    return config.frequencies or config.channels[0]


class Stage(nn.Module):
    """A residual block, the attention after it, and on the way up perhaps the step to the next size."""

    def __init__(self, config: PixelUNetConfig, width: int, level: int, dim: int, *, grows: bool = False) -> None:
        super().__init__()
        out, heads = config.channels[level], config.heads[level]
        self.residual = ResBlock(config, width, out, dim)
        self.layer = AttentionLayer(config, out, heads) if heads else None
        self.grow = resampler(config, out, dim, "up") if grows else None

    def forward(self, x: Tensor, summary: Tensor) -> Tensor:
        x = self.residual(x, summary)
        if self.layer is not None:
            x = self.layer(x)
        return x if self.grow is None else self.grow(x, summary)


class Middle(nn.Module):
    """The bottom: two residual blocks, and attention between them."""

    def __init__(self, config: PixelUNetConfig, dim: int) -> None:
        super().__init__()
        width = config.channels[-1]
        self.first, self.second = (ResBlock(config, width, width, dim) for _ in range(2))
        self.layer = AttentionLayer(config, width, config.middle) if config.middle else None

    def forward(self, x: Tensor, summary: Tensor) -> Tensor:
        x = self.first(x, summary)
        if self.layer is not None:
            x = self.layer(x)
        out: Tensor = self.second(x, summary)
        return out


class ResBlock(nn.Module):
    """Norm, swish, convolution, twice, added to what came in; the summary (B, dim) comes between the two."""

    def __init__(
        self,
        config: PixelUNetConfig,
        width: int,
        out: int,
        dim: int,
        resample: Literal["up", "down"] | None = None,
    ) -> None:
        super().__init__()
        self.resample, self.scales = resample, config.modulation == "scale"
        self.norm1 = nn.GroupNorm(config.groups, width, eps=config.eps)
        self.conv1 = nn.Conv2d(width, out, 3, padding=1)
        self.told = nn.Linear(dim, 2 * out if self.scales else out)
        self.norm2 = nn.GroupNorm(config.groups, out, eps=config.eps)
        self.dropout = nn.Dropout(config.dropout)
        self.conv2 = zeroed(nn.Conv2d(out, out, 3, padding=1))
        self.skip = nn.Conv2d(width, out, 1) if width != out else nn.Identity()

    def forward(self, x: Tensor, summary: Tensor) -> Tensor:
        h = self.conv1(resampled(F.silu(self.norm1(x)), self.resample))
        told = self.told(summary)[:, :, None, None]
        if self.scales:
            scale, shift = told.chunk(2, 1)
            h = torch.addcmul(shift, self.norm2(h), 1 + scale)
        else:
            h = self.norm2(h + told)
        out: Tensor = self.skip(resampled(x, self.resample)) + self.conv2(self.dropout(F.silu(h)))
        return out


class AttentionLayer(nn.Module):
    """Self-attention over the places of a feature map (B, width, h, w), added to it."""

    def __init__(self, config: PixelUNetConfig, width: int, heads: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(config.groups, width, eps=config.eps)
        self.attention = Attention(width, heads)
        zeroed(self.attention.out)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.attention(self.norm(x).flatten(2).transpose(1, 2))
        return x + tokens.transpose(1, 2).unflatten(2, x.shape[2:])


def resampler(config: PixelUNetConfig, width: int, dim: int, way: Literal["up", "down"]) -> nn.Module:
    """What changes a feature map's size: called with it and the summary."""
    if config.resample == "block":
        return ResBlock(config, width, width, dim, way)
    return Resample(width, way, config.pad_after)


class Resample(nn.Module):
    """Half or twice the size, by a convolution."""

    def __init__(self, width: int, way: Literal["up", "down"], pad_after: bool) -> None:
        super().__init__()
        self.grows, self.pad_after = way == "up", pad_after and way == "down"
        stride, padding = (1, 1) if self.grows else (2, 0 if self.pad_after else 1)
        self.conv = nn.Conv2d(width, width, 3, stride=stride, padding=padding)

    def forward(self, x: Tensor, summary: Tensor) -> Tensor:
        if self.grows:
            x = F.interpolate(x, scale_factor=2.0, mode="nearest")
        out: Tensor = self.conv(F.pad(x, (0, 1, 0, 1)) if self.pad_after else x)
        return out


def _checked(config: PixelUNetConfig) -> None:
    where, widths = "model.net", config.channels
    if not widths or config.blocks < 1:
        seen = f"channels {list(widths)}, blocks {config.blocks}"
        raise ConfigError("every level has a width and a block", where=f"{where}.channels", seen=seen)
    if len(config.heads) != len(widths):
        seen = f"{list(config.heads)} for {len(widths)} levels"
        raise ConfigError("heads needs one number a level", where=f"{where}.heads", seen=seen)
    if config.groups < 1 or any(width % config.groups for width in widths):
        seen = f"{list(widths)}, groups {config.groups}"
        raise ConfigError("widths divide into the groups", where=f"{where}.channels", seen=seen, fix="groups=8")
    heads = [*zip(widths, config.heads, strict=True), (widths[-1], config.middle)]
    if any(one < 0 or (one and width % one) for width, one in heads):
        seen = f"channels {list(widths)}, heads {list(config.heads)}, middle {config.middle}"
        raise ConfigError("a width does not divide into heads", where=f"{where}.heads", seen=seen)
    if config.context_dim:
        raise ConfigError(
            "this U-Net reads no words",
            where=where,
            seen=f"context_dim {config.context_dim}",
            fix="model.net.kind=unet, or model.conditioner=labels",
        )
    height, width = (config.size, config.size) if isinstance(config.size, int) else config.size
    whole = 2 ** (len(widths) - 1)
    if height % whole or width % whole:
        raise ConfigError(
            "the size cannot be halved as often as this U-Net does",
            where=f"{where}.channels",
            seen=f"size {height}x{width}, {len(widths)} levels",
            fix=f"sizes that are multiples of {whole}",
        )

"""The U-Net of diffusion: residual blocks with adaptive group norms, attention where it pays (Ho et al. 2020;
Dhariwal & Nichol 2021, "ADM").

The picture goes down through levels of falling size and rising width and back up, every feature map of the way down
joined to its partner on the way up. The time, the label and the pooled prompt set each block's scale and shift after
its second norm; resampling happens inside a residual block. Attention runs over the pixels of the levels that ask for
it, and over the prompt: `text="cross"` in a layer of its own (Rombach et al. 2022), `text="joint"` as further keys and
values of the self-attention (ADM's and GLIDE's way).
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sfumato.errors import ConfigError
from sfumato.nets.layers import (
    Attention,
    FeedForward,
    Numbers,
    TimeEmbedding,
    resampled,
    sincos_2d,
    summed,
    through,
    zeroed,
)


@dataclass(frozen=True)
class UNetConfig:
    """The shape of a U-Net.

    channels: the width of each level, from the full size down; every level but the last halves the picture.
    blocks: residual blocks a level, one number or one for each; the way up has one more.
    attention: how many attention layers follow each residual block of a level, 0 for none.
    middle: attention layers at the bottom, between two residual blocks. head: channels an attention head.
    feed: a feed-forward layer after each attention, as in a transformer. patch: pixels folded into channels at the
    door, which makes a big picture cheap. size, classes, context_dim, pooled_dim, out_channels, told: as for
    `DiTConfig`.
    """

    size: int | tuple[int, int] = 32
    channels: tuple[int, ...] = (128, 256, 256)
    blocks: int | tuple[int, ...] = 2
    attention: tuple[int, ...] = (0, 1, 1)
    middle: int = 1
    head: int = 64
    feed: bool = False
    patch: int = 1
    in_channels: int = 3
    out_channels: int | None = None
    classes: int = 0
    context_dim: int = 0
    pooled_dim: int = 0
    text: Literal["joint", "cross"] = "cross"
    qk_norm: bool = False
    dropout: float = 0.0
    told: tuple[Literal["guidance", "until"], ...] = ()

    @property
    def per_level(self) -> tuple[int, ...]:
        return (self.blocks,) * len(self.channels) if isinstance(self.blocks, int) else tuple(self.blocks)


class UNet(nn.Module):
    """Pictures (B, C, H, W) and times (B,) to (B, out_channels, H, W); sizes divide by patch * 2^(levels - 1)."""

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        _checked(config)
        self.config, self.checkpointing = config, False
        widths, area = config.channels, config.patch**2
        dim = 4 * widths[0]
        self.time = TimeEmbedding(dim)
        self.numbers = Numbers(config.told, dim)
        self.label = nn.Embedding(config.classes + 1, dim) if config.classes else None
        self.pooled = nn.Linear(config.pooled_dim, dim) if config.pooled_dim else None
        self.entry = nn.Conv2d(config.in_channels * area, widths[0], 3, padding=1)
        self.down, kept = self._way_down(dim)
        self.middle = nn.ModuleList(
            [Stage(config, widths[-1], widths[-1], dim, config.middle), Stage(config, widths[-1], widths[-1], dim, 0)]
        )
        self.up = self._way_up(dim, kept)
        self.norm = nn.GroupNorm(_groups(widths[0]), widths[0], eps=1e-5)
        self.exit = zeroed(nn.Conv2d(widths[0], (config.out_channels or config.in_channels) * area, 3, padding=1))

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        *,
        label: Tensor | None = None,
        context: Tensor | None = None,
        context_mask: Tensor | None = None,
        pooled: Tensor | None = None,
        guidance: Tensor | None = None,
        until: Tensor | None = None,
    ) -> Tensor:
        self._check_size(x)
        summary = self._summary(t, label, pooled, guidance, until)
        context = context if self.config.context_dim else None
        h = self.entry(F.pixel_unshuffle(x, self.config.patch) if self.config.patch > 1 else x)
        kept = [h]
        told, recompute = (summary, context, context_mask), self.checkpointing
        for stage in self.down:
            h = through(stage, recompute, h, *told)
            kept.append(h)
        for stage in self.middle:
            h = through(stage, recompute, h, *told)
        for stage in self.up:
            h = through(stage, recompute, torch.cat([h, kept.pop()], 1) if stage.joins else h, *told)
        h = self.exit(F.silu(self.norm(h)))
        return F.pixel_shuffle(h, self.config.patch) if self.config.patch > 1 else h

    def _way_down(self, dim: int) -> tuple[nn.ModuleList, list[int]]:
        config, stages, kept = self.config, nn.ModuleList(), [self.config.channels[0]]
        for level, width in enumerate(config.channels):
            for _ in range(config.per_level[level]):
                stages.append(Stage(config, kept[-1], width, dim, config.attention[level]))
                kept.append(width)
            if level + 1 < len(config.channels):
                stages.append(Stage(config, width, width, dim, 0, resample="down"))
                kept.append(width)
        return stages, kept

    def _way_up(self, dim: int, kept: list[int]) -> nn.ModuleList:
        config, stages, width = self.config, nn.ModuleList(), self.config.channels[-1]
        for level in reversed(range(len(config.channels))):
            for _ in range(config.per_level[level] + 1):
                stage = Stage(
                    config, width + kept.pop(), config.channels[level], dim, config.attention[level], joins=True
                )
                stages.append(stage)
                width = config.channels[level]
            if level:
                stages.append(Stage(config, width, width, dim, 0, resample="up"))
        return stages

    def _summary(self, t: Tensor, label: Tensor | None, pooled: Tensor | None, *numbers: Tensor | None) -> Tensor:
        told = self.numbers(self.time(t), t, *numbers)
        return F.silu(summed(told, label, pooled, self.label, self.pooled))

    def _check_size(self, x: Tensor) -> None:
        height, width = x.shape[-2:]
        whole = self.config.patch * 2 ** (len(self.config.channels) - 1)
        if height % whole or width % whole:
            raise ConfigError(
                "a picture cannot be halved as often as this U-Net does",
                where="size",
                seen=f"{height}x{width}",
                fix=f"sizes that are multiples of {whole}",
            )


class Stage(nn.Module):
    """One residual block and the attention layers after it."""

    def __init__(
        self,
        config: UNetConfig,
        width: int,
        out: int,
        dim: int,
        attention: int,
        *,
        resample: Literal["up", "down"] | None = None,
        joins: bool = False,
    ) -> None:
        super().__init__()
        self.joins = joins
        self.residual = ResBlock(width, out, dim, config.dropout, resample)
        self.attention = nn.ModuleList(AttentionLayer(config, out) for _ in range(attention))

    def forward(self, x: Tensor, summary: Tensor, context: Tensor | None, mask: Tensor | None) -> Tensor:
        x = self.residual(x, summary)
        if not self.attention:
            return x
        height, width = x.shape[-2:]
        tokens = x.flatten(2).transpose(1, 2)
        tokens = tokens + sincos_2d(height, width, tokens.shape[-1], x.device).to(tokens.dtype)
        for layer in self.attention:
            tokens = layer(tokens, context, mask)
        return tokens.transpose(1, 2).unflatten(2, (height, width))


class ResBlock(nn.Module):
    """Norm, swish, convolution, twice; the second norm's scale and shift come from the summary (B, dim)."""

    def __init__(self, width: int, out: int, dim: int, dropout: float, resample: Literal["up", "down"] | None) -> None:
        super().__init__()
        self.resample = resample
        self.norm1 = nn.GroupNorm(_groups(width), width, eps=1e-5)
        self.conv1 = nn.Conv2d(width, out, 3, padding=1)
        self.modulation = nn.Linear(dim, 2 * out)
        self.norm2 = nn.GroupNorm(_groups(out), out, eps=1e-5)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = zeroed(nn.Conv2d(out, out, 3, padding=1))
        self.skip = nn.Conv2d(width, out, 1) if width != out else nn.Identity()

    def forward(self, x: Tensor, summary: Tensor) -> Tensor:
        h = self.conv1(resampled(F.silu(self.norm1(x)), self.resample))
        scale, shift = self.modulation(summary)[:, :, None, None].chunk(2, 1)
        h = torch.addcmul(shift, self.norm2(h), 1 + scale)
        out: Tensor = self.skip(resampled(x, self.resample)) + self.conv2(self.dropout(F.silu(h)))
        return out


class AttentionLayer(nn.Module):
    """Attention of a level's pixels (B, HW, C) to each other and to the prompt, each added to what it was given."""

    def __init__(self, config: UNetConfig, width: int) -> None:
        super().__init__()
        heads, crosses = max(1, width // config.head), config.context_dim > 0 and config.text == "cross"
        extra = config.context_dim if config.text == "joint" else 0
        self.norm = nn.LayerNorm(width)
        self.attention = Attention(width, heads, extra_dim=extra, qk_norm=config.qk_norm)
        self.cross_norm = nn.LayerNorm(width) if crosses else None
        self.cross = (
            Attention(width, heads, context_dim=config.context_dim, qk_norm=config.qk_norm) if crosses else None
        )
        self.feed_norm = nn.LayerNorm(width) if config.feed else None
        self.feed = FeedForward(width) if config.feed else None
        for last in (self.attention.out, self.cross and self.cross.out, self.feed and self.feed.down):
            if last is not None:
                zeroed(last)

    def forward(self, x: Tensor, context: Tensor | None, mask: Tensor | None) -> Tensor:
        keys = None
        if self.cross is None and mask is not None and context is not None:
            keys = torch.cat([mask.new_ones(x.shape[:2]), mask], 1)
        x = x + self.attention(self.norm(x), context if self.cross is None else None, keys)
        if self.cross is not None and self.cross_norm is not None and context is not None:
            x = x + self.cross(self.cross_norm(x), context, mask)
        if self.feed is not None and self.feed_norm is not None:
            x = x + self.feed(self.feed_norm(x))
        return x


def _groups(width: int) -> int:
    return next(
        groups for groups in (32, 16, 8, 4, 2, 1) if (width % groups == 0 and width // groups >= 4) or groups == 1
    )


def _checked(config: UNetConfig) -> None:
    where, levels = "model.net", len(config.channels)
    for name, given in (("channels", config.channels), ("blocks", config.per_level)):
        if not given or min(given) < 1:
            raise ConfigError(f"{name} is at least 1 on every level", where=f"{where}.{name}", seen=str(list(given)))
    for name in ("head", "patch", "in_channels"):
        if getattr(config, name) < 1:
            raise ConfigError(f"{name} is at least 1", where=f"{where}.{name}", seen=str(getattr(config, name)))
    for name, given in (("attention", config.attention), ("blocks", config.per_level)):
        if len(given) != levels:
            raise ConfigError(
                f"{name} needs one number a level", where=f"{where}.{name}", seen=f"{list(given)} for {levels} levels"
            )
    height, width = (config.size, config.size) if isinstance(config.size, int) else config.size
    whole = config.patch * 2 ** (levels - 1)
    if height % whole or width % whole:
        raise ConfigError(
            "the size cannot be halved as often as this U-Net does",
            where=f"{where}.channels",
            seen=f"size {height}x{width}, {levels} levels, patch {config.patch}",
            fix=f"sizes that are multiples of {whole}",
        )
    if any(c % 4 for c in config.channels):
        raise ConfigError("widths must be multiples of 4", where=f"{where}.channels", seen=str(list(config.channels)))
    heads = [c for c, n in zip(config.channels, config.attention, strict=True) if n or c == config.channels[-1]]
    if any(c % max(1, c // config.head) for c in heads):
        raise ConfigError(
            "a width does not divide into heads",
            where=f"{where}.head",
            seen=f"channels {heads}, head {config.head}",
            fix=f"{where}.head=32",
        )

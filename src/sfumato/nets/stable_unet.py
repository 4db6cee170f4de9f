"""The U-Net of Stable Diffusion (Rombach et al. 2022; SDXL: Podell et al. 2024), as its published weights need it.

Residual blocks take the time by addition; after each, at the levels that have any, stand transformers over the places
of the feature map: self-attention, cross-attention to the words, and a gated feed-forward. SDXL also adds a vector, of
the pooled prompt and the picture's size and crop, to the time; latent consistency models add the guidance. To train
from nothing there is `sfumato.nets.unet`; this one is for checkpoints, and its layers are theirs one by one.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sfumato.errors import ConfigError
from sfumato.nets.layers import Numbers, attended, mlp, sinusoid, through, zeroed


@dataclass(frozen=True)
class StableUNetConfig:
    """The shape of a Stable Diffusion U-Net.

    channels: the width of each level, from the latent's size down; every level but the last halves it.
    depths: transformer blocks after each residual block of a level, 0 for none. middle: those at the bottom.
    heads: attention heads of each level. linear: whether transformers are entered by linear layers, as since SD 2, or
    by convolutions of 1x1: the same numbers, stored differently.
    pooled_dim: of the vector that SDXL is told, 0 for none. guidance_dim: of the embedded guidance of latent
    consistency models, 0 for none. size: of the latent map; others that divide will do.
    told: further numbers beside the time, see `sfumato.nets.layers.Numbers`; the guidance is not told twice.
    """

    size: int | tuple[int, int] = 64
    in_channels: int = 4
    out_channels: int = 4
    channels: tuple[int, ...] = (320, 640, 1280, 1280)
    blocks: int = 2
    depths: tuple[int, ...] = (1, 1, 1, 0)
    middle: int = 1
    heads: tuple[int, ...] = (8, 8, 8, 8)
    context_dim: int = 768
    pooled_dim: int = 0
    guidance_dim: int = 0
    linear: bool = False
    groups: int = 32
    dropout: float = 0.0
    told: tuple[Literal["guidance", "until"], ...] = ()


_XL = StableUNetConfig(
    size=128,
    channels=(320, 640, 1280),
    depths=(0, 2, 10),
    middle=10,
    heads=(5, 10, 20),
    context_dim=2048,
    pooled_dim=2816,
    linear=True,
)
PRESETS = {
    "sd15": StableUNetConfig(),
    "sd15-inpainting": StableUNetConfig(in_channels=9),
    "sd15-lcm": StableUNetConfig(size=96, guidance_dim=256),
    "sd21": StableUNetConfig(size=96, heads=(5, 10, 20, 20), context_dim=1024, linear=True),
    "sdxl": _XL,
    "sdxl-refiner": replace(
        _XL,
        channels=(384, 768, 1536, 1536),
        depths=(0, 4, 4, 0),
        middle=4,
        heads=(6, 12, 24, 24),
        context_dim=1280,
        pooled_dim=2560,
    ),
}


def preset(name: str, **changes: object) -> StableUNetConfig:
    """A published shape, with changes: "sd15", "sd21", "sdxl", "sdxl-refiner", "sd15-inpainting", "sd15-lcm"."""
    if name not in PRESETS:
        raise ConfigError("no such preset", where="preset", seen=name, fix=", ".join(PRESETS))
    return replace(PRESETS[name], **changes)  # type: ignore[arg-type]


Told = tuple[Tensor, Tensor | None, Tensor | None]  # what stages are told: summary, context, context_mask


class WayDown(nn.Module):
    """The first half: from latents to the skips and the middle. A ControlNet is a copy of it.

    widths: of the skips, in the order in which they are made.
    """

    def __init__(self, config: StableUNetConfig) -> None:
        super().__init__()
        _checked(config)
        self.checkpointing, self._shape = False, config
        widths = config.channels
        dim = 4 * widths[0]
        self.time = nn.Sequential(nn.Linear(widths[0], dim), nn.SiLU(), nn.Linear(dim, dim))
        self.guided = zeroed(nn.Linear(config.guidance_dim, widths[0], bias=False)) if config.guidance_dim else None
        self.pooled = mlp(config.pooled_dim, dim) if config.pooled_dim else None
        self.numbers = Numbers([one for one in config.told if not (one == "guidance" and config.guidance_dim)], dim)
        self.entry = nn.Conv2d(config.in_channels, widths[0], 3, padding=1)
        self.down, self.widths = self._way_down(dim)
        self.middle = Middle(config, dim)

    def descended(self, h: Tensor, told: Told) -> tuple[list[Tensor], Tensor]:
        """The skips, the first of which is h itself, and the middle."""
        kept = [h]
        for stage in self.down:
            kept.append(through(stage, self.checkpointing, kept[-1], *told))
        return kept, through(self.middle, self.checkpointing, kept[-1], *told)

    def summary(
        self, x: Tensor, t: Tensor, pooled: Tensor | None, guidance: Tensor | None, until: Tensor | None
    ) -> Tensor:
        """What residual blocks are told, (B, dim)."""
        embedded = sinusoid(t, self._shape.channels[0]).to(x.dtype)
        if self.guided is not None and guidance is not None:
            scaled = 1000 * guidance.float()
            waves = sinusoid(scaled, self._shape.guidance_dim, sines_first=True, include_end=True)
            embedded = embedded + self.guided(waves.to(x.dtype))
        summary: Tensor = self.numbers(self.time(embedded), t, guidance, until)
        if self.pooled is not None and pooled is not None:
            summary = summary + self.pooled(pooled)
        return F.silu(summary)

    def _way_down(self, dim: int) -> tuple[nn.ModuleList, list[int]]:
        config, stages, kept = self._shape, nn.ModuleList(), [self._shape.channels[0]]
        for level, width in enumerate(config.channels):
            for _ in range(config.blocks):
                stages.append(Stage(config, kept[-1], level, dim))
                kept.append(width)
            if level + 1 < len(config.channels):
                stages.append(Down(width))
                kept.append(width)
        return stages, kept

    def check_size(self, x: Tensor) -> None:
        """ConfigError for latents that cannot be halved as often as the levels do."""
        whole = 2 ** (len(self._shape.channels) - 1)
        if x.shape[-2] % whole or x.shape[-1] % whole:
            raise ConfigError(
                "latents cannot be halved as often as this U-Net does",
                where="size",
                seen=f"{x.shape[-2]}x{x.shape[-1]}",
                fix=f"sizes that are multiples of {whole}",
            )


class StableUNet(WayDown):
    """Latents (B, in_channels, h, w) and indices of times (B,) from 0 to 999 to (B, out_channels, h, w).

    context: (B, words, context_dim). pooled: (B, pooled_dim). guidance: (B,), the weight scale - 1 where the shape
    is published, and the scale itself where the network is `told` it. until: (B,). residuals: what is
    added to the skips, one for each in the order of the way down, and last to the middle (`nets.controlnet`).
    """

    def __init__(self, config: StableUNetConfig) -> None:
        super().__init__(config)
        self.config, width = config, config.channels[0]
        self.up = self._way_up(4 * width, list(self.widths))
        self.norm = nn.GroupNorm(config.groups, width, eps=1e-5)
        self.exit = zeroed(nn.Conv2d(width, config.out_channels, 3, padding=1))

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        *,
        context: Tensor | None = None,
        context_mask: Tensor | None = None,
        pooled: Tensor | None = None,
        guidance: Tensor | None = None,
        until: Tensor | None = None,
        residuals: Sequence[Tensor] | None = None,
    ) -> Tensor:
        self.check_size(x)
        told = (self.summary(x, t, pooled, guidance, until), context, context_mask)
        kept, h = self.descended(self.entry(x), told)
        if residuals is not None:
            *added, last = residuals
            kept, h = [one + more for one, more in zip(kept, added, strict=True)], h + last
        for stage in self.up:
            h = through(stage, self.checkpointing, torch.cat([h, kept.pop()], 1), *told)
        out: Tensor = self.exit(F.silu(self.norm(h)))
        return out

    def _way_up(self, dim: int, kept: list[int]) -> nn.ModuleList:
        config, stages, width = self.config, nn.ModuleList(), self.config.channels[-1]
        for level in reversed(range(len(config.channels))):
            for i in range(config.blocks + 1):
                last = i == config.blocks and level > 0
                stages.append(Stage(config, width + kept.pop(), level, dim, grows=last))
                width = config.channels[level]
        return stages


class Stage(nn.Module):
    """A residual block, the transformer after it, and on the way up perhaps the step to the next size."""

    def __init__(self, config: StableUNetConfig, width: int, level: int, dim: int, *, grows: bool = False) -> None:
        super().__init__()
        out, depth = config.channels[level], config.depths[level]
        self.residual = ResBlock(width, out, dim, config)
        self.transformer = Transformer(config, out, config.heads[level], depth) if depth else None
        self.grow = nn.Conv2d(out, out, 3, padding=1) if grows else None

    def forward(self, x: Tensor, summary: Tensor, context: Tensor | None, mask: Tensor | None) -> Tensor:
        x = self.residual(x, summary)
        if self.transformer is not None:
            x = self.transformer(x, context, mask)
        if self.grow is not None:
            x = self.grow(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return x


class Down(nn.Module):
    """Half the size."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, stride=2, padding=1)

    def forward(self, x: Tensor, *_: object) -> Tensor:
        out: Tensor = self.conv(x)
        return out


class Middle(nn.Module):
    """The bottom: two residual blocks, and a transformer between them."""

    def __init__(self, config: StableUNetConfig, dim: int) -> None:
        super().__init__()
        width = config.channels[-1]
        self.first, self.second = (ResBlock(width, width, dim, config) for _ in range(2))
        self.transformer = Transformer(config, width, config.heads[-1], config.middle) if config.middle else None

    def forward(self, x: Tensor, summary: Tensor, context: Tensor | None, mask: Tensor | None) -> Tensor:
        x = self.first(x, summary)
        if self.transformer is not None:
            x = self.transformer(x, context, mask)
        out: Tensor = self.second(x, summary)
        return out


class ResBlock(nn.Module):
    """Norm, swish, convolution, twice; the summary (B, dim) is added between the two."""

    def __init__(self, width: int, out: int, dim: int, config: StableUNetConfig) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(config.groups, width, eps=1e-5)
        self.conv1 = nn.Conv2d(width, out, 3, padding=1)
        self.told = nn.Linear(dim, out)
        self.norm2 = nn.GroupNorm(config.groups, out, eps=1e-5)
        self.dropout = nn.Dropout(config.dropout)
        self.conv2 = zeroed(nn.Conv2d(out, out, 3, padding=1))
        self.skip = nn.Conv2d(width, out, 1) if width != out else nn.Identity()

    def forward(self, x: Tensor, summary: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x))) + self.told(summary)[:, :, None, None]
        out: Tensor = self.skip(x) + self.conv2(self.dropout(F.silu(self.norm2(h))))
        return out


class Transformer(nn.Module):
    """Transformer blocks over the places of a feature map (B, width, h, w), added to it."""

    def __init__(self, config: StableUNetConfig, width: int, heads: int, depth: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(config.groups, width, eps=1e-6)
        self.entry = nn.Linear(width, width)
        self.blocks = nn.ModuleList(TransformerBlock(width, heads, config.context_dim) for _ in range(depth))
        self.exit = zeroed(nn.Linear(width, width))

    def forward(self, x: Tensor, context: Tensor | None, mask: Tensor | None) -> Tensor:
        tokens = self.entry(self.norm(x).flatten(2).transpose(1, 2))
        for block in self.blocks:
            tokens = block(tokens, context, mask)
        return x + self.exit(tokens).transpose(1, 2).unflatten(2, x.shape[2:])


class TransformerBlock(nn.Module):
    """Self-attention, cross-attention to the words (nothing where there are none), and a gated feed-forward layer."""

    def __init__(self, width: int, heads: int, context_dim: int) -> None:
        super().__init__()
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(width) for _ in range(3))
        self.attention = PlainAttention(width, heads, width)
        self.cross = PlainAttention(width, heads, context_dim)
        self.gated = nn.Linear(width, 8 * width)
        self.last = nn.Linear(4 * width, width)

    def forward(self, x: Tensor, context: Tensor | None, mask: Tensor | None) -> Tensor:
        y = self.norm1(x)
        x = x + self.attention(y, y, None)
        if context is not None:
            x = x + self.cross(self.norm2(x), context, mask)
        value, gate = self.gated(self.norm3(x)).chunk(2, -1)
        out: Tensor = x + self.last(value * F.gelu(gate))
        return out


class PlainAttention(nn.Module):
    """Multi-head attention of x (B, L, width) over keys (B, M, key_dim), without biases but the last."""

    def __init__(self, width: int, heads: int, key_dim: int) -> None:
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(width, width, bias=False)
        self.k, self.v = (nn.Linear(key_dim, width, bias=False) for _ in range(2))
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor, keys: Tensor, mask: Tensor | None) -> Tensor:
        parts = (self.q(x), self.k(keys), self.v(keys))
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts)
        out: Tensor = self.out(attended(q, k, v, mask).transpose(1, 2).flatten(2))
        return out


def _checked(config: StableUNetConfig) -> None:
    where, levels = "model.net", len(config.channels)
    for name in ("depths", "heads"):
        if len(getattr(config, name)) != levels:
            seen = f"{list(getattr(config, name))} for {levels} levels"
            raise ConfigError(f"{name} needs one number a level", where=f"{where}.{name}", seen=seen)
    if any(width % config.groups for width in config.channels):
        seen = f"{list(config.channels)}, groups {config.groups}"
        raise ConfigError("widths divide into the groups", where=f"{where}.channels", seen=seen, fix="groups=8")
    if any(width % heads for width, heads in zip(config.channels, config.heads, strict=True)):
        seen = f"channels {list(config.channels)}, heads {list(config.heads)}"
        raise ConfigError("a width does not divide into heads", where=f"{where}.heads", seen=seen)
    if config.context_dim < 1:
        raise ConfigError(
            "this U-Net reads words", where=where, seen="no context", fix="model.net.kind=unet, which need not"
        )

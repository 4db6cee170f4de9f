"""DiT: a vision transformer over patches, told the time by adaptive layer norms (Peebles & Xie 2023).

Each block's shift, scale and gate come from the sum of the time's, the label's and the pooled prompt's embeddings;
gates start at zero, so a fresh network's attention and feed-forward layers leave its residual stream as it is
(adaLN-Zero). Text comes in by `text="joint"`: its tokens run in the same sequence as the patches, as in U-ViT (Bao et
al. 2023), or by `text="cross"`: a cross-attention in every block. `skips` adds U-ViT's long connections. With
cross-attention, `adaln="shared"` and `span` it is PixArt-alpha and PixArt-Sigma (Chen et al. 2023, 2024).
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sfumato.errors import ConfigError
from sfumato.nets.layers import (
    Attention,
    FeedForward,
    Neighbours,
    Numbers,
    TimeEmbedding,
    modulated,
    rope_2d,
    sincos_2d,
    summed,
    through,
    zeroed,
)
from sfumato.nets.patches import check_patches, folded, grid_of, unfolded


@dataclass(frozen=True)
class DiTConfig:
    """The shape of a DiT. `PRESETS` has the paper's.

    size: (height, width) it is made for; others of whole patches work too, since positions are computed.
    classes: labels 0..classes-1, and `classes` itself for "none". context_dim, pooled_dim: widths of the prompt's
    tokens and of its summary, 0 for none. out_channels: in_channels unless said.
    adaln: "block" has each block compute its own modulation; "shared" computes it once, with an offset learned a
    block (PixArt-alpha's adaLN-single), which saves a third of the weights.
    span: positions run evenly from 0 up to it along both axes, whatever the size; 0 lets neighbours stand 1 apart.
    unsaid: words of a learned caption that stands for one of which no word counts; 0 for none. sizes: is told the
    picture's height, width and their ratio, so that it can be trained on small pictures without imitating them.
    local: `Neighbours` before each attention, which small data and short training reward. activation: see
    `FeedForward`.
    told: numbers beside the time, see `sfumato.nets.layers.Numbers`.
    """

    size: int | tuple[int, int] = 32
    patch: int = 2
    dim: int = 384
    depth: int = 12
    heads: int = 6
    mlp_ratio: float = 4.0
    in_channels: int = 3
    out_channels: int | None = None
    classes: int = 0
    context_dim: int = 0
    pooled_dim: int = 0
    text: Literal["joint", "cross"] = "joint"
    positions: Literal["sincos", "rope"] = "sincos"
    adaln: Literal["block", "shared"] = "block"
    qk_norm: bool = False
    skips: bool = False
    local: bool = False
    activation: Literal["gelu", "relu2"] = "gelu"
    dropout: float = 0.0
    span: float = 0.0
    unsaid: int = 0
    sizes: bool = False
    told: tuple[Literal["guidance", "until"], ...] = ()


_XL = DiTConfig(dim=1152, depth=28, heads=16)
_PIXART = replace(_XL, in_channels=4, out_channels=8, context_dim=4096, text="cross", adaln="shared", span=32)
PRESETS = {
    "S": DiTConfig(dim=384, depth=12, heads=6),
    "B": DiTConfig(dim=768, depth=12, heads=12),
    "L": DiTConfig(dim=1024, depth=24, heads=16),
    "XL": _XL,
    "pixart-256": replace(_PIXART, size=32),
    "pixart-512": replace(_PIXART, size=64),
    "pixart-1024": replace(_PIXART, size=128, sizes=True),
    "pixart-sigma": replace(_PIXART, size=128),
    "pixart-sigma-2048": replace(_PIXART, size=256),
}


def preset(name: str, **changes: object) -> DiTConfig:
    """The paper's S, B, L or XL, with changes: `preset("B", patch=4, size=64)`; "B/4" says the patch too. PixArt's are
    named by their pictures: "pixart-256", "pixart-1024", "pixart-sigma".
    """
    size, _, patch = name.partition("/")
    if size not in PRESETS or not (patch.isdigit() or not patch):
        fix = f"one of {', '.join(PRESETS)}, or with a patch: B/2"
        raise ConfigError("no such DiT", where="preset", seen=name, fix=fix)
    base = replace(PRESETS[size], patch=int(patch)) if patch else PRESETS[size]
    return replace(base, **changes)  # type: ignore[arg-type]


class DiT(nn.Module):
    """Pictures (B, C, H, W) and times (B,) to (B, out_channels, H, W); H and W are multiples of the patch.

    label: (B,). context: (B, words, context_dim); context_mask: (B, words) bool, True where a word counts. pooled:
    (B, pooled_dim). sizes: (B, 3), height and width in pixels, and the one over the other.
    """

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        _checked(config)
        self.config, self.checkpointing = config, False
        dim, area = config.dim, config.patch**2
        self.patches = nn.Linear(config.in_channels * area, dim)
        self.time = TimeEmbedding(dim)
        self.numbers = Numbers(config.told, dim)
        self.label = nn.Embedding(config.classes + 1, dim) if config.classes else None
        self.pooled = nn.Linear(config.pooled_dim, dim) if config.pooled_dim else None
        self.context = _captions(config) if config.context_dim else None
        self.unsaid = _unsaid(config) if config.unsaid and config.context_dim else None
        self.sizes = Sizes(dim) if config.sizes else None
        self.shared = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim)) if config.adaln == "shared" else None
        self.blocks: Iterable[Block] = nn.ModuleList(  # type: ignore[assignment]
            Block(config, skip=config.skips and i >= (config.depth + 1) // 2) for i in range(config.depth)
        )
        out = area * (config.out_channels or config.in_channels)
        self.head = Head(dim, out, shared=config.adaln == "shared")
        self._initialise()

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        *,
        label: Tensor | None = None,
        context: Tensor | None = None,
        context_mask: Tensor | None = None,
        pooled: Tensor | None = None,
        sizes: Tensor | None = None,
        guidance: Tensor | None = None,
        until: Tensor | None = None,
    ) -> Tensor:
        grid = grid_of(x, self.config.patch)
        tokens = self.patches(folded(x, self.config.patch))
        rope = None
        if self.config.positions == "sincos":
            tokens = tokens + positions(self.config, grid, x.device).to(tokens.dtype)
        summary = self._summary(self.numbers(self.time(t), t, guidance, until), label, pooled, sizes)
        (words, mask), before = self._words(context, context_mask), 0
        if words is not None and self.config.text == "joint":
            before = words.shape[1]
            tokens = torch.cat([words.to(tokens.dtype), tokens], 1)
            mask = None if mask is None else torch.cat([mask, mask.new_ones(len(x), grid[0] * grid[1])], 1)
        if self.config.positions == "rope":
            rope = rope_2d(*grid, self.config.dim // self.config.heads, before, device=x.device)
        tokens = self._through(tokens, summary, words, mask, rope, grid)[:, before:]
        return unfolded(self.head(tokens, summary), grid, self.config.patch)

    def _through(self, tokens: Tensor, summary: Tensor, *rest: object) -> Tensor:
        modulation = summary if self.shared is None else self.shared(summary)
        kept: list[Tensor] = []
        for block in self.blocks:
            skip = kept.pop() if block.skip is not None else None
            tokens = through(block, self.checkpointing, tokens, modulation, skip, *rest)
            if self.config.skips and len(kept) < self.config.depth // 2 and skip is None:
                kept.append(tokens)
        return tokens

    def _summary(self, told: Tensor, label: Tensor | None, pooled: Tensor | None, sizes: Tensor | None) -> Tensor:
        summary = summed(told, label, pooled, self.label, self.pooled)
        if self.sizes is not None and sizes is not None:
            summary = summary + self.sizes(sizes)
        return summary

    def _words(self, context: Tensor | None, mask: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        if self.context is None or context is None:
            return None, None
        if self.unsaid is not None and mask is not None:
            missing = max(0, context.shape[1] - len(self.unsaid))
            null = F.pad(self.unsaid, (0, 0, 0, missing))[: context.shape[1]].to(context.dtype)
            silent = ~mask.any(1, keepdim=True)
            context = torch.where(silent[..., None], null, context)
            mask = mask | silent & (torch.arange(context.shape[1], device=mask.device) < len(self.unsaid))
        words: Tensor = self.context(context)
        return words, mask

    def _initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        embeddings = [self.time] if self.sizes is None else [self.time, self.sizes.side, self.sizes.ratio]
        for layer in (*(layer for one in embeddings for layer in one.mlp), self.label):
            if isinstance(layer, (nn.Linear, nn.Embedding)):
                nn.init.normal_(layer.weight, std=0.02)
        self.numbers.reset()
        zeroed(self.head)
        for block in self.blocks:
            block.zero()
        if self.shared is not None:
            zeroed(self.shared)


class Block(nn.Module):
    """Attention and a feed-forward layer, each between an adaptive layer norm and a gate; text by cross-attention."""

    def __init__(self, config: DiTConfig, skip: bool) -> None:
        super().__init__()
        dim, crosses = config.dim, config.text == "cross" and config.context_dim > 0
        self.local = Neighbours(dim) if config.local else None
        self.norm1 = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        self.attention = Attention(dim, config.heads, qk_norm=config.qk_norm)
        self.cross = Attention(dim, config.heads, context_dim=dim, qk_norm=config.qk_norm) if crosses else None
        self.norm2 = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        self.feed = FeedForward(dim, config.mlp_ratio, config.activation)
        self.skip = nn.Linear(2 * dim, dim) if skip else None
        self.dropout = nn.Dropout(config.dropout)
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim)) if config.adaln == "block" else None
        self.offset = nn.Parameter(torch.zeros(6, dim)) if config.adaln == "shared" else None

    def forward(
        self,
        x: Tensor,
        summary: Tensor,
        skip: Tensor | None,
        words: Tensor | None,
        mask: Tensor | None,
        rope: tuple[Tensor, Tensor] | None,
        grid: tuple[int, int] | None = None,
    ) -> Tensor:
        if self.skip is not None and skip is not None:
            x = self.skip(torch.cat([x, skip], -1))
        if self.local is not None and grid is not None:
            x = self.local(x, grid)
        six = summary if self.modulation is None else self.modulation(summary)
        if self.offset is not None:
            six = six + self.offset.flatten()
        shift1, scale1, gate1, shift2, scale2, gate2 = six.chunk(6, -1)
        seen = self.attention(modulated(self.norm1(x), shift1, scale1), mask=None if self.cross else mask, rope=rope)
        x = x + gate1[:, None] * self.dropout(seen)
        if self.cross is not None and words is not None:
            x = x + self.cross(x, words, mask)
        return x + gate2[:, None] * self.dropout(self.feed(modulated(self.norm2(x), shift2, scale2)))

    def zero(self) -> None:
        """adaLN-Zero: every gate, shift and scale starts at zero, and the cross-attention says nothing yet."""
        if self.modulation is not None:
            zeroed(self.modulation)
        if self.cross is not None:
            zeroed(self.cross.out)


class Head(nn.Module):
    """The last norm, adapted to the time, and the way back to pixels. shared: adapted by learned offsets alone."""

    def __init__(self, dim: int, out: int, shared: bool = False) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        self.modulation = None if shared else nn.Sequential(nn.SiLU(), nn.Linear(dim, 2 * dim))
        self.offset = nn.Parameter(torch.zeros(2, dim)) if shared else None
        self.out = nn.Linear(dim, out)

    def forward(self, x: Tensor, summary: Tensor) -> Tensor:
        two = summary.repeat(1, 2) if self.modulation is None else self.modulation(summary)
        if self.offset is not None:
            two = two + self.offset.flatten()
        shift, scale = two.chunk(2, -1)
        out: Tensor = self.out(modulated(self.norm(x), shift, scale))
        return out


class Sizes(nn.Module):
    """Heights, widths and their ratios (B, 3) to (B, dim), of which each has a third (PixArt-alpha, section 2.4)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.side, self.ratio = TimeEmbedding(dim // 3), TimeEmbedding(dim // 3)

    def forward(self, sizes: Tensor) -> Tensor:
        height, width, ratio = sizes.unbind(1)
        return torch.cat([self.side(height), self.side(width), self.ratio(ratio)], 1)


def positions(config: DiTConfig, grid: tuple[int, int], device: torch.device | None = None) -> Tensor:
    """Where the patches of a grid stand, (height * width, dim)."""
    height, width = grid
    step = (config.span / height, config.span / width) if config.span else 1.0
    return sincos_2d(height, width, config.dim, device, step=step)


def _captions(config: DiTConfig) -> nn.Module:
    """From what the encoder says of each word to what the network reads."""
    entry = nn.Linear(config.context_dim, config.dim)
    if config.text == "joint":
        return entry
    return nn.Sequential(entry, nn.GELU(approximate="tanh"), nn.Linear(config.dim, config.dim))


def _unsaid(config: DiTConfig) -> nn.Parameter:
    return nn.Parameter(torch.randn(config.unsaid, config.context_dim) / config.context_dim**0.5)


def _checked(config: DiTConfig) -> None:
    where = "model.net"
    if config.span and config.positions == "rope":
        raise ConfigError("rotary positions have no span", where=f"{where}.span", seen="rope", fix=f"{where}.span=0")
    if config.sizes and config.dim % 3:
        seen = f"dim {config.dim}"
        raise ConfigError(
            "three numbers share the width evenly", where=f"{where}.sizes", seen=seen, fix="a multiple of 12"
        )
    check_patches(config, "patch", "dim", "depth", "heads", "in_channels")
    if config.dim % config.heads:
        raise ConfigError(
            "the width does not divide into the heads",
            where=f"{where}.heads",
            seen=f"dim {config.dim}, heads {config.heads}",
            fix=f"a divisor of {config.dim}",
        )
    if config.dim % 4 or (config.positions == "rope" and (config.dim // config.heads) % 4):
        raise ConfigError(
            "positions in a plane need widths that are multiples of 4",
            where=f"{where}.dim",
            seen=f"dim {config.dim}, heads {config.heads}",
        )

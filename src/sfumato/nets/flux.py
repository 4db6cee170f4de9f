"""FLUX.1: a rectified flow transformer of two streams, then one (Black Forest Labs 2024).

In double blocks the picture's tokens and the prompt's have weights of their own and meet in one attention, as in MMDiT;
in single blocks all are one sequence, and attention and feed-forward layer run side by side (ViT-22B) into one way out.
Each head's channels turn with the picture's number, the row and the column (RoPE); the prompt's tokens stay at the
origin. The time, the pooled prompt and, where it was distilled, the guidance set every shift, scale and gate.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sfumato.errors import ConfigError
from sfumato.nets.dit import Head
from sfumato.nets.layers import (
    FeedForward,
    Neighbours,
    Numbers,
    RMSNorm,
    TimeEmbedding,
    attended,
    mlp,
    modulated,
    summed,
    through,
    turns,
    zeroed,
)
from sfumato.nets.patches import check_patches, folded, grid_of, unfolded

Rope = tuple[Tensor, Tensor]  # cosines and sines (L, head / 2) of each token's places


@dataclass(frozen=True)
class FluxConfig:
    """The shape of a FLUX transformer. `PRESETS` has the published ones.

    size: (height, width) it is made for; others of whole patches work too, since positions are computed.
    double, single: blocks of each kind. axes: of each head's channels, how many turn with the picture's number, the
    row and the column; about an eighth, and the rest in halves, unless said. theta: the slowest of them takes about so
    many places for a radian. out_channels: in_channels unless said; fewer where the network is shown more than it
    draws (a masked picture, a depth map). context_dim, pooled_dim: widths of the prompt's tokens and of its summary, 0
    for none. classes: labels 0..classes-1, and `classes` itself for "none". guidance: whether it is told a scale, as
    dev is. told: further numbers beside the time, see `sfumato.nets.layers.Numbers`; the scale is not told twice.
    local: `Neighbours` before each block, which no published weights have, and which small data and short training
    reward.
    """

    size: int | tuple[int, int] = 32
    patch: int = 2
    dim: int = 384
    double: int = 4
    single: int = 8
    heads: int = 6
    mlp_ratio: float = 4.0
    axes: tuple[int, int, int] | None = None
    theta: float = 10_000.0
    in_channels: int = 16
    out_channels: int | None = None
    classes: int = 0
    context_dim: int = 0
    pooled_dim: int = 0
    guidance: bool = False
    dropout: float = 0.0
    told: tuple[Literal["guidance", "until"], ...] = ()
    local: bool = False

    @property
    def turning(self) -> tuple[int, int, int]:
        """Channels of a head that turn with each axis."""
        if self.axes is not None:
            first, rows, columns = self.axes
            return first, rows, columns
        head = self.dim // self.heads
        plane = 2 * (7 * head // 32)
        return head - 2 * plane, plane, plane


_SCHNELL = FluxConfig(
    size=128, dim=3072, double=19, single=38, heads=24, axes=(16, 56, 56), context_dim=4096, pooled_dim=768
)
_DEV = replace(_SCHNELL, guidance=True)
PRESETS = {
    "schnell": _SCHNELL,
    "dev": _DEV,
    "dev-depth": replace(_DEV, in_channels=32, out_channels=16),
    "dev-fill": replace(_DEV, in_channels=96, out_channels=16),
}


def preset(name: str, **changes: object) -> FluxConfig:
    """A published shape, with changes: "dev", "schnell", "dev-depth" (Canny is the same), "dev-fill"."""
    if name not in PRESETS:
        raise ConfigError("no such preset", where="preset", seen=name, fix=", ".join(PRESETS))
    return replace(PRESETS[name], **changes)  # type: ignore[arg-type]


class FluxEntry(nn.Module):
    """What a FLUX transformer and a control of one share: everything before the blocks."""

    def __init__(self, config: FluxConfig) -> None:
        super().__init__()
        _checked(config)
        self.checkpointing, self._shape = False, config
        dim = config.dim
        self.entry = nn.Linear(config.in_channels * config.patch**2, dim)
        self.time = TimeEmbedding(dim)
        self.guided = TimeEmbedding(dim) if config.guidance else None
        self.numbers = Numbers([one for one in config.told if not (one == "guidance" and config.guidance)], dim)
        self.pooled = mlp(config.pooled_dim, dim) if config.pooled_dim else None
        self.label = nn.Embedding(config.classes + 1, dim) if config.classes else None
        self.context = nn.Linear(config.context_dim, dim) if config.context_dim else None
        counts = {"doubles": config.double, "singles": config.single} if config.local else {}
        self.local = nn.ModuleDict(
            {kind: nn.ModuleList(Neighbours(dim) for _ in range(count)) for kind, count in counts.items()}
        )

    def near(self, tokens: Tensor, kind: str, block: int, grid: tuple[int, int]) -> Tensor:
        """Tokens as a block of a kind, "doubles" or "singles", is given them."""
        if not self.local:
            return tokens
        mixed: Tensor = self.local[kind][block](tokens, grid)  # type: ignore[index]
        return mixed

    def places(self, grid: tuple[int, int], before: int, device: torch.device) -> Rope:
        """Rotary positions of so many words and of a picture's patches."""
        return places(*grid, self._shape.turning, before, self._shape.theta, device)

    def summary(
        self,
        t: Tensor,
        label: Tensor | None,
        pooled: Tensor | None,
        guidance: Tensor | None,
        until: Tensor | None,
    ) -> Tensor:
        """What every modulation is made from, (B, dim)."""
        summary: Tensor = self.numbers(self.time(t), t, guidance, until)
        if self.guided is not None:
            summary = summary + self.guided(1000 * (torch.ones_like(t) if guidance is None else guidance))
        return summed(summary, label, pooled, self.label, self.pooled)


class Flux(FluxEntry):
    """Latents (B, in_channels, H, W) and times (B,), in thousandths, to (B, out_channels, H, W).

    context: (B, words, context_dim); context_mask: (B, words) bool, True where a word counts, though the published
    weights were trained without one. pooled: (B, pooled_dim). label: (B,). guidance: (B,), a scale; 1 unless told.
    residuals: what is added to the picture's tokens after each block, the double ones and then the single ones; None
    for nothing (`nets.control_flux`). Raises ConfigError for sizes that are no whole number of patches.
    """

    def __init__(self, config: FluxConfig) -> None:
        super().__init__(config)
        self.config = config
        self.double_blocks: Iterable[DoubleBlock] = nn.ModuleList(  # type: ignore[assignment]
            DoubleBlock(config) for _ in range(config.double)
        )
        self.single_blocks: Iterable[SingleBlock] = nn.ModuleList(  # type: ignore[assignment]
            SingleBlock(config) for _ in range(config.single)
        )
        self.head = Head(config.dim, config.patch**2 * (config.out_channels or config.in_channels))
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
        guidance: Tensor | None = None,
        until: Tensor | None = None,
        residuals: Sequence[Tensor | None] | None = None,
    ) -> Tensor:
        grid, config = grid_of(x, self.config.patch), self.config
        tokens = self.entry(folded(x, config.patch))
        words = None if self.context is None or context is None else self.context(context)
        before, mask = 0 if words is None else words.shape[1], None
        if words is not None and context_mask is not None:
            mask = torch.cat([context_mask, context_mask.new_ones(len(x), grid[0] * grid[1])], 1)
        told = (self.summary(t, label, pooled, guidance, until), mask, self.places(grid, before, x.device))
        added = list(residuals) if residuals is not None else [None] * (config.double + config.single)
        for i, (double, one) in enumerate(zip(self.double_blocks, added, strict=False)):
            tokens = self.near(tokens, "doubles", i, grid)
            tokens, words = through(double, self.checkpointing, tokens, words, *told)
            tokens = tokens if one is None else tokens + one
        tokens = tokens if words is None else torch.cat([words, tokens], 1)
        for i, (single, one) in enumerate(zip(self.single_blocks, added[config.double :], strict=True)):
            tokens = self.near(tokens, "singles", i, grid)
            tokens = through(single, self.checkpointing, tokens, *told)
            tokens = tokens if one is None else tokens + F.pad(one, (0, 0, before, 0))
        return unfolded(self.head(tokens[:, before:], told[0]), grid, config.patch)

    def _initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        embeddings = (*self.time.mlp, *(self.guided.mlp if self.guided else ()), *(self.pooled or ()), self.label)
        for module in embeddings:
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)
        self.numbers.reset()
        zeroed(self.head)
        for double in self.double_blocks:
            double.zero()
        for single in self.single_blocks:
            single.zero()


class DoubleBlock(nn.Module):
    """One attention over the prompt's tokens (B, M, dim) and the picture's (B, L, dim), then a feed-forward layer for
    each. Without a prompt the picture attends to itself.
    """

    def __init__(self, config: FluxConfig) -> None:
        super().__init__()
        self.image = Stream(config)
        self.text = Stream(config) if config.context_dim else None

    def forward(
        self, x: Tensor, words: Tensor | None, summary: Tensor, mask: Tensor | None, rope: Rope
    ) -> tuple[Tensor, Tensor | None]:
        told = self.image.modulation(summary).chunk(6, -1)
        parts = self.image.heads(self.image.modulated(x, told))
        if self.text is None or words is None:
            return self.image(x, seen_by(parts, None, rope), told), words
        before, said = words.shape[1], self.text.modulation(summary).chunk(6, -1)
        q, k, v = (
            torch.cat(both, 1) for both in zip(self.text.heads(self.text.modulated(words, said)), parts, strict=True)
        )
        seen = seen_by((q, k, v), mask, rope)
        return self.image(x, seen[:, before:], told), self.text(words, seen[:, :before], said)

    def skipped(self, x: Tensor, words: Tensor | None, *_: object) -> tuple[Tensor, Tensor | None]:
        """What is left where this block is skipped (`sfumato.nets.variants`)."""
        return x, words

    def zero(self) -> None:
        """adaLN-Zero: every gate, shift and scale starts at zero."""
        for stream in (self.image, self.text):
            if stream is not None:
                zeroed(stream.modulation)


class Stream(nn.Module):
    """What one kind of tokens has of its own in a double block.

    modulation: from the summary, shift, scale and gate of the attention, then of the feed-forward layer. Called with
    the tokens, what their heads saw (B, L, dim), and the modulation in chunks.
    """

    def __init__(self, config: FluxConfig) -> None:
        super().__init__()
        dim = config.dim
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))
        self.norm1, self.norm2 = (nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False) for _ in range(2))
        self.heads = Heads(dim, config.heads)
        self.out = nn.Linear(dim, dim)
        self.feed = FeedForward(dim, config.mlp_ratio)
        self.dropout = nn.Dropout(config.dropout)

    def modulated(self, x: Tensor, told: tuple[Tensor, ...]) -> Tensor:
        """The tokens as their heads see them."""
        return modulated(self.norm1(x), told[0], told[1])

    def forward(self, x: Tensor, seen: Tensor, told: tuple[Tensor, ...]) -> Tensor:
        gate1, shift2, scale2, gate2 = told[2:]
        x = x + gate1[:, None] * self.dropout(self.out(seen))
        return x + gate2[:, None] * self.dropout(self.feed(modulated(self.norm2(x), shift2, scale2)))


class SingleBlock(nn.Module):
    """Attention and feed-forward layer of all tokens (B, L, dim) side by side, and one linear layer out of both."""

    def __init__(self, config: FluxConfig) -> None:
        super().__init__()
        dim, hidden = config.dim, int(config.dim * config.mlp_ratio)
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 3 * dim))
        self.norm = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        self.heads = Heads(dim, config.heads)
        self.up = nn.Linear(dim, hidden)
        self.out = nn.Linear(dim + hidden, dim)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, summary: Tensor, mask: Tensor | None, rope: Rope) -> Tensor:
        shift, scale, gate = self.modulation(summary).chunk(3, -1)
        y = modulated(self.norm(x), shift, scale)
        seen = seen_by(self.heads(y), mask, rope)
        return x + gate[:, None] * self.dropout(self.out(torch.cat([seen, F.gelu(self.up(y), approximate="tanh")], -1)))

    def skipped(self, x: Tensor, *_: object) -> Tensor:
        """What is left where this block is skipped."""
        return x

    def zero(self) -> None:
        """adaLN-Zero."""
        zeroed(self.modulation)


class Heads(nn.Module):
    """Tokens (B, L, dim) to queries and keys, RMS-normalised, and values (B, L, heads, dim / heads), in which order
    those of two kinds of tokens are joined without being scattered.
    """

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v = (nn.Linear(dim, dim) for _ in range(3))
        self.q_norm, self.k_norm = (RMSNorm(dim // heads) for _ in range(2))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = (part(x).unflatten(-1, (self.heads, -1)) for part in (self.q, self.k, self.v))
        return self.q_norm(q), self.k_norm(k), v


def seen_by(parts: tuple[Tensor, Tensor, Tensor], mask: Tensor | None, rope: Rope) -> Tensor:
    """What the heads see (B, L, dim), of queries and keys that are turned by their places first."""
    q, k, v = (part.transpose(1, 2) for part in parts)
    y = attended(turned(q, rope).to(v.dtype), turned(k, rope).to(v.dtype), v, mask)
    return y.transpose(1, 2).flatten(2)


def places(
    height: int,
    width: int,
    axes: tuple[int, int, int],
    before: int = 0,
    theta: float = 10_000.0,
    device: torch.device | None = None,
) -> Rope:
    """Rotary positions of `before` words, all at the origin, and of height * width patches, of the picture number 0.

    axes: the channels of a head that turn with the picture's number, the row and the column.
    """
    down, across = turns(height, axes[1] // 2, theta, device), turns(width, axes[2] // 2, theta, device)
    each = [
        down.new_zeros(height, width, axes[0] // 2),
        down[:, None].expand(height, width, -1),
        across[None].expand(height, width, -1),
    ]
    patches = torch.cat(each, -1).flatten(0, 1)
    whole = torch.cat([patches.new_zeros(before, patches.shape[1]), patches])
    return whole.cos().float(), whole.sin().float()


def turned(x: Tensor, rope: Rope) -> Tensor:
    """Queries or keys (B, heads, L, head), turned in float32 at least: channels 2 i and 2 i + 1 as one."""
    kind = torch.promote_types(x.dtype, torch.float32)
    cos, sin = (part.to(kind) for part in rope)
    first, second = x.to(kind).unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([first * cos - second * sin, first * sin + second * cos], -1).flatten(-2)


def _checked(config: FluxConfig) -> None:
    where = "model.net"
    check_patches(config, "patch", "dim", "heads", "in_channels")
    if config.double < 0 or config.single < 0 or config.double + config.single < 1:
        seen = f"double {config.double}, single {config.single}"
        raise ConfigError("a transformer has a block", where=f"{where}.double", seen=seen, fix=f"{where}.double=2")
    head = config.dim // config.heads
    if config.dim % config.heads or head % 2:
        raise ConfigError(
            "the width divides into heads of an even width",
            where=f"{where}.heads",
            seen=f"dim {config.dim}, heads {config.heads}",
            fix=f"{where}.heads={max(1, config.dim // 32)}",
        )
    if sum(config.turning) != head or min(config.turning) < 0 or any(one % 2 for one in config.turning):
        raise ConfigError(
            "the axes share out a head's channels, in even numbers",
            where=f"{where}.axes",
            seen=f"{list(config.turning)}, of {head}",
            fix=f"{where}.axes=null",
        )

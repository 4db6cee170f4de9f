"""MMDiT: a diffusion transformer with a stream for the picture and one for the prompt (Esser et al. 2024).

Each stream has weights of its own for norms, projections and feed-forward layers, and both meet in one attention over
all tokens; the prompt's tokens change from block to block as the picture's do. The time and the pooled prompt set every
block's shifts, scales and gates. It is the network of Stable Diffusion 3; 3.5 adds RMS-normalised queries and keys, and
in its medium size a second attention of the picture alone in the first blocks.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from typing import Literal

import torch
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
    sincos_2d,
    summed,
    through,
    zeroed,
)
from sfumato.nets.patches import check_patches, grid_of


@dataclass(frozen=True)
class MMDiTConfig:
    """The shape of an MMDiT. `PRESETS` has those of Stable Diffusion 3 and 3.5.

    size: (height, width) it is made for; others work too, and all are cut from the middle of the table of positions.
    table: positions a side of it, in patches; 0 for as many as `size` has. step: how far apart they stand.
    dual: the blocks with a second attention of the picture alone. qk_norm: RMS-normalised queries and keys.
    context_dim, pooled_dim: widths of the prompt's tokens and of its summary, 0 for none; without tokens there is one
    stream. classes: labels 0..classes-1, and `classes` itself for "none". out_channels: in_channels unless said.
    told: numbers beside the time, see `sfumato.nets.layers.Numbers`. local: `Neighbours` before each block, which no
    published weights have, and which small data and short training reward.
    """

    size: int | tuple[int, int] = 32
    patch: int = 2
    dim: int = 384
    depth: int = 12
    heads: int = 6
    mlp_ratio: float = 4.0
    in_channels: int = 16
    out_channels: int | None = None
    classes: int = 0
    context_dim: int = 0
    pooled_dim: int = 0
    qk_norm: bool = False
    dual: tuple[int, ...] = ()
    table: int = 0
    step: float = 1.0
    dropout: float = 0.0
    told: tuple[Literal["guidance", "until"], ...] = ()
    local: bool = False

    @property
    def grid(self) -> tuple[int, int]:
        """Patches down and across that it is made for."""
        height, width = (self.size, self.size) if isinstance(self.size, int) else self.size
        return height // self.patch, width // self.patch

    @property
    def side(self) -> int:
        """Positions down and across that the table has."""
        return self.table or max(self.grid)


_MEDIUM = MMDiTConfig(
    size=128, dim=1536, depth=24, heads=24, context_dim=4096, pooled_dim=2048, table=192, step=64 / 192
)
PRESETS = {
    "sd3-medium": _MEDIUM,
    "sd3.5-medium": replace(_MEDIUM, qk_norm=True, dual=tuple(range(13)), table=384, step=64 / 384),
    "sd3.5-large": replace(_MEDIUM, dim=2432, depth=38, heads=38, qk_norm=True),
}


def preset(name: str, **changes: object) -> MMDiTConfig:
    """A published shape, with changes: "sd3-medium", "sd3.5-medium", "sd3.5-large"."""
    if name not in PRESETS:
        raise ConfigError("no such preset", where="preset", seen=name, fix=", ".join(PRESETS))
    return replace(PRESETS[name], **changes)  # type: ignore[arg-type]


class JointEntry(nn.Module):
    """What an MMDiT and a control of one share: everything before the blocks."""

    positions: Tensor

    def __init__(self, config: MMDiTConfig, *, entry: bool = True) -> None:
        super().__init__()
        _checked(config)
        self.checkpointing, self._shape = False, config
        dim, side = config.dim, config.side
        self.entry = nn.Conv2d(config.in_channels, dim, config.patch, stride=config.patch) if entry else None
        if entry:
            self.register_buffer("positions", sincos_2d(side, side, dim, step=config.step)[None])
        self.time = TimeEmbedding(dim)
        self.numbers = Numbers(config.told, dim)
        self.pooled = mlp(config.pooled_dim, dim) if config.pooled_dim else None
        self.label = nn.Embedding(config.classes + 1, dim) if config.classes else None
        self.context = nn.Linear(config.context_dim, dim) if config.context_dim else None
        self.local = nn.ModuleList(Neighbours(dim) for _ in range(config.depth if config.local else 0))

    def near(self, tokens: Tensor, block: int, grid: tuple[int, int]) -> Tensor:
        """A picture's tokens as a block is given them."""
        return self.local[block](tokens, grid) if self.local else tokens

    def tokens(self, x: Tensor) -> Tensor:
        """A picture's tokens with their places, (B, L, dim)."""
        assert self.entry is not None
        height, width = self._grid(x)
        tokens: Tensor = self.entry(x).flatten(2).mT.contiguous()  # or every sum with them is scattered, too
        return tokens + self._places(height, width).to(tokens.dtype)

    def words(self, context: Tensor | None, mask: Tensor | None, length: int) -> tuple[Tensor | None, Tensor | None]:
        """The prompt's tokens, and what of them and of a picture of so many tokens counts; None where all does."""
        words = None if self.context is None or context is None else self.context(context)
        if words is None or mask is None:
            return words, None
        return words, torch.cat([mask, mask.new_ones(len(mask), length)], 1)

    def summary(self, t: Tensor, label: Tensor | None, pooled: Tensor | None, *numbers: Tensor | None) -> Tensor:
        """What every modulation is made from, (B, dim)."""
        return summed(self.numbers(self.time(t), t, *numbers), label, pooled, self.label, self.pooled)

    def _places(self, height: int, width: int) -> Tensor:
        """The middle of the table, (1, height * width, dim)."""
        side = self._shape.side
        top, left = (side - height) // 2, (side - width) // 2
        table = self.positions.unflatten(1, (side, side))
        return table[:, top : top + height, left : left + width].flatten(1, 2)

    def _grid(self, x: Tensor) -> tuple[int, int]:
        grid, side = grid_of(x, self._shape.patch), self._shape.side
        if max(grid) > side:
            raise ConfigError(
                "a picture is larger than the table of positions",
                where="size",
                seen=f"{x.shape[-2]}x{x.shape[-1]}",
                fix=f"at most {side * self._shape.patch} a side",
            )
        return grid


class MMDiT(JointEntry):
    """Latents (B, C, H, W) and times (B,), in thousandths, to (B, out_channels, H, W).

    context: (B, words, context_dim); context_mask: (B, words) bool, True where a word counts. pooled: (B, pooled_dim).
    label: (B,). residuals: what is added to the picture's tokens after each block, from the first on; None for nothing
    (`nets.control_mmdit`). Raises ConfigError for sizes that are no whole number of patches, or larger than the table.
    """

    def __init__(self, config: MMDiTConfig) -> None:
        super().__init__(config)
        self.config = config
        self.blocks: Iterable[JointBlock] = nn.ModuleList(  # type: ignore[assignment]
            JointBlock(config, dual=i in config.dual, last=i + 1 == config.depth) for i in range(config.depth)
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
        grid, tokens = self._grid(x), self.tokens(x)
        words, mask = self.words(context, context_mask, tokens.shape[1])
        summary = self.summary(t, label, pooled, guidance, until)
        for i, (block, added) in enumerate(zip_longest(self.blocks, residuals or ())):
            tokens = self.near(tokens, i, grid)
            tokens, words = through(block, self.checkpointing, tokens, words, summary, mask)
            tokens = tokens if added is None else tokens + added
        return _unfolded(self.head(tokens, summary), *grid, self.config.patch)

    def _initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)) and not isinstance(module, Neighbours):
                nn.init.xavier_uniform_(module.weight.view(len(module.weight), -1))
                nn.init.zeros_(module.bias)  # type: ignore[arg-type]
        for module in (*self.time.mlp, *(self.pooled or ()), self.label):
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)
        self.numbers.reset()
        zeroed(self.head)
        for block in self.blocks:
            block.zero()


class JointBlock(nn.Module):
    """One attention over the picture's tokens (B, L, dim) and the prompt's (B, M, dim), then a feed-forward layer for
    each. In the last block the prompt's are only attended to. Without a prompt the picture attends to itself.
    """

    def __init__(self, config: MMDiTConfig, *, dual: bool, last: bool) -> None:
        super().__init__()
        self.image = Stream(config, dual=dual)
        self.text = Stream(config, last=last) if config.context_dim else None

    def forward(
        self, x: Tensor, words: Tensor | None, summary: Tensor, mask: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        normed, told = self.image.norm1(x), self.image.modulation(summary).chunk(self.image.chunks, -1)
        parts = self.image.attention(modulated(normed, told[0], told[1]))
        if self.text is None or words is None:
            x = self.image(x, normed, seen_by(parts), told)
            return x, words
        before, said = words.shape[1], self.text.modulation(summary).chunk(self.text.chunks, -1)
        heard = self.text.norm1(words)
        heads = zip(self.text.attention(modulated(heard, said[0], said[1])), parts, strict=True)
        q, k, v = (torch.cat(both, 1) for both in heads)
        seen = seen_by((q, k, v), mask)
        x = self.image(x, normed, seen[:, before:], told)
        return x, words if self.text.last else self.text(words, heard, seen[:, :before], said)

    def skipped(self, x: Tensor, words: Tensor | None, *_: object) -> tuple[Tensor, Tensor | None]:
        """What is left where this block is skipped (`sfumato.nets.variants`)."""
        return x, words

    def zero(self) -> None:
        """adaLN-Zero: every gate, shift and scale starts at zero."""
        for stream in (self.image, self.text):
            if stream is not None:
                zeroed(stream.modulation)


class Stream(nn.Module):
    """What one kind of tokens has of its own in a joint block.

    modulation: from the summary, shift, scale and gate of the attention, then of the feed-forward layer, then of the
    second attention where there is one; of the last block's words, shift and scale alone. called with the tokens, the
    same normed, what the heads saw for them, and the modulation in chunks.
    """

    def __init__(self, config: MMDiTConfig, *, dual: bool = False, last: bool = False) -> None:
        super().__init__()
        dim, self.last = config.dim, last
        self.chunks = 2 if last else 9 if dual else 6
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, self.chunks * dim))
        self.norm1 = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        self.attention = Heads(dim, config.heads, config.qk_norm, last)
        self.second = Heads(dim, config.heads, config.qk_norm) if dual else None
        self.norm2 = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        self.feed = None if last else FeedForward(dim, config.mlp_ratio)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, normed: Tensor, seen: Tensor, told: tuple[Tensor, ...]) -> Tensor:
        gate1, shift2, scale2, gate2 = told[2:6]
        x = x + gate1[:, None] * self.dropout(self.attention.out(seen))
        if self.second is not None:
            shift, scale, gate = told[6:]
            alone = seen_by(self.second(modulated(normed, shift, scale)))
            x = x + gate[:, None] * self.dropout(self.second.out(alone))
        if self.feed is not None:
            x = x + gate2[:, None] * self.dropout(self.feed(modulated(self.norm2(x), shift2, scale2)))
        return x


class Heads(nn.Module):
    """Tokens (B, L, dim) to queries, keys and values (B, L, heads, dim / heads), in which order those of two kinds of
    tokens are joined without being scattered; and `out`, from what was seen back to tokens.

    silent: tokens that are only attended to have no way back.
    """

    def __init__(self, dim: int, heads: int, qk_norm: bool, silent: bool = False) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v = (nn.Linear(dim, dim) for _ in range(3))
        self.q_norm, self.k_norm = (RMSNorm(dim // heads) if qk_norm else nn.Identity() for _ in range(2))
        self.out = nn.Identity() if silent else nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = (part(x).unflatten(-1, (self.heads, -1)) for part in (self.q, self.k, self.v))
        return self.q_norm(q).to(v.dtype), self.k_norm(k).to(v.dtype), v


def seen_by(parts: tuple[Tensor, Tensor, Tensor], mask: Tensor | None = None) -> Tensor:
    """What the heads see, (B, L, dim)."""
    q, k, v = (part.transpose(1, 2) for part in parts)
    return attended(q, k, v, mask).transpose(1, 2).flatten(2)


def _unfolded(tokens: Tensor, height: int, width: int, patch: int) -> Tensor:
    """(B, height * width, patch^2 C) to (B, C, H, W), channels last within a patch."""
    x = tokens.reshape(len(tokens), height, width, patch, patch, -1)
    return x.permute(0, 5, 1, 3, 2, 4).reshape(len(tokens), -1, height * patch, width * patch)


def _checked(config: MMDiTConfig) -> None:
    where = "model.net"
    check_patches(config, "patch", "dim", "depth", "heads", "in_channels")
    if config.dim % config.heads or config.dim % 4:
        raise ConfigError(
            "the width is a multiple of 4 that divides into the heads",
            where=f"{where}.heads",
            seen=f"dim {config.dim}, heads {config.heads}",
            fix=f"a divisor of {config.dim}",
        )
    if config.side < max(config.grid):
        raise ConfigError(
            "the table of positions is smaller than the picture",
            where=f"{where}.table",
            seen=f"{config.table}, where the picture has {max(config.grid)} patches a side",
            fix=f"{where}.table={max(config.grid)}",
        )
    if odd := [i for i in config.dual if not 0 <= i < config.depth]:
        raise ConfigError("there is no such block", where=f"{where}.dual", seen=str(odd[0]))

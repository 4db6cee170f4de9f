"""The parts that more than one network is made of: embeddings of time and place, attention, and feed-forward layers."""

import math
from collections.abc import Sequence
from typing import Any, Literal, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sfumato import derivatives
from sfumato.errors import ConfigError

# Whether the CPU multiplies bfloat16 numbers itself.
BF16_ARITHMETIC: bool = getattr(torch.cpu, "_is_avx512_bf16_supported", bool)()
GUIDANCE_UNIT = 1000.0  # a sinusoid tells numbers apart that are some units apart, and scales are fractions apart
# How much faster the end of a jump is learned than its weights move: a student has hundreds of steps to catch up with
# the time, which its teacher learned in thousands, by optimizers whose steps have a size of their own.
UNTIL_GAIN = 8.0
SHORT = 128  # places up to which attention is cheap to keep


def sinusoid(
    t: Tensor,
    dim: int,
    max_period: float = 10_000.0,
    *,
    sines_first: bool = False,
    include_end: bool = False,
) -> Tensor:
    """Sinusoidal embedding of numbers (B,) -> (B, dim): cosines, then sines, of geometrically falling frequency.

    In float32 at least: at t of about 1000 a bfloat16 is off by several units. Vaswani et al. 2017; Ho et al. 2020.
    sines_first: the other order. include_end: the last frequency is 1 / max_period; else that would be the next one.
    DDPM's own code has both.
    """
    half, t = dim // 2, t.to(torch.promote_types(t.dtype, torch.float32))
    rate = -math.log(max_period) / (half - 1 if include_end else half)
    angles = t[:, None] * torch.exp(torch.arange(half, device=t.device, dtype=t.dtype) * rate)
    waves = [angles.sin(), angles.cos()] if sines_first else [angles.cos(), angles.sin()]
    return F.pad(torch.cat(waves, -1), (0, dim % 2))


def mlp(width: int, dim: int) -> nn.Sequential:
    """Two linear layers on the last axis, width to dim, with a SiLU between them: how numbers that are told come in."""
    return nn.Sequential(nn.Linear(width, dim), nn.SiLU(), nn.Linear(dim, dim))


class TimeEmbedding(nn.Module):
    """The network's time (B,) -> (B, dim): a sinusoid through a two-layer perceptron."""

    def __init__(self, dim: int, frequencies: int = 256) -> None:
        super().__init__()
        self.frequencies = frequencies
        self.mlp = mlp(frequencies, dim)

    def forward(self, t: Tensor) -> Tensor:
        out: Tensor = self.mlp(sinusoid(t, self.frequencies).to(next(self.mlp.parameters()).dtype))
        return out


class Numbers(nn.Module):
    """Numbers beside the time, each with an embedding of its own, which begins at zero: a network that is told more
    than it was begins by saying what it said.

    names: of "guidance", the scale of a guidance that the network is to answer for by itself (Meng et al. 2023), which
    is 1, off, unless told; and "until", the time at which a jump ends, in the unit of the network's time (MeanFlow and
    shortcut models, see `sfumato.denoiser.Denoise`), which is the time itself unless told.
    """

    def __init__(self, names: Sequence[str], dim: int) -> None:
        super().__init__()
        if unknown := set(names) - {"guidance", "until"}:
            fix = "guidance, until"
            raise ConfigError("a network is told no such number", where="model.net.told", seen=min(unknown), fix=fix)
        self.each = nn.ModuleDict({name: TimeEmbedding(dim) for name in names})
        self.reset()

    def reset(self) -> None:
        """Fresh weights, the last of them zero."""
        for one in self.each.values():
            first, _, last = one.mlp  # type: ignore[union-attr, misc]
            first.reset_parameters()
            zeroed(last)

    def forward(self, summary: Tensor, t: Tensor, guidance: Tensor | None, until: Tensor | None) -> Tensor:
        """The summary (B, dim) with what is told, (B,) each, added to it. t: the network's time."""
        if "guidance" in self.each:
            scale = torch.ones_like(t) if guidance is None else guidance
            summary = summary + self.each["guidance"](GUIDANCE_UNIT * scale)
        if "until" in self.each:
            summary = summary + UNTIL_GAIN * self.each["until"](t if until is None else until)
        return summary


def summed(
    summary: Tensor,
    label: Tensor | None,
    pooled: Tensor | None,
    labels: nn.Embedding | None,
    entry: nn.Module | None,
) -> Tensor:
    """What modulations are made from (B, dim): the time's embedding, with that of a class (B,) and of a prompt's
    summary (B, width) where the network has layers for them. Nothing said of a class is the last one, which means none.
    """
    if labels is not None:
        none = torch.full((len(summary),), labels.num_embeddings - 1, device=summary.device)
        summary = summary + labels(none if label is None else label)
    if entry is not None and pooled is not None:
        summary = summary + entry(pooled)
    return summary


def sincos_2d(
    height: int,
    width: int,
    dim: int,
    device: torch.device | None = None,
    *,
    step: float | tuple[float, float] = 1.0,
) -> Tensor:
    """Fixed positions (height * width, dim): half of the channels for the column, half for the row (MAE, DiT).

    step: how far apart neighbours stand, down and across.
    """
    steps = step if isinstance(step, tuple) else (step, step)
    sides = zip((height, width), steps, strict=True)
    down, across = (turns(length, dim // 4, 10_000.0, device) * by for length, by in sides)
    rows, columns = (torch.cat([angle.sin(), angle.cos()], 1).float() for angle in (down, across))
    return _in_plane(columns[None], rows[:, None], height, width)


def rope_2d(
    height: int, width: int, dim: int, before: int = 0, theta: float = 100.0, device: torch.device | None = None
) -> tuple[Tensor, Tensor]:
    """Axial rotary positions for one head of `dim` channels: cosines and sines (before + height * width, dim / 2).

    Half of the channel pairs turn with the row, half with the column; the `before` leading tokens (text) stay unturned.
    Su et al. 2021, axial as in EVA-02 and FLUX.
    """
    down, across = (turns(length, dim // 4, theta, device) for length in (height, width))
    angles = _in_plane(down[:, None], across[None], height, width)
    angles = torch.cat([angles.new_zeros(before, angles.shape[1]), angles])
    return angles.cos().float(), angles.sin().float()


def turns(length: int, count: int, period: float, device: torch.device | None) -> Tensor:
    """Each of `length` places times `count` falling frequencies, made where they are needed: copying would wait."""
    wide = torch.float32 if device is not None and device.type == "mps" else torch.float64  # Metal knows no float64
    freqs = period ** -(torch.arange(count, dtype=wide, device=device) / count)
    return torch.arange(length, dtype=wide, device=device)[:, None] * freqs


def _in_plane(first: Tensor, second: Tensor, height: int, width: int) -> Tensor:
    """What depends on the row (height, 1, n) or the column (1, width, n) side by side: (height * width, 2 n)."""
    return torch.cat([part.expand(height, width, -1) for part in (first, second)], -1).flatten(0, 1)


def rotated(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Queries or keys (B, heads, L, dim) turned by their places: channel i is paired with i + dim / 2."""
    cos, sin = (part.to(x.dtype) for part in rope)
    first, second = x.chunk(2, -1)
    return torch.cat([first * cos - second * sin, first * sin + second * cos], -1)


class Attention(nn.Module):
    """Multi-head attention of x (B, L, dim) over itself, or over `context` (B, M, context_dim) where that is set.

    extra: tokens (B, M, extra_dim) that are looked at beside x itself (GLIDE's and ADM's way to attend to text).
    mask: (B, keys) bool, True where a key counts. qk_norm: RMS-normalised queries and keys (ViT-22B), which keeps
    attention logits bounded however large the learning rate.
    """

    def __init__(
        self, dim: int, heads: int, *, context_dim: int = 0, extra_dim: int = 0, qk_norm: bool = False
    ) -> None:
        super().__init__()
        self.heads, self.crosses = heads, context_dim > 0
        self.q = nn.Linear(dim, dim)
        self.kv = nn.Linear(context_dim or dim, 2 * dim)
        self.extra = nn.Linear(extra_dim, 2 * dim) if extra_dim else None
        self.q_norm = RMSNorm(dim // heads) if qk_norm else nn.Identity()
        self.k_norm = RMSNorm(dim // heads) if qk_norm else nn.Identity()
        self.out = nn.Linear(dim, dim)

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        mask: Tensor | None = None,
        rope: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        keys = context if self.crosses and context is not None else x
        k, v = (self._split(part) for part in self.kv(keys).chunk(2, -1))
        q, k = self.q_norm(self._split(self.q(x))), self.k_norm(k)
        if rope is not None:
            q, k = rotated(q, rope), rotated(k, rope)
        if self.extra is not None and context is not None:  # text has no place in the picture: it is not rotated
            extra_k, extra_v = (self._split(part) for part in self.extra(context).chunk(2, -1))
            k, v = torch.cat([k, self.k_norm(extra_k)], 2), torch.cat([v, extra_v], 2)
        y = attended(q.to(v.dtype), k.to(v.dtype), v, mask)
        out: Tensor = self.out(y.transpose(1, 2).flatten(2))
        return out

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)


def attended(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Softmax attention of (B, heads, L, dim) over (B, heads, M, dim); mask (B, M) is True where a key counts.

    Where no key counts, the answer is zero. In bfloat16 on a CPU that has such arithmetic, training with short
    sequences, three plain operations stand for the fused kernel, whose backward pass is slow there (they keep the
    attention itself for it, which long sequences have no memory for); on a CPU without it
    the fused kernel is as fast in float32 and twice as fast in bfloat16 (`benchmarks/attention.py` measures both).
    Where a forward-mode derivative is taken (`sfumato.derivatives`) they are the only ones that have one.
    """
    if derivatives.is_taken():
        return attended_plainly(q, k, v, mask)
    learning = torch.is_grad_enabled() and q.requires_grad
    short = q.shape[2] * k.shape[2] <= SHORT**2
    if BF16_ARITHMETIC and q.dtype == torch.bfloat16 and q.device.type == "cpu" and short and learning:
        return attended_plainly(q, k, v, mask)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=None if mask is None else mask[:, None, None])


def attended_plainly(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """`attended`, written out."""
    logits = (q * q.shape[-1] ** -0.5) @ k.mT
    if mask is None:
        return logits.softmax(-1).to(v.dtype) @ v
    counts = mask[:, None, None]
    weights = logits.masked_fill(~counts, torch.finfo(logits.dtype).min).softmax(-1) * counts
    return weights.to(v.dtype) @ v


class RMSNorm(nn.Module):
    """x over its root mean square along the last axis, times a learned scale, in the precision of x."""

    def __init__(self, dim: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(dim)), eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)


Activation = Literal["gelu", "relu2"]


class FeedForward(nn.Module):
    """Two linear layers on the last axis with a tanh-GELU between them, or the square of a ReLU (So et al. 2021),
    which costs a CPU a third as much.
    """

    def __init__(self, dim: int, ratio: float = 4.0, activation: Activation = "gelu") -> None:
        super().__init__()
        hidden = int(dim * ratio)
        self.up, self.down = nn.Linear(dim, hidden), nn.Linear(hidden, dim)
        self.squares = activation == "relu2"

    def forward(self, x: Tensor) -> Tensor:
        h = self.up(x)
        out: Tensor = self.down(F.relu(h).square() if self.squares else F.gelu(h, approximate="tanh"))
        return out


class Neighbours(nn.Conv2d):
    """A 3x3 depthwise convolution over a picture's tokens (B, M + height * width, dim), added to them (Chu et al.
    2021): what stands beside what is known from the first step on, not learned. The M tokens before it, of words, have
    no neighbours.
    """

    def __init__(self, dim: int) -> None:
        super().__init__(dim, dim, 3, padding=1, groups=dim)

    def forward(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:  # type: ignore[override]
        before = tokens.shape[1] - grid[0] * grid[1]
        patches = tokens[:, before:]
        mixed = patches + super().forward(patches.mT.unflatten(2, grid)).flatten(2).mT
        return torch.cat([tokens[:, :before], mixed], 1) if before else mixed


def modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x (B, L, D) by the sample's shift and scale (B, D): the affine half of an adaptive layer norm."""
    return torch.addcmul(shift[:, None], x, 1 + scale[:, None])


def resampled(x: Tensor, way: str | None) -> Tensor:
    """A feature map (B, C, H, W) of half the size ("down", by means), of twice ("up", by repeating), or as it is."""
    if way == "down":
        return F.avg_pool2d(x, 2)
    return F.interpolate(x, scale_factor=2.0, mode="nearest") if way == "up" else x


Module = TypeVar("Module", bound=nn.Module)


def through(stage: nn.Module, recompute: bool, *given: object) -> Any:
    """The stage's answer. recompute: its activations are made anew in the backward pass rather than kept."""
    if recompute and torch.is_grad_enabled() and not derivatives.is_taken():
        return checkpoint(stage, *given, use_reentrant=False)
    return stage(*given)


def zeroed(module: Module) -> Module:
    """The module with all weights zero, so that the branch it ends starts out as nothing."""
    for p in module.parameters():
        nn.init.zeros_(p)
    return module

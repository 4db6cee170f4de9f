"""Small heads on the features of a large network: real, or drawn? (Sauer et al. 2024; Yin et al. 2024, section 4.3)

A diffusion model has seen what pictures are made of at every noise level, so a discriminator need not learn that: it
listens to what the network's blocks say of a noised picture, and heads of two layers decide for each token or place.
They are told the time, and the prompt's summary where the network is. The network is only heard: its forward is as it
was, and whether it learns from the heads is its owner's affair.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sfumato.errors import ConfigError
from sfumato.nets.layers import Attention, TimeEmbedding
from sfumato.nets.variants import blocks as blocks_of

EVENLY = 4  # blocks that are listened to where none are named


def on_features(net: nn.Module, *, blocks: tuple[int | str, ...] = (), width: int = 64) -> "FeatureHeads":
    """Heads for a network. blocks: where they listen: numbers, counted as for guidance and from the end if negative;
    "middle", the middle one; or names of its modules; four, evenly spread, unless said. width: of the heads.

    ConfigError for blocks that are not there.
    """
    if width < 1:
        raise ConfigError("a head has a width", where="objective.heads.width", seen=str(width), fix="64")
    return FeatureHeads(net, _places(net, blocks), width)


class FeatureHeads(nn.Module):
    """A head for each place of a network: the features of B pictures to logits (B, N), high where they look real."""

    def __init__(self, net: nn.Module, places: Sequence[str], width: int) -> None:
        super().__init__()
        self.places = tuple(places)
        pooled = int(getattr(getattr(net, "config", None), "pooled_dim", 0))
        self.heads = nn.ModuleList(Head(_width(net, place), width, pooled) for place in self.places)

    @contextmanager
    def listening(self, net: nn.Module) -> Iterator[dict[str, Tensor]]:
        """What the places of a network of this shape say inside, by their names. Compiled networks run uncompiled."""
        heard: dict[str, Tensor] = {}
        hooks = [net.get_submodule(place).register_forward_hook(partial(_keep, heard, place)) for place in self.places]
        compiled = getattr(net, "_compiled_call_impl", None) is not None  # and would call no hooks
        try:
            with torch.compiler.set_stance("force_eager") if compiled else nullcontext():
                yield heard
        finally:
            for hook in hooks:
                hook.remove()

    def forward(self, heard: dict[str, Tensor], t: Tensor, pooled: Tensor | None = None) -> Tensor:
        """heard: tokens (B, L, C). t: (B,), in [0, 1]."""
        each = [head(heard[place], t, pooled) for place, head in zip(self.places, self.heads, strict=True)]
        logits = torch.cat(each, 1)
        return logits.to(torch.promote_types(logits.dtype, torch.float32))


class Head(nn.Module):
    """Tokens (B, L, channels) to logits (B, L)."""

    def __init__(self, channels: int, width: int, pooled: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels, elementwise_affine=False)
        self.entry = nn.Linear(channels, width)
        self.time = TimeEmbedding(width)
        self.pooled = nn.Linear(pooled, width) if pooled else None
        self.inner = nn.Linear(width, width)
        self.exit = nn.Linear(width, 1)

    def forward(self, tokens: Tensor, t: Tensor, pooled: Tensor | None) -> Tensor:
        told = self.time(1000 * t)
        if self.pooled is not None and pooled is not None:
            told = told + self.pooled(pooled.to(told.dtype))
        h = self.entry(self.norm(tokens).to(self.entry.weight.dtype)) + told[:, None]
        out: Tensor = self.exit(F.silu(self.inner(F.silu(h))))
        return out[..., 0]


def _keep(heard: dict[str, Tensor], place: str, module: nn.Module, given: object, said: object) -> None:
    """A hook: the picture's half of what a block says, as tokens (B, L, C)."""
    first = said[0] if isinstance(said, tuple) else said
    assert isinstance(first, Tensor)
    heard[place] = first[:, None] if first.ndim == 2 else first if first.ndim == 3 else first.flatten(2).mT


def _places(net: nn.Module, chosen: Sequence[int | str]) -> list[str]:
    known, modules = blocks_of(net), {name for name, one in net.named_modules() if _speaks(one)}
    if not chosen:
        last = len(known) - 1
        chosen = sorted({round((i + 0.5) * last / EVENLY) for i in range(EVENLY)}) if known else ("middle",)
    places = []
    for one in chosen:
        if isinstance(one, int) and -len(known) <= one < len(known):
            places.append(known[one])
        elif one in modules:
            places.append(str(one))
        elif one == "middle" and known:
            places.append(known[len(known) // 2])
        else:
            fix = f"0 to {len(known) - 1}, middle" if known else "the name of a module, as in middle.0"
            raise ConfigError("this network has no such block", where="objective.heads.blocks", seen=str(one), fix=fix)
    return places


def _speaks(module: nn.Module) -> bool:
    return not isinstance(module, nn.ModuleList | nn.ModuleDict) and any(True for _ in module.parameters())


def _width(net: nn.Module, place: str) -> int:
    """The channels of what a module says: those of its attention, else as many as its last bias has."""
    attention = getattr(net.get_submodule(place), "attention", None)
    if isinstance(attention, Attention):
        return attention.out.out_features
    biases = [p for name, p in net.get_submodule(place).named_parameters() if name.endswith("bias")]
    if not biases:
        raise ConfigError("how wide this block's features are is not known", where="objective.heads.blocks", seen=place)
    return len(biases[-1])

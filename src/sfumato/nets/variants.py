"""Variants of a network: the same weights with a part of it switched off, for guidance to steer away from.

A variant is a copy of the module tree along the changed branches alone. Everything else, and every weight, is shared
with the network, so a variant follows its training, its device and its precision; nothing is asked of any forward, and
it costs nothing where it is not used. A block is a module whose `attention` is an `Attention`; one of another kind may
say what is left where it is skipped, by a method `skipped` of its forward's arguments.
"""

import copy
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar, cast

from torch import Tensor, nn

from sfumato.errors import ConfigError
from sfumato.nets.layers import Attention

M = TypeVar("M", bound=nn.Module)


def variant(module: M, name: str) -> M:
    """A network, or a denoiser with one in it, as a variant.

    name: "skip:3,4" leaves these blocks out; "perturb:3,4" has every token of their self-attention look at itself
    alone; "middle" in place of the numbers is the middle block. Blocks are counted from 0 in the order in which they
    run, those of a U-Net are its attention layers. Raises ConfigError for blocks that are not there.
    """
    kind, _, listed = name.partition(":")
    if kind not in ("skip", "perturb"):
        raise ConfigError("no such variant of a network", where="guidance", seen=name, fix="skip:3,4 or perturb:3,4")
    changes: dict[str, nn.Module] = {}
    for place in _chosen(blocks(module), listed, name):
        block = module.get_submodule(place)
        if kind == "skip":
            changes[place] = Skipped(block)
        elif isinstance(getattr(block, "attention", None), Attention):
            changes[f"{place}.attention"] = Unmixed(cast(Attention, block.attention))
        else:
            raise ConfigError("this block's attention cannot be perturbed", where="guidance.blocks", seen=place)
    return _with(module, changes)


def blocks(module: nn.Module) -> list[str]:
    """The dotted names of a network's blocks, in the order in which they run."""
    return [
        name
        for name, one in module.named_modules()
        if isinstance(getattr(one, "attention", None), Attention) or hasattr(one, "skipped")
    ]


class Skipped(nn.Module):
    """Stands for a block that is left out: gives back what it is given."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.skip = getattr(block, "skip", None)  # a long connection is still taken off its stack, though not used
        self._left: Any = getattr(block, "skipped", _first)

    def forward(self, *inputs: Any) -> Any:
        return self._left(*inputs)


def _first(x: Tensor, *rest: object) -> Tensor:
    return x


class Unmixed(nn.Module):
    """Attention whose map is the identity: each token's own value, and nothing of the others, of text neither."""

    def __init__(self, attention: Attention) -> None:
        super().__init__()
        self.kv, self.out = attention.kv, attention.out

    def forward(self, x: Tensor, *rest: object, **more: object) -> Tensor:
        out: Tensor = self.out(self.kv(x).chunk(2, -1)[1])
        return out


def _chosen(known: Sequence[str], listed: str, name: str) -> list[str]:
    """The names of the blocks that a variant lists."""
    if listed == "middle" and known:
        return [known[len(known) // 2]]
    numbers = [int(part) if part.isdecimal() else -1 for part in listed.split(",")]
    if not all(0 <= number < len(known) for number in numbers):
        fix = f"0 to {len(known) - 1}" if known else "a network with attention"
        raise ConfigError("this network has no such blocks", where="guidance.blocks", seen=name, fix=fix)
    return [known[number] for number in numbers]


def _with(module: M, changes: Mapping[str, nn.Module]) -> M:
    """A module with others in some places below it; what is not on the way to them is the same object."""
    clone = copy.copy(module)
    vars(clone)["_modules"] = dict(module._modules)
    vars(clone)["_compiled_call_impl"] = None  # which would be the original's
    below: dict[str, dict[str, nn.Module]] = {}
    for place, new in changes.items():
        first, _, rest = place.partition(".")
        below.setdefault(first, {})[rest] = new
    for first, inner in below.items():
        clone._modules[first] = inner[""] if "" in inner else _with(module.get_submodule(first), inner)
    return clone

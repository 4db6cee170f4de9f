"""One weight under the names of several layouts: a reversible table for each architecture, and nothing else.

A line of the table names a module in each layout, ours among them. Where one layout keeps as one matrix what another
keeps as several (a fused projection of queries, keys and values), the line names all of them, in the order in which
they are stacked. Where a layout keeps a linear layer as a convolution of 1x1, the line says so. Reading, writing and
converting are the same function; a key without a line is an error that lists it, never skipped.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sfumato.errors import CheckpointError

LEAVES = ("weight", "bias")
SHOWN = 8  # keys that one error names


@dataclass(frozen=True)
class Line:
    """The names of one module, by layout.

    names: for each layout the module, or the modules that are stacked along their outputs. square: the layouts that
    keep its weight (out, in) as (out, in, 1, 1). leaves: its tensors; "" is a tensor of that name itself.
    """

    names: Mapping[str, tuple[str, ...]]
    square: frozenset[str] = frozenset()
    leaves: tuple[str, ...] = LEAVES

    def keys(self, layout: str, leaf: str) -> tuple[str, ...]:
        """The names of a tensor; a name that ends in "_" takes it without a dot (`in_proj_weight`)."""
        return tuple(f"{name}{'' if name[-1] == '_' or not leaf else '.'}{leaf}" for name in self.names[layout])


def line(square: Iterable[str] = (), leaves: tuple[str, ...] = LEAVES, **names: str | Sequence[str]) -> Line:
    """A line, from one name or several a layout."""
    each = {layout: (said,) if isinstance(said, str) else tuple(said) for layout, said in names.items()}
    return Line(each, frozenset(square), leaves)


def renamed(
    state: Mapping[str, Tensor], lines: Iterable[Line], source: str, target: str, where: str
) -> dict[str, Tensor]:
    """The weights of one layout in another: the same numbers, stacked, split and squared as the lines say.

    where: the file, for errors. CheckpointError for keys without a line and for fused ones that are there in part.
    """
    out: dict[str, Tensor] = {}
    left = set(state)
    for one in lines:
        for leaf in one.leaves:
            keys = one.keys(source, leaf)
            there = [key for key in keys if key in state]
            if not there:
                continue
            if len(there) != len(keys):
                missing = [key for key in keys if key not in state]
                raise CheckpointError("a part of one projection is missing", where=where, seen=some(missing))
            left -= set(there)
            out |= _moved([state[key] for key in there], one, source, target, leaf)
    if left:
        raise CheckpointError(
            f"{len(left)} weights have no place in this network",
            where=where,
            seen=some(left),
            fix="a checkpoint of this architecture",
        )
    return out


def _moved(parts: list[Tensor], one: Line, source: str, target: str, leaf: str) -> dict[str, Tensor]:
    if leaf == "weight" and (source in one.square) != (target in one.square):
        parts = [part.flatten(1) if source in one.square else part[:, :, None, None] for part in parts]
    keys = one.keys(target, leaf)
    if len(keys) == len(parts):
        return dict(zip(keys, parts, strict=True))
    whole = parts[0] if len(parts) == 1 else torch.cat(parts)
    pieces = [whole] if len(keys) == 1 else whole.chunk(len(keys))
    return {key: piece.contiguous() for key, piece in zip(keys, pieces, strict=True)}


def some(keys: Iterable[str]) -> str:
    """The first of some keys, and how many there are."""
    found = sorted(keys)
    return ", ".join(found[:SHOWN]) + (f" and {len(found) - SHOWN} more" if len(found) > SHOWN else "")

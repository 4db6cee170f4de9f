"""One weight under the names of several layouts: a reversible table for each architecture, and nothing else.

A line of the table names a module in each layout, ours among them. Where a layout keeps a linear layer as a convolution
of 1x1, the line says so. Reading, writing and converting are the same function; a key without a line is an error that
lists it, never skipped.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor

from sfumato.errors import CheckpointError

LEAVES = ("weight", "bias")
SHOWN = 8  # keys that one error names


@dataclass(frozen=True)
class Line:
    """One module. names: by layout. square: the layouts that keep its weight (out, in) as (out, in, 1, 1)."""

    names: Mapping[str, str]
    square: frozenset[str] = frozenset()


def line(square: Iterable[str] = (), **names: str) -> Line:
    """A line, from the name in each layout."""
    return Line(names, frozenset(square))


def renamed(
    state: Mapping[str, Tensor], lines: Iterable[Line], source: str, target: str, where: str
) -> dict[str, Tensor]:
    """The weights of one layout in another: the same numbers, squared or flattened as the lines say.

    where: the file, for errors. CheckpointError for keys without a line; that none is missing, the network sees.
    """
    out: dict[str, Tensor] = {}
    left = set(state)
    for one in lines:
        for leaf in LEAVES:
            key = f"{one.names[source]}.{leaf}"
            if key not in state:
                continue
            left.remove(key)
            value = state[key]
            if leaf == "weight" and (source in one.square) != (target in one.square):
                value = value.flatten(1) if source in one.square else value[:, :, None, None]
            out[f"{one.names[target]}.{leaf}"] = value
    if left:
        raise CheckpointError(
            f"{len(left)} weights have no place in this network",
            where=where,
            seen=some(left),
            fix="a checkpoint of this architecture",
        )
    return out


def some(keys: Iterable[str]) -> str:
    """The first of some keys, and how many there are."""
    found = sorted(keys)
    return ", ".join(found[:SHOWN]) + (f" and {len(found) - SHOWN} more" if len(found) > SHOWN else "")

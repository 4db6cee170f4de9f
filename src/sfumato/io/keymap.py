"""One weight under the names of several layouts: a reversible table for each architecture, and nothing else.

A line of the table names a module in each layout, ours among them. Layouts differ in more than names, and a line says
in what: one keeps a linear layer as a convolution of one patch, one fuses what another keeps apart (queries, keys and
values as the rows of one matrix), one has the two halves of its rows the other way round, one has columns for rows, one
has the channels of a patch's pixels side by side. Reading, writing and converting are the same function; a key without
a line is an error that lists it, never skipped.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sfumato.errors import CheckpointError

OURS, DIFFUSERS, ORIGINAL = "ours", "diffusers", "original"
LEAVES = ("weight", "bias")
SHOWN = 8  # keys that one error names


@dataclass(frozen=True)
class Line:
    """One module, or one bare parameter.

    names: by layout; several where a layout keeps its rows apart, in the order of the rows.
    shares: by layout, how the rows are dealt out to its names, as whole numbers in proportion; even where not said.
    square: the layouts that keep its weight (out, in) as (out, in / side^2, side, side).
    swapped: the layouts that keep the second half of its rows first.
    inner: the layouts whose rows, those of a patch of side x side pixels, count channels fastest, not slowest.
    leaves: of the module; ("",) for a bare parameter, whose name is the whole key.
    turned: the layouts that keep its matrix (in, out) rather than (out, in).
    long: the layouts that keep its weight (out, in) as (out, in, 1), a convolution of one axis.
    by_head: the layouts whose rows, those of queries, keys and values, are dealt out to `heads` first; others have all
    queries first.
    """

    names: Mapping[str, tuple[str, ...]]
    square: frozenset[str] = frozenset()
    swapped: frozenset[str] = frozenset()
    shares: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    leaves: tuple[str, ...] = LEAVES
    turned: frozenset[str] = frozenset()
    inner: frozenset[str] = frozenset()
    side: int = 1
    long: frozenset[str] = frozenset()
    by_head: frozenset[str] = frozenset()
    heads: int = 1

    def keys(self, layout: str) -> set[str]:
        """All keys that this line may have in a layout."""
        return {_key(name, leaf) for name in self.names.get(layout, ()) for leaf in self.leaves}

    def rows(self, layout: str, total: int) -> list[int]:
        """How many of so many rows each name of a layout has."""
        shares = self.shares.get(layout) or (1,) * len(self.names[layout])
        return [total * share // sum(shares) for share in shares]


def line(
    square: Iterable[str] = (),
    *,
    swapped: Iterable[str] = (),
    turned: Iterable[str] = (),
    shares: Mapping[str, tuple[int, ...]] | None = None,
    bare: bool = False,
    inner: Iterable[str] = (),
    side: int = 1,
    long: Iterable[str] = (),
    by_head: Iterable[str] = (),
    heads: int = 1,
    **names: str | tuple[str, ...],
) -> Line:
    """A line, from the name or the names in each layout."""
    each = {layout: (name,) if isinstance(name, str) else name for layout, name in names.items()}
    leaves = ("",) if bare else LEAVES
    return Line(
        each,
        frozenset(square),
        frozenset(swapped),
        shares or {},
        leaves,
        frozenset(turned),
        frozenset(inner),
        side,
        frozenset(long),
        frozenset(by_head),
        heads,
    )


def renamed(
    state: Mapping[str, Tensor], lines: Iterable[Line], source: str, target: str, where: str
) -> dict[str, Tensor]:
    """The weights of one layout in another: the same numbers, squared, fused, split or swapped as the lines say.

    where: the file, for errors. CheckpointError for keys without a line, and for modules of which a part is missing;
    that a whole one is missing, the network sees.
    """
    out: dict[str, Tensor] = {}
    left = set(state)
    for one in lines:
        for leaf in one.leaves:
            keys = [_key(name, leaf) for name in one.names.get(source, ())]
            there = [key for key in keys if key in state]
            if not there:
                continue
            if len(there) < len(keys):
                missing = some(set(keys) - set(there))
                raise CheckpointError("a part of a module is missing", where=where, seen=missing, fix="a whole file")
            left.difference_update(keys)
            if target in one.names:
                out.update(_moved([state[key] for key in keys], one, leaf, source, target))
            else:
                left.update(keys)
    if left:
        raise CheckpointError(
            f"{len(left)} weights have no place in this network",
            where=where,
            seen=some(left),
            fix="a checkpoint of this architecture",
        )
    return out


def _moved(parts: list[Tensor], one: Line, leaf: str, source: str, target: str) -> dict[str, Tensor]:
    if leaf == "weight" and (source in one.square) != (target in one.square):
        shape = (-1, one.side, one.side)
        parts = [part.flatten(1) if source in one.square else part.unflatten(1, shape) for part in parts]
    if leaf == "weight" and (source in one.long) != (target in one.long):
        parts = [part.flatten(1) if source in one.long else part[:, :, None] for part in parts]
    if (source in one.turned) != (target in one.turned):
        parts = [part.mT.contiguous() if part.ndim > 1 else part for part in parts]
    if (source in one.by_head) != (target in one.by_head):
        parts = [_regrouped(torch.cat(parts), one.heads, source in one.by_head)]
    names = [_key(name, leaf) for name in one.names[target]]
    dealt = one.rows(target, sum(len(part) for part in parts)) if len(names) > 1 or len(parts) > 1 else []
    if dealt and dealt != [len(part) for part in parts]:
        whole = torch.cat(parts) if len(parts) > 1 else parts[0]
        parts = list(whole.split(dealt))
    if (source in one.swapped) != (target in one.swapped):
        parts = [torch.cat(part.chunk(2)[::-1]) for part in parts]
    if (source in one.inner) != (target in one.inner):
        parts = [repacked(part, one.side, source in one.inner) for part in parts]
    return dict(zip(names, parts, strict=True))


def _regrouped(rows: Tensor, heads: int, by_head: bool) -> Tensor:
    """Rows of queries, keys and values counted the other way. by_head: heads run slowest now."""
    return rows.unflatten(0, (heads, 3, -1) if by_head else (3, heads, -1)).transpose(0, 1).flatten(0, 2)


def repacked(rows: Tensor, side: int, inner: bool) -> Tensor:
    """The rows of a patch counted the other way. inner: channels run fastest now."""
    shape = (side, side, -1) if inner else (-1, side, side)
    return rows.unflatten(0, shape).movedim(*((2, 0) if inner else (0, 2))).flatten(0, 2)


def _key(name: str, leaf: str) -> str:
    return f"{name}.{leaf}" if leaf else name


def some(keys: Iterable[str]) -> str:
    """The first of some keys, and how many there are."""
    found = sorted(keys)
    return ", ".join(found[:SHOWN]) + (f" and {len(found) - SHOWN} more" if len(found) > SHOWN else "")

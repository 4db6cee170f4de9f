"""A set of changes under the names of another layout, by a part's table of names.

The same tables move whole checkpoints (`sfumato.io.keymap`). A change of a fused layer is split by its rows, changes of
layers that are fused elsewhere are joined; what of a fused layer is not changed stays unchanged.
"""

import math
from collections.abc import Mapping

import torch

from sfumato.adapters.factors import Factors, joined, split
from sfumato.adapters.parts import Part
from sfumato.errors import CheckpointError
from sfumato.io.keymap import OURS, Line, repacked, some


def moved(changes: Mapping[str, Factors], part: Part, source: str, target: str, where: str) -> dict[str, Factors]:
    """The changes of a part, by the names of the layout `source`, under the names of `target`.

    CheckpointError for names that the part has not, for shapes that do not fit, for layers without a name in `target`.
    """
    out: dict[str, Factors] = {}
    left, odd = set(changes), list[str]()
    for line in part.lines:
        names = line.names.get(source, ())
        there = [changes.get(name) for name in names]
        if all(one is None for one in there):
            continue
        left.difference_update(names)
        if target not in line.names:
            left.update(name for name in names if name in changes)
            continue
        total = sum(part.shapes[name][0] for name in line.names[OURS])
        rows, inside = line.rows(source, total) if len(names) > 1 else [total], part.shapes[line.names[OURS][0]]
        odd += [
            f"{name} ({_seen(one)} for {(n, *inside[1:])})"
            for name, one, n in zip(names, there, rows, strict=True)
            if one is not None and not fits(one, n, inside)
        ]
        if not odd:
            out.update(_across(there, rows, line, part, source, target, where))
    if left or odd:
        what = f"{len(left | set(odd))} changes have no place in this network"
        raise CheckpointError(what, where=where, seen=some([*left, *odd]), fix="an adapter of this architecture")
    return out


def fits(one: Factors, rows: int, shape: tuple[int, ...]) -> bool:
    """Whether a change is one of a weight of this shape, of so many rows, but for kernels of 1x1."""
    return len(one.up) == rows and one.down[0].numel() == math.prod(shape[1:]) and one.up.shape[1] == one.rank


def _seen(one: Factors) -> str:
    return f"{tuple(one.up.shape)} by {tuple(one.down.shape)}"


def _across(
    there: list[Factors | None], rows: list[int], line: Line, part: Part, source: str, target: str, where: str
) -> dict[str, Factors]:
    """The changes of one line."""
    names, own = line.names[target], line.names[OURS]
    dealt = line.rows(target, sum(rows)) if len(names) > 1 else [sum(rows)]
    if dealt != rows:
        there = split(joined(there, rows, where), dealt)
    inside = part.shapes[own[0]][1:]
    if (target in line.square) != (OURS in line.square):
        side = line.side
        inside = (inside[0] // side**2, side, side) if target in line.square else (math.prod(inside),)
    found = {name: one.shaped(inside) for name, one in zip(names, there, strict=True) if one is not None}
    if (source in line.swapped) != (target in line.swapped):
        found = {name: one.with_rows(lambda rows: torch.cat(rows.chunk(2)[::-1])) for name, one in found.items()}
    if (source in line.inner) != (target in line.inner):
        fast = source in line.inner
        found = {name: one.with_rows(lambda rows: repacked(rows, line.side, fast)) for name, one in found.items()}
    return found

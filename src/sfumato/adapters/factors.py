"""A low-rank change of one weight, and what can be done to it exactly.

W' = W + s (alpha / r) B A (Hu et al. 2022); DoRA (Liu et al. 2024) also gives every row of the sum a length of its own,
the magnitude m: W' = m (W + s (alpha / r) B A) / |W + s (alpha / r) B A|. Layers that one layout fuses and another
keeps apart share rows, never columns: a change of the fused layer is split by the rows of B, with A for each; changes
of the parts are joined with all A one above another and the B along the diagonal. Columns of B that are all zero are
left out with their rows of A, so that splitting undoes joining.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sfumato.errors import CheckpointError


@dataclass(frozen=True)
class Factors:
    """The change of one weight (out, in) or (out, in, *kernel).

    down: A, (rank, in) or (rank, in, *kernel). up: B, (out, rank). magnitude: DoRA's, (out,).
    """

    down: Tensor
    up: Tensor
    alpha: float
    magnitude: Tensor | None = None

    @property
    def rank(self) -> int:
        """The rows of A."""
        return len(self.down)

    @property
    def scale(self) -> float:
        """alpha / rank: what B A is multiplied by."""
        return self.alpha / self.rank

    def product(self, scale: float = 1.0) -> Tensor:
        """scale (alpha / rank) B A, in the shape of the weight, in float32 at least."""
        kind = torch.promote_types(self.down.dtype, torch.float32)
        down, up = self.down.to(kind), self.up.to(kind)
        return (up @ down.flatten(1)).mul_(scale * self.scale).unflatten(1, self.down.shape[1:])

    def stretch(self, weight: Tensor, scale: float = 1.0) -> Tensor:
        """Of a DoRA, what each row of the sum is multiplied by, (out, 1, ...): its magnitude over its length."""
        assert self.magnitude is not None
        change = self.product(scale).to(weight.device)
        lengths = torch.linalg.vector_norm((weight.to(change.dtype) + change).flatten(1), dim=1)
        return (self.magnitude.to(change) / lengths).view(-1, *(1,) * (weight.ndim - 1))

    def shaped(self, shape: Sequence[int]) -> "Factors":
        """For a weight of this shape: a linear layer and a convolution of 1x1 have the same numbers."""
        return replace(self, down=self.down.reshape(self.rank, *shape[1:]))

    def swapped(self) -> "Factors":
        """With the second half of the rows first."""
        magnitude = None if self.magnitude is None else _swapped(self.magnitude)
        return replace(self, up=_swapped(self.up), magnitude=magnitude)


def merged(weight: Tensor, changes: Sequence[tuple[Factors, float]]) -> Tensor:
    """A weight with some changes, each at its scale, in float32 at least. At scale 0 nothing changes, of a DoRA too.

    DoRAs come first, each measured on the weight itself and laid over what the ones before made of it; then the others,
    which are added. So it is where they stand beside the weight, too.
    """
    kind = torch.promote_types(weight.dtype, torch.float32)
    out = weight.to(kind, copy=True)
    for one, scale in sorted(changes, key=lambda pair: pair[0].magnitude is None):
        if scale:
            out += one.product(scale).to(out)
            if one.magnitude is not None:
                out *= one.stretch(weight, scale).to(kind)
    return out


def _swapped(rows: Tensor) -> Tensor:
    return torch.cat(rows.chunk(2)[::-1])


def joined(parts: Sequence[Factors | None], rows: Sequence[int], where: str) -> Factors:
    """One change for layers whose rows stand one below another; None for a layer that is not changed.

    rows: of each layer. CheckpointError for a DoRA of which a layer is not changed: the lengths of its rows are known
    to the model alone.
    """
    there = [part for part in parts if part is not None]
    magnitude = _joined_magnitude(parts, where)
    first = there[0]
    if all(_shares(first, part) for part in there[1:]):
        up = torch.cat([_rows(part.up if part else None, n, first.up) for part, n in zip(parts, rows, strict=True)])
        return Factors(first.down, up, first.alpha, magnitude)
    even = len({part.scale for part in there}) == 1
    down = torch.cat([part.down for part in there])
    up, column, row = first.up.new_zeros(sum(rows), len(down)), 0, 0
    for part, n in zip(parts, rows, strict=True):
        if part is not None:
            up[row : row + n, column : column + part.rank] = part.up if even else part.up * part.scale
            column += part.rank
        row += n
    return Factors(down, up, len(down) * (first.scale if even else 1.0), magnitude)


def _shares(one: Factors, other: Factors) -> bool:
    """Whether two changes have the same A, as those have that were split."""
    return one.alpha == other.alpha and one.down.shape == other.down.shape and bool((one.down == other.down).all())


def _rows(up: Tensor | None, n: int, like: Tensor) -> Tensor:
    return like.new_zeros(n, like.shape[1]) if up is None else up


def _joined_magnitude(parts: Sequence[Factors | None], where: str) -> Tensor | None:
    lengths = [None if part is None else part.magnitude for part in parts]
    known = [one for one in lengths if one is not None]
    if not known:
        return None
    if len(known) < len(lengths):
        what = "a DoRA of a part of a fused layer cannot be written as one of the whole"
        raise CheckpointError(what, where=where, seen="other parts without a magnitude", fix="a layout that splits it")
    return torch.cat(known)


def split(whole: Factors, rows: Sequence[int]) -> list[Factors | None]:
    """The change of each of the layers whose rows stand one below another; None where nothing changes."""
    ups = whole.up.split(list(rows))
    lengths = [None] * len(rows) if whole.magnitude is None else list(whole.magnitude.split(list(rows)))
    silent = not bool(whole.up.any())
    parts: list[Factors | None] = []
    for up, magnitude in zip(ups, lengths, strict=True):
        used = torch.ones(whole.rank, dtype=torch.bool, device=up.device) if silent else up.any(0)
        if not bool(used.any()):
            if magnitude is None:
                parts.append(None)
                continue
            used[0] = True  # a change of lengths alone
        down, count = whole.down[used], int(used.sum())
        parts.append(Factors(down, up[:, used], whole.scale * count, magnitude))
    return parts

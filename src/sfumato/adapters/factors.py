"""A low-rank change of one weight, and what can be done to it exactly.

W' = W + s (alpha / r) B A (Hu et al. 2022); DoRA (Liu et al. 2024) also gives every row of the sum a length of its own,
the magnitude m: W' = m (W + s (alpha / r) B A) / |W + s (alpha / r) B A|. Layers that one layout fuses and another
keeps apart share rows, never columns: a change of the fused layer is split by the rows of B, with A for each; changes
of the parts are joined with each A that occurs one above another, and the B beside one another where their A are.
Columns of B that are all zero are left out with their rows of A, so that splitting undoes joining.
"""

from collections.abc import Callable, Sequence
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

    def shaped(self, inside: Sequence[int]) -> "Factors":
        """For a weight (out, *inside): a linear layer and a convolution of one place have the same numbers."""
        return replace(self, down=self.down.reshape(self.rank, *inside))

    def with_rows(self, arranged: Callable[[Tensor], Tensor]) -> "Factors":
        """With its rows in another order."""
        magnitude = None if self.magnitude is None else arranged(self.magnitude)
        return replace(self, up=arranged(self.up), magnitude=magnitude)


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


def joined(parts: Sequence[Factors | None], rows: Sequence[int], where: str) -> Factors:
    """One change for layers whose rows stand one below another; None for a layer that is not changed.

    rows: of each layer. CheckpointError for a DoRA of which a layer is not changed: the lengths of its rows are known
    to the model alone.
    """
    magnitude = _joined_magnitude(parts, where)
    there = [part for part in parts if part is not None]
    blocks: list[Factors] = []  # one for each A that occurs
    for one in there:
        if not any(_shares(one, known) for known in blocks):
            blocks.append(one)
    even = len({part.scale for part in there}) == 1
    starts = [sum(known.rank for known in blocks[:i]) for i in range(len(blocks) + 1)]
    up, row = there[0].up.new_zeros(sum(rows), starts[-1]), 0
    for part, n in zip(parts, rows, strict=True):
        if part is not None:
            start = starts[next(i for i, known in enumerate(blocks) if _shares(part, known))]
            up[row : row + n, start : start + part.rank] = part.up if even else part.up * part.scale
        row += n
    alpha = starts[-1] * (there[0].scale if even else 1.0)
    return Factors(torch.cat([known.down for known in blocks]), up, alpha, magnitude)


def _shares(one: Factors, other: Factors) -> bool:
    """Whether two changes have the same A, as those have that were split."""
    return one.alpha == other.alpha and one.down.shape == other.down.shape and bool((one.down == other.down).all())


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

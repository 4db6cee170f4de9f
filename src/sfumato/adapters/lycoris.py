"""LyCORIS' other products (Yeh et al. 2024) as low-rank ones, exactly.

LoHa's change is the product, number by number, of two low-rank matrices; its rank is at most the product of theirs, and
its factors are all products of two of their columns and of two of their rows. LoKr's is a Kronecker product, whose
factors are the Kronecker products of the factors. Where that takes more numbers than the change itself, or where it
has kernels in Tucker's form, the change is worked out and has the full rank.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from sfumato.adapters.factors import Factors
from sfumato.errors import CheckpointError

HADA = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
HADA_TUCKER = ("hada_t1", "hada_t2")
LOKR = ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2")
FULL = "diff"  # the change itself
LEAVES = (*HADA, *HADA_TUCKER, *LOKR, FULL)


def factors_of(leaves: Mapping[str, Tensor], shape: tuple[int, ...], where: str) -> Factors:
    """A low-rank change of the tensors of a layer of LoHa, LoKr, or a full change. shape: of the layer's weight."""
    alpha = float(leaves["alpha"]) if "alpha" in leaves else None
    magnitude = leaves.get("magnitude")
    try:
        if FULL in leaves:
            return _whole(leaves[FULL], shape, 1.0, magnitude)
        if HADA[0] in leaves:
            return _hada(leaves, shape, alpha, magnitude)
        return _lokr(leaves, shape, alpha, magnitude)
    except (KeyError, RuntimeError) as error:
        seen = f"{', '.join(sorted(leaves))}: {str(error).splitlines()[0]}"
        raise CheckpointError("a layer of LyCORIS cannot be read", where=where, seen=seen, fix="a whole file") from None


def _whole(change: Tensor, shape: tuple[int, ...], scale: float, magnitude: Tensor | None) -> Factors:
    """A change of any kind as one of the full rank: itself, and the identity."""
    change = change.reshape(shape) * scale
    if len(shape) > 2 or shape[0] <= shape[1]:
        return Factors(change, torch.eye(shape[0], dtype=change.dtype), shape[0], magnitude)
    return Factors(torch.eye(shape[1], dtype=change.dtype), change, shape[1], magnitude)


def _is_smaller(rank: int, shape: tuple[int, ...]) -> bool:
    return rank < min(shape[0], int(torch.Size(shape[1:]).numel()))


def _hada(leaves: Mapping[str, Tensor], shape: tuple[int, ...], alpha: float | None, length: Tensor | None) -> Factors:
    up1, down1, up2, down2 = (leaves[name].float().flatten(1) for name in HADA)
    scale = (alpha or len(down1)) / len(down1)
    if HADA_TUCKER[0] in leaves:
        one, two = (
            torch.einsum("ij...,ip,jr->pr...", leaves[core].float(), up, down)
            for core, up, down in zip(HADA_TUCKER, (up1, up2), (down1, down2), strict=True)
        )
        return _whole(one * two, shape, scale, length)
    rank = len(down1) * len(down2)
    if not _is_smaller(rank, shape):
        return _whole((up1 @ down1) * (up2 @ down2), shape, scale, length)
    up = (up1[:, :, None] * up2[:, None, :]).flatten(1)
    down = (down1[:, None] * down2[None]).flatten(0, 1)
    return Factors(down.reshape(rank, *shape[1:]), up, scale * rank, length)


def _lokr(leaves: Mapping[str, Tensor], shape: tuple[int, ...], alpha: float | None, length: Tensor | None) -> Factors:
    first, rank1 = _half(leaves, "lokr_w1")
    second, rank2 = _half(leaves, "lokr_w2")
    rank = rank2 or rank1  # of both factors whole, alpha says nothing
    scale = (alpha or rank) / rank if rank else 1.0
    if not _is_smaller(first[0].shape[1] * second[0].shape[1], shape):
        return _whole(torch.kron(_product(first), _product(second)), shape, scale, length)
    (up1, down1), (up2, down2) = (
        half if len(half) == 2 else (*half, torch.eye(half[0].shape[1])) for half in (first, second)
    )
    down = torch.kron(down1, down2)
    return Factors(down.reshape(len(down), *shape[1:]), torch.kron(up1, up2), scale * len(down), length)


def _half(leaves: Mapping[str, Tensor], name: str) -> tuple[tuple[Tensor, ...], int]:
    """One factor of the Kronecker product as matrices, (whole,) or (a, b), and its rank, 0 of a whole one.

    Kernels follow the columns: so they lie in the product, too.
    """
    if name in leaves:
        return (leaves[name].float().flatten(1),), 0
    up, down = leaves[f"{name}_a"].float(), leaves[f"{name}_b"].float()
    if name == "lokr_w2" and "lokr_t2" in leaves:
        return (torch.einsum("ij...,ip,jr->pr...", leaves["lokr_t2"].float(), up, down).flatten(1),), len(down)
    return (up, down.flatten(1)), len(down)


def _product(half: tuple[Tensor, ...]) -> Tensor:
    return half[0] if len(half) == 1 else half[0] @ half[1]

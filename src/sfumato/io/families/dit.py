"""Names, shapes and the table of betas of DiTs in diffusers' folders and the original files (Peebles & Xie 2023).

Originals name and fuse as vision transformers do, and count the channels of a patch's pixels fastest where they answer.
diffusers has a copy of the embeddings of time and class in every block. Heads leave no trace in the weights. PixArt's
networks are DiTs too, and share much of this.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from sfumato.denoiser import VARIANCE
from sfumato.errors import CheckpointError
from sfumato.io import parts as shared
from sfumato.io.keymap import DIFFUSERS, ORIGINAL, OURS, Line, line
from sfumato.model import Model
from sfumato.nets.dit import DiTConfig, positions
from sfumato.paths import Tabulated
from sfumato.predictions import EPS

SHAPE = ("patch", "dim", "depth", "heads", "mlp_ratio", "in_channels", "out_channels", "classes")
POSITIONS = {DIFFUSERS: "pos_embed.pos_embed", ORIGINAL: "pos_embed"}  # a table that is computed here
EMBEDDINGS = ".norm1.emb."  # of which diffusers has one in every block
HEADS = {1152: 16}  # by width, where they are not of 64 channels
TABLE: dict[str, Any] = {"kind": "tabulated", "betas": "linear", "steps": 1000, "start": 1e-4, "end": 0.02}


# Names


def lines(config: DiTConfig) -> list[Line]:
    """Every module of a class-conditional DiT of this shape."""
    return [*_ends(config), *(each for i in range(config.depth) for each in _block(i))]


def _ends(config: DiTConfig) -> Iterator[Line]:
    yield patches(config)
    first = f"transformer_blocks.0{EMBEDDINGS}"
    for i, name in ((0, "linear_1"), (2, "linear_2")):
        yield line(ours=f"time.mlp.{i}", diffusers=f"{first}timestep_embedder.{name}", original=f"t_embedder.mlp.{i}")
    yield line(ours="label", diffusers=f"{first}class_embedder.embedding_table", original="y_embedder.embedding_table")
    yield line(ours="head.modulation.1", diffusers="proj_out_1", original="final_layer.adaLN_modulation.1")
    yield answer(config, "proj_out_2")


def patches(config: DiTConfig) -> Line:
    """The way in, which others keep as a convolution."""
    both = (DIFFUSERS, ORIGINAL)
    return line(both, side=config.patch, ours="patches", diffusers="pos_embed.proj", original="x_embedder.proj")


def answer(config: DiTConfig, diffusers: str) -> Line:
    """The way out, whose rows others have in another order."""
    both = (DIFFUSERS, ORIGINAL)
    return line(inner=both, side=config.patch, ours="head.out", diffusers=diffusers, original="final_layer.linear")


def _block(i: int) -> Iterator[Line]:
    ours, theirs, original = f"blocks.{i}", f"transformer_blocks.{i}", f"blocks.{i}"
    yield line(
        ours=f"{ours}.modulation.1", diffusers=f"{theirs}.norm1.linear", original=f"{original}.adaLN_modulation.1"
    )
    yield from halves(ours, theirs, original)


def halves(ours: str, theirs: str, original: str) -> Iterator[Line]:
    """Self-attention and feed-forward layer of a block."""
    yield line(
        ours=(f"{ours}.attention.q", f"{ours}.attention.kv"),
        diffusers=tuple(f"{theirs}.attn1.to_{part}" for part in "qkv"),
        original=f"{original}.attn.qkv",
        shares={OURS: (1, 2)},
    )
    for own, there, origin in (
        ("attention.out", "attn1.to_out.0", "attn.proj"),
        ("feed.up", "ff.net.0.proj", "mlp.fc1"),
        ("feed.down", "ff.net.2", "mlp.fc2"),
    ):
        yield line(ours=f"{ours}.{own}", diffusers=f"{theirs}.{there}", original=f"{original}.{origin}")


# Shapes

MARKS = {
    DIFFUSERS: {
        "entry": "pos_embed.proj.weight",
        "label": f"transformer_blocks.0{EMBEDDINGS}class_embedder.embedding_table.weight",
        "feed": "transformer_blocks.{}.ff.net.0.proj.weight",
        "out": "proj_out_2.weight",
    },
    ORIGINAL: {
        "entry": "x_embedder.proj.weight",
        "label": "y_embedder.embedding_table.weight",
        "feed": "blocks.{}.mlp.fc1.weight",
        "out": "final_layer.linear.weight",
    },
}


def config_of(state: Mapping[str, Tensor], layout: str, where: str, *, heads: int = 0, size: int = 0) -> DiTConfig:
    """The shape that the weights of diffusers' or the original layout tell.

    heads: where they are known; else of 64 channels, or 16 of the XL's. size: of the latents, where it is known; else
    what the table of positions says, or 32.
    """
    marks = MARKS[layout]
    try:
        dim, channels, patch = state[marks["entry"]].shape[:3]
        return DiTConfig(
            size=size or size_of(state, layout, patch, 32),
            patch=patch,
            dim=dim,
            depth=counted(state, marks["feed"]),
            heads=heads or HEADS.get(dim, max(1, dim // 64)),
            mlp_ratio=len(state[marks["feed"].format(0)]) / dim,
            in_channels=channels,
            out_channels=len(state[marks["out"]]) // patch**2,
            classes=len(state[marks["label"]]) - 1,
        )
    except (KeyError, ValueError) as error:
        raise CheckpointError("a weight of the DiT is missing", where=where, seen=str(error)) from None


def size_of(state: Mapping[str, Tensor], layout: str, patch: int, usual: int) -> int:
    """The side of the latents that a table of positions was made for; the usual one where there is none."""
    table = state.get(POSITIONS[layout])
    return usual if table is None else patch * math.isqrt(table.shape[-2])


def counted(state: Mapping[str, Tensor], template: str) -> int:
    """How many blocks there are."""
    n = 0
    while template.format(n) in state:
        n += 1
    return n


def slot_of(config: DiTConfig) -> dict[str, Any]:
    """The slot of a network of this shape."""
    plain = DiTConfig()
    kept = {one.name: getattr(config, one.name) for one in fields(DiTConfig)}
    return {"kind": "dit"} | {
        name: value for name, value in kept.items() if name in (*SHAPE, "size") or value != getattr(plain, name)
    }


def is_plain(config: DiTConfig, *also: str) -> bool:
    """Whether a network is the published one. also: the fields that may say otherwise, beside those of its size."""
    plain = DiTConfig()
    free = {*SHAPE, *also, "size", "dropout"}
    return all(
        getattr(config, one.name) == getattr(plain, one.name) for one in fields(DiTConfig) if one.name not in free
    )


def without_positions(state: dict[str, Tensor], table: Tensor, layout: str, where: str) -> dict[str, Tensor]:
    """The state without its table of positions, which must be the one that is computed here."""
    kept = dict(state)
    found = kept.pop(POSITIONS[layout], None)
    same = found is None or (
        found.numel() == table.numel() and torch.allclose(found.float().flatten(), table.flatten(), atol=1e-2)
    )
    if found is not None and not same:
        raise CheckpointError("positions that are not computed as here", where=where, seen=str(tuple(found.shape)))
    return kept


def table_of(config: DiTConfig) -> Tensor:
    """The table of positions of a network, (1, places, dim)."""
    height, width = shared.pair(config.size)
    return positions(config, (height // config.patch, width // config.patch))[None]


def is_original(model: Model) -> bool:
    """Whether a model says the noise and a variance on the originals' table of betas."""
    path = model.denoiser.path
    table = isinstance(path, Tabulated) and torch.equal(path.alphas_cumprod, Tabulated().alphas_cumprod)
    return table and model.denoiser.prediction == EPS and VARIANCE in model.answers

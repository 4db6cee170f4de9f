"""Stable Diffusion 3 and 3.5's MMDiT in diffusers' folders and in the original files: names, and what shapes tell.

The original has a block for each stream of a joint block, with queries, keys and values as the rows of one matrix;
diffusers has one block, the prompt's half of it under names of its own. Where a modulation has no gate (the last norm,
and the words of the last block) the original says shift, then scale, and diffusers the other way round. Heads of 64
channels are what every published size has; norms of queries and keys tell their width.
"""

import math
from collections.abc import Iterator, Mapping

from torch import Tensor

from sfumato.errors import CheckpointError
from sfumato.io.keymap import DIFFUSERS, ORIGINAL, Line, line
from sfumato.nets.mmdit import MMDiTConfig

PREFIX = "model.diffusion_model."
MARK = "joint_blocks.0.context_block.adaLN_modulation.1.weight"  # what only an original of this family has
HEAD = 64  # channels, where nothing tells


def lines(config: MMDiTConfig) -> list[Line]:
    """Every module of an MMDiT of this shape."""
    blocks = (each for i in range(config.depth) for each in block(i, config, last=i + 1 == config.depth))
    return [*entrance(), *_head(), *blocks]


def entrance() -> Iterator[Line]:
    """Everything before the blocks."""
    embed = "time_text_embed"
    yield line(ours="entry", diffusers="pos_embed.proj", original="x_embedder.proj")
    yield line(ours="positions", diffusers="pos_embed.pos_embed", original="pos_embed", bare=True)
    yield line(ours="context", diffusers="context_embedder", original="context_embedder")
    for i, name in ((0, "linear_1"), (2, "linear_2")):
        yield line(ours=f"time.mlp.{i}", diffusers=f"{embed}.timestep_embedder.{name}", original=f"t_embedder.mlp.{i}")
        yield line(ours=f"pooled.{i}", diffusers=f"{embed}.text_embedder.{name}", original=f"y_embedder.mlp.{i}")


def _head() -> Iterator[Line]:
    yield line(
        ours="head.modulation.1",
        diffusers="norm_out.linear",
        original="final_layer.adaLN_modulation.1",
        swapped=[DIFFUSERS],
    )
    yield line(ours="head.out", diffusers="proj_out", original="final_layer.linear")


def block(i: int, config: MMDiTConfig, *, last: bool) -> Iterator[Line]:
    """A joint block. last: its words are only attended to."""
    image, theirs, original = f"blocks.{i}.image", f"transformer_blocks.{i}", f"joint_blocks.{i}.x_block"
    yield from _stream(image, theirs, original, "norm1", "ff", swapped=False)
    names = ("to_q", "to_k", "to_v", "to_out.0", "norm_q", "norm_k")
    yield from _heads(f"{image}.attention", f"{theirs}.attn", f"{original}.attn", names)
    if i in config.dual:
        yield from _heads(f"{image}.second", f"{theirs}.attn2", f"{original}.attn2", names)
    text, original = f"blocks.{i}.text", f"joint_blocks.{i}.context_block"
    yield from _stream(text, theirs, original, "norm1_context", "ff_context", swapped=last)
    names = ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out", "norm_added_q", "norm_added_k")
    yield from _heads(f"{text}.attention", f"{theirs}.attn", f"{original}.attn", names)


def _stream(ours: str, theirs: str, original: str, norm: str, feed: str, *, swapped: bool) -> Iterator[Line]:
    yield line(
        ours=f"{ours}.modulation.1",
        diffusers=f"{theirs}.{norm}.linear",
        original=f"{original}.adaLN_modulation.1",
        swapped=[DIFFUSERS] if swapped else [],
    )
    yield line(ours=f"{ours}.feed.up", diffusers=f"{theirs}.{feed}.net.0.proj", original=f"{original}.mlp.fc1")
    yield line(ours=f"{ours}.feed.down", diffusers=f"{theirs}.{feed}.net.2", original=f"{original}.mlp.fc2")


def _heads(ours: str, theirs: str, original: str, names: tuple[str, ...]) -> Iterator[Line]:
    """names: of diffusers, for queries, keys, values, the way back, and the norms of queries and keys."""
    yield line(
        ours=tuple(f"{ours}.{part}" for part in "qkv"),
        diffusers=tuple(f"{theirs}.{name}" for name in names[:3]),
        original=f"{original}.qkv",
    )
    rest = (("out", "proj"), ("q_norm", "ln_q"), ("k_norm", "ln_k"))
    for name, (own, origin) in zip(names[3:], rest, strict=True):
        yield line(ours=f"{ours}.{own}", diffusers=f"{theirs}.{name}", original=f"{original}.{origin}")


# What of a network's names the shape is read from, in both layouts
_MARKS = {
    DIFFUSERS: {
        "entry": "pos_embed.proj.weight",
        "table": "pos_embed.pos_embed",
        "context": "context_embedder.weight",
        "pooled": "time_text_embed.text_embedder.linear_1.weight",
        "feed": "transformer_blocks.0.ff.net.0.proj.weight",
        "out": "proj_out.weight",
        "norm": "transformer_blocks.0.attn.norm_q.weight",
        "block": "transformer_blocks.{}.norm1.linear.weight",
        "second": "transformer_blocks.{}.attn2.to_q.weight",
    },
    ORIGINAL: {
        "entry": "x_embedder.proj.weight",
        "table": "pos_embed",
        "context": "context_embedder.weight",
        "pooled": "y_embedder.mlp.0.weight",
        "feed": "joint_blocks.0.x_block.mlp.fc1.weight",
        "out": "final_layer.linear.weight",
        "norm": "joint_blocks.0.x_block.attn.ln_q.weight",
        "block": "joint_blocks.{}.x_block.adaLN_modulation.1.weight",
        "second": "joint_blocks.{}.x_block.attn2.qkv.weight",
    },
}


def config_of(
    state: Mapping[str, Tensor], layout: str, where: str, *, size: int = 128, head: int = HEAD
) -> MMDiTConfig:
    """The shape that the weights of diffusers' or the original layout tell.

    size: of the latents, of which they keep no trace but the positions. head: its channels, where no norms tell them.
    """
    marks = _MARKS[layout]
    try:
        dim, channels, patch = state[marks["entry"]].shape[:3]
        depth, side = _count(state, marks["block"]), math.isqrt(state[marks["table"]].shape[1])
        width = len(state[marks["norm"]]) if marks["norm"] in state else 0
        return MMDiTConfig(
            size=size,
            patch=patch,
            dim=dim,
            depth=depth,
            heads=dim // (width or head),
            mlp_ratio=len(state[marks["feed"]]) / dim,
            in_channels=channels,
            out_channels=len(state[marks["out"]]) // patch**2,
            context_dim=state[marks["context"]].shape[1],
            pooled_dim=state[marks["pooled"]].shape[1],
            qk_norm=bool(width),
            dual=tuple(i for i in range(depth) if marks["second"].format(i) in state),
            table=side,
            step=size / patch / side,
        )
    except (KeyError, IndexError, ValueError) as error:
        raise CheckpointError("a weight of the MMDiT is missing", where=where, seen=str(error)) from None


def _count(state: Mapping[str, Tensor], template: str) -> int:
    n = 0
    while template.format(n) in state:
        n += 1
    return n

"""FLUX.1's transformer in diffusers' folders and in the original files: names, and the shape that weights tell.

The original has queries, keys and values as the rows of one matrix, in single blocks the feed-forward layer's too;
diffusers keeps them apart. The last norm has no gate: there the original says shift, then scale, and diffusers the
other way round. Norms of queries and keys tell how wide a head is, and so how many there are; the share of each axis
of places leaves no trace, and is the published one.
"""

from collections.abc import Iterator, Mapping

from torch import Tensor

from sfumato.errors import CheckpointError
from sfumato.io.keymap import DIFFUSERS, ORIGINAL, OURS, Line, line
from sfumato.nets.flux import FluxConfig

PREFIX = "model.diffusion_model."
PATCH = 2  # latents are packed outside of the published networks, so that this leaves no trace


def lines(config: FluxConfig) -> list[Line]:
    """Every module of a FLUX transformer of this shape."""
    doubles = (each for i in range(config.double) for each in double(i))
    singles = (each for i in range(config.single) for each in single(i, config))
    return [*entrance(config), *_head(), *doubles, *singles]


def entrance(config: FluxConfig) -> Iterator[Line]:
    """Everything before the blocks."""
    yield line(ours="entry", diffusers="x_embedder", original="img_in")
    yield line(ours="context", diffusers="context_embedder", original="txt_in")
    embeddings = [("time.mlp", "timestep_embedder", "time_in"), ("pooled", "text_embedder", "vector_in")]
    embeddings += [("guided.mlp", "guidance_embedder", "guidance_in")] if config.guidance else []
    for ours, theirs, original in embeddings:
        for i, name, origin in ((0, "linear_1", "in_layer"), (2, "linear_2", "out_layer")):
            there = f"time_text_embed.{theirs}.{name}"
            yield line(ours=f"{ours}.{i}", diffusers=there, original=f"{original}.{origin}")


def _head() -> Iterator[Line]:
    yield line(
        ours="head.modulation.1",
        diffusers="norm_out.linear",
        original="final_layer.adaLN_modulation.1",
        swapped=[DIFFUSERS],
    )
    yield line(ours="head.out", diffusers="proj_out", original="final_layer.linear")


def double(i: int) -> Iterator[Line]:
    """A double block."""
    theirs, original = f"transformer_blocks.{i}", f"double_blocks.{i}"
    for stream, norm, feed, names, origin in (
        ("image", "norm1", "ff", ("to_q", "to_k", "to_v", "to_out.0", "norm_q", "norm_k"), "img"),
        (
            "text",
            "norm1_context",
            "ff_context",
            ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out", "norm_added_q", "norm_added_k"),
            "txt",
        ),
    ):
        ours, there = f"double_blocks.{i}.{stream}", f"{original}.{origin}"
        yield line(ours=f"{ours}.modulation.1", diffusers=f"{theirs}.{norm}.linear", original=f"{there}_mod.lin")
        attention = tuple(f"{theirs}.attn.{name}" for name in names)
        yield line(
            ours=tuple(f"{ours}.heads.{part}" for part in "qkv"),
            diffusers=attention[:3],
            original=f"{there}_attn.qkv",
        )
        yield line(ours=f"{ours}.out", diffusers=attention[3], original=f"{there}_attn.proj")
        yield from _norms(f"{ours}.heads", attention[4:], f"{there}_attn.norm")
        yield line(ours=f"{ours}.feed.up", diffusers=f"{theirs}.{feed}.net.0.proj", original=f"{there}_mlp.0")
        yield line(ours=f"{ours}.feed.down", diffusers=f"{theirs}.{feed}.net.2", original=f"{there}_mlp.2")


def single(i: int, config: FluxConfig) -> Iterator[Line]:
    """A single block."""
    ours, theirs, original = f"single_blocks.{i}", f"single_transformer_blocks.{i}", f"single_blocks.{i}"
    yield line(ours=f"{ours}.modulation.1", diffusers=f"{theirs}.norm.linear", original=f"{original}.modulation.lin")
    shares = (config.dim,) * 3 + (int(config.dim * config.mlp_ratio),)
    yield line(
        ours=(*(f"{ours}.heads.{part}" for part in "qkv"), f"{ours}.up"),
        diffusers=(*(f"{theirs}.attn.to_{part}" for part in "qkv"), f"{theirs}.proj_mlp"),
        original=f"{original}.linear1",
        shares={OURS: shares, DIFFUSERS: shares},
    )
    yield from _norms(f"{ours}.heads", (f"{theirs}.attn.norm_q", f"{theirs}.attn.norm_k"), f"{original}.norm")
    yield line(ours=f"{ours}.out", diffusers=f"{theirs}.proj_out", original=f"{original}.linear2")


def _norms(ours: str, theirs: tuple[str, ...], original: str) -> Iterator[Line]:
    """Of queries and keys: their only weight, which the original calls a scale."""
    for own, there, origin in zip(("q_norm", "k_norm"), theirs, ("query_norm", "key_norm"), strict=True):
        weight = f"{ours}.{own}.weight"
        yield line(bare=True, ours=weight, diffusers=f"{there}.weight", original=f"{original}.{origin}.scale")


# What of a network's names the shape is read from, in both layouts
_MARKS = {
    DIFFUSERS: {
        "entry": "x_embedder.weight",
        "context": "context_embedder.weight",
        "pooled": "time_text_embed.text_embedder.linear_1.weight",
        "guidance": "time_text_embed.guidance_embedder.linear_1.weight",
        "out": "proj_out.weight",
        "norm": "transformer_blocks.0.attn.norm_q.weight",
        "feed": "transformer_blocks.0.ff.net.0.proj.weight",
        "double": "transformer_blocks.{}.norm1.linear.weight",
        "single": "single_transformer_blocks.{}.norm.linear.weight",
    },
    ORIGINAL: {
        "entry": "img_in.weight",
        "context": "txt_in.weight",
        "pooled": "vector_in.in_layer.weight",
        "guidance": "guidance_in.in_layer.weight",
        "out": "final_layer.linear.weight",
        "norm": "double_blocks.0.img_attn.norm.query_norm.scale",
        "feed": "double_blocks.0.img_mlp.0.weight",
        "double": "double_blocks.{}.img_mod.lin.weight",
        "single": "single_blocks.{}.modulation.lin.weight",
    },
}


def config_of(
    state: Mapping[str, Tensor],
    layout: str,
    where: str,
    *,
    size: int | tuple[int, int] = 128,
    axes: tuple[int, int, int] | None = None,
) -> FluxConfig:
    """The shape that the weights of diffusers' or the original layout tell.

    size: of the latents. axes: channels of a head that turn with each axis. Neither leaves a trace in the weights.
    """
    marks = _MARKS[layout]
    try:
        dim, entry = state[marks["entry"]].shape
        shape = FluxConfig(
            size=size,
            patch=PATCH,
            dim=dim,
            double=_count(state, marks["double"]),
            single=_count(state, marks["single"]),
            heads=dim // len(state[marks["norm"]]),
            mlp_ratio=len(state[marks["feed"]]) / dim,
            axes=axes,
            in_channels=entry // PATCH**2,
            out_channels=len(state[marks["out"]]) // PATCH**2,
            context_dim=state[marks["context"]].shape[1],
            pooled_dim=state[marks["pooled"]].shape[1],
            guidance=marks["guidance"] in state,
        )
    except (KeyError, ValueError) as error:
        raise CheckpointError("a weight of the FLUX transformer is missing", where=where, seen=str(error)) from None
    return shape


def _count(state: Mapping[str, Tensor], template: str) -> int:
    n = 0
    while template.format(n) in state:
        n += 1
    return n

"""Stable Diffusion's U-Net in diffusers' folders and in the original files: names, and the shape that weights tell.

The original numbers every step of the way down and up in one row, whose entries hold a residual block (0), a
transformer (1) and on the way up perhaps the step to the next size; diffusers numbers levels, and blocks within them.
Heads leave no trace in the weights: there are 8 where transformers are entered by convolutions (SD 1), and 64 channels
in each else.
"""

from collections.abc import Iterator, Mapping

from torch import Tensor

from sfumato.errors import CheckpointError
from sfumato.io.keymap import DIFFUSERS, ORIGINAL, OURS, Line, line
from sfumato.nets.stable_unet import StableUNetConfig

PREFIX = "model.diffusion_model."
MARKS = {OURS: "down.0.residual.conv1.weight", DIFFUSERS: "down_blocks.0.resnets.0.conv1.weight"}


SHAPE = ("in_channels", "out_channels", "channels", "blocks", "depths", "middle", "heads", "context_dim")
MORE = ("pooled_dim", "guidance_dim", "linear", "groups")


def slot_of(shape: StableUNetConfig, size: int | list[int]) -> dict[str, object]:
    """The slot of a network of this shape. size: of its latents."""
    slot = {name: getattr(shape, name) for name in (*SHAPE, *MORE)}
    slot = {name: list(value) if isinstance(value, tuple) else value for name, value in slot.items()}
    return slot | {"kind": "stable_unet", "size": size}


def lines(config: StableUNetConfig) -> list[Line]:
    """Every module of a U-Net of this shape."""
    out = [
        line(ours="norm", diffusers="conv_norm_out", original="out.0"),
        line(ours="exit", diffusers="conv_out", original="out.2"),
    ]
    return [*first_half(config), *out, *_way_up(config)]


def first_half(config: StableUNetConfig) -> list[Line]:
    """Every module up to the middle: what a ControlNet has too."""
    return [*_entry(config), *_way_down(config), *_middle(config)]


def _entry(config: StableUNetConfig) -> Iterator[Line]:
    yield line(ours="entry", diffusers="conv_in", original="input_blocks.0.0")
    for i, name in ((0, "linear_1"), (2, "linear_2")):
        yield line(ours=f"time.{i}", diffusers=f"time_embedding.{name}", original=f"time_embed.{i}")
        if config.pooled_dim:
            yield line(ours=f"pooled.{i}", diffusers=f"add_embedding.{name}", original=f"label_emb.0.{i}")
    if config.guidance_dim:
        yield line(ours="guided", diffusers="time_embedding.cond_proj", original="time_embed.cond_proj")


def _way_down(config: StableUNetConfig) -> Iterator[Line]:
    n = 0
    for level, depth in enumerate(config.depths):
        for j in range(config.blocks):
            names = (f"down.{n}", f"down_blocks.{level}", f"input_blocks.{n + 1}")
            yield from _stage(*names, j, depth, config)
            n += 1
        if level + 1 < len(config.channels):
            there = f"down_blocks.{level}.downsamplers.0.conv"
            yield line(ours=f"down.{n}.conv", diffusers=there, original=f"input_blocks.{n + 1}.0.op")
            n += 1


def _way_up(config: StableUNetConfig) -> Iterator[Line]:
    n, levels = 0, len(config.channels)
    for i, depth in enumerate(reversed(config.depths)):
        for j in range(config.blocks + 1):
            yield from _stage(f"up.{n}", f"up_blocks.{i}", f"output_blocks.{n}", j, depth, config)
            if j == config.blocks and i + 1 < levels:
                original = f"output_blocks.{n}.{2 if depth else 1}.conv"
                yield line(ours=f"up.{n}.grow", diffusers=f"up_blocks.{i}.upsamplers.0.conv", original=original)
            n += 1


def _middle(config: StableUNetConfig) -> Iterator[Line]:
    last = 2 if config.middle else 1
    yield from residual("middle.first", "mid_block.resnets.0", "middle_block.0")
    yield from residual("middle.second", "mid_block.resnets.1", f"middle_block.{last}")
    if config.middle:
        names = ("middle.transformer", "mid_block.attentions.0", "middle_block.1")
        yield from _transformer(*names, config.middle, config.linear)


def _stage(ours: str, diffusers: str, original: str, j: int, depth: int, config: StableUNetConfig) -> Iterator[Line]:
    yield from residual(f"{ours}.residual", f"{diffusers}.resnets.{j}", f"{original}.0")
    if depth:
        names = (f"{ours}.transformer", f"{diffusers}.attentions.{j}", f"{original}.1")
        yield from _transformer(*names, depth, config.linear)


def residual(ours: str, diffusers: str, original: str) -> Iterator[Line]:
    """A residual block, which is the same in all U-Nets that descend from ADM's."""
    for name, there, origin in (
        ("norm1", "norm1", "in_layers.0"),
        ("conv1", "conv1", "in_layers.2"),
        ("told", "time_emb_proj", "emb_layers.1"),
        ("norm2", "norm2", "out_layers.0"),
        ("conv2", "conv2", "out_layers.3"),
        ("skip", "conv_shortcut", "skip_connection"),
    ):
        yield line(ours=f"{ours}.{name}", diffusers=f"{diffusers}.{there}", original=f"{original}.{origin}")


def _transformer(ours: str, diffusers: str, original: str, depth: int, linear: bool) -> Iterator[Line]:
    square = () if linear else (DIFFUSERS, ORIGINAL)
    yield line(ours=f"{ours}.norm", diffusers=f"{diffusers}.norm", original=f"{original}.norm")
    yield line(square, ours=f"{ours}.entry", diffusers=f"{diffusers}.proj_in", original=f"{original}.proj_in")
    yield line(square, ours=f"{ours}.exit", diffusers=f"{diffusers}.proj_out", original=f"{original}.proj_out")
    for k in range(depth):
        for name, there in _BLOCK:
            both = f"transformer_blocks.{k}.{there}"
            yield line(ours=f"{ours}.blocks.{k}.{name}", diffusers=f"{diffusers}.{both}", original=f"{original}.{both}")


_BLOCK = (
    *((f"norm{i}", f"norm{i}") for i in (1, 2, 3)),
    *(
        (f"{ours}.{part}", f"{there}.to_{part}")
        for ours, there in (("attention", "attn1"), ("cross", "attn2"))
        for part in "qkv"
    ),
    ("attention.out", "attn1.to_out.0"),
    ("cross.out", "attn2.to_out.0"),
    ("gated", "ff.net.0.proj"),
    ("last", "ff.net.2"),
)


def config_of(
    state: Mapping[str, Tensor], layout: str, where: str, heads: tuple[int, ...] | None = None, groups: int = 32
) -> StableUNetConfig:
    """The shape that the weights of diffusers' or the original layout tell, but for the heads and the groups."""
    try:
        return (_of_diffusers if layout == DIFFUSERS else _of_original)(state, heads, groups)
    except (KeyError, IndexError) as error:
        raise CheckpointError("a weight of the U-Net is missing", where=where, seen=str(error)) from None


def _of_diffusers(state: Mapping[str, Tensor], heads: tuple[int, ...] | None, groups: int) -> StableUNetConfig:
    levels = _count(state, "down_blocks.{}.resnets.0.conv1.weight")
    blocks = _count(state, "down_blocks.0.resnets.{}.conv1.weight")
    widths = tuple(state[f"down_blocks.{i}.resnets.0.conv1.weight"].shape[0] for i in range(levels))
    depths = tuple(_depth(state, f"down_blocks.{i}.attentions.0") for i in range(levels))
    return _shape(
        state,
        widths,
        blocks,
        depths,
        heads,
        groups,
        "mid_block.attentions.0",
        ("conv_in", "conv_out", "add_embedding.linear_1", "time_embedding.cond_proj"),
    )


def _of_original(state: Mapping[str, Tensor], heads: tuple[int, ...] | None, groups: int) -> StableUNetConfig:
    widths: list[int] = []
    depths: list[int] = []
    blocks, n, here = 0, 1, 0
    while (key := f"input_blocks.{n}.0.in_layers.2.weight") in state or f"input_blocks.{n}.0.op.weight" in state:
        if key in state:
            if here == 0:
                widths.append(state[key].shape[0])
                depths.append(_depth(state, f"input_blocks.{n}.1"))
            here += 1
            blocks = max(blocks, here)
        else:
            here = 0
        n += 1
    names = ("input_blocks.0.0", "out.2", "label_emb.0.0", "time_embed.cond_proj")
    return _shape(state, tuple(widths), blocks, tuple(depths), heads, groups, "middle_block.1", names)


def _shape(
    state: Mapping[str, Tensor],
    widths: tuple[int, ...],
    blocks: int,
    depths: tuple[int, ...],
    heads: tuple[int, ...] | None,
    groups: int,
    middle: str,
    names: tuple[str, str, str, str],
) -> StableUNetConfig:
    entry, exit_, pooled, guided = (f"{name}.weight" for name in names)
    words = next(value for key, value in state.items() if key.endswith("attn2.to_k.weight"))
    linear = next(value for key, value in state.items() if key.endswith("proj_in.weight")).ndim == 2
    return StableUNetConfig(
        in_channels=state[entry].shape[1],
        out_channels=state[exit_ if exit_ in state else entry].shape[0 if exit_ in state else 1],  # a control has none
        channels=widths,
        blocks=blocks,
        depths=depths,
        middle=_depth(state, middle),
        heads=heads or tuple(width // 64 if linear else 8 for width in widths),
        context_dim=words.shape[1],
        pooled_dim=state[pooled].shape[1] if pooled in state else 0,
        guidance_dim=state[guided].shape[1] if guided in state else 0,
        linear=linear,
        groups=groups,
    )


def _count(state: Mapping[str, Tensor], template: str) -> int:
    n = 0
    while template.format(n) in state:
        n += 1
    return n


def _depth(state: Mapping[str, Tensor], transformer: str) -> int:
    return _count(state, transformer + ".transformer_blocks.{}.attn1.to_q.weight")

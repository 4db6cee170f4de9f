"""ControlNets of Stable Diffusion 3 and FLUX.1: diffusers' `SD3ControlNetModel` and `FluxControlNetModel`, and the
original files of Stability AI (for Stable Diffusion 3.5 Large) and of XLabs (for FLUX.1 dev).

Their blocks have the names of the transformers'; beside them are a way in for the picture and, for each block, a linear
layer out. What weights do not tell is in the config: the width of heads, the share of each axis of places, whether the
pooled prompt is hidden from the control. Of original files it is what was published: Stability's say besides of what
kind of picture they are (`control_type`), and that for edges was trained on pictures 127.5 x + 0.5 of x in [0, 1].
"""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from sfumato.errors import CheckpointError, ConfigError
from sfumato.io.families import flux, sd3
from sfumato.io.keymap import DIFFUSERS, ORIGINAL, OURS, Line, line, renamed
from sfumato.nets.control_flux import FluxControl, FluxControlConfig
from sfumato.nets.control_mmdit import MMDiTControl, MMDiTControlConfig
from sfumato.nets.flux import FluxConfig
from sfumato.nets.mmdit import MMDiTConfig

SD3, FLUX = "SD3ControlNetModel", "FluxControlNetModel"
MARKS = {SD3: "pos_embed_input.proj.weight", FLUX: "controlnet_x_embedder.weight"}
ORIGINALS = {SD3: "transformer_blocks.0.attn.qkv.weight", FLUX: "pos_embed_input.weight"}  # of original files alone
HINT = "input_hint_block"
TYPE, CANNY = "control_type", 1  # Stability's number of a kind of picture, and that of edges
STRETCHED = "stretched_hint"  # of a config.json, where this library wrote it

Config = MMDiTControlConfig | FluxControlConfig


def kind_of(names: Collection[str]) -> str | None:
    """The class of diffusers whose weights have these names, in either layout; None for another."""
    return next((kind for kind in MARKS if MARKS[kind] in names or ORIGINALS[kind] in names), None)


def layout_of(kind: str, names: Collection[str]) -> str:
    """The layout of a control's weights."""
    return ORIGINAL if ORIGINALS[kind] in names else DIFFUSERS


def class_of(config: Config) -> type[MMDiTControl] | type[FluxControl]:
    """The network of such a shape."""
    return MMDiTControl if isinstance(config, MMDiTControlConfig) else FluxControl


def config_of(kind: str, state: Mapping[str, Tensor], where: str, told: Mapping[str, Any]) -> Config:
    """The shape that weights tell, and a config.json what they do not. CheckpointError where weights are missing."""
    try:
        if layout_of(kind, state) == ORIGINAL and kind == SD3:
            told = _told_by_stability(state, where)
        return (_of_sd3 if kind == SD3 else _of_flux)(state, told)
    except (KeyError, IndexError, ValueError) as error:
        raise CheckpointError("a weight of the control is missing", where=where, seen=str(error)) from None


def lines(config: Config) -> list[Line]:
    """Every module of a control of this shape, in diffusers' and the original layout."""
    return [*(_lines_of_sd3(config) if isinstance(config, MMDiTControlConfig) else _lines_of_flux(config))]


def original(control: MMDiTControl | FluxControl) -> dict[str, Tensor]:
    """The weights as Stability's or XLabs' file names them. ConfigError for shapes that have no such file."""
    config, names = control.config, lines(control.config)
    own = control.state_dict()
    if isinstance(config, MMDiTControlConfig):
        known, fits = "Stable Diffusion 3.5 Large's (Stability AI)", config.shares and not config.net.context_dim
    else:
        known, fits = "those of FLUX.1 that read pixels (XLabs)", bool(config.hint)
        fits = fits and not (config.modes or config.net.single)
    if not fits or config.net.dim == config.net.pooled_dim:
        what = f"no publisher has files of such a control, only of {known}"
        seen = f"{type(control).__name__} {_kind(config)}"
        raise ConfigError(what, where="--to single-file", seen=seen, fix="--to diffusers")
    out = renamed(own, names, OURS, ORIGINAL, "control")
    if isinstance(config, MMDiTControlConfig):
        out[TYPE] = torch.tensor([CANNY if config.stretched else 0], dtype=torch.int32)
    return out


def _kind(config: Config) -> str:
    """What sets a control apart, in words."""
    if isinstance(config, MMDiTControlConfig):
        return "told the words" if config.net.context_dim else "with a way in of its own" if not config.shares else ""
    read = "pixels" if config.hint else "latents"
    return f"of {config.modes} kinds of pictures, that reads {read}" if config.modes else f"that reads {read}"


def described(config: Config) -> dict[str, Any]:
    """diffusers' config of it."""
    return _described_sd3(config) if isinstance(config, MMDiTControlConfig) else _described_flux(config)


def _count(state: Mapping[str, Tensor], template: str) -> int:
    n = 0
    while template.format(n) in state:
        n += 1
    return n


# Stable Diffusion 3


def weights(kind: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights among a file's tensors: Stability's have a number too, and a way in for x_t that is never used."""
    if kind != SD3 or layout_of(kind, state) == DIFFUSERS:
        return dict(state)
    return {key: value for key, value in state.items() if key != TYPE and not key.startswith("pos_embed.")}


def _told_by_stability(state: Mapping[str, Tensor], where: str) -> dict[str, Any]:
    """What a config.json would say of an original file of Stable Diffusion 3.5 Large."""
    pooled, entry = state["time_text_embed.text_embedder.linear_1.weight"], state[MARKS[SD3]]
    if pooled.shape[0] == pooled.shape[1]:  # which is told what the network made of the pooled prompt
        seen = f"{pooled.shape[1]} numbers, as many as channels"
        raise CheckpointError("only controls of Stable Diffusion 3.5 Large have such files", where=where, seen=seen)
    kind = int(state[TYPE].flatten()[0]) if TYPE in state else 0
    said = {"in_channels": entry.shape[1], "force_zeros_for_pooled_projection": False}
    return {**said, "shared_entry": True, STRETCHED: kind == CANNY}


def _of_sd3(state: Mapping[str, Tensor], told: Mapping[str, Any]) -> MMDiTControlConfig:
    entry = None if told.get("shared_entry") else state.get("pos_embed.proj.weight")
    context, feed = state.get("context_embedder.weight"), "transformer_blocks.0.ff.net.0.proj.weight"
    table, norm = state.get("pos_embed.pos_embed"), state.get("transformer_blocks.0.attn.norm_q.weight")
    dim, wide, patch = state[MARKS[SD3]].shape[:3]
    channels = int(told.get("in_channels", 16)) if entry is None else entry.shape[1]
    depth = _count(state, "controlnet_blocks.{}.weight")
    width = int(told.get("attention_head_dim") or sd3.HEAD) if norm is None else len(norm)
    size = int(told.get("sample_size", 128))
    side = round(table.shape[1] ** 0.5) if table is not None else size // patch
    shape = MMDiTConfig(
        size=size,
        patch=patch,
        dim=dim,
        depth=depth,
        heads=dim // width,
        mlp_ratio=len(state[feed if feed in state else "transformer_blocks.0.mlp.fc1.weight"]) / dim,
        in_channels=channels,
        out_channels=channels,
        context_dim=0 if context is None else context.shape[1],
        pooled_dim=state["time_text_embed.text_embedder.linear_1.weight"].shape[1],
        qk_norm=norm is not None,
        dual=tuple(i for i in range(depth) if f"transformer_blocks.{i}.attn2.to_q.weight" in state),
        table=side,
        step=size / patch / side,
    )
    unpooled = bool(told.get("force_zeros_for_pooled_projection", True))
    return MMDiTControlConfig(shape, wide - channels, unpooled, entry is None, bool(told.get(STRETCHED)))


def _lines_of_sd3(config: MMDiTControlConfig) -> Iterator[Line]:
    shape = config.net
    for one in sd3.entrance():  # by the names of diffusers
        yield replace(one, names={**one.names, ORIGINAL: one.names[DIFFUSERS]})
    for i in range(shape.depth):
        for one in sd3.block(i, shape, last=False):
            old, new = f"joint_blocks.{i}.x_block.", f"transformer_blocks.{i}."
            theirs = tuple(name.replace(old, new) for name in one.names[ORIGINAL] if name.startswith(old))
            yield replace(one, names={key: value for key, value in {**one.names, ORIGINAL: theirs}.items() if value})
        yield line(ours=f"leave.{i}", diffusers=f"controlnet_blocks.{i}", original=f"controlnet_blocks.{i}")
    yield line(ours="hint", diffusers="pos_embed_input.proj", original="pos_embed_input.proj")


def _described_sd3(config: MMDiTControlConfig) -> dict[str, Any]:
    shape = config.net
    own = {STRETCHED: True} if config.stretched else {}
    return own | {
        "_class_name": SD3,
        "attention_head_dim": shape.dim // shape.heads,
        "caption_projection_dim": shape.dim,
        "dual_attention_layers": list(shape.dual),
        "extra_conditioning_channels": config.extra,
        "force_zeros_for_pooled_projection": config.unpooled,
        "in_channels": shape.in_channels,
        "joint_attention_dim": shape.context_dim or None,
        "num_attention_heads": shape.heads,
        "num_layers": shape.depth,
        "out_channels": shape.out_channels or shape.in_channels,
        "patch_size": shape.patch,
        "pooled_projection_dim": shape.pooled_dim,
        "pos_embed_max_size": shape.side,
        "qk_norm": "rms_norm" if shape.qk_norm else None,
        "sample_size": shape.size if isinstance(shape.size, int) else max(shape.size),
        "use_pos_embed": not config.shares,
    }


# FLUX.1


def _of_flux(state: Mapping[str, Tensor], told: Mapping[str, Any]) -> FluxControlConfig:
    axes, names = told.get("axes_dims_rope"), _FLUX[layout_of(FLUX, state)]
    dim, entry = state[names["entry"]].shape
    double = _count(state, names["double"])
    norm = next(key for key in state if key.endswith(names["norm"]))
    feed = next((key for key in state if key.endswith((names["feed"], names["single feed"]))), None)
    shape = FluxConfig(
        size=128,
        patch=flux.PATCH,
        dim=dim,
        double=double,
        single=_count(state, names["single"]),
        heads=dim // len(state[norm]),
        mlp_ratio=len(state[feed]) / dim if feed else 4.0,
        axes=None if axes is None else (int(axes[0]), int(axes[1]), int(axes[2])),
        in_channels=entry // flux.PATCH**2,
        out_channels=entry // flux.PATCH**2,
        context_dim=state[names["context"]].shape[1],
        pooled_dim=state[names["pooled"]].shape[1],
        guidance=names["guidance"] in state,
    )
    kinds, widths, colours = state.get("controlnet_mode_embedder.weight"), list[int](), 3
    if (first := state.get(names["hint"])) is not None:
        widths, colours = [len(first)], first.shape[1]
        while (later := state.get(names["later"].format(*_numbers(len(widths))))) is not None:
            widths.append(len(later))
    return FluxControlConfig(shape, 0 if kinds is None else len(kinds), tuple(widths), colours)


def _numbers(i: int) -> tuple[int, int]:
    """Where the convolution that makes the picture smaller for the i-th time is, in diffusers' list and in XLabs'."""
    return 2 * i - 1, 4 * i


_FLUX = {  # what the shape is read from
    DIFFUSERS: {
        "entry": "x_embedder.weight",
        "context": "context_embedder.weight",
        "pooled": "time_text_embed.text_embedder.linear_1.weight",
        "guidance": "time_text_embed.guidance_embedder.linear_1.weight",
        "norm": "attn.norm_q.weight",
        "feed": "ff.net.0.proj.weight",
        "single feed": "proj_mlp.weight",
        "double": "transformer_blocks.{}.norm1.linear.weight",
        "single": "single_transformer_blocks.{}.norm.linear.weight",
        "hint": f"{HINT}.conv_in.weight",
        "later": f"{HINT}.blocks.{{0}}.weight",
    },
    ORIGINAL: {
        "entry": "img_in.weight",
        "context": "txt_in.weight",
        "pooled": "vector_in.in_layer.weight",
        "guidance": "guidance_in.in_layer.weight",
        "norm": "img_attn.norm.query_norm.scale",
        "feed": "img_mlp.0.weight",
        "single feed": "img_mlp.0.weight",
        "double": "double_blocks.{}.img_mod.lin.weight",
        "single": "single_blocks.{}.modulation.lin.weight",
        "hint": f"{HINT}.0.weight",
        "later": f"{HINT}.{{1}}.weight",
    },
}


def _lines_of_flux(config: FluxControlConfig) -> Iterator[Line]:
    shape = config.net
    yield from flux.entrance(shape)
    for i in range(shape.double):
        yield from flux.double(i)
        yield line(ours=f"leave.{i}", diffusers=f"controlnet_blocks.{i}", original=f"controlnet_blocks.{i}")
    for i in range(shape.single):
        yield from flux.single(i, shape)
        yield line(ours=f"leave.{shape.double + i}", diffusers=f"controlnet_single_blocks.{i}")
    yield line(ours="hint", diffusers="controlnet_x_embedder", original="pos_embed_input")
    yield line(ours="kind", diffusers="controlnet_mode_embedder")
    last = 2 * len(config.hint) - 1
    for i in range(last + 1 if config.hint else 0):
        name = "conv_in" if i == 0 else "conv_out" if i == last else f"blocks.{i - 1}"
        yield line(ours=f"pixels.convs.{i}", diffusers=f"{HINT}.{name}", original=f"{HINT}.{2 * i}")


def _described_flux(config: FluxControlConfig) -> dict[str, Any]:
    shape = config.net
    return {
        "_class_name": FLUX,
        "attention_head_dim": shape.dim // shape.heads,
        "axes_dims_rope": list(shape.turning),
        "conditioning_embedding_channels": shape.in_channels if config.hint else None,
        "guidance_embeds": shape.guidance,
        "in_channels": shape.in_channels * flux.PATCH**2,
        "joint_attention_dim": shape.context_dim,
        "num_attention_heads": shape.heads,
        "num_layers": shape.double,
        "num_mode": config.modes or None,
        "num_single_layers": shape.single,
        "patch_size": flux.PATCH if config.hint else 1,
        "pooled_projection_dim": shape.pooled_dim,
    }

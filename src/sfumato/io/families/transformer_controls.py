"""ControlNets of Stable Diffusion 3 and FLUX.1: diffusers' `SD3ControlNetModel` and `FluxControlNetModel`.

Their blocks have the names of the transformers'; beside them are a way in for the picture and, for each block, a linear
layer out. What weights do not tell is in the config: the width of heads, the share of each axis of places, whether the
pooled prompt is hidden from the control.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from sfumato.errors import CheckpointError
from sfumato.io.families import flux, sd3
from sfumato.io.keymap import Line, line
from sfumato.nets.control_flux import FluxControl, FluxControlConfig
from sfumato.nets.control_mmdit import MMDiTControl, MMDiTControlConfig
from sfumato.nets.flux import FluxConfig
from sfumato.nets.mmdit import MMDiTConfig

SD3, FLUX = "SD3ControlNetModel", "FluxControlNetModel"
MARKS = {SD3: "pos_embed_input.proj.weight", FLUX: "controlnet_x_embedder.weight"}
HINT = "input_hint_block"

Config = MMDiTControlConfig | FluxControlConfig


def kind_of(state: Mapping[str, Tensor]) -> str | None:
    """The class of diffusers whose weights these are; None for another."""
    return next((kind for kind, mark in MARKS.items() if mark in state), None)


def class_of(config: Config) -> type[MMDiTControl] | type[FluxControl]:
    """The network of such a shape."""
    return MMDiTControl if isinstance(config, MMDiTControlConfig) else FluxControl


def config_of(kind: str, state: Mapping[str, Tensor], where: str, told: Mapping[str, Any]) -> Config:
    """The shape that weights tell, and a config.json what they do not. CheckpointError where weights are missing."""
    try:
        return (_of_sd3 if kind == SD3 else _of_flux)(state, told)
    except (KeyError, IndexError, ValueError) as error:
        raise CheckpointError("a weight of the control is missing", where=where, seen=str(error)) from None


def lines(config: Config) -> list[Line]:
    """Every module of a control of this shape, in diffusers' layout."""
    return [*(_lines_of_sd3(config) if isinstance(config, MMDiTControlConfig) else _lines_of_flux(config))]


def described(config: Config) -> dict[str, Any]:
    """diffusers' config of it."""
    return _described_sd3(config) if isinstance(config, MMDiTControlConfig) else _described_flux(config)


def _count(state: Mapping[str, Tensor], template: str) -> int:
    n = 0
    while template.format(n) in state:
        n += 1
    return n


# Stable Diffusion 3


def _of_sd3(state: Mapping[str, Tensor], told: Mapping[str, Any]) -> MMDiTControlConfig:
    entry, context = state.get("pos_embed.proj.weight"), state.get("context_embedder.weight")
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
        mlp_ratio=len(state["transformer_blocks.0.ff.net.0.proj.weight"]) / dim,
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
    return MMDiTControlConfig(shape, wide - channels, unpooled, entry is None)


def _lines_of_sd3(config: MMDiTControlConfig) -> Iterator[Line]:
    shape = config.net
    yield from sd3.entrance()
    for i in range(shape.depth):
        yield from sd3.block(i, shape, last=False)
        yield line(ours=f"leave.{i}", diffusers=f"controlnet_blocks.{i}")
    yield line(ours="hint", diffusers="pos_embed_input.proj")


def _described_sd3(config: MMDiTControlConfig) -> dict[str, Any]:
    shape = config.net
    return {
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
    axes = told.get("axes_dims_rope")
    dim, entry = state["x_embedder.weight"].shape
    double = _count(state, "transformer_blocks.{}.norm1.linear.weight")
    norm = next(key for key in state if key.endswith("attn.norm_q.weight"))
    feed = next((key for key in state if key.endswith(("ff.net.0.proj.weight", "proj_mlp.weight"))), None)
    guided = "time_text_embed.guidance_embedder.linear_1.weight"
    shape = FluxConfig(
        size=128,
        patch=flux.PATCH,
        dim=dim,
        double=double,
        single=_count(state, "single_transformer_blocks.{}.norm.linear.weight"),
        heads=dim // len(state[norm]),
        mlp_ratio=len(state[feed]) / dim if feed else 4.0,
        axes=None if axes is None else (int(axes[0]), int(axes[1]), int(axes[2])),
        in_channels=entry // flux.PATCH**2,
        out_channels=entry // flux.PATCH**2,
        context_dim=state["context_embedder.weight"].shape[1],
        pooled_dim=state["time_text_embed.text_embedder.linear_1.weight"].shape[1],
        guidance=guided in state,
    )
    kinds, widths, colours = state.get("controlnet_mode_embedder.weight"), list[int](), 3
    if (first := state.get(f"{HINT}.conv_in.weight")) is not None:
        widths, colours = [len(first)], first.shape[1]
        while (later := state.get(f"{HINT}.blocks.{2 * len(widths) - 1}.weight")) is not None:
            widths.append(len(later))
    return FluxControlConfig(shape, 0 if kinds is None else len(kinds), tuple(widths), colours)


def _lines_of_flux(config: FluxControlConfig) -> Iterator[Line]:
    shape = config.net
    yield from flux.entrance(shape)
    for i in range(shape.double):
        yield from flux.double(i)
        yield line(ours=f"leave.{i}", diffusers=f"controlnet_blocks.{i}")
    for i in range(shape.single):
        yield from flux.single(i, shape)
        yield line(ours=f"leave.{shape.double + i}", diffusers=f"controlnet_single_blocks.{i}")
    yield line(ours="hint", diffusers="controlnet_x_embedder")
    yield line(ours="kind", diffusers="controlnet_mode_embedder")
    last = 2 * len(config.hint) - 1
    for i in range(last + 1 if config.hint else 0):
        name = "conv_in" if i == 0 else "conv_out" if i == last else f"blocks.{i - 1}"
        yield line(ours=f"pixels.convs.{i}", diffusers=f"{HINT}.{name}")


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

"""ControlNets for Stable Diffusion: diffusers' `ControlNetModel`, and the original files (`control_model.`).

The way down has the names of the U-Net's; beside it are the convolutions that read the picture, those of zeros for the
skips, and one for the middle. An original file may hold a whole model too, of which only the control is read.
"""

from collections.abc import Mapping
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sfumato.catalogue import build
from sfumato.errors import CheckpointError
from sfumato.files import verify
from sfumato.hub import located
from sfumato.io import parts as shared
from sfumato.io import text_parts
from sfumato.io.directory import CONTROL, read_description, read_weights
from sfumato.io.families import stable, transformer_controls
from sfumato.io.family import Published
from sfumato.io.fill import unfilled
from sfumato.io.keymap import DIFFUSERS, ORIGINAL, OURS, Line, line, renamed, some
from sfumato.io.pretrained import read_json, read_state
from sfumato.nets.control_flux import FluxControlConfig
from sfumato.nets.control_mmdit import MMDiTControlConfig
from sfumato.nets.controlled import Control, ControlConfig, Controlled
from sfumato.nets.controlnet import ControlNet, ControlNetConfig
from sfumato.nets.flux import FluxConfig
from sfumato.nets.mmdit import MMDiTConfig
from sfumato.nets.stable_unet import StableUNetConfig
from sfumato.stored import FILES
from sfumato.text.joined import WAVES

PREFIX = "control_model."
PART = "controlnet"  # the subfolder of a pipeline
SAVED = "net.controls.0."  # where a model directory keeps it


def lines(config: ControlNetConfig) -> list[Line]:
    """Every module of a ControlNet of this shape."""
    last = 2 * (len(config.hint) - 1) + 1
    between = [
        line(
            ours=f"hint.convs.{i}",
            diffusers=f"controlnet_cond_embedding.blocks.{i - 1}",
            original=f"input_hint_block.{2 * i}",
        )
        for i in range(1, last)
    ]
    ends = [
        line(ours="hint.convs.0", diffusers="controlnet_cond_embedding.conv_in", original="input_hint_block.0"),
        line(
            ours=f"hint.convs.{last}",
            diffusers="controlnet_cond_embedding.conv_out",
            original=f"input_hint_block.{2 * last}",
        ),
        line(ours="leave_middle", diffusers="controlnet_mid_block", original="middle_block_out.0"),
    ]
    skips = 1 + len(config.unet.channels) * (config.unet.blocks + 1) - 1
    leave = [
        line(ours=f"leave.{i}", diffusers=f"controlnet_down_blocks.{i}", original=f"zero_convs.{i}.0")
        for i in range(skips)
    ]
    return [*stable.first_half(config.unet), *ends, *between, *leave]


def config_of(
    state: Mapping[str, Tensor], layout: str, where: str, told: Mapping[str, Any] | None = None
) -> ControlNetConfig:
    """The shape that the weights of diffusers' or the original layout tell. told: a config.json, for what they do not:
    heads, groups, the order of the colours.
    """
    told = told or {}
    levels = len(told.get("block_out_channels", ()))
    heads = told.get("num_attention_heads") or told.get("attention_head_dim")  # which means heads, by mistake
    each = tuple(heads) if isinstance(heads, (list, tuple)) else (int(heads),) * levels if heads else None
    if told.get("global_pool_conditions"):
        raise CheckpointError("a control that averages over places is not known here", where=where)
    try:
        unet = stable.config_of(state, layout, where, each, int(told.get("norm_num_groups") or 32))
        first, later = _HINTS[layout]
        widths = [state[first].shape[0]]
        while (key := later(len(widths))) in state:
            widths.append(state[key].shape[0])
        colours = state[first].shape[1]
    except (KeyError, StopIteration) as error:
        raise CheckpointError("a weight of the control is missing", where=where, seen=str(error)) from None
    return ControlNetConfig(
        unet,
        tuple(widths),
        colours,
        told.get("controlnet_conditioning_channel_order") == "bgr",
    )


# Of each layout: the first convolution of the hint, and that which makes it smaller for the i-th time.
_HINTS: dict[str, tuple[str, Any]] = {
    DIFFUSERS: (
        "controlnet_cond_embedding.conv_in.weight",
        lambda i: f"controlnet_cond_embedding.blocks.{2 * i - 1}.weight",
    ),
    ORIGINAL: ("input_hint_block.0.weight", lambda i: f"input_hint_block.{4 * i}.weight"),
}


def read_control(path: str | Path) -> Control:
    """The control of a folder (one of diffusers, a pipeline with one, a run or model of ours), here or on the hub, or
    of an original file.

    CheckpointError for what is none.
    """
    path = located(path)
    if (path / "model" / "model.json").is_file():
        path = path / "model"
    if (path / "model.json").is_file():
        return _own(path)
    if (path / PART / "config.json").is_file():
        path = path / PART
    if path.is_dir() and not (path / "config.json").is_file():
        raise CheckpointError("this folder holds no control", where=str(path), fix="config.json of a ControlNetModel")
    if not path.exists() or (path.is_file() and path.suffix not in FILES):
        raise CheckpointError("there is no such control", where=str(path), fix="a folder or a file of weights")
    told = read_json(path / "config.json") if path.is_dir() else {}
    state = {key: value.float() for key, value in read_state(path).items()}
    return filled(*understood(state, str(path), told), str(path))


def understood(
    state: Mapping[str, Tensor], where: str, told: Mapping[str, Any]
) -> tuple[ControlConfig, dict[str, Tensor]]:
    """The shape of the control among some weights, in diffusers' or an original layout, and its own under our names.

    told: a config.json, if there is one. CheckpointError where some are missing, or are no control's.
    """
    if (kind := transformer_controls.kind_of(state)) is not None:
        shape = transformer_controls.config_of(kind, state, where, told)
        layout, state = transformer_controls.layout_of(kind, state), transformer_controls.weights(kind, state)
        return shape, renamed(state, transformer_controls.lines(shape), layout, OURS, where)
    if any(key.startswith(PREFIX) for key in state):
        state = {key.removeprefix(PREFIX): value for key, value in state.items() if key.startswith(PREFIX)}
    layout = ORIGINAL if "time_embed.0.weight" in state else DIFFUSERS
    config = config_of(state, layout, where, told)
    return config, renamed(state, lines(config), layout, OURS, where)


def _own(folder: Path) -> Control:
    section = read_description(folder)["model"]
    if CONTROL in section:
        return _alone(folder, section[CONTROL])
    slot = section.get("net")
    if not isinstance(slot, Mapping) or slot.get("kind") != "controlled":
        raise CheckpointError("this model has no control", where=str(folder), fix="a run with a section `control`")
    with unfilled():
        net = build(slot, "Net")
    assert isinstance(net, Controlled)
    state = read_weights(folder / "model.safetensors")
    mine = {key.removeprefix(SAVED): value for key, value in state.items() if key.startswith(SAVED)}
    return filled(net.controls[0].config, mine, str(folder))  # type: ignore[arg-type]


SHAPES: dict[str, tuple[type[Any], type[Any]]] = {  # of the kinds of controls, and of the networks that they are of
    "controlnet": (ControlNetConfig, StableUNetConfig),
    "control_mmdit": (MMDiTControlConfig, MMDiTConfig),
    "control_flux": (FluxControlConfig, FluxConfig),
}


def alone(config: ControlConfig) -> dict[str, Any]:
    """A control's shape as plain data, with its `kind`, as a directory of a control alone says it."""
    if isinstance(config, FluxControlConfig):  # which may be left to the width of the heads
        config = replace(config, net=replace(config.net, axes=config.net.turning))
    return {"kind": next(kind for kind, (shape, _) in SHAPES.items() if isinstance(config, shape)), **asdict(config)}


def _alone(folder: Path, said: Any) -> Control:
    """The inverse, with the weights. CheckpointError for what is missing, altered or unfit."""
    verify(folder)
    try:
        shape, inner = SHAPES[said["kind"]]
        plain: Any = {key: tuple(value) if isinstance(value, list) else value for key, value in said.items()}
        of = "unet" if shape is ControlNetConfig else "net"
        net = {key: tuple(value) if isinstance(value, list) else value for key, value in plain.pop(of).items()}
        config = shape(**{key: value for key, value in plain.items() if key != "kind"}, **{of: inner(**net)})
    except (AttributeError, KeyError, TypeError) as error:
        what = "model.json describes no control of this version"
        raise CheckpointError(what, where=str(folder), seen=str(error)) from None
    head = f"{CONTROL}."
    state = {key.removeprefix(head): value for key, value in read_weights(folder / "model.safetensors").items()}
    return filled(config, state, str(folder))


def filled(config: ControlConfig, state: Mapping[str, Tensor], where: str) -> Any:
    """The control of a shape with some weights, in evaluation mode. CheckpointError where they do not fit."""
    kind: Any = ControlNet if isinstance(config, ControlNetConfig) else transformer_controls.class_of(config)
    with torch.random.fork_rng(devices=[]), unfilled():
        made = kind(config)
    own = made.state_dict()
    faults = [f"{key} is missing" for key in own.keys() - state.keys()]
    faults += [f"{key} is none of its weights" for key in state.keys() - own.keys()]
    faults += [key for key in own.keys() & state.keys() if own[key].shape != state[key].shape]
    if faults:
        raise CheckpointError("weights do not fit a control", where=where, seen=some(faults))
    made.load_state_dict(state, assign=True)
    return made.eval().requires_grad_(False)


def slot_of(config: ControlConfig, unet: Mapping[str, Any], base: Any = None) -> dict[str, Any]:
    """The slot of a network with this control, around the slot of its U-Net, or transformer. base: of a transformer,
    its config.
    """
    if not isinstance(config, ControlNetConfig):
        plain = {one.name: getattr(config, one.name) for one in fields(config) if one.name != "net"}
        usual = {one.name: one.default for one in fields(config)}
        own = {name: value for name, value in plain.items() if value != usual[name]}
        shape = {name: value for name, value in vars(config.net).items() if value != getattr(base, name)}
        found = {name: list(v) if isinstance(v, tuple) else v for name, v in {**shape, **own}.items() if name != "size"}
        return {"kind": "controlled", "net": dict(unet), "blocks": found}
    slot: dict[str, Any] = {"kind": "controlled", "net": dict(unet), "hint": list(config.hint)}
    slot |= {"colours": config.colours, "bgr": config.bgr}
    shape = {name: getattr(config.unet, name) for name in unet if name not in ("kind", "size", "out_channels")}
    shape = {name: list(value) if isinstance(value, tuple) else value for name, value in shape.items()}
    other = {name: value for name, value in shape.items() if value != unet[name]}
    return slot | ({"unet": other} if other else {})


def hint_of(config: ControlConfig, field: str = "control") -> dict[str, Any]:
    """The slot of the conditioner that gives a control its picture."""
    told: dict[str, Any] = {"kind": "hint", "field": field}
    if not config.latents:
        return told
    if getattr(config, "stretched", False):
        return {**told, "through": "stretched"}
    return {**told, "through": "unshifted" if getattr(config, "unpooled", False) else "codec"}


def parted(net: torch.nn.Module) -> tuple[torch.nn.Module, Control | None]:
    """A network and its control, where it has one; several of them have no published form, and the network is all."""
    if not isinstance(net, Controlled) or len(net.controls) != 1:
        return net, None
    return net.net, net.controls[0]  # type: ignore[return-value]


def beside(found: Published, folder: Path, index: Mapping[str, Any], base: Any) -> Published:
    """What was read of a transformer's folder, with the control that lies in it. base: the transformer's config.
    CheckpointError where it holds several.
    """
    kind = str(index[PART][1])
    if kind not in transformer_controls.MARKS:
        fix = "--control, once for each"
        raise CheckpointError("a folder holds one control", where=str(folder), seen=kind, fix=fix)
    control, head = read_control(folder / PART), "conditioner."
    inner = {name: value for name, value in found.state.items() if name.startswith("net.")}
    text = {name: value for name, value in found.state.items() if name.startswith(head)}
    rest = {name: value for name, value in found.state.items() if not name.startswith(("net.", head))}
    conditioner = found.section["conditioner"]
    slot, moved, files = text_parts.join_text(conditioner, text, found.files, hint_of(control.config))
    net = slot_of(control.config, found.section["net"], base)
    section = {**found.section, "net": net, "conditioner": slot}
    return replace(found, section=section, state=rest | joined(inner, control) | moved, files=files)


def joined(net: Mapping[str, Tensor], control: Control) -> dict[str, Tensor]:
    """The weights of a U-Net, whose names begin with `net.`, and of its control, as those of one network."""
    inner = {f"net.{key}": value for key, value in net.items()}
    return inner | {f"{SAVED}{key}": value for key, value in control.state_dict().items()}


def write_control(folder: Path, control: Control, dtype: torch.dtype) -> None:
    """diffusers' folder of it."""
    if not isinstance(control, ControlNet):
        version = {"_diffusers_version": shared.VERSION}
        shared.write_json(folder / "config.json", transformer_controls.described(control.config) | version)
        named = renamed(control.state_dict(), transformer_controls.lines(control.config), OURS, DIFFUSERS, str(folder))
        shared.write_part(folder / shared.WEIGHTS, named, dtype)
        return
    shared.write_json(folder / "config.json", _config(control.config))
    state = renamed(control.state_dict(), lines(control.config), OURS, DIFFUSERS, str(folder))
    shared.write_part(folder / shared.WEIGHTS, state, dtype)


def original(control: Control) -> dict[str, Tensor]:
    """The weights as the original file names them. ConfigError for those whose publishers have no such file."""
    if not isinstance(control, ControlNet):
        return transformer_controls.original(control)
    state = renamed(control.state_dict(), lines(control.config), OURS, ORIGINAL, "control")
    return {f"{PREFIX}{key}": value for key, value in state.items()}


def _config(config: ControlNetConfig) -> dict[str, Any]:
    unet = config.unet
    *depths, last = unet.depths
    told = {  # SDXL's: the pooled prompt, and six sizes as sinusoids
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": WAVES,
        "projection_class_embeddings_input_dim": unet.pooled_dim,
    }
    return (told if unet.pooled_dim else {}) | {
        "_class_name": "ControlNetModel",
        "_diffusers_version": shared.VERSION,
        "act_fn": "silu",
        "attention_head_dim": list(unet.heads),  # which means heads, by mistake
        "block_out_channels": list(unet.channels),
        "conditioning_channels": config.colours,
        "conditioning_embedding_out_channels": list(config.hint),
        "controlnet_conditioning_channel_order": "bgr" if config.bgr else "rgb",
        "cross_attention_dim": unet.context_dim,
        "down_block_types": ["CrossAttnDownBlock2D" if depth else "DownBlock2D" for depth in unet.depths],
        "in_channels": unet.in_channels,
        "layers_per_block": unet.blocks,
        "norm_num_groups": unet.groups,
        "transformer_layers_per_block": [*(depth or 1 for depth in depths), last or unet.middle or 1],
        "use_linear_projection": unet.linear,
    }

"""ControlNets alone, in any layout: folders of diffusers, the publishers' original files, and directories of ours.

A directory of ours says a control's shape under `model.control`, where a model has a `net`, and keeps its weights under
`control.`. An original file says less than a folder: where what is read back from it would be another control, none is
written.
"""

from collections.abc import Collection
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from sfumato import files
from sfumato.errors import CheckpointError, ConfigError
from sfumato.io.directory import CONTROL, read_description, write_directory, write_file
from sfumato.io.families.controlnet import PREFIX, alone, original, understood, write_control
from sfumato.io.families.transformer_controls import FLUX, ORIGINALS, SD3, kind_of
from sfumato.io.inspect import header
from sfumato.io.keymap import some
from sfumato.io.parts import INDEX
from sfumato.io.pretrained import read_json
from sfumato.nets.controlled import Control, ControlConfig
from sfumato.nets.flux import FluxConfig
from sfumato.stored import FILES

CLASSES = ("ControlNetModel", SD3, FLUX)
BARE = ("controlnet_cond_embedding.conv_in.weight", "input_hint_block.0.weight")  # of U-Nets, without the prefix
# Of no account to a control, or said in another way: a table that is cut from the middle, the axes of turning.
UNSAID = ("size", "out_channels", "dropout", "table", "step", "axes")


def is_control(path: Path) -> bool:
    """Whether a folder or file holds a ControlNet, and no model with one in it but for files of the publishers.

    CheckpointError for one of diffusers' kinds that are not known here.
    """
    if path.is_file():
        return path.suffix in FILES and _named(header(path).shapes.keys())
    if (path / "model.json").is_file():
        return CONTROL in read_description(path)["model"]
    if (path / INDEX).is_file() or not (path / "config.json").is_file():
        return False
    kind = str(read_json(path / "config.json").get("_class_name"))
    if "ControlNet" in kind and kind not in CLASSES:
        what, fix = "a control of a kind that is not known here", ", ".join(CLASSES)
        raise CheckpointError(what, where=str(path / "config.json"), seen=kind, fix=fix)
    return kind in CLASSES


def _named(names: Collection[str]) -> bool:
    """Whether there is a control among weights of these names."""
    return kind_of(names) is not None or any(name.startswith(PREFIX) or name in BARE for name in names)


def left_out(file: Path) -> str | None:
    """What a file of a control has beside it, in words: a whole model, or a way in that nothing reads."""
    names = header(file).shapes.keys()
    rest = [name for name in names if not name.startswith(PREFIX)] if any(n.startswith(PREFIX) for n in names) else []
    if ORIGINALS[SD3] in names:
        rest += [name for name in names if name.startswith("pos_embed.")]
    return f"{len(rest)} weights that no control reads ({some(rest)})" if rest else None


def save_control(target: Path, control: Control, to: str, dtype: torch.dtype) -> None:
    """Writes a control alone, whole or not at all. to: "sfumato", "diffusers" or "single-file".

    ConfigError for those whose publishers have no such file, and for what a file of theirs cannot say.
    """
    if to == "single-file":
        state = original(control)
        again, _ = understood(state, str(target), {})
        if odd := _differing(control.config, again):
            what = "an original file does not say this of a control, and would be read as another"
            raise ConfigError(what, where="--to single-file", seen=", ".join(odd), fix="--to diffusers")
        write_file(target, state, dtype)
    elif to == "diffusers":
        files.publish(target, lambda place: write_control(place, control, dtype))
    else:
        spec: dict[str, Any] = {"model": {"net": None, CONTROL: alone(control.config)}, "size": [], "sampling": {}}
        weights = {f"{CONTROL}.{key}": value for key, value in control.state_dict().items()}
        write_directory(target, spec, weights, {}, {}, dtype)


def _differing(one: ControlConfig, other: ControlConfig) -> list[str]:
    """What two shapes say differently, with what the first says."""
    mine, theirs = _flat(one), _flat(other)
    return [f"{name} {value}" for name, value in mine.items() if theirs.get(name) != value]


def _flat(config: ControlConfig) -> dict[str, Any]:
    net: Any = getattr(config, "net", None) or getattr(config, "unet", None)
    turning = {"turning": net.turning} if isinstance(net, FluxConfig) else {}
    inner = {one.name: getattr(net, one.name) for one in fields(net) if one.name not in UNSAID}
    outer = {one.name: getattr(config, one.name) for one in fields(config) if one.name not in ("net", "unet")}
    return turning | inner | outer

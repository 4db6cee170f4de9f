"""Checkpoints of others on disk: their tensors, from a folder or a single file, and what they are in this library.

Safetensors are read as they are, sharded ones by their index. Pickles (`.ckpt`, `.pt`, `.pth`) are read with torch's
`weights_only`, which runs no code from the file. A folder of diffusers also brings a config; a single file does not, so
what a shape cannot tell (the scale of its latents) is that of Stable Diffusion 1 unless it is said.
"""

import json
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sfumato.errors import CheckpointError, ConfigError
from sfumato.files import verify
from sfumato.hub import located
from sfumato.io.directory import read_description, read_weights
from sfumato.io.families import autoencoder, taesd
from sfumato.io.keymap import DIFFUSERS, OURS, renamed, some
from sfumato.stored import NAMES, PICKLES, chosen, is_index

LATENTS, TINY = "latents", "tiny_latents"  # the kinds of codec that are read here


def read_state(path: Path) -> dict[str, Tensor]:
    """The tensors of a file, or of the weights in a folder. CheckpointError where there are none to be read."""
    path = Path(path).expanduser()
    if path.is_dir():
        return _folder(path)
    if not path.is_file():
        raise CheckpointError(
            "there is no such file or folder", where=str(path), fix="a folder of diffusers, or a file"
        )
    if path.suffix in PICKLES:
        return _unpickled(path)
    return read_weights(path)


def _folder(path: Path) -> dict[str, Tensor]:
    name = chosen([one.name for one in path.iterdir()])
    if name is not None:
        if is_index(name):
            return _shards(path / name)
        return (_unpickled if name.endswith(PICKLES) else read_weights)(path / name)
    seen = some(one.name for one in path.iterdir()) or "an empty folder"
    raise CheckpointError("this folder holds no weights", where=str(path), seen=seen, fix=f"{NAMES[0]}.safetensors")


def _shards(index: Path) -> dict[str, Tensor]:
    state: dict[str, Tensor] = {}
    table = read_json(index).get("weight_map", {})
    for file in sorted(set(table.values())):
        state |= read_weights(index.parent / file)
    if missing := table.keys() - state.keys():
        raise CheckpointError("shards lack weights that their index lists", where=str(index), seen=some(missing))
    return state


def _unpickled(path: Path) -> dict[str, Tensor]:
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError) as error:
        seen = str(error).splitlines()[0]
        fix = "a safetensors file; code inside a file is never run"
        raise CheckpointError("a pickle cannot be read", where=str(path), seen=seen, fix=fix) from None
    while isinstance(found, dict) and isinstance(found.get("state_dict"), dict):
        found = found["state_dict"]
    tensors = (
        {key: value for key, value in found.items() if isinstance(value, Tensor)} if isinstance(found, dict) else {}
    )
    if not tensors:
        raise CheckpointError("a pickle holds no weights", where=str(path), seen=type(found).__name__)
    return tensors


def read_json(path: Path) -> dict[str, Any]:
    """The mapping that a file of JSON holds."""
    try:
        said = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError("a description cannot be read", where=str(path), seen=str(error)) from None
    if not isinstance(said, dict):
        raise CheckpointError("a description is no mapping", where=str(path), seen=type(said).__name__)
    return said


def codec_from(slot: Any) -> tuple[Any, dict[str, Tensor]]:
    """A codec's slot whose `weights` are read: the slot with what they tell and without them, and the codec's state.

    What the slot says itself (a scale, a tile) stays. The path is a folder `vae` of diffusers, the folder above it,
    a file that holds an autoencoder, alone or in a whole model, or a run or model directory of this library, of an
    autoencoder or of what was trained in its latents. The slot of another codec comes back as it is.
    ConfigError for latents without `weights`: an autoencoder of random weights is of no use to anybody.
    """
    if slot in (LATENTS, TINY):
        slot = {"kind": slot}
    if not isinstance(slot, Mapping) or slot.get("kind") not in (LATENTS, TINY):
        return slot, {}
    if slot.get("weights") is None:
        fix = "model.codec.weights=PATH, a folder of diffusers or a file"
        raise ConfigError("latents need an autoencoder", where="model.codec.weights", seen="nothing", fix=fix)
    path = located(str(slot["weights"]), ("vae",))
    rest = {key: value for key, value in slot.items() if key != "weights"}
    if slot["kind"] == TINY:
        found, state = _tiny(path)
        return {**found, **rest}, state
    for place in (path, path / "model"):
        if (place / "model.json").is_file():
            found, state = _of_ours(place)
            return {**found, **rest}, state
    if (path / "vae").is_dir():
        path = path / "vae"
    config = path / "config.json"
    found, state = codec_of(read_state(path), str(path), read_json(config) if config.is_file() else {})
    return {**found, **rest}, state


def codec_of(
    state: Mapping[str, Tensor], where: str, told: Mapping[str, Any] | None = None
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The slot and the codec's state of the autoencoder among some tensors, alone or within a whole model.

    where: the file, for errors. told: diffusers' config of it, for what shapes do not tell.
    """
    told = told or {}
    prefix = next((one for one in autoencoder.PREFIXES if any(key.startswith(f"{one}decoder.") for key in state)), "")
    own = {key.removeprefix(prefix): value.float() for key, value in state.items() if key.startswith(prefix)}
    layout = autoencoder.layout_of(list(own), where)
    if layout == DIFFUSERS:
        own = autoencoder.modern(own)
    shape = autoencoder.config_of(own, layout, where, int(told.get("norm_num_groups", 32)))
    own = renamed(own, autoencoder.lines(shape), layout, OURS, where)
    found: dict[str, Any] = {
        "kind": LATENTS,
        "latent": shape.latent,
        "channels": list(shape.channels),
        "blocks": shape.blocks,
        "groups": shape.groups,
        "attention": shape.attention,
        "quant": shape.quant,
    }
    for ours, theirs in (("scale", "scaling_factor"), ("shift", "shift_factor")):
        if told.get(theirs) is not None:
            found[ours] = float(told[theirs])
    return found, {f"autoencoder.{key}": value for key, value in own.items()}


def _tiny(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What a tiny autoencoder's weights tell of its slot, and its state: of a folder, a file, or a pair of files."""
    if path.is_file() and "_encoder" in path.name:
        other = path.with_name(path.name.replace("_encoder", "_decoder"))
        state = taesd.halves(read_state(path), "encoder") | taesd.halves(read_state(other), "decoder")
    else:
        state = read_state(path / "vae" if (path / "vae").is_dir() else path)
    state = {key: value.float() for key, value in state.items()}
    layout = taesd.layout_of(state, str(path))
    shape = taesd.config_of(state, layout, str(path))
    state = renamed(state, taesd.lines(shape), layout, OURS, str(path))
    config = path / "config.json"
    told = read_json(config) if config.is_file() else {}
    found: dict[str, Any] = {"latent": shape.latent, "width": shape.width}
    found |= {"encoder": list(shape.encoder), "decoder": list(shape.decoder)}
    for ours, theirs in (("scale", "scaling_factor"), ("shift", "shift_factor")):
        if told.get(theirs) is not None:
            found[ours] = float(told[theirs])
    return found, {f"autoencoder.{key}": value for key, value in state.items()}


def _of_ours(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The codec's slot and state in a model directory of this library. CheckpointError where its codec is another."""
    slot = read_description(folder)["model"].get("codec")
    if not isinstance(slot, dict) or slot.get("kind") != LATENTS:
        kind = slot.get("kind") if isinstance(slot, dict) else slot
        fix = "a run of an autoencoder, or a model in latents: sfumato train autoencoder-scenes"
        raise CheckpointError("this model has no autoencoder", where=str(folder), seen=f"codec {kind}", fix=fix)
    verify(folder)
    state = read_weights(folder / "model.safetensors")
    return dict(slot), {key.removeprefix("codec."): one for key, one in state.items() if key.startswith("codec.")}


def fill_codec(codec: object, state: Mapping[str, Tensor]) -> None:
    """Puts what `codec_from` read into the codec that was built from its slot."""
    if not state:
        return
    assert isinstance(codec, nn.Module)  # one that has weights
    own = codec.state_dict()
    if missing := own.keys() - state.keys():
        raise CheckpointError("an autoencoder lacks weights", where="model.codec.weights", seen=some(missing))
    if odd := [key for key, value in state.items() if value.shape != own[key].shape]:
        raise CheckpointError("an autoencoder's weights have odd shapes", where="model.codec.weights", seen=some(odd))
    if bad := [key for key, value in state.items() if not bool(value.isfinite().all())]:
        raise CheckpointError("an autoencoder's weights are not finite", where="model.codec.weights", seen=some(bad))
    codec.load_state_dict(dict(state))

"""Published models: folders of diffusers and original single files, as models of this library, and back.

`model_index.json` names a folder's family, the names of the weights name a file's. What comes out is an ordinary model:
it can be sampled, trained further, and saved as a model directory; and what was trained here goes back the same way.
"""

from pathlib import Path

import torch

from sfumato import files
from sfumato.errors import CheckpointError, ConfigError, nearest
from sfumato.io.directory import write_file
from sfumato.io.families import autoencoder
from sfumato.io.family import Family, Published, families
from sfumato.io.fill import fill_weights, unfilled
from sfumato.io.keymap import ORIGINAL, OURS, renamed, some
from sfumato.io.parts import INDEX, read_own, write_vae
from sfumato.io.pretrained import read_json, read_state
from sfumato.io.spelling import keep_spelling, spelled
from sfumato.model import AutoencoderModel, Model, Trainable, build_model
from sfumato.nets.controlled import Controlled
from sfumato.stored import FILES


def is_published(path: Path) -> bool:
    """Whether a path is one of diffusers' pipelines, or a file of weights."""
    return (path / INDEX).is_file() or (path.is_file() and path.suffix in FILES)


def load_published(
    path: Path,
    parts: Path | None = None,
    *,
    device: torch.device | None = None,
    matrices: torch.dtype | None = None,
    text_device: torch.device | None = None,
) -> Model:
    """The model of a folder of diffusers, or of an original file, in evaluation mode.

    parts: a folder of diffusers with what a single file has not: a tokenizer, say. CheckpointError for what is missing
    or not known. device, matrices, text_device: see `sfumato.io.fill.fill_weights`.
    """
    path = Path(path)
    found = _file(path, parts) if path.is_file() else _folder(path)
    spec = {"model": found.section, "size": found.size, "sampling": found.sampling}
    with torch.random.fork_rng(devices=[]), unfilled():
        model = build_model(spec, files=found.files)
    fill_weights(model, found.state, str(path), device, matrices, text_device)
    model.facts = found.facts
    return model.eval().requires_grad_(False)


def _folder(folder: Path) -> Published:
    index = read_json(folder / INDEX)
    kind = str(index.get("_class_name"))
    known = {name: family for family in families().values() for name in family.pipelines}
    if kind not in known:
        fix = nearest(kind, known)
        raise CheckpointError("a pipeline that is not known here", where=str(folder / INDEX), seen=kind, fix=fix)
    found, own = known[kind].read_folder(folder, index), read_own(folder)
    found.size, found.sampling = own.get("size") or found.size, own.get("sampling") or found.sampling
    found.facts = own.get("facts") or found.facts
    if "answers" in own:
        found.section["answers"] = own["answers"]
    found.section = spelled(folder, own, found.section)
    return found


def _file(file: Path, parts: Path | None) -> Published:
    state = read_state(file)
    for family in families().values():
        if family.knows(state.keys()):
            return family.read_file(state, file, parts)
    raise CheckpointError(
        "a file of no family that is known here", where=str(file), seen=some(state), fix=", ".join(families())
    )


def save_published(folder: Path, model: Trainable, *, dtype: torch.dtype = torch.float32) -> None:
    """Writes a folder of diffusers, whole or not at all; of an autoencoder alone its part `vae`. ConfigError for models
    that have no such form.
    """
    if isinstance(model, AutoencoderModel):
        codec = model.codec
        files.publish(Path(folder), lambda place: write_vae(place, codec, dtype))
        return
    family, whole = _owner(model, "diffusers")

    def write(place: Path) -> None:
        family.write_folder(place, whole, dtype)
        keep_spelling(place, whole)

    files.publish(Path(folder), write)


def save_file(file: Path, model: Trainable, *, dtype: torch.dtype = torch.float32) -> None:
    """Writes the original's single file, whole or not at all. ConfigError for models that have no such form."""
    if isinstance(model, AutoencoderModel):
        own, lines = model.codec.autoencoder.state_dict(), autoencoder.lines(model.codec.autoencoder.config)
        weights = renamed(own, lines, OURS, ORIGINAL, str(file))
    else:
        family, whole = _owner(model, "single-file")
        if isinstance(whole.net, Controlled):
            what, fix = "a single file holds no control of ours", "--to diffusers, and then its folder controlnet"
            raise ConfigError(what, where="--to single-file", seen="a network under control", fix=fix)
        weights = family.write_file(whole)
    write_file(file, weights, dtype)


def _owner(model: Trainable, layout: str) -> tuple[Family, Model]:
    assert isinstance(model, Model)  # an autoencoder belongs to all of them
    for family in families().values():
        if family.owns(model):
            return family, model
    parts = (model.net, model.codec, model.conditioner, model.denoiser.path)
    seen = ", ".join(type(part).__name__ for part in parts)
    raise ConfigError("this model is of no published family", where=f"--to {layout}", seen=seen, fix="--to sfumato")

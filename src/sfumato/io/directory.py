"""The model directory: `model.json` says what the model is, `model.safetensors` holds its weights, and beside them lie the
conditioner's own files. Everything is covered by a manifest of digests. Nothing in it can run code when it is read.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from sfumato import files
from sfumato.errors import CheckpointError
from sfumato.model import Model, build_model

FORMAT, VERSION = "sfumato", 1


def save_model(folder: Path, model: Model, facts: Mapping[str, Any], weights: Mapping[str, Tensor] | None = None) -> None:
    """Writes a model directory, whole or not at all; an older one of that name is replaced.

    facts: what is known of the training, kept as it is. weights: others than the model's own, an average of them say.
    """

    def fill(place: Path) -> None:
        kept = {name: value.detach().cpu().contiguous() for name, value in (weights or model.weights()).items()}
        save_file(kept, place / "model.safetensors", {"format": "pt"})
        extra = model.conditioner.files() if model.conditioner is not None else {}
        for name, data in extra.items():
            (place / name).write_bytes(data)
        said = {"format": FORMAT, "version": VERSION, **model.spec, "facts": dict(facts), "files": sorted(extra)}
        (place / "model.json").write_text(json.dumps(said, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")

    files.publish(folder, fill, replace=True)


def load_model(folder: Path) -> Model:
    """The model of a directory, in evaluation mode. CheckpointError for anything that is missing, altered or unfit."""
    folder = Path(folder)
    said = read_description(folder)
    files.verify(folder)
    spec = {key: said[key] for key in ("model", "size", "sampling")}
    model = build_model(spec, files={name: (folder / name).read_bytes() for name in said["files"]})
    fill_weights(model, read_weights(folder / "model.safetensors"), str(folder))
    return model.eval().requires_grad_(False)


def read_description(folder: Path) -> dict[str, Any]:
    """The content of model.json."""
    path = Path(folder) / "model.json"
    try:
        said = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError("this is no model directory", where=str(folder), seen="no model.json", fix="a run's folder, or its model/") from None
    except ValueError as error:
        raise CheckpointError("model.json cannot be read", where=str(path), seen=str(error)) from None
    if said.get("format") != FORMAT or said.get("version") != VERSION:
        seen = f"format {said.get('format')!r}, version {said.get('version')!r}"
        raise CheckpointError("a model of another kind", where=str(path), seen=seen, fix=f"format {FORMAT!r}, version {VERSION}")
    if missing := [key for key in ("model", "size", "sampling", "files") if key not in said]:
        raise CheckpointError("model.json is incomplete", where=str(path), seen=f"no {', '.join(missing)}")
    return dict(said)


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file."""
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise CheckpointError("weights cannot be read", where=str(path), seen=str(error)) from None


def fill_weights(model: Model, weights: Mapping[str, Tensor], where: str) -> None:
    """Copies weights into a model; every name and shape must fit, and all that do not are named at once."""
    own = model.weights()
    faults = [f"{name} is missing" for name in own.keys() - weights.keys()]
    faults += [f"{name} is unknown" for name in weights.keys() - own.keys()]
    for name in own.keys() & weights.keys():
        if own[name].shape != weights[name].shape:
            faults.append(f"{name} is {list(weights[name].shape)}, not {list(own[name].shape)}")
    if faults:
        shown = "; ".join(sorted(faults)[:8]) + (f"; and {len(faults) - 8} more" if len(faults) > 8 else "")
        raise CheckpointError("weights do not fit the model", where=where, seen=shown)
    with torch.no_grad():
        for name, value in own.items():
            value.copy_(weights[name])

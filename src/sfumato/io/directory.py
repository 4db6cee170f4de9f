"""The model directory: `model.json` says what the model is, `model.safetensors` holds its weights, and beside them
lie the conditioner's own files. Everything is covered by a manifest of digests.

Reading one runs no code that is not there already: a description may name only what the catalogue lists, or the
user's own modules in the current directory. Anything else ("module:Name" of some package) needs `trust`.
"""

import contextlib
import json
import os
import re
import sys
from collections.abc import Iterator, Mapping
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from sfumato import files
from sfumato.errors import CheckpointError, ConfigError
from sfumato.io.fill import fill_weights, unfilled
from sfumato.io.tensors import tensors_of
from sfumato.model import AutoencoderModel, Model, Trainable, build_autoencoder, build_model
from sfumato.problems import slot_problems
from sfumato.registry import target_of

FORMAT, VERSION = "sfumato", 1
SPEC = ("model", "size", "sampling")
CONTROL = "control"  # of the section `model` of a control alone, see `sfumato.io.controls`
KEYS = {"model": dict, "size": list, "sampling": dict, "files": list, "facts": dict}


def save_model(
    folder: Path,
    model: Trainable,
    facts: Mapping[str, Any],
    weights: Mapping[str, Tensor] | None = None,
    *,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Writes a model directory, whole or not at all; an older one of that name is replaced.

    facts: what is known of the training, kept as it is. weights: others than the model's own, an average of them say;
    those of floating point are stored as `dtype`.
    """

    kept = model.weights() if weights is None else weights
    if any(".base_layer." in name for name in kept):
        what, fix = "an adapter stands beside the weights", "merge it, or take it away, before saving"
        raise ConfigError(what, where=str(folder), seen="a model with LoRA", fix=fix)
    write_directory(folder, model.spec, kept, facts, model.files(), dtype)


def write_directory(
    folder: Path,
    spec: Mapping[str, Any],
    weights: Mapping[str, Tensor],
    facts: Mapping[str, Any],
    extra: Mapping[str, bytes],
    dtype: torch.dtype,
) -> None:
    """A model directory of its description (`SPEC`), its weights, and other files that belong to it."""

    def fill(place: Path) -> None:
        write_weights(place / "model.safetensors", weights, dtype)
        for name, data in extra.items():
            (place / name).write_bytes(data)
        said = {"format": FORMAT, "version": VERSION, **spec, "facts": dict(facts), "files": sorted(extra)}
        (place / "model.json").write_text(json.dumps(said, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")

    files.publish(Path(folder), fill, replace=True)


def load_model(
    folder: Path,
    *,
    trust: bool = False,
    device: torch.device | None = None,
    matrices: torch.dtype | None = None,
    text_device: torch.device | None = None,
) -> Model:
    """The model of a directory, in evaluation mode. CheckpointError for anything that is missing, altered or unfit, and
    for an autoencoder alone.

    trust: also run code that the description names and that is neither ours nor in the current directory.
    device, matrices, text_device: see `sfumato.io.fill.fill_weights`.
    """
    folder = Path(folder)
    said = read_description(folder)
    if CONTROL in said["model"]:
        what, fix = "this is a control, which draws nothing alone", f"sfumato sample MODEL --control {folder}:PICTURE"
        raise CheckpointError(what, where=str(folder), seen="no net", fix=fix)
    if _is_alone(said):
        fix = f"model.codec={{kind: latents, weights: {folder}}} trains a model in its latents"
        raise CheckpointError("this is an autoencoder, which draws nothing", where=str(folder), seen="no net", fix=fix)
    files.verify(folder)
    targets = list(_targets([said[key] for key in SPEC]))
    if not trust and (foreign := [target for target in targets if not _own(target, folder)]):
        what = "this model needs code that is neither in sfumato nor in the current directory"
        raise CheckpointError(
            what, where=str(folder), seen=", ".join(foreign), fix="read that code, then: sfumato.load(path, trust=True)"
        )
    if problems := list(slot_problems({"model": said["model"], "sampling": said["sampling"]})):
        seen = "; ".join(f"{one.where} {one.what}" + (f" ({one.seen})" if one.seen else "") for one in problems)
        raise CheckpointError(
            "model.json describes no model of this version", where=str(folder / "model.json"), seen=seen
        )
    try:
        # Somebody else's constructor may look at its own weights; ours never do.
        empty = contextlib.nullcontext() if targets else unfilled()
        with torch.random.fork_rng(devices=[]), empty:  # what is initialised is overwritten: the caller's draws stay
            model = build_model({key: said[key] for key in SPEC}, files=_kept(folder, said["files"]))
    except (AttributeError, KeyError, OverflowError, RuntimeError, TypeError, ValueError) as error:
        seen = f"{type(error).__name__}: {error}"
        raise CheckpointError("model.json describes no model", where=str(folder / "model.json"), seen=seen) from error
    fill_weights(model, read_weights(folder / "model.safetensors"), str(folder), device, matrices, text_device)
    model.facts = said["facts"]
    return model.eval().requires_grad_(False)


def load_autoencoder(folder: Path) -> AutoencoderModel | None:
    """The autoencoder of a directory that holds one alone, in evaluation mode; None for other models. CheckpointError
    for anything that is missing, altered or unfit.
    """
    said = read_description(folder)
    if not _is_alone(said):
        return None
    files.verify(folder)
    slot, where = said["model"].get("codec"), str(Path(folder) / "model.json")
    if not isinstance(slot, dict) or slot.get("kind") != "latents":
        raise CheckpointError("model.json describes no autoencoder of ours", where=where, seen=str(slot))
    try:
        with torch.random.fork_rng(devices=[]), unfilled():
            model = build_autoencoder({key: said[key] for key in SPEC})
    except (KeyError, RuntimeError, TypeError, ValueError) as error:
        raise CheckpointError("model.json describes no autoencoder", where=where, seen=str(error)) from error
    fill_weights(model, read_weights(Path(folder) / "model.safetensors"), str(folder))
    model.facts = said["facts"]
    return model.eval().requires_grad_(False)


def _is_alone(said: Mapping[str, Any]) -> bool:
    """Whether a description is of an autoencoder without a network."""
    return "net" in said["model"] and said["model"]["net"] is None and CONTROL not in said["model"]


def read_description(folder: Path) -> dict[str, Any]:
    """The content of model.json."""
    path = Path(folder) / "model.json"
    try:
        said = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise CheckpointError(
            "this is no model directory", where=str(folder), seen="no model.json", fix="a run's folder, or its model/"
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError("model.json cannot be read", where=str(path), seen=str(error)) from None
    format_, version = (said.get("format"), said.get("version")) if isinstance(said, dict) else (None, None)
    if format_ != FORMAT or version != VERSION:
        newer = format_ == FORMAT and isinstance(version, int) and version > VERSION
        raise CheckpointError(
            "a model of a newer sfumato" if newer else "a model of another kind",
            where=str(path),
            seen=f"format {format_!r}, version {version!r}",
            fix="pip install --upgrade sfumato" if newer else f"format {FORMAT!r}, version {VERSION}",
        )
    said = {"facts": {}, **said}
    if missing := [key for key, kind in KEYS.items() if not isinstance(said.get(key), kind)]:
        raise CheckpointError("model.json is incomplete", where=str(path), seen=f"no usable {', '.join(missing)}")
    return said


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file."""
    try:
        return tensors_of(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError("weights cannot be read", where=str(path), seen=str(error)) from None


def write_weights(
    path: Path,
    weights: Mapping[str, Tensor],
    dtype: torch.dtype | None = None,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """A safetensors file of some tensors, with the mode that other files have. OSError where there is no room for it.

    dtype: what those of floating point are stored as; None keeps theirs. metadata: for its header.
    """
    path.touch()
    mode = path.stat().st_mode
    try:
        save_file(_stored(weights, dtype), path, {"format": "pt", **(metadata or {})})
    except SafetensorError as error:
        said = re.search(r"os error (\d+)", str(error))
        if said is None:
            raise
        raise OSError(int(said[1]), os.strerror(int(said[1])), str(path)) from error
    if metadata:
        _order_header(path)
    path.chmod(mode)  # the library's own files are for their owner alone


def write_file(file: Path, weights: Mapping[str, Tensor], dtype: torch.dtype) -> None:
    """The same, whole or not at all."""
    partial = Path(file).with_name(f".{Path(file).name}.partial")
    try:
        write_weights(partial, weights, dtype)
        partial.replace(file)
    finally:
        partial.unlink(missing_ok=True)


def _order_header(path: Path) -> None:
    """Puts what the header says into the order of its names: the library writes it in a random one, and the same
    weights are to be the same bytes.
    """
    with path.open("r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        said = json.loads(file.read(size))
        said["__metadata__"] = dict(sorted(said["__metadata__"].items()))
        text = json.dumps(said, separators=(",", ":"), ensure_ascii=False).encode()
        if len(text) <= size:
            file.seek(8)
            file.write(text.ljust(size))


def _stored(weights: Mapping[str, Tensor], dtype: torch.dtype | None) -> dict[str, Tensor]:
    """On the CPU, each with memory of its own: the format knows no tied weights, so they are stored twice."""
    kept: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, value in weights.items():
        kind = dtype if dtype is not None and value.is_floating_point() else value.dtype
        value = value.detach().to("cpu", kind).contiguous()
        place = value.untyped_storage().data_ptr()
        kept[name] = value.clone() if place in seen else value
        seen.add(place)
    return kept


def _kept(folder: Path, names: list[str]) -> dict[str, bytes]:
    """The conditioner's own files, by plain name."""
    if paths := [name for name in names if Path(name).name != name]:
        raise CheckpointError("a model's files lie beside it", where=str(folder / "model.json"), seen=", ".join(paths))
    try:
        return {name: (folder / name).read_bytes() for name in names}
    except OSError as error:
        raise CheckpointError("a file of the model cannot be read", where=str(folder), seen=str(error)) from None


def _targets(value: Any) -> Iterator[str]:
    """Every "module:Name" in a description."""
    if isinstance(value, str) and target_of(value, {}) is not None:
        yield value
    elif isinstance(value, Mapping):
        yield from _targets(list(value.values()))
    elif isinstance(value, list):
        yield from (target for one in value for target in _targets(one))


def _own(target: str, folder: Path) -> bool:
    """Whether a target is the user's own: found in the current directory, and not a part of what is being read."""
    top = target.partition(":")[0].partition(".")[0]
    spec = PathFinder.find_spec(top, [str(Path.cwd())])
    if spec is None or spec.origin is None:
        return False
    file, imported = Path(spec.origin).resolve(), getattr(sys.modules.get(top), "__file__", spec.origin)
    return folder.resolve() not in file.parents and imported is not None and Path(imported).resolve() == file

"""Adapters from files: any dialect in, factors under our names out.

What a key's layer is called is looked up in the tables of the model's parts, whole and with underscores for dots, after
what dialects put before it. A key that no table knows, a shape that does not fit, and a file of which nothing fits are
errors that list them: nothing is left out in silence.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sfumato.adapters import dialects
from sfumato.adapters.dialects import HEADER, Layers
from sfumato.adapters.factors import Factors
from sfumato.adapters.moving import moved
from sfumato.adapters.parts import Architecture, Part, architectures
from sfumato.errors import CheckpointError
from sfumato.hub import located
from sfumato.io.inspect import header
from sfumato.io.keymap import OURS, some
from sfumato.io.pretrained import read_json, read_state
from sfumato.stored import ADAPTERS, LORAS, PEFT

CONFIG, WEIGHTS = PEFT, ADAPTERS[0]  # of peft's folders


@dataclass(frozen=True)
class Adapter:
    """Changes of a model's layers, by home and our name: "net.down.0.transformer.blocks.0.cross.q".

    dialect: what it was read from. metadata: of the file.
    """

    changes: Mapping[str, Factors]
    dialect: str = "sfumato"
    metadata: Mapping[str, str] = field(default_factory=dict)

    def of(self, home: str) -> dict[str, Factors]:
        """The changes of a part, by the names within it."""
        start = f"{home}."
        return {name.removeprefix(start): one for name, one in self.changes.items() if name.startswith(start)}

    @property
    def ranks(self) -> list[int]:
        """All ranks that occur."""
        return sorted({one.rank for one in self.changes.values()})


def read_adapter(path: str | Path, parts: Sequence[Part]) -> Adapter:
    """The adapter in a file or a folder, for a model of these parts. CheckpointError for all that does not fit."""
    raw = read_raw(path)
    return Adapter(_changes(raw, parts), raw.dialect, raw.metadata)


def recognised(path: str | Path) -> tuple[Adapter, Architecture]:
    """The adapter in a file, and the published architecture whose names and shapes it fits, where there is no model."""
    raw, refused = read_raw(path), None
    for one in architectures():
        try:
            return Adapter(_changes(raw, one.parts), raw.dialect, raw.metadata), one
        except CheckpointError as error:
            refused = refused or error
    seen = f"{some(raw.layers)}; {refused.what if refused else ''}"
    what, fix = "an adapter of no published architecture that is known here", "--model MODEL, the one it is for"
    raise CheckpointError(what, where=str(path), seen=seen, fix=fix)


# Files


@dataclass(frozen=True)
class Raw:
    """What a file says: tensors by layer, alphas by layer where a description has them, and its dialect."""

    where: str
    layers: Layers
    alphas: Mapping[str, float]
    dialect: str
    metadata: Mapping[str, str]


def read_raw(path: str | Path) -> Raw:
    """The tensors of a file, of a folder of peft (or of one for each part), or of a folder with such a file; any of
    them may be on the hub.
    """
    path = located(path)
    if not path.exists():
        raise CheckpointError("there is no such adapter", where=str(path), fix="a file of safetensors, or a folder")
    if path.is_dir():
        return _folder(path)
    metadata = header(path).metadata if path.suffix in (".safetensors", ".sft") else {}
    state = read_state(path)
    layers = dialects.layers_in(state, str(path))
    return Raw(str(path), layers, _header_alphas(metadata, layers), dialects.dialect_of(state), metadata)


def _folder(path: Path) -> Raw:
    if (path / CONFIG).is_file():
        return _peft(path, "")
    inner = [one for one in sorted(path.iterdir()) if (one / CONFIG).is_file()]
    if inner:
        found = [_peft(one, f"{one.name}.") for one in inner]
        layers = {name: leaves for one in found for name, leaves in one.layers.items()}
        alphas = {name: alpha for one in found for name, alpha in one.alphas.items()}
        return Raw(str(path), layers, alphas, "peft", {})
    for name in LORAS:
        if (path / name).is_file():
            return read_raw(path / name)
    seen = some(one.name for one in path.iterdir()) or "an empty folder"
    raise CheckpointError("this folder holds no adapter", where=str(path), seen=seen, fix=f"{CONFIG} or {LORAS[0]}")


def _peft(folder: Path, start: str) -> Raw:
    """A folder of peft; start: what its layers are in, where it is one of several."""
    config = read_json(folder / CONFIG)
    if (kind := str(config.get("peft_type", "LORA")).upper()) not in ("LORA", "LOHA", "LOKR"):
        raise CheckpointError("another kind of adapter", where=str(folder / CONFIG), seen=kind, fix="a LoRA")
    there = next((folder / name for name in ADAPTERS if (folder / name).is_file()), None)
    if there is None:
        raise CheckpointError("the weights are missing", where=str(folder), seen=f"{CONFIG} alone", fix=WEIGHTS)
    state = read_state(there)
    plain = dialects.layers_in(state, str(there))
    alphas = dialects.alphas(config, plain, _ranks(plain))
    if config.get("fan_in_fan_out"):
        what = "an adapter of layers that are stored the other way round"
        raise CheckpointError(what, where=str(folder / CONFIG), seen="fan_in_fan_out", fix="a LoRA of linear layers")
    layers = {f"{start}{name}": leaves for name, leaves in plain.items()}
    return Raw(str(folder), layers, {f"{start}{name}": alpha for name, alpha in alphas.items()}, "peft", {})


def _ranks(layers: Layers) -> dict[str, int]:
    return {name: len(leaves["down"]) if "down" in leaves else 1 for name, leaves in layers.items()}


def _header_alphas(metadata: Mapping[str, str], layers: Layers) -> dict[str, float]:
    """What diffusers wrote of peft's descriptions into the header: of each part ("unet.lora_alpha"), or of one."""
    try:
        told = json.loads(metadata.get(HEADER, "{}"))
    except ValueError:
        return {}
    configs: dict[str, dict[str, Any]] = {"": told} if "lora_alpha" in told else {}
    for key, value in told.items() if not configs else ():
        part, _, name = key.partition(".")
        configs.setdefault(f"{part}.", {})[name] = value
    found: dict[str, float] = {}
    ranks = _ranks(layers)
    for start, config in configs.items():
        inside = {name.removeprefix(start): name for name in layers if name.startswith(start)}
        inner = dialects.alphas(config, inside, {short: ranks[name] for short, name in inside.items()})
        found |= {inside[short]: alpha for short, alpha in inner.items()}
    return found


# Names


def _changes(raw: Raw, parts: Sequence[Part]) -> dict[str, Factors]:
    """The changes under our names. CheckpointError for layers that no part has."""
    mine: dict[str, dict[str, str]] = {part.home: {} for part in parts}
    unknown = []
    for layer in raw.layers:
        part, name = _placed(layer, parts)
        if part is None:
            unknown.append(layer)
        else:
            mine[part.home][name] = layer
    if unknown:
        every = "no layer" if len(unknown) == len(raw.layers) else f"{len(unknown)} of {len(raw.layers)} layers"
        what = "an adapter of another model: " + (
            f"{every} of it is known" if every == "no layer" else f"{every} are not known"
        )
        raise CheckpointError(what, where=raw.where, seen=some(unknown), fix="the model that it was made for")
    out: dict[str, Factors] = {}
    for part in parts:
        if mine[part.home]:
            found = _of_part(raw, part, mine[part.home])
            out |= {f"{part.home}.{name}": one for name, one in found.items()}
    return out


def _placed(layer: str, parts: Sequence[Part]) -> tuple[Part | None, str]:
    """The part that a layer is of, and its name in it."""
    if (original := dialects.of_xlabs(layer)) is not None:
        return next(((one, layer) for one in parts if one.knows(original)), (None, layer))
    for part in parts:
        for start in part.beginnings:
            name = layer.removeprefix(start)
            if name != layer and (known := _known(part, name)):
                return part, known
    return next(((part, known) for part in parts if (known := _known(part, layer))), (None, layer))


def _known(part: Part, name: str) -> str:
    """The name as the part's table has it, "" for none; text encoders of transformers 5 lack what others begin with."""
    tries = (name, f"text_model.{name}", name.removeprefix("text_model."))
    return next((one for one in tries if part.knows(one)), "")


def _of_part(raw: Raw, part: Part, names: Mapping[str, str]) -> dict[str, Factors]:
    xlabs = {name: original for name in names if (original := dialects.of_xlabs(name)) is not None}
    layout = _layout(part, [xlabs.get(name, name) for name in names], raw.where)
    changes: dict[str, Factors] = {}
    for name, layer in names.items():
        known = xlabs.get(name, name)
        i, j = part.places[layout][known]
        line = part.lines[i]
        dotted = line.names[layout][j]
        whole = sum(part.shapes[own][0] for own in line.names[OURS])
        rows = line.rows(layout, whole)[j] if len(line.names[layout]) > 1 else whole
        shape = (rows, *part.shapes[line.names[OURS][0]][1:])
        one = dialects.factors_of(raw.layers[layer], shape, raw.alphas.get(layer), f"{raw.where}: {layer}")
        changes[dotted] = _filled(one, rows) if name in xlabs else one
    return moved(changes, part, layout, OURS, raw.where)


def _layout(part: Part, names: Sequence[str], where: str) -> str:
    """The layout that has all of some names; the file's, as far as the part is concerned."""
    missing = {layout: [name for name in names if name not in known] for layout, known in part.places.items()}
    best = min(missing, key=lambda layout: len(missing[layout]))
    if missing[best]:
        what = f"an adapter with names of several layouts: {len(missing[best])} are not {best}'s"
        raise CheckpointError(what, where=where, seen=some(missing[best]), fix="a file of one layout")
    return best


def _filled(one: Factors, rows: int) -> Factors:
    """The change of the first rows of a layer as one of the whole layer."""
    up: Tensor = torch.cat([one.up, one.up.new_zeros(rows - len(one.up), one.up.shape[1])])
    return Factors(one.down, up, one.alpha, one.magnitude)

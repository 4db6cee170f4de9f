"""What a file or a folder of weights is, from its descriptions and headers alone: no weight is read.

A safetensors file begins with the names, shapes and kinds of its tensors, which is enough to tell a family, its parts,
and what is missing. Pickles have no such header; of them the tensors are mapped, and not copied. Of a repository of
the hub only headers are fetched, and of its pickles nothing.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from sfumato.errors import CheckpointError
from sfumato.hub import sketched
from sfumato.io.directory import CONTROL, read_description
from sfumato.io.families.pixel_unet import is_of_two_axes
from sfumato.io.family import families
from sfumato.io.parts import INDEX, part_of, read_own
from sfumato.io.pretrained import read_json, read_state
from sfumato.stored import ADAPTERS, FILES, LORAS, PICKLES

KINDS = {"F32": "fp32", "F16": "fp16", "BF16": "bf16", "F64": "fp64", "F8_E4M3": "fp8", "F8_E5M2": "fp8"}
PARTS = {  # of single files: what a part is called, by the beginnings of its names
    "network": (
        *("model.diffusion_model.", "joint_blocks.", "blocks.", "input_blocks."),
        *("double_blocks.", "single_blocks.", "img_in.", "txt_in.", "time_in.", "vector_in.", "guidance_in."),
        *("final_layer.", "middle_block.", "output_blocks.", "time_embed.", "label_emb.", "out."),
    ),
    "autoencoder": ("first_stage_model.", "vae."),
    "text encoder": ("cond_stage_model.", "conditioner.embedders.", "text_encoders."),
    "control": ("control_model.",),
    "average of the network": ("model_ema.",),
}

PIXELS = ("ddpm", "consistency")  # families whose files are whole with a network alone


@dataclass(frozen=True)
class Header:
    """The names, shapes and kinds of the tensors of a file, and what its metadata says."""

    shapes: Mapping[str, tuple[int, ...]]
    kinds: Mapping[str, str]
    metadata: Mapping[str, str]

    def counted(self) -> dict[str, Any]:
        """Parameters, the kinds they are stored as, and bytes."""
        sizes = {name: _product(shape) for name, shape in self.shapes.items()}
        found = Counter(self.kinds.values())
        return {"tensors": len(sizes), "parameters": sum(sizes.values()), "dtypes": dict(sorted(found.items()))}

    def under(self, beginnings: Iterable[str]) -> "Header":
        """The tensors whose names begin so."""
        names = [name for name in self.shapes if name.startswith(tuple(beginnings))]
        return Header({n: self.shapes[n] for n in names}, {n: self.kinds[n] for n in names}, self.metadata)


def header(file: Path) -> Header:
    """The header of a file of weights. CheckpointError where it cannot be read."""
    if file.suffix in PICKLES:
        state = read_state(file)
        kinds = {name: str(value.dtype).removeprefix("torch.") for name, value in state.items()}
        short = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16", "float64": "fp64"}
        return Header({n: tuple(v.shape) for n, v in state.items()}, {n: short.get(k, k) for n, k in kinds.items()}, {})
    shapes, kinds = {}, {}
    try:
        with safe_open(file, framework="pt") as opened:  # type: ignore[no-untyped-call]
            for name in opened.keys():  # noqa: SIM118
                part = opened.get_slice(name)
                shapes[name], said = tuple(part.get_shape()), part.get_dtype()
                kinds[name] = KINDS.get(said, said.lower())
            return Header(shapes, kinds, dict(opened.metadata() or {}))
    except (SafetensorError, OSError) as error:
        raise CheckpointError("weights cannot be read", where=str(file), seen=str(error)) from None


def _sketch(file: Path) -> Header:
    """The same of a file of a sketch, see `sfumato.hub.sketched`."""
    said = read_json(file)
    metadata = said.pop("__metadata__", {})
    shapes = {name: tuple(one["shape"]) for name, one in said.items()}
    return Header(shapes, {name: KINDS.get(one["dtype"], one["dtype"].lower()) for name, one in said.items()}, metadata)


Read = Callable[[Path], Header]


def inspected(path: str | Path) -> dict[str, Any]:
    """What lies at a path: its kind, its family, its parts with their sizes, what it predicts, what is missing.

    CheckpointError for what is nothing that this library knows.
    """
    with sketched(path) as (found, is_sketch):
        where = str(path) if is_sketch else str(found)
        return {"path": where, **_said(found, _sketch if is_sketch else header, where)}


def _said(path: Path, read: Read, where: str) -> dict[str, Any]:
    if path.is_file():
        return _file(path, read)
    if (path / INDEX).is_file():
        return _diffusers(path, read)
    if (path / "model" / "model.json").is_file():
        return {**_own(path / "model", read), "run": True}
    if (path / "model.json").is_file():
        return _own(path, read)
    if tuned := [name for name in (*LORAS, *ADAPTERS) if (path / name).is_file()]:
        return _file(path / tuned[0], read)
    if (path / "config.json").is_file():
        config = read_json(path / "config.json")
        kind = str(config.get("_class_name") or (config.get("architectures") or ["?"])[0])
        return {"kind": "part of a pipeline", "class": kind, "parts": {Path(where).name: _part(path, read)}}
    seen = "no such path" if not path.exists() else ", ".join(sorted(p.name for p in path.iterdir())[:5]) or "nothing"
    raise CheckpointError(
        "nothing that is known here", where=where, seen=seen, fix="a run, a model, a folder of diffusers, or a file"
    )


def _own(folder: Path, read: Read) -> dict[str, Any]:
    said, found = read_description(folder), read(folder / "model.safetensors")
    section = said["model"]
    if CONTROL in section:
        counted = {"control": found.under([f"{CONTROL}."]).counted()}
        return {"kind": "ControlNet", "family": None, "class": _kind(section[CONTROL]), "parts": counted}
    parts = {name.split(".")[0] for name in found.shapes}
    return {
        "kind": "model of sfumato",
        "family": _kind(section.get("net")),
        "path of noise": _kind(section.get("path")),
        "prediction": _kind(section.get("prediction")),
        "conditioner": _kinds(section.get("conditioner")),
        "codec": _kind(section.get("codec")),
        "size": said["size"],
        "sampling": said["sampling"],
        "parts": {part: found.under([f"{part}."]).counted() for part in sorted(parts)},
        "facts": said["facts"],
        "missing": [name for name in said["files"] if not (folder / name).is_file()],
    }


def _kind(slot: Any) -> Any:
    return slot.get("kind") if isinstance(slot, Mapping) else slot


def _kinds(slot: Any) -> Any:
    """The kind of a conditioner; of several, all of them."""
    parts = slot.get("parts") if isinstance(slot, Mapping) and slot.get("kind") == "joined" else None
    return [_kind(one) for one in parts] if parts else _kind(slot)


def _diffusers(folder: Path, read: Read) -> dict[str, Any]:
    index = read_json(folder / INDEX)
    kind = str(index.get("_class_name"))
    known = {name: family for family, found in families().items() for name in found.pipelines}
    wanted = [name for name, said in index.items() if isinstance(said, list) and any(said)]
    within = {name: part_of(folder, name) for name in wanted}  # of a network alone, in the folder itself
    alone = (folder / "config.json").is_file()
    missing = [name for name, place in within.items() if place == folder and not alone]
    parts = {
        name: {"class": index[name][1], **_part(within[name], read)}
        for name in wanted
        if name not in missing and name != "scheduler" and not name.startswith(("tokenizer", "feature_extractor"))
    }
    scheduler = part_of(folder, "scheduler") / "scheduler_config.json"
    told = read_json(scheduler) if scheduler.is_file() else {}
    flows = "FlowMatch" in str(told.get("_class_name"))
    return {
        "kind": "folder of diffusers",
        "family": known.get(kind),
        "class": kind,
        "scheduler": told.get("_class_name"),
        "prediction": told.get("prediction_type") or ("flow" if flows else None),
        "sampling": read_own(folder).get("sampling") or _recommended(known.get(kind)),
        "parts": parts,
        "missing": missing,
    }


def _recommended(family: str | None) -> dict[str, Any]:
    """What a family recommends whatever the checkpoint, where it says so."""
    return dict(getattr(families().get(family or ""), "sampling", {}))


def _part(folder: Path, read: Read) -> dict[str, Any]:
    files = sorted(one for one in folder.iterdir() if one.suffix in FILES)
    chosen = [one for one in files if one.suffix == ".safetensors"] or files
    whole = [one for one in chosen if not any(v in one.name for v in (".fp16.", ".bf16."))] or chosen
    if not whole:
        return {"tensors": 0, "parameters": 0, "dtypes": {}, "missing": "weights"}
    found = [read(one) for one in whole]
    merged = Header(
        {name: shape for one in found for name, shape in one.shapes.items()},
        {name: kind for one in found for name, kind in one.kinds.items()},
        {},
    )
    return {**merged.counted(), **_unread(merged), "files": [one.name for one in whole]}


def _unread(found: Header) -> dict[str, str]:
    return {} if found.shapes else {"unread": "a pickle has no header to fetch"}


def _file(file: Path, read: Read) -> dict[str, Any]:
    if file.suffix not in FILES:
        raise CheckpointError(
            "this is no file of weights", where=str(file), seen=file.suffix or "no suffix", fix=", ".join(FILES)
        )
    found = read(file)
    if any(".lora_" in name or "lora_down" in name or "lora_A" in name for name in found.shapes):
        return {"kind": "LoRA", **_lora(found), **found.counted()}
    alone = any(name.startswith(("controlnet_", "zero_convs.")) for name in found.shapes)  # a control and no network
    known = {} if alone else families()
    family = next((name for name, one in known.items() if one.knows(found.shapes.keys())), None)
    if family == "ddpm" and is_of_two_axes(found.shapes):
        family = "consistency"  # whose files have the same names
    parts = {name: found.under(beginnings) for name, beginnings in PARTS.items()}
    parts = {name: part for name, part in parts.items() if part.shapes}
    kind = "single file" if family else "weights"
    if not family and _autoencoder(found.shapes):
        kind, parts = "autoencoder", {"autoencoder": found}
    elif not family and any("zero_convs" in name or "controlnet_" in name for name in found.shapes):
        kind, parts = "ControlNet", {"control": found}
    others = ("autoencoder", "text encoder") if family and family not in PIXELS else ()
    missing = [name for name in others if name not in parts]
    return {
        "kind": kind,
        "family": family,
        "prediction": found.metadata.get("modelspec.prediction_type"),
        "sampling": _recommended(family),
        "parts": {name: part.counted() for name, part in parts.items()},
        **found.counted(),
        **_unread(found),
        "metadata": dict(found.metadata),
        "missing": missing,
    }


def _autoencoder(names: Iterable[str]) -> bool:
    known = set(names)
    marks = ("decoder.up_blocks.0.resnets.0.conv1.weight", "decoder.up.0.block.0.conv1.weight")
    return any(mark in known for mark in marks)


def _lora(found: Header) -> dict[str, Any]:
    downs = [
        shape for name, shape in found.shapes.items() if "lora_down" in name or "lora_A" in name or ".down." in name
    ]
    kohya = any(name.startswith(("lora_unet_", "lora_te")) for name in found.shapes)
    return {
        "dialect": "kohya" if kohya else "diffusers or peft",
        "ranks": sorted({shape[0] for shape in downs}),
        "modules": len(downs),
        "metadata": dict(found.metadata),
    }


def _product(shape: Iterable[int]) -> int:
    return int(torch.Size(shape).numel())


def as_text(said: Mapping[str, Any]) -> str:
    """For a reader: a line for each thing that is known."""
    lines = []
    for name, value in said.items():
        if name == "parts":
            for part, counted in value.items():
                kinds = ", ".join(counted["dtypes"]) or counted.get("unread", "no weights")
                extra = f" ({counted['class']})" if "class" in counted else ""
                lines.append(f"  {part}{extra}: {counted['parameters']:,} parameters, {kinds}")
        elif value not in (None, {}, []):
            shown = json.dumps(value, ensure_ascii=False) if isinstance(value, (dict, list)) else f"{value}"
            whole = len(shown) <= 200 or name == "sampling"  # metadata can be of any length
            lines.append(f"{name}: {shown if whole else shown[:200] + '...'}")
    return "\n".join(lines)

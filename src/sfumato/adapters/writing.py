"""Adapters into files, in the dialects that others read.

diffusers: one file, `lora_A` and `lora_B` after the names of the model's folders, and peft's description of it in the
header, where alpha is. kohya: names with underscores, and alpha as a tensor beside each layer; what programs of that
family look at first (`ss_network_dim`, ...) in the header. peft: a folder for each part, with adapter_config.json.
"""

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sfumato import files
from sfumato.adapters.dialects import HEADER, PEFT
from sfumato.adapters.factors import Factors
from sfumato.adapters.moving import moved
from sfumato.adapters.parts import UNET, Part
from sfumato.adapters.reading import CONFIG, WEIGHTS, Adapter
from sfumato.errors import ConfigError, nearest
from sfumato.io.directory import write_weights
from sfumato.io.keymap import DIFFUSERS, OURS

DIALECTS = ("diffusers", "kohya", "peft")


def write_adapter(
    path: str | Path,
    adapter: Adapter,
    parts: Sequence[Part],
    dialect: str = "diffusers",
    *,
    dtype: torch.dtype = torch.float32,
    base: str | None = None,
) -> Path:
    """Writes a file, or of peft a folder, whole or not at all. base: what the model is called, for the header.

    Raises ConfigError for dialects that are not known, CheckpointError for layers that have no name in it.
    """
    path = Path(path)
    if dialect not in DIALECTS:
        raise ConfigError("no such dialect", where="--to", seen=dialect, fix=nearest(dialect, DIALECTS))
    if dialect == "peft":
        files.publish(path, lambda place: _write_peft(place, adapter, parts, dtype, base))
        return path
    state, metadata = (_kohya if dialect == "kohya" else _diffusers)(adapter, parts, base, str(path))
    write_whole(path, state, dtype, metadata)
    return path


def write_whole(path: Path, state: Mapping[str, Tensor], dtype: torch.dtype, metadata: Mapping[str, str]) -> None:
    """A safetensors file with a header, which takes the place of an older one when it is whole."""
    partial = path.with_name(f".{path.name}.partial")
    with files.explained(path):
        try:
            partial.parent.mkdir(parents=True, exist_ok=True)
            write_weights(partial, state, dtype, metadata)
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)


def _diffusers(
    adapter: Adapter, parts: Sequence[Part], base: str | None, where: str
) -> tuple[dict[str, Tensor], dict[str, str]]:
    state: dict[str, Tensor] = {}
    told: dict[str, Any] = {}
    for part in parts:
        changes = moved(adapter.of(part.home), part, OURS, DIFFUSERS, where)
        state |= {f"{part.name}.{key}": value for key, value in _peft_keys(changes).items()}
        if changes:
            told |= {f"{part.name}.{key}": value for key, value in _config(changes, part).items()}
    return state, {HEADER: json.dumps(told, indent=2, sort_keys=True), **_base(base)}


def _write_peft(place: Path, adapter: Adapter, parts: Sequence[Part], dtype: torch.dtype, base: str | None) -> None:
    changed = [part for part in parts if adapter.of(part.home)]
    for part in changed:
        folder = place / part.name if len(changed) > 1 else place
        folder.mkdir(exist_ok=True)
        # peft goes by the names of the module itself, which of a text encoder are ours
        changes = adapter.of(part.home)
        if not part.is_text:
            changes = moved(changes, part, OURS, DIFFUSERS, str(place))
        state = {f"{PEFT}{key}": value for key, value in _peft_keys(changes).items()}
        write_weights(folder / WEIGHTS, state, dtype)
        more = {"peft_type": "LORA", "task_type": None, "base_model_name_or_path": base, "bias": "none"}
        said = {**_config(changes, part), **more, "inference_mode": True, "fan_in_fan_out": False}
        (folder / CONFIG).write_text(json.dumps(said, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _peft_keys(changes: Mapping[str, Factors]) -> dict[str, Tensor]:
    state: dict[str, Tensor] = {}
    for name, one in changes.items():
        state[f"{name}.lora_A.weight"] = one.down
        state[f"{name}.lora_B.weight"] = _raised(one.up, one.down)
        if one.magnitude is not None:
            length = one.magnitude
            shape = (1, len(length), *(1,) * (one.down.ndim - 2)) if one.down.ndim > 2 else (len(length),)
            state[f"{name}.lora_magnitude_vector.weight"] = length.reshape(shape)
    return state


def _raised(up: Tensor, down: Tensor) -> Tensor:
    """B with as many axes as A: of a convolution, one of 1x1."""
    return up.reshape(*up.shape, *(1,) * (down.ndim - 2))


def _config(changes: Mapping[str, Factors], part: Part) -> dict[str, Any]:
    """peft's description: the most frequent rank and alpha, and the layers that have others.

    transformers 4 begins the names of CLIP's layers with what transformers 5 does not; their ends are the same in both.
    """
    start = "" if part.is_text else "^"
    changes = {name.removeprefix("text_model.") if part.is_text else name: one for name, one in changes.items()}
    ranks = {name: one.rank for name, one in changes.items()}
    alphas = {name: whole(one.alpha) for name, one in changes.items()}
    rank, alpha = (Counter(found.values()).most_common(1)[0][0] for found in (ranks, alphas))
    return {
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {start + re.escape(name): r for name, r in ranks.items() if r != rank},
        "alpha_pattern": {start + re.escape(name): a for name, a in alphas.items() if a != alpha},
        "target_modules": sorted(changes),
        "use_dora": any(one.magnitude is not None for one in changes.values()),
    }


def whole(number: float) -> int | float:
    """A whole number without a point."""
    return int(number) if float(number).is_integer() else number


def _kohya(
    adapter: Adapter, parts: Sequence[Part], base: str | None, where: str
) -> tuple[dict[str, Tensor], dict[str, str]]:
    state: dict[str, Tensor] = {}
    several = sum(part.is_text for part in parts) > 1
    for part in parts:
        first = part.kohya[0]
        if not several and "lora_te" in part.kohya:
            first = "lora_te"
        for name, one in moved(adapter.of(part.home), part, OURS, part.flat, where).items():
            key = f"{first}_{name.replace('.', '_')}"
            state[f"{key}.lora_down.weight"] = one.down
            state[f"{key}.lora_up.weight"] = _raised(one.up, one.down)
            state[f"{key}.alpha"] = torch.tensor(float(one.alpha))
            if one.magnitude is not None:
                state[f"{key}.dora_scale"] = one.magnitude.reshape(-1, *(1,) * (one.down.ndim - 1))
    return state, _kohya_header(adapter, parts) | _base(base)


def _kohya_header(adapter: Adapter, parts: Sequence[Part]) -> dict[str, str]:
    ranks = Counter(one.rank for one in adapter.changes.values())
    alphas = Counter(one.alpha for one in adapter.changes.values())
    kinds = [one for one in adapter.changes.values() if one.down.ndim > 2]
    said = {
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(ranks.most_common(1)[0][0]),
        "ss_network_alpha": str(alphas.most_common(1)[0][0]),
    }
    if kinds:
        said["ss_network_args"] = json.dumps({"conv_dim": str(kinds[0].rank), "conv_alpha": str(kinds[0].alpha)})
    if version := _version(parts[0]):
        said["ss_base_model_version"] = version
    return said


def _version(net: Part) -> str | None:
    """What kohya's scripts call the model of a U-Net, by the width of the words that it attends to."""
    if net.name != UNET:
        return None
    words = {shape[1] for name, shape in net.shapes.items() if name.endswith("cross.k")}
    return {768: "sd_v1", 1024: "sd_v2", 2048: "sdxl_base_v1-0"}.get(max(words, default=0))


def _base(name: str | None) -> dict[str, str]:
    return {"sfumato.base": name} if name else {}

"""Checkpoints: folders `step-00001000` that appear whole, with weights, averages and optimizer as safetensors,
counters as JSON, and a manifest of digests. A damaged one is named and the one before it is used.

Nothing in them is code, and no random generator's state: randomness is addressed (`sfumato.train.keys`).
"""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from sfumato import files
from sfumato.errors import CheckpointError
from sfumato.io.directory import read_weights, write_weights

FOLDER = "checkpoints"  # of a run
VERSION, KEPT = 1, "kept-"


class State(NamedTuple):
    """All of a run: groups of tensors by name ("model", "ema-0", "optim"), plain data with "step" in it, and files."""

    tensors: Mapping[str, Mapping[str, Tensor]]
    plain: Mapping[str, Any]
    files: Mapping[str, bytes] = {}


def save(folder: Path, step: int, state: State, keep: int) -> Path:
    """Writes the checkpoint of a step, and removes all but `keep` of those up to it: what is newer was damaged."""
    final = folder / f"step-{step:08d}"

    def fill(place: Path) -> None:
        for name, tensors in state.tensors.items():
            write_weights(place / f"{name}.safetensors", tensors)
        for name, data in state.files.items():
            (place / f"{KEPT}{name}").write_bytes(data)
        text = json.dumps({"version": VERSION, **state.plain}, indent=1, allow_nan=False)
        (place / "state.json").write_text(text, encoding="utf-8")

    files.publish(final, fill, replace=True)
    for old in [path for path in found(folder) if _step(path) <= step][keep:]:
        shutil.rmtree(old, ignore_errors=True)
    return final


def found(folder: Path) -> list[Path]:
    """The checkpoints of a run, newest first, whole or not."""
    return sorted((p for p in folder.glob("step-*") if _step(p) >= 0 and p.is_dir()), key=_step, reverse=True)


def load(path: Path) -> State:
    """A checkpoint; CheckpointError, naming the file, if it is damaged."""
    files.verify(path)
    names = list(files.manifest(path))
    try:
        tensors = {Path(name).stem: read_weights(path / name) for name in names if name.endswith(".safetensors")}
        kept = {name.removeprefix(KEPT): (path / name).read_bytes() for name in names if name.startswith(KEPT)}
        plain = json.loads((path / "state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError("a checkpoint cannot be read", where=str(path), seen=str(error)) from None
    where = str(path / "state.json")
    if not isinstance(plain, dict) or plain.pop("version", None) != VERSION:
        raise CheckpointError("a checkpoint of another version of sfumato", where=where, seen=f"not {VERSION}")
    if plain["step"] != _step(path):
        raise CheckpointError("a checkpoint bears another step's name", where=where, seen=f"step {plain['step']}")
    return State(tensors, plain, kept)


def newest(folder: Path, tell: Callable[[str], None]) -> tuple[Path, State]:
    """The newest checkpoint that is whole. Damaged ones are told of, by file; CheckpointError if none is left."""
    refused = []
    for path in found(folder):
        try:
            state = load(path)
        except CheckpointError as error:
            refused.append(f"{path.name} is not used: {error.what} ({error.where}, {error.seen})")
            continue
        for line in refused:
            tell(line)
        return path, state
    seen = "; ".join(refused) or "no checkpoints"
    raise CheckpointError(
        "there is nothing whole to resume from", where=str(folder), seen=seen, fix="start again under another name"
    )


def numerics(device: torch.device) -> dict[str, str]:
    """What the last bits of a result depend on, beside the configuration: the same here, the same there."""
    kind = torch.cuda.get_device_name(device) if device.type == "cuda" else torch.backends.cpu.get_cpu_capability()
    return {"torch": torch.__version__, "device": f"{device.type} ({kind})", "threads": str(torch.get_num_threads())}


def optimizer_state(optimizer: Optimizer, model: nn.Module) -> dict[str, Tensor]:
    """An optimizer's tensors, by the parameter's name and the slot's."""
    names: dict[Tensor, str] = {p: name for name, p in model.named_parameters()}
    return {
        f"{names[p]}|{slot}": value if isinstance(value, Tensor) else torch.tensor(value)
        for p, slots in optimizer.state.items()
        for slot, value in slots.items()
    }


def restore_optimizer(optimizer: Optimizer, model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """The inverse of `optimizer_state`."""
    params = dict(model.named_parameters())
    optimizer.state.clear()
    for key, value in tensors.items():
        name, _, slot = key.rpartition("|")
        if name not in params:
            raise CheckpointError("an optimizer's state does not fit the model", where=key, seen="no such parameter")
        home = params[name]
        place = "cpu" if slot == "step" else home.device  # counters stay on the CPU
        optimizer.state[home][slot] = value.to(place, copy=True)


def _step(path: Path) -> int:
    """The step that a checkpoint's folder is named after; -1 for another folder."""
    number = path.name.removeprefix("step-")
    return int(number) if number.isdecimal() else -1

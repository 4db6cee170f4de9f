"""Checkpoints: folders `step-00001000` that appear whole, with weights, averages and optimizer as safetensors,
counters as JSON, and a manifest of digests. A damaged one is named and the one before it is used.
"""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from sfumato import files
from sfumato.errors import CheckpointError
from sfumato.io.directory import read_weights


class State(NamedTuple):
    """All of a run: groups of tensors by name ("model", "ema-0", "optim"), and plain data."""

    tensors: Mapping[str, Mapping[str, Tensor]]
    plain: Mapping[str, Any]


def save(folder: Path, step: int, state: State, keep: int) -> Path:
    """Writes the checkpoint of a step and removes all but the newest `keep`."""
    final = folder / f"step-{step:08d}"

    def fill(place: Path) -> None:
        for name, tensors in state.tensors.items():
            save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, place / f"{name}.safetensors")
        (place / "state.json").write_text(json.dumps(state.plain, indent=1), encoding="utf-8")

    files.publish(final, fill, replace=True)
    for old in found(folder)[keep:]:
        shutil.rmtree(old, ignore_errors=True)
    return final


def found(folder: Path) -> list[Path]:
    """The checkpoints of a run, newest first, whole or not."""
    return sorted((p for p in folder.glob("step-*") if p.is_dir()), reverse=True)


def load(path: Path) -> State:
    """A checkpoint; CheckpointError, naming the file, if it is damaged."""
    files.verify(path)
    tensors = {file.stem: read_weights(file) for file in path.glob("*.safetensors")}
    return State(tensors, json.loads((path / "state.json").read_text(encoding="utf-8")))


def newest(folder: Path, tell: Callable[[str], None]) -> tuple[Path, State]:
    """The newest checkpoint that is whole. Damaged ones are told of, by file; CheckpointError if none is left."""
    candidates = found(folder)
    for path in candidates:
        try:
            return path, load(path)
        except CheckpointError as error:
            tell(f"{path.name} is not used: {error.what} ({error.where}, {error.seen})")
    seen = ", ".join(path.name for path in candidates) or "no checkpoints"
    raise CheckpointError(
        "there is nothing whole to resume from", where=str(folder), seen=seen, fix="start again under another name"
    )


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
        moved = value.clone() if value.ndim == 0 else value.to(home.device, copy=True)  # counters stay on the CPU
        optimizer.state[home][slot] = moved

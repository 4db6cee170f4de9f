"""What tests of model directories share: a small model, one that was meddled with, and one that is refused."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from sfumato import files
from sfumato.errors import CheckpointError
from sfumato.io.directory import load_model
from sfumato.model import Model, build_model

FACTS = {"run": "tiny", "steps": 7, "images": 56, "seed": 0}


class Captions:
    def captions(self) -> Iterator[str]:
        yield "a red circle"
        yield "a blue circle"


def spec(**model: Any) -> dict[str, Any]:
    section = {
        "path": {"kind": "linear"},
        "prediction": {"kind": "velocity"},
        "time_input": {"kind": "thousandths"},
        "scale_input": None,
        "net": {"kind": "dit", "patch": 4, "dim": 16, "depth": 1, "heads": 2},
        "codec": {"kind": "pixels"},
        "conditioner": {
            "kind": "joined",
            "parts": [
                {"kind": "labels", "classes": 3},
                {"kind": "prompts", "dim": 8, "depth": 1, "heads": 2, "length": 4},
            ],
        },
    }
    sampling = {"sampler": {"kind": "ddim"}, "grid": {"kind": "linear"}, "steps": 2, "guidance": 2.0}
    return {"model": section | model, "size": [8, 12], "sampling": {**sampling, "interval": None, "rescale": 0.0}}


def made(seed: int = 0, **model: Any) -> Model:
    """A model whose weights are all noise."""
    torch.manual_seed(seed)
    model_ = build_model(spec(**model), Captions())
    with torch.no_grad():
        for p in model_.parameters():
            p.normal_()
    return model_


def edited(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Changes model.json and seals the folder anew, as someone with intent would."""
    path = folder / "model.json"
    said = json.loads(path.read_text(encoding="utf-8"))
    change(said)
    path.write_text(json.dumps(said), encoding="utf-8")
    files.seal(folder)


def refused(folder: Path, **options: Any) -> CheckpointError:
    with pytest.raises(CheckpointError) as caught:
        load_model(folder, **options)
    return caught.value

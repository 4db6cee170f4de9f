"""There and back through a folder of diffusers: a model comes out as it was spelled, unless somebody changed it."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from sfumato.data.scenes import Scenes
from sfumato.io.directory import load_model, save_model
from sfumato.io.parts import OWN
from sfumato.io.published import load_published, save_published
from sfumato.model import Model, build_model

# As recipes are written: kinds last, options at their defaults left out, others in an order of their own.
SECTION: dict[str, Any] = {
    "path": {"kind": "tabulated", "betas": "linear", "steps": 1000},
    "prediction": {"kind": "eps"},
    "time_input": {"kind": "index"},
    "scale_input": None,
    "net": {
        "size": 32,
        "channels": [8, 16],
        "blocks": 1,
        "heads": [0, 1],
        "middle": 1,
        "groups": 4,
        "kind": "pixel_unet",
    },
    "codec": {"kind": "pixels"},
    "conditioner": None,
    "answers": ["x0"],
}


@pytest.fixture
def model() -> Model:
    torch.manual_seed(0)
    sampling = {"sampler": {"kind": "ddim"}, "grid": {"kind": "trailing"}, "steps": 4}
    return build_model({"model": SECTION, "size": [32, 32], "sampling": sampling}, Scenes())


def test_a_model_of_ours_comes_back_without_a_changed_byte(model: Model, tmp_path: Path) -> None:
    save_model(tmp_path / "a", model, {"run": "here"})
    save_published(tmp_path / "b", load_model(tmp_path / "a"))
    back = load_published(tmp_path / "b")
    save_model(tmp_path / "c", back, back.facts)
    a, c = ({one.name: one.read_bytes() for one in (tmp_path / name).iterdir()} for name in "ac")
    assert a == c and json.loads(a["model.json"])["model"] == SECTION


@pytest.mark.parametrize("lost", [True, False])
def test_what_somebody_changed_counts(model: Model, tmp_path: Path, lost: bool) -> None:
    """Another table of betas in the scheduler, and no file of ours beside it."""
    save_published(tmp_path / "b", model)
    scheduler = tmp_path / "b/scheduler/scheduler_config.json"
    said = json.loads(scheduler.read_text())
    scheduler.write_text(json.dumps({**said, "beta_end": 0.03}))
    if lost:
        (tmp_path / "b" / OWN).unlink()
    path = load_published(tmp_path / "b").spec["model"]["path"]
    assert path["end"] == 0.03

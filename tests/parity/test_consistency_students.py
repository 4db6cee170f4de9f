"""Consistency models that were taught here, drawn by diffusers' pipeline: the same pictures from the same noise."""

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from sfumato import load
from sfumato.cli import main
from sfumato.config import Config
from sfumato.train import train

diffusers = pytest.importorskip("diffusers")

NET: dict[str, Any] = {
    "kind": "pixel_unet",
    "size": 16,
    "channels": [8, 16, 24],
    "blocks": 1,
    "heads": [0, 4, 6],
    "middle": 6,
    "modulation": "add",
    "resample": "block",
    "groups": 4,
}


def taught(folder: Path, objective: dict[str, Any], **more: Any) -> Path:
    """A run of a few steps, large ones: a student that has moved."""
    pictures = folder / "pictures"
    pictures.mkdir(exist_ok=True)
    for i in range(4):
        Image.new("RGB", (16, 16), (60 * i, 255 - 60 * i, 128)).save(pictures / f"{i}.png")
    config = Config.model_validate(
        {
            "name": "student",
            "data": {"kind": "folder", "path": str(pictures), "size": 16},
            "objective": objective,
            "optim": {"kind": "adamw", "lr": 3e-3, "warmup": 1},
            "steps": 6,
            "batch": 4,
            "device": "cpu",
            "workers": 0,
            "ema": [{"decay": 0.5}],
            "condition_dropout": 0.0,
            **more,
        }
    )
    train(config, run=folder / str(objective["kind"]))
    return folder / str(objective["kind"])


def model(sigma_min: float) -> dict[str, Any]:
    return {
        "path": {"kind": "variance_exploding", "sigma_max": 80.0},
        "prediction": {"kind": "edm", "sigma_data": 0.5, **({"sigma_min": sigma_min} if sigma_min else {})},
        "time_input": "log_level_thousandths",
        "scale_input": {"kind": "unit_variance", "sigma_data": 0.5},
        "net": NET,
        "conditioner": None,
    }


def sampling(sigma_min: float) -> dict[str, Any]:
    sampler = {"kind": "consistency", "sigma_min": sigma_min, "clip": 1.0}
    return {"sampler": sampler, "grid": {"kind": "consistency", "of": 40}, "steps": 1, "guidance": 1.0}


@pytest.fixture(scope="module", params=["data", "teacher", "begun"])
def student(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Taught by data with the published boundary, by a teacher likewise, or begun as the teacher, an EDM."""
    folder = tmp_path_factory.mktemp(request.param)
    if request.param == "data":
        objective = {"kind": "consistency_training", "first": 2, "last": 10}
        return taught(folder, objective, model=model(0.002), sampling=sampling(0.002))
    edm = taught(folder, {"kind": "denoising", "weight": "edm"}, model=model(0.0))
    grid = {"kind": "karras", "sigma_min": 0.002, "sigma_max": 80.0}
    objective = {"kind": "consistency_distillation", "grid": grid, "points": 8}
    if request.param == "begun":
        return taught(folder, objective, teacher=str(edm), sampling=sampling(0.0))
    return taught(folder, objective, teacher=str(edm), model=model(0.002), sampling=sampling(0.002))


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_diffusers_draws_our_students_pictures(student: Path, steps: int, tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as end:
        main(["convert", str(student), str(tmp_path / "there"), "--to", "diffusers"])
    assert end.value.code == 0
    pipe = diffusers.ConsistencyModelPipeline.from_pretrained(tmp_path / "there")
    pipe.set_progress_bar_config(disable=True)
    scheduler = pipe.scheduler.config
    assert (scheduler.num_train_timesteps, scheduler.sigma_min, scheduler.sigma_max) == (40, 0.002, 80.0)
    rng = torch.Generator().manual_seed(7)
    theirs = pipe(num_inference_steps=steps, generator=rng, output_type="np").images[0]
    ours = load(student, "cpu").sample(None, steps=steps, seeds=7).images[0]
    assert float((torch.from_numpy(ours) / 255 - torch.as_tensor(theirs)).abs().max()) < 1.01 / 255
    assert theirs.std() > 0.01

"""What is distilled here from a Stable Diffusion draws the same in diffusers: the whole model, and the LoRA."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image as Pillow
from tests.clip import randomised
from tests.parity.test_stable_diffusion import pipeline_of

from sfumato import load
from sfumato.cli import main
from sfumato.io.directory import load_model, save_model
from sfumato.overlay import as_yaml, load_config
from sfumato.train import train

diffusers = pytest.importorskip("diffusers")
pytest.importorskip("peft")

SCHEDULER = {"beta_start": 8.5e-4, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False}


@pytest.fixture(autouse=True)
def _this_peft_will_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers asks for a newer one, for what is not used here."""
    monkeypatch.setattr("transformers.integrations.peft.MIN_PEFT_VERSION", "0.15.0")


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("teacher")
    pipeline_of(place, "epsilon")
    return place / "whole"


def distilled(teacher: Path, place: Path, recipe: str, *overrides: str) -> Path:
    """The run of a recipe for a Stable Diffusion, on four pictures."""
    (place / "pictures").mkdir(exist_ok=True)
    for i, colour in enumerate(("red", "blue", "green", "white")):
        Pillow.new("RGB", (20, 20), colour).save(place / f"pictures/{i}.png")
        (place / f"pictures/{i}.txt").write_text("a red circle")
    data = {"kind": "folder", "path": str(place / "pictures"), "size": 16, "cache": False}
    small = {"steps": 4, "batch": 4, "accumulate": 1, "precision": "fp32", "device": "cpu", "checkpointing": False}
    quiet = {"samples": {"every": 0}, "validate": {"every": 0, "holdout": 0}, "log": {"every": 1}}
    optim = {"kind": "adamw", "lr": 0.004, "warmup": 0}
    file = place / "student.yaml"
    file.write_text(as_yaml({"extends": recipe, "data": data, "optim": optim, **small, **quiet}))
    train(load_config(str(file), (f"teacher={teacher}", *overrides)).config, run=place / "run")
    return place / "run"


def close(ours: np.ndarray[Any, Any], theirs: Any) -> bool:
    return float((torch.from_numpy(ours) / 255 - torch.as_tensor(theirs)).abs().max()) < 1.01 / 255


def test_a_latent_consistency_model_is_one_of_diffusers(teacher: Path, tmp_path: Path) -> None:
    """With the guidance that it was told, by the published embedding of the weight scale - 1."""
    model = load_model(distilled(teacher, tmp_path, "lcm-sd15-paper") / "model")
    guided: Any = model.net.guided
    assert model.net.config.guidance_dim == 256 and bool(guided.weight.any())  # type: ignore[union-attr]
    randomised(model.net, 9)  # so few steps have left of the guidance a whisper
    run = tmp_path / "louder"
    save_model(run, model, {})
    with pytest.raises(SystemExit) as left:
        main(["convert", str(run), str(tmp_path / "theirs"), "--to", "diffusers"])
    assert left.value.code == 0
    pipe = diffusers.LatentConsistencyModelPipeline.from_pretrained(tmp_path / "theirs")
    pipe.set_progress_bar_config(disable=True)
    pipeline, drawn = load(run, "cpu"), []
    assert pipeline.settings().steps == 4
    for steps, guidance in ((1, 8.5), (4, 8.5), (4, 3.0)):
        told = pipe(
            "a red circle",
            num_inference_steps=steps,
            guidance_scale=guidance,
            generator=torch.Generator().manual_seed(7),
            output_type="np",
        ).images[0]
        ours = pipeline.sample("a red circle", steps=steps, guidance=guidance, seeds=7).images[0]
        assert close(ours, told)
        drawn.append(ours.astype(int))
    assert abs(drawn[1] - drawn[2]).max() > 2  # it does hear the guidance
    again = load(tmp_path / "theirs", "cpu").sample("a red circle", steps=4, guidance=3.0, seeds=7).images[0]
    assert abs(again.astype(int) - drawn[2]).max() <= 1


def test_a_low_rank_student_is_one_of_diffusers(teacher: Path, tmp_path: Path) -> None:
    run = distilled(teacher, tmp_path, "lcm-lora-sd15-paper", "lora.rank=4")
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(teacher, safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = diffusers.LCMScheduler(**SCHEDULER, timestep_scaling=10.0)
    plain = _drawn(pipe)
    pipe.load_lora_weights(run, weight_name="lora.safetensors")
    theirs = _drawn(pipe)
    assert float(abs(theirs - plain).max()) > 0.02
    assert close(load(run, "cpu").sample("a red circle", steps=4, seeds=7).images[0], theirs)
    beside = load(teacher, "cpu")
    beside.load_lora(run / "lora.safetensors")
    few = {"sampler": {"kind": "lcm", "boundary": 10.0, "to": "x0"}, "grid": "lcm", "steps": 4, "guidance": 1.0}
    assert close(beside.sample("a red circle", seeds=7, **few).images[0], theirs)  # type: ignore[arg-type]


def _drawn(pipe: Any) -> Any:
    rng = torch.Generator().manual_seed(7)
    return pipe(
        "a red circle", num_inference_steps=4, guidance_scale=1.0, generator=rng, output_type="np", height=16, width=16
    ).images[0]

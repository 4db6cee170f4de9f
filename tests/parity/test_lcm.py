"""Latent consistency models: diffusers' pipeline, small and with every weight random, both ways."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.clip import encoder, randomised, tokenizer
from tests.parity.test_stable_diffusion import SMALL, contents

from sfumato import load
from sfumato.cli import main
from sfumato.io.published import save_file, save_published

diffusers = pytest.importorskip("diffusers")
pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    folder = tmp_path_factory.mktemp("lcm")
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        scaling_factor=0.7,
    )
    betas = {"beta_start": 8.5e-4, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    made = diffusers.LatentConsistencyModelPipeline(
        randomised(vae, 3),
        randomised(encoder(), 4),
        tokenizer(folder / "made"),
        randomised(diffusers.UNet2DConditionModel(**SMALL, time_cond_proj_dim=20), 5),
        diffusers.LCMScheduler(**betas, timestep_scaling=8.0, clip_sample=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    made.save_pretrained(folder / "whole")
    made.set_progress_bar_config(disable=True)
    return made, folder / "whole"


@pytest.mark.parametrize("steps", [1, 4, 7])
def test_a_latent_consistency_model_draws_the_same_picture(whole: tuple[Any, Path], steps: int) -> None:
    """With the guidance that it is told: scale - 1, of which it has an embedding."""
    pipe, folder = whole
    pipeline = load(folder, "cpu")
    assert pipeline.settings().steps == 4 and pipeline.settings().sampler == {
        "kind": "lcm",
        "boundary": 8.0,
        "to": "x0",
    }
    drawn = []
    for guidance in (8.5, 3.0):
        rng = torch.Generator().manual_seed(7)
        told = pipe(
            "a red circle", num_inference_steps=steps, guidance_scale=guidance, generator=rng, output_type="np"
        ).images[0]
        ours = pipeline.sample("a red circle", steps=steps, guidance=guidance, seeds=7, size=16).images[0]
        assert float((torch.from_numpy(ours) / 255 - torch.from_numpy(told)).abs().max()) < 1.01 / 255
        drawn.append(ours.astype(int))
    assert abs(drawn[0] - drawn[1]).max() > 2  # it does hear the guidance


def test_there_and_back(whole: tuple[Any, Path], tmp_path: Path) -> None:
    def convert(source: Path, target: str, to: str) -> Path:
        with pytest.raises(SystemExit) as left:
            main(["convert", str(source), str(tmp_path / target), "--to", to])
        assert left.value.code == 0
        return tmp_path / target

    ours = convert(whole[1], "a", "sfumato")
    theirs = convert(ours, "b", "diffusers")
    assert contents(convert(theirs, "c", "sfumato")) == contents(ours)
    save_published(tmp_path / "mine", load(whole[1], "cpu").model)
    drawn = []
    for pipe in (whole[0], diffusers.LatentConsistencyModelPipeline.from_pretrained(tmp_path / "mine")):
        pipe.set_progress_bar_config(disable=True)
        rng = torch.Generator().manual_seed(3)
        drawn.append(
            torch.as_tensor(pipe("a blue square", num_inference_steps=3, generator=rng, output_type="np").images)
        )
    torch.testing.assert_close(drawn[1], drawn[0], rtol=1e-5, atol=1e-5)


def test_a_single_file_is_known_by_its_embedding_of_the_guidance(whole: tuple[Any, Path], tmp_path: Path) -> None:
    """And sampled as they are even where a folder beside it is of an ordinary model; diffusers has no such layout."""
    file = tmp_path / "lcm.safetensors"
    save_file(file, load(whole[1], "cpu").model)
    drawn = [load(path, "cpu", parts=whole[1]).sample("a red circle", seeds=3, size=16) for path in (file, whole[1])]
    assert (drawn[0].images == drawn[1].images).all()
    shutil.copytree(whole[1], tmp_path / "parts")
    (tmp_path / "parts" / "scheduler" / "scheduler_config.json").write_text('{"_class_name": "DDIMScheduler"}')
    other = load(file, "cpu", parts=tmp_path / "parts").settings()
    assert other.sampler == {"kind": "lcm", "boundary": 10.0, "to": "x0"} and other.steps == 4
    assert other.guidance == {"kind": "distilled", "scale": 8.5, "told": "weight"}

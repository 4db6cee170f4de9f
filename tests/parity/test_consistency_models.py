"""Consistency models: diffusers' pipelines, small and with every weight random, both ways."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from pixel_unets import close, contents, convert, unet

from sfumato import load
from sfumato.errors import ConfigError, DataError
from sfumato.io.directory import load_model

diffusers = pytest.importorskip("diffusers")

CONSISTENT = ("consistency-64", "consistency-256")


@pytest.fixture(scope="module", params=CONSISTENT)
def jumps(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    folder = tmp_path_factory.mktemp("consistency") / request.param
    made = diffusers.ConsistencyModelPipeline(unet(request.param, 6), diffusers.CMStochasticIterativeScheduler())
    made.save_pretrained(folder)
    made.set_progress_bar_config(disable=True)
    return made, folder


def label_of(folder: Path) -> int | None:
    return 4 if folder.name == "consistency-64" else None


@pytest.mark.parametrize("steps", [1, 2, 3, 40])
def test_a_consistency_model_draws_the_same_picture(jumps: tuple[Any, Path], steps: int) -> None:
    pipe, folder = jumps
    label, rng = label_of(folder), torch.Generator().manual_seed(7)
    told = pipe(class_labels=label, num_inference_steps=steps, generator=rng, output_type="np").images
    pipeline = load(folder, "cpu")
    assert pipeline.settings().steps == 1
    assert close(pipeline.sample(label, steps=steps, seeds=7).images[0], told[0])
    assert told.std() > 0.02


def test_levels_can_be_chosen(jumps: tuple[Any, Path]) -> None:
    """Those of the paper's two steps on ImageNet; theirs are counted from the data's end and reversed."""
    pipe, folder = jumps
    label, rng = label_of(folder), torch.Generator().manual_seed(7)
    told = pipe(class_labels=label, num_inference_steps=None, timesteps=[22, 0], generator=rng, output_type="np").images
    grid = {"kind": "consistency", "levels": [0, 22]}
    assert close(load(folder, "cpu").sample(label, steps=2, grid=grid, seeds=7).images[0], told[0])


def test_consistency_models_there_and_back(jumps: tuple[Any, Path], tmp_path: Path) -> None:
    pipe, folder = jumps
    ours = convert(folder, tmp_path / "a", "sfumato")
    theirs = convert(ours, tmp_path / "b", "diffusers")
    assert contents(convert(theirs, tmp_path / "c", "sfumato")) == contents(ours)
    again = diffusers.ConsistencyModelPipeline.from_pretrained(tmp_path / "b")
    again.set_progress_bar_config(disable=True)
    one, two = (
        torch.as_tensor(
            p(
                class_labels=label_of(folder),
                num_inference_steps=2,
                generator=torch.Generator().manual_seed(2),
                output_type="np",
            ).images
        )
        for p in (pipe, again)
    )
    torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-5)
    kept = json.loads((tmp_path / "b" / "scheduler" / "scheduler_config.json").read_text())
    assert kept["num_train_timesteps"] == 40 and kept["clip_denoised"] is True


def test_a_consistency_model_is_no_denoiser(jumps: tuple[Any, Path]) -> None:
    pipeline = load(jumps[1], "cpu")
    with pytest.raises(ConfigError, match="endpoint"):
        pipeline.sample(label_of(jumps[1]), sampler="euler", grid="karras", steps=3)


def test_a_class_must_be_told_where_none_is_no_class(jumps: tuple[Any, Path]) -> None:
    pipeline = load(jumps[1], "cpu")
    if label_of(jumps[1]) is None:
        assert pipeline.sample(steps=1).images.shape == (1, 16, 16, 3)
        return
    for given, said in ((None, "without a class"), (7, "no such class")):
        with pytest.raises(DataError, match=said):
            pipeline.sample(given, steps=1)


def test_what_is_saved_as_ours_draws_the_same(jumps: tuple[Any, Path], tmp_path: Path) -> None:
    convert(jumps[1], tmp_path / "mine", "sfumato")
    assert load_model(tmp_path / "mine").answers == ("endpoint",)
    one, two = (load(p, "cpu").sample(label_of(jumps[1]), steps=2).images for p in (jumps[1], tmp_path / "mine"))
    assert (one == two).all()

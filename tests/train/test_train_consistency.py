"""Consistency models as runs: every method trains, goes on bit for bit, and gives a model that draws in a few steps."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from runs import kept, rows_of, stopped

from sfumato import load
from sfumato.catalogue import KINDS, METHODS, build
from sfumato.config import Config
from sfumato.overlay import load_config
from sfumato.train import train

Small = Callable[..., Config]
FEW = ("steps=4", "batch=4", "checkpoint.every=2", "log.every=1", "sampling.sampler=consistency", "sampling.guidance=1")
OBJECTIVES = {
    "consistency_distillation": "{kind: consistency_distillation, points: 5}",
    "consistency_training": "{kind: consistency_training, first: 2, last: 6}",
    "improved_consistency_training": "{kind: improved_consistency_training, first: 2, last: 6}",
    "easy_consistency_training": "{kind: easy_consistency_training, stages: 2}",
    "continuous_consistency": "{kind: continuous_consistency, warmup: 2}",
}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("teacher") / "run"
    config = load_config(str(Path(__file__).parent / "small.yaml"), ["steps=2"]).config
    train(config, run=run)
    return run


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_it_trains_and_goes_on_bit_for_bit(
    small: Small, teacher: Path, tmp_path: Path, name: str, precision: str
) -> None:
    taught = [f"teacher={teacher}"] if METHODS[name].teacher != "none" else []
    config = small(*FEW, *taught, f"objective={OBJECTIVES[name]}", f"precision={precision}")
    train(config, run=tmp_path / "whole")
    stopped(config, tmp_path / "parts", 2)
    train(load_config(str(tmp_path / "parts" / "config.yaml")).config, run=tmp_path / "parts", resume=True)
    whole, parts = kept(tmp_path / "whole"), kept(tmp_path / "parts")
    assert [one for one in sorted(whole) if whole[one] != parts.get(one)] == []
    assert all(row["loss"] == row["loss"] for row in rows_of(tmp_path / "whole"))
    pipeline = load(tmp_path / "whole", "cpu")
    assert pipeline.model.answers == ("endpoint",)
    assert pipeline.sample("a red circle", steps=2).images.shape == (1, 32, 32, 3)
    saved = {one.split(".")[0] for one in pipeline.model.weights()}
    assert not saved & {"slow", "critic"}


@pytest.mark.parametrize("name", ["consistency_distillation", "easy_consistency_training"])
def test_a_student_that_predicts_x0_is_given_a_boundary(small: Small, teacher: Path, tmp_path: Path, name: str) -> None:
    """Which it keeps: what it says at the data is the data. Another prediction stays what it is."""
    taught = [f"teacher={teacher}"] if METHODS[name].teacher != "none" else []
    config = small(*FEW, *taught, f"objective={OBJECTIVES[name]}", "model.prediction=x0")
    train(config, run=tmp_path / "run")
    model = load(tmp_path / "run", "cpu").model
    assert model.spec["model"]["prediction"] == {"kind": "bounded", "level": 0.03}
    x = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        told = model.cond([{"caption": "a red circle"}])
        torch.testing.assert_close(model.denoiser(x, 0.0, told), x)
    train(small(*FEW, *taught, f"objective={OBJECTIVES[name]}"), run=tmp_path / "other")
    assert load(tmp_path / "other", "cpu").model.spec["model"]["prediction"] == {"kind": "velocity"}


@pytest.mark.parametrize("recipe", ["consistency-distillation", "consistency-training", "ict"])
def test_sampling_begins_where_training_does(recipe: str) -> None:
    """At pure noise, whatever the number of points and steps."""
    config = load_config(recipe).config
    objective, path = build(config.objective, "Objective"), build("linear", "Path")
    grid = build(config.sampling.grid, "Grid")
    assert KINDS["Objective"][config.objective["kind"]].endswith(type(objective).__name__)
    for n in (1, 2, 4):
        assert float(grid(path, n)[0]) == float(objective.grid(path, n)[0]) == 1.0


def test_the_published_grids_begin_alike() -> None:
    config, path = load_config("consistency-imagenet-64").config, build("variance_exploding", "Path")
    objective = build(config.objective, "Objective")
    assert float(objective.grid(path, 40)[0]) == pytest.approx(float(build(config.sampling.grid, "Grid")(path, 1)[0]))

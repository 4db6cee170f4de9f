"""Training further: all of a model, or an adapter of it. What comes out is the model; what stands still stays."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from runs import bytes_of, kept, stopped

from sfumato import load
from sfumato.adapters.factors import merged
from sfumato.adapters.parts import parts_of
from sfumato.adapters.reading import read_adapter
from sfumato.cli import main
from sfumato.config import Config
from sfumato.errors import CheckpointError, ConfigError
from sfumato.io.directory import load_model
from sfumato.overlay import as_yaml, load_config, resolved
from sfumato.train import checkpoint, train

Small = Callable[..., Config]
FURTHER = ("data={kind: scenes, size: 32, seed: 7, count: 200}", "optim={lr: 0.02, warmup: 0}")
LORA = (*FURTHER, "lora={rank: 2, alpha: 3, dropout: 0.2}")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a few steps, to be trained further."""
    from tests.train.conftest import small

    folder = tmp_path_factory.mktemp("base") / "run"
    train(small("steps=3", "checkpoint.every=3"), run=folder)
    return folder


def further(base: Path, *overrides: str) -> Config:
    """A configuration that starts from a run, with no model section of its own."""
    from tests.train.conftest import SMALL

    raw = dict(resolved(load_config(str(SMALL)).config), name="further", model=None)
    del raw["sampling"]
    file = base.parent / "further.yaml"
    file.write_text(as_yaml(raw))
    return load_config(str(file), (f"start={base}", *overrides)).config


@pytest.mark.parametrize("dora", ["false", "true"])
def test_an_adapter_is_trained_and_the_model_has_it(base: Path, tmp_path: Path, dora: str) -> None:
    before = load_model(base / "model")
    train(further(base, *LORA, f"lora.dora={dora}", "lora.text=true"), run=tmp_path / "run")
    after = load_model(tmp_path / "run/model")
    assert after.spec["model"] == before.spec["model"] and after.spec["sampling"] == before.spec["sampling"]
    assert after.facts["start"] == str(base) and after.facts["lora"]["rank"] == 2
    adapter = read_adapter(tmp_path / "run/lora.safetensors", parts_of(before))
    assert {one.alpha for one in adapter.changes.values()} == {3.0} and adapter.ranks == [2]
    assert all((one.magnitude is not None) == (dora == "true") for one in adapter.changes.values())
    assert {name.split(".")[0] for name in adapter.changes} == {"net", "conditioner"}
    weights, now = before.weights(), after.weights()
    assert weights.keys() == now.keys()
    touched = {f"{name}.weight" for name in adapter.changes}
    for name, value in weights.items():
        changes = [(adapter.changes[name.removesuffix(".weight")], 1.0)] if name in touched else []
        torch.testing.assert_close(now[name], merged(value, changes) if changes else value, rtol=0, atol=1e-6)
        assert torch.equal(now[name], value) == (name not in touched)


def test_beside_the_model_it_draws_what_the_merged_one_draws(base: Path, tmp_path: Path) -> None:
    train(further(base, *LORA, "lora.targets=[linear]"), run=tmp_path / "run")
    pipeline = load(base, "cpu")
    plain = pipeline.sample("a red square", steps=3).images
    pipeline.load_lora(tmp_path / "run/lora.safetensors")
    beside = pipeline.sample("a red square", steps=3).images
    merged = load(tmp_path / "run", "cpu").sample("a red square", steps=3).images
    assert abs(beside.astype(int) - merged).max() <= 1 and abs(beside.astype(int) - plain).max() > 2


@pytest.mark.parametrize("how", [LORA, FURTHER], ids=["lora", "whole"])
def test_a_resumed_run_is_the_same_to_the_last_bit(base: Path, tmp_path: Path, how: tuple[str, ...]) -> None:
    """Also where the model that it began with is gone."""
    config = further(base, *how, "ema=[{decay: 0.9}, {decay: 0.5, warmup: false}]", "steps=6", "checkpoint.every=6")
    train(config, run=tmp_path / "whole")
    stopped(config, tmp_path / "parts", 4)
    again = load_config(str(tmp_path / "parts/config.yaml")).config
    moved = base.with_name("moved")
    base.rename(moved)
    try:
        train(again, run=tmp_path / "parts", resume=True)
    finally:
        moved.rename(base)
    whole, parts = kept(tmp_path / "whole"), kept(tmp_path / "parts")
    names = {name for name in whole if "step-00000006" in name or name.startswith(("model", "lora", "start"))}
    assert {"model/model.safetensors", "model-1/model.safetensors"} <= names
    assert ("lora-1.safetensors" in names) == ("start/model.json" in names) == (how == LORA)
    assert [name for name in sorted(names) if whole[name] != parts.get(name)] == []


def test_a_checkpoint_of_an_adapter_holds_the_adapter_alone(base: Path, tmp_path: Path) -> None:
    train(further(base, *LORA, "steps=1"), run=tmp_path / "run")
    _, state = checkpoint.newest(tmp_path / "run/checkpoints", print)
    assert state.tensors["model"] and all(".lora_" in name for name in state.tensors["model"])
    assert bytes_of(tmp_path / "run/start")["model.safetensors"] == bytes_of(base / "model")["model.safetensors"]


def test_whole_training_moves_everything_that_learns(base: Path, tmp_path: Path) -> None:
    config = further(base, *FURTHER, "steps=2")
    train(config, run=tmp_path / "run")
    before, after = load_model(base / "model").weights(), load_model(tmp_path / "run/model").weights()
    moved = [name for name in before if not torch.equal(before[name], after[name])]
    assert len(moved) > 0.9 * len(before)
    assert not (tmp_path / "run/lora.safetensors").exists() and not (tmp_path / "run/start").exists()
    said = load_config(str(tmp_path / "run/config.yaml")).config
    assert said.start == str(base) and said.model is not None and said.model.net["dim"] == 16


def test_its_words_are_those_that_it_knows(base: Path, tmp_path: Path) -> None:
    train(further(base, *FURTHER, "steps=1"), run=tmp_path / "run")
    assert load_model(tmp_path / "run/model").conditioner.words == load_model(base / "model").conditioner.words  # type: ignore[union-attr]


def test_what_cannot_be_meant_is_named(base: Path, tmp_path: Path, small: Small) -> None:
    with pytest.raises(ConfigError, match=r"model is missing[\s\S]*start=MODEL"):
        load_config(str(_file(tmp_path, {"data": "scenes", "steps": 1})))
    with pytest.raises(ConfigError, match="lora changes a model, and none is named"):
        small("lora.rank=4")
    with pytest.raises(ConfigError, match=r"model.prediction is that of the model to start from"):
        small(f"start={base}", "model.prediction=eps")
    with pytest.raises(ConfigError, match=r"lora.rank should be at least 1"):
        further(base, "lora.rank=0")
    with pytest.raises(CheckpointError, match="no model to start from"):
        train(further(tmp_path / "nowhere", "lora.rank=2", f"start={tmp_path / 'nowhere'}"), run=tmp_path / "a")
    with pytest.raises(ConfigError, match=r"no layer of net has such a name[\s\S]*to_qq"):
        train(further(base, "lora={rank: 2, targets: [to_qq]}"), run=tmp_path / "b")


def _file(folder: Path, raw: dict[str, object]) -> Path:
    file = folder / "some.yaml"
    file.write_text(as_yaml(raw))
    return file


def test_a_recipe_with_a_model_gives_way_to_the_start(base: Path, tmp_path: Path, small: Small) -> None:
    config = small(f"start={base}", "steps=1", "sampling.steps=3")
    train(config, run=tmp_path / "run")
    assert load_model(tmp_path / "run/model").spec["sampling"]["steps"] == 3


def test_targets_may_have_any_layouts_names(base: Path, tmp_path: Path) -> None:
    train(further(base, "steps=1", "lora={rank: 2, targets: ['*.attention.q', feedforward]}"), run=tmp_path / "run")
    adapter = read_adapter(tmp_path / "run/lora.safetensors", parts_of(load_model(base / "model")))
    assert {name.rpartition(".")[2] for name in adapter.changes} == {"q", "up", "down"}


def test_the_plan_counts_what_learns(base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    further(base)
    for words, some in (((), False), (("lora.rank=2",), True)):
        with pytest.raises(SystemExit):
            main(["plan", str(base.parent / "further.yaml"), f"start={base}", *words, "--json"])
        said = json.loads(capsys.readouterr().out)
        assert (said["frozen"] > said["parameters"] > 0) == some

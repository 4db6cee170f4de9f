"""Runs of methods with critics: who moves when, what is kept, and that a stopped run goes on to the last bit."""

from pathlib import Path

import pytest
import torch
from runs import kept, rows_of, stopped

from sfumato import load
from sfumato.config import Config
from sfumato.io.directory import load_model, read_weights
from sfumato.overlay import as_yaml, load_config, resolved
from sfumato.train import checkpoint, train
from sfumato.train.run import Run
from sfumato.train.start import read_start, with_start
from sfumato.train.teaching import as_student

MATCHING = (
    "objective={kind: distribution_matching, at: [1.0, 0.5], every: 3, warmup: 2, heads: {kind: features, width: 8}}"
)
ADVERSARIAL = "objective={kind: adversarial, at: [1.0, 0.5], warmup: 1, heads: {kind: features, width: 8}}"
METHODS = {"matching": MATCHING, "adversarial": ADVERSARIAL}
methods = pytest.mark.parametrize("method", METHODS)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.train.conftest import small

    folder = tmp_path_factory.mktemp("teacher") / "run"
    train(small("steps=6", "optim={lr: 0.02, warmup: 0}"), run=folder)
    return folder


def student(teacher: Path, method: str, *overrides: str) -> Config:
    from tests.train.conftest import SMALL

    raw = dict(resolved(load_config(str(SMALL)).config), name="student", model=None)
    raw["sampling"] = {"sampler": "consistency", "grid": "linear", "steps": 2, "guidance": 1.0}
    file = teacher.parent / "student.yaml"
    file.write_text(as_yaml(raw))
    more = ("steps=8", "checkpoint.every=4", "optim={lr: 0.01, warmup: 0}", "validate={every: 4, holdout: 8}")
    return load_config(str(file), (f"teacher={teacher}", METHODS[method], *more, *overrides)).config


@pytest.mark.parametrize("optim", ["muon", "adamw"])
def test_where_the_student_stands_still_it_does_so_to_the_last_bit(teacher: Path, tmp_path: Path, optim: str) -> None:
    config = student(teacher, "matching", f"optim.kind={optim}", "optim.options={weight_decay: 0.1}")
    folder = tmp_path / "run"
    folder.mkdir()
    begun = read_start(str(config.start))
    config, begun = as_student(with_start(config, begun), begun)
    run = Run(config, folder, False, begun)
    try:
        for step in range(8):
            before = {name: value.clone() for name, value in run.weights.items()}
            run._advance()
            changed = {name for name, value in run.weights.items() if not torch.equal(value, before[name])}
            of_student = {name for name in run.averaged if name in changed}
            moves = step < 2 or (step - 2) % 3 == 0
            assert bool(of_student) == moves, step
            assert changed - of_student, step
    finally:
        run.close()


@pytest.mark.parametrize("lora", ["null", "{rank: 2}"])
@methods
def test_a_resumed_run_is_the_same_to_the_last_bit(teacher: Path, tmp_path: Path, method: str, lora: str) -> None:
    train(student(teacher, method, f"lora={lora}"), run=tmp_path / "whole")
    stopped(student(teacher, method, f"lora={lora}"), tmp_path / "parts", 4)
    train(load_config(str(tmp_path / "parts/config.yaml")).config, run=tmp_path / "parts", resume=True)
    one, other = kept(tmp_path / "whole"), kept(tmp_path / "parts")
    assert one.keys() == other.keys()
    assert [name for name in one if one[name] != other[name]] == []


@methods
def test_the_critic_is_in_checkpoints_and_not_in_the_model(teacher: Path, tmp_path: Path, method: str) -> None:
    train(student(teacher, method), run=tmp_path / "run")
    model = load_model(tmp_path / "run/model")
    assert model.answers == ("endpoint",) and not any("critic" in name for name in model.weights())
    newest = checkpoint.found(tmp_path / "run/checkpoints")[0]
    assert any(name.startswith("critic.") for name in read_weights(newest / "model.safetensors"))
    before = read_weights(teacher / "model/model.safetensors")
    assert not all(torch.equal(before[name], value) for name, value in model.weights().items())
    rows = rows_of(tmp_path / "run")
    assert {"discriminator"} <= set().union(*rows) and any("validation" in row for row in rows)
    for steps in (1, 2):
        assert load(tmp_path / "run", "cpu").sample("a red square", steps=steps).images.shape == (1, 32, 32, 3)


def test_a_low_rank_change_is_a_student_too(teacher: Path, tmp_path: Path) -> None:
    """Its critic is the whole network all the same."""
    train(student(teacher, "matching", "lora={rank: 2}", "steps=4"), run=tmp_path / "run")
    newest = read_weights(checkpoint.found(tmp_path / "run/checkpoints")[0] / "model.safetensors")
    before, after = load_model(teacher / "model").weights(), load_model(tmp_path / "run/model").weights()
    changed = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert changed and all("attention" in name or "feed" in name for name in changed)
    own = {name.removeprefix("critic.denoiser.") for name in newest if name.startswith("critic.denoiser.net.")}
    assert own == {name for name in before if name.startswith("net.")}
    assert (tmp_path / "run/lora.safetensors").exists()

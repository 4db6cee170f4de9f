"""`sfumato tune-sampler` and `sfumato bench`: a sampler made for a model, and tables for people to choose by."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from commands import Command
from PIL import Image as Pillow

from sfumato.errors import CheckpointError, ConfigError
from sfumato.io.directory import load_model, save_model
from sfumato.io.pictures import read_settings
from sfumato.pipeline import load


@pytest.fixture
def run(tiny_run: Path, tmp_path: Path) -> Path:
    shutil.copytree(tiny_run, tmp_path / "runs" / "tiny")
    return Path("runs/tiny")


TUNE = ("--n", "8", "--batch", "4", "--iterations", "2", "--device", "cpu")


def test_a_tuned_sampler_is_saved_and_used_for_its_steps(sfumato: Command, run: Path) -> None:
    outcome = sfumato("tune-sampler", run, "--steps", "3", *TUNE, "--json")
    assert outcome.code == 0, outcome.err
    said = json.loads(outcome.out)
    assert said["path"] == str(run / "model/samplers/3.json") and said["error"] <= said["before"]
    assert len(said["grid"]["times"]) == 4 and [len(row) for row in said["sampler"]["rows"]] == [2, 3, 4]
    outcome = sfumato("sample", run, "a cross", "--steps", "3", "--device", "cpu")
    used = read_settings(Path(outcome.out.strip()))
    assert used["sampler"] == said["sampler"] and used["grid"] == said["grid"]
    other = read_settings(Path(sfumato("sample", run, "a cross", "--steps", "4", "--device", "cpu").out.strip()))
    assert other["sampler"]["kind"] == "ipndm"  # the recipe's: nothing was tuned for 4 steps


def test_a_tuned_sampler_goes_by_name_and_what_was_asked_for_wins(sfumato: Command, run: Path) -> None:
    assert sfumato("tune-sampler", run, "--steps", "2", *TUNE).code == 0
    pipeline = load(run, "cpu")
    tuned = pipeline.settings(steps=2)
    assert pipeline.settings(steps=2, sampler="tuned") == tuned
    assert pipeline.settings(steps=2, sampler="ddim").sampler == "ddim"
    with pytest.raises(ConfigError, match="no sampler was tuned"):
        pipeline.settings(steps=5, sampler="tuned")


def test_a_tuned_sampler_that_cannot_be_read_is_named(sfumato: Command, run: Path) -> None:
    place = run / "model" / "samplers"
    place.mkdir()
    (place / "4.json").write_text('{"format": "sfumato-sampler", "version": 9}')
    with pytest.raises(CheckpointError, match="cannot be read"):
        load(run, "cpu")
    outcome = sfumato("sample", run, "a cross", "--device", "cpu")
    assert outcome.code == 4 and "4.json" in outcome.err and "version 9" in outcome.err


def test_prompts_to_tune_for_come_from_a_file(sfumato: Command, run: Path) -> None:
    Path("prompts.txt").write_text("a red circle\ntwo blue squares\n")
    assert sfumato("tune-sampler", run, "--steps", "2", "--prompts", "prompts.txt", *TUNE).code == 0
    outcome = sfumato("tune-sampler", run, "--steps", "2", "--prompts", "nowhere.txt", *TUNE)
    assert outcome.code == 4 and "nowhere.txt" in outcome.err


def test_a_table_of_samplers_and_a_plot(sfumato: Command) -> None:
    outcome = sfumato("bench", "samplers", "ddim", "heun", "--path", "linear", "--json")
    assert outcome.code == 0, outcome.err
    rows = json.loads(outcome.out)["samplers"]
    assert set(rows) == {"ddim", "heun"} and rows["heun"]["nominal"] == 2 and rows["heun"]["calls_per_step"] == 2
    assert abs(rows["ddim"]["order"]["linear"] - 1) < 0.25 and rows["ddim"]["syncs"] == 0
    assert np.asarray(Pillow.open("samplers.png")).std() > 5
    outcome = sfumato("bench", "samplers", "ddim", "--path", "linear")
    assert outcome.code == 0 and "ddim" in outcome.out and "samplers.png" in outcome.err


def test_a_sampler_that_is_not_there_is_told(sfumato: Command) -> None:
    outcome = sfumato("bench", "samplers", "nothing")
    assert outcome.code == 2 and "no such sampler" in outcome.err


def test_error_against_calls_on_a_run(sfumato: Command, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sfumato import bench

    monkeypatch.setattr(bench, "CALLS", (2, 10))
    monkeypatch.setattr(bench.on_model, "__kwdefaults__", {"reference_steps": 40})
    outcome = sfumato("bench", "samplers", "ddim", "ipndm", "--run", run, "--json")
    assert outcome.code == 0, outcome.err
    rows = json.loads(outcome.out)["error"]
    assert rows["ipndm"]["10"] < rows["ipndm"]["2"] and rows["ddim"]["10"] < rows["ddim"]["2"]


def test_a_recipe_name_means_the_recipe_whatever_lies_here(sfumato: Command, run: Path) -> None:
    shutil.copytree(run, "tiny")
    outcome = sfumato("train", "tiny", "--print-config", "--json")
    assert outcome.code == 0 and json.loads(outcome.out)["steps"] == 20
    assert sfumato("train", "tiny", "steps=1", "device=cpu", "--run", "new").code == 0


def test_of_a_model_that_jumps_the_times_are_searched_for(sfumato: Command, run: Path) -> None:
    """Against its teacher's pictures, the data's, or nothing, which is refused."""
    student = Path("runs/student")
    shutil.copytree(run, student)
    model = load_model(student / "model")
    how = {"sampler": {"kind": "consistency"}, "grid": {"kind": "logistic"}, "steps": 2, "guidance": 1.0}
    model.spec |= {"model": {**model.spec["model"], "answers": ["endpoint"]}, "sampling": how}
    save_model(student / "model", model, model.facts)
    few = ("--n", "4", "--batch", "4", "--device", "cpu", "--json")
    outcome = sfumato("tune-sampler", student, "--steps", "3", "--teacher", run, *few)
    assert outcome.code == 0, outcome.err
    said = json.loads(outcome.out)
    assert said["sampler"] == {"kind": "consistency"} and said["error"] <= said["before"]
    times = said["grid"]["times"]
    assert len(times) == 4 and times == sorted(times, reverse=True) and (times[0], times[-1]) == (1, 0)
    assert load(student, "cpu").settings(steps=3).grid == said["grid"]
    assert sfumato("tune-sampler", student, "--steps", "2", *few).code == 0  # the run's data
    Path("prompts.txt").write_text("a red circle\n")
    outcome = sfumato("tune-sampler", student, "--steps", "2", "--prompts", "prompts.txt", *few)
    assert outcome.code == 2 and "nothing to compare" in outcome.err

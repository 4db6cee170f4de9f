"""`sfumato doctor`: of the machine alone, and of a run."""

import shutil
from pathlib import Path

import pytest
from commands import Command, told

MACHINE = ["python", "torch", "device", "bf16", "torchvision", "disk", "compiler"]
MODEL = ["weights", "prompt against none", "embeddings", "guidance"]


def test_the_machine(sfumato: Command) -> None:
    outcome = sfumato("doctor")
    assert outcome.code == 0 and outcome.err == ""
    for name in MACHINE:
        assert name in outcome.out
    as_json = sfumato("doctor", "--json").data
    assert [one["name"] for one in as_json["findings"]] == MACHINE and as_json["ok"] is True
    assert all(set(one) == {"name", "state", "seen", "advice"} for one in as_json["findings"])


def test_a_run(sfumato: Command, tiny_run: Path) -> None:
    outcome = sfumato("doctor", tiny_run, "--per-task", "1", "--device", "cpu", "--json")
    assert outcome.code == 1, outcome.err
    assert [one["name"] for one in outcome.data["findings"]] == MACHINE + MODEL
    assert outcome.data["ok"] is False  # a model of twenty steps does not listen yet
    assert "draws some pictures" in outcome.err


def test_what_to_change_is_said(sfumato: Command, tiny_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sfumato import doctor

    finding = doctor.Finding("guidance", "warning", "0.10 [at] 1", "sampling.guidance=[2] follows prompts better")
    monkeypatch.setattr(doctor, "_guidance", lambda pipeline, per_task: finding)
    outcome = sfumato("doctor", tiny_run, "--device", "cpu")
    assert "! guidance  0.10 [at] 1\n    sampling.guidance=[2] follows prompts better\n" in outcome.out
    assert "✗ prompt against none" in outcome.out and "the prompt is ignored: train longer" in outcome.out


def test_runs_that_cannot_be_examined(sfumato: Command, tiny_run: Path, tmp_path: Path) -> None:
    told(sfumato("doctor", "runs/nope"), 4, "no such run or model", "where  runs/nope")
    (tmp_path / "folder").mkdir()
    told(sfumato("doctor", "folder"), 4, "no model directory", "where  folder")
    shutil.copytree(tiny_run / "model", tmp_path / "alone")
    outcome = sfumato("doctor", "alone", "--device", "cpu")
    assert (outcome.code, outcome.out) == (4, "")
    assert "does not tell its data" in outcome.err and "the folder with config.yaml" in outcome.err


def test_a_fault_is_told_by_the_exit_code(sfumato: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    from sfumato import doctor

    for state, code in (("fault", 1), ("warning", 0)):
        monkeypatch.setattr(doctor, "environment", lambda folder, state=state: [doctor.Finding("disk", state, "none")])
        assert sfumato("doctor").code == code
        outcome = sfumato("doctor", "--json")
        assert outcome.code == code and outcome.data["ok"] is (code == 0)

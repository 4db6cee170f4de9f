"""The folder of a run: what may begin in it, who may write into it, and what a user is told, with which exit code."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from runs import bytes_of, damage, stopped

from sfumato import files
from sfumato.cli import main
from sfumato.config import Config
from sfumato.errors import ConfigError, MachineError, MemoryShortage
from sfumato.overlay import as_yaml, from_resolved, resolved
from sfumato.train import checkpoint, train
from sfumato.train.step import Stepper

Small = Callable[..., Config]


def test_too_little_room_is_told_before_the_first_step(
    small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "free_space", lambda path: 200_000)
    with pytest.raises(MachineError, match="no room for a checkpoint") as caught:
        train(small(), run=tmp_path / "run")
    assert "0 MiB free" in str(caught.value)


def test_a_run_that_exists_is_not_trained_over(small: Small, tmp_path: Path) -> None:
    stopped(small(), tmp_path / "run", 1)
    before = bytes_of(tmp_path)
    with pytest.raises(ConfigError, match="this run exists already") as caught:
        train(small(), run=tmp_path / "run")
    assert "--resume" in str(caught.value) and bytes_of(tmp_path) == before


@pytest.mark.parametrize("name", ["model", "thesis.odt", "config.yaml"])
def test_a_folder_with_other_things_is_left_alone(small: Small, tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("years of work")
    with pytest.raises(ConfigError, match="holds other things") as caught:
        train(small(), run=tmp_path)
    assert name in str(caught.value) and bytes_of(tmp_path) == {name: b"years of work"}


def test_what_a_run_left_before_its_first_checkpoint_does_not_hinder_another(
    small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(self: Stepper, batches: Any, step: int, updates: int) -> Any:
        raise RuntimeError("a bug")

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="a bug"):
        patch.setattr(Stepper, "gradients", broken)
        train(small(), run=tmp_path / "run")
    (tmp_path / "run/checkpoints").mkdir()
    (tmp_path / "run/checkpoints/.step-00000006.0123abcd").mkdir()  # killed within its first save
    with pytest.raises(ConfigError, match="no run to resume") as caught:
        train(small(), run=tmp_path / "run", resume=True)
    assert f"sfumato train {tmp_path / 'run/config.yaml'} --run {tmp_path / 'run'}" in str(caught.value)
    train(small("steps=1"), run=tmp_path / "run")
    assert [path.name for path in (tmp_path / "run/checkpoints").iterdir()] == ["step-00000001"]


def test_what_cannot_be_a_run(small: Small, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no run to resume"):
        train(small(), run=tmp_path / "none", resume=True)
    assert not (tmp_path / "none").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="a run is a folder"):
        train(small(), run=tmp_path / "file")
    with pytest.raises(MachineError, match="cannot write here"):
        train(small(), run=tmp_path / "file/run")
    for steps in (0, -1):
        with pytest.raises(ConfigError, match="one step at least"):
            train(small(), run=tmp_path / "run", stop_after=steps)


@pytest.mark.parametrize("change", ["model.net.dim=32", "model.prediction=x0", "optim={kind: adamw}"])
def test_another_model_or_optimizer_is_another_run(small: Small, tmp_path: Path, change: str) -> None:
    stopped(small(), tmp_path / "run", 1)
    before = bytes_of(tmp_path / "run")
    with pytest.raises(ConfigError, match="cannot go on with another"):
        train(small(change), run=tmp_path / "run", resume=True)
    assert bytes_of(tmp_path / "run") == before


def test_a_second_trainer_touches_nothing(small: Small, tmp_path: Path) -> None:
    run = tmp_path / "run"
    stopped(small(), run, 3)
    with files.lock(run):
        before = bytes_of(run)
        with pytest.raises(ConfigError, match="another process is training") as caught:
            train(small(), run=run, resume=True)
        assert bytes_of(run) == before and f"process {os.getpid()}" in str(caught.value)
    stopped(small(), run, 1, resume=True)


def test_a_smaller_memory_is_explained(small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for error in (
        torch.OutOfMemoryError("CUDA out of memory"),
        MemoryError(),
        RuntimeError("can't allocate memory: 9 bytes"),
    ):

        def short(self: Stepper, batches: Any, step: int, updates: int, error: BaseException = error) -> Any:
            raise error

        monkeypatch.setattr(Stepper, "gradients", short)
        with pytest.raises(MemoryShortage, match="batch=2 accumulate=2") as caught:
            train(small(), run=tmp_path / "run")
        assert caught.value.exit_code == 5


def test_the_command_line_says_it_with_its_exit_code(
    small: Small, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "c.yaml").write_text(as_yaml(resolved(small())))
    run = str(tmp_path / "run")
    assert code("train", str(tmp_path / "c.yaml"), "--run", run, "--stop-after", "2") == 6
    assert f"sfumato train --resume {run}" in capsys.readouterr().err
    assert code("train", str(tmp_path / "c.yaml"), "--run", run) == 2
    assert code("train", "--resume", run, "optim.kind=adamw", "optim.options={}") == 2
    assert code("train", "--resume", run, "steps=3") == 0
    assert from_resolved(yaml.safe_load((tmp_path / "run/config.yaml").read_text()), "run").steps == 3
    for path in checkpoint.found(tmp_path / "run/checkpoints"):
        damage(path / "state.json", "flip")
    assert code("train", "--resume", run) == 4


def code(*words: str) -> int:
    try:
        main(list(words))
    except SystemExit as end:
        return int(end.code or 0)
    return 0

"""Resuming: N steps, a stop, and N more are 2N steps, to the last bit of everything that a run keeps."""

import json
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image as Pillow
from runs import bytes_of, damage, kept, rows_of, stopped

from sfumato.config import Config
from sfumato.errors import CheckpointError, Interrupted, MachineError
from sfumato.io.directory import load_model
from sfumato.overlay import as_yaml, resolved
from sfumato.prompts import Prompts
from sfumato.train import checkpoint, train
from sfumato.train.run import Run
from sfumato.train.step import Stepper

Small = Callable[..., Config]
# Everything at once that could be forgotten: several averages, micro-batches, dropout, rows of metrics that are due
# at other steps than checkpoints, a held-out set, a decaying rate.
EVERYTHING = (
    "model.net.dropout=0.2",
    "condition_dropout=0.5",
    "accumulate=2",
    "batch=2",
    "ema=[{decay: 0.9}, {decay: 0.5, warmup: false}]",
    "validate={every: 4, batches: 2, holdout: 8}",
    "log.every=5",
    "optim.decay=cosine",
    "objective.times=logit_normal",
)


@pytest.mark.parametrize("how", ["optim.kind=adamw", "optim.kind=muon", "precision=bf16", "precision=fp16"])
def test_a_resumed_run_is_the_same_to_the_last_bit(small: Small, tmp_path: Path, how: str) -> None:
    config = small(*EVERYTHING, how, *(["optim.options={}"] if how == "optim.kind=adamw" else []))
    train(config, run=tmp_path / "whole")
    stopped(config, tmp_path / "parts", 7)
    torch.rand(5)  # the global generator is nobody's state
    stopped(config.model_copy(update={"workers": 0}), tmp_path / "parts", 1, resume=True)
    train(config, run=tmp_path / "parts", resume=True)
    whole, parts = kept(tmp_path / "whole"), kept(tmp_path / "parts")
    names = {name for name in whole if not name.startswith("checkpoints/step-00000006/")}  # the parts have 8 instead
    assert {"checkpoints/step-00000012/optim.safetensors", "checkpoints/step-00000012/ema-1.safetensors"} <= names
    assert {"metrics.jsonl", "config.yaml", "model/model.safetensors", "model-1/model.safetensors"} <= names
    assert [name for name in sorted(names) if whole[name] != parts.get(name)] == []
    assert len(whole["metrics.jsonl"].splitlines()) == 6  # losses at 5, 10 and 12; validation at 4, 8 and 12


def test_every_average_has_a_model_directory(small: Small, tmp_path: Path) -> None:
    config = small("steps=3", "ema=[{decay: 0.9}, {decay: 0.5, warmup: false}]")
    train(config, run=tmp_path / "run")
    _, state = checkpoint.newest(tmp_path / "run/checkpoints", print)
    for i, folder in enumerate(["model", "model-1"]):
        model = load_model(tmp_path / "run" / folder)
        assert model.facts["ema"] == {"decay": (0.9, 0.5)[i], "warmup": i == 0}
        for name, value in state.tensors[f"ema-{i}"].items():
            assert torch.equal(model.weights()[name], value)
    first, second = state.tensors["ema-0"], state.tensors["ema-1"]
    assert any(not torch.equal(first[name], second[name]) for name in first)


def test_an_average_that_is_added_later_begins_with_the_weights(
    start: Callable[..., Run], small: Small, tmp_path: Path
) -> None:
    stopped(small(), tmp_path / "run", 3)
    run = start("ema=[{decay: 0.9}, {decay: 0.99}]", resume=True)
    state = run.averages[1].state()
    assert all(torch.equal(state[name], p) for name, p in run.weights.items())
    assert any(not torch.equal(run.averages[0].state()[name], p) for name, p in run.weights.items())


@pytest.mark.parametrize("harm", ["flip", "cut", "lose"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(
    small: Small, tmp_path: Path, harm: str, capsys: pytest.CaptureFixture[str]
) -> None:
    config, run = small("checkpoint.every=2"), tmp_path / "run"
    stopped(config, run, 6)
    damage(run / "checkpoints/step-00000006/ema-0.safetensors", harm)
    stopped(config, run, 1, resume=True)
    said = capsys.readouterr().err
    assert "step-00000006 is not used" in said and "ema-0.safetensors" in said and "resumed from step-00000004" in said
    assert (run / "log.txt").read_text().count("step-00000006 is not used") == 1
    # What is newer than the step that was saved stays until it is written anew, and takes nobody's place.
    names = [path.name for path in checkpoint.found(run / "checkpoints")]
    assert names == ["step-00000006", "step-00000005", "step-00000004"]
    train(config, run=run, resume=True)
    train(config, run=tmp_path / "whole")
    assert kept(run)["metrics.jsonl"] == kept(tmp_path / "whole")["metrics.jsonl"]
    assert kept(run)["model/model.safetensors"] == kept(tmp_path / "whole")["model/model.safetensors"]


def test_without_a_whole_checkpoint_nothing_begins_anew(
    small: Small, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, run = small("checkpoint.every=2"), tmp_path / "run"
    stopped(config, run, 4)
    for path in checkpoint.found(run / "checkpoints"):
        damage(path / "model.safetensors", "flip")
    before = bytes_of(run)
    with pytest.raises(CheckpointError, match="nothing whole to resume from") as caught:
        train(config, run=run, resume=True)
    assert caught.value.exit_code == 4 and all(
        f"step-0000000{step} is not used" in str(caught.value) for step in (4, 2)
    )
    assert bytes_of(run) == before


def test_sigterm_saves_and_says_how_to_go_on(small: Small, tmp_path: Path) -> None:
    config, run = small("steps=100000", "log.every=1", "checkpoint.every=100000"), tmp_path / "a run"
    (tmp_path / "config.yaml").write_text(as_yaml(resolved(config)))
    command = [sys.executable, "-m", "sfumato", "train", str(tmp_path / "config.yaml"), "--run", str(run)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 200
        while time.monotonic() < deadline and process.poll() is None and not rows_of(run):
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        process.send_signal(signal.SIGTERM)  # as impatient systems do
        _, said = process.communicate(timeout=100)
    assert process.returncode == 6, said
    assert f"sfumato train --resume {shlex.quote(str(run))}" in said and "stopping after this step" in said
    (newest,) = checkpoint.found(run / "checkpoints")
    step = json.loads((newest / "state.json").read_text())["step"]
    assert rows_of(run)[-1]["step"] == step
    stopped(config, tmp_path / "here", step)  # the same steps in this process
    stopped(config, run, 2, resume=True)
    stopped(config, tmp_path / "here", 2, resume=True)
    assert kept(run) == kept(tmp_path / "here")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_lets_the_step_finish(
    small: Small, tmp_path: Path, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def struck(self: Stepper, batches: Any, step: int, updates: int) -> Any:
        if step == 2:
            os.kill(os.getpid(), number)
        return gradients(self, batches, step, updates)

    gradients, handler = Stepper.gradients, signal.getsignal(number)
    monkeypatch.setattr(Stepper, "gradients", struck)
    with pytest.raises(Interrupted, match="step 3 of 12"):
        train(small(), run=tmp_path / "run")
    assert [path.name for path in checkpoint.found(tmp_path / "run/checkpoints")] == ["step-00000003"]
    assert signal.getsignal(number) is handler


def test_a_second_ctrl_c_stops_at_once(small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def struck(self: Stepper, batches: Any, step: int, updates: int) -> Any:
        if step == 2:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
        return gradients(self, batches, step, updates)

    gradients = Stepper.gradients
    monkeypatch.setattr(Stepper, "gradients", struck)
    with pytest.raises(KeyboardInterrupt):
        train(small("checkpoint.every=1"), run=tmp_path / "run")
    assert [path.name for path in checkpoint.found(tmp_path / "run/checkpoints")] == ["step-00000002", "step-00000001"]


def test_it_trains_outside_the_main_thread(small: Small, tmp_path: Path) -> None:
    thread = threading.Thread(target=train, args=(small("steps=1"),), kwargs={"run": tmp_path / "run"})
    thread.start()
    thread.join()
    assert (tmp_path / "run/model/model.json").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="forks")
@pytest.mark.parametrize("call", [("fsync", 3), ("fsync", 9), ("rename", 1), ("rename", 2), ("replace", 3)])
def test_killed_at_any_moment_it_goes_on(small: Small, tmp_path: Path, call: tuple[str, int]) -> None:
    """A process that dies within its second save, as by kill -9: no handler runs, nothing is tidied up."""
    config, run = small("steps=6", "checkpoint.every=2"), tmp_path / "run"
    child = os.fork()
    if child == 0:
        die_in_save(call, config, run)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 137
    train(config, run=run, resume=True)
    train(config, run=tmp_path / "whole")
    assert kept(run) == kept(tmp_path / "whole")  # the same files, and no half-written ones beside them


def die_in_save(call: tuple[str, int], config: Config, run: Path) -> None:
    """In the child: ends it at some call of the system during the save of step 4."""
    name, left = call
    real, save = getattr(os, name), checkpoint.save

    def counted(*args: Any, **options: Any) -> Any:
        nonlocal left
        left -= 1
        if left == 0:
            os._exit(137)
        return real(*args, **options)

    def watched(folder: Path, step: int, *rest: Any) -> Path:
        if step == 4:
            setattr(os, name, counted)
        return save(folder, step, *rest)

    checkpoint.save = watched  # type: ignore[assignment]
    try:
        train(config, run=run)
    finally:
        os._exit(1)


def test_a_full_disk_leaves_what_was_saved(
    small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config, run = small("checkpoint.every=4"), tmp_path / "run"
    stopped(config, run, 4)
    before = bytes_of(run / "checkpoints")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(MachineError, match="the disk is full") as caught:
        patch.setattr(checkpoint, "save", lambda *args: (patch.setattr(os, "fsync", full), SAVE(*args)))
        train(config, run=run, resume=True)
    assert caught.value.exit_code == 3 and "--resume" in str(caught.value)
    assert bytes_of(run / "checkpoints") == before
    train(config, run=run, resume=True)
    train(config, run=tmp_path / "whole")
    assert kept(run) == kept(tmp_path / "whole")


SAVE = checkpoint.save


def test_a_run_killed_between_its_last_checkpoint_and_its_model_makes_the_model(small: Small, tmp_path: Path) -> None:
    config, run = small("steps=2"), tmp_path / "run"
    train(config, run=run)
    before = bytes_of(run)
    (run / "model/model.safetensors").unlink()
    assert train(config, run=run, resume=True) == run / "model"
    after = bytes_of(run)
    assert all(after[name] == before[name] for name in before if name.startswith(("model/", "checkpoints/", "metrics")))


def test_the_words_are_those_of_the_checkpoint(small: Small, tmp_path: Path) -> None:
    """A folder that has gained captions must not renumber the words that were learned."""

    def add(name: str, caption: str) -> None:
        Pillow.new("RGB", (32, 32), "red").save(tmp_path / f"pictures/{name}.png")
        (tmp_path / f"pictures/{name}.txt").write_text(caption)

    (tmp_path / "pictures").mkdir()
    for i in range(4):
        add(str(i), "a red square")
    config = small(f"data={{kind: folder, path: {tmp_path / 'pictures'}}}")
    stopped(config, tmp_path / "run", 1)
    words = load_model(tmp_path / "run/model").conditioner
    add("4", "an apple, before all other words")
    stopped(config, tmp_path / "run", 1, resume=True)
    after = load_model(tmp_path / "run/model").conditioner
    assert isinstance(words, Prompts) and isinstance(after, Prompts)
    assert after.words == words.words and {"a", "red", "square"} < words.words.keys() and "apple" not in words.words


def test_other_numerics_are_told(
    small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stopped(small(), tmp_path / "run", 1)
    stopped(small(), tmp_path / "run", 1, resume=True)
    assert "bit for bit" not in capsys.readouterr().err
    monkeypatch.setattr(torch, "get_num_threads", lambda: 64)
    stopped(small(), tmp_path / "run", 1, resume=True)
    assert "not bit for bit: threads was 1, is 64" in capsys.readouterr().err

"""What training took is kept beside the run: each time that it was begun, and on which machine."""

import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from runs import stopped

from sfumato.config import Config
from sfumato.data.scenes import Scenes
from sfumato.train import train
from sfumato.train.timing import FILE, machine, timing


def test_a_run_knows_what_it_took(
    small: Callable[..., Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Waiting for data counts, and so does every part of a run that was stopped."""
    plain, run, slow = Scenes.batch, tmp_path / "run", [0.0]

    def batch(self: Scenes, indices: list[int]) -> object:
        time.sleep(slow[0])
        return plain(self, indices)

    monkeypatch.setattr(Scenes, "batch", batch)
    config, started = small("checkpoint.every=2", "steps=6"), time.perf_counter()
    assert timing(run) == []
    stopped(config, run, 4)
    (first,) = timing(run)
    assert (first["from"], first["to"], first["precision"]) == (0, 4, "fp32")
    assert first["machine"] == machine(torch.device("cpu")) and first["threads"] == torch.get_num_threads()
    assert 0 < first["seconds"] <= time.perf_counter() - started + 0.1
    slow[0] = 0.5
    train(config, run=run, resume=True)
    before, last = timing(run)
    assert before == first and (last["from"], last["to"]) == (4, 6) and last["seconds"] >= 0.9
    train(config, run=run, resume=True)  # at its end: nothing more is taken
    assert timing(run) == [first, last]


def test_a_file_that_is_none_tells_nothing(tmp_path: Path) -> None:
    for said in ("", "{", json.dumps({"seconds": 3})):
        (tmp_path / FILE).write_text(said)
        assert timing(tmp_path) == []


def test_a_machine_without_a_gpu_has_none() -> None:
    found = machine(torch.device("cpu"))
    assert found["gpu"] is None and found["cores"] >= 1 and found["torch"] == torch.__version__
    assert (machine()["gpu"] is None) == (not torch.cuda.is_available())

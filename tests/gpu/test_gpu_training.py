"""Training on a device: every method of distillation, every precision, compiled, stopped and resumed."""

import json
from pathlib import Path

import pytest
import torch

from sfumato import load
from sfumato.errors import Interrupted
from sfumato.overlay import load_config, recipes
from sfumato.train import train

SHORT = (
    "steps=3",
    "batch=8",
    "device=cuda",
    "optim.warmup=1",
    "samples.every=0",
    "validate.every=3",
    "validate.holdout=16",
)
SHORT += ("checkpoint.every=3", "log.every=1")


def methods() -> list[str]:
    found = []
    for one in recipes():
        config = load_config(one.name).config
        if config.method is not None and config.data is not None and config.data["kind"] == "scenes":
            found.append(one.name)
    return found


def losses(run: Path) -> list[float]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if "loss" in row]


@pytest.mark.parametrize("method", methods())
def test_every_method_teaches_in_bfloat16(method: str, gpu_teacher: Path, tmp_path: Path) -> None:
    config = load_config(method).config
    more = [f"teacher={gpu_teacher}"] if config.teacher is not None else []
    more += [f"start={gpu_teacher}"] if config.start is not None else []
    if config.teacher is None and config.start is None:
        more += ["model.net={kind: dit, size: 32, patch: 8, dim: 32, depth: 2, heads: 2, skips: false}"]
        more += ["model.conditioner={kind: prompts, dim: 32, depth: 1, heads: 2, length: 12}"]
    more += ["pairs.count=32", "pairs.steps=2"] if config.pairs is not None else []
    more += ["objective.warmup=1"] if "warmup" in config.objective else []
    train(load_config(method, [*SHORT, "precision=bf16", *more]).config, run=tmp_path / "run")
    found = losses(tmp_path / "run")
    assert len(found) == 3 and all(torch.tensor(found).isfinite())
    pipeline = load(tmp_path / "run", "cuda")
    assert pipeline.sample("a red circle", seeds=1, steps=1).images[0].shape == (32, 32, 3)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_every_precision_trains(precision: str, tmp_path: Path) -> None:
    train(load_config("tiny", [*SHORT, f"precision={precision}"]).config, run=tmp_path / "run")
    assert len(losses(tmp_path / "run")) >= (1 if precision == "fp16" else 3)  # a scaler skips its first steps


def test_losses_are_those_of_the_cpu(tmp_path: Path) -> None:
    """The same noise, times and pictures on both: the first loss is equal to rounding, later ones near."""
    for device in ("cuda", "cpu"):
        train(load_config("tiny", [*SHORT, "precision=fp32", f"device={device}"]).config, run=tmp_path / device)
    there, here = losses(tmp_path / "cuda"), losses(tmp_path / "cpu")
    assert there[0] == pytest.approx(here[0], rel=1e-4) and there == pytest.approx(here, rel=1e-2)


def test_a_stopped_run_goes_on(tmp_path: Path) -> None:
    config = load_config("tiny", [*SHORT, "steps=6"]).config
    train(config, run=tmp_path / "whole")
    with pytest.raises(Interrupted):
        train(config, run=tmp_path / "parts", stop_after=3)
    train(config, run=tmp_path / "parts", resume=True)
    assert losses(tmp_path / "parts") == pytest.approx(losses(tmp_path / "whole"), rel=1e-3)


def test_compiled_training(tmp_path: Path) -> None:
    for name, compiled in (("plain", "false"), ("fast", "true")):
        train(load_config("tiny", [*SHORT, "precision=bf16", f"compile={compiled}"]).config, run=tmp_path / name)
    assert losses(tmp_path / "fast") == pytest.approx(losses(tmp_path / "plain"), rel=0.05)


@pytest.mark.parametrize("start", [0, 5])
def test_an_autoencoder_before_and_with_its_discriminator(start: int, tmp_path: Path) -> None:
    train(load_config("autoencoder-scenes", [*SHORT, f"objective.start={start}"]).config, run=tmp_path / "run")
    found = losses(tmp_path / "run")
    assert len(found) == 3 and all(torch.tensor(found).isfinite())

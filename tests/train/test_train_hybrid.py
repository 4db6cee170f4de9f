"""A variance that is learned with the mean, in whole runs: it moves, it resumes, it is drawn with."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from runs import kept, rows_of, stopped

from sfumato import load
from sfumato.config import Config
from sfumato.errors import ConfigError
from sfumato.io.directory import load_model
from sfumato.io.published import load_published, save_file
from sfumato.train import train

HYBRID = (
    "model.path={kind: tabulated, betas: cosine, steps: 20}",
    "model.prediction=eps",
    "model.time_input=index",
    "model.conditioner=null",
    "model.answers=[x0, x0_variance]",
    "model.net={kind: pixel_unet, channels: [8, 16], blocks: 1, heads: [0, 1], middle: 1, groups: 4}",
    "model.net.modulation=scale",
    "objective={kind: hybrid, scale: 1.0}",
    "condition_dropout=0",
    "sampling={sampler: {kind: ddpm, variance: learned, clip: 1.0}, grid: trailing, steps: 20, guidance: 1.0}",
)
Small = Callable[..., Config]


def test_the_bound_falls_and_the_model_draws_with_its_variance(small: Small, tmp_path: Path) -> None:
    config = small(
        *HYBRID, "steps=60", "batch=8", "checkpoint.every=60", "validate={every: 60, batches: 2, holdout: 20}"
    )
    train(config, run=tmp_path / "run")
    rows = [row for row in rows_of(tmp_path / "run") if "bound" in row]
    first, last = (sum(row["bound"] for row in part) / 15 for part in (rows[:15], rows[-15:]))
    assert len(rows) == 60 and last < 0.7 * first and all({"simple", "bound"} <= row.keys() for row in rows)
    model = load_model(tmp_path / "run/model")
    assert model.answers == ("x0", "x0_variance") and model.net.config.out_channels == 6
    x, t = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)), torch.tensor([0.3, 0.9])
    share = model.denoiser.outputs(x, t)[1]
    assert float(share.abs().mean()) > 0.02  # a fresh network says 0 everywhere
    pipeline = load(tmp_path / "run", "cpu")
    drawn, plain = (
        pipeline.sample(sampler=sampler, seeds=3).images for sampler in (None, {"kind": "ddpm", "clip": 1.0})
    )
    assert drawn.shape == (1, 32, 32, 3) and (drawn != plain).any()


def test_a_resumed_run_is_the_same_to_the_last_bit(small: Small, tmp_path: Path) -> None:
    config = small(*HYBRID, "steps=6", "checkpoint.every=3")
    train(config, run=tmp_path / "whole")
    stopped(config, tmp_path / "parts", 3)
    train(config, run=tmp_path / "parts", resume=True)
    assert kept(tmp_path / "whole") == kept(tmp_path / "parts")


def test_what_was_trained_goes_to_the_original_file_and_back(small: Small, tmp_path: Path) -> None:
    """The layout of ADM, with six channels."""
    wide = "model.net={kind: pixel_unet, channels: [64], blocks: 1, heads: [1], middle: 1}"
    train(small(*HYBRID, wide, "model.path.steps=1000", "steps=2"), run=tmp_path / "run")
    model = load_model(tmp_path / "run/model")
    save_file(tmp_path / "adm.safetensors", model)
    back = load_published(tmp_path / "adm.safetensors")
    assert back.answers == model.answers
    assert all(torch.equal(value, model.weights()[name]) for name, value in back.weights().items())


def test_a_network_without_a_variance_is_named(small: Small, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="teaches a variance"):
        train(small("objective={kind: hybrid}"), run=tmp_path / "run")

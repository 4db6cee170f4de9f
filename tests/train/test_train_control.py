"""Training a ControlNet of a model: it begins as nothing, alone learns, and can be used with the model it is of."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from runs import kept, rows_of, stopped

from sfumato import load
from sfumato.config import Config
from sfumato.data.scenes import Scenes
from sfumato.errors import ConfigError
from sfumato.io.directory import load_model
from sfumato.io.families.controlnet import read_control
from sfumato.nets.controlled import Controlled
from sfumato.nets.controlnet import ControlNet
from sfumato.nets.stable_unet import StableUNet
from sfumato.overlay import as_yaml, load_config, resolved
from sfumato.plan import plan
from sfumato.train import train

Small = Callable[..., Config]
UNET = (
    "model.net={kind: stable_unet, size: 32, in_channels: 3, out_channels: 3, channels: [8, 16], blocks: 1, "
    "depths: [0, 1], heads: [2, 2], groups: 4, linear: true}"
)
DATA = "data={kind: scenes, size: 32, seed: 7, count: 200, layout: places}"
ON = (DATA, "optim={lr: 0.02, warmup: 0}", "control={field: layout}", "steps=4", "checkpoint.every=2")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a few steps of a U-Net of Stable Diffusion's kind, on pixels."""
    from tests.train.conftest import small

    folder = tmp_path_factory.mktemp("base") / "run"
    train(small("steps=3", "checkpoint.every=3", UNET), run=folder)
    return folder


def controlled(base: Path, *overrides: str) -> Config:
    from tests.train.conftest import SMALL

    raw = dict(resolved(load_config(str(SMALL)).config), name="control", model=None)
    del raw["sampling"]
    file = base.parent / "control.yaml"
    file.write_text(as_yaml(raw))
    return load_config(str(file), (f"start={base}", *ON, *overrides)).config


def test_only_the_control_learns_and_it_is_used_with_the_model(base: Path, tmp_path: Path) -> None:
    before = load_model(base / "model")
    train(controlled(base), run=tmp_path / "run")
    after = load_model(tmp_path / "run/model")
    assert isinstance(before.net, StableUNet) and isinstance(after.net, Controlled)
    for name, value in before.net.state_dict().items():
        assert torch.equal(after.net.net.state_dict()[name], value), name
    words = before.conditioner.state_dict()  # type: ignore[union-attr]
    for name, value in words.items():
        assert torch.equal(after.conditioner.parts[0].state_dict()[name], value), name  # type: ignore[union-attr,index]
    control = after.net.controls[0]
    assert isinstance(control, ControlNet) and control.config.hint == (16,)
    assert any(float(leave.weight.detach().abs().max()) > 1e-4 for leave in control.leave)  # type: ignore[union-attr,operator]
    assert not torch.equal(control.entry.weight, before.net.entry.weight)
    assert after.facts["control"]["field"] == "layout" and after.facts["start"] == str(base)
    layout = Scenes(size=32, layout="places")[3].fields["layout"]
    own = load(tmp_path / "run", "cpu").sample({"caption": "a circle", "layout": layout}, steps=3).images
    beside = load(base, "cpu").sample("a circle", control={str(tmp_path / "run"): layout}, steps=3)
    plain = load(base, "cpu").sample("a circle", steps=3).images
    assert np.abs(own.astype(int) - beside.images).max() <= 1 and (own != plain).any()
    assert all(np.isfinite(row["loss"]) for row in rows_of(tmp_path / "run") if "loss" in row)


def test_a_fresh_control_says_nothing(base: Path, tmp_path: Path) -> None:
    """With a learning rate of next to nothing the model draws as before, whatever the picture."""
    train(controlled(base, "optim.lr=1.0e-12", "optim.kind=adamw"), run=tmp_path / "run")
    layout = Scenes(size=32, layout="places")[3].fields["layout"]
    own = load(tmp_path / "run", "cpu").sample({"caption": "a circle", "layout": layout}, steps=3).images
    plain = load(base, "cpu").sample("a circle", steps=3).images
    assert np.abs(own.astype(int) - plain).max() <= 1


@pytest.mark.parametrize("written", [True, False])
def test_a_resumed_run_is_the_same_to_the_last_bit(base: Path, tmp_path: Path, written: bool) -> None:
    """Also with pictures drawn and validated on the way, by what the run wrote down or by what it was begun with."""
    config = controlled(base, "samples={every: 4, count: 2}", "validate={every: 4, batches: 1, holdout: 8}")
    train(config, run=tmp_path / "whole")
    stopped(config, tmp_path / "parts", 2)
    again = load_config(str(tmp_path / "parts/config.yaml")).config if written else config
    train(again, run=tmp_path / "parts", resume=True)
    assert kept(tmp_path / "whole") == kept(tmp_path / "parts")


def test_a_control_is_trained_further(base: Path, tmp_path: Path) -> None:
    train(controlled(base), run=tmp_path / "first")
    more = controlled(base, f"control.weights={tmp_path / 'first'}", "optim.lr=1.0e-12", "optim.kind=adamw")
    train(more, run=tmp_path / "second")
    one, two = (read_control(tmp_path / name).state_dict() for name in ("first", "second"))
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=0, atol=1e-6)


def test_it_can_be_planned(base: Path) -> None:
    told = plan(controlled(base))
    net = load_model(base / "model").net
    assert isinstance(net, StableUNet)
    learns = sum(p.numel() for p in ControlNet.of(net, hint=(16,)).parameters())
    assert told.parameters == learns and told.frozen > learns


def test_what_cannot_be_is_named(base: Path, tmp_path: Path, tiny_run: Path) -> None:
    for words, said in (
        (("start=null",), "none is named"),
        (("lora={rank: 2}",), "trained alone"),
    ):
        with pytest.raises(ConfigError, match=said):
            controlled(base, *words)
    with pytest.raises(ConfigError, match="halves the picture"):
        train(controlled(base, "control.hint=[4, 8]"), run=tmp_path / "a")
    with pytest.raises(ConfigError, match="MMDiTs and FLUX transformers"):
        train(controlled(base, f"start={tiny_run}"), run=tmp_path / "b")


TRANSFORMERS = {
    "mmdit": ("model.net={kind: mmdit, size: 32, patch: 8, dim: 16, depth: 4, heads: 2}", "control.blocks=[2]"),
    "flux": (
        "model.net={kind: flux, size: 32, patch: 8, dim: 16, double: 2, single: 3, heads: 2}",
        "control.blocks=[1, 2]",
    ),
}


@pytest.mark.parametrize("kind", TRANSFORMERS)
def test_controls_of_transformers_are_trained_and_used_alike(kind: str, tmp_path: Path) -> None:
    from tests.train.conftest import small

    net, blocks = TRANSFORMERS[kind]
    base = tmp_path / "base"
    train(small("steps=3", "checkpoint.every=3", net), run=base)
    config = controlled(base, blocks)
    assert plan(config).frozen > plan(config).parameters > 0
    train(config, run=tmp_path / "run")
    stopped(config, tmp_path / "parts", 2)
    train(load_config(str(tmp_path / "parts/config.yaml")).config, run=tmp_path / "parts", resume=True)
    assert kept(tmp_path / "run") == kept(tmp_path / "parts")
    before, after = load_model(base / "model"), load_model(tmp_path / "run/model")
    assert isinstance(after.net, Controlled)
    own = after.net.net.state_dict()
    assert all(torch.equal(own[name], value) for name, value in before.net.state_dict().items())
    control = after.net.controls[0]
    assert len(control.leave) == (2 if kind == "mmdit" else 3)  # type: ignore[arg-type]
    assert any(float(leave.weight.detach().abs().max()) > 1e-5 for leave in control.leave)  # type: ignore[union-attr,operator]
    layout = Scenes(size=32, layout="places")[3].fields["layout"]
    inside = load(tmp_path / "run", "cpu").sample({"caption": "a circle", "layout": layout}, steps=3).images
    beside = load(base, "cpu").sample("a circle", control={str(tmp_path / "run"): layout}, steps=3)
    plain = load(base, "cpu").sample("a circle", steps=3).images
    assert np.abs(inside.astype(int) - beside.images).max() <= 1 and (inside != plain).any()
    fresh = controlled(base, blocks, "optim.lr=1.0e-12", "optim.kind=adamw")
    train(fresh, run=tmp_path / "fresh")
    silent = load(tmp_path / "fresh", "cpu").sample({"caption": "a circle", "layout": layout}, steps=3).images
    assert np.abs(silent.astype(int) - plain).max() <= 1

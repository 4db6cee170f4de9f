"""A class-conditional DiT made over into PixArt-alpha's network: it begins as what it was, and then learns words."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import kept, stopped

from sfumato.config import Config
from sfumato.errors import ConfigError
from sfumato.io.directory import load_model
from sfumato.model import build_model
from sfumato.nets.dit import DiT
from sfumato.overlay import as_yaml, load_config, resolved
from sfumato.train import train
from sfumato.train.reparameterise import reparameterise
from sfumato.train.start import Start

Small = Callable[..., Config]
CLASSES = "model.conditioner=labels"
OLD = "model.net={kind: dit, patch: 8, dim: 16, depth: 2, heads: 2}"
NEW = "model.net={kind: dit, patch: 8, dim: 16, depth: 2, heads: 2, text: cross, adaln: shared}"


def section(net: dict[str, Any], conditioner: Any) -> dict[str, Any]:
    table = {"kind": "tabulated", "betas": "linear", "steps": 1000}
    whole = {"path": table, "prediction": "eps", "time_input": "index", "scale_input": None}
    net = {"kind": "dit", "patch": 4, "dim": 24, "depth": 3, "heads": 2, **net}
    return {**whole, "net": net, "codec": "pixels", "conditioner": conditioner}


def model(net: dict[str, Any], conditioner: Any, seed: int | None = None) -> Any:
    torch.manual_seed(seed or 0)
    made = build_model({"model": section(net, conditioner), "size": [16, 16], "sampling": {}})
    if seed is not None:
        with torch.no_grad():
            for weight in made.net.parameters():
                weight.normal_(0, 0.2)
    return made


def start_of(made: Any) -> Start:
    return Start(made.spec, made.weights(), made.files(), "there")


@pytest.mark.parametrize("local", [False, True])
@pytest.mark.parametrize("time", [0.25, 0.5, 1.0])
def test_at_one_time_the_network_answers_what_the_dit_answered_without_a_class(time: float, local: bool) -> None:
    """To float32's rounding, for any words; at another time it does not, so there is something to be seen."""
    old = model({"local": local}, {"kind": "labels", "classes": 5}, seed=1)
    new = model({"context_dim": 8, "text": "cross", "adaln": "shared", "local": local}, None)
    reparameterise(new, start_of(old), time)
    rng = torch.Generator().manual_seed(0)
    x, words = torch.randn(2, 3, 16, 16, generator=rng), torch.randn(2, 4, 8, generator=rng)
    none = torch.full((2,), 5)

    def distance(t: float) -> float:
        told = torch.full((2,), 1000 * t - 1)  # the index of the table
        with torch.no_grad():
            before, now = old.net(x, told, label=none), new.net(x, told, context=words)
        assert float(before.abs().max()) > 0.1
        return float((now - before).abs().max())

    assert distance(time) < 1e-5 < 1e-2 < distance(time / 2)


def test_the_first_block_keeps_its_modulation_at_every_time() -> None:
    old = model({}, {"kind": "labels", "classes": 5}, seed=1)
    new = model({"context_dim": 8, "text": "cross", "adaln": "shared"}, None)
    weights = start_of(old)
    first = {name: value.clone() for name, value in weights.weights.items() if ".blocks.0.modulation" in name}
    reparameterise(new, weights, 0.5)
    assert torch.equal(new.net.shared[1].weight, first["net.blocks.0.modulation.1.weight"])
    assert not torch.equal(new.net.blocks[0].offset, new.net.blocks[1].offset)


def made_over(base: Path, *overrides: str) -> Config:
    from tests.train.conftest import SMALL

    raw = dict(resolved(load_config(str(SMALL)).config), name="words")
    file = base.parent / "words.yaml"
    file.write_text(as_yaml(raw))
    on = (f"start={base}", "reparameterise={time: 0.5}", NEW, "steps=4", "checkpoint.every=2")
    return load_config(str(file), (*on, *overrides)).config


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.train.conftest import small

    folder = tmp_path_factory.mktemp("classes") / "run"
    train(small("steps=3", "checkpoint.every=3", OLD, CLASSES), run=folder)
    return folder


def test_a_run_begins_with_it_and_goes_on_bit_for_bit(base: Path, tmp_path: Path) -> None:
    config = made_over(base)
    train(config, run=tmp_path / "whole")
    stopped(config, tmp_path / "parts", after=2)
    train(config, run=tmp_path / "parts", resume=True)
    assert kept(tmp_path / "whole") == kept(tmp_path / "parts")
    after = load_model(tmp_path / "whole/model")
    assert isinstance(after.net, DiT) and after.net.shared is not None and after.facts["start"] == str(base)
    before = load_model(base / "model").net.state_dict()
    same = [
        name for name, value in after.net.state_dict().items() if name in before and value.shape == before[name].shape
    ]
    moved = max(float((after.net.state_dict()[name] - before[name]).abs().max()) for name in same)
    assert len(same) > 10 and 0 < moved < 0.2  # four steps from where the DiT was, and not anew


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["model.net.dim=32"], "keeps the old one's shape"),
        (["model.net.adaln=block"], "adaln: shared"),
        (["model.net={kind: unet, channels: [8], blocks: 1, attention: [0], middle: 0}"], "made over into a DiT"),
    ],
)
def test_what_cannot_be_made_over_is_named(base: Path, tmp_path: Path, overrides: list[str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        train(made_over(base, *overrides), run=tmp_path / "run")


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["start=null"], "start is needed"),
        (["lora={rank: 2}"], "without lora"),
        (["reparameterise.time=0"], "more than 0"),
    ],
)
def test_a_configuration_that_says_nothing_of_use_is_refused(base: Path, overrides: list[str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        made_over(base, *overrides)

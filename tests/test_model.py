"""Models: built from a description, the network told of its neighbours, every weight under one name."""

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from sfumato.codecs import Pixels
from sfumato.conditioners import Labels
from sfumato.errors import ConfigError, MachineError
from sfumato.model import build_model, compile_net, pick_device
from sfumato.prompts import Prompts

TOYS = """
from torch import nn

class Folded:
    '''A codec that folds 2x2 pixels into channels.'''
    channels = 12

    def shape(self, height, width):
        return 12, height // 2, width // 2

class Told(nn.Module):
    '''A network that remembers what it was built with.'''
    def __init__(self, size: int = 0, in_channels: int = 0, extra: int = 1):
        super().__init__()
        self.told = {"size": size, "in_channels": in_channels, "extra": extra}
"""


class Captions:
    """A data source with four words."""

    def captions(self) -> Iterator[str]:
        yield "a red circle"
        yield "a blue circle"


@pytest.fixture
def toys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The user's own module in the current directory."""
    (tmp_path / "model_toys.py").write_text(TOYS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "model_toys", raising=False)


def spec(net: Any = None, **model: Any) -> dict[str, Any]:
    net = net or {"kind": "dit", "patch": 4, "dim": 16, "depth": 1, "heads": 2}
    section = {
        "path": {"kind": "linear"},
        "prediction": {"kind": "velocity"},
        "time_input": {"kind": "thousandths"},
        "scale_input": None,
        "net": net,
        "codec": {"kind": "pixels"},
        "conditioner": {"kind": "prompts", "dim": 8, "depth": 1, "heads": 2, "length": 4},
    }
    return {
        "model": section | model,
        "size": [8, 12],
        "sampling": {"sampler": "ddim", "grid": "linear", "steps": 2, "guidance": 2.0},
    }


def test_the_network_is_told_of_prompts_and_pictures() -> None:
    config = build_model(spec(), Captions()).net.config  # type: ignore[union-attr]
    assert (config.size, config.in_channels, config.context_dim, config.pooled_dim, config.classes) == (
        (8, 12),
        3,
        8,
        8,
        0,
    )


def test_the_network_is_told_of_classes() -> None:
    model = build_model(spec(conditioner={"kind": "labels", "classes": 5}))
    assert isinstance(model.conditioner, Labels)
    assert model.net.label.weight.shape == (6, 16)  # type: ignore[union-attr]  # five, and none


def test_the_network_works_on_what_the_codec_makes(toys: None) -> None:
    made = build_model(spec({"kind": "model_toys:Told"}, codec={"kind": "model_toys:Folded"}, conditioner=None))
    assert made.net.told == {"size": (4, 6), "in_channels": 12, "extra": 1}
    assert made.size == (8, 12)


def test_what_a_spec_says_of_its_network_stands(toys: None) -> None:
    net = {"kind": "model_toys:Told", "in_channels": 7, "extra": 3, "size": 99}
    told = build_model(spec(net, conditioner=None)).net.told
    assert told == {"size": (8, 12), "in_channels": 7, "extra": 3}  # but for the size, which the data decides


def test_a_model_answers_with_pictures() -> None:
    model = build_model(spec(), Captions()).eval()
    cond = model.cond([{"caption": "a red circle"}, {}])
    answer = model(torch.randn(2, 3, 8, 12), 0.5, cond)
    assert answer.shape == (2, 3, 8, 12)


def test_a_model_of_a_variance_has_twice_the_channels() -> None:
    """Filled in from what the model is to answer; a plain call is still x0."""
    model = build_model(spec(conditioner=None, answers=["x0", "x0_variance"])).eval()
    assert model.net.config.out_channels == 6 and model.answers == ("x0", "x0_variance")  # type: ignore[union-attr]
    x = torch.randn(2, 3, 8, 12)
    both = model(x, 0.5, to="x0_variance")
    assert both.shape == (2, 6, 8, 12) and torch.equal(both[:, :3], model(x, 0.5))


def test_a_model_of_jumps_is_told_where_they_end() -> None:
    """Filled in beside what else its network is told."""
    net = {"kind": "dit", "patch": 4, "dim": 16, "depth": 1, "heads": 2, "told": ["guidance"]}
    model = build_model(spec(net, conditioner=None, answers=["jump"])).eval()
    assert model.net.config.told == ("guidance", "until")  # type: ignore[union-attr]
    assert model.answers == ("x0", "jump", "endpoint")
    x = torch.randn(2, 3, 8, 12)
    assert model(x, 0.5, to="jump", until=torch.tensor([0.1, 0.2])).shape == x.shape
    plain = build_model(spec({**net, "told": []}, conditioner=None))
    assert plain.net.config.told == ()  # type: ignore[union-attr]


def test_without_a_conditioner_there_is_no_condition() -> None:
    model = build_model(spec(conditioner=None))
    assert model.cond([{}, {}]) == {}
    assert model(torch.randn(2, 3, 8, 12), 0.5).shape == (2, 3, 8, 12)


def test_vocabulary_comes_from_data_or_from_files() -> None:
    first = build_model(spec(), Captions())
    assert isinstance(first.conditioner, Prompts)
    again = build_model(spec(), files=first.conditioner.files())
    assert isinstance(again.conditioner, Prompts)
    assert again.conditioner.words == first.conditioner.words
    assert set(first.conditioner.words) > {"a", "red", "blue", "circle"}
    assert {name: w.shape for name, w in again.weights().items()} == {
        name: w.shape for name, w in first.weights().items()
    }


def test_every_weight_has_one_name() -> None:
    model = build_model(spec(), Captions())
    weights, trained = model.weights(), model.trained()
    assert {name.partition(".")[0] for name in weights} == {"net", "conditioner"}
    assert {p.data_ptr() for p in model.parameters()} == {p.data_ptr() for p in trained.values()}
    assert trained.keys() <= weights.keys()
    assert not any(value.requires_grad for value in weights.values())


def test_frozen_parameters_are_weights_that_do_not_learn() -> None:
    model = build_model(spec(), Captions())
    model.conditioner.requires_grad_(False)  # type: ignore[union-attr]
    assert {name.partition(".")[0] for name in model.trained()} == {"net"}
    assert any(name.startswith("conditioner.") for name in model.weights())


def test_the_global_seed_decides_the_weights() -> None:
    def made(seed: int) -> dict[str, torch.Tensor]:
        torch.manual_seed(seed)
        return build_model(spec(), Captions()).weights()

    first, again, other = made(1), made(1), made(2)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


def test_the_codec_is_ours_to_choose() -> None:
    assert build_model(spec(codec={"kind": "pixels", "scale": 0.5}, conditioner=None)).codec == Pixels(0.5)


@pytest.mark.parametrize("name", ["gpu", "cuda:99", ""])
def test_an_impossible_device_is_named(name: str) -> None:
    with pytest.raises(ConfigError) as caught:
        pick_device(name)
    assert caught.value.where == "device" and caught.value.seen is not None and caught.value.seen.startswith(f"{name}:")


def test_a_device_is_found() -> None:
    assert pick_device("cpu") == torch.device("cpu")
    assert isinstance(pick_device("auto"), torch.device)


def test_compiling_without_a_compiler_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(MachineError, match="compiler"):
        compile_net(nn.Linear(1, 1), torch.device("cpu"))


def test_compiling_is_the_networks_own_and_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, Any]] = []
    monkeypatch.setattr(shutil, "which", lambda name: "/usr/bin/" + name)
    monkeypatch.setattr(nn.Linear, "compile", lambda self, **options: seen.append(options))
    compile_net(nn.Linear(1, 1), torch.device("cpu"), dynamic=False)
    assert seen == [{"dynamic": False}]

"""Model directories and code: tied weights of a network of one's own, and foreign code that is not run."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from directories import FACTS, edited, made, refused
from safetensors.torch import load_file

from sfumato import files
from sfumato.io.directory import load_model, save_model
from sfumato.model import Model

MINE = """
import torch
from torch import nn

class Tied(nn.Module):
    '''Two layers with one weight.'''
    def __init__(self, in_channels: int = 3, width: int = 4):
        super().__init__()
        self.one = nn.Linear(in_channels, width)
        self.two = nn.Linear(in_channels, width)
        self.two.weight = self.one.weight
        self.halves = nn.ParameterList(torch.arange(8.0).chunk(2))
        self.register_buffer("count", torch.tensor(3))

    def forward(self, x, t):
        return x
"""


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    save_model(tmp_path / "model", made(), FACTS)
    return tmp_path / "model"


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module of the user's own, in the current directory."""
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "mine_of_test.py").write_text(MINE)
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.delitem(sys.modules, "mine_of_test", raising=False)
    return "mine_of_test:Tied"


def tied(mine: str, tmp_path: Path) -> tuple[Model, Path]:
    model = made(net={"kind": mine}, conditioner=None)
    save_model(tmp_path / "model", model, {})
    return model, tmp_path / "model"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tied_weights_and_views_are_stored_each_and_come_back(mine: str, tmp_path: Path, dtype: torch.dtype) -> None:
    model, folder = tied(mine, tmp_path)
    save_model(folder, model, {}, dtype=dtype)
    stored = load_file(folder / "model.safetensors")
    assert torch.equal(stored["net.one.weight"], stored["net.two.weight"])
    assert stored["net.count"].dtype == torch.int64  # only floating point changes its precision
    again = load_model(folder)
    net: Any = again.net
    assert net.one.weight is net.two.weight
    assert all(
        torch.equal(value, model.weights()[name].to(dtype).to(value.dtype)) for name, value in again.weights().items()
    )


def test_ones_own_code_needs_to_be_here(mine: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the current directory it is the user's; elsewhere, even beside the model, it is somebody's."""
    _, folder = tied(mine, tmp_path)
    load_model(folder)
    monkeypatch.chdir(tmp_path)
    error = refused(folder)
    assert error.seen == mine and "trust=True" in str(error.fix)
    (folder / "mine_of_test.py").write_text(MINE)
    files.seal(folder)
    monkeypatch.chdir(folder)
    assert refused(folder).seen == mine


def test_trust_runs_what_is_named(mine: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, folder = tied(mine, tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path / "work")
    assert refused(folder).seen == mine
    assert type(load_model(folder, trust=True).net).__name__ == "Tied"


@pytest.mark.parametrize(
    "target", ["os:getcwd()", "subprocess:Popen", "builtins:eval", "torch:load", "mine_of_test.x:Y"]
)
@pytest.mark.parametrize("slot", ["net", "path", "conditioner", "sampler", "nested"])
def test_foreign_code_is_refused_wherever_it_is_named(
    saved: Path, target: str, slot: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def change(said: dict[str, Any]) -> None:
        if slot == "sampler":
            said["sampling"]["sampler"] = {"kind": target}
        elif slot == "nested":
            said["model"]["conditioner"]["parts"][0] = {"kind": target}
        else:
            said["model"][slot] = {"kind": target}

    edited(saved, change)
    monkeypatch.setattr("importlib.import_module", lambda *_: pytest.fail("foreign code was imported"))
    assert refused(saved).seen == target


def test_a_name_that_is_taken_already_is_not_ones_own(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file json.py in the current directory would be looked at, and the library's module of that name be used."""
    (tmp_path / "json.py").write_text("class Net: pass")
    monkeypatch.chdir(tmp_path)
    edited(saved, lambda said: said["model"].update(net={"kind": "json:Net"}))
    assert refused(saved).seen == "json:Net"

"""Options, read from the source of ours and of the user's own, with nothing imported."""

import os
import sys
from dataclasses import fields
from pathlib import Path

import pytest

from own_modules import mine as mine
from sfumato import catalogue
from sfumato.errors import ConfigError
from sfumato.registry import check, resolve
from sfumato.signatures import Option, exists, options_of


def test_options_of_dataclasses_functions_and_factories() -> None:
    assert options_of("sfumato.objectives.weights:P2") == {
        "k": Option("k", "float", False),
        "gamma": Option("gamma", "float", False),
    }
    karras = options_of("sfumato.times:karras")
    assert karras is not None and list(karras) == ["start", "sigma_min", "sigma_max", "rho"]  # not path, not n
    options = options_of("sfumato.predictions:edm()")
    assert options == {name: Option(name, "float", False) for name in ("sigma_data", "sigma_min")}
    assert options_of("sfumato.predictions:EPS") == {}


def test_options_of_a_network_are_its_configs() -> None:
    from sfumato.nets.dit import DiTConfig

    options = options_of("sfumato.nets.dit:DiT")
    assert options is not None and list(options) == [field.name for field in fields(DiTConfig)]


def test_what_is_not_given_to_a_dataclass_is_no_option() -> None:
    options = options_of("sfumato.data.folder:Folder")
    assert options is not None and "path" in options and options["path"].required
    assert not [name for name in options if name.startswith("_")]


def test_options_of_the_users_own(mine: Path) -> None:
    assert options_of("reg_mine:Loud") == {
        "volume": Option("volume", "float", True),
        "name": Option("name", "str", False),
        "inner": Option("inner", "Weight | None", False),
        "many": Option("many", "list[Weight]", False),
    }
    assert options_of("reg_mine:Plain") == {}
    assert options_of("reg_mine:MADE") == {}
    assert options_of("reg_mine:sampler") == {
        "eta": Option("eta", "float", False),
        "noise": Option("noise", "str", True),
    }
    assert options_of("reg_mine:factory()") == {
        "scale": Option("scale", "float", True),
        "power": Option("power", "int", False),
    }
    assert options_of("reg_mine:Net") == {
        "width": Option("width", "int", False),
        "weight": Option("weight", "Weight", False),
    }
    assert options_of("reg_mine:hidden") == {"on": Option("on", "bool", False)}
    assert options_of("reg_mine:Fallback") == {}


def test_a_dataclass_inherits_options_and_hides_what_it_makes_itself(mine: Path) -> None:
    assert options_of("reg_mine:Derived") == {
        "size": Option("size", "int", True),
        "mode": Option("mode", "Literal['fast', 'slow']", False),
        "needed": Option("needed", "int", True),
        "made": Option("made", "list[int]", False),
        "where": Option("where", "pathlib.Path", False),
    }


@pytest.mark.parametrize("name", ["Anything", "Below", "open_handed"])
def test_where_the_source_does_not_tell_nothing_is_checked(mine: Path, name: str) -> None:
    assert exists(f"reg_mine:{name}") and options_of(f"reg_mine:{name}") is None
    assert list(check({"kind": f"reg_mine:{name}", "first": "x", "zzz": 3}, "Weight", catalogue.KINDS, "weight")) == []


def test_names_are_followed_through_imports(mine: Path) -> None:
    for name in ("Inside", "Given"):
        assert options_of(f"reg_package:{name}") == {"depth": Option("depth", "int", False)}
    assert options_of("reg_package:shone") == {"bright": Option("bright", "bool", False)}
    assert set(options_of("reg_package:Loud") or {}) == {"volume", "name", "inner", "many"}
    assert "in_features" in (options_of("reg_package:Linear") or {})
    assert not exists("reg_package:Elsewhere")
    assert resolve("reg_package:Given").__name__ == "Inside"


def test_a_folder_without_an_init_is_a_package(mine: Path) -> None:
    assert options_of("reg_folder.one:One") == {"n": Option("n", "int", True)}
    assert catalogue.build({"kind": "reg_folder.one:One", "n": 4}, "Net").n == 4


def test_an_edited_file_is_read_again(mine: Path) -> None:

    file = mine / "reg_package" / "inner.py"
    assert set(options_of("reg_package.inner:Inside") or {}) == {"depth"}
    file.write_text(file.read_text().replace("depth: int", "height: int"))
    os.utime(file, ns=(1, 1))
    assert set(options_of("reg_package.inner:Inside") or {}) == {"height"}


def test_reading_imports_nothing(mine: Path) -> None:
    (mine / "reg_bomb.py").write_text("raise SystemExit('imported')\ndef fuse(*, length: int = 3): ...\n")
    assert set(options_of("reg_bomb:fuse") or {}) == {"length"}
    (problem,) = check({"kind": "reg_bomb:fuse", "length": "long"}, "Weight", catalogue.KINDS, "weight")
    assert problem.where == "weight.length"
    assert "reg_bomb" not in sys.modules and "reg_package" not in sys.modules


def test_a_module_that_is_not_python_is_named_with_its_line(mine: Path) -> None:
    (mine / "reg_broken.py").write_text("class Thing:\n    def (self):\n        pass\n")
    with pytest.raises(ConfigError, match="not Python") as caught:
        list(check("reg_broken:Thing", "Weight", catalogue.KINDS, "weight"))
    assert str(caught.value.where).endswith("reg_broken.py, line 2")

"""A user's own modules, as they may lie in the current directory: everything that a target can be."""

import sys
from pathlib import Path

import pytest

MINE = '''
from __future__ import annotations

from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path
from typing import ClassVar, Literal, Protocol

MADE = 3


class Loud:
    """A class with an `__init__`."""

    def __init__(
        self, volume: float, name: str = "loud", *, inner: Weight | None = None, many: list[Weight] = ()
    ) -> None:
        self.told = {"volume": volume, "name": name, "inner": inner, "many": many}


class Plain:
    """A class that is told nothing."""


class Anything:
    def __init__(self, first: int, **rest: int) -> None:
        self.told = {"first": first, **rest}


class Below(Anything):
    """Its options are those of another class."""


@dataclass(frozen=True)
class Base(Protocol):
    size: int
    kind_of: ClassVar[int] = 3
    _kept: list[int] = field(default_factory=list, init=False)


@dataclass(frozen=True)
class Derived(Base):
    _: KW_ONLY
    mode: Literal["fast", "slow"] = "fast"
    needed: int = field(kw_only=True)
    made: list[int] = field(default_factory=list)
    where: Path = Path(".")


@dataclass
class Config:
    width: int = 8
    weight: Weight = None


class Net:
    """A class that is told by a dataclass, as our networks are."""

    def __init__(self, config: Config) -> None:
        self.config = config


def sampler(path, x, times, *, eta: float = 0.0, noise: str):
    return path, x, times, eta, noise


def open_handed(path, **options):
    return path, options


def factory(scale: float, power: int = 2):
    return lambda x: (scale * x) ** power


if MADE:

    def hidden(*, on: bool = True):
        return on


try:
    import no_such_module_of_mine
except ImportError:

    class Fallback:
        pass
'''


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's own modules in the current directory: `reg_mine`, and `reg_package`, which gives its names on."""
    (tmp_path / "reg_mine.py").write_text(MINE)
    package = tmp_path / "reg_package"
    package.mkdir()
    (package / "__init__.py").write_text(
        "from .inner import Inside as Given\nfrom .inner import Inside\nfrom .stars import *\n"
        "from reg_mine import Loud\nfrom torch.nn import Linear\n"
    )
    (package / "inner.py").write_text(
        "class Inside:\n    def __init__(self, depth: int = 1):\n        self.depth = depth\n"
    )
    (package / "stars.py").write_text("def shone(*, bright: bool = False):\n    return bright\n")
    (tmp_path / "reg_folder").mkdir()
    (tmp_path / "reg_folder" / "one.py").write_text("class One:\n    def __init__(self, n: int):\n        self.n = n\n")
    monkeypatch.chdir(tmp_path)
    for name in [n for n in sys.modules if n.startswith("reg_")]:
        monkeypatch.delitem(sys.modules, name)
    return tmp_path

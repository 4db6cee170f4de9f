"""Runs of a few thousand weights, whole except for their size."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from sfumato.config import Config
from sfumato.overlay import load_config
from sfumato.train.run import Run

SMALL = Path(__file__).parent / "small.yaml"


def small(*overrides: str) -> Config:
    """The configuration `small.yaml`, with changes."""
    return load_config(str(SMALL), overrides).config


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Run]]:
    """A run that has not made a step yet, for tests that look inside; it is closed afterwards."""
    made: list[Run] = []

    def begin(*overrides: str, resume: bool = False, folder: str = "run") -> Run:
        place = tmp_path / folder
        place.mkdir(exist_ok=True)
        made.append(Run(small(*overrides), place, resume))
        return made[-1]

    yield begin
    for run in made:
        run.close()


@pytest.fixture(name="small")
def _small() -> Callable[..., Config]:
    return small

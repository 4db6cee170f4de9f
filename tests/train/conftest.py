"""Runs of a few thousand weights, whole except for their size."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from sfumato.config import Config
from sfumato.overlay import load_config
from sfumato.train.run import Run

SMALL = (
    "device=cpu",
    "data.count=200",
    "model.net={kind: dit, size: 32, patch: 8, dim: 16, depth: 2, heads: 2, skips: false}",
    "model.conditioner={kind: prompts, dim: 16, depth: 1, heads: 2, length: 12}",
    "steps=12",
    "batch=4",
    "optim.warmup=4",
    "log.every=1",
    "validate={every: 0, holdout: 0}",
    "samples.every=0",
    "checkpoint={every: 6, keep: 2}",
)


def small(*overrides: str) -> Config:
    """The recipe `tiny`, still smaller and without pictures, with changes."""
    return load_config("tiny", [*SMALL, *overrides]).config


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

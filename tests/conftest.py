"""One thread a test: the models are tiny, and threads would only wait for one another."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"  # a name that is no path is never looked for in a network

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

if TYPE_CHECKING:
    from sfumato.pipeline import Pipeline


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of the recipe `tiny` on the CPU: its folder, which no test may change."""
    from sfumato.overlay import load_config
    from sfumato.train import train

    folder = tmp_path_factory.mktemp("runs") / "tiny"
    train(load_config("tiny", ["device=cpu"]).config, run=folder)
    return folder


@pytest.fixture(scope="module")
def pipe() -> "Pipeline":
    """A pipeline of a small model, which no test may change."""
    from sfumato.pipeline import Pipeline
    from small_models import made

    return Pipeline(made(), "cpu")


@pytest.fixture
def doubles() -> "Iterator[Pipeline]":
    """A pipeline whose weights, state and noise are all float64."""
    from sfumato.pipeline import Pipeline
    from small_models import made

    torch.set_default_dtype(torch.float64)
    yield Pipeline(made(), "cpu")
    torch.set_default_dtype(torch.float32)

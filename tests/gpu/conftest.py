"""Tests that need an accelerator, and are skipped without one: `pytest -m gpu tests/gpu`."""

from pathlib import Path

import pytest
import torch

CUDA = torch.cuda.is_available()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            item.add_marker(pytest.mark.skipif(not CUDA, reason="no CUDA device"))


@pytest.fixture
def gpu() -> torch.device:
    return torch.device("cuda")


@pytest.fixture(scope="session")
def gpu_teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the recipe `tiny` on the device, in bfloat16: a teacher of a few thousand weights."""
    from sfumato.overlay import load_config
    from sfumato.train import train

    folder = tmp_path_factory.mktemp("runs") / "teacher"
    train(load_config("tiny", ["device=cuda", "precision=bf16"]).config, run=folder)
    return folder

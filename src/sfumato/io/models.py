"""Models wherever they are: of a run, a model directory, a folder of diffusers, an original file, or the hub."""

from pathlib import Path
from typing import Any

from sfumato.hub import located
from sfumato.io.directory import load_model
from sfumato.io.published import is_published, load_published
from sfumato.model import Model


def model_folder(path: str | Path) -> Path:
    """The model directory that is meant: a run's `model/`, or the folder itself; of a name of the hub the folder or
    file in its cache.
    """
    folder = located(path)
    return folder / "model" if (folder / "model" / "model.json").is_file() else folder


def read_model(folder: Path, *, trust: bool = False, parts: Path | None = None, **straight: Any) -> Model:
    """The model of what `model_folder` found, in any layout, in evaluation mode. CheckpointError if it is damaged.

    trust: as of `load_model`. parts: as of `load_published`. straight: where weights go, see
    `sfumato.io.fill.fill_weights`.
    """
    if is_published(folder):
        return load_published(folder, parts, **straight)
    return load_model(folder, trust=trust, **straight)

"""Training that begins with a model: what it is, what it knows, and how it likes to be sampled come along.

The size of the pictures is the data's; a network that does not fit it says so. What came along is written into the
configuration of the run, which is complete and needs the model that it began with no more.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from pydantic import ValidationError
from torch import Tensor

from sfumato.config import Config, ModelSection, SamplingSection
from sfumato.errors import CheckpointError
from sfumato.io.fill import fill_weights, unfilled
from sfumato.io.models import model_folder, read_model
from sfumato.model import Model, build_model
from sfumato.overlay import load_config, recipes

FOLDER = "start"  # of a run that trains an adapter: the model that is changed


class Start(NamedTuple):
    """A model to begin with: its spec, its weights and its files, and where it is from."""

    spec: Mapping[str, Any]
    weights: dict[str, Tensor]
    files: Mapping[str, bytes]
    where: str


def read_start(path: str | Path, key: str = "start") -> Start:
    """The model of a run, a model directory, a folder of diffusers, a file, or of the hub. CheckpointError for none.

    key: of the configuration, that names it.
    """
    folder = model_folder(path)
    if not folder.exists():
        raise CheckpointError("there is no model to start from", where=key, seen=str(path), fix=way_to(path))
    model = read_model(folder)
    return Start(model.spec, model.weights(), model.files(), str(path))


def way_to(path: str | Path) -> str:
    """What to do where a model is not there: where it is a recipe's run, how that is made."""
    name = Path(path).name
    if Path(path) != Path("runs") / name or name not in {one.name for one in recipes()}:
        return "a run, a model, or a folder"
    teacher = load_config(name).config.teacher
    made = f"sfumato train {name}" if teacher is None else f"sfumato distill {name} teacher={teacher}"
    return f"{made}, which makes it; or another model"


def with_start(config: Config, start: Start) -> Config:
    """The configuration with the model section of a start; and its settings of sampling, where none are said."""
    found: dict[str, Any] = {"model": ModelSection.model_validate(start.spec["model"])}
    if "sampling" not in config.model_fields_set:
        try:
            found["sampling"] = SamplingSection.model_validate(dict(start.spec["sampling"]))
        except ValidationError as error:
            seen = "; ".join(str(one["loc"]) for one in error.errors())
            what, fix = "its settings of sampling are none of a configuration", "sampling={sampler: ddim, ...}"
            raise CheckpointError(what, where=start.where, seen=seen, fix=fix) from None
    return config.model_copy(update=found)


def model_of(start: Start, spec: Mapping[str, Any]) -> Model:
    """The model of a start by a spec of its own, ready to train. Takes the weights out of it."""
    with torch.random.fork_rng(devices=[]), unfilled():
        model = build_model(spec, files=start.files)
    fill_weights(model, start.weights, start.where)
    return model

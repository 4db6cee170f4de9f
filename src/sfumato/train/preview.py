"""Pictures drawn while a model trains."""

from collections.abc import Sequence
from pathlib import Path

import torch

from sfumato.conditioners import Raw
from sfumato.config import Config
from sfumato.data.sheet import sheet
from sfumato.model import Model
from sfumato.pipeline import Pipeline


def preview(model: Model, device: torch.device, config: Config, raw: Sequence[Raw], path: Path) -> None:
    """A sheet of one picture for each condition, always from the same noise, with the recommended settings."""
    pipeline = Pipeline(model, device, precision=config.precision)
    fields = set(getattr(model.conditioner, "fields", ()))
    known = [{name: value for name, value in one.items() if name in fields} for one in raw]
    drawn = pipeline.sample(known)
    said = [str(one.get("caption", one.get("label", ""))) for one in raw]
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet(list(drawn.images), said).save(path)

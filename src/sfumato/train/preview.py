"""Pictures drawn while a model trains."""

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from sfumato import files
from sfumato.conditioners import Conditioner, Raw
from sfumato.config import Config
from sfumato.data.given import is_picture
from sfumato.data.picture import Dataset, Image
from sfumato.data.sheet import sheet
from sfumato.errors import DataError
from sfumato.model import AutoencoderModel, Model
from sfumato.pipeline import Pipeline
from sfumato.train.pixels import pixels

LOOKED_AT = 256  # of the data, in search of captions that the model can read whole
COLUMNS = 8  # of a sheet of reconstructions


def wanted(model: Model, dataset: Dataset, config: Config, held: Sequence[int]) -> list[Raw]:
    """The raw conditions to draw: the configured prompts, else the first of the held-out data, else of the data.

    DataError for a configured prompt that the model cannot read; of the data, those that it cannot are passed over.
    """
    samples, conditioner = config.samples, model.conditioner
    if conditioner is None:
        return [{} for _ in range(samples.count)]
    if samples.prompts:
        field = "caption" if "caption" in conditioner.fields else conditioner.fields[0]
        prompts: list[Raw] = [{field: text} for text in samples.prompts]
        conditioner.check(prompts)
        return prompts
    places = list(held[:LOOKED_AT]) or list(range(min(LOOKED_AT, len(dataset))))
    found: list[Raw] = []
    while places and len(found) < samples.count:
        some, places = places[: samples.count], places[samples.count :]
        found += [one for one in model.known(dataset.batch(some)[1]) if _readable(conditioner, one)]
    return found[: samples.count]


def preview(model: Model, device: torch.device, precision: str, raw: Sequence[Raw], path: Path) -> None:
    """A sheet of one picture for each condition, always from the same noise, with the recommended settings.

    DataError if the model answers with numbers that are not finite.
    """
    drawn = Pipeline(model, device, precision=precision).sample(list(raw))
    said = [" ".join(str(value) for value in one.values() if not is_picture(value)) for one in raw]
    path.parent.mkdir(parents=True, exist_ok=True)
    data = io.BytesIO()
    sheet(list(drawn.images), said).save(data, "PNG")
    files.write_atomic(path, data.getvalue())


def reconstructions(model: AutoencoderModel, device: torch.device, images: Image, path: Path) -> None:
    """A sheet of pictures (N, H, W, 3) uint8, each above what the autoencoder makes of it by way of the mean.

    DataError if that is not finite.
    """
    with torch.inference_mode():
        drawn = model.net(pixels(images, device)).float()
    if not bool(drawn.isfinite().all()):
        raise DataError(
            "the autoencoder's answers are not finite numbers", where="samples", seen=str(tuple(drawn.shape))
        )
    back = ((drawn.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    errors = np.square(images.astype(np.float64) - back).mean((1, 2, 3)).clip(1e-3)
    said = [f"{10 * np.log10(255**2 / error):.1f} dB" for error in errors]
    columns = min(len(images), COLUMNS)
    tiles, texts = list[Image](), list[str]()
    for start in range(0, len(images), columns):
        part, rest = slice(start, start + columns), columns - len(images[start : start + columns])
        for row, names in ((images, [""] * len(images)), (back, said)):
            tiles += [*row[part], *[np.full_like(images[0], 255)] * rest]
            texts += [*names[part], *[""] * rest]
    path.parent.mkdir(parents=True, exist_ok=True)
    data = io.BytesIO()
    sheet(tiles, texts, columns=columns).save(data, "PNG")
    files.write_atomic(path, data.getvalue())


def _readable(conditioner: Conditioner, one: Raw) -> bool:
    try:
        conditioner.check([one])
    except DataError:
        return False
    return True

"""What a run trains, built from its configuration: a model, or, where there is no network, an autoencoder alone."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sfumato.adapters import training as adapters
from sfumato.config import Config
from sfumato.data.picture import Dataset
from sfumato.io.directory import save_model
from sfumato.io.pretrained import codec_from, fill_codec
from sfumato.model import Model, Trainable, build_autoencoder, build_model
from sfumato.train.control import freeze
from sfumato.train.reparameterise import reparameterise
from sfumato.train.start import FOLDER, Start, model_of, read_start


def trainable(config: Mapping[str, Any], data: Dataset, objective: Any, files: Mapping[str, bytes] | None) -> Trainable:
    """Freshly initialised from torch's global generator, but for what is read from the `weights` that it names.

    config: resolved. objective: brings an autoencoder's discriminator, and says what of it learns. files: of a
    checkpoint's conditioner, in place of what it would learn from the data.
    """
    section = config["model"]
    slot, spec = section["codec"], {"size": list(data.shape), "sampling": config["sampling"]}
    if section["net"] is None:
        fresh = isinstance(slot, Mapping) and slot.get("weights") is None
        codec, weights = (slot, {}) if fresh else codec_from(slot)
        kept = {name: value for name, value in codec.items() if name != "weights"}
        adversary, learning = getattr(objective, "discriminator", None), getattr(objective, "train", "all")
        alone = build_autoencoder({"model": {"net": None, "codec": kept}, **spec}, adversary, learning)
        fill_codec(alone.codec, weights)
        return alone
    codec, weights = codec_from(slot)
    model = build_model({"model": {**section, "codec": codec}, **spec}, data, files)
    fill_codec(model.codec, weights)
    return model


def to_train(
    config: Config,
    section: Mapping[str, Any],
    data: Dataset,
    objective: Any,
    folder: Path,
    kept: Mapping[str, bytes] | None,
    start: Start | None,
) -> Trainable:
    """What a run trains: something fresh, or a model further, perhaps with a new adapter or a control of it.

    section: the configuration, resolved. folder: of the run. kept: the conditioner's files, of a checkpoint to go on
    from. start: the model to begin with, of a run that is new.
    """
    if config.start is not None and config.reparameterise is None:
        return _further(config, section, data, folder, kept, start)
    model = trainable(section, data, objective, kept)
    if config.reparameterise is not None and start is not None:
        assert isinstance(model, Model)
        reparameterise(model, start, config.reparameterise.time)
    return model


def _further(
    config: Config,
    section: Mapping[str, Any],
    data: Dataset,
    folder: Path,
    kept: Mapping[str, bytes] | None,
    start: Start | None,
) -> Model:
    """The model to begin with, and perhaps a new adapter of it. A run that trains one keeps the model beside its
    checkpoints, which lack it; of any other they have all weights.
    """
    lora, place = config.lora, folder / FOLDER
    spec = {"model": section["model"], "size": list(data.shape), "sampling": section["sampling"]}
    fresh = start is None and lora is None
    model = build_model(spec, None, kept) if fresh else model_of(start or read_start(place), spec)
    if config.control is not None:
        freeze(model)
    if lora is not None:
        if start is not None:
            save_model(place, model, {"start": start.where})
        adapters.begin(model, lora)
    return model

"""What a run trains, built from its configuration: a model, or, where there is no network, an autoencoder alone."""

from collections.abc import Mapping
from typing import Any

from sfumato.data.picture import Dataset
from sfumato.io.pretrained import codec_from, fill_codec
from sfumato.model import Trainable, build_autoencoder, build_model


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

"""An adapter that is trained: everything else stands still, and what comes out is the adapter, and the model with it.

A begins random and B zero, so that the first step sees the model as it was (Hu et al. 2022). Averages and optimizers
see the factors alone, which are a hundredth of the model's weights or less.
"""

import torch
from torch import Tensor

from sfumato.adapters.factors import Factors, merged
from sfumato.adapters.lora import factors_in, inject_as, wrapped
from sfumato.adapters.parts import NET, Part, parts_of
from sfumato.adapters.reading import Adapter
from sfumato.adapters.targets import chosen
from sfumato.config import LoraSection
from sfumato.errors import ConfigError
from sfumato.model import Model

NAME = "trained"  # what peft calls it


def begin(model: Model, section: LoraSection) -> None:
    """Freezes a model and gives it a new adapter to train, drawn from torch's global generator.

    ConfigError for targets that it has not, or where `text` is asked of a model without a text encoder.
    """
    parts = parts_of(model)
    wanted = parts if section.text else [part for part in parts if part.home == NET]
    if section.text and len(parts) == 1:
        what, fix = "this model has nothing that reads text", "lora.text=false"
        raise ConfigError(what, where="lora.text", seen=type(model.conditioner).__name__, fix=fix)
    layers = {part.home: chosen(part, section.targets) for part in wanted}
    model.requires_grad_(False)
    alpha = float(section.rank) if section.alpha is None else section.alpha
    options = {"r": section.rank, "lora_alpha": alpha, "lora_dropout": section.dropout, "use_dora": section.dora}
    for part in wanted:
        assert part.module is not None
        inject_as(part.module, NAME, layers[part.home], **options)


def trained_adapter(model: Model) -> Adapter:
    """The adapter as it is now, with memory of its own."""
    changes: dict[str, Factors] = {}
    for part in parts_of(model):
        for name, one in _factors(part):
            length = None if one.magnitude is None else one.magnitude.clone()
            changes[f"{part.home}.{name}"] = Factors(one.down.clone(), one.up.clone(), one.alpha, length)
    return Adapter(changes)


@torch.no_grad()
def merged_weights(model: Model) -> dict[str, Tensor]:
    """Every weight, with the adapter in it, by the names of a model without one."""
    weights = {key.replace(".base_layer.", "."): value for key, value in model.weights().items() if ".lora_" not in key}
    for part in parts_of(model):
        for name, one in _factors(part):
            key = f"{part.home}.{name}.weight"
            weights[key] = merged(weights[key], [(one, 1.0)]).to(weights[key].dtype)
    return weights


def _factors(part: Part) -> list[tuple[str, Factors]]:
    assert part.module is not None
    return [(name, factors_in(layer, NAME)) for name, layer in wrapped(part.module) if NAME in layer.lora_A]

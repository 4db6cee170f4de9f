"""Weights into models, without a second copy in memory.

A model that is about to be filled is built without memory for its parameters (they lie on torch's `meta` device, where
initialising costs nothing); then each takes over the tensor that was read, moved to its device and kind on the way.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from sfumato.errors import CheckpointError
from sfumato.io.keymap import some
from sfumato.model import Trainable

HALVED = ("net.", "conditioner.")  # parts that run in half precision


@contextlib.contextmanager
def unfilled() -> Iterator[None]:
    """Modules built inside have parameters without memory. Buffers are made as ever, for most are computed."""
    register = nn.Module.register_parameter

    def registered(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if param is not None and param.device.type != "meta":
            param = nn.Parameter(param.to("meta"), requires_grad=param.requires_grad)
        register(self, name, param)

    nn.Module.register_parameter = registered  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def fill_weights(
    model: Trainable,
    weights: dict[str, Tensor],
    where: str,
    device: torch.device | None = None,
    matrices: torch.dtype | None = None,
    text_device: torch.device | None = None,
) -> None:
    """Moves weights into a model; every name and shape must fit, and all that do not are named at once.

    `weights` is emptied on the way, so that no more than one tensor is there twice. device: where to; as they are, if
    not said. text_device: where the conditioner's go, if elsewhere.
    matrices: what the network's and the conditioner's weights of two axes or more are kept as; the rest
    (biases, norms) is small and wants precision, and so do autoencoders.
    """
    own = model.weights()
    faults = [f"{name} is missing" for name in own.keys() - weights.keys()]
    faults += [f"{name} is unknown" for name in weights.keys() - own.keys()]
    for name in own.keys() & weights.keys():
        if own[name].shape != weights[name].shape:
            faults.append(f"{name} is {list(weights[name].shape)}, not {list(own[name].shape)}")
    if faults:
        raise CheckpointError(
            f"weights do not fit the model in {len(faults)} places", where=where, seen="; ".join(sorted(faults))
        )
    if bad := [name for name in own if not bool(torch.isfinite(weights[name]).all())]:
        fix = "an earlier checkpoint, or another file"
        raise CheckpointError(f"{len(bad)} weights are not finite numbers", where=where, seen=some(bad), fix=fix)
    made: dict[int, nn.Parameter] = {}  # tied parameters stay tied
    with torch.no_grad():
        for holder, slot, name in _slots(model):
            old = holder[slot]
            if not old.is_meta:
                old.copy_(weights.pop(name))
            elif id(old) in made:
                del weights[name]
                holder[slot] = made[id(old)]
            else:
                value = weights.pop(name)
                halved = matrices is not None and old.ndim > 1 and old.is_floating_point() and name.startswith(HALVED)
                kind = matrices if halved else old.dtype
                place = (text_device if name.startswith("conditioner.") else None) or device or value.device
                value = value.to(place, kind)
                holder[slot] = made[id(old)] = nn.Parameter(value, requires_grad=old.requires_grad)


def _slots(model: Trainable) -> Iterator[tuple[dict[str, Any], str, str]]:
    """Where each weight of a model lies: a module's table, the key in it, and the name it is stored under."""
    for part_name, part in model.parts().items():
        for prefix, module in part.named_modules(prefix=part_name, remove_duplicate=False):
            for slot, value in module._parameters.items():
                if value is not None:
                    yield module._parameters, slot, f"{prefix}.{slot}"
            for slot, buffer in module._buffers.items():
                if buffer is not None and slot not in module._non_persistent_buffers_set:
                    yield module._buffers, slot, f"{prefix}.{slot}"

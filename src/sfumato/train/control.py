"""Training a ControlNet of a model: the model stands still, and what learns is a copy of its U-Net's way down.

The model becomes one of another network, around its own, and of another conditioner, which also reads the picture. So
the rest of training knows nothing of it. The copy begins with the U-Net's weights, or with those of another control.
"""

from collections.abc import Mapping
from typing import Any

import torch

from sfumato.catalogue import build
from sfumato.config import ControlSection
from sfumato.errors import ConfigError
from sfumato.io.families.controlnet import joined, read_control, slot_of
from sfumato.io.fill import unfilled
from sfumato.model import Model, build_model
from sfumato.nets.controlnet import Controlled, ControlNet
from sfumato.nets.stable_unet import StableUNet
from sfumato.train.keys import key
from sfumato.train.start import Start

PUBLISHED = (16, 32, 96, 256)  # widths of the published controls' convolutions over the picture


def under_control(start: Start, section: ControlSection, seed: int) -> Start:
    """A model with a control of its own, which no training has seen yet."""
    with torch.random.fork_rng(devices=[]), unfilled():
        base = build_model(start.spec, files=start.files)
    net = base.net
    if not isinstance(net, StableUNet):
        seen, fix = type(net).__name__, "start=MODEL, one with a U-Net of Stable Diffusion, without a control"
        raise ConfigError("only U-Nets of Stable Diffusion are controlled", where="control", seen=seen, fix=fix)
    control = _begun(start, base, net, section, seed)
    Controlled(net, [control])  # says so if they do not fit
    inner = {name: value for name, value in start.weights.items() if name.startswith("net.")}
    rest = {name: value for name, value in start.weights.items() if not name.startswith(("net.", "conditioner."))}
    words = {
        name.removeprefix("conditioner."): v for name, v in start.weights.items() if name.startswith("conditioner.")
    }
    section_ = start.spec["model"]
    told, files = {"kind": "hint", "field": section.field}, dict(start.files)
    conditioner: dict[str, Any] = told
    if section_["conditioner"] is not None:
        conditioner = {"kind": "joined", "parts": [section_["conditioner"], told]}
        files = {f"0.{name}": data for name, data in start.files.items()}
    model = {**section_, "net": slot_of(control.config, _full(section_["net"], net)), "conditioner": conditioner}
    weights = rest | joined(inner, control) | {f"conditioner.parts.0.{name}": value for name, value in words.items()}
    return Start({**start.spec, "model": model}, weights, files, start.where)


def freeze(model: Model) -> None:
    """Lets nothing learn but the control."""
    assert isinstance(model.net, Controlled)
    model.requires_grad_(False)
    model.net.controls.requires_grad_(True)


def _begun(start: Start, base: Model, net: StableUNet, section: ControlSection, seed: int) -> ControlNet:
    if section.weights is not None:
        return read_control(section.weights).requires_grad_(True)
    height, width = base.size
    factor = height // base.codec.shape(height, width)[1]  # how much smaller the network's map is than the picture
    steps = factor.bit_length() - 1
    widths = tuple(section.hint or PUBLISHED[: steps + 1])
    if factor != 2**steps or len(widths) != steps + 1:
        seen = f"{len(widths)} widths, where the codec makes pictures {factor} times smaller"
        raise ConfigError("each width after the first halves the picture", where="control.hint", seen=seen)
    own = build(_full(start.spec["model"]["net"], net), "Net")
    own.load_state_dict({k.removeprefix("net."): v for k, v in start.weights.items() if k.startswith("net.")})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(key(seed, "control"))
        return ControlNet.of(own, hint=widths)


def _full(slot: Mapping[str, Any], net: StableUNet) -> dict[str, Any]:
    """A U-Net's slot with all that its surroundings decided."""
    plain = {name: list(value) if isinstance(value, tuple) else value for name, value in vars(net.config).items()}
    return {**plain, **slot, "size": plain["size"]}

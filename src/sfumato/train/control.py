"""Training a ControlNet of a model: the model stands still, and what learns is a copy of its first half.

The model becomes one of another network, around its own, and of another conditioner, which also reads the picture. So
the rest of training knows nothing of it. The copy begins with the U-Net's weights, or with those of another control.
"""

from collections.abc import Mapping
from typing import Any

import torch

from sfumato.catalogue import build
from sfumato.config import ControlSection
from sfumato.errors import ConfigError
from sfumato.io.families.controlnet import hint_of, joined, read_control, slot_of
from sfumato.io.fill import unfilled
from sfumato.model import Model, build_model
from sfumato.nets.control_flux import FluxControl
from sfumato.nets.control_mmdit import MMDiTControl
from sfumato.nets.controlled import Base, Control, Controlled
from sfumato.nets.controlnet import ControlNet
from sfumato.nets.flux import Flux
from sfumato.nets.mmdit import MMDiT
from sfumato.nets.stable_unet import StableUNet
from sfumato.train.keys import key
from sfumato.train.start import Start

PUBLISHED = (16, 32, 96, 256)  # widths of the published controls' convolutions over the picture


def under_control(start: Start, section: ControlSection, seed: int) -> Start:
    """A model with a control of its own, which no training has seen yet."""
    with torch.random.fork_rng(devices=[]), unfilled():
        base = build_model(start.spec, files=start.files)
    net = base.net
    if not isinstance(net, (StableUNet, MMDiT, Flux)):
        seen, fix = type(net).__name__, "start=MODEL, one of Stable Diffusion or FLUX, without a control"
        what = "only U-Nets of Stable Diffusion, MMDiTs and FLUX transformers are controlled"
        raise ConfigError(what, where="control", seen=seen, fix=fix)
    control = _begun(start, base, net, section, seed)
    Controlled(net, [control])  # says so if they do not fit
    inner = {name: value for name, value in start.weights.items() if name.startswith("net.")}
    rest = {name: value for name, value in start.weights.items() if not name.startswith(("net.", "conditioner."))}
    words = {
        name.removeprefix("conditioner."): v for name, v in start.weights.items() if name.startswith("conditioner.")
    }
    section_ = start.spec["model"]
    told, files = hint_of(control.config, section.field), dict(start.files)
    conditioner: dict[str, Any] = told
    if section_["conditioner"] is not None:
        conditioner = {"kind": "joined", "parts": [section_["conditioner"], told]}
        files = {f"0.{name}": data for name, data in start.files.items()}
    slot = slot_of(control.config, _full(section_["net"], net), net.config)
    model = {**section_, "net": slot, "conditioner": conditioner}
    weights = rest | joined(inner, control) | {f"conditioner.parts.0.{name}": value for name, value in words.items()}
    return Start({**start.spec, "model": model}, weights, files, start.where)


def freeze(model: Model) -> None:
    """Lets nothing learn but the control."""
    assert isinstance(model.net, Controlled)
    model.requires_grad_(False)
    model.net.controls.requires_grad_(True)


def _begun(start: Start, base: Model, net: Base, section: ControlSection, seed: int) -> Control:
    if section.weights is not None:
        return read_control(section.weights).requires_grad_(True)
    own = build(_full(start.spec["model"]["net"], net), "Net")
    own.load_state_dict({k.removeprefix("net."): v for k, v in start.weights.items() if k.startswith("net.")})
    made = {} if isinstance(net, StableUNet) else _blocks(net, section)
    widths = _widths(base, section) if isinstance(net, StableUNet) else ()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(key(seed, "control"))
        if isinstance(own, MMDiT):
            return MMDiTControl.of(own, **made)
        if isinstance(own, Flux):
            return FluxControl.of(own, **made)
        return ControlNet.of(own, hint=widths)


def _blocks(net: Base, section: ControlSection) -> dict[str, int]:
    """How many blocks of a transformer are copied, where it is said."""
    names = ("depth",) if isinstance(net, MMDiT) else ("double", "single")
    if section.blocks is None:
        return {}
    if len(section.blocks) != len(names) or not any(section.blocks):
        fix = "[12]" if len(names) == 1 else "[4, 10]"
        raise ConfigError("blocks of each kind", where="control.blocks", seen=str(section.blocks), fix=fix)
    return dict(zip(names, section.blocks, strict=True))


def _widths(base: Model, section: ControlSection) -> tuple[int, ...]:
    """The convolutions over the picture that a U-Net's control asks for."""
    height, width = base.size
    factor = height // base.codec.shape(height, width)[1]  # how much smaller the network's map is than the picture
    steps = factor.bit_length() - 1
    widths = tuple(section.hint or PUBLISHED[: steps + 1])
    if factor != 2**steps or len(widths) != steps + 1:
        seen = f"{len(widths)} widths, where the codec makes pictures {factor} times smaller"
        raise ConfigError("each width after the first halves the picture", where="control.hint", seen=seen)
    return widths


def _full(slot: Mapping[str, Any], net: Base) -> dict[str, Any]:
    """A network's slot with all that its surroundings decided."""
    plain = {name: list(value) if isinstance(value, tuple) else value for name, value in vars(net.config).items()}
    return {**plain, **slot, "size": plain["size"]}

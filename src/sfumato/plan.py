"""What a training run would take, before it is begun: parameters, memory, arithmetic, and time on a named device.

Nothing is trained and no memory is used: the network is built on torch's `meta` device, where a forward pass counts its
products and adds up what the backward pass would keep. Time is arithmetic over the device's peak times the share of it
that training reaches, which is a guess that can be changed (`share`).
"""

import inspect
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from sfumato.adapters.training import begin
from sfumato.catalogue import build
from sfumato.config import Config
from sfumato.errors import ConfigError, nearest
from sfumato.io.fill import unfilled
from sfumato.io.pretrained import LATENTS, TINY, codec_from
from sfumato.model import AutoencoderModel, Model, build_autoencoder, build_model
from sfumato.overlay import load_config, recipes, resolved
from sfumato.train.control import freeze, under_control
from sfumato.train.start import read_start, with_start
from sfumato.train.teaching import as_student

# Peak products in bfloat16, dense, per second, from the makers' data sheets; memory in bytes.
DEVICES: dict[str, tuple[float, float]] = {
    "a100": (312e12, 80e9),
    "h100": (989e12, 80e9),
    "h200": (989e12, 141e9),
    "b200": (2250e12, 192e9),
    "l40s": (362e12, 48e9),
    "rtx4090": (165e12, 24e9),
    "mi300x": (1307e12, 192e9),
}
STATES = {"adamw": 2, "muon": 1}  # numbers that an optimizer keeps for each that learns


@dataclass(frozen=True)
class Plan:
    """What a run takes. Bytes are on one device, with the whole batch on it.

    parameters: that learn. frozen: that do not (an autoencoder). flops: of one forward pass of one picture, two for a
    multiplication with its addition. activations: bytes kept for the backward pass of the batch, none if they are
    recomputed but the inputs of the stages. images: over the whole run.
    """

    parameters: int
    frozen: int
    flops: int
    weights: int
    states: int
    activations: int
    images: int
    run_flops: float
    device: str | None
    hours: float | None
    fits: bool | None

    @property
    def memory(self) -> int:
        """Bytes at the height of a step."""
        return self.weights + self.states + self.activations

    def as_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {**asdict(self), "memory": self.memory}


def plan(config: Config, device: str | None = None, share: float = 0.4) -> Plan:
    """The plan of a configuration. device: one of `DEVICES`, to tell the time and whether it fits.

    A published autoencoder or text encoder need not be there: what the recipe says of its shape counts.
    """
    if device is not None and device not in DEVICES:
        raise ConfigError("this device is not known", where="--device", seen=device, fix=nearest(device, DEVICES))
    if not 0 < share <= 1:
        raise ConfigError(
            "a share of the peak is above 0, up to 1", where="--share", seen=str(share), fix="--share 0.4"
        )
    model = built(config)
    learning = sum(p.numel() for p in model.trained().values())
    frozen = sum(value.numel() for value in model.weights().values()) - learning
    flops, kept = _counted(model, config)
    images = config.steps * config.batch * config.accumulate
    peak, room = DEVICES[device] if device else (math.nan, math.nan)
    states = 4 * learning * (1 + STATES.get(config.optim.kind, 2) + len(config.ema))  # gradients, moments, averages
    weights = 4 * (learning + frozen)
    run_flops = 3.0 * flops * images  # backward costs two forwards
    activations = kept * config.batch
    return Plan(
        parameters=learning,
        frozen=frozen,
        flops=flops,
        weights=weights,
        states=states,
        activations=activations,
        images=images,
        run_flops=run_flops,
        device=device,
        hours=run_flops / (peak * share) / 3600 if device else None,
        fits=weights + states + activations <= room if device else None,
    )


def built(config: Config) -> Model | AutoencoderModel:
    """The model of a configuration, without memory for its parameters, data or other people's weights."""
    config = _begun(config)
    section, files = resolved(config), None
    if config.start is not None:
        start = read_start(config.start, config.start_key)
        start = start if config.control is None else under_control(start, config.control, config.seed)
        config = with_start(config, start)
        config = config if config.method is None else as_student(config, start)[0]
        section, files = resolved(config), start.files
    model = dict(section["model"])
    model["codec"] = _alone(model["codec"])
    model["conditioner"] = _alone(model["conditioner"])
    side = section["data"].get("size", 32)
    size = [side, side] if isinstance(side, int) else list(side)
    spec = {"model": model, "size": size, "sampling": section["sampling"]}
    with torch.random.fork_rng(devices=[]), unfilled():
        if model["net"] is not None:
            made = build_model(spec, files=files)
            if config.lora is not None:
                begin(made, config.lora)
            if config.control is not None:
                freeze(made)
            return made
        objective = build(config.objective, "Objective")
        return build_autoencoder(spec, getattr(objective, "discriminator", None), getattr(objective, "train", "all"))


def _begun(config: Config) -> Config:
    """A configuration without the model to start from, where that is a run of a recipe that was not made yet: what it
    would be is known. One that is made over into another network counts as that.
    """
    if config.start is None or config.control is not None or config.method is not None:
        return config
    if config.reparameterise is not None:
        return config.model_copy(update={"start": None})
    place = Path(config.start)
    if place.exists() or place.parent != Path("runs") or place.name not in {one.name for one in recipes()}:
        return config
    found = _begun(load_config(place.name).config)
    return config.model_copy(update={"start": None, "model": found.model})


def _alone(slot: Any) -> Any:
    """A slot that needs no files: what they would tell, the rest of the recipe has to, unless it is an autoencoder that
    is there.
    """
    if not isinstance(slot, Mapping):
        return slot
    if "weights" in slot and slot.get("kind") in (LATENTS, TINY) and Path(str(slot["weights"])).expanduser().exists():
        return codec_from(slot)[0]
    kept = {name: value for name, value in slot.items() if name != "weights"}
    if isinstance(kept.get("parts"), list):
        kept["parts"] = [_alone(part) for part in kept["parts"]]
    return kept


def _counted(model: Model | AutoencoderModel, config: Config) -> tuple[int, int]:
    """Of one picture: floating-point operations forward, and bytes that are kept for backward; of an autoencoder
    without its discriminator's.
    """
    net = model.net.to("meta").train()
    if config.checkpointing and hasattr(net, "checkpointing"):
        net.checkpointing = True  # type: ignore[assignment]
    half = config.precision in ("bf16", "fp16", "auto")
    if isinstance(model, Model):
        channels, *sides = model.codec.shape(*model.size)
        channels = int(getattr(getattr(net, "config", None), "in_channels", channels))  # pictures may lie beside x
        x = torch.empty(1, channels, *sides, device="meta")
        told = {"t": torch.zeros(1, device="meta"), **_told(net, model)}
    else:
        x, told = torch.empty(1, 3, *model.size, device="meta"), {}
    seen: dict[int, int] = {}

    def pack(value: Tensor) -> Tensor:
        if not isinstance(value, nn.Parameter):
            seen[value.untyped_storage()._cdata] = value.numel() * value.element_size() // (2 if half else 1)
        return value

    counter = FlopCounterMode(display=False)
    with counter, torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
        net(x, **told)
    return counter.get_total_flops(), sum(seen.values())


def _told(net: nn.Module, model: Model) -> dict[str, Tensor]:
    """Conditions of one picture for a network, by the names of its arguments and the shape that its config says."""
    config: Any = getattr(net, "config", None)
    conditioner: Any = model.conditioner
    width, pooled = (int(getattr(config, name, 0) or 0) for name in ("context_dim", "pooled_dim"))
    length = int(getattr(conditioner, "length", 77) or 77)
    given: dict[str, Tensor] = {}
    for name in inspect.signature(net.forward).parameters:
        if name == "context" and width:
            given[name] = torch.empty(1, length, width, device="meta")
        elif name == "pooled" and pooled:
            given[name] = torch.empty(1, pooled, device="meta")
        elif name == "label" and bool(getattr(config, "classes", 0)):
            given[name] = torch.zeros(1, dtype=torch.long, device="meta")
    return given

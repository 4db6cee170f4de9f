"""A model: a denoiser with what stands at both of its ends, and the description it was built from."""

import shutil
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sfumato.catalogue import KINDS, build
from sfumato.codecs import Codec
from sfumato.conditioners import Conditioner, Raw
from sfumato.config import FILLED_IN
from sfumato.denoiser import Cond, Denoiser
from sfumato.errors import ConfigError, MachineError
from sfumato.registry import options_of, target_of


class Model(nn.Module):
    """Everything that is needed to sample.

    spec: {"model": the section of the config, "size": [height, width], "sampling": recommended settings}, plain data;
    `build_model` makes the same model of it. Weights are under `net.` and `conditioner.` (and `codec.` and `path.`
    where they have any).
    """

    def __init__(
        self, denoiser: Denoiser, conditioner: Conditioner | None, codec: Codec, spec: Mapping[str, Any]
    ) -> None:
        super().__init__()
        self.net = denoiser.net
        self.conditioner = conditioner
        self.codec = codec
        self.denoiser = denoiser
        self.spec = dict(spec)
        self.facts: dict[str, Any] = {}  # of its training, where it was loaded from a model directory

    @property
    def size(self) -> tuple[int, int]:
        """Height and width that it was trained for."""
        height, width = self.spec["size"]
        return int(height), int(width)

    def known(self, raw: Sequence[Raw]) -> list[dict[str, object]]:
        """Of raw conditions, as data sources give them, the fields that this model reads."""
        fields: tuple[str, ...] = tuple(getattr(self.conditioner, "fields", ()))
        return [{name: one[name] for name in fields if name in one} for one in raw]

    def cond(self, raw: Sequence[Raw]) -> Cond:
        """What the network is told for some raw conditions."""
        return {} if self.conditioner is None else self.conditioner(raw)

    def forward(self, x_t: Tensor, t: float | Tensor, cond: Cond | None = None) -> Tensor:
        """E[x0 | x_t]."""
        answer: Tensor = self.denoiser(x_t, t, cond)
        return answer

    def weights(self) -> dict[str, Tensor]:
        """Every weight and buffer once, detached, by the name it is stored under."""
        return {
            f"{name}.{key}": value for name, part in self.parts().items() for key, value in part.state_dict().items()
        }

    def trained(self) -> dict[str, nn.Parameter]:
        """The parameters that learn, by the same names."""
        named = ((f"{name}.{key}", p) for name, part in self.parts().items() for key, p in part.named_parameters())
        return {name: p for name, p in named if p.requires_grad}

    def parts(self) -> dict[str, nn.Module]:
        """What has weights, by the first part of their names."""
        parts: dict[str, object] = {"net": self.net, "conditioner": self.conditioner, "codec": self.codec}
        parts["path"] = self.denoiser.path  # a learned one
        return {name: part for name, part in parts.items() if isinstance(part, nn.Module)}


def build_model(spec: Mapping[str, Any], source: Any = None, files: Mapping[str, bytes] | None = None) -> Model:
    """The model that a spec describes, freshly initialised from torch's global generator.

    The conditioner learns its vocabulary from `source`, a data source, or takes it from `files` that it wrote once.
    What the network must know of its neighbours (`in_channels`, `context_dim`, `pooled_dim`, `classes`) is filled in
    from them.
    """
    section = spec["model"]
    codec = build(section["codec"], "Codec")
    conditioner = build(section["conditioner"], "Conditioner")
    if conditioner is not None and files is not None:
        conditioner.restore(files)
    elif conditioner is not None and source is not None:
        conditioner.prepare(source)
    height, width = spec["size"]
    if isinstance(conditioner, Conditioner):
        conditioner.of_size((int(height), int(width)))
    channels, inner_height, inner_width = codec.shape(height, width)
    known = {"size": (inner_height, inner_width), "in_channels": channels}
    known |= {name: getattr(conditioner, name, 0) for name in FILLED_IN[1:]}
    net = build(_filled(section["net"], known), "Net")
    denoiser = Denoiser(
        net,
        build(section["path"], "Path"),
        build(section["prediction"], "Prediction"),
        build(section["time_input"], "TimeInput"),
        build(section["scale_input"], "ScaleInput"),
    )
    return Model(denoiser, conditioner, codec, spec)


def _filled(slot: Mapping[str, Any], known: Mapping[str, Any]) -> dict[str, Any]:
    """A network's slot with what its surroundings decide, as far as it has such options and they are not set."""
    target = target_of(str(slot["kind"]), KINDS["Net"])
    options = options_of(target) if target else None
    fitting = {name: value for name, value in known.items() if options is None or name in options}
    return {**fitting, **slot, **({"size": fitting["size"]} if "size" in fitting else {})}


def pick_device(name: str) -> torch.device:
    """The device of a name; "auto" is an accelerator if there is one. ConfigError for what torch cannot reach."""
    if name == "auto":
        accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        return accelerator or torch.device("cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(
            "this device cannot be used", where="device", seen=f"{name}: {str(error).splitlines()[0]}", fix="device=cpu"
        ) from None
    return device


def compile_net(net: nn.Module, device: torch.device, **options: Any) -> None:
    """Compiles a network in place (samplers never are). MachineError where the machine has no compiler for it."""
    if device.type == "cpu" and shutil.which("g++") is None and shutil.which("clang++") is None:
        raise MachineError(
            "compiling for a CPU needs a C++ compiler", where="compile", seen="no g++", fix="compile=false"
        )
    net.compile(**options)

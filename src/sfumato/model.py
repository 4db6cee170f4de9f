"""A model: a denoiser with what stands at both of its ends, and the description it was built from. Or an autoencoder
alone, while it is trained: the codec of models to come.
"""

import shutil
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Generator, Tensor, nn

from sfumato.catalogue import KINDS, build
from sfumato.codecs import Codec, Latents
from sfumato.conditioners import Conditioner, Raw
from sfumato.config import FILLED_IN
from sfumato.data.picture import Image
from sfumato.denoiser import JUMP, VARIANCE, Cond, Denoiser
from sfumato.errors import ConfigError, MachineError
from sfumato.objectives.autoencoding import Opponents
from sfumato.registry import options_of, target_of


class Trainable(nn.Module):
    """What a run trains and a model directory keeps: named parts with weights, and the description they are built from.

    spec: {"model": the section of the config, "size": [height, width], "sampling": recommended settings}, plain data.
    facts: of its training, where it was loaded from a model directory.
    """

    net: nn.Module
    spec: dict[str, Any]
    facts: dict[str, Any]

    @property
    def size(self) -> tuple[int, int]:
        """Height and width that it was trained for."""
        height, width = self.spec["size"]
        return int(height), int(width)

    def learner(self, step: int | None, raw: Sequence[Raw]) -> Any:
        """What an objective is called with at a step, for a batch with these raw conditions; None is for judging, when
        nothing learns.
        """
        raise NotImplementedError

    def learned(self, step: int, steps: int) -> None:
        """Told that the weights have moved in step `step` (from 0) of `steps`."""

    def encode(self, images: Tensor) -> Tensor:
        """Pictures (B, 3, H, W) in [-1, 1] as the objective takes them."""
        raise NotImplementedError

    def cond(self, raw: Sequence[Raw]) -> Cond:
        """What the network is told for some raw conditions."""
        return {}

    def examples(self, images: Image | None, raw: Sequence[Raw], rng: Generator) -> Sequence[Raw]:
        """The raw conditions of pictures (B, H, W, 3) to train on, with what is made of the pictures themselves."""
        return raw

    def files(self) -> dict[str, bytes]:
        """What, beside weights, must be kept with it."""
        return {}

    def notes(self) -> tuple[str, ...]:
        """What a person should know of the data that it was prepared for."""
        return ()

    def compiled(self) -> list[nn.Module]:
        """The modules that are worth compiling."""
        return [self.net]

    def weights(self) -> dict[str, Tensor]:
        """Every weight and buffer once, detached, by the name it is stored under."""
        return {
            f"{name}.{key}": value for name, part in self.parts().items() for key, value in part.state_dict().items()
        }

    def trained(self) -> dict[str, nn.Parameter]:
        """The parameters that learn, by the same names."""
        named = ((f"{name}.{key}", p) for name, part in self.parts().items() for key, p in part.named_parameters())
        return {name: p for name, p in named if p.requires_grad}

    def moving(self) -> dict[str, Tensor]:
        """What changes in training, detached, by the same names: what learns, and what follows it."""
        return {name: p.detach() for name, p in self.trained().items()}

    def is_kept(self, name: str) -> bool:
        """Whether a weight belongs to what training is for; the others are in checkpoints only."""
        return True

    def clipped(self) -> list[list[nn.Parameter]]:
        """The parameters that learn, in groups whose gradients are clipped together."""
        return [list(self.trained().values())]

    def parts(self) -> dict[str, nn.Module]:
        """What has weights, by the first part of their names."""
        raise NotImplementedError


class Model(Trainable):
    """Everything that is needed to sample.

    `build_model` makes the same model of its spec. Weights are under `net.` and `conditioner.` (and `codec.` and
    `path.` where they have any).
    """

    def __init__(
        self, denoiser: Denoiser, conditioner: Conditioner | None, codec: Codec, spec: Mapping[str, Any]
    ) -> None:
        super().__init__()
        self.net = denoiser.net
        self.conditioner = conditioner
        self.codec = codec
        self.denoiser = denoiser
        self.spec, self.facts = dict(spec), {}

    def learner(self, step: int | None, raw: Sequence[Raw]) -> Any:
        return self.denoiser

    def encode(self, images: Tensor) -> Tensor:
        return self.codec.encode(images)

    def files(self) -> dict[str, bytes]:
        return {} if self.conditioner is None else self.conditioner.files()

    def notes(self) -> tuple[str, ...]:
        return () if self.conditioner is None else self.conditioner.notes

    def examples(self, images: Image | None, raw: Sequence[Raw], rng: Generator) -> Sequence[Raw]:
        return raw if self.conditioner is None else self.conditioner.examples(images, raw, rng)

    def known(self, raw: Sequence[Raw]) -> list[dict[str, object]]:
        """Of raw conditions, as data sources give them, the fields that this model reads."""
        fields: tuple[str, ...] = tuple(getattr(self.conditioner, "fields", ()))
        return [{name: one[name] for name in fields if name in one} for one in raw]

    def cond(self, raw: Sequence[Raw]) -> Cond:
        """What the network is told for some raw conditions."""
        return {} if self.conditioner is None else self.conditioner(raw)

    @property
    def answers(self) -> tuple[str, ...]:
        """What it can be asked for, see `sfumato.denoiser.Denoise`."""
        return self.denoiser.answers

    def forward(self, x_t: Tensor, t: float | Tensor, cond: Cond | None = None, **asked: Any) -> Tensor:
        """E[x0 | x_t], or another of the `answers`, as a `Denoiser` is asked."""
        answer: Tensor = self.denoiser(x_t, t, cond, **asked)
        return answer

    def parts(self) -> dict[str, nn.Module]:
        parts: dict[str, object] = {"net": self.net, "conditioner": self.conditioner, "codec": self.codec}
        parts["path"] = self.denoiser.path  # a learned one
        return {name: part for name, part in parts.items() if isinstance(part, nn.Module)}


class AutoencoderModel(Trainable):
    """An autoencoder that is trained, or was, and while it learns its discriminator. Weights are under `codec.`, as in
    the models that use it, and `discriminator.`.

    learning: what of it learns: "all", or "decoder"; None is what was trained already.
    """

    def __init__(
        self,
        codec: Latents,
        spec: Mapping[str, Any],
        discriminator: nn.Module | None = None,
        learning: str | None = None,
    ) -> None:
        super().__init__()
        self.codec, self.discriminator = codec, discriminator
        self.spec, self.facts = dict(spec), {}
        self.net = codec.autoencoder
        self.net.requires_grad_(learning is not None)
        if learning == "decoder":
            for part in (codec.autoencoder.encoder, codec.autoencoder.quant):
                part.requires_grad_(False)

    def learner(self, step: int | None, raw: Sequence[Raw]) -> Opponents:
        return Opponents(self.codec.autoencoder, self.discriminator, step)

    def encode(self, images: Tensor) -> Tensor:
        return images

    def compiled(self) -> list[nn.Module]:
        return [self.codec.autoencoder.encoder, self.codec.autoencoder.decoder]

    def is_kept(self, name: str) -> bool:
        return name.startswith("codec.")

    def clipped(self) -> list[list[nn.Parameter]]:
        """Each opponent for itself: the gradients of one say nothing of the other's."""
        named = self.trained()
        parts = [[p for name, p in named.items() if self.is_kept(name) == kept] for kept in (True, False)]
        return [part for part in parts if part]

    @torch.no_grad()
    def measure(self, batches: Iterable[Tensor], by: str) -> None:
        """Finds the scale that gives latents unit variance over some pictures, and puts it into codec and spec.

        by: "one" number for all channels, and no shift (Rombach et al. 2022, appendix D.1: 1 / the standard deviation);
        or a scale and a shift for each "channel".
        """
        means = torch.cat([self.codec.autoencoder.encode(batch).mean.double().cpu() for batch in batches])
        over = (0, 2, 3) if by == "channel" else (0, 1, 2, 3)
        spread = means.std(over).flatten().clamp(min=1e-6)
        shift = means.mean(over).flatten() if by == "channel" else torch.zeros(1, dtype=torch.float64)
        said = {"scale": (1 / spread).float(), "shift": shift.float()}
        self.codec.normalise(**said)
        told = {name: one.tolist() if by == "channel" else float(one) for name, one in said.items()}
        section = dict(self.spec["model"])
        self.spec = {**self.spec, "model": {**section, "codec": {**section["codec"], **told}}}

    def parts(self) -> dict[str, nn.Module]:
        parts: dict[str, nn.Module | None] = {"codec": self.codec, "discriminator": self.discriminator}
        return {name: part for name, part in parts.items() if part is not None}


def build_autoencoder(
    spec: Mapping[str, Any], discriminator: nn.Module | None = None, learning: str | None = None
) -> AutoencoderModel:
    """The autoencoder that a spec describes, freshly initialised; see `AutoencoderModel`."""
    codec = build(spec["model"]["codec"], "Codec")
    if not isinstance(codec, Latents):
        raise ConfigError(
            "only an autoencoder of latents can be trained",
            where="model.codec",
            seen=str(spec["model"]["codec"]),
            fix="model.codec=latents",
        )
    codec.shape(*spec["size"])
    return AutoencoderModel(codec, spec, discriminator, learning)


def build_model(spec: Mapping[str, Any], source: Any = None, files: Mapping[str, bytes] | None = None) -> Model:
    """The model that a spec describes, freshly initialised from torch's global generator.

    The conditioner learns its vocabulary from `source`, a data source, or takes it from `files` that it wrote once.
    What the network must know of its neighbours (`in_channels`, `context_dim`, `pooled_dim`, `classes`) is filled in
    from them, and `out_channels` and that it is told `until` from what the model is to answer.
    """
    section = spec["model"]
    codec = build(section["codec"], "Codec")
    conditioner = build(section["conditioner"], "Conditioner")
    if conditioner is not None and files is not None:
        conditioner.restore(files)
    elif conditioner is not None and source is not None:
        conditioner.prepare(source)
    height, width = spec["size"]
    channels, inner_height, inner_width = codec.shape(height, width)
    if isinstance(conditioner, Conditioner):
        conditioner.of_size((height, width))
        conditioner.of_codec(codec)
    told = int(getattr(conditioner, "channels", 0))  # beside x_t
    known = {"size": (inner_height, inner_width), "in_channels": channels + told}
    known |= {name: getattr(conditioner, name, 0) for name in (*FILLED_IN[1:], "unlabelled")}
    answers = tuple(section.get("answers") or ("x0",))
    if VARIANCE in answers or told:
        known["out_channels"] = (2 if VARIANCE in answers else 1) * channels
    if JUMP in answers:
        known["told"] = ["until"]
    net = build(_filled(section["net"], known), "Net")
    denoiser = Denoiser(
        net,
        build(section["path"], "Path"),
        build(section["prediction"], "Prediction"),
        build(section["time_input"], "TimeInput"),
        build(section["scale_input"], "ScaleInput"),
        answers,
    )
    return Model(denoiser, conditioner, codec, spec)


def _filled(slot: Mapping[str, Any], known: Mapping[str, Any]) -> dict[str, Any]:
    """A network's slot with what its surroundings decide, as far as it has such options and they are not set."""
    target = target_of(str(slot["kind"]), KINDS["Net"])
    options = options_of(target) if target else None
    taken = {"size", *FILLED_IN} if options is None else options  # of what cannot be looked into, the old promise
    fitting = {name: value for name, value in known.items() if name in taken}
    if "told" in fitting:
        slot = {**slot, "told": list(dict.fromkeys([*slot.get("told", ()), *fitting["told"]]))}
    inner = slot.get("net")  # of a network around another
    if isinstance(inner, Mapping):
        slot = {**slot, "net": _filled(inner, known)}
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

"""What of a model an adapter can change, and what each layer of it is called elsewhere.

A part is the network or a text encoder. Its table of names gives every dialect: diffusers' names as they are, or with
underscores for dots, as kohya writes them; the original's likewise. Networks that are ours alone have one name each.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import nn

from sfumato.catalogue import NAME_TABLES, NETS
from sfumato.io.keymap import DIFFUSERS, ORIGINAL, OURS, Line, line
from sfumato.model import Model
from sfumato.registry import resolve

Shape = tuple[int, ...]
NET, UNET, TRANSFORMER, TEXT = "net", "unet", "transformer", "text_encoder"
LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True)
class Part:
    """A part of a model.

    home: its place in a model, the first of our names. name: what diffusers' files call it. kohya: what kohya's do,
    without the last underscore. lines: its names in every layout. shapes: of the weights of its layers, by our names.
    flat: the layout whose names kohya's files flatten. module: itself, where there is a model.
    """

    home: str
    name: str
    kohya: tuple[str, ...]
    lines: Sequence[Line]
    shapes: Mapping[str, Shape]
    flat: str = DIFFUSERS
    module: nn.Module | None = None
    layouts: tuple[str, ...] = (DIFFUSERS, ORIGINAL)
    nicknames: tuple[str, ...] = field(default=())  # further beginnings of keys

    @property
    def is_text(self) -> bool:
        """Whether it is a text encoder of `transformers`."""
        return self.name.startswith(TEXT)

    @cached_property
    def beginnings(self) -> tuple[str, ...]:
        """What keys of this part begin with, in any dialect; the longest first."""
        flat = tuple(f"{one}_" for one in self.kohya)
        return tuple(sorted((*flat, f"{self.name}.", f"{self.home}.", *self.nicknames), key=len, reverse=True))

    @cached_property
    def places(self) -> dict[str, dict[str, tuple[int, int]]]:
        """For each layout, by dotted and by flattened name: which line it is, and which of its names."""
        found: dict[str, dict[str, tuple[int, int]]] = {}
        for layout in self.layouts:
            names = found[layout] = {}
            for i, one in enumerate(self.lines):
                for j, name in enumerate(one.names.get(layout, ())):
                    names[name] = names[name.replace(".", "_")] = (i, j)
        return found

    def knows(self, name: str) -> bool:
        """Whether a name, without what it begins with, is one of this part's in any layout."""
        return any(name in names for names in self.places.values())


def parts_of(model: Model) -> list[Part]:
    """The parts of a model: its network first, then its text encoders, or its own conditioner."""
    parts = [net_part(model.net, str(_kind(model.net)))]
    encoders = list(_encoders(model.conditioner))
    parts += [text_part(home, name, module, shapes_of(module)) for home, name, module in encoders]
    if not encoders and isinstance(model.conditioner, nn.Module):
        shapes = shapes_of(model.conditioner)
        if shapes:
            parts.append(_plain("conditioner", shapes, model.conditioner))
    return parts


def net_part(net: nn.Module, kind: str | None) -> Part:
    """The part of a network, by its kind in the catalogue."""
    shapes = shapes_of(net)
    table = _table(kind, net, shapes)
    if not table:
        return _plain(NET, shapes, net)
    name = UNET if kind == "stable_unet" else TRANSFORMER
    # kohya's scripts train SD 1 and 2 in diffusers' shape, everything later in the original's
    early = name == UNET and not getattr(net.config, "pooled_dim", 0)
    return Part(
        NET,
        name,
        ("lora_unet", "lora_transformer", "lora_prior_unet", "lycoris"),
        table,
        shapes,
        DIFFUSERS if early else ORIGINAL,
        net,
        nicknames=("unet.", "transformer.", "diffusion_model.", "model.diffusion_model."),
    )


def _table(kind: str | None, net: Any, shapes: Mapping[str, Shape]) -> list[Line]:
    """The lines of its layers, where there is a table that has them all."""
    for target in NAME_TABLES.get(str(kind), ()):
        table = resolve(target)(net.config)
        lines = [one for one in table if "weight" in one.leaves and all(name in shapes for name in one.names[OURS])]
        if {name for one in lines for name in one.names[OURS]} == set(shapes):
            return lines
    return []


def _plain(home: str, shapes: Mapping[str, Shape], module: nn.Module | None) -> Part:
    lines = [line(ours=name, diffusers=name, original=name) for name in shapes]
    return Part(home, home, (f"lora_{home}",), lines, shapes, DIFFUSERS, module, layouts=(DIFFUSERS,))


KOHYA_TEXT = {"clip": "lora_te1", "projected": "lora_te2", "t5": "lora_te3"}
COMFY_TEXT = {"clip": "clip_l", "projected": "clip_g", "t5": "t5xxl"}


def text_part(home: str, name: str, module: nn.Module | None, shapes: Mapping[str, Shape]) -> Part:
    """The part of a text encoder of `transformers`. name: its place in a folder of diffusers."""
    wrapped = {ours: ours if ours.startswith("text_model.") else f"text_model.{ours}" for ours in shapes}
    is_t5 = any(".SelfAttention." in ours for ours in shapes)
    lines = [line(ours=ours, diffusers=ours if is_t5 else wrapped[ours], original=ours) for ours in shapes]
    kind = "t5" if is_t5 else "projected" if name.endswith("_2") else "clip"
    kohya = (KOHYA_TEXT[kind], *(("lora_te",) if name == TEXT else ()))
    comfy = tuple(
        f"{start}{COMFY_TEXT[kind]}.{end}" for start in ("text_encoders.", "") for end in ("transformer.", "")
    )
    return Part(home, name, kohya, lines, shapes, DIFFUSERS, module, nicknames=comfy)


def _encoders(conditioner: object) -> Iterator[tuple[str, str, nn.Module]]:
    """The text encoders of `transformers` in a conditioner: where they are, what diffusers calls them, themselves."""
    if not isinstance(conditioner, nn.Module):
        return
    for place, one in conditioner.named_modules(prefix="conditioner"):
        encoder: Any = getattr(one, "encoder", None)
        if isinstance(encoder, nn.Module) and hasattr(encoder, "config") and hasattr(one, "tokenizer"):
            yield f"{place}.encoder", str(getattr(one, "part", TEXT)), encoder


def _kind(net: nn.Module) -> str | None:
    target = f"{type(net).__module__}:{type(net).__name__}"
    return next((kind for kind, there in NETS.items() if there == target), None)


def shapes_of(module: nn.Module) -> dict[str, Shape]:
    """The weights of its linear layers and convolutions, by name; a layer that peft has wrapped counts as it was."""
    return {name: tuple(one.weight.shape) for name, one in layers_of(module)}


def layers_of(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """Its linear layers and convolutions, by the names that they have without adapters.

    Convolutions of groups of channels are none: their weights are too small to have a rank.
    """
    for name, one in module.named_modules():
        if isinstance(one, LAYERS) and getattr(one, "groups", 1) == 1 and "lora_" not in name:
            yield name.removesuffix(".base_layer"), one


@dataclass(frozen=True)
class Architecture:
    """A published architecture without a model of it, for files that come alone."""

    name: str
    parts: tuple[Part, ...]


def architectures() -> Iterator[Architecture]:
    """All published sizes of the networks that have a table of names, with their text encoders."""
    for kind in NAME_TABLES:
        net = resolve(NETS[kind])
        for preset, config in resolve(NETS[kind].partition(":")[0] + ":PRESETS").items():
            with torch.device("meta"):
                made = net_part(net(config), kind)
            clips = [_clip_part(i, *size) for i, size in enumerate(_clips(kind, config))]
            yield Architecture(f"{kind} {preset}", (made, *clips))


def _clips(kind: str, config: Any) -> tuple[tuple[int, int], ...]:
    """Depth and width of the CLIP encoders beside a published network."""
    small, large = (12, 768), (32, 1280)
    if kind == "stable_unet":
        return {768: (small,), 1024: ((23, 1024),)}.get(config.context_dim, (small, large))
    return {"flux": (small,), "mmdit": (small, large)}.get(kind, ())


def _clip_part(i: int, depth: int, width: int) -> Part:
    home, name = ("conditioner.encoder", TEXT) if i == 0 else (f"conditioner.encoders.{i}", f"{TEXT}_{i + 1}")
    return text_part(home, name, None, _clip(depth, width))


def _clip(depth: int, width: int) -> dict[str, Shape]:
    found: dict[str, Shape] = {}
    for i in range(depth):
        for name in "kvq":
            found[f"encoder.layers.{i}.self_attn.{name}_proj"] = (width, width)
        found[f"encoder.layers.{i}.self_attn.out_proj"] = (width, width)
        found[f"encoder.layers.{i}.mlp.fc1"] = (4 * width, width)
        found[f"encoder.layers.{i}.mlp.fc2"] = (width, 4 * width)
    return found

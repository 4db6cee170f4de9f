"""LoRA in a living model (Hu et al. 2022), by peft's injection: layers are wrapped, weights stay what they are.

Several adapters live side by side, each with a scale, and the answer is the sum of what they change; switching costs
nothing. Merged, they cost nothing either: the sum is put into the weights, and what was there is kept to be put back,
bit for bit.
"""

import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sfumato.adapters.factors import Factors, merged
from sfumato.adapters.parts import Part, parts_of
from sfumato.adapters.reading import Adapter, read_adapter
from sfumato.errors import ConfigError, MachineError, nearest
from sfumato.hub import located, place_of
from sfumato.model import Model

DORA = "_dora"  # how peft's names of DoRAs end here


def peft() -> Any:
    """The library, which is needed for living adapters only."""
    try:
        import peft as library
    except ImportError as error:
        raise MachineError(
            "LoRA needs the library peft", where="adapters", seen=str(error), fix="pip install 'sfumato[lora]'"
        ) from None
    return library


# Injection


def inject(module: nn.Module, name: str, changes: Mapping[str, Factors]) -> list[str]:
    """Known factors for layers of a module; the names under which peft has them: DoRAs are a group of their own."""
    made = []
    for dora in (False, True):
        some = {layer: one for layer, one in changes.items() if (one.magnitude is not None) == dora}
        if not some:
            continue
        made.append(f"{name}{DORA}" if dora else name)
        ranks = {one.rank for one in some.values()}
        pattern = {_any([key for key, one in some.items() if one.rank == r]): r for r in ranks}
        with torch.random.fork_rng(devices=[]):  # what is initialised is overwritten: the caller's draws stay
            inject_as(module, made[-1], list(some), r=1, lora_alpha=1, rank_pattern=pattern, use_dora=dora)
        for layer, one in some.items():
            _fill(module.get_submodule(layer), made[-1], one)
    return made


def inject_as(module: nn.Module, name: str, layers: Sequence[str], **options: Any) -> None:
    """New factors for exactly these layers. options: of peft's LoraConfig."""
    library = peft()
    config = library.LoraConfig(target_modules=_any(layers, anchored=False), **options)
    training = module.training
    with warnings.catch_warnings():  # that there are several adapters is meant
        warnings.simplefilter("ignore")
        library.inject_adapter_in_model(config, module, adapter_name=name)
    module.train(training)


def _any(names: Sequence[str], anchored: bool = True) -> str:
    """One pattern for exactly these names: peft tries each of many at each layer, and compiles them anew."""
    return ("^" if anchored else "") + "(" + "|".join(re.escape(name) for name in names) + ")"


@torch.no_grad()
def _fill(layer: Any, name: str, one: Factors) -> None:
    down, up = layer.lora_A[name].weight, layer.lora_B[name].weight
    down.copy_(one.down.reshape(down.shape))
    up.copy_(one.up.reshape(up.shape))
    layer.lora_alpha[name] = one.alpha
    layer.set_scale(name, 1.0)
    if one.magnitude is not None:
        length = layer.lora_magnitude_vector[name].weight
        length.copy_(one.magnitude.reshape(length.shape))


def wrapped(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """The layers that peft has wrapped, by their plain names."""
    for name, one in module.named_modules():
        if hasattr(one, "lora_A") and hasattr(one, "base_layer"):
            yield name, one


def factors_in(layer: Any, name: str) -> Factors:
    """The factors of an adapter of a wrapped layer, which are its parameters themselves."""
    lengths = layer.lora_magnitude_vector
    length = lengths[name].weight.detach().flatten() if name in lengths else None
    down, up = (half[name].weight.detach() for half in (layer.lora_A, layer.lora_B))
    return Factors(down, up.flatten(1), float(layer.lora_alpha[name]), length)


def unwrap(module: nn.Module) -> None:
    """Puts the plain layers back where peft's have no adapter left."""
    for name, layer in list(wrapped(module)):
        if not layer.lora_A:
            parent, _, last = name.rpartition(".")
            setattr(module.get_submodule(parent), last, layer.base_layer)


# Into the weights


@torch.no_grad()
def merge_into(model: Model, adapters: Sequence[tuple[Adapter, float]]) -> None:
    """Puts the sum of some adapters, each with its scale, into the weights of a model without living ones."""
    for part in parts_of(model):
        assert part.module is not None
        found: dict[str, list[tuple[Factors, float]]] = {}
        for adapter, scale in adapters:
            for layer, one in adapter.of(part.home).items():
                found.setdefault(layer, []).append((one, scale))
        for layer, changes in found.items():
            weight: Any = part.module.get_submodule(layer).weight
            weight.copy_(merged(weight, changes))


# Living adapters


class Living:
    """The adapters of a model in use, by name, each with the scale it is at work with; 0 is at rest."""

    def __init__(self, model: Model) -> None:
        self.parts: list[Part] = parts_of(model)
        self.scales: dict[str, float] = {}
        self.sources: dict[str, str] = {}  # of those that were loaded, the file
        self._inside: dict[str, list[str]] = {}  # what peft calls them
        self._kept: list[tuple[nn.Parameter, Tensor]] = []  # of merged ones: a weight, and what it was
        self._count = 0

    @property
    def at_work(self) -> list[dict[str, Any]]:
        """Name, file and scale of each that changes anything, as plain data."""
        return [
            {"name": name, "file": self.sources.get(name), "scale": scale}
            for name, scale in self.scales.items()
            if scale
        ]

    @property
    def merged(self) -> bool:
        """Whether the changes are in the weights now."""
        return bool(self._kept)

    def load(self, path: str | Path, scale: float = 1.0, name: str | None = None) -> str:
        """The adapter in a file or folder, here or on the hub, of any dialect; its name, the file's unless said."""
        place = place_of(path)
        there = located(path)
        stem = name or (str(place) if place else there.stem if there.is_file() else there.name)
        self.add(stem, read_adapter(there, self.parts), scale)
        self.sources[stem] = str(place) if place else there.name
        return stem

    def add(self, name: str, adapter: Adapter, scale: float = 1.0) -> None:
        """An adapter beside the others. ConfigError for a name that is taken."""
        if name in self.scales:
            raise ConfigError("two adapters of one name", where="lora", seen=name, fix=f"{name}-2")
        self._apart()
        own, self._count = f"a{self._count}", self._count + 1
        made: set[str] = set()
        for part in self.parts:
            if (changes := adapter.of(part.home)) and part.module is not None:
                made.update(inject(part.module, own, changes))
        self._inside[name] = sorted(made)
        self.set({**self.scales, name: scale})

    def set(self, scales: Mapping[str, float]) -> None:
        """What is at work, and how strongly; those that are not named are at rest. ConfigError for unknown names."""
        for name, scale in scales.items():
            if name not in self._inside:
                raise ConfigError(
                    "no such adapter", where="lora", seen=name, fix=nearest(name, self._inside) or "load it first"
                )
            if not -torch.inf < scale < torch.inf:
                raise ConfigError("an adapter's scale is a number", where="lora", seen=f"{name}: {scale}", fix="1")
        self._apart()
        self.scales = {name: float(scales.get(name, 0.0)) for name in self._inside}
        working = dict(sorted(self._working(), key=lambda pair: not pair[0].endswith(DORA)))  # see `factors.merged`
        for layer in self._layers():
            for own, scale in working.items():
                layer.set_scale(own, scale)
            layer.set_adapter(list(working))
            layer.requires_grad_(False)

    def remove(self, name: str) -> None:
        """Takes one away; the last leaves the model as it was."""
        if name not in self._inside:
            raise ConfigError("no such adapter", where="lora", seen=name, fix=nearest(name, self._inside))
        self._apart()
        for layer in self._layers():
            for own in self._inside[name]:
                layer.delete_adapter(own)
        del self._inside[name], self.scales[name]
        self.sources.pop(name, None)
        for part in self.parts:
            if part.module is not None:
                unwrap(part.module)
        self.set(self.scales)

    @torch.no_grad()
    def merge(self) -> None:
        """Puts what is at work into the weights, which then cost no more than before; `unmerge` puts them back."""
        self._apart()
        working = self._working()
        for layer in self._layers():
            here = [(own, scale) for own, scale in working if own in layer.lora_A]
            if here:
                weight = layer.base_layer.weight
                self._kept.append((weight, weight.detach().to("cpu", copy=True)))
                weight.copy_(merged(weight, [(factors_in(layer, own), scale) for own, scale in here]))
            layer.set_adapter([])

    def unmerge(self) -> None:
        """The weights as they were, bit for bit, and the adapters beside them."""
        self.set(self.scales)

    @torch.no_grad()
    def _apart(self) -> None:
        for weight, before in self._kept:
            weight.copy_(before)
        self._kept.clear()

    def _working(self) -> list[tuple[str, float]]:
        """What peft calls those that change anything, and their scales."""
        return [(own, scale) for name, scale in self.scales.items() if scale for own in self._inside[name]]

    def _layers(self) -> Iterator[Any]:
        for part in self.parts:
            if part.module is not None:
                yield from (layer for _, layer in list(wrapped(part.module)))

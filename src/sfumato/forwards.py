"""The network of a pipeline as samplers ask it: in its precision, as a weaker variant, and under ControlNets.

A sampler knows only calls (x, t, cond). What answers one is decided here: the network's products are in half precision
where that is asked for, and nothing else is; guidance by something weaker (see `sfumato.guidance`) gets a variant of
the network, or another model, made when it is first asked for; and a network may have others beside it.
"""

import contextlib
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sfumato.controls import Control, Steered
from sfumato.denoiser import Cond, Denoiser, on_path
from sfumato.errors import ConfigError, MemoryShortage
from sfumato.guidance import Forward, Guidance
from sfumato.io.models import model_folder, read_model
from sfumato.model import Model
from sfumato.nets.controlled import Control as AnyControl
from sfumato.nets.controlled import Controlled
from sfumato.nets.flux import Flux
from sfumato.nets.mmdit import MMDiT
from sfumato.nets.stable_unet import StableUNet
from sfumato.nets.variants import variant


def weaker(denoiser: Denoiser, name: str, device: torch.device) -> Forward:
    """What answers for a variant on the path of a denoiser: that one's network with a part of it switched off (see
    `sfumato.nets.variants`), or another model, which is read ("model:FOLDER"). CheckpointError where that is none.
    """
    kind, _, folder = name.partition(":")
    if kind != "model":
        return variant(denoiser, name)
    other = read_model(model_folder(folder)).denoiser.to(device).requires_grad_(False)
    if other.path == denoiser.path:
        return other
    spoken = on_path(other, denoiser.path)
    return lambda x, t, cond, **asked: spoken(x, t, cond=cond, **asked)


class Forwards:
    """What a model answers on a device. kind: of the network's products, autocast unless it is float32."""

    def __init__(self, model: Model, device: torch.device, kind: torch.dtype) -> None:
        self.model, self.device, self.kind = model, device, kind
        self._variants: dict[str, Forward] = {}

    def forget(self) -> None:
        """Lets go of the variants, which are made of the network's layers: these have changed."""
        self._variants.clear()

    def own(self, x: Tensor, t: Tensor, cond: Cond, model: torch.nn.Module | None = None, **asked: Any) -> Tensor:
        """The model's answer, or that of another one in its place. MemoryShortage, and ConfigError for sizes that its
        network cannot have.
        """
        try:
            with self._autocast():
                answer: Tensor = (model or self.model)(x, t, cond, **asked)
            return answer
        except RuntimeError as error:
            raise self._explained(error, x) from error

    def variant(self, name: str) -> Callable[..., Tensor]:
        """The forward of a variant: a weaker one of the network itself, or another model ("model:FOLDER")."""
        if name not in self._variants:
            self._variants[name] = weaker(self.model.denoiser, name, self.device)
        answer = self._variants[name]

        def forward(x: Tensor, t: Tensor, cond: Cond, **asked: Any) -> Tensor:
            with self._autocast():
                said: Tensor = answer(x, t, cond, **asked)
            return said

        return forward

    def steered(
        self, controls: Sequence[Control], nets: Sequence[AnyControl], guide: Guidance
    ) -> tuple[Callable[..., Tensor], Guidance]:
        """The forward of the network under controls, and the guidance that tells it their pictures.

        nets: the network of each. ConfigError for a model that none can be beside.
        """
        own, denoiser = self.model.net, self.model.denoiser
        base, inside = (own.net, list(own.controls)) if isinstance(own, Controlled) else (own, [])
        if not isinstance(base, (StableUNet, MMDiT, Flux)):
            seen = type(base).__name__
            what = "only U-Nets of Stable Diffusion, MMDiTs and FLUX transformers are controlled"
            raise ConfigError(what, where="control", seen=seen)
        net = Controlled(base, [*inside, *nets])  # type: ignore[list-item]
        parts = (denoiser.path, denoiser.prediction, denoiser.time_input, denoiser.scale_input, denoiser.answers)
        steered = Denoiser(net, *parts).eval()
        hints = [one.hint(net, self.device, self.model.codec) for one, net in zip(controls, nets, strict=True)]
        return partial(self.own, model=steered), Steered(guide, controls, hints, len(inside))

    def _explained(self, error: RuntimeError, x: Tensor) -> Exception:
        """A failure of the network as an error of the user's, where it is one."""
        first = str(error).splitlines()[0] if str(error) else ""
        if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error):
            return MemoryShortage(
                "so many pictures at a time do not fit into memory",
                where="batch",
                seen=f"{len(x)} rows: {first}",
                fix="a smaller batch",
            )
        trained = self.model.codec.shape(*self.model.size)
        if tuple(x.shape[1:]) != tuple(trained):
            height, width = self.model.size
            return ConfigError(
                "this network cannot draw pictures of this size",
                where="size",
                seen=first,
                fix=f"size=({height}, {width}), that of its training",
            )
        return error

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        if self.kind == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, self.kind)

"""A frozen network under controls: what they say of their pictures is added up, and to what passes through it.

A control of a U-Net speaks to its skips (`controlnet`), one of a transformer to the tokens after its blocks
(`control_mmdit`, `control_flux`). All begin by saying nothing, and each is weighted by a scale.
"""

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from sfumato.errors import ConfigError
from sfumato.nets.control_flux import FluxControl, FluxControlConfig
from sfumato.nets.control_mmdit import MMDiTControl, MMDiTControlConfig
from sfumato.nets.controlnet import ControlNet, ControlNetConfig
from sfumato.nets.flux import Flux
from sfumato.nets.mmdit import MMDiT
from sfumato.nets.stable_unet import StableUNet

HINT, SCALE = "hint", "hint_scale"  # arguments of a controlled network; of the second control "hint1", "hint_scale1"
MODE = "hint_mode"  # of controls of several kinds, which of them
Net = nn.Module
Control = ControlNet | MMDiTControl | FluxControl
ControlConfig = ControlNetConfig | MMDiTControlConfig | FluxControlConfig
Base = StableUNet | MMDiT | Flux
KINDS: Mapping[type[Any], type[Any]] = {StableUNet: ControlNet, MMDiT: MMDiTControl, Flux: FluxControl}


class Controlled(nn.Module):
    """A network under controls.

    The picture of the first is the argument `hint`, with `hint_scale` (B,) where it is not 1, and `hint_mode` (B,) for
    a control of several kinds; of the second `hint1`, `hint_scale1`, `hint_mode1`. A picture is (B, colours, H, W) in
    [0, 1], or, where the control's config says `latents`, encoded (B, C, h, w). A control without a picture says
    nothing. A network that is told pictures beside x_t does not share them: a control with fewer input channels sees
    the first ones. ConfigError for a control of another kind of network.
    """

    def __init__(self, net: Base, controls: Sequence[Control]) -> None:
        super().__init__()
        for control in controls:
            _fits(control, net)
        self.net, self.controls = net, nn.ModuleList(controls)

    @property
    def config(self) -> Any:
        """That of the network."""
        return self.net.config

    @property
    def checkpointing(self) -> bool:
        """Whether activations are made anew in the backward pass."""
        return self.net.checkpointing

    @checkpointing.setter
    def checkpointing(self, on: bool) -> None:
        for one in (self.net, *self.controls):
            one.checkpointing = on  # type: ignore[union-attr]

    def forward(self, x: Tensor, t: Tensor, **cond: Tensor) -> Tensor:
        found: list[Tensor | None] | None = None
        names = [[f"{one}{i or ''}" for one in (HINT, SCALE, MODE)] for i in range(len(self.controls))]
        asked = [[cond.pop(one, None) for one in each] for each in names]
        for control, (hint, scale, mode) in zip(self.controls, asked, strict=True):
            if hint is None:
                continue
            more = {} if mode is None else {"mode": mode}
            if getattr(control, "shares", False):  # of the network's own way in
                more["tokens"] = self.net.tokens(x)  # type: ignore[operator]
            said = control(x[:, : control.config.channels], t, hint=hint.to(x.dtype), **more, **cond)  # type: ignore[union-attr,index]
            if scale is not None:
                said = [one * scale.to(one.dtype).view(-1, *(1,) * (one.ndim - 1)) for one in said]
            placed = control.placed(said, self.net)  # type: ignore[operator]
            found = list(placed) if found is None else [_sum(*two) for two in zip(found, placed, strict=True)]
        out: Tensor = self.net(x, t, residuals=found, **cond)
        return out


def _sum(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    return other if one is None else one if other is None else one + other


def controlled(
    *,
    net: Net | None = None,
    hint: tuple[int, ...] = (16, 32, 96, 256),
    colours: int = 3,
    bgr: bool = False,
    unet: Mapping[str, object] | None = None,
    blocks: Mapping[str, object] | None = None,
) -> Controlled:
    """A frozen network under one control, which learns. hint, colours, bgr: of a U-Net's, see `ControlNetConfig`.

    unet: what in the shape of a U-Net's control is not as in the network's. blocks: of a transformer's control, what
    its shape says, that of its own blocks included; see `MMDiTControlConfig` and `FluxControlConfig`.
    """
    if not isinstance(net, (StableUNet, MMDiT, Flux)):
        seen = "nothing" if net is None else type(net).__name__
        fix = "start=A_RUN_OR_MODEL"
        what = "only U-Nets of Stable Diffusion, MMDiTs and FLUX transformers are controlled"
        raise ConfigError(what, where="model.net.net", seen=seen, fix=fix)
    control: Control
    if isinstance(net, StableUNet):
        shape = replace(net.config, **_plain(unet or {}))
        control = ControlNet(ControlNetConfig(shape, tuple(hint), colours, bgr))
    else:
        kind: Any = MMDiTControl if isinstance(net, MMDiT) else FluxControl
        options: Any = MMDiTControlConfig if isinstance(net, MMDiT) else FluxControlConfig
        own = {one.name for one in fields(options)}
        plain = _plain(blocks or {})
        inner = replace(net.config, **{name: value for name, value in plain.items() if name not in own})
        control = kind(options(inner, **{name: value for name, value in plain.items() if name in own}))
    return Controlled(net.requires_grad_(False), [control])


def _plain(said: Mapping[str, object]) -> dict[str, Any]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in said.items()}


SHAPES: Mapping[type[Any], tuple[str, ...]] = {
    StableUNet: ("channels", "blocks", "context_dim", "pooled_dim"),
    MMDiT: ("dim", "patch", "pooled_dim"),
    Flux: ("dim", "patch", "context_dim", "pooled_dim", "turning", "theta"),
}


def _fits(control: Control, net: Base) -> None:
    """ConfigError for a control of another network's kind or shape."""
    what, kind = "a control was made for another kind of model", KINDS[type(net)]
    if not isinstance(control, kind):
        seen = f"one of {type(control).__name__}, where the model's is {kind.__name__}"
        raise ConfigError(what, where="control", seen=seen)
    mine: Any = control.config.unet if isinstance(control, ControlNet) else control.config.net
    theirs: Any = net.config
    for name in SHAPES[type(net)]:
        if getattr(mine, name) != getattr(theirs, name):
            seen = f"{name} {getattr(mine, name)}, the model's {getattr(theirs, name)}"
            raise ConfigError(what, where="control", seen=seen)
    if mine.in_channels > theirs.in_channels:
        seen = f"{mine.in_channels} channels, the model has {theirs.in_channels}"
        raise ConfigError(what, where="control", seen=seen)


def device_of(control: Control) -> torch.device:
    """Where a control lies."""
    return next(control.parameters()).device

"""Numbers that networks are told beside the time: nothing at the start, of influence later, off unless told."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny import CONFIGS, SIZE, normal, stirred
from torch import Tensor, nn

from sfumato.errors import ConfigError
from sfumato.nets.controlled import Controlled
from sfumato.nets.controlnet import ControlNet
from sfumato.nets.dit import DiT
from sfumato.nets.flux import Flux
from sfumato.nets.layers import Numbers
from sfumato.nets.mmdit import MMDiT
from sfumato.nets.pixel_unet import PixelUNet, PixelUNetConfig
from sfumato.nets.stable_unet import StableUNet, StableUNetConfig
from sfumato.nets.unet import UNet

STABLE = StableUNetConfig(
    size=SIZE,
    in_channels=3,
    out_channels=3,
    channels=(8, 16),
    blocks=1,
    depths=(1, 1),
    heads=(2, 2),
    context_dim=6,
    groups=4,
)
PIXEL = PixelUNetConfig(size=SIZE, channels=(8, 16), blocks=1, heads=(0, 4), groups=4)
SHAPES: dict[str, tuple[Callable[[Any], nn.Module], Any]] = {
    "dit": (DiT, CONFIGS["dit"]),
    "unet": (UNet, CONFIGS["unet"]),
    "mmdit": (MMDiT, CONFIGS["mmdit"]),
    "flux": (Flux, CONFIGS["flux"]),
    "stable_unet": (StableUNet, STABLE),
    "pixel_unet": (PixelUNet, PIXEL),
}
NUMBERS = {"guidance": torch.tensor([1.5, 4.0]), "until": torch.tensor([0.0, 300.0])}
T = torch.tensor([200.0, 700.0])
every = pytest.mark.parametrize("kind", SHAPES)


def net_of(kind: str, *told: str, **changes: object) -> nn.Module:
    make, config = SHAPES[kind]
    return make(replace(config, told=told, **changes)).double().eval()


def said(net: nn.Module, **numbers: Tensor) -> Tensor:
    context = {"context": normal(2, 4, 6)} if isinstance(net, (StableUNet, Controlled)) else {}
    out: Tensor = net(normal(2, 3, *SIZE), T, **context, **numbers)
    return out


@every
def test_a_network_that_is_told_more_begins_by_saying_what_it_said(kind: str) -> None:
    before = stirred(net_of(kind))
    after = net_of(kind, "guidance", "until")
    missing, unexpected = after.load_state_dict(before.state_dict(), strict=False)
    assert not unexpected and {name.split(".")[0] for name in missing} == {"numbers"}
    assert torch.equal(said(after, **NUMBERS), said(before)) and said(before).abs().max() > 0.01


@every
def test_each_number_counts_and_its_weights_learn(kind: str) -> None:
    for name, value in NUMBERS.items():
        net = stirred(net_of(kind, name))
        y = said(net, **{name: value})
        y.square().sum().backward()
        for key, p in net.named_parameters():
            if key.startswith("numbers."):
                assert p.grad is not None and float(p.grad.abs().max()) > 0, key
        assert f"numbers.each.{name}.mlp.0.weight" in net.state_dict()
        other = said(net, **{name: value + torch.tensor([0.5, 0.0])})
        assert (other - y)[0].abs().max() > 1e-6 and torch.equal(other[1], y[1])


@every
def test_a_number_that_is_not_told_is_guidance_that_is_off_and_a_jump_of_no_length(kind: str) -> None:
    net = stirred(net_of(kind, "guidance", "until"))
    assert torch.equal(said(net), said(net, guidance=torch.ones(2), until=T))
    assert not torch.equal(said(net), said(net, **NUMBERS))


@every
def test_a_number_that_was_not_asked_for_is_passed_over(kind: str) -> None:
    net = stirred(net_of(kind))
    assert torch.equal(said(net, **NUMBERS), said(net))


def test_a_scale_that_a_published_shape_has_a_place_for_is_not_told_twice() -> None:
    flux, stable = net_of("flux", "guidance", "until", guidance=True), net_of("stable_unet", "guidance", guidance_dim=8)
    assert list(flux.numbers.each) == ["until"] and flux.guided is not None  # type: ignore[union-attr, arg-type]
    assert len(stable.numbers.each) == 0  # type: ignore[union-attr, arg-type]
    for net in (flux, stable):
        stirred(net)
        assert not torch.allclose(said(net, guidance=NUMBERS["guidance"]), said(net, guidance=torch.ones(2)))


def test_a_control_is_told_what_its_network_is() -> None:
    base = stirred(net_of("stable_unet", "until"))
    assert isinstance(base, StableUNet)
    net = Controlled(base, [stirred(ControlNet.of(base, hint=(4,)).double())])
    told = {"hint": normal(2, 3, *SIZE)}
    assert not torch.allclose(said(net, until=T, **told), said(net, until=T / 2, **told))
    assert torch.equal(said(net, **told), said(net, until=T, **told))


def test_what_no_network_knows_is_named() -> None:
    with pytest.raises(ConfigError, match="no such number") as caught:
        Numbers(["untl"], 8)
    assert caught.value.seen == "untl"

"""Heads on the features of every network: where they listen, what reaches what, and that it stays as it was."""

import pytest
import torch
from tiny import CONFIGS, conditions, inputs, made, normal, stirred
from torch import Tensor, nn

from sfumato.errors import ConfigError
from sfumato.nets.features import FeatureHeads, on_features
from sfumato.nets.stable_unet import StableUNet, StableUNetConfig
from sfumato.nets.variants import blocks

kinds = pytest.mark.parametrize("kind", CONFIGS)


def listened(kind: str, chosen: tuple[int | str, ...] = ()) -> tuple[nn.Module, FeatureHeads, dict[str, Tensor]]:
    changes = {"context_dim": 8, "pooled_dim": 6} if kind in ("mmdit", "flux") else {"context_dim": 8}
    net = made(kind, **changes)
    heads = stirred(on_features(net, blocks=chosen, width=8).double())
    return net, heads, conditions(net.config, n=3)


def judged(net: nn.Module, heads: FeatureHeads, x: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
    with heads.listening(net) as heard:
        net(x, t, **cond)
    return heads(heard, t / 1000, cond.get("pooled"))


@kinds
def test_each_picture_is_judged_by_itself_and_by_its_time(kind: str) -> None:
    net, heads, cond = listened(kind)
    x, t = inputs(3)
    whole = judged(net, heads, x, t, cond)
    assert whole.shape[0] == 3 and whole.shape[1] >= len(heads.places)
    for i in range(3):
        one = judged(net, heads, x[i : i + 1], t[i : i + 1], {name: value[i : i + 1] for name, value in cond.items()})
        torch.testing.assert_close(one[0], whole[i], rtol=1e-4, atol=1e-6)
    with heads.listening(net) as heard:
        net(x, t, **cond)
    assert not torch.allclose(heads(heard, t / 1000, cond.get("pooled")), heads(heard, t / 500, cond.get("pooled")))


@kinds
def test_the_network_answers_as_it_did_and_nothing_keeps_listening(kind: str) -> None:
    net, heads, cond = listened(kind)
    x, t = inputs(3)
    before = net(x, t, **cond)
    with heads.listening(net) as heard:
        assert torch.equal(net(x, t, **cond), before)
    kept = dict(heard)
    net(normal(3, 3, 8, 12, seed=9), t, **cond)
    assert set(heard) == set(heads.places) and all(heard[name] is kept[name] for name in kept)
    assert not any(module._forward_hooks for module in net.modules())


@kinds
def test_every_weight_of_every_head_learns_and_pictures_feel_it(kind: str) -> None:
    net, heads, cond = listened(kind, (0, "middle", -1))
    x, t = inputs(3)
    net.requires_grad_(False)
    judged(net, heads, x.requires_grad_(), t, cond).sum().backward()
    assert x.grad is not None and float(x.grad.abs().max()) > 0
    assert all(p.grad is not None and float(p.grad.abs().max()) > 0 for p in heads.parameters())
    assert heads.places[0] == blocks(net)[0] and heads.places[-1] == blocks(net)[-1]


def test_a_summary_of_the_prompt_is_told() -> None:
    net, heads, cond = listened("mmdit")
    x, t = inputs(3)
    with heads.listening(net) as heard:
        net(x, t, **cond)
    said = heads(heard, t, cond["pooled"])
    assert not torch.allclose(said, heads(heard, t, cond["pooled"] + 1))


@pytest.mark.parametrize("place", ["middle", "entry"])
def test_published_u_nets_are_heard_by_the_names_of_their_modules(place: str) -> None:
    config = StableUNetConfig(size=8, channels=(8, 16), depths=(1, 0), heads=(2, 2), groups=4, context_dim=8)
    net = StableUNet(config)
    heads = on_features(net, blocks=(place,))
    x, t = torch.randn(2, config.in_channels, 8, 8), torch.tensor([3.0, 500.0])
    said = judged(net, heads, x, t, {"context": torch.randn(2, 5, 8)})
    assert said.shape == (2, 16 if place == "middle" else 64)


def test_what_cannot_be_listened_to_is_named() -> None:
    net = made("dit")
    for wrong in (7, -3, "nowhere", "blocks"):
        with pytest.raises(ConfigError, match="no such block"):
            on_features(net, blocks=(wrong,))
    with pytest.raises(ConfigError, match="no such block"):
        on_features(nn.Linear(2, 2))
    with pytest.raises(ConfigError, match="how wide"):
        on_features(nn.Sequential(nn.Linear(2, 2, bias=False)), blocks=("0",))
    with pytest.raises(ConfigError, match="width"):
        on_features(net, width=0)

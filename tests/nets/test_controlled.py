"""ControlNet: what every network promises, and its own shape. Parity is in `tests/parity`."""

from dataclasses import replace

import pytest
import torch
from test_stable_unet import CONFIG, told
from tiny import normal, stirred
from torch import Tensor

from sfumato.errors import ConfigError
from sfumato.nets.controlled import Controlled, controlled
from sfumato.nets.controlnet import ControlNet, ControlNetConfig
from sfumato.nets.stable_unet import StableUNet, StableUNetConfig


def hint(n: int = 3, colours: int = 3, seed: int = 7) -> Tensor:
    return normal(n, colours, 16, 24, seed=seed).abs()


def made(**changes: object) -> Controlled:
    net = stirred(StableUNet(CONFIG).double())
    controls = [ControlNet.of(net, hint=(4, 6), **changes), ControlNet.of(net, hint=(3, 5))]
    return stirred(Controlled(net, controls), seed=1).eval()


def test_a_fresh_control_changes_nothing_and_learns() -> None:
    net, (x, t, cond) = stirred(StableUNet(CONFIG).double()).eval(), told()
    fresh = Controlled(net, [ControlNet.of(net, hint=(4, 6))])
    control = fresh.controls[0]
    assert isinstance(control, ControlNet) and control.entry.weight.dtype == torch.float64
    y = fresh(x, t, hint=hint(), **cond)
    torch.testing.assert_close(y, net(x, t, **cond), rtol=0, atol=0)
    y.square().sum().backward()
    for leave in [*control.leave, control.leave_middle]:
        assert leave.weight.grad is not None and float(leave.weight.grad.abs().max()) > 0  # type: ignore[union-attr]


def test_a_control_begins_with_the_weights_of_the_u_net() -> None:
    net = stirred(StableUNet(CONFIG))
    control, base = ControlNet.of(net, hint=(4, 6)).state_dict(), net.state_dict()
    shared = control.keys() & base.keys()
    assert all(torch.equal(control[name], base[name]) for name in shared)
    assert {name.split(".")[0] for name in control.keys() - shared} == {"hint", "leave", "leave_middle"}
    assert {name.split(".")[0] for name in base.keys() - shared} == {"up", "norm", "exit"}


def test_every_input_counts_and_every_weight_learns() -> None:
    net, (x, t, cond) = made(), told()
    whole = {
        **cond,
        "hint": hint(),
        "hint1": hint(seed=8),
        "hint_scale": normal(3).abs(),
        "hint_scale1": normal(3).abs(),
    }
    y = net(x, t, **whole)
    y.square().sum().backward()
    for name, p in net.named_parameters():
        assert p.grad is not None and float(p.grad.abs().max()) > 0, name
    for name, value in whole.items():
        assert not torch.allclose(net(x, t, **{**whole, name: value + 1}), y, atol=1e-6), name


def test_what_controls_say_is_scaled_and_added_up() -> None:
    net, (x, t, cond) = made(), told()
    parts = [control(x, t, hint=hint(seed=7 + i), **cond) for i, control in enumerate(net.controls)]
    scale = torch.tensor([0.5, 2.0, 0.0], dtype=torch.float64)
    both = [scale[:, None, None, None] * a + b for a, b in zip(*parts, strict=True)]
    expected = net.net(x, t, residuals=both, **cond)
    torch.testing.assert_close(net(x, t, hint=hint(), hint_scale=scale, hint1=hint(seed=8), **cond), expected)
    only = net(x, t, hint1=hint(seed=8), **cond)
    torch.testing.assert_close(only[2], expected[2])
    torch.testing.assert_close(net(x, t, **cond), net.net(x, t, **cond))


def test_samples_of_a_batch_do_not_meet() -> None:
    net, (x, t, cond) = made(), told()
    cond = {**cond, "hint": hint(), "hint_scale": torch.tensor([0.5, 1, 2], dtype=torch.float64)}
    whole = net(x, t, **cond)
    for i in range(3):
        alone = net(x[i : i + 1], t[i : i + 1], **{name: value[i : i + 1] for name, value in cond.items()})
        torch.testing.assert_close(whole[i : i + 1], alone, rtol=0, atol=1e-12)


def test_padding_has_no_influence() -> None:
    net, (x, t, cond) = made(), told()
    mask = torch.arange(5)[None] < torch.tensor([[3], [5], [1]])
    other = torch.where(mask[..., None], cond["context"], torch.full_like(cond["context"], 9.0))
    one, two = (net(x, t, **{**cond, "context": c}, context_mask=mask, hint=hint()) for c in (cond["context"], other))
    torch.testing.assert_close(one, two)


def test_a_control_sees_the_first_channels_of_a_u_net_with_more() -> None:
    net = stirred(StableUNet(replace(CONFIG, in_channels=9)).double())
    control = stirred(ControlNet(ControlNetConfig(CONFIG, hint=(4, 6))).double())
    (x, t, cond), beside = told(), normal(3, 5, 8, 12, seed=9)
    y = Controlled(net, [control])(torch.cat([x, beside], 1), t, hint=hint(), **cond)
    said = control(x, t, hint=hint(), **cond)
    torch.testing.assert_close(y, net(torch.cat([x, beside], 1), t, residuals=said, **cond))


def test_checkpointing_changes_no_gradient() -> None:
    net, (x, t, cond) = made(), told()
    grads = []
    for on in (False, True):
        net.checkpointing = on
        assert all(one.checkpointing is on for one in (net, net.net, *net.controls))
        net.zero_grad()
        net(x, t, hint=hint(), hint1=hint(), **cond).square().sum().backward()
        grads.append([p.grad.clone() for p in net.parameters() if p.grad is not None])
    assert len(grads[0]) == len(list(net.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_half_precision_stays_close() -> None:
    net, (x, t, cond) = made(), told()
    whole = net(x, t, hint=hint(), **cond).float()
    with torch.autocast("cpu", torch.bfloat16):
        cond = {name: value.float() for name, value in cond.items()}
        half = net.float()(x.float(), t.float(), hint=hint().float(), **cond)
    assert float((half.float() - whole).norm() / whole.norm()) < 0.05


def test_the_base_of_a_slot_is_frozen() -> None:
    net = controlled(net=StableUNet(CONFIG), hint=(4, 6), unet={"depths": [0, 1]})
    assert not any(p.requires_grad for p in net.net.parameters())
    assert all(p.requires_grad for p in net.controls.parameters())
    assert net.config == CONFIG and net.controls[0].config.unet.depths == (0, 1)  # type: ignore[union-attr]


def test_what_cannot_be_is_named() -> None:
    net, (x, t, cond) = made(), told()
    with pytest.raises(ConfigError, match="2 times the size"):
        net(x, t, hint=normal(3, 3, 8, 12), **cond)
    with pytest.raises(ConfigError, match="multiples of 2"):
        net.controls[0](normal(3, 4, 7, 8), t, hint=hint(), **cond)
    with pytest.raises(ConfigError, match="reads a picture"):
        ControlNet(ControlNetConfig(CONFIG, hint=()))
    other = StableUNetConfig(channels=(8,), depths=(1,), heads=(2,), groups=4)
    with pytest.raises(ConfigError, match="another kind of model"):
        Controlled(StableUNet(other), [ControlNet(ControlNetConfig(CONFIG))])
    for wrong in (None, torch.nn.Identity()):
        with pytest.raises(ConfigError, match="only U-Nets"):
            controlled(net=wrong)

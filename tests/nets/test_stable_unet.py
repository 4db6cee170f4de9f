"""Stable Diffusion's U-Net: what every network promises, and its own shape. Parity is in `tests/parity`."""

from dataclasses import replace

import pytest
import torch
from tiny import normal, stirred
from torch import Tensor

from sfumato.errors import ConfigError
from sfumato.nets.stable_unet import StableUNet, StableUNetConfig, preset

CONFIG = StableUNetConfig(
    size=8,
    channels=(8, 16),
    blocks=1,
    depths=(1, 2),
    heads=(2, 4),
    context_dim=6,
    pooled_dim=5,
    guidance_dim=8,
    groups=4,
)


def made(**changes: object) -> StableUNet:
    return stirred(StableUNet(replace(CONFIG, **changes)).double()).eval()  # type: ignore[arg-type]


def told(n: int = 3) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    cond = {"context": normal(n, 5, 6, seed=1), "pooled": normal(n, 5, seed=2), "guidance": normal(n, seed=3).abs()}
    return normal(n, 4, 8, 12), torch.linspace(3, 900, n, dtype=torch.float64), cond


def test_every_input_counts_and_every_weight_learns() -> None:
    net, (x, t, cond) = made(), told()
    y = net(x, t, **cond)
    assert y.shape == x.shape
    y.square().sum().backward()
    for name, p in net.named_parameters():
        assert p.grad is not None and float(p.grad.abs().max()) > 0, name
    for name, value in cond.items():
        assert not torch.allclose(net(x, t, **{**cond, name: value + 1}), y, atol=1e-6), name
    assert not torch.allclose(net(x, t + 50, **cond), y, atol=1e-6)


def test_samples_of_a_batch_do_not_meet() -> None:
    net, (x, t, cond) = made(), told()
    whole = net(x, t, **cond)
    for i in range(3):
        alone = net(x[i : i + 1], t[i : i + 1], **{name: value[i : i + 1] for name, value in cond.items()})
        torch.testing.assert_close(whole[i : i + 1], alone, rtol=0, atol=1e-12)


def test_padding_has_no_influence() -> None:
    net, (x, t, cond) = made(), told()
    mask = torch.arange(5)[None] < torch.tensor([[3], [5], [1]])
    other = {**cond, "context": torch.where(mask[..., None], cond["context"], torch.full_like(cond["context"], 9.0))}
    torch.testing.assert_close(net(x, t, **cond, context_mask=mask), net(x, t, **other, context_mask=mask))


def test_a_fresh_network_answers_zero_and_conditions_may_be_missing() -> None:
    x, t, _ = told()
    assert float(StableUNet(CONFIG).double()(x, t).abs().max()) == 0
    assert bool(made()(x, t).isfinite().all())


def test_checkpointing_changes_no_gradient() -> None:
    net, (x, t, cond) = made(), told()
    grads = []
    for on in (False, True):
        net.checkpointing = on
        net.zero_grad()
        net(x, t, **cond).square().sum().backward()
        grads.append([p.grad.clone() for p in net.parameters() if p.grad is not None])
    assert net.checkpointing and all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_half_precision_stays_close() -> None:
    net, (x, t, cond) = made(), told()
    whole = net(x, t, **cond).float()
    with torch.autocast("cpu", torch.bfloat16):
        half = net.float()(x.float(), t.float(), **{name: value.float() for name, value in cond.items()})
    assert float((half.float() - whole).norm() / whole.norm()) < 0.05


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"depths": (1,)}, "depths"),
        ({"heads": (2, 3)}, "heads"),
        ({"groups": 3}, "groups"),
        ({"context_dim": 0}, "words"),
    ],
)
def test_shapes_that_cannot_be_are_named(change: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        made(**change)


def test_sizes_that_cannot_be_halved_are_named() -> None:
    net, (_, t, cond) = made(), told()
    with pytest.raises(ConfigError, match="multiples of 2"):
        net(normal(3, 4, 7, 8), t, **cond)


def test_presets() -> None:
    assert preset("sdxl").context_dim == 2048 and preset("sd15", in_channels=9).in_channels == 9
    with pytest.raises(ConfigError, match="sd21"):
        preset("sd3")

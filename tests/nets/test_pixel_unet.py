"""The U-Net of DDPM, ADM and consistency models: what every network promises, and its own shape. Parity with others is
in `tests/parity`.
"""

from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny import normal, stirred
from torch import Tensor, nn

from sfumato.errors import ConfigError
from sfumato.nets.pixel_unet import PRESETS, PixelUNet, PixelUNetConfig, preset
from sfumato.nets.variants import variant

CONFIG = PixelUNetConfig(
    size=8,
    channels=(8, 16),
    blocks=1,
    heads=(0, 4),
    middle=2,
    modulation="scale",
    resample="block",
    classes=3,
    groups=4,
)
DDPM = {"modulation": "add", "resample": "convolution", "pad_after": True, "sines_first": True, "include_end": True}
kinds = pytest.mark.parametrize("changes", [{}, DDPM, {"resample": "convolution"}], ids=["adm", "ddpm", "mixed"])

# Millions of parameters: Ho et al. 2020 (appendix B), Dhariwal & Nichol 2021 (table 12 and appendix I)
PUBLISHED = {"ddpm-32": 35.7, "ddpm-256": 114, "adm-64": 296, "adm-128": 422, "adm-256": 554, "adm-512": 559}


def made(**changes: object) -> PixelUNet:
    return stirred(PixelUNet(replace(CONFIG, **changes)).double()).eval()  # type: ignore[arg-type]


def told(n: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    return normal(n, 3, 8, 12), torch.linspace(3, 900, n, dtype=torch.float64), torch.arange(n) % 3


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes(name: str) -> None:
    with torch.device("meta"):
        count = sum(p.numel() for p in PixelUNet(PRESETS[name]).parameters())
    digits = 1 if PUBLISHED[name] < 100 else 0
    assert round(count / 1e6, digits) == PUBLISHED[name]


def test_presets_change_and_are_named() -> None:
    assert preset("adm-64", classes=10).classes == 10 and preset("adm-64").classes == 1000
    with pytest.raises(ConfigError, match="ddpm-32"):
        preset("adm-1024")


@kinds
def test_every_input_counts_and_every_weight_learns(changes: dict[str, Any]) -> None:
    net, (x, t, label) = made(**changes), told()
    y = net(x, t, label=label)
    assert y.shape == x.shape
    y.square().sum().backward()
    for name, p in net.named_parameters():
        assert p.grad is not None and float(p.grad.abs().max()) > 0, name
    assert not torch.allclose(net(x, t, label=(label + 1) % 3), y, atol=1e-6)
    assert not torch.allclose(net(x, t + 50, label=label), y, atol=1e-6)


@kinds
def test_samples_of_a_batch_do_not_meet(changes: dict[str, Any]) -> None:
    net, (x, t, label) = made(**changes), told()
    whole = net(x, t, label=label)
    for i in range(3):
        alone = net(x[i : i + 1], t[i : i + 1], label=label[i : i + 1])
        torch.testing.assert_close(whole[i : i + 1], alone, rtol=0, atol=1e-12)


def test_a_fresh_network_answers_zero_and_its_attention_is_the_identity() -> None:
    x, t, label = told()
    net = PixelUNet(replace(CONFIG, out_channels=6)).double()
    assert torch.equal(net(x, t, label=label), torch.zeros(3, 6, 8, 12, dtype=torch.float64))
    h = normal(2, 16, 4, 6)
    assert torch.equal(net.middle.layer(h), h)


def test_no_label_is_the_last_label_where_there_is_one() -> None:
    net, (x, t, _) = made(), told()
    assert torch.equal(net(x, t), net(x, t, label=torch.tensor([3, 3, 3])))
    bare = made(unlabelled=False)
    assert bare.label is not None and bare.label.num_embeddings == 3
    with pytest.raises(ConfigError, match="without a class"):
        bare(x, t)
    assert made(classes=0)(x, t).isfinite().all()


@kinds
def test_checkpointing_changes_no_gradient(changes: dict[str, Any]) -> None:
    net, (x, t, label) = made(dropout=0.3, **changes).train(), told()
    found, runs = [], []
    layer = next(module for module in net.modules() if isinstance(module, nn.Dropout))
    layer.register_forward_hook(lambda *_: runs.append(net.checkpointing))
    for on in (False, True):
        net.checkpointing = on
        torch.manual_seed(0)
        y = net(x, t, label=label)
        found.append([y, *torch.autograd.grad(y.square().mean(), list(net.parameters()))])
    assert all(torch.equal(one, two) for one, two in zip(*found, strict=True))
    assert runs.count(True) == 2 * runs.count(False)  # it did recompute


def test_half_precision_stays_close() -> None:
    net, (x, t, label) = made(), told()
    want = net(x, t, label=label)
    got = net.bfloat16()(x.bfloat16(), t, label=label)  # times stay exact
    assert got.dtype == torch.bfloat16 and (got.double() - want).norm() < 0.05 * want.norm()


def test_its_waves_are_ddpms_or_adms() -> None:
    """DDPM: sines first, down to a frequency of 1 / 10000; ADM: cosines first, and one frequency before that."""
    t = torch.tensor([7.0, 900.0], dtype=torch.float64)
    for changes, last, first in ((DDPM, 1e-4, torch.sin), ({}, 1e4 ** (-3 / 4), torch.cos)):
        seen: list[Tensor] = []
        net = made(**changes)
        net.time.register_forward_pre_hook(lambda _, given, seen=seen: seen.append(given[0]))  # type: ignore[misc]
        net(normal(2, 3, 8, 12), t)
        waves = seen[0]
        torch.testing.assert_close(waves[:, 0], first(t))
        torch.testing.assert_close(waves[:, 3], first(t * last))


def test_the_halving_convolution_of_ddpm_looks_right_and_down() -> None:
    """Moving what it is given by one place changes what it answers: places are paired from the left, not about them."""
    for pad_after in (False, True):
        net = made(**{**DDPM, "pad_after": pad_after})
        down = net.down[1]
        h = torch.zeros(1, 8, 4, 4, dtype=torch.float64)
        h[:, :, 0, 0] = 1
        (out,) = down(h, None)
        weight, bias = down.conv.weight, down.conv.bias[:, None]
        corner = weight[:, :, 0, 0].sum(1) if pad_after else weight[:, :, 1, 1].sum(1)
        torch.testing.assert_close(out[:, :1, 0], corner[:, None] + bias)


def test_a_variant_leaves_attention_out() -> None:
    net, (x, t, label) = made(), told()
    y = net(x, t, label=label)
    for name in ("skip:0", "perturb:middle", "skip:2"):
        assert not torch.allclose(variant(net, name)(x, t, label=label), y, atol=1e-6)


@pytest.mark.parametrize(
    ("changes", "where", "said"),
    [
        ({"heads": (0, 4, 4)}, "heads", "one number a level"),
        ({"heads": (0, 5)}, "heads", "does not divide"),
        ({"middle": 3}, "heads", "does not divide"),
        ({"channels": (8, 18)}, "channels", "groups"),
        ({"channels": ()}, "channels", "width and a block"),
        ({"blocks": 0}, "channels", "width and a block"),
        ({"size": (8, 9)}, "channels", "halved"),
        ({"context_dim": 6}, "", "reads no words"),
    ],
)
def test_shapes_that_cannot_be_are_named(changes: dict[str, Any], where: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said) as caught:
        PixelUNet(replace(CONFIG, **changes))
    assert caught.value.where == f"model.net.{where}".rstrip(".")


def test_sizes_that_do_not_divide_are_named() -> None:
    with pytest.raises(ConfigError, match="multiples of 2"):
        made()(torch.zeros(1, 3, 8, 9, dtype=torch.float64), torch.zeros(1))

"""MMDiT: two streams and one attention. What every network promises is in `test_both`, parity in `tests/parity`."""

from dataclasses import replace

import pytest
import torch
from tiny import MMDIT, conditions, inputs, made, normal
from torch import Tensor, nn

from sfumato.errors import ConfigError
from sfumato.nets.layers import sincos_2d
from sfumato.nets.mmdit import MMDiT, MMDiTConfig, preset
from sfumato.nets.variants import blocks, variant
from sfumato.overlay import load_config
from sfumato.plan import built

FULL = {"classes": 3, "context_dim": 6, "pooled_dim": 5}


def padded() -> tuple[MMDiT, Tensor, Tensor, dict[str, Tensor], Tensor]:
    """A network, its inputs, and words of which the first sample has three and the second five."""
    net, (x, t) = made("mmdit", **FULL), inputs()
    assert isinstance(net, MMDiT)
    return net, x, t, conditions(net.config), torch.tensor([[True] * 3 + [False] * 2, [True] * 5])


@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("dual", [(), (0, 2)])
@pytest.mark.parametrize("told", [{}, {"context_dim": 6}, FULL])
def test_every_combination_of_options(qk_norm: bool, dual: tuple[int, ...], told: dict[str, int]) -> None:
    """A picture comes out as one, every condition changes it, and every weight learns that can."""
    net, (x, t) = made("mmdit", out_channels=4, qk_norm=qk_norm, dual=dual, **told), inputs()
    cond = conditions(net.config)
    y = net(x, t, **cond)
    assert y.shape == (2, 4, 8, 12)
    y.backward(normal(*y.shape))
    for name, p in net.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all()
        # the last block's words ask nothing: published weights have these queries nevertheless
        asks_in_vain = name.startswith(("blocks.2.text.attention.q.", "blocks.2.text.attention.q_norm."))
        assert (float(p.grad.abs().max()) > 0) != asks_in_vain, name
    for name, value in {"x": x, "t": t, **cond}.items():
        other = (value + 1) % 3 if name == "label" else value + 1
        answer = net(**{"x": x, "t": t, **cond, name: other})
        assert (answer - y).flatten(1).abs().amax(1).min() > 1e-6, name


def test_words_are_a_stream_of_their_own() -> None:
    """What the picture is changes what the words become, which the next block's picture sees."""
    net, x, t, cond, _ = padded()
    heard: list[Tensor] = []
    block = net.get_submodule("blocks.0.text")
    block.register_forward_hook(lambda module, given, said: heard.append(said))
    net(x, t, **cond)
    net(x + 1, t, **cond)
    assert heard[0].shape == (2, 5, 16) and not torch.allclose(heard[0], heard[1], atol=1e-6)


def test_padding_has_no_influence_and_a_mask_is_a_shorter_prompt() -> None:
    net, x, t, cond, mask = padded()
    y = net(x, t, **cond, context_mask=mask)
    noisy = {**cond, "context": cond["context"] + 100.0 * ~mask[..., None]}
    torch.testing.assert_close(net(x, t, **noisy, context_mask=mask), y, rtol=0, atol=0)
    short = {name: value[:1] for name, value in cond.items()} | {"context": cond["context"][:1, :3]}
    torch.testing.assert_close(net(x[:1], t[:1], **short), y[:1], rtol=0, atol=1e-12)
    assert (net(x, t, **cond)[0] - y[0]).abs().max() > 1e-6  # without a mask, padding is read


def test_no_words_are_as_words_that_are_all_masked() -> None:
    net, x, t, cond, mask = padded()
    none = {name: value for name, value in cond.items() if name != "context"}
    masked = net(x, t, **cond, context_mask=torch.zeros_like(mask))
    torch.testing.assert_close(net(x, t, **none), masked, rtol=0, atol=1e-12)
    assert torch.equal(net(x, t, **none, context_mask=mask), net(x, t, **none))
    assert net(x, t).isfinite().all()


def test_checkpointing_changes_no_gradient() -> None:
    """Dropout included: equal to the last bit, and each layer ran a second time."""
    net, (x, t) = made("mmdit", dropout=0.3, **FULL).train(), inputs()
    cond, found, runs = conditions(net.config), [], []
    layer = next(module for module in net.modules() if isinstance(module, nn.Dropout))
    layer.register_forward_hook(lambda *_: runs.append(net.checkpointing))
    for on in (False, True):
        net.checkpointing = on
        torch.manual_seed(0)
        y = net(x, t, **cond)
        found.append([y, *torch.autograd.grad(y.square().mean(), list(net.parameters()))])
    assert all(torch.equal(one, two) for one, two in zip(*found, strict=True))
    assert runs.count(True) == 2 * runs.count(False)


def test_half_precision_by_autocast() -> None:
    net, (x, t) = made("mmdit", qk_norm=True, **FULL).float(), inputs()
    x, t = x.float(), t.float()
    cond = {k: value.float() if value.is_floating_point() else value for k, value in conditions(net.config).items()}
    want = net(x, t, **cond)
    with torch.autocast("cpu", torch.bfloat16):
        got = net(x, t, **cond)
    assert (got.float() - want).norm() < 0.03 * want.norm()
    got.float().square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())


# Positions


def test_the_table_is_cut_in_the_middle() -> None:
    net = MMDiT(replace(MMDIT, table=9))
    whole = net.positions.reshape(9, 9, 16)
    assert torch.equal(net._places(2, 5)[0], whole[3:5, 2:7].flatten(0, 1))
    assert torch.equal(net._places(9, 9), net.positions)


def test_places_stand_a_step_apart() -> None:
    net = MMDiT(MMDiTConfig(size=12, patch=2, dim=16, depth=1, heads=2, table=12, step=0.5))
    plain = MMDiT(MMDiTConfig(size=12, patch=2, dim=16, depth=1, heads=2))
    torch.testing.assert_close(plain.positions[0], sincos_2d(6, 6, 16))
    torch.testing.assert_close(net.positions[0].reshape(12, 12, 16)[::2, ::2].flatten(0, 1), plain.positions[0])


def test_where_a_patch_stands_counts() -> None:
    net, (x, t) = made("mmdit"), inputs()
    moved = net(x.roll(4, -1), t)
    assert not torch.allclose(moved, net(x, t).roll(4, -1), atol=1e-6)
    net.positions.zero_()  # without places, patches are a set
    torch.testing.assert_close(net(x.roll(4, -1), t), net(x, t).roll(4, -1))


# Variants for guidance


def test_blocks_can_be_skipped() -> None:
    net, x, t, cond, mask = padded()
    assert blocks(net) == ["blocks.0", "blocks.1", "blocks.2"]
    less = variant(net, "skip:1")
    shorter = MMDiT(replace(net.config, depth=2)).double().eval()
    state = net.state_dict()
    kept = {key.replace("blocks.2.", "blocks.1."): v for key, v in state.items() if not key.startswith("blocks.1.")}
    shorter.load_state_dict(kept)
    torch.testing.assert_close(less(x, t, **cond, context_mask=mask), shorter(x, t, **cond, context_mask=mask))
    with pytest.raises(ConfigError, match="cannot be perturbed"):
        variant(net, "perturb:1")


# What cannot be


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"heads": 3}, "heads"),
        ({"dim": 18}, "multiple of 4"),
        ({"size": (8, 10)}, "whole number of patches"),
        ({"table": 2}, "smaller than the picture"),
        ({"dual": (3,)}, "no such block"),
    ],
)
def test_shapes_that_cannot_be_are_named(change: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        made("mmdit", **change)


def test_pictures_larger_than_the_table_are_named() -> None:
    net, (x, t) = made("mmdit"), inputs(size=(8, 28))
    with pytest.raises(ConfigError, match="larger than the table") as caught:
        net(x, t)
    assert "24" in str(caught.value.fix)


def test_presets() -> None:
    assert preset("sd3.5-medium").dual == tuple(range(13)) and preset("sd3-medium", size=64).size == 64
    with pytest.raises(ConfigError, match="sd3-medium"):
        preset("sd2")


def test_the_recipe_at_full_size_is_the_published_network() -> None:
    net = built(load_config("sd3-medium").config).net
    assert isinstance(net, MMDiT)
    assert replace(net.config, size=128, out_channels=None) == preset("sd3-medium")
    assert sum(p.numel() for p in net.parameters()) == 2_028_328_000

"""FLUX: two streams, then one. What every network promises is in `test_both`, parity in `tests/parity`."""

import math
from dataclasses import replace

import pytest
import torch
from tiny import FLUX, conditions, inputs, made, normal
from torch import Tensor, nn

from sfumato.errors import ConfigError
from sfumato.nets.flux import Flux, FluxConfig, places, preset, turned
from sfumato.nets.variants import blocks, variant

FULL = {"classes": 3, "context_dim": 6, "pooled_dim": 5, "guidance": True}


def full(**changes: object) -> Flux:
    net = made("flux", **{**FULL, **changes})
    assert isinstance(net, Flux)
    return net


def padded() -> tuple[Flux, Tensor, Tensor, dict[str, Tensor], Tensor]:
    """A network, its inputs, and words of which the first sample has three and the second five."""
    net, (x, t) = full(), inputs()
    return net, x, t, conditions(net.config), torch.tensor([[True] * 3 + [False] * 2, [True] * 5])


@pytest.mark.parametrize("told", [{}, {"context_dim": 6}, FULL])
@pytest.mark.parametrize("shape", [{}, {"double": 0}, {"single": 0}, {"axes": (0, 4, 4), "mlp_ratio": 2.0}])
def test_every_combination_of_options(told: dict[str, object], shape: dict[str, object]) -> None:
    """A picture comes out as one, every condition changes it, and every weight learns that can."""
    net, (x, t) = made("flux", out_channels=4, **shape, **told), inputs()
    cond = conditions(net.config)
    y = net(x, t, **cond)
    assert y.shape == (2, 4, 8, 12)
    y.backward(normal(*y.shape))
    for name, p in net.named_parameters():
        # without single blocks, nobody sees what becomes of the words in the last double one; nor what they asked there
        last = "single" in shape and name.startswith("double_blocks.1.text.")
        heard = any(part in name for part in ("modulation", "heads.k", "heads.v"))
        assert p.grad is not None or (last and not heard), name
        assert (last and not heard) or (p.grad is not None and float(p.grad.abs().max()) > 0), name
    for name, value in {"x": x, "t": t, **cond}.items():
        other = (value + 1) % 3 if name == "label" else value + 1
        answer = net(**{"x": x, "t": t, **cond, name: other})
        assert (answer - y).flatten(1).abs().amax(1).min() > 1e-6, name


def test_words_are_a_stream_of_their_own_and_then_of_the_same_sequence() -> None:
    net, x, t, cond, _ = padded()
    heard: list[Tensor] = []
    net.get_submodule("double_blocks.0.text").register_forward_hook(lambda module, given, said: heard.append(said))
    net.get_submodule("single_blocks.0").register_forward_hook(lambda module, given, said: heard.append(given[0]))
    net(x, t, **cond)
    net(x + 1, t, **cond)
    assert [tuple(one.shape) for one in heard] == [(2, 5, 16), (2, 5 + 6, 16)] * 2
    assert not torch.allclose(heard[0], heard[2], atol=1e-6)  # the picture changed what the words become


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


def test_no_guidance_is_a_scale_of_one() -> None:
    net, x, t, cond, _ = padded()
    rest = {name: value for name, value in cond.items() if name != "guidance"}
    assert torch.equal(net(x, t, **rest), net(x, t, **rest, guidance=torch.ones(2, dtype=torch.float64)))
    untold = full(guidance=False)
    assert torch.equal(untold(x, t, **cond), untold(x, t, **rest))


def test_checkpointing_changes_no_gradient() -> None:
    """Dropout included: equal to the last bit, and each layer of both kinds of block ran a second time."""
    net, (x, t) = full(dropout=0.3).train(), inputs()
    cond, found, runs = conditions(net.config), [], []
    for layer in (module for module in net.modules() if isinstance(module, nn.Dropout)):
        layer.register_forward_hook(lambda *_: runs.append(net.checkpointing))
    for on in (False, True):
        net.checkpointing = on
        torch.manual_seed(0)
        y = net(x, t, **cond)
        found.append([y, *torch.autograd.grad(y.square().mean(), list(net.parameters()))])
    assert all(torch.equal(one, two) for one, two in zip(*found, strict=True))
    assert runs.count(True) == 2 * runs.count(False)


def test_half_precision_by_autocast() -> None:
    net, (x, t) = full().float(), inputs()
    x, t = x.float(), t.float()
    cond = {k: value.float() if value.is_floating_point() else value for k, value in conditions(net.config).items()}
    want = net(x, t, **cond)
    with torch.autocast("cpu", torch.bfloat16):
        got = net(x, t, **cond)
    assert (got.float() - want).norm() < 0.03 * want.norm()
    got.float().square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())


# Positions


def test_turns_by_hand() -> None:
    """Words do not turn, nor channels of the picture's number; pairs of neighbours turn by theta^(-2 i / d) a place."""
    cos, sin = places(2, 3, (2, 4, 4), before=1, theta=100.0)
    assert cos.shape == sin.shape == (1 + 6, 5)
    assert torch.equal(cos[0], torch.ones(5)) and torch.equal(sin[:, 0], torch.zeros(7))
    x = torch.zeros(1, 1, 7, 10)
    x[..., 8] = 1.0  # of the last pair, which turns with the column by 100^(-1/2)
    for row in range(2):
        for column in range(3):
            y = turned(x, (cos, sin))[0, 0, 1 + 3 * row + column]
            assert y[8:].tolist() == pytest.approx([math.cos(0.1 * column), math.sin(0.1 * column)], abs=1e-6)
    x = torch.zeros(1, 1, 7, 10)
    x[..., 3] = 1.0  # of the second pair, the first that turns with the row, by a radian
    y = turned(x, (cos, sin))[0, 0, 1 + 3 + 2]
    assert y[2:4].tolist() == pytest.approx([-math.sin(1), math.cos(1)], abs=1e-6)


def test_places_are_relative() -> None:
    """What a query makes of a key depends on how far apart they are, in both directions."""
    q, k = (normal(10, seed=seed).expand(1, 1, 12, 10) for seed in (1, 2))
    rope = places(3, 4, (2, 4, 4))
    logits = (turned(q, rope) @ turned(k, rope).mT)[0, 0].reshape(3, 4, 3, 4)
    torch.testing.assert_close(logits[0, 1, 1, 3], logits[1, 0, 2, 2], rtol=0, atol=1e-6)
    assert abs(float(logits[0, 1, 1, 3] - logits[0, 1, 2, 3])) > 1e-3
    assert abs(float(logits[0, 1, 1, 3] - logits[0, 1, 1, 2])) > 1e-3


def test_where_a_patch_stands_counts() -> None:
    net, (x, t) = made("flux"), inputs()
    assert not torch.allclose(net(x.roll(4, -1), t), net(x, t).roll(4, -1), atol=1e-6)


@pytest.mark.parametrize(("dim", "axes"), [(128, (16, 56, 56)), (64, (8, 28, 28)), (32, (4, 14, 14)), (8, (4, 2, 2))])
def test_axes_share_out_the_head(dim: int, axes: tuple[int, int, int]) -> None:
    assert FluxConfig(dim=dim, heads=1).turning == axes


# Variants for guidance


def test_blocks_can_be_skipped() -> None:
    net, x, t, cond, mask = padded()
    assert blocks(net) == ["double_blocks.0", "double_blocks.1", "single_blocks.0", "single_blocks.1"]
    less = variant(net, "skip:1,2")
    shorter = Flux(replace(net.config, double=1, single=1)).double().eval()
    state = net.state_dict()
    kept = {key: value for key, value in state.items() if not key.startswith(("double_blocks.1.", "single_blocks.0."))}
    shorter.load_state_dict({key.replace("single_blocks.1.", "single_blocks.0."): v for key, v in kept.items()})
    torch.testing.assert_close(less(x, t, **cond, context_mask=mask), shorter(x, t, **cond, context_mask=mask))
    with pytest.raises(ConfigError, match="cannot be perturbed"):
        variant(net, "perturb:1")


# What cannot be


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"heads": 3}, "heads"),
        ({"heads": 16}, "even width"),
        ({"size": (8, 10)}, "whole number of patches"),
        ({"axes": (4, 4, 4)}, "axes"),
        ({"axes": (2, 3, 3)}, "even numbers"),
        ({"double": 0, "single": 0}, "has a block"),
    ],
)
def test_shapes_that_cannot_be_are_named(change: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        made("flux", **change)


def test_presets() -> None:
    assert preset("dev").guidance and not preset("schnell", size=64).guidance
    assert preset("dev-fill").in_channels == 6 * preset("dev").in_channels and FLUX.patch == 4
    with pytest.raises(ConfigError, match="schnell"):
        preset("pro")

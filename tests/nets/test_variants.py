"""Variants: a network with a part switched off is the network whose weights switch that part off."""

import copy
from typing import Any

import pytest
import torch
from tiny import conditions, inputs, made
from torch import Tensor, nn

from sfumato.denoiser import Denoiser
from sfumato.errors import ConfigError
from sfumato.nets.layers import zeroed
from sfumato.nets.variants import blocks, variant
from sfumato.paths import Linear
from sfumato.predictions import VELOCITY

DEEP: dict[str, dict[str, Any]] = {
    "dit": {"depth": 4},
    "unet": {"attention": (1, 1), "feed": True},
}
both = pytest.mark.parametrize("kind", ["dit", "unet"])
with_text = pytest.mark.parametrize("text", ["joint", "cross"])


def deep(kind: str, **changes: Any) -> Any:
    """A network of several blocks."""
    return made(kind, **{**DEEP[kind], "context_dim": 6, **changes})


def silenced(net: nn.Module, *numbers: int) -> nn.Module:
    """A copy in which some blocks add nothing, for want of weights in their last layers."""
    quiet = copy.deepcopy(net)
    for number in numbers:
        block: Any = quiet.get_submodule(blocks(quiet)[number])
        for last in (block.attention.out, block.cross and block.cross.out, block.feed.down):
            if last is not None:
                zeroed(last)
        if getattr(block, "skip", None) is not None:  # what comes by the long connection is not used
            block.skip.weight.data = torch.eye(*block.skip.weight.shape, dtype=torch.float64)
            block.skip.bias.data = torch.zeros_like(block.skip.bias)
    return quiet


def answer(net: nn.Module, seed: int = 0) -> Tensor:
    config: Any = net.config
    with torch.no_grad():
        result: Tensor = net(*inputs(seed=seed), **conditions(config))
    return result


@both
@with_text
@pytest.mark.parametrize("numbers", [(0,), (1, 2), (3,)])
def test_a_skipped_block_adds_nothing(kind: str, text: str, numbers: tuple[int, ...]) -> None:
    net = deep(kind, text=text)
    skipped = answer(variant(net, "skip:" + ",".join(map(str, numbers))))
    torch.testing.assert_close(skipped, answer(silenced(net, *numbers)), rtol=0, atol=1e-12)
    assert (skipped - answer(net)).abs().max() > 1e-4


@pytest.mark.parametrize("number", [0, 1, 2, 3])
def test_long_connections_outlive_skipped_blocks(number: int) -> None:
    """Blocks of the first half still send, those of the second half take what is theirs from the stack."""
    net = deep("dit", skips=True)
    skipped = answer(variant(net, f"skip:{number}"))
    torch.testing.assert_close(skipped, answer(silenced(net, number)), rtol=0, atol=1e-12)


def test_perturbed_tokens_see_themselves_alone() -> None:
    """With every block perturbed, a patch of the answer follows from its own patch of the picture."""
    net = deep("dit")
    perturbed = variant(net, "perturb:0,1,2,3")
    (x, t), cond = inputs(), conditions(net.config)
    y = perturbed(x.requires_grad_(), t, **cond)
    (gradient,) = torch.autograd.grad(y[:, :, :4, :4].sum(), x)
    assert gradient[:, :, :4, :4].abs().min() > 0
    gradient[:, :, :4, :4] = 0
    assert torch.equal(gradient, torch.zeros_like(gradient))
    (whole,) = torch.autograd.grad(net(x, t, **cond)[:, :, :4, :4].sum(), x)
    assert whole[:, :, 4:, 4:].abs().max() > 0


@both
def test_a_token_that_is_alone_is_not_perturbed(kind: str) -> None:
    """Attention over one token is that token, so a picture of one patch, without words, is answered as ever."""
    net = made("dit", size=4, depth=4) if kind == "dit" else made("unet", size=1, channels=(8,), attention=(2,))
    numbers = ",".join(map(str, range(len(blocks(net)))))
    x, t = inputs(size=(4, 4) if kind == "dit" else (1, 1))
    with torch.no_grad():
        torch.testing.assert_close(variant(net, f"perturb:{numbers}")(x, t), net(x, t), rtol=0, atol=1e-12)


@both
def test_the_network_itself_stays_as_it_is_and_is_followed(kind: str) -> None:
    """A variant has no weight of its own: what the network learns, it knows."""
    net = deep(kind, **({"adaln": "shared"} if kind == "dit" else {}))  # whose blocks hold parameters themselves
    before, names = answer(net), list(net.state_dict())
    weak = variant(net, "perturb:1")
    assert torch.equal(answer(net), before) and list(net.state_dict()) == names
    own = {id(p) for p in net.parameters()}
    assert all(id(p) in own for p in weak.parameters())
    with torch.no_grad():
        for p in net.parameters():
            p.mul_(1.1)
    torch.testing.assert_close(answer(weak), answer(variant(net, "perturb:1")), rtol=0, atol=0)
    assert not torch.equal(answer(weak), before)


def test_variants_of_denoisers() -> None:
    net = deep("dit")
    model, (x, t) = Denoiser(net, Linear(), VELOCITY), inputs()
    cond = conditions(net.config)
    with torch.no_grad():
        got = variant(model, "skip:2")(x, t / 1000, cond)
        want = Denoiser(silenced(net, 2), Linear(), VELOCITY)(x, t / 1000, cond)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)


@both
def test_blocks_are_counted_as_they_run(kind: str) -> None:
    net, ran = deep(kind), list[str]()
    for name in blocks(net):
        net.get_submodule(name).register_forward_hook(lambda *_, name=name: ran.append(name))
    answer(net)
    assert ran == blocks(net) and len(ran) == {"dit": 4, "unet": 7}[kind]


def test_the_middle_is_the_middle() -> None:
    for depth, number in ((1, 0), (3, 1), (4, 2)):
        net = deep("dit", depth=depth)
        assert torch.equal(answer(variant(net, "skip:middle")), answer(variant(net, f"skip:{number}")))


@pytest.mark.parametrize("name", ["skip:4", "skip:-1", "skip:", "skip", "perturb:a", "skip:1,", "drop:1", ""])
def test_variants_that_are_not_are_named(name: str) -> None:
    with pytest.raises(ConfigError) as caught:
        variant(deep("dit"), name)
    assert caught.value.seen == name and caught.value.fix


def test_a_network_without_attention_has_no_variants() -> None:
    for name in ("skip:0", "perturb:middle"):
        with pytest.raises(ConfigError, match="a network with attention"):
            variant(made("unet", attention=(0, 0), middle=0), name)

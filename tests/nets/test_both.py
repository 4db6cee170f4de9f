"""What every network promises: shapes, conditions that count and only those, masks, memory saved at no price."""

from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
from tiny import CONFIGS, conditions, inputs, made, normal, stirred
from torch import Tensor, nn

from sfumato.errors import ConfigError
from sfumato.nets import layers
from sfumato.nets.control_flux import FluxControl
from sfumato.nets.control_mmdit import MMDiTControl
from sfumato.nets.flux import Flux
from sfumato.nets.layers import Neighbours
from sfumato.nets.mmdit import MMDiT

TEXTS = (None, "joint", "cross")
FULL = {"classes": 3, "context_dim": 6, "pooled_dim": 5}
OPTIONS = {
    "dit": {
        "positions": ("sincos", "rope"),
        "adaln": ("block", "shared"),
        "qk_norm": (False, True),
        "skips": (False, True),
        "local": (False, True),
        "activation": ("gelu", "relu2"),
    },
    "unet": {"feed": (False, True), "patch": (1, 2), "qk_norm": (False, True), "blocks": (1, (2, 1))},
}
both = pytest.mark.parametrize("kind", ["dit", "unet"])
every = pytest.mark.parametrize("kind", CONFIGS)
with_text = pytest.mark.parametrize("text", ["joint", "cross"])


def choices(kind: str, text: str | None) -> list[dict[str, Any]]:
    """Every combination of a network's options, each with every combination of conditions."""
    names, values = zip(*OPTIONS[kind].items(), strict=True)
    base = [dict(zip(names, chosen, strict=True)) for chosen in product(*values)]
    told = ({}, {"classes": 3, "pooled_dim": 5})
    words = {} if text is None else {"text": text, "context_dim": 6}
    return [{**one, **two, **words} for one in base for two in told]


def changed(net: nn.Module, given: dict[str, Tensor]) -> dict[str, Tensor]:
    """The answers with one input changed at a time, by its name; all in one batch."""
    others = {name: (value + 1) % 3 if name == "label" else value + 1 for name, value in given.items()}
    rows = [{**given, name: other} for name, other in others.items()]
    with torch.no_grad():
        answers = net(**{name: torch.cat([row[name] for row in rows]) for name in given})
    return dict(zip(others, answers.chunk(len(others)), strict=True))


@both
@pytest.mark.parametrize("text", TEXTS)
def test_every_combination_of_options(kind: str, text: str | None) -> None:
    """A picture of 8 by 12 comes out as one, every condition changes it, and every weight learns from it."""
    for options in choices(kind, text):
        net = made(kind, out_channels=4, **options)
        x, t = inputs()
        cond = conditions(net.config)
        y = net(x, t, **cond)
        assert y.shape == (2, 4, 8, 12), options
        y.backward(normal(*y.shape))
        for name, p in net.named_parameters():
            assert p.grad is not None and p.grad.isfinite().all() and p.grad.abs().max() > 0, (options, name)
        given = {"x": x, "t": t, **cond}
        for name, answer in changed(net, given).items():
            assert (answer - y.detach()).flatten(1).abs().amax(1).min() > 1e-6, (options, name)


@every
def test_other_sizes_than_those_of_training(kind: str) -> None:
    net = made(kind, **FULL)
    for size in ((16, 4), (4, 20), (8, 8)):
        x, t = inputs(3, size)
        assert net(x, t, **conditions(net.config, 3)).shape == (3, 3, *size)


@every
def test_samples_of_a_batch_do_not_meet(kind: str) -> None:
    net = made(kind, **FULL)
    (x, t), cond = inputs(3), conditions(net.config, 3)
    whole = net(x, t, **cond)
    for i in range(3):
        alone = net(x[i : i + 1], t[i : i + 1], **{name: value[i : i + 1] for name, value in cond.items()})
        torch.testing.assert_close(whole[i : i + 1], alone, rtol=0, atol=1e-12)


@every
def test_a_fresh_network_answers_zero(kind: str) -> None:
    config = replace(CONFIGS[kind], **FULL)
    net = type(made(kind))(config)  # type: ignore[arg-type]
    x, t = inputs()
    cond = {name: value.float() if value.is_floating_point() else value for name, value in conditions(config).items()}
    y = net(x.float(), t.float(), **cond)
    assert torch.equal(y, torch.zeros_like(y))


@every
def test_conditions_that_were_not_asked_for_are_passed_over(kind: str) -> None:
    net, (x, t) = made(kind), inputs()
    told = conditions(replace(net.config, **FULL))
    assert torch.equal(net(x, t, **told, context_mask=torch.ones(2, 5, dtype=torch.bool)), net(x, t))


@every
def test_no_label_is_the_last_label(kind: str) -> None:
    net, (x, t) = made(kind, classes=3), inputs()
    assert torch.equal(net(x, t), net(x, t, label=torch.tensor([3, 3])))
    assert not torch.equal(net(x, t), net(x, t, label=torch.tensor([2, 2])))


@both
def test_no_words_and_no_summary_are_no_error(kind: str) -> None:
    for text in ("joint", "cross"):
        net, (x, t) = made(kind, text=text, **FULL), inputs()
        assert net(x, t).isfinite().all()
        assert torch.equal(net(x, t, context_mask=torch.ones(2, 5, dtype=torch.bool)), net(x, t))


# Masks


def padded(text: str, kind: str) -> tuple[nn.Module, Tensor, Tensor, dict[str, Tensor], Tensor]:
    """A network, its inputs, and words of which the first sample has three and the second five."""
    net, (x, t) = made(kind, text=text, **FULL), inputs()
    mask = torch.ones(2, 5, dtype=torch.bool)
    mask[0, 3:] = False
    return net, x, t, conditions(net.config), mask


@pytest.fixture(params=["fused", "plain"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """How attention is computed: by the kernel, or, as some CPUs learn, written out."""
    if request.param == "plain":
        monkeypatch.setattr(layers, "attended", layers.attended_plainly)
    return str(request.param)


@both
@with_text
@pytest.mark.parametrize("learning", [True, False])
def test_padding_has_no_influence(kind: str, text: str, learning: bool, way: str) -> None:
    """Neither on the answer nor, in training, on what is learned."""
    net, x, t, cond, mask = padded(text, kind)
    net.train(learning)
    answers = []
    for noise in (0.0, 100.0):
        words = (cond["context"] + noise * ~mask[..., None]).requires_grad_(learning)
        with torch.set_grad_enabled(learning):
            answers.append(net(x, t, **{**cond, "context": words}, context_mask=mask))
        if learning:
            (gradient,) = torch.autograd.grad(answers[-1].square().sum(), words)
            assert torch.equal(gradient[0, 3:], torch.zeros(2, 6, dtype=torch.float64))
            assert gradient[0, :3].abs().min() > 0 and gradient[1].abs().min() > 0
    torch.testing.assert_close(answers[0], answers[1], rtol=0, atol=0)


@both
@with_text
def test_a_mask_is_a_shorter_prompt(kind: str, text: str, way: str) -> None:
    net, x, t, cond, mask = padded(text, kind)
    with torch.no_grad():
        y = net(x, t, **cond, context_mask=mask)
        short = {name: value[:1] for name, value in cond.items()} | {"context": cond["context"][:1, :3]}
        torch.testing.assert_close(net(x[:1], t[:1], **short), y[:1], rtol=0, atol=1e-12)
        unmasked = net(x, t, **cond)
    assert (unmasked[0] - y[0]).abs().max() > 1e-6  # without a mask, padding is read
    torch.testing.assert_close(unmasked[1], y[1], rtol=0, atol=1e-12)


@both
@with_text
def test_nothing_but_padding_can_be_learned_from(kind: str, text: str, way: str) -> None:
    """The pictures' own keys count, so words at hand that are all masked are as no words to the joint attention."""
    net, x, t, cond, mask = padded(text, kind)
    learned = net.train()(x, t, **cond, context_mask=torch.zeros_like(mask))
    assert learned.isfinite().all()
    if text == "joint":
        none = net(x, t, **{name: value for name, value in cond.items() if name != "context"})
        torch.testing.assert_close(learned, none, rtol=0, atol=1e-12)
    gradients = torch.autograd.grad(learned.square().sum(), list(net.parameters()), allow_unused=True)
    assert all(gradient is None or gradient.isfinite().all() for gradient in gradients)


# Training


@both
@with_text
def test_training_and_evaluation_answer_alike(kind: str, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The plain attention that some CPUs learn with is the fused one of everything else."""
    net, x, t, cond, mask = padded(text, kind)
    with torch.no_grad():
        answered = net(x, t, **cond, context_mask=mask)
    monkeypatch.setattr(layers, "attended", layers.attended_plainly)
    torch.testing.assert_close(net.train()(x, t, **cond, context_mask=mask).detach(), answered, rtol=0, atol=1e-12)


@every
def test_dropout_is_for_training(kind: str) -> None:
    net, (x, t) = made(kind, dropout=0.5), inputs()
    assert torch.equal(net(x, t), net(x, t))
    assert not torch.equal(net.train()(x, t), net(x, t))


@both
@with_text
def test_checkpointing_changes_no_gradient(kind: str, text: str) -> None:
    """Recomputed activations are the same activations, dropout included: equal to the last bit."""
    more = {"skips": True} if kind == "dit" else {"blocks": (2, 1)}
    net, (x, t) = made(kind, text=text, dropout=0.3, **more, **FULL).train(), inputs()
    cond, found, runs = conditions(net.config), [], []
    layer = next(module for module in net.modules() if isinstance(module, nn.Dropout))
    layer.register_forward_hook(lambda *_: runs.append(net.checkpointing))
    for on in (False, True):
        net.checkpointing = on
        torch.manual_seed(0)
        y = net(x, t, **cond)
        found.append([y, *torch.autograd.grad(y.square().mean(), list(net.parameters()))])
    assert all(torch.equal(one, two) for one, two in zip(*found, strict=True))
    assert runs.count(True) == 2 * runs.count(False)  # each layer ran a second time, so it did recompute
    with torch.no_grad():  # without gradients there is nothing to save
        net(x, t, **cond)
    assert runs.count(True) == 3 * runs.count(False)


@both
@with_text
def test_half_precision_by_autocast(kind: str, text: str) -> None:
    more = {"positions": "rope"} if kind == "dit" else {"feed": True}
    net = made(kind, text=text, qk_norm=True, **more, **FULL).float()
    x, t = (value.float() for value in inputs())
    cond = {
        name: value.float() if value.is_floating_point() else value for name, value in conditions(net.config).items()
    }
    mask = torch.ones(2, 5, dtype=torch.bool)
    mask[0, 3:] = False
    want = net(x, t, **cond, context_mask=mask)
    with torch.autocast("cpu", torch.bfloat16):
        got = net(x, t, **cond, context_mask=mask)
    assert (got.float() - want).norm() < 0.03 * want.norm()
    got.float().square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(
            net(x, t, **cond, context_mask=mask).float(), got.float().detach(), rtol=0.05, atol=0.05
        )


@every
def test_half_precision_weights(kind: str) -> None:
    net = made(kind, **FULL)
    (x, t), cond = inputs(), conditions(net.config)
    want = net(x, t, **cond)
    half = {name: value.bfloat16() if value.is_floating_point() else value for name, value in cond.items()}
    got = net.bfloat16()(x.bfloat16(), t, **half)  # times stay exact
    assert got.dtype == torch.bfloat16
    assert (got.double() - want).norm() < 0.05 * want.norm()


# What cannot be


@every
def test_sizes_that_do_not_divide_are_named(kind: str) -> None:
    net = made(kind)
    with pytest.raises(ConfigError) as caught:
        net(torch.zeros(1, 3, 8, 9, dtype=torch.float64), torch.zeros(1))
    assert caught.value.where == "size" and caught.value.seen == "8x9"
    assert str({"dit": 4, "unet": 2, "mmdit": 4, "flux": 4}[kind]) in str(caught.value.fix)


@every
@pytest.mark.parametrize("name", ["patch", "in_channels"])
def test_numbers_below_one_are_named(kind: str, name: str) -> None:
    with pytest.raises(ConfigError) as caught:
        made(kind, **{name: 0})
    assert caught.value.where == f"model.net.{name}" and caught.value.seen == "0"


def convolutions(net: nn.Module) -> dict[str, Neighbours]:
    """Those of the neighbours, by the names of the blocks that they stand before, without what kind those are."""
    return {name.removeprefix("local."): one for name, one in net.named_modules() if isinstance(one, Neighbours)}


@pytest.mark.parametrize("kind", ["mmdit", "flux"])
def test_neighbours_are_mixed_before_every_block(kind: str) -> None:
    """Without words: what each block is given is what the one before it made, through the convolution of its own."""
    net, (x, t) = made(kind, local=True), inputs()
    assert isinstance(net, (MMDiT, Flux))
    blocks = [*net.blocks] if isinstance(net, MMDiT) else [*net.double_blocks, *net.single_blocks]
    given, answered = list[Tensor](), list[Tensor]()
    for block in blocks:
        block.register_forward_pre_hook(lambda _, args: given.append(args[0]))
        block.register_forward_hook(lambda _, args, out: answered.append(out[0] if isinstance(out, tuple) else out))
    answer, near = net(x, t), [*convolutions(net).values()]
    assert len(near) == len(blocks) == len(given)
    for one, before, after in zip(near[1:], answered[:-1], given[1:], strict=True):
        torch.testing.assert_close(one(before, (2, 3)), after, rtol=0, atol=0)
    answer.square().sum().backward()
    assert all(p.grad is not None and float(p.grad.abs().max()) > 0 for one in near for p in one.parameters())
    assert not convolutions(made(kind))


@pytest.mark.parametrize("kind", ["mmdit", "flux"])
def test_a_control_of_a_network_that_mixes_neighbours_does_so_too(kind: str) -> None:
    net, (x, t) = made(kind, local=True), inputs()
    control = MMDiTControl.of(net, 2) if isinstance(net, MMDiT) else FluxControl.of(net, 1, 1)  # type: ignore[arg-type]
    own, there = convolutions(control), convolutions(net)
    assert len(own) == 2
    for name, one in own.items():
        torch.testing.assert_close(one.weight, there[name].weight, rtol=0, atol=1e-7)
    control = stirred(control.double())
    said = [one.clone() for one in control(x, t, hint=x)]
    with torch.no_grad():
        for one in own.values():
            assert one.bias is not None
            one.bias[0] += 1.0
    assert all(not torch.allclose(one, other) for one, other in zip(control(x, t, hint=x), said, strict=True))

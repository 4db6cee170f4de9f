"""DiT: the paper's sizes, its initialisation, and its block against the formula."""

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny import DIT, inputs, made, normal, stirred
from torch import nn

from sfumato.errors import ConfigError
from sfumato.nets.dit import PRESETS, Block, DiT, DiTConfig, positions, preset
from sfumato.nets.patches import folded, unfolded

# Parameters of the published class-conditional models of 32x32 latents of 4 channels (Peebles & Xie's code).
PUBLISHED = {
    "S/2": 32_963_360,
    "S/4": 32_945_024,
    "S/8": 33_148_160,
    "B/2": 130_512_416,
    "B/4": 130_475_648,
    "B/8": 130_881_536,
    "L/2": 458_102_816,
    "L/4": 458_053_760,
    "L/8": 458_594_816,
    "XL/2": 675_129_632,
    "XL/4": 675_074_432,
    "XL/8": 675_683_072,
}


def count(config: DiTConfig) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in DiT(config).parameters())


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes(name: str) -> None:
    """Equal but for the table of positions: a frozen parameter there, one vector a patch, and computed here."""
    config = preset(name, size=32, in_channels=4, out_channels=8, classes=1000)
    positions = (32 // config.patch) ** 2 * config.dim
    assert count(config) + positions == PUBLISHED[name]


def test_a_shared_modulation_saves_a_third() -> None:
    """Blocks of 18 D^2 weights have 12 D^2 left; the modulation is computed once, with 6 D offsets a block. The head
    has 2 D offsets and no modulation of its own.
    """
    each, once = (count(preset("XL/2", adaln=adaln)) for adaln in ("block", "shared"))
    dim, depth = PRESETS["XL"].dim, PRESETS["XL"].depth
    modulation = 6 * dim * dim + 6 * dim
    head = 2 * dim * dim
    assert each - once == depth * modulation - modulation - depth * 6 * dim + head
    assert 0.3 < 1 - once / each < 1 / 3


def test_presets_can_be_changed() -> None:
    assert preset("B/4", size=64, text="cross") == replace(PRESETS["B"], patch=4, size=64, text="cross")
    assert preset("S") == PRESETS["S"]


@pytest.mark.parametrize("name", ["M", "B/x", "", "b"])
def test_presets_that_are_not_are_named(name: str) -> None:
    with pytest.raises(ConfigError, match="S, B, L, XL") as caught:
        preset(name)
    assert caught.value.seen == name


@pytest.mark.parametrize(
    ("changes", "where"),
    [
        ({"size": (8, 10)}, "patch"),
        ({"heads": 3}, "heads"),
        ({"heads": 0}, "heads"),
        ({"depth": 0}, "depth"),
        ({"dim": 18}, "dim"),
        ({"dim": 12, "heads": 2, "positions": "rope"}, "dim"),
    ],
)
def test_shapes_that_cannot_be_are_named(changes: dict[str, Any], where: str) -> None:
    with pytest.raises(ConfigError) as caught:
        DiT(replace(DIT, **changes))
    assert caught.value.where == f"model.net.{where}"


# Patches


@pytest.mark.parametrize("patch", [1, 2, 4])
def test_unfolding_undoes_folding(patch: int) -> None:
    x = normal(2, 3, 8, 12)
    tokens = folded(x, patch)
    assert tokens.shape == (2, 96 // patch**2, 3 * patch**2)
    assert torch.equal(unfolded(tokens, (8 // patch, 12 // patch), patch), x)


def test_a_token_is_a_patch_channels_first_row_by_row() -> None:
    x = normal(1, 3, 8, 12)
    tokens = folded(x, 4)
    for i, (top, left) in enumerate((top, left) for top in (0, 4) for left in (0, 4, 8)):
        assert torch.equal(tokens[0, i], x[0, :, top : top + 4, left : left + 4].flatten())


# Blocks


@pytest.mark.parametrize("adaln", ["block", "shared"])
@pytest.mark.parametrize("text", ["joint", "cross"])
def test_fresh_blocks_are_the_identity(adaln: str, text: str) -> None:
    net = DiT(replace(DIT, adaln=adaln, text=text, context_dim=6)).double()  # type: ignore[arg-type]
    x, summary, words = normal(2, 7, 16), normal(2, 16, seed=1), normal(2, 5, 16, seed=2)
    modulation = summary if net.shared is None else net.shared(summary)
    for block in net.blocks:
        assert torch.equal(block(x, modulation, None, words, None, None), x)


def test_fresh_weights_are_the_papers() -> None:
    net = DiT(replace(DIT, dim=256, heads=4, classes=500))
    assert net.label is not None
    for weight in (net.label.weight, net.time.mlp[0].weight, net.time.mlp[2].weight):
        assert float(weight.detach().std()) == pytest.approx(0.02, rel=0.02)
    for linear in (net.patches, net.blocks[0].attention.q, net.blocks[0].feed.up):  # type: ignore[index]
        bound = (6 / sum(linear.weight.shape)) ** 0.5  # Xavier's uniform
        assert 0.98 * bound < float(linear.weight.detach().abs().max()) <= bound
        assert torch.equal(linear.bias, torch.zeros_like(linear.bias))


def by_hand(block: Block, x: torch.Tensor, six: torch.Tensor, words: torch.Tensor | None) -> torch.Tensor:
    """A block by its formula, with torch's own attention."""

    def attention(part: nn.Module, query: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        weights = torch.cat([part.q.weight, part.kv.weight]), torch.cat([part.q.bias, part.kv.bias])  # type: ignore[arg-type,union-attr]
        y, _ = F.multi_head_attention_forward(
            query.transpose(0, 1),
            keys.transpose(0, 1),
            keys.transpose(0, 1),
            16,
            2,
            *weights,
            None,
            None,
            False,
            0.0,
            part.out.weight,  # type: ignore[arg-type,union-attr]
            part.out.bias,  # type: ignore[arg-type,union-attr]
        )
        return y.transpose(0, 1)

    def norm(y: torch.Tensor) -> torch.Tensor:
        return (y - y.mean(-1, keepdim=True)) / torch.sqrt(y.var(-1, unbiased=False, keepdim=True) + 1e-6)

    shift1, scale1, gate1, shift2, scale2, gate2 = (part[:, None] for part in six.chunk(6, 1))
    h = norm(x) * (1 + scale1) + shift1
    x = x + gate1 * attention(block.attention, h, h)
    if block.cross is not None and words is not None:
        x = x + attention(block.cross, x, words)
    h = block.feed.up(norm(x) * (1 + scale2) + shift2)
    return x + gate2 * block.feed.down(F.gelu(h, approximate="tanh"))


@pytest.mark.parametrize("text", ["joint", "cross"])
def test_a_block_is_its_formula(text: str) -> None:
    block = stirred(Block(replace(DIT, text=text, context_dim=16), skip=False).double())  # type: ignore[arg-type]
    assert block.modulation is not None
    x, summary, words = normal(2, 7, 16), normal(2, 16, seed=1), normal(2, 5, 16, seed=2)
    six = F.silu(summary) @ block.modulation[1].weight.T + block.modulation[1].bias
    want = by_hand(block, x, six, words)
    torch.testing.assert_close(block(x, summary, None, words, None, None), want, rtol=0, atol=1e-12)


def test_neighbours_are_mixed_before_the_attention() -> None:
    block = stirred(Block(replace(DIT, local=True), skip=False).double())
    plain = Block(DIT, skip=False).double()
    plain.load_state_dict(block.state_dict(), strict=False)
    assert block.local is not None
    x, summary, grid = normal(2, 5 + 12, 16), normal(2, 16, seed=1), (3, 4)
    want = plain(block.local(x, grid), summary, None, None, None, None, grid)
    torch.testing.assert_close(block(x, summary, None, None, None, None, grid), want, rtol=0, atol=0)


@pytest.mark.parametrize("depth", [1, 2, 3, 4, 5])
def test_long_connections_join_the_first_block_to_the_last(depth: int) -> None:
    """U-ViT: block i of the first half to block depth - 1 - i; the middle one of an odd number stands alone."""
    net, sent, got = made("dit", depth=depth, skips=True), list[torch.Tensor](), list[Any]()

    def listen(_: Any, given: Any, out: torch.Tensor) -> None:
        sent.append(out)
        got.append(given[2])

    for block in net.blocks:  # type: ignore[union-attr]
        block.register_forward_hook(listen)
    net(*inputs())
    for i, skip in enumerate(got):
        if i < (depth + 1) // 2:
            assert skip is None
        else:
            assert torch.equal(skip, sent[depth - 1 - i])


def test_joint_words_have_no_place() -> None:
    """Text tokens are told apart by the encoder, not by the network: their order does not count."""
    for kind in ("sincos", "rope"):
        net, (x, t) = made("dit", context_dim=6, positions=kind), inputs()
        words = normal(2, 5, 6)
        torch.testing.assert_close(net(x, t, context=words), net(x, t, context=words.flip(1)), rtol=0, atol=1e-12)


def test_patches_have_places() -> None:
    """A picture turned round is not answered by the answer turned round."""
    for kind in ("sincos", "rope"):
        net, (x, t) = made("dit", positions=kind, patch=1, depth=1), inputs()
        assert (net(x, t).flip(-1) - net(x.flip(-1), t)).abs().max() > 1e-3


# PixArt

PIXART = {"text": "cross", "adaln": "shared", "context_dim": 6}


def test_positions_span_the_same_at_every_size() -> None:
    """Of two grids of one span, the one with half as many patches has every second position of the other."""
    config = replace(DIT, span=5.0)
    fine, coarse = (positions(config, grid).unflatten(0, grid) for grid in ((4, 6), (2, 3)))
    torch.testing.assert_close(fine[::2, ::2], coarse)
    one = positions(replace(DIT, span=6.0), (6, 6))
    torch.testing.assert_close(one, positions(DIT, (6, 6)))  # as many patches as the span: one apart


def test_a_caption_of_no_words_is_the_learned_one() -> None:
    """In its rows alone; all words of it count, and where it is not filled up to the others' length nothing else."""
    net, (x, t) = made("dit", unsaid=3, **PIXART), inputs()
    words, mask = normal(2, 5, 6), torch.tensor([[True, True, False, False, False], [False] * 5])
    got = net(x, t, context=words, context_mask=mask)
    said = net(x[:1], t[:1], context=words[:1], context_mask=mask[:1])
    null = net(x[1:], t[1:], context=net.unsaid[None])
    torch.testing.assert_close(got, torch.cat([said, null]), rtol=0, atol=1e-12)
    assert not torch.allclose(said, net(x[:1], t[:1], context=net.unsaid[None]))
    short = net(x, t, context=words[:, :2], context_mask=mask[:, :2])  # fewer words than the learned caption has
    torch.testing.assert_close(short[1:], net(x[1:], t[1:], context=net.unsaid[None, :2]), rtol=0, atol=1e-12)
    got.square().sum().backward()
    assert net.unsaid.grad is not None and net.unsaid.grad.abs().min() > 0


def test_sizes_change_the_answer_each_in_its_third() -> None:
    net, (x, t) = made("dit", dim=24, sizes=True, **PIXART), inputs()
    assert net.sizes is not None
    sizes = torch.tensor([[64.0, 96.0, 2 / 3], [50.0, 40.0, 1.25]], dtype=torch.float64)
    told = net.sizes(sizes)
    want = [net.sizes.side(sizes[:, 0]), net.sizes.side(sizes[:, 1]), net.sizes.ratio(sizes[:, 2])]
    assert torch.equal(told, torch.cat(want, 1)) and told.shape == (2, 24)
    answers = [net(x, t, sizes=sizes + torch.eye(3)[i]) for i in range(3)] + [net(x, t, sizes=sizes), net(x, t)]
    for i, one in enumerate(answers):
        assert all((one - other).abs().max() > 1e-9 for other in answers[:i])


def test_a_fresh_pixart_answers_zero_and_learns() -> None:
    net = DiT(replace(DIT, dim=24, classes=0, unsaid=2, sizes=True, span=2.0, **PIXART))  # type: ignore[arg-type]
    x, t = inputs()
    told = {"context": normal(2, 5, 6).float(), "context_mask": torch.tensor([[True] * 5, [False] * 5])}
    told["sizes"] = torch.ones(2, 3)
    assert torch.equal(net(x.float(), t.float(), **told), torch.zeros(2, 3, 8, 12))
    stirred(net)
    net(x.float(), t.float(), **told).square().sum().backward()
    for name, p in net.named_parameters():
        assert p.grad is not None and p.grad.abs().max() > 0, name


@pytest.mark.parametrize(
    ("changes", "where"), [({"span": 2.0, "positions": "rope"}, "span"), ({"sizes": True}, "sizes")]
)
def test_options_that_do_not_go_together_are_named(changes: dict[str, Any], where: str) -> None:
    with pytest.raises(ConfigError) as caught:
        DiT(replace(DIT, **changes))
    assert caught.value.where == f"model.net.{where}"

"""Embeddings and attention, against their formulas and against torch's own."""

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny import normal, stirred
from torch import Tensor

from sfumato.nets.layers import (
    Attention,
    FeedForward,
    Neighbours,
    RMSNorm,
    TimeEmbedding,
    attended,
    attended_plainly,
    modulated,
    rope_2d,
    rotated,
    sincos_2d,
    sinusoid,
    zeroed,
)


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """The lengths of the keys that the fused kernel was asked about."""
    asked, kernel = list[int](), F.scaled_dot_product_attention

    def spy(q: Tensor, k: Tensor, v: Tensor, **options: object) -> Tensor:
        asked.append(k.shape[2])
        return kernel(q, k, v, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    yield asked


# Embeddings


@pytest.mark.parametrize("dim", [2, 8, 9])
def test_a_sinusoid_is_cosines_then_sines(dim: int) -> None:
    t, half = [0.0, 0.25, 999.0], dim // 2
    rows = []
    for value in t:
        angles = [value * 10_000 ** (-i / half) for i in range(half)]
        rows.append([math.cos(a) for a in angles] + [math.sin(a) for a in angles] + [0.0] * (dim % 2))
    got = sinusoid(torch.tensor(t, dtype=torch.float64), dim)
    assert got.shape == (3, dim)
    torch.testing.assert_close(got, torch.tensor(rows, dtype=torch.float64), rtol=0, atol=1e-12)


def test_a_sinusoid_is_of_single_precision_at_least() -> None:
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.int64):
        t = torch.tensor([992], dtype=dtype)  # a number that bfloat16 has
        got = sinusoid(t, 64)
        assert got.dtype == torch.float32
        torch.testing.assert_close(got.double(), sinusoid(t.double(), 64), rtol=0, atol=2e-4)
    assert sinusoid(torch.tensor([992.0], dtype=torch.float64), 64).dtype == torch.float64


def test_time_embeddings_take_the_weights_dtype() -> None:
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        embedding = TimeEmbedding(8, frequencies=16).to(dtype)
        assert embedding(torch.tensor([0.5, 3.0])).dtype == dtype


def test_sincos_positions_are_those_of_the_papers() -> None:
    height, width, dim = 3, 5, 8
    got = sincos_2d(height, width, dim)
    assert got.shape == (15, 8) and got.dtype == torch.float32
    for row in range(height):
        for column in range(width):
            want = []
            for place in (column, row):  # the column comes first, as in MAE and DiT
                angles = [place / 10_000 ** (2 * i / (dim // 2)) for i in range(dim // 4)]
                want += [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
            assert got[row * width + column].tolist() == pytest.approx(want, abs=1e-7)


# Rotary positions


def turned(x: Tensor, rope: tuple[Tensor, Tensor], top: int, left: int, grid: tuple[int, int]) -> Tensor:
    """x (L, dim), standing in a window of 3 by 4 of a larger grid, turned by its places."""
    window = [part.unflatten(0, grid)[top : top + 3, left : left + 4].flatten(0, 1) for part in rope]
    return rotated(x[None, None], (window[0], window[1]))[0, 0]


def test_rotary_logits_depend_on_relative_places_only() -> None:
    grid, dim = (9, 11), 24
    rope = rope_2d(*grid, dim)
    q, k = normal(12, dim, seed=1), normal(12, dim, seed=2)
    logits = [
        turned(q, rope, top, left, grid) @ turned(k, rope, top, left, grid).T for top, left in ((0, 0), (6, 0), (2, 7))
    ]
    torch.testing.assert_close(logits[1], logits[0], rtol=0, atol=2e-5)
    torch.testing.assert_close(logits[2], logits[0], rtol=0, atol=2e-5)
    for top, left in ((1, 0), (0, 1)):  # and on those they do depend, in both directions
        moved = turned(q, rope, 0, 0, grid) @ turned(k, rope, top, left, grid).T
        assert (moved - logits[0]).abs().max() > 0.1


def test_rotary_angles_by_hand() -> None:
    cos, sin = rope_2d(2, 3, 8, before=2)
    assert cos.shape == sin.shape == (2 + 6, 4)
    assert torch.equal(cos[:2], torch.ones(2, 4)) and torch.equal(sin[:2], torch.zeros(2, 4))  # text stays as it is
    angles = [1.0, 0.1, 2.0, 0.2]  # row 1, column 2, at the frequencies 1 and 100^(-1/2)
    assert cos[-1].tolist() == pytest.approx([math.cos(a) for a in angles], abs=1e-7)
    assert sin[-1].tolist() == pytest.approx([math.sin(a) for a in angles], abs=1e-7)


def test_turning_keeps_lengths() -> None:
    x, rope = normal(2, 3, 20, 16), rope_2d(4, 5, 16)
    turned_x = rotated(x, rope)
    torch.testing.assert_close(turned_x.norm(dim=-1), x.norm(dim=-1), rtol=1e-6, atol=0)
    assert torch.equal(turned_x[:, :, 0], x[:, :, 0])  # the first place is the origin


# Attention


def by_hand(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Softmax attention from its definition, one query at a time."""
    out = torch.zeros(*q.shape[:3], v.shape[-1], dtype=q.dtype)
    for b in range(q.shape[0]):
        keep = torch.ones(k.shape[2], dtype=torch.bool) if mask is None else mask[b]
        for h in range(q.shape[1]):
            for i in range(q.shape[2]):
                weight = torch.exp(k[b, h, keep] @ q[b, h, i] / math.sqrt(q.shape[-1]))
                if keep.any():
                    out[b, h, i] = weight / weight.sum() @ v[b, h, keep]
    return out


MASK = torch.tensor([[True, True, False, True, False, True, True], [False] * 7])


@pytest.mark.parametrize("mask", [None, MASK], ids=["all", "masked"])
@pytest.mark.parametrize("attention", [attended, attended_plainly])
def test_attention_is_its_definition(mask: Tensor | None, attention: Any) -> None:
    q, k, v = normal(2, 3, 5, 4, seed=1), normal(2, 3, 7, 4, seed=2), normal(2, 3, 7, 6, seed=3)
    torch.testing.assert_close(attention(q, k, v, mask), by_hand(q, k, v, mask), rtol=0, atol=1e-13)


@pytest.mark.parametrize("mask", [None, MASK], ids=["all", "masked"])
@pytest.mark.parametrize("length", [7, 300])
def test_plain_and_fused_attention_learn_alike(mask: Tensor | None, length: int) -> None:
    """The same answers and the same gradients, where no key counts too."""
    parts = [normal(2, 3, n, 4, seed=n + i).requires_grad_() for i, n in enumerate((5, length, length))]
    wide = None if mask is None else F.pad(mask, (0, length - 7), value=False)
    answers = [attention(*parts, wide) for attention in (attended, attended_plainly)]
    torch.testing.assert_close(answers[0], answers[1], rtol=0, atol=1e-13)
    gradients = [torch.autograd.grad(y, parts, normal(*y.shape, seed=9)) for y in answers]
    for kernel, plain in zip(*gradients, strict=True):
        assert plain.isfinite().all()
        torch.testing.assert_close(plain, kernel, rtol=0, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("attention", [attended, attended_plainly])
def test_attention_where_no_key_counts_is_zero_in_any_precision(dtype: torch.dtype, attention: Any) -> None:
    q = (30 * normal(1, 1, 3, 4)).to(dtype).requires_grad_()
    out = attention(q, q, q, torch.zeros(1, 3, dtype=torch.bool))
    assert torch.equal(out, torch.zeros_like(out))
    assert torch.equal(torch.autograd.grad(out.sum(), q)[0], torch.zeros_like(q))


def test_plain_attention_is_for_learning_in_bfloat16_where_a_cpu_has_it(
    fused: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def asks(dtype: torch.dtype, length: int = 7, learning: bool = True, arithmetic: bool = True) -> bool:
        """Whether the fused kernel was called."""
        monkeypatch.setattr("sfumato.nets.layers.BF16_ARITHMETIC", arithmetic)
        fused.clear()
        q = normal(1, 2, length, 4).to(dtype).requires_grad_(learning)
        want = by_hand(*[q.detach().double()] * 3, None)
        torch.testing.assert_close(attended(q, q, q).detach().double(), want, rtol=0, atol=0.03)
        return bool(fused)

    assert not asks(torch.bfloat16) and not asks(torch.bfloat16, length=128)
    assert asks(torch.bfloat16, length=129) and asks(torch.bfloat16, learning=False)
    assert asks(torch.bfloat16, arithmetic=False) and asks(torch.float32)
    with torch.no_grad():
        assert asks(torch.bfloat16)


@pytest.mark.parametrize("kind", ["self", "cross"])
def test_attention_is_torchs_multi_head_attention(kind: str) -> None:
    dim, heads = 12, 3
    layer = stirred(Attention(dim, heads, context_dim=dim if kind == "cross" else 0).double())
    peer = torch.nn.MultiheadAttention(dim, heads, batch_first=True, dtype=torch.float64)
    with torch.no_grad():
        peer.in_proj_weight.copy_(torch.cat([layer.q.weight, layer.kv.weight]))
        peer.in_proj_bias.copy_(torch.cat([layer.q.bias, layer.kv.bias]))
        peer.out_proj.weight.copy_(layer.out.weight)
        peer.out_proj.bias.copy_(layer.out.bias)
    x, context = normal(2, 5, dim), normal(2, 7, dim, seed=1)
    keys = context if kind == "cross" else x
    mask = torch.ones(2, keys.shape[1], dtype=torch.bool)
    mask[1, 3:] = False
    want = peer(x, keys, keys, key_padding_mask=~mask, need_weights=False)[0]
    torch.testing.assert_close(layer(x, context, mask), want, rtol=0, atol=1e-13)


def test_extra_keys_stand_beside_the_others() -> None:
    """With the same projections, looking at extra tokens is looking at a longer sequence."""
    layer = stirred(Attention(8, 2, extra_dim=8, qk_norm=True).double())
    assert layer.extra is not None
    layer.extra.load_state_dict(layer.kv.state_dict())
    x, words = normal(2, 5, 8), normal(2, 3, 8, seed=1)
    whole = layer(torch.cat([x, words], 1))[:, :5]
    torch.testing.assert_close(layer(x, words), whole, rtol=0, atol=1e-13)
    assert (layer(x) - whole).abs().max() > 1e-3


def test_normalised_queries_and_keys_bound_the_logits() -> None:
    """However large the weights of q and k, attention stays as it was: only their directions count."""
    layer = stirred(Attention(8, 2, qk_norm=True).double())
    x = normal(2, 5, 8)
    before = layer(x)
    with torch.no_grad():
        for part in (layer.q.weight, layer.q.bias, layer.kv.weight[:8], layer.kv.bias[:8]):
            part.mul_(1000)
    torch.testing.assert_close(layer(x), before, rtol=0, atol=1e-4)  # but for the epsilon in the norm


# The rest


def test_rms_norm_is_its_formula_and_keeps_precision() -> None:
    x, norm = normal(2, 5, 8), RMSNorm(8)
    with torch.no_grad():
        norm.weight.copy_(torch.arange(8))
    want = x / torch.sqrt((x**2).mean(-1, keepdim=True) + 1e-6) * torch.arange(8)
    torch.testing.assert_close(norm(x), want, rtol=0, atol=1e-13)
    assert norm(x.bfloat16()).dtype == torch.bfloat16


def test_feed_forward_is_its_formula() -> None:
    layer, x = stirred(FeedForward(4, 2.5).double()), normal(2, 3, 4)
    assert layer.up.weight.shape == (10, 4)
    h = x @ layer.up.weight.T + layer.up.bias
    gelu = h / 2 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3)))
    torch.testing.assert_close(layer(x), gelu @ layer.down.weight.T + layer.down.bias, rtol=0, atol=1e-13)
    squares = FeedForward(4, 2.5, "relu2").double()
    squares.load_state_dict(layer.state_dict())
    want = torch.where(h > 0, h**2, 0) @ layer.down.weight.T + layer.down.bias
    torch.testing.assert_close(squares(x), want, rtol=0, atol=1e-13)


def test_modulation_is_one_sample_at_a_time() -> None:
    x, shift, scale = normal(2, 3, 4), normal(2, 4, seed=1), normal(2, 4, seed=2)
    want = torch.stack([x[i] * (1 + scale[i]) + shift[i] for i in range(2)])
    torch.testing.assert_close(modulated(x, shift, scale), want, rtol=0, atol=1e-14)


def test_a_zeroed_module_answers_nothing() -> None:
    assert torch.equal(zeroed(FeedForward(4))(torch.randn(2, 4)), torch.zeros(2, 4))


@pytest.mark.parametrize("before", [0, 5])
def test_neighbours_are_a_convolution_over_the_patches(before: int) -> None:
    """Of each channel, 3 by 3, added; words at the front stay as they are."""
    near, grid = stirred(Neighbours(4).double()), (3, 4)
    assert near.bias is not None
    x = normal(2, before + 12, 4)
    want, plane = x.clone(), F.pad(x[:, before:].unflatten(1, grid), (0, 0, 1, 1, 1, 1))
    for row in range(3):
        for column in range(4):
            window = plane[:, row : row + 3, column : column + 3]
            mixed = torch.einsum("bijc,cij->bc", window, near.weight[:, 0]) + near.bias
            want[:, before + 4 * row + column] += mixed
    torch.testing.assert_close(near(x, grid), want, rtol=0, atol=1e-12)

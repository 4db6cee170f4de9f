"""Names by layout: fused and split rows, swapped halves, 1x1 convolutions, and what has no place."""

import pytest
import torch

from sfumato.errors import CheckpointError
from sfumato.io.keymap import DIFFUSERS, ORIGINAL, OURS, line, renamed

LINES = [
    line(
        ours=("a.q", "a.kv"),
        diffusers=("a.to_q", "a.to_k", "a.to_v"),
        original="a.qkv",
        shares={OURS: (1, 2)},
    ),
    line(
        ours=("s.q", "s.k", "s.v", "s.up"),
        diffusers=("s.to_q", "s.to_k", "s.to_v", "s.mlp"),
        original="s.linear1",
        shares=dict.fromkeys((OURS, DIFFUSERS), (1, 1, 1, 3)),
    ),
    line([ORIGINAL], ours="conv", diffusers="lin", original="conv0"),
    line(swapped=[DIFFUSERS], ours="last", diffusers="norm_out", original="final"),
    line(bare=True, ours="table", diffusers="scale_shift_table", original="y.table"),
    line([ORIGINAL], side=2, ours="patches", diffusers="patches", original="x.proj"),
    line(
        long=[ORIGINAL],
        by_head=[ORIGINAL],
        heads=2,
        ours=("h.q", "h.kv"),
        diffusers=("h.to_q", "h.to_k", "h.to_v"),
        original="h.qkv",
        shares={OURS: (1, 2)},
    ),
    line(inner=[ORIGINAL], side=2, ours="answer", diffusers="out", original="final.linear"),
]


def state() -> dict[str, torch.Tensor]:
    rng = torch.Generator().manual_seed(0)
    sizes = {"a.q": 4, "a.kv": 8, "s.q": 4, "s.k": 4, "s.v": 4, "s.up": 12, "conv": 5, "last": 6, "h.q": 4, "h.kv": 8}
    made = {f"{name}.weight": torch.randn(n, 3, generator=rng) for name, n in sizes.items()}
    made |= {f"{name}.bias": torch.randn(n, generator=rng) for name, n in sizes.items()}
    made |= {f"{name}.weight": torch.randn(12, 12, generator=rng) for name in ("patches", "answer")}
    return made | {"table": torch.randn(2, 3, generator=rng), "answer.bias": torch.randn(12, generator=rng)}


@pytest.mark.parametrize("layout", [DIFFUSERS, ORIGINAL])
def test_there_and_back_is_the_same(layout: str) -> None:
    ours = state()
    there = renamed(ours, LINES, OURS, layout, "x")
    back = renamed(there, LINES, layout, OURS, "x")
    assert back.keys() == ours.keys() and all(torch.equal(back[key], ours[key]) for key in ours)


def test_what_layouts_differ_in() -> None:
    ours = state()
    diffusers, original = (renamed(ours, LINES, OURS, layout, "x") for layout in (DIFFUSERS, ORIGINAL))
    assert torch.equal(original["a.qkv.weight"], torch.cat([ours["a.q.weight"], ours["a.kv.weight"]]))
    assert torch.equal(diffusers["a.to_v.bias"], ours["a.kv.bias"][4:])
    assert original["s.linear1.bias"].shape == (24,)
    assert torch.equal(diffusers["s.mlp.weight"], original["s.linear1.weight"][12:])
    assert original["conv0.weight"].shape == (5, 3, 1, 1) and original["conv0.bias"].shape == (5,)
    assert torch.equal(diffusers["norm_out.weight"], ours["last.weight"].roll(3, 0))
    assert torch.equal(original["y.table"], ours["table"])
    assert original["h.qkv.weight"].shape == (12, 3, 1) and original["h.qkv.bias"].shape == (12,)
    for leaf, kept in (("weight", original["h.qkv.weight"].flatten(1)), ("bias", original["h.qkv.bias"])):
        q, k, v = (diffusers[f"h.to_{part}.{leaf}"] for part in "qkv")
        assert torch.equal(kept, torch.cat([q[:2], k[:2], v[:2], q[2:], k[2:], v[2:]]))  # two heads of two rows
    pixels = ours["patches.weight"].reshape(12, 3, 2, 2)  # channels, rows, columns
    assert torch.equal(original["x.proj.weight"], pixels)
    for leaf in ("weight", "bias"):
        channel, row, column = 2, 1, 0
        there, here = (row * 2 + column) * 3 + channel, (channel * 2 + row) * 2 + column
        assert torch.equal(original[f"final.linear.{leaf}"][there], ours[f"answer.{leaf}"][here])
    direct = renamed(diffusers, LINES, DIFFUSERS, ORIGINAL, "x")
    assert all(torch.equal(direct[key], original[key]) for key in original)


def test_keys_without_a_place_and_parts_that_are_missing() -> None:
    with pytest.raises(CheckpointError, match=r"(?s)1 weights have no place.*odd\.weight"):
        renamed({**state(), "odd.weight": torch.zeros(1)}, LINES, OURS, DIFFUSERS, "x")
    torn = state()
    del torn["a.kv.weight"]
    with pytest.raises(CheckpointError, match=r"a\.kv\.weight"):
        renamed(torn, LINES, OURS, DIFFUSERS, "x")

"""Conditions that share a batch: stacked, padded and masked, and those that cannot."""

import pytest
import torch
from torch import Tensor

from sfumato.denoiser import (
    joined,
)
from sfumato.errors import ConfigError


def test_conditions_of_equal_length_are_stacked() -> None:
    a = {"context": torch.ones(2, 3, 4), "label": torch.tensor([1, 2])}
    b = {"context": torch.zeros(1, 3, 4), "label": torch.tensor([3])}
    both = joined([a, b])
    assert torch.equal(both["context"], torch.cat([a["context"], b["context"]]))
    assert both["label"].tolist() == [1, 2, 3] and both["label"].dtype == torch.int64
    assert torch.equal(joined([a])["context"], a["context"])
    assert joined([{}, {}]) == {}


def test_padding_is_masked_where_there_was_no_mask() -> None:
    both = joined([{"context": torch.ones(1, 2, 3)}, {"context": torch.ones(2, 4, 3)}])
    assert both["context_mask"].tolist() == [[True, True, False, False], [True] * 4, [True] * 4]
    assert "context_mask" not in joined([{"context": torch.ones(1, 2, 3)}] * 2)


def test_longer_contexts_decide_and_masks_tell_what_is_padding() -> None:
    def cond(rows: int, length: int) -> dict[str, Tensor]:
        mask = torch.arange(length) < torch.tensor([[length], [length - 1]])[:rows]
        return {"context": torch.randn(rows, length, 3), "mask": mask, "pooled": torch.randn(rows, 5)}

    parts = [cond(2, 2), cond(1, 7), cond(2, 4)]
    both = joined(parts)
    assert both["context"].shape == (5, 7, 3) and both["mask"].shape == (5, 7) and both["mask"].dtype == torch.bool
    assert torch.equal(both["pooled"], torch.cat([part["pooled"] for part in parts]))
    row = 0
    for part in parts:
        rows, length = part["mask"].shape
        here = slice(row, row + rows)
        assert torch.equal(both["context"][here, :length], part["context"])
        assert torch.equal(both["mask"][here, :length], part["mask"])
        assert not both["context"][here, length:].any() and not both["mask"][here, length:].any()
        row += rows


def test_conditions_of_different_kinds_are_refused() -> None:
    with pytest.raises(ConfigError, match="cannot share a batch") as caught:
        joined([{"label": torch.zeros(1)}, {"mask": torch.zeros(1, 2), "context": torch.zeros(1, 2, 3)}])
    assert caught.value.seen == "{context, mask} and {label}"

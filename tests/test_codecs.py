"""Codecs: pictures to what the network sees, and back."""

import pytest
import torch

from sfumato.catalogue import build
from sfumato.codecs import Codec, Pixels
from sfumato.errors import ConfigError


def pictures() -> torch.Tensor:
    return torch.rand(2, 3, 4, 6, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.mark.parametrize("scale", [0.25, 0.5, 2.0])
def test_pixels_come_back_exactly_for_powers_of_two(scale: float) -> None:
    codec, x = Pixels(scale), pictures()
    assert torch.equal(codec.encode(x), x * scale)
    assert torch.equal(codec.decode(codec.encode(x)), x)


def test_pixels_come_back_within_rounding() -> None:
    codec, x = Pixels(0.3), pictures()
    torch.testing.assert_close(codec.decode(codec.encode(x)), x, rtol=1e-6, atol=0)


def test_pixels_as_they_are_are_not_copied() -> None:
    x = pictures()
    assert Pixels().encode(x) is x


@pytest.mark.parametrize("scale", [0.5, 1.0])
def test_what_lies_outside_is_brought_back(scale: float) -> None:
    decoded = Pixels(scale).decode(torch.tensor([-7.0, -scale, 0.0, scale / 2, 7.0]))
    assert decoded.tolist() == [-1, -1, 0, 0.5, 1]


def test_a_picture_keeps_its_shape() -> None:
    codec: Codec = build({"kind": "pixels", "scale": 0.5}, "Codec")
    assert codec.channels == 3 and codec.shape(4, 6) == (3, 4, 6) == tuple(codec.encode(pictures()).shape[1:])


@pytest.mark.parametrize("scale", [0.0, -1.0, float("inf"), float("nan")])
def test_scales_that_cannot_be_undone_are_refused(scale: float) -> None:
    with pytest.raises(ConfigError) as caught:
        Pixels(scale)
    assert caught.value.where == "model.codec.scale"

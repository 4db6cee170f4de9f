"""Codecs: pictures to what the network sees, and back."""

import pytest
import torch

from sfumato.catalogue import build
from sfumato.codecs import Codec, Latents, Pixels
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


# Latents

SMALL = {"channels": (8, 16, 16), "latent": 3, "blocks": 1, "groups": 4}


def test_latents_are_the_mean_of_the_autoencoder_shifted_and_scaled() -> None:
    codec = Latents(**SMALL, scale=0.5, shift=0.25)
    x = torch.rand(2, 3, 8, 12) * 2 - 1
    mean = codec.autoencoder.encode(x).mean
    torch.testing.assert_close(codec.encode(x), (mean - 0.25) * 0.5)
    torch.testing.assert_close(codec.decode(codec.encode(x)), codec.autoencoder.decode(mean).clamp(-1, 1))


def test_latents_may_have_a_scale_a_channel() -> None:
    codec = Latents(**SMALL, scale=(1.0, 2.0, 4.0), shift=(0.0, 1.0, 2.0))
    x = torch.rand(1, 3, 8, 8)
    mean = codec.autoencoder.encode(x).mean
    torch.testing.assert_close(codec.encode(x)[:, 2], (mean[:, 2] - 2) * 4)
    with pytest.raises(ConfigError, match="one a channel"):
        Latents(**SMALL, scale=(1.0, 2.0))


def test_latents_are_frozen_and_their_sizes_are_checked() -> None:
    codec = Latents(**SMALL)
    assert not any(p.requires_grad for p in codec.train().parameters()) and not codec.training
    assert codec.shape(8, 12) == (3, 2, 3) and codec.channels == 3
    with pytest.raises(ConfigError, match=r"multiples of 4[\s\S]*12x32"):
        codec.shape(13, 32)


def test_tiles_are_blended_to_the_whole_where_each_place_depends_on_itself_alone() -> None:
    codec = Latents(**SMALL, tile=8)
    x = torch.rand(2, 3, 19, 37)
    torch.testing.assert_close(codec._tiled(lambda part: part, x, 1, 1, 3), x)
    up = codec._tiled(lambda part: part.repeat_interleave(4, 2).repeat_interleave(4, 3), x, 1, 4, 3)
    torch.testing.assert_close(up, x.repeat_interleave(4, 2).repeat_interleave(4, 3))
    small = torch.rand(1, 3, 32, 32)
    torch.testing.assert_close(Latents(**SMALL, tile=8).encode(small).shape, Latents(**SMALL).encode(small).shape)


def test_tiles_bound_what_the_autoencoder_sees() -> None:
    codec, seen = Latents(**SMALL, tile=8), []
    codec.autoencoder.decode = lambda z: (
        seen.append(tuple(z.shape[2:])) or torch.zeros(1, 3, *(4 * n for n in z.shape[2:]))
    )  # type: ignore[assignment, func-returns-value]
    assert codec.decode(torch.zeros(1, 3, 20, 30)).shape == (1, 3, 80, 120)
    assert set(seen) == {(8, 8)} and len(seen) == 3 * 5
    with pytest.raises(ConfigError, match="8 places"):
        Latents(**SMALL, tile=4)

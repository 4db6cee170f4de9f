"""Tiny autoencoders: diffusers' own, and the original pair of files, both ways, every weight random."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tests.clip import randomised
from torch import Tensor, nn

from sfumato.catalogue import build
from sfumato.codecs import TinyLatents
from sfumato.errors import CheckpointError, ConfigError
from sfumato.io.families.taesd import config_of, halves, lines
from sfumato.io.keymap import DIFFUSERS, ORIGINAL, OURS, renamed
from sfumato.io.pretrained import codec_from, fill_codec
from sfumato.nets.tiny_autoencoder import PRESETS, TinyAutoencoder, TinyAutoencoderConfig

diffusers = pytest.importorskip("diffusers")

SHAPE = TinyAutoencoderConfig(latent=5, width=6, encoder=(1, 2, 3), decoder=(3, 1, 2))
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def theirs(shape: TinyAutoencoderConfig, **more: Any) -> Any:
    return diffusers.AutoencoderTiny(
        encoder_block_out_channels=(shape.width,) * len(shape.encoder),
        decoder_block_out_channels=(shape.width,) * len(shape.decoder),
        num_encoder_blocks=shape.encoder,
        num_decoder_blocks=shape.decoder,
        latent_channels=shape.latent,
        **more,
    )


@pytest.fixture(scope="module")
def peer() -> Any:
    return randomised(theirs(SHAPE, scaling_factor=0.8, shift_factor=0.1))


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.rand(2, 3, 24, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1


def read(path: Path) -> TinyLatents:
    slot, state = codec_from({"kind": "tiny_latents", "weights": str(path)})
    codec = build(slot, "Codec")
    fill_codec(codec, state)
    assert isinstance(codec, TinyLatents)
    return codec


class ResidualBlock(nn.Module):
    """A block as the original file numbers it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        convs = [nn.Conv2d(width, width, 3, padding=1) for _ in range(3)]
        self.conv = nn.Sequential(convs[0], nn.ReLU(), convs[1], nn.ReLU(), convs[2])

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.conv(x) + x)


class Bend(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x / 3) * 3


def original_halves(shape: TinyAutoencoderConfig) -> tuple[nn.Sequential, nn.Sequential]:
    """The published recipe of the two numbered halves: which layer has which number."""
    width = shape.width
    down: list[nn.Module] = [nn.Conv2d(3, width, 3, padding=1)]
    for i, count in enumerate(shape.encoder):
        down += [nn.Conv2d(width, width, 3, stride=2, padding=1, bias=False)] if i else []
        down += [ResidualBlock(width) for _ in range(count)]
    up: list[nn.Module] = [Bend(), nn.Conv2d(shape.latent, width, 3, padding=1), nn.ReLU()]
    for i, count in enumerate(shape.decoder):
        up += [nn.Upsample(scale_factor=2), nn.Conv2d(width, width, 3, padding=1, bias=False)] if i else []
        up += [ResidualBlock(width) for _ in range(count)]
    down.append(nn.Conv2d(width, shape.latent, 3, padding=1))
    up.append(nn.Conv2d(width, 3, 3, padding=1))
    return nn.Sequential(*down), nn.Sequential(*up)


@torch.no_grad()
def test_a_folder_of_diffusers_gives_its_latents_and_its_pictures(peer: Any, images: Tensor, tmp_path: Path) -> None:
    peer.save_pretrained(tmp_path / "vae")
    for place in (tmp_path, tmp_path / "vae"):
        codec = read(place)
        z = peer.encode(images).latents
        assert codec.shape(24, 16) == tuple(z.shape[1:]) == (5, 6, 4)
        torch.testing.assert_close(codec.autoencoder.encode(images), z, **CLOSE)
        torch.testing.assert_close(codec.autoencoder.decode(z), peer.decode(z).sample, **CLOSE)
    codec = read(tmp_path / "vae")  # which brings its config
    torch.testing.assert_close(codec.encode(images), (z - 0.1) * 0.8, **CLOSE)
    torch.testing.assert_close(codec.decode(codec.encode(images)), peer.decode(z).sample.clamp(-1, 1), **CLOSE)


@torch.no_grad()
def test_what_we_write_loads_in_diffusers(images: Tensor) -> None:
    ours = randomised(TinyAutoencoder(SHAPE))
    state = renamed(ours.state_dict(), lines(SHAPE), OURS, DIFFUSERS, "here")
    fresh = theirs(SHAPE).eval()
    fresh.load_state_dict(state)
    z = ours.encode(images)  # type: ignore[operator]
    torch.testing.assert_close(fresh.encode(images).latents, z, **CLOSE)
    torch.testing.assert_close(fresh.decode(z).sample, ours.decode(z), **CLOSE)  # type: ignore[operator]
    assert config_of(state, DIFFUSERS, "here") == config_of(ours.state_dict(), OURS, "here") == SHAPE


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@torch.no_grad()
def test_the_original_pair_of_files(images: Tensor, tmp_path: Path, suffix: str) -> None:
    down, up = (randomised(half, seed) for seed, half in enumerate(original_halves(SHAPE)))
    for name, half in (("taesd_encoder", down), ("taesd_decoder", up)):
        save = torch.save if suffix == ".pth" else save_file
        save(half.state_dict(), tmp_path / f"{name}{suffix}")
    codec = read(tmp_path / f"taesd_encoder{suffix}")
    assert codec.autoencoder.config == SHAPE and codec.scale == 1 and codec.shift == 0
    z = down((images + 1) / 2)
    torch.testing.assert_close(codec.encode(images), z, **CLOSE)
    torch.testing.assert_close(codec.autoencoder.decode(z), up(z) * 2 - 1, **CLOSE)
    back = renamed(codec.autoencoder.state_dict(), lines(SHAPE), OURS, ORIGINAL, "here")
    whole = halves(down.state_dict(), "encoder") | halves(up.state_dict(), "decoder")
    assert back.keys() == whole.keys() and all(torch.equal(back[key], whole[key]) for key in whole)


@torch.no_grad()
def test_two_lines_of_one_shape_cannot_be_exchanged(images: Tensor, peer: Any) -> None:
    """A table that has two equal kernels in each other's place gives other pictures than the peer's."""
    table, z = lines(SHAPE), peer.encode(images).latents
    for first, second in zip(range(1, len(table) - 1), range(2, len(table)), strict=True):
        one, other = table[first], table[second]
        swapped = [*table]
        swapped[first] = replace(one, names={**one.names, OURS: other.names[OURS]})
        swapped[second] = replace(other, names={**other.names, OURS: one.names[OURS]})
        state = renamed(peer.state_dict(), swapped, DIFFUSERS, OURS, "here")
        net = TinyAutoencoder(SHAPE)
        if any(state[name].shape != value.shape for name, value in net.state_dict().items() if name in state):
            continue  # of other shapes: seen by the network itself
        if state.keys() != net.state_dict().keys():
            continue
        net.load_state_dict(state)
        whole = torch.cat([net.encode(images).flatten(), net.decode(z).flatten()])
        told = torch.cat([z.flatten(), peer.decode(z).sample.flatten()])
        assert float((whole - told).norm() / told.norm()) > 1e-3, (one.names[OURS], other.names[OURS])


@pytest.mark.parametrize("name", ["taesd", "taef1"])
def test_names_shapes_and_size_at_full_size(name: str) -> None:
    shape = PRESETS[name]
    with torch.device("meta"):
        ours, peer = TinyAutoencoder(shape), theirs(shape)
    counts = [sum(p.numel() for p in half.parameters()) for half in (ours.encoder, ours.decoder)]
    # Ten blocks of 110,784, three kernels of 36,864, and the two ends
    assert counts == {"taesd": [1_222_532, 1_222_531], "taef1": [1_229_456, 1_229_443]}[name]
    state = renamed(ours.state_dict(), lines(shape), OURS, DIFFUSERS, "here")
    assert {key: one.shape for key, one in state.items()} == {key: one.shape for key, one in peer.state_dict().items()}
    down, up = original_halves(shape)
    whole = halves(down.state_dict(), "encoder") | halves(up.state_dict(), "decoder")
    again = renamed(ours.state_dict(), lines(shape), OURS, ORIGINAL, "here")
    assert {key: one.shape for key, one in again.items()} == {key: one.shape for key, one in whole.items()}


def test_what_is_none_is_named(tmp_path: Path) -> None:
    save_file({"something.weight": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match=r"no tiny autoencoder[\s\S]*something\.weight"):
        codec_from({"kind": "tiny_latents", "weights": str(tmp_path / "other.safetensors")})
    with pytest.raises(ConfigError, match="latents need an autoencoder"):
        codec_from("tiny_latents")
    with pytest.raises(ConfigError, match="was not read"):
        TinyLatents(weights="somewhere")
    with pytest.raises(ConfigError, match="multiples of 8"):
        TinyLatents().shape(12, 16)
    with pytest.raises(ConfigError, match="as many sizes"):
        TinyLatents(encoder=(1, 1), decoder=(1,))
    state = theirs(SHAPE).state_dict()
    save_file({k: v for k, v in state.items() if k != "encoder.layers.3.conv.2.weight"}, tmp_path / "less.safetensors")
    with pytest.raises(CheckpointError, match=r"lacks weights[\s\S]*second\.weight"):
        slot, found = codec_from({"kind": "tiny_latents", "weights": str(tmp_path / "less.safetensors")})
        fill_codec(build(slot, "Codec"), found)

"""Latent diffusion: a run in the latents of an autoencoder that lies on disk, and the model it leaves."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from sfumato import load, train
from sfumato.codecs import Latents
from sfumato.config import Config
from sfumato.errors import CheckpointError, ConfigError
from sfumato.io.directory import write_weights
from sfumato.io.pretrained import codec_from
from sfumato.nets.autoencoder import Autoencoder, AutoencoderConfig

Small = Callable[..., Config]
SHAPE = AutoencoderConfig(latent=4, channels=(8, 16), blocks=1, groups=4)
ON = ("model.net.patch=4", "steps=4", "checkpoint.every=2", "sampling.steps=3")


@pytest.fixture
def autoencoder(tmp_path: Path) -> Path:
    torch.manual_seed(3)
    path = tmp_path / "autoencoder.safetensors"
    write_weights(path, Autoencoder(SHAPE).state_dict())
    return path


def slot(path: Path) -> str:
    return f"model.codec={{kind: latents, weights: {path}, groups: 4, scale: 0.9}}"


def test_a_run_in_latents_leaves_a_model_that_needs_no_other_file(
    small: Small, tmp_path: Path, autoencoder: Path
) -> None:
    before = autoencoder.read_bytes()
    train(small(*ON, slot(autoencoder)), run=tmp_path / "run")
    assert autoencoder.read_bytes() == before
    original = Autoencoder(SHAPE)
    autoencoder.unlink()
    pipeline = load(tmp_path / "run")
    codec = pipeline.model.codec
    assert isinstance(codec, Latents) and codec.channels == 4 and codec.autoencoder.config == SHAPE
    assert pipeline.model.net.config.in_channels == 4  # type: ignore[union-attr]
    assert codec.autoencoder.state_dict().keys() == original.state_dict().keys()
    torch.manual_seed(3)
    for key, value in Autoencoder(SHAPE).state_dict().items():
        assert torch.equal(codec.autoencoder.state_dict()[key], value)  # frozen, bit for bit
    drawn = pipeline.sample(["a circle"] * 2)
    assert drawn.images.shape == (2, 32, 32, 3)


def test_a_run_in_latents_resumes_bit_for_bit(small: Small, tmp_path: Path, autoencoder: Path) -> None:
    from sfumato.errors import Interrupted

    config = small(*ON, slot(autoencoder))
    train(config, run=tmp_path / "whole")
    with pytest.raises(Interrupted):
        train(config, run=tmp_path / "parts", stop_after=2)
    train(config, run=tmp_path / "parts", resume=True)
    whole, parts = (tmp_path / name / "model" / "model.safetensors" for name in ("whole", "parts"))
    assert whole.read_bytes() == parts.read_bytes()


def test_other_codecs_are_left_alone() -> None:
    for slot_ in ("pixels", {"kind": "mine:Codec", "weights": "theirs"}, None):
        assert codec_from(slot_) == (slot_, {})


def test_an_autoencoder_that_is_not_there_or_does_not_take_the_size_is_named(
    small: Small, tmp_path: Path, autoencoder: Path
) -> None:
    with pytest.raises(CheckpointError, match="no such file"):
        train(small(*ON, slot(tmp_path / "nowhere")), run=tmp_path / "none")
    for without in ("model.codec=latents", "model.codec={kind: latents, scale: 0.9}"):
        with pytest.raises(ConfigError, match="latents need an autoencoder"):
            train(small(*ON, without), run=tmp_path / "without")
    with pytest.raises(ConfigError, match="was not read"):
        Latents(weights=str(autoencoder))
    with pytest.raises(ConfigError, match="multiples of 2"):
        train(small(*ON, slot(autoencoder), "data.size=33"), run=tmp_path / "odd")

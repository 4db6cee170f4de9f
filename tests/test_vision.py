"""Image encoders of transformers as conditioners: the same states as the library's own, frozen, and travelling."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.clip import randomised

from sfumato import load
from sfumato.conditioners import Joined
from sfumato.data.scenes import Scenes
from sfumato.errors import CheckpointError, ConfigError
from sfumato.overlay import load_config
from sfumato.prompts import Prompts
from sfumato.train import train
from sfumato.vision import Vision

transformers = pytest.importorskip("transformers")

SHAPE: dict[str, Any] = {
    "hidden_size": 12,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "image_size": 16,
    "patch_size": 8,
}
KINDS = {"clip": ("CLIPVision", 5), "siglip": ("SiglipVision", 4), "dinov2": ("Dinov2", 5)}
MEANS = {"clip": (0.48145466, 0.4578275, 0.40821073), "siglip": (0.5,) * 3, "dinov2": (0.485, 0.456, 0.406)}
DEVIATIONS = {"clip": (0.26862954, 0.26130258, 0.27577711), "siglip": (0.5,) * 3, "dinov2": (0.229, 0.224, 0.225)}


def encoder(kind: str, folder: Path) -> Any:
    name, _ = KINDS[kind]
    config = getattr(transformers, f"{name}Config")(**SHAPE)
    made = randomised(getattr(transformers, f"{name}Model")(config), 2)
    made.save_pretrained(folder)
    return made


def image(seed: int = 0, side: int = 16) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).integers(0, 256, (side, side, 3), np.uint8)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("skip", [0, 1])
def test_states_are_the_librarys_own(kind: str, skip: int, tmp_path: Path) -> None:
    peer = encoder(kind, tmp_path)
    one = Vision(weights=str(tmp_path), skip=skip)
    one.prepare(Scenes())
    mean, std = (torch.tensor(numbers[kind])[:, None, None] for numbers in (MEANS, DEVIATIONS))
    pixels = (torch.from_numpy(image()).permute(2, 0, 1) / 255 - mean) / std
    with torch.no_grad():
        said = peer(pixel_values=pixels[None], output_hidden_states=True)
    expected = said.hidden_states[-1 - skip] if skip else said.last_hidden_state
    cond = one([{"image": image()}, {}])["context"]
    assert cond.shape == (2, KINDS[kind][1], 12) and one.context_dim == 12
    torch.testing.assert_close(cond[:1], expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(cond[1], one.absent.expand_as(cond[1]))
    assert one([{}])["context"].shape == cond[:1].shape


def test_what_a_folder_says_of_colours_counts(tmp_path: Path) -> None:
    encoder("clip", tmp_path)
    plain, told = Vision(weights=str(tmp_path)), Vision(weights=str(tmp_path))
    plain.prepare(Scenes())
    said = {"image_mean": [0.1, 0.2, 0.3], "image_std": [1, 2, 4]}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(said))
    told.prepare(Scenes())
    assert told.std.flatten().tolist() == [1, 2, 4] and plain.std.flatten().tolist() != [1, 2, 4]
    assert not torch.allclose(plain([{"image": image()}])["context"], told([{"image": image()}])["context"], atol=1e-3)


def test_only_the_projection_learns_and_all_of_it_travels(tmp_path: Path) -> None:
    encoder("clip", tmp_path)
    one = Vision(weights=str(tmp_path), dim=8)
    one.prepare(Scenes())
    learns = {name.split(".")[0] for name, p in one.named_parameters() if p.requires_grad}
    assert learns == {"project", "absent"} and not one.train().encoder.training
    other = Vision(dim=8)
    other.restore(one.files())
    other.load_state_dict(one.state_dict())
    assert torch.equal(other([{"image": image()}])["context"], one([{"image": image()}])["context"])


def test_a_picture_of_any_size_is_seen_at_the_encoders(tmp_path: Path) -> None:
    encoder("clip", tmp_path)
    one = Vision(weights=str(tmp_path))
    one.prepare(Scenes())
    large = np.repeat(np.repeat(image(), 2, 0), 2, 1)
    raw = one.sized([{"image": large}], (64, 64))
    assert raw[0]["image"].shape == (16, 16, 3)  # type: ignore[attr-defined]
    assert torch.equal(one(raw)["context"], one([{"image": large}])["context"])


def test_a_run_with_words_and_a_picture(tmp_path: Path) -> None:
    encoder("clip", tmp_path / "encoder")
    words = "{kind: prompts, dim: 16, depth: 1, heads: 2, length: 12}"
    vision = f"{{kind: vision, weights: {tmp_path / 'encoder'}, field: layout, dim: 16}}"
    both = f"model.conditioner={{kind: joined, contexts: sequence, parts: [{words}, {vision}]}}"
    small = Path(__file__).parent / "train" / "small.yaml"
    config = load_config(str(small), ("data.layout=shapes", "steps=2", "checkpoint.every=2", both)).config
    train(config, run=tmp_path / "run")
    (tmp_path / "encoder" / "config.json").unlink()
    pipeline = load(tmp_path / "run", "cpu")
    conditioner = pipeline.model.conditioner
    assert isinstance(conditioner, Joined) and isinstance(conditioner.parts[0], Prompts)
    asked = {"caption": "a circle", "layout": Scenes(layout="shapes")[0].fields["layout"]}
    drawn = pipeline.sample([asked, "a circle"], seeds=[1, 1], steps=2).images
    assert (drawn[0] != drawn[1]).any()


def test_what_is_no_encoder_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="comes from a checkpoint"):
        Vision().prepare(Scenes())
    with pytest.raises(CheckpointError, match="missing"):
        Vision(weights=str(tmp_path)).prepare(Scenes())
    (tmp_path / "config.json").write_text('{"model_type": "nothing"}')
    with pytest.raises(CheckpointError, match="not known here"):
        Vision(weights=str(tmp_path)).prepare(Scenes())
    with pytest.raises(ConfigError, match="not negative"):
        Vision(skip=-1)

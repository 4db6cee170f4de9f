"""FLUX.1 Fill, Canny and Depth: diffusers' pipelines, small and with every weight random, and back."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image as Pillow
from test_flux import SMALL, drawn_by, pipeline_of
from test_transformer_controls import certain as certain
from tests.clip import randomised

from sfumato import load
from sfumato.errors import CheckpointError
from sfumato.io.directory import save_model
from sfumato.io.published import save_published

diffusers = pytest.importorskip("diffusers")

LATENT = 5
BESIDE = {"FluxFillPipeline": LATENT + 4, "FluxControlPipeline": LATENT}  # channels, of an autoencoder by a factor of 2


def picture(seed: int) -> Pillow.Image:
    return Pillow.fromarray(np.random.default_rng(seed).integers(0, 255, (16, 24, 3), np.uint8))


def mask() -> Pillow.Image:
    drawn = np.zeros((16, 24), np.uint8)
    drawn[3:11, 5:18] = 255
    return Pillow.fromarray(drawn)


def made(kind: str, folder: Path) -> Any:
    pipe = pipeline_of(folder, "dev")
    more = {
        "guidance_embeds": True,
        "joint_attention_dim": 32,
        "pooled_projection_dim": 12,
        "axes_dims_rope": (4, 8, 8),
    }
    channels = {"in_channels": 4 * (LATENT + BESIDE[kind]), "out_channels": 4 * LATENT}
    transformer = randomised(diffusers.FluxTransformer2DModel(**{**SMALL, **more, **channels}), 5)
    options = {
        name: part for name, part in pipe.components.items() if name not in ("image_encoder", "feature_extractor")
    }
    with torch.no_grad():
        transformer.x_embedder.weight[:, 4 * LATENT :] *= 10  # so that what is shown is seen
    whole = getattr(diffusers, kind)(**{**options, "transformer": transformer})
    whole.set_progress_bar_config(disable=True)
    whole.save_pretrained(folder / "shown")
    return whole


@pytest.mark.parametrize("kind", BESIDE)
def test_the_same_picture_there_here_and_after_the_way_back(kind: str, tmp_path: Path, certain: None) -> None:
    pipe = made(kind, tmp_path)
    told: dict[str, Any] = {"guidance_scale": 5.0, "generator": torch.Generator().manual_seed(7)}
    asked: dict[str, Any] = {"caption": "a red circle"}
    if kind == "FluxFillPipeline":
        told |= {"image": picture(1), "mask_image": mask()}
        asked |= {"image": picture(1), "mask": mask().convert("RGB")}
    else:
        told |= {"control_image": picture(1)}
        asked |= {"control": picture(1)}
    expected = drawn_by(pipe, **told)
    pipeline = load(tmp_path / "shown", "cpu")
    settings: dict[str, Any] = {"steps": 6, "guidance": 5.0, "seeds": 7, "size": (16, 24)}
    here = pipeline.sample(asked, **settings).images
    assert float((torch.from_numpy(here) / 255 - expected).abs().max()) < 1.01 / 255
    plain = pipeline.sample("a red circle", **settings).images
    assert np.abs(plain.astype(int) - here).max() > 3  # it is looked at
    raw = {name: np.array(one) if isinstance(one, Pillow.Image) else one for name, one in asked.items()}
    latents = pipeline.model.conditioner([raw])["concat"]  # type: ignore[misc]
    shown = torch.from_numpy(np.array(picture(1))).permute(2, 0, 1)[None].float() / 127.5 - 1
    if kind == "FluxFillPipeline":
        shown = shown * (torch.from_numpy(np.array(mask())) == 0)
        assert latents[0, LATENT:].sum() == 8 * 13  # every pixel of the mask
    with torch.no_grad():
        wanted = (pipe.vae.encode(shown).latent_dist.mode() - 0.2) * 0.7
    torch.testing.assert_close(latents[:, :LATENT], wanted, rtol=1e-4, atol=1e-4)
    save_published(tmp_path / "back", pipeline.model)
    again = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "back")
    assert type(again).__name__ == kind
    state = pipe.transformer.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in again.transformer.state_dict().items())
    save_model(tmp_path / "ours", pipeline.model, {})
    assert np.array_equal(load(tmp_path / "ours", "cpu").sample(asked, **settings).images, here)


def test_fill_takes_a_picture_and_a_mask_as_any_model_does(tmp_path: Path) -> None:
    made("FluxFillPipeline", tmp_path)
    pipeline = load(tmp_path / "shown", "cpu")
    settings: dict[str, Any] = {"steps": 3, "seeds": 7, "size": (16, 24)}
    drawn = pipeline.sample("a red circle", image=picture(1), mask=mask().convert("RGB"), **settings)
    known, free = np.array(picture(1)), np.array(mask()) == 0
    assert np.abs(drawn.images[0].astype(int) - known)[free].max() <= 1  # what is known stays
    assert pipeline.settings().guidance == {"kind": "distilled", "scale": 30.0} and pipeline.settings().steps == 50


def test_a_transformer_that_takes_something_else_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BESIDE, "FluxControlPipeline", LATENT + 1)
    made("FluxControlPipeline", tmp_path)
    with pytest.raises(CheckpointError, match="more than is known here"):
        load(tmp_path / "shown", "cpu")

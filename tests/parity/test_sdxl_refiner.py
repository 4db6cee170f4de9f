"""SDXL's refiner: diffusers' own image-to-image pipeline, small and with every weight random, both ways."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tests.adapters.tuned import random_adapter
from tests.clip import encoder, randomised, tokenizer
from tests.parity import test_sdxl

from sfumato import load
from sfumato.adapters.parts import parts_of
from sfumato.adapters.writing import write_adapter
from sfumato.cli import main
from sfumato.errors import ConfigError, DataError
from sfumato.io.directory import save_model
from sfumato.io.inspect import inspected
from sfumato.io.published import save_file, save_published
from sfumato.pipeline import Pipeline

diffusers = pytest.importorskip("diffusers")
pytest.importorskip("transformers")

SETTINGS: dict[str, Any] = {"steps": 8, "guidance": 4.0, "seeds": 7, "size": 16}
WIDTH, PROJECTED = 64, 10  # OpenCLIP's heads are 64 wide


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    return test_sdxl.pipeline_of(tmp_path_factory.mktemp("base"), zeros=False)


@pytest.fixture(scope="module")
def whole(base: tuple[Any, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    folder = tmp_path_factory.mktemp("refiner")
    unet = diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32, 48, 48),
        layers_per_block=2,
        cross_attention_dim=WIDTH,
        norm_num_groups=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=2,
        attention_head_dim=[2, 4, 6, 12],
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=PROJECTED + 5 * 256,
    )
    options = {"hidden_act": "gelu", "num_attention_heads": 1}
    made = diffusers.StableDiffusionXLImg2ImgPipeline(
        vae=base[0].vae,
        text_encoder=None,
        text_encoder_2=encoder(3, projected=PROJECTED, width=WIDTH, seed=9, **options),
        tokenizer=None,
        tokenizer_2=tokenizer(folder / "made"),
        unet=randomised(unet, 8),
        scheduler=base[0].scheduler,
        requires_aesthetics_score=True,
        force_zeros_for_empty_prompt=False,
        add_watermarker=False,
    )
    made.set_progress_bar_config(disable=True)
    made.save_pretrained(folder / "whole")
    return made, folder / "whole"


@pytest.fixture(scope="module")
def latents() -> torch.Tensor:
    return torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(3))


def test_how_much_changes_where_nothing_is_said(
    whole: tuple[Any, Path], base: tuple[Any, Path], latents: torch.Tensor, tmp_path: Path
) -> None:
    """As much as by diffusers, from a folder, a file, and a model of ours; the base model recommends nothing."""
    expected = theirs(whole[0], latents)
    refiner = load(whole[1], "cpu")
    save_model(tmp_path / "ours", refiner.model, {})
    save_published(tmp_path / "folder", refiner.model)
    save_file(tmp_path / "refiner.safetensors", refiner.model)
    for place in (whole[1], tmp_path / "ours", tmp_path / "folder", tmp_path / "refiner.safetensors"):
        assert inspected(place)["sampling"]["strength"] == 0.3
        parts = whole[1] if place.is_file() else None
        drawn = load(place, "cpu", parts=parts).sample("a red circle", image=latents, **SETTINGS)
        assert apart(drawn.images[0], expected) < 0.51 / 255 and drawn.settings[0]["strength"] == 0.3
    assert load(base[1], "cpu").settings().strength is None and "strength" not in inspected(base[1])["sampling"]


def theirs(pipe: Any, latents: torch.Tensor, **options: Any) -> np.ndarray[Any, Any]:
    rng = torch.Generator().manual_seed(7)
    asked = {"num_inference_steps": 8, "guidance_scale": 4.0, "original_size": (16, 16), "target_size": (16, 16)}
    told = pipe("a red circle", image=latents, generator=rng, output_type="np", **{**asked, **options})
    return np.asarray(told.images[0])


def apart(ours: np.ndarray[Any, Any], theirs: np.ndarray[Any, Any]) -> float:
    return float(np.abs(ours / 255 - theirs).max())


@pytest.mark.parametrize(
    ("options", "prompt", "ours"),
    [
        ({"guidance_scale": 1.0}, "a red circle", {"guidance": 1.0}),
        ({}, "a red circle", {}),
        ({"strength": 0.25}, "a red circle", {"strength": 0.25}),
        ({"negative_prompt": "a square"}, "a red circle", {"negative": "a square"}),
        ({"aesthetic_score": 9.0}, {"caption": "a red circle", "aesthetic_score": 9}, {}),
        ({"aesthetic_score": 4.5}, {"caption": "a red circle", "aesthetic_score": "4.5"}, {}),  # of the command line
        (
            {"negative_prompt": "a square", "negative_aesthetic_score": 1.5},
            "a red circle",
            {"negative": {"caption": "a square", "aesthetic_score": 1.5}},
        ),
        (
            {"original_size": (64, 48), "crops_coords_top_left": (3, 5), "guidance_scale": 1.0},
            {"caption": "a red circle", "original_size": [64, 48], "crop": [3, 5]},
            {"guidance": 1.0},
        ),
    ],
)
def test_encoded_pictures_become_the_same_picture(
    whole: tuple[Any, Path], latents: torch.Tensor, options: dict[str, Any], prompt: Any, ours: dict[str, Any]
) -> None:
    expected = theirs(whole[0], latents, **{"strength": 0.5, **options})
    drawn = load(whole[1], "cpu").sample(prompt, image=latents, **{"strength": 0.5, **SETTINGS, **ours})
    assert apart(drawn.images[0], expected) < 0.51 / 255


def test_scores_matter(whole: tuple[Any, Path], latents: torch.Tensor) -> None:
    plain = theirs(whole[0], latents, strength=0.5)
    for name in ("aesthetic_score", "negative_aesthetic_score"):
        assert np.abs(theirs(whole[0], latents, strength=0.5, **{name: 9.5}) - plain).max() > 2 / 255


def test_it_goes_on_where_the_base_model_stopped(base: tuple[Any, Path], whole: tuple[Any, Path]) -> None:
    """An ensemble of experts: the base model at high noise, the refiner below, on one grid of times."""
    rng = torch.Generator().manual_seed(7)
    asked: dict[str, Any] = {"num_inference_steps": 8, "guidance_scale": 4.0}
    half = base[0](
        "a red circle", **asked, generator=rng, height=16, width=16, denoising_end=0.6, output_type="latent"
    ).images
    expected = theirs(whole[0], half, denoising_start=0.6)
    first, refiner = load(base[1], "cpu"), load(whole[1], "cpu")
    step = next(step for step in first.steps("a red circle", **SETTINGS) if step.t < 0.4)
    drawn = refiner.sample("a red circle", image=step, **SETTINGS)
    assert apart(drawn.images[0], expected) < 0.51 / 255
    assert drawn.settings[0]["begun_at"] == step.t and "strength" not in drawn.settings[0]
    *_, last = first.steps("a red circle", **SETTINGS)
    over = refiner.sample("a red circle", image=last.x, strength=0.25, **SETTINGS)
    again = theirs(whole[0], last.x, strength=0.25)
    assert apart(over.images[0], again) < 0.51 / 255


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_there_and_back_and_into_diffusers(whole: tuple[Any, Path], latents: torch.Tensor, tmp_path: Path) -> None:
    model = load(whole[1], "cpu").model
    save_model(tmp_path / "a", model, model.facts)
    save_published(tmp_path / "b", load(tmp_path / "a", "cpu").model)
    back = load(tmp_path / "b", "cpu").model
    save_model(tmp_path / "c", back, back.facts)
    assert contents(tmp_path / "a") == contents(tmp_path / "c")
    again = diffusers.StableDiffusionXLImg2ImgPipeline.from_pretrained(tmp_path / "b", add_watermarker=False)
    again.set_progress_bar_config(disable=True)
    again.scheduler = type(whole[0].scheduler).from_config(whole[0].scheduler.config)
    assert again.config.requires_aesthetics_score and not again.config.force_zeros_for_empty_prompt
    assert np.abs(theirs(again, latents, strength=0.5) - theirs(whole[0], latents, strength=0.5)).max() < 1e-5


def test_its_single_file(whole: tuple[Any, Path], latents: torch.Tensor, tmp_path: Path) -> None:
    file = tmp_path / "refiner.safetensors"
    save_file(file, load(whole[1], "cpu").model)
    keys = load_file(file).keys()
    assert "conditioner.embedders.0.model.transformer.resblocks.0.attn.in_proj_weight" in keys
    assert "model.diffusion_model.input_blocks.10.0.in_layers.0.weight" in keys
    options = {"image": latents, "strength": 0.5, **SETTINGS}
    drawn = load(file, "cpu", parts=whole[1]).sample("a red circle", **options).images
    assert (drawn == load(whole[1], "cpu").sample("a red circle", **options).images).all()
    said = inspected(file)
    assert said["family"] == "sdxl_refiner" and said["missing"] == []
    assert inspected(whole[1])["family"] == "sdxl_refiner"
    again = tmp_path / "again.safetensors"
    with pytest.raises(SystemExit) as left:
        main(["convert", str(file), str(again), "--to", "single-file", "--parts", str(whole[1])])
    assert left.value.code == 0 and again.read_bytes() == file.read_bytes()
    pipe = diffusers.StableDiffusionXLImg2ImgPipeline.from_single_file(
        str(file), config=str(whole[1]), local_files_only=True, add_watermarker=False
    )
    for name in ("unet", "vae", "text_encoder_2"):
        expected, found = getattr(whole[0], name).state_dict(), getattr(pipe, name).state_dict()
        assert expected.keys() == found.keys()
        assert all(torch.equal(found[key], value) for key, value in expected.items()), name


def test_it_trains_as_it_is_told(whole: tuple[Any, Path]) -> None:
    """Scores come with the data, and reach the network."""
    model = load(whole[1], "cpu").model
    raw = [{"caption": "a red circle", "aesthetic_score": score} for score in (3, 8)]
    model.denoiser.requires_grad_(True)
    assert model.conditioner is not None
    with torch.no_grad():
        told = {name: value.clone() for name, value in model.cond(raw).items()}
    from sfumato.objectives.denoising import Denoising

    x0 = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    loss = Denoising()(model.denoiser, x0, told, torch.Generator().manual_seed(1))
    loss.value.backward()
    gradients = [p.grad for p in model.net.parameters() if p.requires_grad]
    assert all(one is not None and bool(one.isfinite().all()) for one in gradients)
    assert not torch.equal(told["pooled"][0], told["pooled"][1])
    null = model.conditioner.null(1)["pooled"]
    low = model.cond([{"caption": "", "aesthetic_score": 2.5}])["pooled"]
    assert torch.equal(null, low)


def test_a_lora_of_ours_is_heard_in_diffusers_and_here(
    whole: tuple[Any, Path], latents: torch.Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the network and of its one text encoder, which is the second."""
    pytest.importorskip("peft")
    monkeypatch.setattr("transformers.integrations.peft.MIN_PEFT_VERSION", "0.15.0")
    pipeline = load(whole[1], "cpu")
    plain = pipeline.sample("a red circle", image=latents, strength=0.5, **SETTINGS).images
    parts = parts_of(pipeline.model)
    assert [part.name for part in parts] == ["unet", "text_encoder_2"]
    adapter = random_adapter(parts)
    write_adapter(tmp_path / "pytorch_lora_weights.safetensors", adapter, parts)
    pipe = diffusers.StableDiffusionXLImg2ImgPipeline.from_pretrained(whole[1], add_watermarker=False)
    pipe.set_progress_bar_config(disable=True)
    pipe.load_lora_weights(tmp_path)
    pipeline.load_lora(tmp_path, 0.2)
    pipe.set_adapters(pipe.get_active_adapters(), [0.2])
    drawn = pipeline.sample("a red circle", image=latents, strength=0.5, **SETTINGS).images
    assert apart(drawn[0], theirs(pipe, latents, strength=0.5)) < 1.01 / 255
    assert np.abs(drawn.astype(int) - plain).max() > 3


@pytest.mark.parametrize(
    ("prompt", "options", "error", "said"),
    [
        ({"caption": "a red circle", "aesthetic_score": "good"}, {}, DataError, "number"),
        ({"caption": "a red circle", "aesthetic_score": True}, {}, DataError, "number"),
        ("a red circle", {"image": torch.zeros(1, 4, 4, 4)}, ConfigError, "another shape"),
        ("a red circle", {"image": torch.zeros(3, 4, 8, 8)}, ConfigError, "one for each prompt"),
        ("a red circle", {"image": torch.zeros(1, 4, 8, 8), "mask": np.ones((16, 16, 3))}, ConfigError, "mask"),
    ],
)
def test_what_cannot_be_is_named(whole: tuple[Any, Path], prompt: Any, options: Any, error: Any, said: str) -> None:
    pipeline: Pipeline = load(whole[1], "cpu")
    with pytest.raises(error, match=said):
        pipeline.sample(prompt, steps=2, size=16, **options)

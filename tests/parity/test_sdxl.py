"""SDXL: diffusers' own pipeline, small and with every weight random, both ways."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.clip import encoder, randomised, tokenizer

from sfumato import load
from sfumato.errors import CheckpointError
from sfumato.io.directory import save_model
from sfumato.io.published import save_published

diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")


def projected() -> Any:
    config = encoder(3).config.to_dict() | {"hidden_size": 15, "intermediate_size": 20, "projection_dim": 10}
    return randomised(transformers.CLIPTextModelWithProjection(transformers.CLIPTextConfig(**config)), 7)


def pipeline_of(folder: Path, *, zeros: bool) -> tuple[Any, Path]:
    unet = diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32, 48),
        layers_per_block=2,
        cross_attention_dim=12 + 15,
        norm_num_groups=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2, 3),
        attention_head_dim=[2, 4, 6],
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=10 + 6 * 256,
    )
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        scaling_factor=0.13,
    )
    scheduler = diffusers.EulerDiscreteScheduler(
        beta_start=8.5e-4,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        steps_offset=1,
        timestep_spacing="leading",
    )
    made = diffusers.StableDiffusionXLPipeline(
        randomised(vae, 3),
        encoder(3),
        projected(),
        tokenizer(folder / "made"),
        tokenizer(folder / "made2"),
        randomised(unet, 5),
        scheduler,
        force_zeros_for_empty_prompt=zeros,
        add_watermarker=False,
    )
    made.set_progress_bar_config(disable=True)
    made.save_pretrained(folder / "whole")
    return made, folder / "whole"


@pytest.fixture(scope="module", params=[True, False])
def whole(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    return pipeline_of(tmp_path_factory.mktemp("xl"), zeros=request.param)


def theirs(pipe: Any, **options: Any) -> torch.Tensor:
    rng = torch.Generator().manual_seed(7)
    told = pipe("a red circle", num_inference_steps=6, generator=rng, output_type="np", height=16, width=16, **options)
    return torch.from_numpy(told.images[0])


@pytest.mark.parametrize(
    ("options", "ours"),
    [
        ({"guidance_scale": 1.0}, {"guidance": 1.0}),
        ({"guidance_scale": 4.0}, {"guidance": 4.0}),
        ({"guidance_scale": 4.0, "negative_prompt": "a square"}, {"guidance": 4.0, "negative": "a square"}),
    ],
)
def test_a_folder_of_diffusers_draws_the_same_picture(
    whole: tuple[Any, Path], options: dict[str, Any], ours: dict[str, Any]
) -> None:
    pipe, folder = whole
    drawn = load(folder, "cpu").sample("a red circle", steps=6, seeds=7, size=16, **ours)
    assert float((torch.from_numpy(drawn.images[0]) / 255 - theirs(pipe, **options)).abs().max()) < 0.51 / 255


def test_the_second_encoder_may_have_a_prompt_of_its_own(whole: tuple[Any, Path]) -> None:
    pipe, folder = whole
    told = {"prompt_2": "a blue square", "negative_prompt": "a dog", "negative_prompt_2": "a cat"}
    expected = theirs(pipe, guidance_scale=4.0, **told)
    pipeline = load(folder, "cpu")
    prompt = "a red circle"
    settings: dict[str, Any] = {"steps": 6, "guidance": 4.0, "seeds": 7, "size": 16}
    negative = {"caption": "a dog", "prompt_2": "a cat"}
    drawn = pipeline.sample({"caption": prompt, "prompt_2": "a blue square"}, negative=negative, **settings)
    assert float((torch.from_numpy(drawn.images[0]) / 255 - expected).abs().max()) < 1.01 / 255
    assert drawn.settings[0]["fields"]["prompt_2"] == "a blue square"
    alone = pipeline.sample(prompt, negative="a dog", **settings).images
    assert (alone != drawn.images).any()


def test_sizes_are_told(whole: tuple[Any, Path]) -> None:
    pipe, folder = whole
    told = {"original_size": (64, 48), "crops_coords_top_left": (3, 5), "target_size": (32, 40)}
    raw = {"caption": "a red circle", "original_size": [64, 48], "crop": [3, 5], "target_size": [32, 40]}
    drawn = load(folder, "cpu").sample(raw, steps=6, seeds=7, size=16, guidance=1.0)
    same = theirs(pipe, guidance_scale=1.0, **told)
    assert float((torch.from_numpy(drawn.images[0]) / 255 - same).abs().max()) < 0.51 / 255
    assert float((same - theirs(pipe, guidance_scale=1.0)).abs().max()) > 0.02  # it matters


def test_there_and_back_and_into_diffusers(whole: tuple[Any, Path], tmp_path: Path) -> None:
    def contents(folder: Path) -> dict[str, bytes]:
        return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}

    pipe, folder = whole
    model = load(folder, "cpu").model
    save_model(tmp_path / "a", model, model.facts)
    save_published(tmp_path / "b", load(tmp_path / "a", "cpu").model)
    back = load(tmp_path / "b", "cpu").model
    save_model(tmp_path / "c", back, back.facts)
    assert contents(tmp_path / "a") == contents(tmp_path / "c")
    again = diffusers.StableDiffusionXLPipeline.from_pretrained(tmp_path / "b", add_watermarker=False)
    again.set_progress_bar_config(disable=True)
    again.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
    torch.testing.assert_close(theirs(again), theirs(pipe), rtol=1e-5, atol=1e-5)


def test_a_folder_without_its_second_encoder_is_named(whole: tuple[Any, Path], tmp_path: Path) -> None:
    import json
    import shutil

    shutil.copytree(whole[1], tmp_path / "torn")
    index = json.loads((tmp_path / "torn/model_index.json").read_text())
    index["text_encoder_2"] = [None, None]
    (tmp_path / "torn/model_index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="text_encoder_2"):
        load(tmp_path / "torn", "cpu")

"""Stable Diffusion: diffusers' own U-Net and pipeline, small and with every weight random, both ways."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.clip import encoder, randomised, tokenizer
from torch import Tensor

from sfumato import load
from sfumato.cli import main
from sfumato.errors import CheckpointError, DataError
from sfumato.io.directory import load_model, save_model
from sfumato.io.families.stable import config_of, lines
from sfumato.io.keymap import DIFFUSERS, ORIGINAL, OURS, renamed
from sfumato.io.published import save_published
from sfumato.nets.stable_unet import PRESETS, StableUNet

diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

CLOSE = {"rtol": 1e-4, "atol": 1e-4}
SMALL: dict[str, Any] = {
    "sample_size": 8,
    "block_out_channels": (16, 32, 48),
    "layers_per_block": 2,
    "cross_attention_dim": 12,
    "norm_num_groups": 8,
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    "attention_head_dim": 4,
}
XL = {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 3),
    "attention_head_dim": [2, 4, 6],
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 4,
    "projection_class_embeddings_input_dim": 10 + 6 * 4,
}
REFINER = {
    **XL,
    "block_out_channels": (16, 32, 48, 48),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": 2,
    "attention_head_dim": [2, 4, 6, 12],
    "projection_class_embeddings_input_dim": 10 + 5 * 4,
}
KINDS: dict[str, dict[str, Any]] = {
    "sd15": {},
    "sd21": {"attention_head_dim": [2, 4, 6], "use_linear_projection": True},
    "inpainting": {"in_channels": 9},
    "lcm": {"time_cond_proj_dim": 20},
    "sdxl": XL,
    "sdxl-refiner": REFINER,
}


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def peer(kind: str) -> Any:
    return randomised(diffusers.UNet2DConditionModel(**{**SMALL, **KINDS[kind]}))


def heads_of(peer: Any) -> tuple[int, ...]:
    said = peer.config.attention_head_dim
    return tuple(said) if isinstance(said, (list, tuple)) else (said,) * len(peer.config.block_out_channels)


def answers(peer: Any, ours: StableUNet, kind: str) -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(5)
    x = torch.randn(2, ours.config.in_channels, 8, 16, generator=rng)
    t, context = torch.tensor([981, 3]), torch.randn(2, 7, 12, generator=rng)
    told: dict[str, Any] = {}
    own: dict[str, Tensor] = {}
    if kind in ("sdxl", "sdxl-refiner"):
        text = torch.randn(2, 10, generator=rng)
        sizes = torch.tensor([[64.0, 96, 0, 4, 64, 96] if kind == "sdxl" else [64.0, 96, 0, 4, 6.0]] * 2)
        told["added_cond_kwargs"] = {"text_embeds": text, "time_ids": sizes}
        own["pooled"] = torch.cat([text, peer.add_time_proj(sizes.flatten()).reshape(2, -1)], 1)
    if kind == "lcm":
        from diffusers import LatentConsistencyModelPipeline

        weight = torch.tensor([7.5, 2.0])
        told["timestep_cond"] = LatentConsistencyModelPipeline.get_guidance_scale_embedding(None, weight, 20)  # type: ignore[arg-type]
        own["guidance"] = weight
    with torch.no_grad():
        return peer(x, t, context, **told).sample, ours(x, t.float(), context=context, **own)


def test_the_network_of_diffusers_answers_the_same_here(peer: Any, kind: str) -> None:
    config = config_of(peer.state_dict(), DIFFUSERS, "here", heads_of(peer), 8)
    ours = StableUNet(config).eval()
    ours.load_state_dict(renamed(peer.state_dict(), lines(config), DIFFUSERS, OURS, "here"))
    theirs, here = answers(peer, ours, kind)
    torch.testing.assert_close(here, theirs, **CLOSE)


def test_our_network_answers_the_same_in_diffusers(peer: Any, kind: str) -> None:
    config = config_of(peer.state_dict(), DIFFUSERS, "here", heads_of(peer), 8)
    ours = StableUNet(config)
    randomised(ours, 2)
    fresh = diffusers.UNet2DConditionModel(**peer.config).eval()
    fresh.load_state_dict(renamed(ours.state_dict(), lines(config), OURS, DIFFUSERS, "here"))
    theirs, here = answers(fresh, ours, kind)
    torch.testing.assert_close(theirs, here, **CLOSE)


def test_the_original_layout_is_that_which_diffusers_converts(peer: Any, kind: str) -> None:
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    state = peer.state_dict()
    config = config_of(state, DIFFUSERS, "here", heads_of(peer), 8)
    original = renamed(state, lines(config), DIFFUSERS, ORIGINAL, "here")
    assert config_of(original, ORIGINAL, "here", heads_of(peer), 8) == config
    back = renamed(original, lines(config), ORIGINAL, DIFFUSERS, "here")
    assert back.keys() == state.keys() and all(torch.equal(back[key], value) for key, value in state.items())
    if kind == "lcm":
        return  # they have no original layout for it
    told = {f"model.diffusion_model.{key}": value for key, value in original.items()}
    theirs = convert_ldm_unet_checkpoint(told, {**peer.config, "class_embed_type": None})
    assert theirs.keys() == state.keys()
    assert all(torch.equal(theirs[key], value) for key, value in state.items())


@pytest.mark.parametrize(
    ("name", "options", "count"),
    [
        ("sd15", {"cross_attention_dim": 768, "attention_head_dim": 8}, 859_520_964),
        (
            "sd21",
            {"cross_attention_dim": 1024, "attention_head_dim": [5, 10, 20, 20], "use_linear_projection": True},
            865_910_724,
        ),
        (
            "sdxl",
            {
                **XL,
                "block_out_channels": (320, 640, 1280),
                "transformer_layers_per_block": (1, 2, 10),
                "attention_head_dim": [5, 10, 20],
                "cross_attention_dim": 2048,
                "addition_time_embed_dim": 256,
                "projection_class_embeddings_input_dim": 2816,
            },
            2_567_463_684,
        ),
        (
            "sdxl-refiner",  # of the published yaml (sd_xl_refiner.yaml), whose widths diffusers' config has too
            {
                **REFINER,
                "block_out_channels": (384, 768, 1536, 1536),
                "transformer_layers_per_block": 4,
                "attention_head_dim": [6, 12, 24, 24],
                "cross_attention_dim": 1280,
                "addition_time_embed_dim": 256,
                "projection_class_embeddings_input_dim": 2560,
            },
            None,
        ),
    ],
)
def test_names_shapes_and_counts_at_full_size(name: str, options: dict[str, Any], count: int | None) -> None:
    with torch.device("meta"):
        ours, theirs = StableUNet(PRESETS[name]), diffusers.UNet2DConditionModel(**options)
    state = renamed(ours.state_dict(), lines(PRESETS[name]), OURS, DIFFUSERS, "here")
    assert {key: value.shape for key, value in state.items()} == {k: v.shape for k, v in theirs.state_dict().items()}
    assert sum(p.numel() for p in ours.parameters()) == (count or sum(p.numel() for p in theirs.parameters()))


# Whole pipelines


def pipeline_of(folder: Path, prediction: str, text: Any = None, net: dict[str, Any] | None = None) -> Any:
    words, text = tokenizer(folder / "made"), text or encoder()
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        scaling_factor=0.7,
    )
    scheduler = diffusers.DDIMScheduler(
        beta_start=8.5e-4,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=True,
        steps_offset=1,
        prediction_type=prediction,
    )
    unet = diffusers.UNet2DConditionModel(**{**SMALL, **(net or {})})
    made = diffusers.StableDiffusionPipeline(
        randomised(vae, 3),
        randomised(text, 4),
        words,
        randomised(unet, 5),
        scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    made.save_pretrained(folder / "whole")
    return made


@pytest.fixture(scope="module", params=["epsilon", "v_prediction"])
def whole(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    folder = tmp_path_factory.mktemp("stable")
    made = pipeline_of(folder, request.param)
    made.set_progress_bar_config(disable=True)
    return made, folder / "whole"


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_a_folder_of_diffusers_draws_the_same_picture(whole: tuple[Any, Path], guidance: float) -> None:
    """From the same prompt, steps and seed."""
    pipe, folder = whole
    rng = torch.Generator().manual_seed(7)
    told = pipe("a red circle", num_inference_steps=8, guidance_scale=guidance, generator=rng, output_type="np")
    ours = load(folder, "cpu").sample("a red circle", steps=8, guidance=guidance, seeds=7, size=16)
    assert float((torch.from_numpy(ours.images[0]) / 255 - torch.from_numpy(told.images[0])).abs().max()) < 0.51 / 255


def test_what_was_loaded_is_saved_as_ours_and_draws_the_same(whole: tuple[Any, Path], tmp_path: Path) -> None:
    _, folder = whole
    pipeline = load(folder, "cpu")
    save_model(tmp_path / "mine", pipeline.model, {})
    again = load(tmp_path / "mine", "cpu")
    one, two = (p.sample("a blue square", steps=4, size=16).images for p in (pipeline, again))
    assert (one == two).all()
    assert load_model(tmp_path / "mine").spec["model"]["codec"]["scale"] == 0.7


def test_what_it_recommends_is_what_its_scheduler_says(whole: tuple[Any, Path]) -> None:
    pipeline = load(whole[1], "cpu")
    settings = pipeline.settings()
    assert settings.sampler == {"kind": "ddim"} and settings.grid == {"kind": "leading", "offset": 1}
    assert settings.guidance == 7.5 and settings.steps == 50


def test_prompts_that_are_too_long_are_refused(whole: tuple[Any, Path]) -> None:
    with pytest.raises(DataError, match="longer than this model reads"):
        load(whole[1], "cpu").sample("a red circle left of a blue square " * 4, steps=2)


def test_folders_that_are_not_whole_are_named(whole: tuple[Any, Path], tmp_path: Path) -> None:
    import shutil

    for missing, said in (("unet", "unet"), ("tokenizer", "tokenizer"), ("vae", "vae")):
        copy = tmp_path / missing
        shutil.copytree(whole[1], copy)
        shutil.rmtree(copy / missing)
        with pytest.raises(CheckpointError, match=said):
            load(copy, "cpu")
    copy = tmp_path / "other"
    shutil.copytree(whole[1], copy)
    index = json.loads((copy / "model_index.json").read_text())
    (copy / "model_index.json").write_text(json.dumps(index | {"_class_name": "FlaxPipeline"}))
    with pytest.raises(CheckpointError, match="FlaxPipeline"):
        load(copy, "cpu")


# Layouts


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_converting_there_and_back_gives_the_same_bytes(whole: tuple[Any, Path], tmp_path: Path) -> None:
    def convert(source: Path, target: str, to: str) -> Path:
        with pytest.raises(SystemExit) as left:
            main(["convert", str(source), str(tmp_path / target), "--to", to])
        assert left.value.code == 0
        return tmp_path / target

    ours = convert(whole[1], "a", "sfumato")
    theirs = convert(ours, "b", "diffusers")
    assert contents(convert(theirs, "c", "sfumato")) == contents(ours)
    assert contents(convert(tmp_path / "c", "d", "diffusers")) == contents(theirs)


def test_diffusers_draws_the_same_from_what_we_write(whole: tuple[Any, Path], tmp_path: Path) -> None:
    save_published(tmp_path / "mine", load(whole[1], "cpu").model)
    pipes = [whole[0], diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "mine", safety_checker=None)]
    drawn = []
    for pipe in pipes:
        pipe.set_progress_bar_config(disable=True)
        rng = torch.Generator().manual_seed(3)
        told = pipe("a blue square", num_inference_steps=5, guidance_scale=3.0, generator=rng, output_type="np")
        drawn.append(torch.from_numpy(told.images))
    torch.testing.assert_close(drawn[1], drawn[0], rtol=1e-5, atol=1e-5)


def test_what_cannot_be_converted_is_named(whole: tuple[Any, Path], tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "there").mkdir()
    for words, said in (
        (["--to", "difusers"], "diffusers"),
        (["--to", "sfumato", "--dtype", "fp8"], "fp16"),
        (["--to", "sfumato"], "exists already"),
    ):
        with pytest.raises(SystemExit) as left:
            main(["convert", str(whole[1]), str(tmp_path / "there"), *words])
        assert left.value.code == 2 and said in capsys.readouterr().err

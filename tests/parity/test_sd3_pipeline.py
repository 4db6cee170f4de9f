"""Whole models of Stable Diffusion 3: small ones with every weight random, from diffusers' pipeline and back."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests import clip, t5
from tests.clip import randomised
from torch import Tensor

from sfumato import load
from sfumato.cli import main
from sfumato.errors import CheckpointError, ConfigError, DataError
from sfumato.files import MANIFEST
from sfumato.io.directory import save_model
from sfumato.io.published import load_published, save_published
from sfumato.io.published import save_file as save_single
from sfumato.pipeline import Pipeline

diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

STEPS, SIZE = 5, 16
T5 = 40  # the width of its states


def made(folder: Path, whole: bool) -> Any:
    """A pipeline of diffusers, saved in a folder; without T5 if it is not whole."""
    words = clip.tokenizer(folder / "made")
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        num_layers=3,
        num_attention_heads=3,
        attention_head_dim=8,
        caption_projection_dim=24,
        joint_attention_dim=T5,
        pooled_projection_dim=5 + 7,
        pos_embed_max_size=12,
        qk_norm="rms_norm" if whole else None,
        dual_attention_layers=(0,) if whole else (),
    )
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        scaling_factor=1.5305,
        shift_factor=0.0609,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    randomised(transformer, 5)
    pipe = diffusers.StableDiffusion3Pipeline(
        transformer,
        diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        randomised(vae, 3),
        clip.encoder(3, projected=5, width=9, seed=6, hidden_act="quick_gelu"),
        words,
        clip.encoder(3, projected=7, width=15, seed=7, hidden_act="gelu"),
        words,
        t5.encoder(T5) if whole else None,
        t5.tokenizer(folder / "made3") if whole else None,
    )
    pipe.set_progress_bar_config(disable=True)
    pipe.save_pretrained(folder / "whole")
    return pipe


@pytest.fixture(scope="module", params=["three encoders", "no T5"])
def stable(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    folder = tmp_path_factory.mktemp("stable")
    return made(folder, request.param == "three encoders"), folder / "whole"


def drawn(pipe: Any, prompt: str, guidance: float, negative: str | None = None, seed: int = 7, **more: Any) -> Tensor:
    """diffusers' picture, from 0 to 1."""
    rng = torch.Generator().manual_seed(seed)
    settings: dict[str, Any] = {"num_inference_steps": STEPS, "guidance_scale": guidance, "height": SIZE, "width": 24}
    said = pipe(prompt, negative_prompt=negative, generator=rng, output_type="np", **settings, **more)
    return torch.from_numpy(said.images[0])


def ours(pipeline: Pipeline, prompt: str, guidance: Any, negative: str | None = None, seed: int = 7) -> Tensor:
    settings: dict[str, Any] = {"steps": STEPS, "guidance": guidance, "negative": negative, "size": (SIZE, 24)}
    return torch.from_numpy(pipeline.sample(prompt, seeds=seed, **settings).images[0]) / 255


@pytest.mark.parametrize(("guidance", "negative"), [(1.0, None), (4.0, None), (4.0, "a blue square")])
def test_a_folder_draws_the_same_picture(stable: tuple[Any, Path], guidance: float, negative: str | None) -> None:
    """From the same prompts, steps and seed, to a step of 8 bits."""
    pipe, folder = stable
    theirs = drawn(pipe, "a red circle", guidance, negative)
    here = ours(load(folder, "cpu"), "a red circle", guidance, negative)
    assert theirs.std() > 0.05  # a picture, and not a plane
    assert float((here - theirs).abs().max()) < 1.01 / 255


def test_a_long_prompt_is_cut_for_clip_and_not_for_t5(stable: tuple[Any, Path]) -> None:
    pipe, folder = stable
    prompt = "a red circle left of a blue square " * 4
    if pipe.text_encoder_3 is None:
        with pytest.raises(DataError, match="longer than this model reads"):
            ours(load(folder, "cpu"), prompt, 2.0)
        return
    assert float((ours(load(folder, "cpu"), prompt, 2.0) - drawn(pipe, prompt, 2.0)).abs().max()) < 1.01 / 255


def test_skipped_layers_are_those_of_diffusers(stable: tuple[Any, Path]) -> None:
    """Skip-layer guidance, as of 3.5-medium; the scale of 2.5 that is added there is 3.5 here."""
    pipe, folder = stable
    skipping = {"skip_guidance_layers": [1], "skip_layer_guidance_scale": 2.5}
    always = {"skip_layer_guidance_start": -1, "skip_layer_guidance_stop": 2}
    theirs = drawn(pipe, "a red circle", 4.0, **skipping, **always)
    assert (theirs - drawn(pipe, "a red circle", 4.0)).abs().max() > 0.02
    of = {"kind": "cfg", "scale": 4.0}
    slot = {"kind": "skip_layers", "blocks": [1], "scale": 3.5, "of": of}
    assert float((ours(load(folder, "cpu"), "a red circle", slot) - theirs).abs().max()) < 1.01 / 255


def test_what_is_recommended_is_what_its_scheduler_says(stable: tuple[Any, Path]) -> None:
    settings = load(stable[1], "cpu").settings()
    assert settings.sampler == {"kind": "euler"}
    assert settings.grid == {"kind": "shifted", "by": 3.0, "compat": "sd3"}
    assert load(stable[1], "cpu").model.size == (16, 16)


# There and back


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_converting_there_and_back_gives_the_same_bytes(stable: tuple[Any, Path], tmp_path: Path) -> None:
    model = load_published(stable[1])
    save_model(tmp_path / "a", model, model.facts)
    save_published(tmp_path / "b", load(tmp_path / "a", "cpu").model)
    again = load_published(tmp_path / "b")
    save_model(tmp_path / "c", again, again.facts)
    assert contents(tmp_path / "c") == contents(tmp_path / "a")
    save_published(tmp_path / "d", again)
    assert contents(tmp_path / "d") == contents(tmp_path / "b")


def test_diffusers_draws_the_same_from_what_we_write(stable: tuple[Any, Path], tmp_path: Path) -> None:
    save_published(tmp_path / "mine", load_published(stable[1]))
    absent = {"text_encoder_3": None, "tokenizer_3": None} if stable[0].text_encoder_3 is None else {}
    fresh = diffusers.StableDiffusion3Pipeline.from_pretrained(tmp_path / "mine", **absent)  # it wants that said
    fresh.set_progress_bar_config(disable=True)
    one, two = (drawn(pipe, "a blue square", 3.0, seed=3) for pipe in (stable[0], fresh))
    torch.testing.assert_close(two, one, rtol=1e-5, atol=1e-5)


# Single files


def test_a_single_file_keeps_every_weight(stable: tuple[Any, Path], tmp_path: Path) -> None:
    """By the command line, there and back."""
    words = (["a", "--to", "sfumato"], ["b.safetensors", "--to", "single-file"], ["c", "--to", "sfumato"])
    source = stable[1]
    for target, *rest in words:
        parts = ["--parts", str(stable[1])] if source.is_file() else []
        with pytest.raises(SystemExit) as left:
            main(["convert", str(source), str(tmp_path / target), *rest, *parts])
        assert left.value.code == 0
        source = tmp_path / target
    first, last = contents(tmp_path / "a"), contents(tmp_path / "c")
    assert {name for name in first.keys() | last.keys() if first.get(name) != last.get(name)} <= {
        "model.json",
        MANIFEST,
    }
    one, two = (json.loads((tmp_path / name / "model.json").read_text()) for name in "ac")
    assert {**one, "facts": {}} == {**two, "facts": {}}


def test_a_single_file_draws_the_same_picture(stable: tuple[Any, Path], tmp_path: Path) -> None:
    pipe, folder = stable
    save_single(tmp_path / "one.safetensors", load_published(folder))
    pipeline = load(tmp_path / "one.safetensors", "cpu", parts=folder)
    assert pipeline.settings().grid == {"kind": "shifted", "by": 3.0, "compat": "sd3"}
    theirs = drawn(pipe, "a red circle", 4.0)
    assert float((ours(pipeline, "a red circle", 4.0) - theirs).abs().max()) < 1.01 / 255


def test_a_single_file_is_that_which_diffusers_reads(stable: tuple[Any, Path], tmp_path: Path) -> None:
    """The transformer, the autoencoder and the encoders, by their own readers."""
    pipe, folder = stable
    file = tmp_path / "one.safetensors"
    save_single(file, load_published(folder))
    again = diffusers.SD3Transformer2DModel.from_single_file(str(file), config=str(folder), subfolder="transformer")
    for key, value in pipe.transformer.state_dict().items():
        assert torch.equal(again.state_dict()[key], value), key
    vae = diffusers.AutoencoderKL.from_single_file(str(file), config=str(folder), subfolder="vae")
    for key, value in pipe.vae.state_dict().items():
        assert torch.equal(vae.state_dict()[key], value), key
    kept = load_file(file)
    for name, encoder in (
        ("clip_l", pipe.text_encoder),
        ("clip_g", pipe.text_encoder_2),
        ("t5xxl", pipe.text_encoder_3),
    ):
        head = f"text_encoders.{name}.transformer."
        inner = {key.removeprefix(head): value for key, value in kept.items() if key.startswith(head)}
        assert bool(inner) == (encoder is not None)
        if encoder is not None:
            missing, unknown = encoder.load_state_dict(inner, strict=False)
            assert not unknown and set(missing) <= {"encoder.embed_tokens.weight"}


def test_what_a_file_lacks_comes_from_the_folder(stable: tuple[Any, Path], tmp_path: Path) -> None:
    """Published files hold the network and the autoencoder, or the network alone, with or without encoders."""
    pipe, folder = stable
    save_single(tmp_path / "one.safetensors", load_published(folder))
    kept = load_file(tmp_path / "one.safetensors")
    bare = {key.removeprefix("model.diffusion_model."): v for key, v in kept.items() if "diffusion_model" in key}
    save_file(bare, tmp_path / "bare.safetensors")
    pipeline = load(tmp_path / "bare.safetensors", "cpu", parts=folder)
    theirs = drawn(pipe, "a red circle", 4.0)
    assert float((ours(pipeline, "a red circle", 4.0) - theirs).abs().max()) < 1.01 / 255
    with pytest.raises(CheckpointError, match="--parts"):
        load(tmp_path / "bare.safetensors", "cpu")
    if pipe.text_encoder_3 is not None:  # a T5 without a tokenizer is not passed over
        shutil.copytree(folder, tmp_path / "less")
        shutil.rmtree(tmp_path / "less" / "tokenizer_3")
        with pytest.raises(CheckpointError, match="tokenizer"):
            load(tmp_path / "one.safetensors", "cpu", parts=tmp_path / "less")


def test_a_projection_that_is_left_out_is_the_identity(stable: tuple[Any, Path], tmp_path: Path) -> None:
    """As CLIP-L's is in published files."""
    folder = tmp_path / "folder"
    shutil.copytree(stable[1], folder)
    config = json.loads((folder / "text_encoder" / "config.json").read_text())
    (folder / "text_encoder" / "config.json").write_text(json.dumps({**config, "projection_dim": 9}))
    save_single(tmp_path / "one.safetensors", load_published(stable[1]))
    kept = load_file(tmp_path / "one.safetensors")
    del kept["text_encoders.clip_l.transformer.text_projection.weight"]
    inner = "model.diffusion_model.y_embedder.mlp.0.weight"
    kept[inner] = torch.cat([kept[inner], kept[inner][:, :4]], 1)  # four more numbers of the pooled prompt
    save_file(kept, tmp_path / "two.safetensors")
    model = load(tmp_path / "two.safetensors", "cpu", parts=folder).model
    assert torch.equal(model.weights()["conditioner.parts.0.encoder.text_projection.weight"], torch.eye(9))


# What cannot be


def test_other_networks_have_no_such_form(stable: tuple[Any, Path], tmp_path: Path) -> None:
    model = load_published(stable[1])
    section = {**model.spec["model"], "prediction": {"kind": "velocity"}}
    model.spec["model"] = section
    save_published(tmp_path / "of a run", model)  # whose spec spells names as mappings
    model.spec["model"] = {**section, "prediction": "x0"}
    with pytest.raises(ConfigError, match="no published family"):
        save_published(tmp_path / "mine", model)


def test_folders_that_are_not_whole_are_named(stable: tuple[Any, Path], tmp_path: Path) -> None:
    for missing in ("transformer", "tokenizer_2", "text_encoder", "vae"):
        shutil.copytree(stable[1], tmp_path / missing)
        shutil.rmtree(tmp_path / missing / missing)
        with pytest.raises(CheckpointError, match=missing):
            load_published(tmp_path / missing)

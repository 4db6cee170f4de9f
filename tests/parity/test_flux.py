"""FLUX.1: diffusers' own transformer and pipeline, small and with every weight random, both ways."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from safetensors.torch import save_file as store_file
from tests import t5
from tests.clip import encoder, randomised
from tests.clip import tokenizer as clip
from torch import Tensor

from sfumato import load
from sfumato.cli import main
from sfumato.errors import CheckpointError, ConfigError
from sfumato.io.families.flux import PREFIX, config_of, lines
from sfumato.io.families.flux1 import GRIDS
from sfumato.io.inspect import inspected
from sfumato.io.keymap import DIFFUSERS, ORIGINAL, OURS, renamed
from sfumato.io.published import save_file, save_published
from sfumato.nets.flux import PRESETS, Flux, FluxConfig

diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

CLOSE = {"rtol": 1e-4, "atol": 1e-4}
AXES = (4, 6, 10)
SMALL: dict[str, Any] = {
    "in_channels": 20,
    "num_layers": 2,
    "num_single_layers": 3,
    "attention_head_dim": 20,
    "num_attention_heads": 3,
    "joint_attention_dim": 10,
    "pooled_projection_dim": 7,
    "axes_dims_rope": AXES,
}
KINDS: dict[str, dict[str, Any]] = {
    "schnell": {},
    "dev": {"guidance_embeds": True},
    "fill": {"guidance_embeds": True, "in_channels": 32, "out_channels": 12},
}


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def peer(kind: str) -> Any:
    return randomised(diffusers.FluxTransformer2DModel(**{**SMALL, **KINDS[kind]}))


def shape_of(state: dict[str, Tensor], layout: str = DIFFUSERS) -> FluxConfig:
    return config_of(state, layout, "here", size=8, axes=AXES)


def answers(peer: Any, ours: Flux) -> tuple[Tensor, Tensor]:
    """For a picture that is not square; diffusers wants it packed, and is told where each patch lies."""
    rng, (height, width) = torch.Generator().manual_seed(5), (8, 12)
    pipe = diffusers.FluxPipeline
    x, t = torch.randn(2, ours.config.in_channels, height, width, generator=rng), torch.tensor([0.98125, 0.0035])
    context, pooled = torch.randn(2, 6, 10, generator=rng), torch.randn(2, 7, generator=rng)
    guidance = torch.tensor([3.5, 1.25]) if ours.config.guidance else None
    with torch.no_grad():
        said = peer(
            pipe._pack_latents(x, 2, ours.config.in_channels, height, width),
            encoder_hidden_states=context,
            pooled_projections=pooled,
            timestep=t,
            guidance=guidance,
            img_ids=pipe._prepare_latent_image_ids(2, height // 2, width // 2, "cpu", torch.float32),
            txt_ids=torch.zeros(6, 3),
        ).sample
        told = {} if guidance is None else {"guidance": guidance}
        return pipe._unpack_latents(said, height, width, 1), ours(x, 1000 * t, context=context, pooled=pooled, **told)


def test_the_network_of_diffusers_answers_the_same_here(peer: Any) -> None:
    config = shape_of(peer.state_dict())
    ours = Flux(config).eval()
    ours.load_state_dict(renamed(peer.state_dict(), lines(config), DIFFUSERS, OURS, "here"))
    theirs, here = answers(peer, ours)
    torch.testing.assert_close(here, theirs, **CLOSE)


def test_our_network_answers_the_same_in_diffusers(peer: Any) -> None:
    config = shape_of(peer.state_dict())
    ours = randomised(Flux(config), 2)
    assert isinstance(ours, Flux)
    fresh = diffusers.FluxTransformer2DModel(**peer.config).eval()
    fresh.load_state_dict(renamed(ours.state_dict(), lines(config), OURS, DIFFUSERS, "here"))
    theirs, here = answers(fresh, ours)
    torch.testing.assert_close(theirs, here, **CLOSE)


def test_the_original_layout_comes_back(peer: Any) -> None:
    state = peer.state_dict()
    config = shape_of(state)
    original = renamed(state, lines(config), DIFFUSERS, ORIGINAL, "here")
    assert shape_of(original, ORIGINAL) == config
    back = renamed(original, lines(config), ORIGINAL, DIFFUSERS, "here")
    assert back.keys() == state.keys() and all(torch.equal(back[key], value) for key, value in state.items())


@pytest.mark.parametrize("guidance", [False, True])
def test_the_original_layout_is_that_which_diffusers_converts(guidance: bool) -> None:
    """Its converter knows one width, 3072, and looks at rows alone: here each has three numbers."""
    from diffusers.loaders.single_file_utils import convert_flux_transformer_checkpoint_to_diffusers

    with torch.device("meta"):
        peer = diffusers.FluxTransformer2DModel(num_layers=2, num_single_layers=2, guidance_embeds=guidance)
    rng = torch.Generator().manual_seed(3)
    state = {
        key: torch.randn(len(value), *(3 for _ in value.shape[1:]), generator=rng)
        for key, value in peer.state_dict().items()
    }
    config = replace(PRESETS["dev" if guidance else "schnell"], double=2, single=2)
    original = renamed(state, lines(config), DIFFUSERS, ORIGINAL, "here")
    theirs = convert_flux_transformer_checkpoint_to_diffusers(dict(original))
    assert theirs.keys() == state.keys()
    assert all(torch.equal(theirs[key], value) for key, value in state.items())


@pytest.mark.parametrize(
    ("name", "options", "count"),
    [
        ("schnell", {}, 11_891_178_560),
        ("dev", {"guidance_embeds": True}, 11_901_408_320),
        ("dev-depth", {"guidance_embeds": True, "in_channels": 128, "out_channels": 64}, 11_901_604_928),
        ("dev-fill", {"guidance_embeds": True, "in_channels": 384, "out_channels": 64}, 11_902_391_360),
    ],
)
def test_names_shapes_and_counts_at_full_size(name: str, options: dict[str, Any], count: int) -> None:
    with torch.device("meta"):
        ours, theirs = Flux(PRESETS[name]), diffusers.FluxTransformer2DModel(**options)
    state = renamed(ours.state_dict(), lines(PRESETS[name]), OURS, DIFFUSERS, "here")
    assert {key: value.shape for key, value in state.items()} == {k: v.shape for k, v in theirs.state_dict().items()}
    shape = replace(PRESETS[name], out_channels=16)
    assert config_of(state, DIFFUSERS, "here", axes=(16, 56, 56)) == shape
    original = renamed(state, lines(shape), DIFFUSERS, ORIGINAL, "here")
    assert config_of(original, ORIGINAL, "here", axes=(16, 56, 56)) == shape
    assert original["double_blocks.18.img_attn.qkv.weight"].shape == (9216, 3072)
    assert original["single_blocks.37.linear1.weight"].shape == (21504, 3072)
    assert sum(p.numel() for p in ours.parameters()) == count == sum(p.numel() for p in theirs.parameters())


def test_axes_are_the_published_ones_unless_said() -> None:
    assert replace(PRESETS["dev"], axes=None).turning == PRESETS["dev"].turning == (16, 56, 56)


def test_what_has_no_place_or_is_missing_is_named(peer: Any) -> None:
    state = peer.state_dict()
    config = shape_of(state)
    with pytest.raises(CheckpointError, match="encoder_hid_proj"):
        renamed({**state, "encoder_hid_proj.weight": torch.ones(1)}, lines(config), DIFFUSERS, OURS, "here")
    with pytest.raises(CheckpointError, match="x_embedder"):
        shape_of({key: value for key, value in state.items() if key != "x_embedder.weight"})


# Whole pipelines


def pipeline_of(folder: Path, kind: str) -> Any:
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=5,
        norm_num_groups=4,
        scaling_factor=0.7,
        shift_factor=0.2,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    shifts = {"use_dynamic_shifting": True, "base_image_seq_len": 4, "max_image_seq_len": 64, "shift": 3.0}
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(**(shifts if kind == "dev" else {"shift": SHIFTS[kind]}))
    options = {"guidance_embeds": kind == "dev", "joint_attention_dim": 32, "pooled_projection_dim": 12}
    options |= {} if kind == "shifted" else {"axes_dims_rope": (4, 8, 8)}  # the published shares of a head
    made = diffusers.FluxPipeline(
        scheduler,
        randomised(vae, 3),
        encoder(),
        clip(folder / "clip"),
        t5.encoder(),
        t5.tokenizer(folder / "t5"),
        randomised(diffusers.FluxTransformer2DModel(**{**SMALL, **options}), 5),
    )
    made.tokenizer_2.model_max_length = 300 if kind == "schnell" else LENGTHS[kind]
    made.save_pretrained(folder / "whole")
    made.set_progress_bar_config(disable=True)
    return made


SHIFTS = {"schnell": 1.0, "shifted": 2.5}
LENGTHS = {"dev": 21, "schnell": 256, "shifted": 21}  # pieces of words of the prompt; schnell has no more


@pytest.fixture(scope="module", params=["dev", *SHIFTS])
def whole(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path, str]:
    folder = tmp_path_factory.mktemp("flux")
    return pipeline_of(folder, request.param), folder / "whole", request.param


def drawn_by(pipe: Any, **told: Any) -> Tensor:
    length = min(pipe.tokenizer_2.model_max_length, 256)
    said = {"num_inference_steps": 6, "height": 16, "width": 24, "max_sequence_length": length, **told}
    return torch.from_numpy(pipe("a red circle", output_type="np", **said).images)


def test_a_folder_of_diffusers_draws_the_same_picture(whole: tuple[Any, Path, str]) -> None:
    """From the same prompt, steps and seed; of a guidance that is told, at its own scale and at another."""
    pipe, folder, kind = whole
    ours = load(folder, "cpu")
    for scale, guidance in ((3.5, None), (2.0, 2.0 if kind == "dev" else None)):
        told = drawn_by(pipe, guidance_scale=scale, generator=torch.Generator().manual_seed(7))
        here = ours.sample("a red circle", steps=6, guidance=guidance, seeds=7, size=(16, 24)).images
        assert float((torch.from_numpy(here) / 255 - told).abs().max()) < 1.01 / 255
        assert float(told.std()) > 0.02  # pictures, not a plain colour


def test_real_guidance_is_the_same_too(whole: tuple[Any, Path, str]) -> None:
    """Two evaluations a step, and the guidance that would be told is off, which is 1."""
    pipe, folder, _ = whole
    rng = torch.Generator().manual_seed(7)
    told = drawn_by(pipe, guidance_scale=1.0, true_cfg_scale=3.0, negative_prompt="a blue square", generator=rng)
    said = {"guidance": {"kind": "cfg", "scale": 3.0}, "negative": "a blue square"}
    here = load(folder, "cpu").sample("a red circle", steps=6, seeds=7, size=(16, 24), **said).images
    assert float((torch.from_numpy(here) / 255 - told).abs().max()) < 1.01 / 255


def test_what_it_recommends_is_what_its_scheduler_says(whole: tuple[Any, Path, str]) -> None:
    _, folder, kind = whole
    ours = load(folder, "cpu")
    settings = ours.settings()
    dynamic = {"kind": "dynamic_shift", "low": 0.5, "high": 1.15, "fewest": 4, "most": 64, "form": "exponential"}
    grids = {"dev": dynamic, "schnell": {"kind": "linear"}, "shifted": {"kind": "shifted", "by": 2.5}}
    assert settings.sampler == {"kind": "euler"} and settings.grid == grids[kind]
    assert settings.steps == (28 if kind == "dev" else 4)
    assert settings.guidance == ({"kind": "distilled", "scale": 3.5} if kind == "dev" else 1)
    assert ours.model.size == (256, 256)  # 128 places of a latent, twice as many pixels


def test_the_grids_are_those_of_its_scheduler(whole: tuple[Any, Path, str]) -> None:
    pipe, folder, _ = whole
    drawn_by(pipe, generator=torch.Generator().manual_seed(0))
    times = [step.t for step in load(folder, "cpu").steps("a red circle", size=(16, 24), steps=6)]
    torch.testing.assert_close(torch.tensor(times), pipe.scheduler.sigmas, rtol=0, atol=1e-6)


# Layouts


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def converted(source: Path, target: Path, to: str, *more: str) -> Path:
    with pytest.raises(SystemExit) as left:
        main(["convert", str(source), str(target), "--to", to, *more])
    assert left.value.code == 0
    return target


def test_converting_there_and_back_gives_the_same_bytes(whole: tuple[Any, Path, str], tmp_path: Path) -> None:
    ours = converted(whole[1], tmp_path / "a", "sfumato")
    theirs = converted(ours, tmp_path / "b", "diffusers")
    assert contents(converted(theirs, tmp_path / "c", "sfumato")) == contents(ours)
    assert contents(converted(tmp_path / "c", tmp_path / "d", "diffusers")) == contents(theirs)


def test_diffusers_draws_the_same_from_what_we_write(whole: tuple[Any, Path, str], tmp_path: Path) -> None:
    save_published(tmp_path / "mine", load(whole[1], "cpu").model)
    fresh = diffusers.FluxPipeline.from_pretrained(tmp_path / "mine")
    fresh.set_progress_bar_config(disable=True)
    one, two = (drawn_by(pipe, generator=torch.Generator().manual_seed(3)) for pipe in (whole[0], fresh))
    torch.testing.assert_close(two, one, rtol=1e-5, atol=1e-5)


def test_an_original_file_goes_with_the_parts_of_a_folder(whole: tuple[Any, Path, str], tmp_path: Path) -> None:
    """Its weights are the folder's own, and so are its pictures, by the same grid."""
    _, folder, kind = whole
    file = converted(folder, tmp_path / "flux.safetensors", "single-file")
    told = inspected(file)
    assert told["family"] == "flux" and told["parts"]["network"]["tensors"] == told["tensors"]
    with pytest.raises(CheckpointError, match="--parts"):
        load(file, "cpu")
    ours, theirs = load(folder, "cpu"), load(file, "cpu", parts=folder)
    weights, other = ours.model.weights(), theirs.model.weights()
    assert weights.keys() == other.keys() and all(torch.equal(weights[key], other[key]) for key in weights)
    one, two = ours.settings(), theirs.settings()
    assert (one.steps, one.guidance, one.sampler) == (two.steps, two.guidance, two.sampler)
    assert two.grid == ({"kind": "linear"} if kind != "dev" else {**GRIDS[True]})
    if kind != "shifted":
        said = {"steps": 3, "size": (16, 24), "grid": one.grid}
        assert (ours.sample("a red circle", **said).images == theirs.sample("a red circle", **said).images).all()
    again = converted(file, tmp_path / "again.safetensors", "single-file", "--parts", str(folder))
    assert again.read_bytes() == file.read_bytes()


def test_folders_that_cannot_be_are_named(whole: tuple[Any, Path, str], tmp_path: Path) -> None:
    for missing, said in (("transformer", "transformer"), ("tokenizer_2", "tokenizer_2"), ("vae", "vae")):
        copy = tmp_path / missing
        shutil.copytree(whole[1], copy)
        shutil.rmtree(copy / missing)
        with pytest.raises(CheckpointError, match=said):
            load(copy, "cpu")
    copy = tmp_path / "fill"
    shutil.copytree(whole[1], copy)
    fill = diffusers.FluxTransformer2DModel(**{**SMALL, "in_channels": 60, "out_channels": 20})
    shutil.rmtree(copy / "transformer")
    fill.save_pretrained(copy / "transformer")
    with pytest.raises(CheckpointError, match="15 channels to 5, where the autoencoder has 5"):
        load(copy, "cpu")


def test_an_original_file_may_have_a_prefix(whole: tuple[Any, Path, str], tmp_path: Path) -> None:
    """And what stands in it beside the transformer is named."""
    model = load(whole[1], "cpu").model
    save_file(tmp_path / "plain.safetensors", model)
    state = load_file(tmp_path / "plain.safetensors")
    state = {f"{PREFIX}{key}": value for key, value in state.items()}
    store_file(state, tmp_path / "prefixed.safetensors")
    other = load(tmp_path / "prefixed.safetensors", "cpu", parts=whole[1]).model.weights()
    assert all(torch.equal(other[key], value) for key, value in model.weights().items())
    store_file({**state, "vae.decoder.conv_in.bias": torch.ones(1)}, tmp_path / "more.safetensors")
    with pytest.raises(CheckpointError, match=r"vae\.decoder\.conv_in\.bias"):
        load(tmp_path / "more.safetensors", "cpu", parts=whole[1])


def test_what_the_layouts_have_no_place_for_is_named(whole: tuple[Any, Path, str], tmp_path: Path) -> None:
    model = load(whole[1], "cpu").model
    model.spec["model"]["prediction"] = "x0"
    for write in (lambda: save_published(tmp_path / "a", model), lambda: save_file(tmp_path / "a", model)):
        with pytest.raises(ConfigError, match="prediction x0"):
            write()
    assert not any(tmp_path.iterdir())

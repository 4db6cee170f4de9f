"""DDPM and DDIM: diffusers' pipelines, small and with every weight random, both ways."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from pixel_unets import KINDS, SCALED, SMALL, close, contents, convert, load_safetensors
from tests.clip import randomised

from sfumato import load
from sfumato.errors import CheckpointError
from sfumato.io.families.autoencoder import modern
from sfumato.io.inspect import inspected
from sfumato.io.published import save_published

diffusers = pytest.importorskip("diffusers")

BETAS = {"beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear"}
PIPES: dict[str, tuple[str, Any, dict[str, Any]]] = {
    "google": ("ddpm", lambda: diffusers.DDPMScheduler(**BETAS, variance_type="fixed_large"), {}),
    "small": ("plain", lambda: diffusers.DDPMScheduler(beta_schedule="squaredcos_cap_v2", clip_sample=False), {}),
    "v": ("plain", lambda: diffusers.DDPMScheduler(**BETAS, prediction_type="v_prediction"), {}),
    "learned": ("variance", lambda: diffusers.DDPMScheduler(**BETAS, variance_type="learned_range"), {}),
    "ddim": ("ddpm", lambda: diffusers.DDIMScheduler(**BETAS), {}),
    "ddim-unclipped": ("ddpm", lambda: diffusers.DDIMScheduler(**BETAS, clip_sample=False), {}),
}
KINDS_OF_PIPES = {"variance": {"attention_head_dim": 8, "layers_per_block": 1, "out_channels": 6}}


def saved(folder: Path, name: str) -> Any:
    """A pipeline of diffusers, and the folder that it is saved in."""
    kind, scheduler, _ = PIPES[name]
    net = randomised(diffusers.UNet2DModel(**{**SMALL, **{**KINDS, **KINDS_OF_PIPES}[kind]}), 5)
    maker = diffusers.DDIMPipeline if name.startswith("ddim") else diffusers.DDPMPipeline
    made = maker(net, scheduler())
    made.save_pretrained(folder)
    made.set_progress_bar_config(disable=True)
    return made


@pytest.fixture(scope="module", params=PIPES)
def whole(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    folder = tmp_path_factory.mktemp("ddpm") / request.param
    return saved(folder, request.param), folder


def test_a_folder_of_diffusers_draws_the_same_picture(whole: tuple[Any, Path]) -> None:
    """From the same steps and seed, with the sampler and grid that the folder recommends."""
    pipe, folder = whole
    pipeline = load(folder, "cpu")
    assert pipeline.settings().steps == (50 if "ddim" in folder.name else 1000)
    for seed in (7, 8):
        rng = torch.Generator().manual_seed(seed)
        told = pipe(num_inference_steps=10, generator=rng, output_type="np").images
        ours = pipeline.sample(steps=10, seeds=seed).images
        assert close(ours[0], told[0])
        assert told.std() > 0.02  # the picture is no flat grey, nor all at the ends


def test_diffusers_draws_the_same_from_what_we_write(whole: tuple[Any, Path], tmp_path: Path) -> None:
    save_published(tmp_path / "mine", load(whole[1], "cpu").model)
    again = type(whole[0]).from_pretrained(tmp_path / "mine")
    drawn = []
    for pipe in (whole[0], again):
        pipe.set_progress_bar_config(disable=True)
        rng = torch.Generator().manual_seed(3)
        drawn.append(torch.as_tensor(pipe(num_inference_steps=7, generator=rng, output_type="np").images))
    torch.testing.assert_close(drawn[1], drawn[0], rtol=1e-5, atol=1e-5)


def test_converting_there_and_back_gives_the_same_bytes(whole: tuple[Any, Path], tmp_path: Path) -> None:
    ours = convert(whole[1], tmp_path / "a", "sfumato")
    theirs = convert(ours, tmp_path / "b", "diffusers")
    assert contents(convert(theirs, tmp_path / "c", "sfumato")) == contents(ours)
    assert contents(convert(tmp_path / "c", tmp_path / "d", "diffusers")) == contents(theirs)


def test_parts_in_the_folder_itself_and_old_names_are_googles(tmp_path: Path) -> None:
    """Google's DDPMs have no subfolders, and attention of names before diffusers 0.17."""
    saved(tmp_path / "new", "google")
    old = tmp_path / "old"
    old.mkdir()
    for part in ("unet", "scheduler"):
        for one in (tmp_path / "new" / part).iterdir():
            shutil.copy(one, old / one.name)
    shutil.copy(tmp_path / "new" / "model_index.json", old)
    names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    state = load_safetensors(old / "diffusion_pytorch_model.safetensors")
    renamed_state = {}
    for key, value in state.items():
        for new, before in names.items():
            key = key.replace(f".{new}.", f".{before}.") if ".attentions." in key else key
        renamed_state[key] = value
    assert renamed_state.keys() != state.keys() and modern(renamed_state).keys() == state.keys()
    (old / "diffusion_pytorch_model.safetensors").unlink()
    torch.save(renamed_state, old / "diffusion_pytorch_model.bin")
    one, two = (load(folder, "cpu").sample(steps=4).images for folder in (old, tmp_path / "new"))
    assert (one == two).all()
    found = inspected(old)
    assert found["family"] == "ddpm" and found["missing"] == [] and found["scheduler"] == "DDPMScheduler"
    assert found["parts"]["unet"]["parameters"] == sum(value.numel() for value in state.values())


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"time_embedding_type": "fourier"}, "fourier"),
        ({"center_input_sample": True}, "center_input_sample"),
        ({"in_channels": 6}, "6 channels"),
        ({"freq_shift": 2}, "freq_shift 2"),
        ({"sample_size": None}, "sample_size"),
        ({**SCALED, "attn_norm_num_groups": None}, "no norm"),
        ({"up_block_types": ("AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D")}, "up_blocks.0.attentions"),
        ({"down_block_types": ("SkipDownBlock2D", "AttnDownBlock2D", "DownBlock2D")}, "down_blocks.0"),
    ],
)
def test_networks_of_another_kind_are_named(changes: dict[str, Any], said: str, tmp_path: Path) -> None:
    net = diffusers.UNet2DModel(**{**SMALL, "attention_head_dim": 4, **changes})
    diffusers.DDPMPipeline(net, diffusers.DDPMScheduler()).save_pretrained(tmp_path / "odd")
    with pytest.raises(CheckpointError, match=said):
        load(tmp_path / "odd", "cpu")

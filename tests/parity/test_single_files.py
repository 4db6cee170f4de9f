"""Original single files of Stable Diffusion 1, 2 and XL: read, written, and read by diffusers itself."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.clip import encoder
from tests.parity import test_sdxl, test_stable_diffusion

from sfumato import load
from sfumato.cli import main
from sfumato.errors import CheckpointError
from sfumato.io.families import stable_files
from sfumato.io.families.encoders import SD2
from sfumato.io.inspect import inspected
from sfumato.io.published import save_file as write

diffusers = pytest.importorskip("diffusers")


@pytest.fixture(scope="module")
def sd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sd")
    test_stable_diffusion.pipeline_of(folder, "epsilon")
    return folder / "whole"


xl = test_sdxl.whole


def converted(*words: str) -> None:
    with pytest.raises(SystemExit) as left:
        main(["convert", *words])
    assert left.value.code == 0


def pictures(path: Path, parts: Path | None = None) -> Any:
    return load(path, "cpu", parts=parts).sample("a red circle", steps=4, seeds=3, size=16).images


@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt"])
def test_a_file_draws_what_its_folder_draws(sd: Path, tmp_path: Path, suffix: str) -> None:
    file = tmp_path / "whole.safetensors"
    converted(str(sd), str(file), "--to", "single-file")
    if suffix == ".ckpt":  # as trainers leave it: with an average, tables and counters
        state = load_file(file)
        more = {"model_ema.decay": torch.tensor(0.9), "betas": torch.zeros(5), "sqrt_alphas_cumprod": torch.zeros(5)}
        file = tmp_path / "whole.ckpt"
        torch.save({"state_dict": state | more, "global_step": 3}, file)
    assert (pictures(file, sd) == pictures(sd)).all()
    again = tmp_path / "again.safetensors"
    converted(str(file), str(again), "--to", "single-file", "--parts", str(sd))
    assert again.read_bytes() == (tmp_path / "whole.safetensors").read_bytes()
    said = inspected(file)
    assert said["kind"] == "single file" and said["family"] == "stable_diffusion" and said["missing"] == []
    assert said["parts"].keys() >= {"network", "autoencoder", "text encoder"}


def test_diffusers_reads_our_file(sd: Path, tmp_path: Path) -> None:
    write(tmp_path / "whole.safetensors", load(sd, "cpu").model)
    pipe = diffusers.StableDiffusionPipeline.from_single_file(
        str(tmp_path / "whole.safetensors"), config=str(sd), local_files_only=True, safety_checker=None
    )
    first = diffusers.StableDiffusionPipeline.from_pretrained(sd, safety_checker=None)
    for name in ("unet", "vae", "text_encoder"):
        theirs, ours = getattr(first, name).state_dict(), getattr(pipe, name).state_dict()
        assert theirs.keys() == ours.keys()
        assert all(torch.equal(ours[key], value) for key, value in theirs.items()), name


def test_sdxl(xl: tuple[Any, Path], tmp_path: Path) -> None:
    file = tmp_path / "xl.safetensors"
    converted(str(xl[1]), str(file), "--to", "single-file")
    state = load_file(file)
    assert "conditioner.embedders.1.model.transformer.resblocks.0.attn.in_proj_weight" in state
    assert "model.diffusion_model.label_emb.0.0.weight" in state and "first_stage_model.quant_conv.weight" in state
    assert (pictures(file, xl[1]) == pictures(xl[1])).all()
    unet = diffusers.UNet2DConditionModel.from_single_file(str(file), config=str(xl[1]), subfolder="unet")
    theirs = xl[0].unet.state_dict()
    assert all(torch.equal(value, theirs[key]) for key, value in unet.state_dict().items())


@pytest.fixture
def second(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, Path]:
    """A pipeline of version 2, which is known by the width of its words, and whose encoder is read up to a layer."""
    monkeypatch.setattr(stable_files, "SD2", (replace(SD2[0], layers=2),))
    options: dict[str, Any] = {"intermediate_size": 24, "num_attention_heads": 16, "hidden_act": "gelu"}
    text = encoder(2, width=stable_files.OPENCLIP, **options)
    net = {"attention_head_dim": [2, 4, 6], "use_linear_projection": True, "cross_attention_dim": stable_files.OPENCLIP}
    made = test_stable_diffusion.pipeline_of(tmp_path / "sd2", "v_prediction", text, net)
    return made, tmp_path / "sd2" / "whole"


def test_version_two(second: tuple[Any, Path], tmp_path: Path, capsys: Any) -> None:
    """Its files have a layer and a projection that nothing reads: they are left out, and it is said."""
    pipe, folder = second
    ours, file = tmp_path / "a", tmp_path / "sd2.safetensors"
    converted(str(folder), str(ours), "--to", "sfumato")
    converted(str(ours), str(file), "--to", "single-file")
    state = load_file(file)
    prefix = "cond_stage_model.model."
    assert f"{prefix}transformer.resblocks.1.attn.in_proj_weight" in state and stable_files.version(state) == "sd2"
    assert (pictures(file, folder) == pictures(folder)).all()
    read = diffusers.StableDiffusionPipeline.from_single_file(
        str(file), config=str(folder), local_files_only=True, safety_checker=None
    )
    for name in ("unet", "vae", "text_encoder"):
        expected, found = getattr(pipe, name).state_dict(), getattr(read, name).state_dict()
        assert expected.keys() == found.keys()
        assert all(torch.equal(found[key], value) for key, value in expected.items()), name
    # As published: one layer more, CLIP's projection and temperature
    layer = f"{prefix}transformer.resblocks."
    more = {key.replace(f"{layer}1.", f"{layer}2."): value for key, value in state.items() if f"{layer}1." in key}
    more |= {f"{prefix}text_projection": torch.randn(1024, 1024), f"{prefix}logit_scale": torch.tensor(4.6)}
    published = tmp_path / "published.safetensors"
    save_file({key: value.clone() for key, value in (state | more).items()}, published)
    assert (pictures(published, folder) == pictures(folder)).all()
    capsys.readouterr()
    converted(str(published), str(tmp_path / "there"), "--to", "sfumato", "--parts", str(folder))
    said = capsys.readouterr().err
    assert "left out: 14 weights of text encoders that nothing reads" in said and "resblocks.2" in said
    assert (ours / "model.safetensors").read_bytes() == (tmp_path / "there" / "model.safetensors").read_bytes()
    converted(str(published), str(tmp_path / "again.safetensors"), "--to", "single-file", "--parts", str(folder))
    assert (tmp_path / "again.safetensors").read_bytes() == file.read_bytes()


def test_version_two_there_and_back(second: tuple[Any, Path], tmp_path: Path) -> None:
    converted(str(second[1]), str(tmp_path / "a"), "--to", "sfumato")
    converted(str(tmp_path / "a"), str(tmp_path / "b"), "--to", "diffusers")
    converted(str(tmp_path / "b"), str(tmp_path / "c"), "--to", "sfumato")
    contents = test_stable_diffusion.contents
    assert contents(tmp_path / "a") == contents(tmp_path / "c")


def test_what_is_missing_or_odd_is_named(sd: Path, tmp_path: Path) -> None:
    file = tmp_path / "whole.safetensors"
    write(file, load(sd, "cpu").model)
    with pytest.raises(CheckpointError, match="--parts"):
        load(file, "cpu")
    state = load_file(file)
    for change, said in (
        ({"lora_unet_x": torch.zeros(1)}, "lora_unet_x"),
        ({"model.diffusion_model.odd.weight": torch.zeros(1)}, "odd.weight"),
        ({"model.diffusion_model.out.2.bias": torch.full((4,), torch.nan)}, "finite"),
    ):
        save_file(state | change, tmp_path / "odd.safetensors")
        with pytest.raises(CheckpointError, match=said):
            load(tmp_path / "odd.safetensors", "cpu", parts=sd)
    bare = {key: value for key, value in state.items() if not key.startswith(("first_stage", "cond_stage"))}
    save_file(bare, tmp_path / "bare.safetensors")
    assert inspected(tmp_path / "bare.safetensors")["missing"] == ["autoencoder", "text encoder"]
    assert (pictures(tmp_path / "bare.safetensors", sd) == pictures(sd)).all()
    del state["model.diffusion_model.out.2.bias"]
    save_file(state, tmp_path / "torn.safetensors")
    with pytest.raises(CheckpointError, match=r"exit\.bias is missing"):
        load(tmp_path / "torn.safetensors", "cpu", parts=sd)


def test_version_two_has_to_say_what_it_predicts(sd: Path, tmp_path: Path) -> None:
    state = {"cond_stage_model.model.x": torch.zeros(1)}
    state[stable_files.WORDS.format(1)] = torch.zeros(3, 1024)
    assert stable_files.version(state) == "sd2"
    with pytest.raises(CheckpointError, match="noise or v"):
        stable_files._scheduler(None, "sd2", "x")
    copy = tmp_path / "v"
    shutil.copytree(sd / "scheduler", copy / "scheduler")
    path = copy / "scheduler/scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"prediction_type": "v_prediction"}))
    assert stable_files._scheduler(copy, "sd2", "x")[1] == "v"

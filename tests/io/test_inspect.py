"""`sfumato inspect`: what things are, told from headers."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tests.clip import encoder, randomised

from sfumato.cli import main
from sfumato.errors import CheckpointError
from sfumato.io.directory import save_model
from sfumato.io.inspect import as_text, header, inspected
from sfumato.model import build_model

diffusers = pytest.importorskip("diffusers")


def test_a_model_directory(tmp_path: Path) -> None:
    section = {
        "path": "linear",
        "prediction": "velocity",
        "time_input": "thousandths",
        "scale_input": None,
        "net": {"kind": "dit", "patch": 8, "dim": 16, "depth": 1, "heads": 2},
        "codec": "pixels",
        "conditioner": None,
    }
    save_model(tmp_path / "m", build_model({"model": section, "size": [16, 16], "sampling": {"steps": 3}}), {})
    said = inspected(tmp_path / "m")
    assert said["kind"] == "model of sfumato" and said["family"] == "dit" and said["prediction"] == "velocity"
    assert said["parts"]["net"]["parameters"] > 1000 and said["parts"]["net"]["dtypes"].keys() == {"fp32"}
    assert said["missing"] == []


@pytest.mark.parametrize(("axes", "family"), [(1, "ddpm"), (2, "consistency")])
def test_files_of_pixel_unets_tell_their_family(axes: int, family: str, tmp_path: Path) -> None:
    """ADM's and consistency models' have the same names; the convolutions of their attention have not the same axes."""
    names = ("input_blocks.1.0.in_layers.2.weight", "time_embed.0.weight", "out.2.weight")
    state = {name: torch.ones(4, 4, 3, 3) for name in names}
    state["input_blocks.1.1.qkv.weight"] = torch.ones(12, 4, *[1] * axes)
    torch.save(state, tmp_path / "model.pt")
    said = inspected(tmp_path / "model.pt")
    assert said["family"] == family and said["kind"] == "single file" and said["missing"] == []


def test_a_folder_of_diffusers_with_a_part_missing(tmp_path: Path) -> None:
    unet = diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        cross_attention_dim=12,
        norm_num_groups=4,
        attention_head_dim=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )
    unet.save_pretrained(tmp_path / "unet")
    encoder().half().save_pretrained(tmp_path / "text_encoder")
    index = {
        "_class_name": "StableDiffusionPipeline",
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "safety_checker": [None, None],
    }
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    said = inspected(tmp_path)
    assert said["family"] == "stable_diffusion" and said["missing"] == ["vae"]
    assert said["parts"]["unet"]["parameters"] == sum(p.numel() for p in unet.parameters())
    assert said["parts"]["text_encoder"]["dtypes"].keys() == {"fp16"}
    assert "vae" in as_text(said) and "UNet2DConditionModel" in as_text(said)


def test_files(tmp_path: Path, capsys: Any) -> None:
    vae = diffusers.AutoencoderKL(block_out_channels=(8,), norm_num_groups=4)
    save_file(randomised(vae, 1).state_dict(), tmp_path / "vae.safetensors")
    assert inspected(tmp_path / "vae.safetensors")["kind"] == "autoencoder"
    lora = {"lora_unet_mid.lora_down.weight": torch.zeros(4, 8), "lora_unet_mid.lora_up.weight": torch.zeros(8, 4)}
    save_file(
        {**lora, "lora_unet_mid.alpha": torch.tensor(4.0)}, tmp_path / "lora.safetensors", {"ss_network_dim": "4"}
    )
    with pytest.raises(SystemExit) as left:
        main(["inspect", str(tmp_path / "lora.safetensors"), "--json"])
    said = json.loads(capsys.readouterr().out)
    assert left.value.code == 0 and said["kind"] == "LoRA" and said["ranks"] == [4] and said["dialect"] == "kohya"
    torch.save({"state_dict": {"a": torch.zeros(2, 3, dtype=torch.bfloat16)}}, tmp_path / "a.ckpt")
    assert header(tmp_path / "a.ckpt").counted() == {"tensors": 1, "parameters": 6, "dtypes": {"bf16": 1}}


def test_what_is_nothing_known_is_named(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("hello")
    (tmp_path / "torn.safetensors").write_bytes(b"\x10\x00\x00\x00\x00\x00\x00\x00{")
    for path, said in (
        (tmp_path, "nothing that is known"),
        (tmp_path / "no", "no such path"),
        (tmp_path / "notes.txt", "no file of weights"),
        (tmp_path / "torn.safetensors", "cannot be read"),
    ):
        with pytest.raises(CheckpointError, match=said):
            inspected(path)

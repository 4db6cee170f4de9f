"""What tests of pixel U-Nets share: diffusers' networks of every published kind, small and with every weight random."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.clip import randomised
from torch import Tensor

from sfumato.cli import main

diffusers = pytest.importorskip("diffusers")

SMALL: dict[str, Any] = {
    "sample_size": 16,
    "block_out_channels": (8, 16, 24),
    "layers_per_block": 2,
    "norm_num_groups": 4,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
}
RESAMPLES: dict[str, Any] = {
    "down_block_types": ("ResnetDownsampleBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "AttnUpBlock2D", "ResnetUpsampleBlock2D"),
    "downsample_type": "resnet",
    "upsample_type": "resnet",
    "attention_head_dim": 4,
}
GOOGLE: dict[str, Any] = {
    "attention_head_dim": None,
    "downsample_padding": 0,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "norm_eps": 1e-6,
}
SCALED: dict[str, Any] = {**RESAMPLES, "resnet_time_scale_shift": "scale_shift", "attn_norm_num_groups": 4}
KINDS: dict[str, dict[str, Any]] = {
    "ddpm": GOOGLE,
    "plain": {"attention_head_dim": 8, "layers_per_block": 1},
    "adm": {**SCALED, "out_channels": 6, "num_class_embeds": 7},
    "consistency-64": {**SCALED, "num_class_embeds": 7},
    "consistency-256": RESAMPLES,
}


def unet(kind: str, seed: int = 1) -> Any:
    return randomised(diffusers.UNet2DModel(**{**SMALL, **KINDS[kind]}), seed)


def close(ours: Any, theirs: Any) -> bool:
    return float((torch.from_numpy(ours) / 255 - torch.as_tensor(theirs)).abs().max()) < 1.01 / 255


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def convert(source: Path, target: Path, to: str, *more: str) -> Path:
    with pytest.raises(SystemExit) as left:
        main(["convert", str(source), str(target), "--to", to, *more])
    assert left.value.code == 0
    return target


def load_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return load_file(path)

"""Models of this library as folders of diffusers: Stable Diffusion 1 and 2, the inverse of `sfumato.io.published`.

The configs are written from the model's spec, the weights under diffusers' names. What such a folder has no place for
(the recommended settings, the facts of the training) lies beside them in `sfumato.json`, so that the way back is exact.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sfumato import files
from sfumato.codecs import Latents
from sfumato.errors import ConfigError
from sfumato.io.directory import write_weights
from sfumato.io.families import autoencoder, stable
from sfumato.io.keymap import DIFFUSERS, OURS, renamed
from sfumato.io.published import INDEX, OWN, PREDICTIONS, SCHEDULES, as_size
from sfumato.model import Model
from sfumato.nets.stable_unet import StableUNet
from sfumato.paths import Tabulated
from sfumato.text import CONFIG, TOKENIZER, Text

WEIGHTS = "diffusion_pytorch_model.safetensors"


def save_published(folder: Path, model: Model, *, dtype: torch.dtype = torch.float32) -> None:
    """Writes a folder of diffusers, whole or not at all. ConfigError for models that have no such form."""
    net, codec, text, path = model.net, model.codec, model.conditioner, model.denoiser.path
    if not (
        isinstance(net, StableUNet)
        and isinstance(codec, Latents)
        and isinstance(text, Text)
        and isinstance(path, Tabulated)
    ):
        seen = ", ".join(type(part).__name__ for part in (net, codec, text, path))
        raise ConfigError("this model is no Stable Diffusion", where="--to diffusers", seen=seen, fix="--to sfumato")

    def fill(place: Path) -> None:
        _json(place / INDEX, _index())
        _json(place / OWN, {"sampling": model.spec["sampling"], "size": model.spec["size"], "facts": model.facts})
        _json(place / "scheduler" / "scheduler_config.json", _scheduler(path, str(model.spec["model"]["prediction"])))
        _json(place / "unet" / "config.json", _unet(net))
        state = renamed(net.state_dict(), stable.lines(net.config), OURS, DIFFUSERS, str(folder))
        _weights(place / "unet" / WEIGHTS, state, dtype)
        shape = codec.autoencoder.config
        _json(place / "vae" / "config.json", _vae(codec))
        state = renamed(codec.autoencoder.state_dict(), autoencoder.lines(shape), OURS, DIFFUSERS, str(folder))
        _weights(place / "vae" / WEIGHTS, state, dtype)
        named = {f"text_model.{key}": value for key, value in text.encoder.state_dict().items()}
        _weights(place / "text_encoder" / "model.safetensors", named, dtype)
        for name, data in text.files().items():
            there = place / "text_encoder" / "config.json" if name == CONFIG else None
            there = there or place / "tokenizer" / name.removeprefix(TOKENIZER)
            there.parent.mkdir(exist_ok=True)
            there.write_bytes(data)

    files.publish(Path(folder), fill)


def _json(path: Path, said: Mapping[str, Any]) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(said, indent=2) + "\n", encoding="utf-8")


def _weights(path: Path, state: Mapping[str, Tensor], dtype: torch.dtype) -> None:
    path.parent.mkdir(exist_ok=True)
    write_weights(path, state, dtype)


def _index() -> dict[str, Any]:
    return {
        "_class_name": "StableDiffusionPipeline",
        "_diffusers_version": "0.42.1",
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
        "requires_safety_checker": False,
        "safety_checker": [None, None],
        "scheduler": ["diffusers", "DDIMScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }


def _scheduler(path: Tabulated, prediction: str) -> dict[str, Any]:
    theirs = {ours: name for name, ours in PREDICTIONS.items()}
    schedules = {ours: name for name, ours in SCHEDULES.items()}
    if prediction not in theirs or path.betas not in schedules:
        seen = f"prediction {prediction}, betas {path.betas}"
        raise ConfigError("diffusers' table-based schedulers have no such model", where="--to diffusers", seen=seen)
    said = {
        "_class_name": "DDIMScheduler",
        "beta_schedule": schedules[path.betas],
        "clip_sample": False,
        "num_train_timesteps": path.steps,
        "prediction_type": theirs[prediction],
        "rescale_betas_zero_snr": path.zero_terminal_snr,
        "set_alpha_to_one": True,
        "steps_offset": 1,
        "timestep_spacing": "leading",
    }
    ends = {"beta_start": path.start, "beta_end": path.end}
    return said | {name: value for name, value in ends.items() if value is not None}


def _unet(net: StableUNet) -> dict[str, Any]:
    config = net.config
    if config.pooled_dim:
        seen = "a U-Net that is told a vector"
        raise ConfigError("SDXL is not written yet", where="--to diffusers", seen=seen, fix="--to sfumato")
    cross = ["CrossAttn" if depth else "" for depth in config.depths]
    return {
        "_class_name": "UNet2DConditionModel",
        "act_fn": "silu",
        "attention_head_dim": list(config.heads),  # which means heads, by mistake
        "block_out_channels": list(config.channels),
        "cross_attention_dim": config.context_dim,
        "down_block_types": [f"{one}DownBlock2D" for one in cross],
        "in_channels": config.in_channels,
        "layers_per_block": config.blocks,
        "mid_block_type": "UNetMidBlock2DCrossAttn" if config.middle else "UNetMidBlock2D",
        "norm_num_groups": config.groups,
        "out_channels": config.out_channels,
        "sample_size": as_size(config.size),
        "time_cond_proj_dim": config.guidance_dim or None,
        "transformer_layers_per_block": [depth or 1 for depth in config.depths],
        "up_block_types": [f"{one}UpBlock2D" for one in reversed(cross)],
        "use_linear_projection": config.linear,
    }


def _vae(codec: Latents) -> dict[str, Any]:
    config, levels = codec.autoencoder.config, len(codec.autoencoder.config.channels)
    scale, shift = codec.scale.flatten().tolist(), codec.shift.flatten().tolist()
    if len(scale) > 1 or len(shift) > 1:
        seen = f"{asdict(config)}"
        raise ConfigError("diffusers' autoencoder has one scale", where="--to diffusers", seen=seen, fix="--to sfumato")
    return {
        "_class_name": "AutoencoderKL",
        "block_out_channels": list(config.channels),
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "in_channels": config.in_channels,
        "latent_channels": config.latent,
        "layers_per_block": config.blocks,
        "mid_block_add_attention": config.attention,
        "norm_num_groups": config.groups,
        "out_channels": config.in_channels,
        "scaling_factor": _short(scale[0]),
        "shift_factor": _short(shift[0]) if shift[0] else None,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "use_post_quant_conv": config.quant,
        "use_quant_conv": config.quant,
    }


def _short(value: float) -> float:
    """The shortest number that is this float32: 0.18215, and not 0.18215000629425049."""
    return next(float(f"{value:.{n}g}") for n in range(1, 18) if _same(float(f"{value:.{n}g}"), value))


def _same(one: float, other: float) -> bool:
    return bool(torch.tensor(one, dtype=torch.float32) == torch.tensor(other, dtype=torch.float32))

"""Stable Diffusion 3 and 3.5: an MMDiT on an autoencoder's latents, told a prompt by two CLIPs and a T5."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sfumato.errors import ConfigError
from sfumato.io import parts as shared
from sfumato.io.families import sd3
from sfumato.io.keymap import DIFFUSERS, OURS, renamed
from sfumato.io.pretrained import read_json, read_state
from sfumato.nets.mmdit import MMDiT, MMDiTConfig

SHAPE = ("patch", "dim", "depth", "heads", "mlp_ratio", "in_channels", "out_channels", "context_dim", "pooled_dim")
MORE = ("qk_norm", "dual", "table", "step", "size")


# The transformer


def read_transformer(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The slot of the network of a folder `transformer`, and its weights under our names."""
    config, state = read_json(folder / "config.json"), read_state(folder)
    heads = int(config.get("num_attention_heads") or 0) or None
    shape = sd3.config_of(state, DIFFUSERS, str(folder), size=int(config.get("sample_size") or 128), heads=heads)
    return slot_of(shape), state_of(state, shape, DIFFUSERS, str(folder))


def slot_of(shape: MMDiTConfig) -> dict[str, Any]:
    """The slot of a network of this shape."""
    slot = {name: getattr(shape, name) for name in (*SHAPE, *MORE)}
    return {"kind": "mmdit", **{name: list(v) if isinstance(v, tuple) else v for name, v in slot.items()}}


def state_of(state: Mapping[str, Tensor], shape: MMDiTConfig, layout: str, where: str) -> dict[str, Tensor]:
    """The network's weights of a layout, as a model of ours stores them."""
    return {f"net.{key}": value for key, value in renamed(state, sd3.lines(shape), layout, OURS, where).items()}


def write_transformer(folder: Path, net: MMDiT, dtype: torch.dtype) -> None:
    """diffusers' SD3Transformer2DModel. ConfigError for shapes that it does not have."""
    folder.mkdir(exist_ok=True)
    shared.write_json(folder / "config.json", _config(net.config))
    state = renamed(net.state_dict(), sd3.lines(net.config), OURS, DIFFUSERS, str(folder))
    shared.write_part(folder / shared.WEIGHTS, state, dtype)


def _config(config: MMDiTConfig) -> dict[str, Any]:
    size = config.size if isinstance(config.size, int) else max(config.size)
    for name, odd in (("classes", config.classes > 0), ("mlp_ratio", config.mlp_ratio != 4)):
        if odd:
            seen = f"{name} {getattr(config, name)}"
            raise ConfigError("Stable Diffusion 3 has no such network", where="--to diffusers", seen=seen)
    return {
        "_class_name": "SD3Transformer2DModel",
        "attention_head_dim": config.dim // config.heads,
        "caption_projection_dim": config.dim,
        "dual_attention_layers": list(config.dual),
        "in_channels": config.in_channels,
        "joint_attention_dim": config.context_dim,
        "num_attention_heads": config.heads,
        "num_layers": config.depth,
        "out_channels": config.out_channels or config.in_channels,
        "patch_size": config.patch,
        "pooled_projection_dim": config.pooled_dim,
        "pos_embed_max_size": config.side,
        "qk_norm": "rms_norm" if config.qk_norm else None,
        "sample_size": size,
    }

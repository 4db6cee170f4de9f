"""Stable Diffusion 1 and 2 as diffusers keeps them: a U-Net on an autoencoder's latents, told a prompt by CLIP.

For inpainting the U-Net also takes a mask and the rest of the picture, nine channels in all: conditions like others.
Under a ControlNet it is a network of its own kind, whose control is told a picture.
"""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from sfumato.codecs import Latents
from sfumato.errors import CheckpointError, ConfigError
from sfumato.io import parts as shared
from sfumato.io import text_parts
from sfumato.io.families import controlnet, stable, stable_files
from sfumato.io.family import Published
from sfumato.io.keymap import DIFFUSERS, OURS, renamed
from sfumato.io.pretrained import read_json, read_state
from sfumato.model import Model
from sfumato.nets.controlled import Controlled
from sfumato.nets.controlnet import ControlNet
from sfumato.nets.stable_unet import StableUNet
from sfumato.paths import Tabulated
from sfumato.text.joined import WAVES

CONTROLLED = "StableDiffusionControlNetPipeline"
INPAINTING = "StableDiffusionInpaintPipeline"
HINT = {"kind": "hint", "field": "control"}
TOLD_GUIDANCE = "LatentConsistencyModelPipeline"


class StableDiffusion:
    """The family. See `sfumato.io.family.Family`."""

    pipelines = (
        "StableDiffusionPipeline",
        "StableDiffusionImg2ImgPipeline",
        TOLD_GUIDANCE,
        "LatentConsistencyModelImg2ImgPipeline",
        INPAINTING,
        CONTROLLED,
    )

    def read_folder(self, folder: Path, index: Mapping[str, Any]) -> Published:
        path, prediction, sampling = shared.read_table(folder)
        shape, net = read_unet(folder / "unet")
        told = shape["guidance_dim"] > 0
        codec, autoencoder, factor = shared.read_vae(folder / "vae")
        text, files = text_parts.read_text(folder)
        conditioner: dict[str, Any] = {"kind": "text", "length": text_parts.tokenizer_length(folder)}
        if shape["in_channels"] == 2 * codec["latent"] + 1:
            conditioner, text, files = text_parts.join_text(conditioner, text, files, {"kind": "inpainting"})
        elif shape["in_channels"] != codec["latent"]:
            seen = f"{shape['in_channels']} channels, where the autoencoder has {codec['latent']}"
            raise CheckpointError("a U-Net that takes more than is known here", where=str(folder), seen=seen)
        size = [int(side) * factor for side in shared.pair(shape["size"])]
        if controlnet.PART in index:
            conditioner, text, files = text_parts.join_text(conditioner, text, files, HINT)
            shape, net = _under_control(folder, index, shape, net)
        section = {
            "path": path,
            "prediction": prediction,
            "time_input": "index",
            "scale_input": None,
            "net": shape,
            "codec": codec,
            "conditioner": conditioner,
        }
        sampling = {**(TOLD if told else {"steps": 50, "guidance": 7.5}), **sampling}
        state = net | autoencoder | text
        return Published(section, size, sampling, state, files, shared.facts_of(folder, index))

    def owns(self, model: Model) -> bool:
        return (
            (isinstance(model.net, StableUNet) or (isinstance(model.net, Controlled) and len(model.net.controls) == 1))
            and isinstance(model.codec, Latents)
            and text_parts.text_of(model.conditioner) is not None
            and isinstance(model.denoiser.path, Tabulated)
        )

    def write_folder(self, place: Path, model: Model, dtype: torch.dtype) -> None:
        codec, text, path = model.codec, text_parts.text_of(model.conditioner), model.denoiser.path
        net = model.net.net if isinstance(model.net, Controlled) else model.net
        assert isinstance(net, StableUNet) and isinstance(codec, Latents)
        assert text is not None and isinstance(path, Tabulated)
        told = net.config.guidance_dim > 0
        scheduler = shared.scheduler_of_lcm(model.spec["sampling"]) if told else None
        parts = INDEX | ({"scheduler": ["diffusers", scheduler["_class_name"]]} if scheduler else {})
        kind = self.pipelines[0] if text is model.conditioner else INPAINTING
        if isinstance(model.net, Controlled):
            kind, parts = CONTROLLED, parts | {controlnet.PART: ["diffusers", "ControlNetModel"]}
            controlnet.write_control(place / controlnet.PART, cast(ControlNet, model.net.controls[0]), dtype)
        shared.write_index(place, TOLD_GUIDANCE if told else kind, parts, model)
        shared.write_table(place, path, model.spec["model"]["prediction"], scheduler=scheduler)
        write_unet(place / "unet", net, dtype)
        shared.write_vae(place, codec, dtype)
        text_parts.write_text(place, text, dtype)

    def knows(self, keys: Collection[str]) -> bool:
        return stable_files.ENTRY in keys and stable_files.TOLD_XL not in keys

    def read_file(self, state: Mapping[str, Tensor], file: Path, parts: Path | None) -> Published:
        length = 77 if parts is None else text_parts.tokenizer_length(parts)
        sampling = {"steps": 50, "guidance": 7.5}
        found = stable_files.read(state, file, parts, {"kind": "text", "length": length}, sampling)
        if found.section["net"].get("guidance_dim"):
            own = found.sampling if found.sampling["sampler"].get("kind") == "lcm" else {}
            found.sampling = {**LCM, **own, **TOLD}
        return found

    def write_file(self, model: Model) -> dict[str, Tensor]:
        net = model.net.net if isinstance(model.net, Controlled) else model.net
        assert isinstance(net, StableUNet)
        return stable_files.write(model, "sd2" if net.config.context_dim == stable_files.OPENCLIP else "sd1")


def _under_control(
    folder: Path, index: Mapping[str, Any], shape: Mapping[str, Any], net: Mapping[str, Tensor]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The slot and the weights of a U-Net with the ControlNet that lies beside it."""
    kind = str(index[controlnet.PART][1])
    if kind != "ControlNetModel":
        fix = "--control, once for each"
        raise CheckpointError("a folder holds one control", where=str(folder), seen=kind, fix=fix)
    control = controlnet.read_control(folder / controlnet.PART)
    return controlnet.slot_of(control.config, shape), controlnet.joined(net, control)


TOLD: dict[str, Any] = {  # how latent consistency models like to be sampled, which are told the guidance
    "steps": 4,
    "guidance": {"kind": "distilled", "scale": 8.5, "told": "weight"},
}
LCM: dict[str, Any] = shared.recommended({"_class_name": "LCMScheduler"})  # where a file says nothing of it
INDEX: dict[str, Any] = {
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


# The U-Net


def read_unet(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The slot of the network of a folder `unet`, and its weights under our names."""
    config = read_json(folder / "config.json")
    state = {key: value.float() for key, value in read_state(folder).items()}
    levels = len(config.get("block_out_channels", ()))
    heads = config.get("num_attention_heads") or config.get("attention_head_dim", 8)  # which means heads, by mistake
    each = tuple(heads) if isinstance(heads, list) else (int(heads),) * levels
    shape = stable.config_of(state, DIFFUSERS, str(folder), each, int(config.get("norm_num_groups") or 32))
    named = renamed(state, stable.lines(shape), DIFFUSERS, OURS, str(folder))
    slot = stable.slot_of(shape, shared.as_size(config.get("sample_size", 64)))
    return slot, {f"net.{key}": value for key, value in named.items()}


def write_unet(folder: Path, net: StableUNet, dtype: torch.dtype) -> None:
    """diffusers' UNet2DConditionModel."""
    folder.mkdir(exist_ok=True)
    shared.write_json(folder / "config.json", _unet(net))
    state = renamed(net.state_dict(), stable.lines(net.config), OURS, DIFFUSERS, str(folder))
    shared.write_part(folder / shared.WEIGHTS, state, dtype)


def _unet(net: StableUNet) -> dict[str, Any]:
    config = net.config
    cross = ["CrossAttn" if depth else "" for depth in config.depths]
    *depths, last = config.depths
    if config.middle and last not in (0, config.middle):  # diffusers builds the middle like the last level
        seen = f"{last}, and {config.middle} at the bottom"
        raise ConfigError("diffusers' U-Net has one depth for the last two", where="--to diffusers", seen=seen)
    told = {  # SDXL's: the pooled prompt, and six sizes as sinusoids
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": WAVES,
        "projection_class_embeddings_input_dim": config.pooled_dim,
    }
    said = {
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
        "sample_size": shared.as_size(config.size),
        "time_cond_proj_dim": config.guidance_dim or None,
        "transformer_layers_per_block": [*(depth or 1 for depth in depths), last or config.middle or 1],
        "up_block_types": [f"{one}UpBlock2D" for one in reversed(cross)],
        "use_linear_projection": config.linear,
    }
    return said | (told if config.pooled_dim else {})

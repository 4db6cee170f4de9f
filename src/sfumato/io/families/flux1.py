"""FLUX.1 as diffusers keeps it, and the original file: a transformer on an autoencoder's latents, told a prompt by T5.

CLIP's pooled state is the prompt's summary. A flow on the straight path is what it was trained for, and the published
velocity, noise less data, is ours. "dev" was distilled to be told the guidance, and its grid is shifted the more the
larger the picture is; "schnell" was distilled to four even steps, and knows nothing of guidance. The original file
holds the transformer alone: what else there is comes from a folder of diffusers.
"""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sfumato.codecs import Latents
from sfumato.errors import CheckpointError, ConfigError
from sfumato.image_conditions import Hint, ImageMap, Inpainting
from sfumato.io import parts as shared
from sfumato.io import text_parts
from sfumato.io.families import controlnet, flux
from sfumato.io.families.transformer_controls import FLUX as FLUX_CONTROL
from sfumato.io.family import Published
from sfumato.io.keymap import DIFFUSERS, ORIGINAL, OURS, renamed
from sfumato.io.pretrained import read_json, read_state
from sfumato.model import Model
from sfumato.names import sampler_named
from sfumato.nets.flux import Flux, FluxConfig
from sfumato.paths import Linear
from sfumato.text import Texts

SHAPE = ("patch", "dim", "double", "single", "heads", "mlp_ratio", "axes", "in_channels", "out_channels", "guidance")
SIDE = 128  # of the latents that it was made for
ENCODERS = ("text_encoder", "text_encoder_2")
SCHNELL = 256  # pieces of words that schnell was trained with; dev reads as many as its tokenizer says
FILL, SHOWN, CONTROLLED = "FluxFillPipeline", "FluxControlPipeline", "FluxControlNetPipeline"
PICTURES = (Hint, Inpainting, ImageMap)  # conditioners that stand beside the text encoders
MARK = "double_blocks.0.img_attn.qkv.weight"
SAMPLING: dict[bool, dict[str, Any]] = {  # by whether the guidance is told
    True: {"steps": 28, "guidance": {"kind": "distilled", "scale": 3.5}},
    False: {"steps": 4, "guidance": 1.0},
}
GRIDS: dict[bool, dict[str, Any]] = {  # of original files, which come without a scheduler
    True: {"kind": "dynamic_shift", "low": 0.5, "high": 1.15, "fewest": 256, "most": 4096},
    False: {"kind": "linear"},
}


class Flux1:
    """The family. See `sfumato.io.family.Family`."""

    pipelines = ("FluxPipeline", "FluxImg2ImgPipeline", FILL, SHOWN, CONTROLLED)

    def read_folder(self, folder: Path, index: Mapping[str, Any]) -> Published:
        place = folder / "transformer"
        axes = read_json(place / "config.json").get("axes_dims_rope")
        first, rows, columns = (int(one) for one in axes or (16, 56, 56))
        state = read_state(place)
        shape = flux.config_of(state, DIFFUSERS, str(place), size=SIDE, axes=(first, rows, columns))
        net = state_of(state, shape, DIFFUSERS, str(place))
        recommended = scheduled(read_json(folder / "scheduler" / "scheduler_config.json"), shape.guidance)
        found = _published(folder, shape, net, recommended, shared.facts_of(folder, index))
        return controlnet.beside(found, folder, index, shape) if controlnet.PART in index else found

    def owns(self, model: Model) -> bool:
        text = text_parts.texts_of(model.conditioner, *PICTURES)
        return (
            isinstance(controlnet.parted(model.net)[0], Flux)
            and isinstance(model.codec, Latents)
            and text is not None
            and text.join == "apart"
            and isinstance(model.denoiser.path, Linear)
        )

    def write_folder(self, place: Path, model: Model, dtype: torch.dtype) -> None:
        (net, control), codec = controlnet.parted(model.net), model.codec
        texts, other = text_parts.beside_pictures(model.conditioner, *PICTURES)
        assert isinstance(net, Flux) and isinstance(codec, Latents) and isinstance(texts, Texts)
        _checked(model, net, "diffusers")
        kind, parts = _pipeline(other), dict(INDEX)
        if control is not None:
            kind, parts[controlnet.PART] = CONTROLLED, ["diffusers", FLUX_CONTROL]
            controlnet.write_control(place / controlnet.PART, control, dtype)
        shared.write_index(place, kind, parts, model)
        shared.write_flow(place, model)
        shared.write_json(place / "transformer" / "config.json", described(net.config))
        state = renamed(net.state_dict(), flux.lines(net.config), OURS, DIFFUSERS, str(place))
        shared.write_part(place / "transformer" / shared.WEIGHTS, state, dtype)
        shared.write_vae(place, codec, dtype)
        text_parts.write_text(place, texts, dtype)

    def knows(self, keys: Collection[str]) -> bool:
        return MARK in keys or f"{flux.PREFIX}{MARK}" in keys

    def read_file(self, state: Mapping[str, Tensor], file: Path, parts: Path | None) -> Published:
        if parts is None:
            seen = "the transformer alone, without an autoencoder and text encoders"
            fix = "--parts FOLDER, one of diffusers with vae, text_encoder, text_encoder_2 and their tokenizers"
            raise CheckpointError("this file is a part of a model", where=str(file), seen=seen, fix=fix)
        plain = {key.removeprefix(flux.PREFIX): value for key, value in state.items()}
        shape = flux.config_of(plain, ORIGINAL, str(file), size=SIDE)
        net = state_of(plain, shape, ORIGINAL, str(file))
        recommended = {"sampler": {"kind": "euler"}, "grid": GRIDS[shape.guidance], **SAMPLING[shape.guidance]}
        return _published(parts, shape, net, recommended, {"from": file.name})

    def write_file(self, model: Model) -> dict[str, Tensor]:
        net, _ = controlnet.parted(model.net)
        assert isinstance(net, Flux)
        _checked(model, net, "single-file")
        return renamed(net.state_dict(), flux.lines(net.config), OURS, ORIGINAL, "--to single-file")


INDEX: dict[str, Any] = {
    "feature_extractor": [None, None],
    "image_encoder": [None, None],
    "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "text_encoder_2": ["transformers", "T5EncoderModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "tokenizer_2": ["transformers", "T5TokenizerFast"],
    "transformer": ["diffusers", "FluxTransformer2DModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}


SHOWING = {"kind": "image", "field": "control", "kept": True}  # Canny, Depth: a picture's latents beside x_t
FILLING = {"kind": "inpainting", "whole": True}  # Fill: what is known of a picture, and where it is
FILLED: dict[str, Any] = {"steps": 50, "guidance": {"kind": "distilled", "scale": 30.0}}


def _pipeline(beside: object) -> str:
    """diffusers' class for a model whose texts have this beside them."""
    kinds = {Inpainting: FILL, ImageMap: SHOWN}
    return next((name for kind, name in kinds.items() if isinstance(beside, kind)), Flux1.pipelines[0])


def _published(
    folder: Path, shape: FluxConfig, net: dict[str, Tensor], sampling: dict[str, Any], facts: dict[str, Any]
) -> Published:
    """The whole, of a transformer and what a folder of diffusers has beside it."""
    codec, autoencoder, factor = shared.read_vae(folder / "vae")
    latent = int(codec["latent"])
    beside = {0: None, latent: SHOWING, latent + factor**2: FILLING}
    if shape.out_channels != latent or shape.in_channels - latent not in beside:
        seen = f"{shape.in_channels} channels to {shape.out_channels}, where the autoencoder has {latent}"
        what = "a transformer that takes more than is known here"
        raise CheckpointError(what, where=str(folder), seen=seen, fix="FLUX.1 dev, schnell, Fill, Canny or Depth")
    text, files = text_parts.read_text(folder, ENCODERS)
    longest = text_parts.tokenizer_length(folder, "tokenizer_2")
    clip, t5 = {"length": text_parts.tokenizer_length(folder)}, longest if shape.guidance else min(longest, SCHNELL)
    second = {"kind": "text", "part": ENCODERS[1], "length": t5, "apart": "prompt_2"}
    parts = [{"kind": "text", "pooled": True, **clip}, second]
    conditioner: dict[str, Any] = {"kind": "texts", "join": "apart", "parts": parts}
    if (other := beside[shape.in_channels - latent]) is not None:
        conditioner, text, files = text_parts.join_text(conditioner, text, files, other)
        sampling = {**sampling, **(FILLED if other is FILLING else {})}
    section = {**shared.FLOW, "net": slot_of(shape), "codec": codec, "conditioner": conditioner}
    size = [int(side) * factor for side in shared.pair(shape.size)]
    return Published(section, size, sampling, net | autoencoder | text, files, facts)


def scheduled(config: Mapping[str, Any], guidance: bool) -> dict[str, Any]:
    """The recommended settings of a scheduler's config.

    FLUX's pipeline gives its scheduler the even noise levels from 1 to 1 / n, where that would make others itself: so a
    constant shift is the plain one here. Other schedulers count for their sampler and grid where those are known.
    """
    try:
        sampler, known = sampler_named(config)
    except ConfigError:
        sampler, known = {"kind": "euler"}, None
    grid = known or GRIDS[guidance]
    if grid.get("compat") == "sd3":
        grid = {"kind": "linear"} if grid["by"] == 1 else {"kind": "shifted", "by": grid["by"]}
    return {"sampler": sampler, "grid": grid, **SAMPLING[guidance]}


# The transformer


def slot_of(shape: FluxConfig) -> dict[str, Any]:
    """The slot of a network of this shape; what it must know of its prompts is filled in from the encoders."""
    slot = {name: getattr(shape, name) for name in SHAPE}
    return {"kind": "flux", **{name: list(v) if isinstance(v, tuple) else v for name, v in slot.items()}, "size": SIDE}


def state_of(state: Mapping[str, Tensor], shape: FluxConfig, layout: str, where: str) -> dict[str, Tensor]:
    """The network's weights of a layout, as a model of ours stores them."""
    return {f"net.{key}": value for key, value in renamed(state, flux.lines(shape), layout, OURS, where).items()}


def described(config: FluxConfig) -> dict[str, Any]:
    """diffusers' config of a FluxTransformer2DModel, which is given latents in packs of 2 x 2."""
    area = flux.PATCH**2
    return {
        "_class_name": "FluxTransformer2DModel",
        "attention_head_dim": config.dim // config.heads,
        "axes_dims_rope": list(config.turning),
        "guidance_embeds": config.guidance,
        "in_channels": config.in_channels * area,
        "joint_attention_dim": config.context_dim,
        "num_attention_heads": config.heads,
        "num_layers": config.double,
        "num_single_layers": config.single,
        "out_channels": (config.out_channels or config.in_channels) * area,
        "patch_size": 1,
        "pooled_projection_dim": config.pooled_dim,
    }


def _checked(model: Model, net: Flux, layout: str) -> None:
    """ConfigError for what the published layouts have no place for."""
    section = model.spec["model"]
    wanted = {"patch": flux.PATCH, "mlp_ratio": 4.0, "theta": 10_000.0, "classes": 0}
    odd = {name: getattr(net.config, name) for name, usual in wanted.items() if getattr(net.config, name) != usual}
    for name in ("prediction", "time_input", "scale_input"):
        said = section[name]
        kind = said.get("kind") if isinstance(said, Mapping) else said
        odd |= {} if kind == shared.FLOW[name] else {name: kind}
    if odd:
        seen = ", ".join(f"{name} {value}" for name, value in odd.items())
        raise ConfigError("FLUX.1 has no such model", where=f"--to {layout}", seen=seen, fix="--to sfumato")

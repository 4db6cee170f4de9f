"""Stable Diffusion 3 and 3.5: an MMDiT on an autoencoder's latents, told a prompt by two CLIPs and a T5."""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sfumato.codecs import Latents
from sfumato.errors import CheckpointError, ConfigError
from sfumato.io import parts as shared
from sfumato.io import text_parts
from sfumato.io.families import autoencoder, controlnet, sd3
from sfumato.io.families.encoders import SD3, Place
from sfumato.io.families.transformer_controls import SD3 as SD3_CONTROL
from sfumato.io.family import Published
from sfumato.io.keymap import DIFFUSERS, ORIGINAL, OURS, renamed
from sfumato.io.pretrained import codec_of, read_json, read_state
from sfumato.model import Model
from sfumato.names import sampler_named
from sfumato.nets.mmdit import MMDiT, MMDiTConfig
from sfumato.text import Texts
from sfumato.text.joined import WORDS

CONTROLLED = "StableDiffusion3ControlNetPipeline"
SHAPE = ("patch", "dim", "depth", "heads", "mlp_ratio", "in_channels", "out_channels", "context_dim", "pooled_dim")
MORE = ("qk_norm", "dual", "table", "step", "size")
VAE = "first_stage_model."  # in a single file
LATENTS: dict[str, Any] = {"scaling_factor": 1.5305, "shift_factor": 0.0609}  # of all published sizes
SCHEDULER = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}


class StableDiffusion3:
    """The family. See `sfumato.io.family.Family`."""

    pipelines = ("StableDiffusion3Pipeline", "StableDiffusion3Img2ImgPipeline", CONTROLLED)

    def read_folder(self, folder: Path, index: Mapping[str, Any]) -> Published:
        net, weights = read_transformer(folder / "transformer")
        codec, latents, factor = shared.read_vae(folder / "vae")
        encoders = [one.part for one in _places(folder)]
        told, files = text_parts.read_text(folder, encoders)
        section = _section(net, codec, _conditioner(folder, encoders, net), str(folder))
        size, sampling = [int(net["size"]) * factor] * 2, _sampling(net, folder)
        found = Published(section, size, sampling, weights | latents | told, files, shared.facts_of(folder, index))
        if controlnet.PART not in index:
            return found
        shape: dict[str, Any] = {n: tuple(v) if isinstance(v, list) else v for n, v in net.items() if n != "kind"}
        return controlnet.beside(found, folder, index, MMDiTConfig(**shape))

    def owns(self, model: Model) -> bool:
        conditioner, section = text_parts.texts_of(model.conditioner), model.spec["model"]
        return (
            isinstance(controlnet.parted(model.net)[0], MMDiT)
            and isinstance(model.codec, Latents)
            and conditioner is not None
            and conditioner.join == "sd3"
            and all(_slot(section.get(name)) == _slot(value) for name, value in shared.FLOW.items())
        )

    def write_folder(self, place: Path, model: Model, dtype: torch.dtype) -> None:
        net, codec, told = _parts(model)
        index = {name: said for name, said in INDEX.items() if not name.endswith("_3") or len(told.texts) > 2}
        absent = {name: [None, None] for name in INDEX.keys() - index.keys()}
        kind, parts, control = self.pipelines[0], {**index, **absent}, controlnet.parted(model.net)[1]
        if control is not None:
            kind, parts[controlnet.PART] = CONTROLLED, ["diffusers", SD3_CONTROL]
            controlnet.write_control(place / controlnet.PART, control, dtype)
        shared.write_index(place, kind, parts, model)
        shared.write_flow(place, model)
        write_transformer(place / "transformer", net, dtype)
        shared.write_vae(place, codec, dtype)
        text_parts.write_text(place, told, dtype)

    def knows(self, keys: Collection[str]) -> bool:
        return _prefix(keys) is not None

    def read_file(self, state: Mapping[str, Tensor], file: Path, parts: Path | None) -> Published:
        if parts is None:
            raise CheckpointError(
                "a file of Stable Diffusion 3 holds no tokenizers",
                where=str(file),
                fix="--parts FOLDER, a folder of diffusers with text encoders and tokenizers",
            )
        prefix = _prefix(state) or ""
        inner = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
        shape = sd3.config_of(inner, ORIGINAL, str(file), **_hints(parts / "transformer"))
        net, weights = slot_of(shape), state_of(inner, shape, ORIGINAL, str(file))
        inside = {key: value for key, value in state.items() if key.startswith(VAE)}
        if inside:
            codec, latents = codec_of(inside, str(file), _latents(parts / "vae"))
            latents = {f"codec.{key}": value for key, value in latents.items()}
        else:
            codec, latents, _ = shared.read_vae(parts / "vae")
        weights |= latents
        places = _places(parts, state)
        told, files = text_parts.read_text_file(state, places, parts, str(file))
        section = _section(net, codec, _conditioner(parts, [one.part for one in places], net), str(file))
        size, sampling = [shape.size * 2 ** (len(codec["channels"]) - 1)] * 2, _sampling(net, parts)
        return Published(section, size, sampling, weights | told, files, {"from": file.name})

    def write_file(self, model: Model) -> dict[str, Tensor]:
        net, codec, told = _parts(model)
        state = renamed(net.state_dict(), sd3.lines(net.config), OURS, ORIGINAL, "the network")
        out = {f"{sd3.PREFIX}{key}": value for key, value in state.items()}
        shape = codec.autoencoder.config
        state = renamed(codec.autoencoder.state_dict(), autoencoder.lines(shape), OURS, ORIGINAL, "the autoencoder")
        out |= {f"{VAE}{key}": value for key, value in state.items()}
        return out | text_parts.text_for_file(told, SD3[: len(told.texts)])


INDEX: dict[str, Any] = {
    "feature_extractor": [None, None],
    "image_encoder": [None, None],
    "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    "text_encoder": ["transformers", "CLIPTextModelWithProjection"],
    "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
    "text_encoder_3": ["transformers", "T5EncoderModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "tokenizer_2": ["transformers", "CLIPTokenizer"],
    "tokenizer_3": ["transformers", "T5TokenizerFast"],
    "transformer": ["diffusers", "SD3Transformer2DModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}


def _slot(said: Any) -> Any:
    """A slot in one spelling: in a run's spec, a name alone is a mapping."""
    return {"kind": said} if isinstance(said, str) else said


def _parts(model: Model) -> tuple[MMDiT, Latents, Texts]:
    (net, _), codec, conditioner = controlnet.parted(model.net), model.codec, text_parts.texts_of(model.conditioner)
    assert isinstance(net, MMDiT) and isinstance(codec, Latents) and conditioner is not None
    return net, codec, conditioner


def _section(
    net: Mapping[str, Any], codec: Mapping[str, Any], conditioner: Mapping[str, Any], where: str
) -> dict[str, Any]:
    """The model section of a spec."""
    if net["in_channels"] != codec["latent"]:
        seen = f"{net['in_channels']} channels, where the autoencoder has {codec['latent']}"
        raise CheckpointError("a network that takes more than latents", where=where, seen=seen)
    return {**shared.FLOW, "net": dict(net), "codec": dict(codec), "conditioner": dict(conditioner)}


def _sampling(net: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """What is recommended: the scheduler of a folder, or the published one; steps and guidance as their makers say."""
    path = folder / "scheduler" / "scheduler_config.json"
    sampler, grid = sampler_named(read_json(path) if path.is_file() else SCHEDULER)
    steps, guidance = (40, 4.5) if net["qk_norm"] else (28, 7.0)
    return {"steps": steps, "guidance": guidance, "sampler": sampler, "grid": grid}


def _hints(folder: Path) -> dict[str, Any]:
    """What the weights of a single file do not tell of the network: the published ones, unless a folder says others."""
    said = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    return {"size": int(said.get("sample_size") or 128), "head": int(said.get("attention_head_dim") or sd3.HEAD)}


def _latents(folder: Path) -> dict[str, Any]:
    """The same of the autoencoder."""
    said = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    return LATENTS | {name: value for name, value in said.items() if value is not None}


# The text encoders


def _places(folder: Path, keys: Mapping[str, Tensor] | None = None) -> list[Place]:
    """Those that a folder or a file has. T5, the largest by far, may have been left out."""
    third = (folder / SD3[2].part).is_dir() or SD3[2].within(keys or {})
    return list(SD3[: 3 if third else 2])


def _conditioner(folder: Path, encoders: list[str], net: Mapping[str, Any]) -> dict[str, Any]:
    """The slot: of both CLIPs the states before the last layer, unnormed, and their projected pooled states."""
    length = text_parts.tokenizer_length(folder)
    clip = {"kind": "text", "length": length, "skip": 1, "normed": False, "pooled": True}
    parts: list[dict[str, Any]] = [{**clip, "part": encoders[0]}]
    parts += [{**clip, "part": part, "apart": "prompt_2"} for part in encoders[1:2]]
    parts += [{"kind": "text", "length": WORDS, "part": part, "apart": "prompt_3"} for part in encoders[2:]]
    return {"kind": "texts", "join": "sd3", "width": net["context_dim"], "parts": parts}


# The transformer


def read_transformer(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The slot of the network of a folder `transformer`, and its weights under our names."""
    state = read_state(folder)
    shape = sd3.config_of(state, DIFFUSERS, str(folder), **_hints(folder))
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
    for name, odd in (("classes", config.classes > 0), ("mlp_ratio", config.mlp_ratio != 4), ("local", config.local)):
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


def _prefix(keys: Collection[str]) -> str | None:
    """What names of the network begin with in a single file of this family; None where it is of another."""
    return next((one for one in (sd3.PREFIX, "") if f"{one}{sd3.MARK}" in keys), None)

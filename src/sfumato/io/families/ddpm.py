"""DDPM as diffusers keeps it, and ADM in OpenAI's original files: a U-Net on pixels and a table of betas.

Google's DDPMs have their parts in the folder itself. ADM also learns the variance of a step, and what its files do not
tell is what its authors say of them: the model of 64 pixels has betas on a cosine and queries before heads, the others
linear betas and heads first; heads have 64 channels, but those of 128 pixels, of which there are 4 a level. A file of
one's own says otherwise in a JSON beside it, of the same name, by the flags that it was trained with.
"""

from collections.abc import Collection, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sfumato.codecs import Pixels
from sfumato.conditioners import Labels
from sfumato.denoiser import VARIANCE, as_index
from sfumato.errors import CheckpointError, ConfigError
from sfumato.io import parts as shared
from sfumato.io.families import autoencoder
from sfumato.io.families import pixel_unet as unet
from sfumato.io.family import Published
from sfumato.io.keymap import DIFFUSERS, ORIGINAL, OURS, renamed
from sfumato.io.pretrained import read_json, read_state
from sfumato.model import Model
from sfumato.nets.pixel_unet import PixelUNet, PixelUNetConfig
from sfumato.paths import Tabulated
from sfumato.predictions import EPS

STEPS = {"DDPMPipeline": 1000, "DDIMPipeline": 50}  # those of diffusers
VARIANCES = {"small": "fixed_small", "large": "fixed_large", "learned": "learned_range"}
COSINE = (192, 384, 576, 768)  # the widths of ADM's model of 64 pixels
FOUR = (256, 256, 512, 768, 1024)  # and of that of 128
ATTENDED = 32  # pixels a side of the largest feature map that has attention, in all of them
SAMPLING: dict[str, Any] = {
    "sampler": {"kind": "ddpm", "variance": "learned", "clip": 1.0},
    "grid": {"kind": "linspace"},
    "steps": 250,
    "guidance": 1.0,
}


class DDPM:
    """The family. See `sfumato.io.family.Family`."""

    pipelines = ("DDPMPipeline", "DDIMPipeline")

    def read_folder(self, folder: Path, index: Mapping[str, Any]) -> Published:
        path, prediction, sampling = shared.read_table(folder)
        config, net = read_unet(shared.part_of(folder, "unet"))
        learned = config.out_channels == 2 * config.in_channels
        section = {
            "path": path,
            "prediction": prediction,
            "time_input": "index",
            "scale_input": None,
            **section_of(config),
            "answers": ["x0", VARIANCE] if learned else ["x0"],
        }
        steps = STEPS[str(index.get("_class_name"))]
        sampling = {"steps": steps, "guidance": 1.0, **sampling}
        return Published(
            section, shared.pair(config.size), sampling, net, labels_of(config), shared.facts_of(folder, index)
        )

    def owns(self, model: Model) -> bool:
        denoiser = model.denoiser
        told = denoiser.time_input is as_index and denoiser.scale_input is None
        return told and isinstance(denoiser.path, Tabulated) and is_of_pixels(model)

    def write_folder(self, place: Path, model: Model, dtype: torch.dtype) -> None:
        net, path = model.net, model.denoiser.path
        assert isinstance(net, PixelUNet) and isinstance(path, Tabulated)
        if net.config.classes:
            seen = f"{net.config.classes} classes"
            raise ConfigError(
                "diffusers' DDPM is told no class", where="--to diffusers", seen=seen, fix="--to single-file"
            )
        scheduler = _scheduler(model)
        kind = self.pipelines[0 if scheduler["_class_name"] == "DDPMScheduler" else 1]
        parts = {"scheduler": ["diffusers", scheduler["_class_name"]], "unet": ["diffusers", "UNet2DModel"]}
        shared.write_index(place, kind, parts, model)
        shared.write_table(place, path, model.spec["model"]["prediction"], scheduler=scheduler)
        write_unet(place / "unet", net, dtype)

    def knows(self, keys: Collection[str]) -> bool:
        return unet.is_original(keys)

    def read_file(self, state: Mapping[str, Tensor], file: Path, parts: Path | None) -> Published:
        where, flags = str(file), flags_of(file)
        seen = unet.seen_in(state, ORIGINAL, where)
        if is_consistency(seen):
            from sfumato.io.families import consistency  # whose files have the same names

            return consistency.read_original(state, seen, file, flags)
        check_channels(seen.in_channels, where)
        cosine = flags.get("noise_schedule", "cosine" if seen.channels == COSINE else "linear") == "cosine"
        early = flags.get("use_new_attention_order", seen.channels == COSINE)
        config, net = read_original(state, seen, unet.Original(1, not early), flags, where)
        learned = config.out_channels == 2 * config.in_channels
        section = {
            "path": table(cosine, int(flags.get("diffusion_steps", 1000))),
            "prediction": "eps",
            "time_input": "index",
            "scale_input": None,
            **section_of(config),
            "answers": ["x0", VARIANCE] if learned else ["x0"],
        }
        sampler = SAMPLING["sampler"] | ({} if learned else {"variance": "large"})
        facts = {"from": file.name, "pipeline": "ADM"}
        return Published(
            section, shared.pair(config.size), {**SAMPLING, "sampler": sampler}, net, labels_of(config), facts
        )

    def write_file(self, model: Model) -> dict[str, Tensor]:
        net, path = model.net, model.denoiser.path
        assert isinstance(net, PixelUNet) and isinstance(path, Tabulated)
        tables = [Tabulated(name, path.steps) for name in ("linear", "cosine")]  # type: ignore[arg-type]
        known = [one.alphas_cumprod.shape == path.alphas_cumprod.shape for one in tables]
        same = [
            fits and torch.allclose(one.alphas_cumprod, path.alphas_cumprod)
            for fits, one in zip(known, tables, strict=True)
        ]
        if not any(same) or model.denoiser.prediction != EPS:
            seen = f"{path.betas} betas, {model.denoiser.prediction.name}"
            what = "an original file says the noise, on linear betas or a cosine's"
            raise ConfigError(what, where="--to single-file", seen=seen, fix="--to diffusers")
        early = net.config.channels == COSINE
        return write_original(net, unet.Original(1, not early))


def is_of_pixels(model: Model) -> bool:
    """Whether a model is a U-Net of this kind on pictures as they are, told a class or nothing."""
    codec, conditioner = model.codec, model.conditioner
    return (
        isinstance(model.net, PixelUNet)
        and isinstance(codec, Pixels)
        and codec.scale == 1
        and (conditioner is None or isinstance(conditioner, Labels))
    )


def section_of(config: PixelUNetConfig) -> dict[str, Any]:
    """What all models of a U-Net of this kind share of a model's section."""
    labels = {"kind": "labels", "classes": config.classes, "unlabelled": False}
    return {"net": slot_of(config), "codec": {"kind": "pixels"}, "conditioner": labels if config.classes else None}


def labels_of(config: PixelUNetConfig) -> dict[str, bytes]:
    """The conditioner's files."""
    return Labels(config.classes).files() if config.classes else {}


def slot_of(config: PixelUNetConfig) -> dict[str, Any]:
    """The slot of a network of this shape; its classes are the conditioner's."""
    plain, always = PixelUNetConfig(), ("size", "channels", "blocks", "heads", "middle")
    kept = {one.name: getattr(config, one.name) for one in fields(PixelUNetConfig)}
    said = {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in kept.items()
        if name in always or value != getattr(plain, name)
    }
    return {"kind": "pixel_unet"} | {name: value for name, value in said.items() if name not in FILLED}


FILLED = ("in_channels", "classes", "unlabelled")  # by what stands beside the network


def table(cosine: bool, steps: int = 1000) -> dict[str, Any]:
    """The slot of a path on a cosine's or linear betas."""
    ends = {} if cosine else {"start": 1e-4, "end": 0.02}
    return {"kind": "tabulated", "betas": "cosine" if cosine else "linear", "steps": steps, **ends}


def check_channels(channels: int, where: str) -> None:
    """CheckpointError for networks that take other than pictures of three channels."""
    if channels != Pixels.channels:
        seen, fix = f"{channels} channels", "a network that takes pictures of 3 channels"
        raise CheckpointError("a network that takes more than a picture, or less", where=where, seen=seen, fix=fix)


# diffusers' UNet2DModel

USUAL = {  # what a config must say, if it says anything of it: the rest is no published model's
    "act_fn": "silu",
    "center_input_sample": False,
    "class_embed_type": None,
    "mid_block_scale_factor": 1,
    "mid_block_type": "UNetMidBlock2D",
    "time_embedding_type": "positional",
}


def read_unet(folder: Path) -> tuple[PixelUNetConfig, dict[str, Tensor]]:
    """The shape of the network of a folder, and its weights by their names in a model."""
    said, where = read_json(folder / "config.json"), str(folder)
    for name, usual in USUAL.items():
        if said.get(name, usual) != usual:
            raise CheckpointError("a U-Net of another kind", where=where, seen=f"{name} {said[name]}", fix=f"{usual}")
    state = autoencoder.modern({key: value.float() for key, value in read_state(folder).items()})
    seen = unet.seen_in(state, DIFFUSERS, where)
    check_channels(seen.in_channels, where)
    if seen.middle and "mid_block.attentions.0.group_norm.weight" not in state:
        fix = "attn_norm_num_groups set, as in the published ones"
        raise CheckpointError("the attention at the bottom has no norm", where=where, seen="no group_norm", fix=fix)
    each = said.get("attention_head_dim", 8)
    config = seen.config(
        unet.Heads(channels=int(each or 0)),
        size=_size(said.get("sample_size"), where),
        pad_after=said.get("downsample_padding", 1) == 0 and not seen.resamples,
        sines_first=not said.get("flip_sin_to_cos", True),
        include_end=_shift(said.get("freq_shift", 0), where),
        groups=int(said.get("norm_num_groups") or 32),
        eps=float(said.get("norm_eps", 1e-5)),
        dropout=float(said.get("dropout", 0.0)),
    )
    named = renamed(state, unet.lines(config), DIFFUSERS, OURS, where)
    return config, {f"net.{key}": value for key, value in named.items()}


def _size(said: Any, where: str) -> tuple[int, int] | int:
    if said is None:
        raise CheckpointError("a U-Net that does not say its size", where=where, seen="no sample_size")
    height, width = shared.pair(said)
    return height if height == width else (height, width)


def _shift(said: Any, where: str) -> bool:
    if said not in (0, 1):
        raise CheckpointError("a time of another kind", where=where, seen=f"freq_shift {said}", fix="0 or 1")
    return bool(said)


def write_unet(folder: Path, net: PixelUNet, dtype: torch.dtype) -> None:
    """diffusers' UNet2DModel. ConfigError for a network that it has no words for."""
    shared.write_json(folder / "config.json", _described(net.config))
    state = renamed(net.state_dict(), unet.lines(net.config), OURS, DIFFUSERS, str(folder))
    shared.write_part(folder / shared.WEIGHTS, state, dtype)


def _described(config: PixelUNetConfig) -> dict[str, Any]:
    blocks = config.resample == "block"
    plain = ("ResnetDownsampleBlock2D", "ResnetUpsampleBlock2D") if blocks else ("DownBlock2D", "UpBlock2D")
    types = [("AttnDownBlock2D", "AttnUpBlock2D") if heads else plain for heads in config.heads]
    if config.frequencies or (config.classes and config.unlabelled):
        seen = "more waves than the first level is wide" if config.frequencies else "a class for none"
        raise ConfigError("diffusers' U-Net has no such parts", where="--to diffusers", seen=seen, fix="--to sfumato")
    return {
        "_class_name": "UNet2DModel",
        "act_fn": "silu",
        "add_attention": bool(config.middle),
        "attention_head_dim": _head_width(config),
        "attn_norm_num_groups": config.groups,
        "block_out_channels": list(config.channels),
        "center_input_sample": False,
        "down_block_types": [down for down, _ in types],
        "downsample_padding": 0 if config.pad_after else 1,
        "downsample_type": "resnet" if blocks else "conv",
        "dropout": config.dropout,
        "flip_sin_to_cos": not config.sines_first,
        "freq_shift": int(config.include_end),
        "in_channels": config.in_channels,
        "layers_per_block": config.blocks,
        "norm_eps": config.eps,
        "norm_num_groups": config.groups,
        "num_class_embeds": config.classes or None,
        "out_channels": config.out_channels or config.in_channels,
        "resnet_time_scale_shift": "scale_shift" if config.modulation == "scale" else "default",
        "sample_size": shared.as_size(config.size),
        "time_embedding_type": "positional",
        "up_block_types": [up for _, up in reversed(types)],
        "upsample_type": "resnet" if blocks else "conv",
    }


def _head_width(config: PixelUNetConfig) -> int | None:
    """Channels of every head, or None where all attention has one head. ConfigError for what diffusers cannot say."""
    pairs = [*zip(config.channels, config.heads, strict=True), (config.channels[-1], config.middle)]
    used = [(width, heads) for width, heads in pairs if heads]
    if all(heads == 1 for _, heads in used):
        return None
    widths = {width // heads for width, heads in used}
    if len(widths) > 1:
        seen = f"heads {list(config.heads)}, middle {config.middle}"
        raise ConfigError("heads in diffusers are of one width", where="--to diffusers", seen=seen, fix="--to sfumato")
    return widths.pop()


def _scheduler(model: Model) -> dict[str, Any]:
    """The scheduler that samples as is recommended: DDPM's, or DDIM's where nothing else can be said."""
    sampling = model.spec["sampling"]
    sampler, _ = shared.slots_of(sampling)
    said = shared.scheduler_of({**sampling, "sampler": {"kind": "ddim"}})
    clip = sampler.get("clip")
    said |= {"clip_sample": clip is not None} | ({} if clip is None else {"clip_sample_range": float(clip)})
    learned = VARIANCE in model.answers
    if sampler.get("kind") != "ddpm" and not learned:
        return said
    del said["set_alpha_to_one"]
    variance = "learned" if learned else sampler.get("variance", "small")
    return said | {"_class_name": "DDPMScheduler", "variance_type": VARIANCES[variance]}


# Original files


def flags_of(file: Path) -> dict[str, Any]:
    """What a JSON of the same name beside a file says of how it was trained; nothing where there is none."""
    beside = file.with_suffix(".json")
    return read_json(beside) if beside.is_file() else {}


def is_consistency(seen: unet.Seen) -> bool:
    """Whether a file is of OpenAI's consistency models (or their teachers), whose convolutions have two axes."""
    return seen.axes == 2


def read_original(
    state: Mapping[str, Tensor], seen: unet.Seen, kept: unet.Original, flags: Mapping[str, Any], where: str
) -> tuple[PixelUNetConfig, dict[str, Tensor]]:
    """The shape of the network of an original file, and its weights by their names in a model."""
    heads = unet.Heads(channels=int(flags.get("num_head_channels", 64)))
    if "num_heads" in flags or (seen.channels == FOUR and "num_head_channels" not in flags):
        heads = unet.Heads(number=int(flags.get("num_heads", 4)))
    size = flags.get("image_size") or (ATTENDED * 2 ** seen.attended.index(True) if any(seen.attended) else 0)
    if not size:
        fix = f'{Path(where).with_suffix(".json").name} with {{"image_size": 64}}'
        raise CheckpointError("a U-Net whose size is not known", where=where, seen="no attention", fix=fix)
    config = seen.config(heads, size=int(size), dropout=float(flags.get("dropout", 0.0)))
    plain = {key: value.float() for key, value in state.items()}
    named = renamed(plain, unet.lines(config, kept), ORIGINAL, OURS, where)
    return config, {f"net.{key}": value for key, value in named.items()}


def write_original(net: PixelUNet, kept: unet.Original) -> dict[str, Tensor]:
    """The weights as an original file names them. ConfigError for a network that OpenAI's code has not."""
    config = net.config
    if config.sines_first or config.include_end or config.pad_after or config.unlabelled * config.classes:
        seen = "DDPM's own waves or padding, or a class for none"
        raise ConfigError("OpenAI's U-Net has no such parts", where="--to single-file", seen=seen, fix="--to diffusers")
    return renamed(net.state_dict(), unet.lines(config, kept), OURS, ORIGINAL, "--to single-file")

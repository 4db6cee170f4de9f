"""DiT and SiT in diffusers' folders and in the original files (Peebles & Xie 2023; Ma et al. 2024).

SiT has DiT's names (see `sfumato.io.families.dit`), but its time runs from noise to data and its velocity points there,
so a file is turned round as it is read; the channels that it has for a variance never learned, and are zero, which is
how the two are told apart.
"""

from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sfumato.codecs import Latents
from sfumato.conditioners import Labels
from sfumato.denoiser import VARIANCE, as_index, as_reversed
from sfumato.errors import CheckpointError, ConfigError
from sfumato.io import parts as shared
from sfumato.io.families.dit import (
    EMBEDDINGS,
    MARKS,
    POSITIONS,
    TABLE,
    config_of,
    is_original,
    is_plain,
    lines,
    slot_of,
    table_of,
    without_positions,
)
from sfumato.io.family import Published
from sfumato.io.keymap import DIFFUSERS, ORIGINAL, OURS, renamed
from sfumato.io.pretrained import read_json, read_state
from sfumato.model import Model
from sfumato.nets.dit import DiT, DiTConfig
from sfumato.paths import Linear, Tabulated
from sfumato.predictions import VELOCITY

NONE = 1000  # the class that diffusers' pipeline takes for none


class DiTFamily:
    """DiT and SiT by class. See `sfumato.io.family.Family`."""

    pipelines = ("DiTPipeline",)

    def read_folder(self, folder: Path, index: Mapping[str, Any]) -> Published:
        path, prediction, sampling = shared.read_table(folder)
        config, net = _transformer(folder / "transformer")
        codec, autoencoder, factor = shared.read_vae(folder / "vae")
        labels = _labels(config.classes, index.get("id2label"))
        sampling = {"steps": 50, "guidance": 4.0, **sampling}
        section = {"path": path, "prediction": prediction, "time_input": "index", **_section(config, codec)}
        size = [side * factor for side in shared.pair(config.size)]
        return Published(section, size, sampling, net | autoencoder, labels.files(), shared.facts_of(folder, index))

    def owns(self, model: Model) -> bool:
        net = model.net
        kinds = isinstance(model.codec, Latents) and isinstance(model.conditioner, Labels)
        fits = isinstance(net, DiT) and net.config.classes > 0 and is_plain(net.config)
        return kinds and fits and (_is_sit(model) or _is_dit(model))

    def write_folder(self, place: Path, model: Model, dtype: torch.dtype) -> None:
        net, codec, labels, path = model.net, model.codec, model.conditioner, model.denoiser.path
        assert isinstance(net, DiT) and isinstance(codec, Latents) and isinstance(labels, Labels)
        if not isinstance(path, Tabulated):
            raise ConfigError("diffusers has no SiT", where="--to diffusers", fix="--to single-file")
        if net.config.classes != NONE:
            seen = f"{net.config.classes} classes"
            what = f"diffusers' pipeline takes class {NONE} for none"
            raise ConfigError(what, where="--to diffusers", seen=seen, fix="--to single-file")
        names = {str(i): name for i, name in enumerate(labels.names) if name}
        parts = {
            "scheduler": ["diffusers", shared.scheduler_of(model.spec["sampling"])["_class_name"]],
            "transformer": ["diffusers", "DiTTransformer2DModel"],
            "vae": ["diffusers", "AutoencoderKL"],
        }
        shared.write_index(place, self.pipelines[0], parts | ({"id2label": names} if names else {}), model)
        shared.write_table(place, path, model.spec["model"]["prediction"], model.spec["sampling"])
        shared.write_json(place / "transformer" / "config.json", _described(net.config))
        state = renamed(net.state_dict(), lines(net.config), OURS, DIFFUSERS, str(place))
        shared.write_part(place / "transformer" / shared.WEIGHTS, _copied(state, net.config.depth), dtype)
        shared.write_vae(place, codec, dtype)

    def knows(self, keys: Collection[str]) -> bool:
        return {MARKS[ORIGINAL]["label"], "blocks.0.adaLN_modulation.1.weight"} <= set(keys)

    def read_file(self, state: Mapping[str, Tensor], file: Path, parts: Path | None) -> Published:
        config = config_of(state, ORIGINAL, str(file))
        net = without_positions(dict(state), table_of(config), ORIGINAL, str(file))
        net = renamed({key: value.float() for key, value in net.items()}, lines(config), ORIGINAL, OURS, str(file))
        if parts is None:
            fix = "--parts FOLDER, one with vae: a DiT's or a Stable Diffusion's"
            raise CheckpointError("a file of a DiT has no autoencoder", where=str(file), seen="no parts", fix=fix)
        codec, autoencoder, factor = shared.read_vae(parts)
        index = read_json(parts / shared.INDEX) if (parts / shared.INDEX).is_file() else {}
        labels = _labels(config.classes, index.get("id2label"))
        flow = _is_flow(net["head.out.weight"], config)
        if flow:
            config, net = _turned(config, net)
        size = [side * factor for side in shared.pair(config.size)]
        section, sampling = (SIT, SIT_SAMPLING) if flow else (DDPM, DDPM_SAMPLING)
        state = {f"net.{key}": value for key, value in net.items()} | autoencoder
        facts = {"from": file.name, "pipeline": "SiT" if flow else "DiT"}
        return Published({**section, **_section(config, codec)}, size, dict(sampling), state, labels.files(), facts)

    def write_file(self, model: Model) -> dict[str, Tensor]:
        net = model.net
        assert isinstance(net, DiT)
        config, state = net.config, net.state_dict()
        if _is_sit(model):
            config, state = _turned_back(config, state)
        elif not is_original(model):
            seen = f"{model.denoiser.path}, {model.spec['model']['prediction']}, answers {', '.join(model.answers)}"
            what = "an original DiT says the noise and a variance, on 1000 linear betas"
            raise ConfigError(what, where="--to single-file", seen=seen, fix="--to diffusers")
        named = renamed(state, lines(config), OURS, ORIGINAL, "--to single-file")
        return {POSITIONS[ORIGINAL]: table_of(config), **named}


DDPM: dict[str, Any] = {"path": TABLE, "prediction": "eps", "time_input": "index"}
DDPM_SAMPLING: dict[str, Any] = {
    "sampler": {"kind": "ddpm", "variance": "learned"},
    "grid": {"kind": "linspace"},
    "steps": 250,
    "guidance": 4.0,
}
SIT: dict[str, Any] = {"path": {"kind": "linear"}, "prediction": "velocity", "time_input": "reversed"}
SIT_SAMPLING: dict[str, Any] = {"sampler": {"kind": "heun"}, "grid": {"kind": "linear"}, "steps": 50, "guidance": 4.0}


def _section(config: DiTConfig, codec: Mapping[str, Any]) -> dict[str, Any]:
    """What DiT and SiT share of a model's section."""
    learned = config.out_channels == 2 * config.in_channels
    return {
        "scale_input": None,
        "net": slot_of(config),
        "codec": codec,
        "conditioner": {"kind": "labels", "classes": config.classes},
        "answers": ["x0", VARIANCE] if learned else ["x0"],
    }


def _is_sit(model: Model) -> bool:
    denoiser = model.denoiser
    told = denoiser.time_input is as_reversed and denoiser.scale_input is None
    return told and isinstance(denoiser.path, Linear) and denoiser.prediction == VELOCITY


def _is_dit(model: Model) -> bool:
    denoiser = model.denoiser
    return denoiser.time_input is as_index and denoiser.scale_input is None and isinstance(denoiser.path, Tabulated)


# SiT: t = 1 is data there, and the velocity points to it


def _is_flow(out: Tensor, config: DiTConfig) -> bool:
    """Whether a variance was never learned. out: the last layer's weight under our names, rows by channel."""
    assert config.out_channels is not None
    return config.out_channels == config.in_channels or not bool(out[len(out) // 2 :].any())


def _turned(config: DiTConfig, state: Mapping[str, Tensor]) -> tuple[DiTConfig, dict[str, Tensor]]:
    """A SiT that says noise minus data, without the channels that never learned."""
    rows = config.in_channels * config.patch**2
    kept = {key: -value[:rows] if key.startswith("head.out.") else value for key, value in state.items()}
    return replace(config, out_channels=config.in_channels), kept


def _turned_back(config: DiTConfig, state: Mapping[str, Tensor]) -> tuple[DiTConfig, dict[str, Tensor]]:
    """The inverse of `_turned`, with the channels that SiT's own code has by default."""
    kept = dict(state)
    for key in ("head.out.weight", "head.out.bias"):
        kept[key] = torch.cat([-kept[key], torch.zeros_like(kept[key])])
    return replace(config, out_channels=2 * config.in_channels), kept


# diffusers' transformer


def _transformer(folder: Path) -> tuple[DiTConfig, dict[str, Tensor]]:
    """The shape of the network of a folder `transformer`, and its weights under our names."""
    said, where = read_json(folder / "config.json"), str(folder)
    state = _once({key: value.float() for key, value in read_state(folder).items()}, where)
    config = config_of(
        state, DIFFUSERS, where, heads=int(said.get("num_attention_heads", 16)), size=int(said.get("sample_size") or 0)
    )
    state = without_positions(state, table_of(config), DIFFUSERS, where)
    named = renamed(state, lines(config), DIFFUSERS, OURS, where)
    return config, {f"net.{key}": value for key, value in named.items()}


def _once(state: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
    """The state with one copy of the embeddings. CheckpointError if blocks have other ones, as training can bring."""
    kept: dict[str, Tensor] = {}
    for key, value in state.items():
        before, found, name = key.partition(EMBEDDINGS)
        if not found or before == "transformer_blocks.0":
            kept[key] = value
            continue
        first = state.get(f"transformer_blocks.0{EMBEDDINGS}{name}")
        if first is None or not torch.equal(first, value):
            raise CheckpointError(
                "the blocks have embeddings of time and class that differ from the first's",
                where=where,
                seen=key,
                fix="a DiT that was trained with one embedding for all",
            )
    return kept


def _copied(state: Mapping[str, Tensor], depth: int) -> dict[str, Tensor]:
    """The state with a copy of the embeddings in every block."""
    out = dict(state)
    for key, value in state.items():
        _, found, name = key.partition(EMBEDDINGS)
        if found:
            out |= {f"transformer_blocks.{i}{EMBEDDINGS}{name}": value for i in range(depth)}
    return out


def _described(config: DiTConfig) -> dict[str, Any]:
    return {
        "_class_name": "DiTTransformer2DModel",
        "activation_fn": "gelu-approximate",
        "attention_bias": True,
        "attention_head_dim": config.dim // config.heads,
        "dropout": config.dropout,
        "in_channels": config.in_channels,
        "norm_elementwise_affine": False,
        "norm_eps": 1e-6,
        "norm_type": "ada_norm_zero",
        "num_attention_heads": config.heads,
        "num_embeds_ada_norm": config.classes,
        "num_layers": config.depth,
        "out_channels": config.out_channels or config.in_channels,
        "patch_size": config.patch,
        "sample_size": shared.as_size(config.size),
    }


def _labels(classes: int, names: Mapping[str, Any] | None) -> Labels:
    """The conditioner of so many classes. names: by their numbers, as in diffusers' index."""
    labels = Labels(classes)
    if names:
        labels.names = tuple(str(names.get(str(i), "")) for i in range(classes))
    return labels

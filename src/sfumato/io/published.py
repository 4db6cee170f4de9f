"""Published models in folders of diffusers, as models of this library: Stable Diffusion 1 and 2.

`model_index.json` names the parts. The scheduler's config becomes a path, a prediction and the recommended sampler and
grid (`sfumato.names`), the network's and the autoencoder's shapes are read off their weights, and every weight finds
its place by the tables of `sfumato.io.families`, or is an error that names it. What comes out is an ordinary model: it
can be sampled, and saved as a model directory.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from sfumato.errors import CheckpointError, ConfigError, nearest
from sfumato.io.directory import fill_weights
from sfumato.io.families import stable
from sfumato.io.keymap import DIFFUSERS, OURS, renamed
from sfumato.io.pretrained import codec_from, read_json, read_state
from sfumato.model import Model, build_model
from sfumato.names import sampler_named
from sfumato.text import files_of

INDEX = "model_index.json"
OWN = "sfumato.json"  # what a folder of diffusers has no place for, where this library wrote it
PIPELINES = ("StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline")
SCHEDULES = {"linear": "linear", "scaled_linear": "scaled_linear", "squaredcos_cap_v2": "cosine"}
PREDICTIONS = {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}


def is_published(folder: Path) -> bool:
    """Whether a folder is one of diffusers' pipelines."""
    return (folder / INDEX).is_file()


def load_published(folder: Path) -> Model:
    """The model of a folder of diffusers, in evaluation mode. CheckpointError for what is missing or not known."""
    folder = Path(folder)
    index = read_json(folder / INDEX)
    kind = str(index.get("_class_name"))
    if kind not in PIPELINES:
        fix = nearest(kind, PIPELINES)
        raise CheckpointError("a pipeline that is not known here", where=str(folder / INDEX), seen=kind, fix=fix)
    scheduler = read_json(folder / "scheduler" / "scheduler_config.json")
    shape, net = _unet(folder / "unet")
    codec, codec_state = codec_from({"kind": "latents", "weights": str(folder / "vae")})
    text, files = _text(folder)
    if shape["in_channels"] != codec["latent"]:
        seen = f"{shape['in_channels']} channels, where the autoencoder has {codec['latent']}"
        raise CheckpointError("a U-Net that takes more than latents (inpainting, say)", where=str(folder), seen=seen)
    factor = 2 ** (len(codec["channels"]) - 1)
    section = {
        "path": _path(scheduler, folder),
        "prediction": _prediction(scheduler, folder),
        "time_input": "index",
        "scale_input": None,
        "net": shape,
        "codec": codec,
        "conditioner": {"kind": "text", "length": _tokenizer_length(folder)},
    }
    own = read_json(folder / OWN) if (folder / OWN).is_file() else {}
    size = own.get("size") or [int(side) * factor for side in _pair(shape["size"])]
    sampling = own.get("sampling") or _sampling(scheduler)
    model = build_model({"model": section, "size": size, "sampling": sampling}, files=files)
    state = {f"net.{key}": value for key, value in net.items()}
    state |= {f"codec.{key}": value for key, value in codec_state.items()}
    state |= {f"conditioner.encoder.{key}": value for key, value in text.items()}
    fill_weights(model, state, str(folder))
    model.facts = own.get("facts") or {"from": str(index.get("_name_or_path") or folder.name), "pipeline": kind}
    return model.eval().requires_grad_(False)


def _unet(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The slot of the network, and its weights under our names."""
    config = read_json(folder / "config.json")
    state = {key: value.float() for key, value in read_state(folder).items()}
    levels = len(config.get("block_out_channels", ()))
    heads = config.get("num_attention_heads") or config.get("attention_head_dim", 8)  # which means heads, by mistake
    each = tuple(heads) if isinstance(heads, list) else (int(heads),) * levels
    shape = stable.config_of(state, DIFFUSERS, str(folder), each, int(config.get("norm_num_groups") or 32))
    names = ("in_channels", "out_channels", "channels", "blocks", "depths", "middle", "heads", "context_dim")
    slot = {name: getattr(shape, name) for name in (*names, "pooled_dim", "guidance_dim", "linear", "groups")}
    slot = {name: list(value) if isinstance(value, tuple) else value for name, value in slot.items()}
    slot |= {"kind": "stable_unet", "size": as_size(config.get("sample_size", 64))}
    return slot, renamed(state, stable.lines(shape), DIFFUSERS, OURS, str(folder))


def _text(folder: Path) -> tuple[dict[str, Tensor], dict[str, bytes]]:
    """The text encoder's weights under the names that its library gives them now, and the files that travel."""
    state = read_state(folder / "text_encoder")
    plain = {key.removeprefix("text_model."): value.float() for key, value in state.items()}
    return {key: value for key, value in plain.items() if not key.endswith("position_ids")}, files_of(folder)


def _tokenizer_length(folder: Path) -> int:
    path = folder / "tokenizer" / "tokenizer_config.json"
    longest = read_json(path).get("model_max_length", 77) if path.is_file() else 77
    return int(longest) if isinstance(longest, (int, float)) and 3 <= longest <= 512 else 77


def _path(config: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    betas = str(config.get("beta_schedule", "linear"))
    if betas not in SCHEDULES:
        raise CheckpointError("betas that are not known here", where=str(folder), seen=betas, fix=", ".join(SCHEDULES))
    slot: dict[str, Any] = {"kind": "tabulated", "betas": SCHEDULES[betas]}
    slot["steps"] = int(config.get("num_train_timesteps", 1000))
    if betas != "squaredcos_cap_v2":
        slot |= {"start": float(config.get("beta_start", 1e-4)), "end": float(config.get("beta_end", 0.02))}
    return slot | ({"zero_terminal_snr": True} if config.get("rescale_betas_zero_snr") else {})


def _prediction(config: Mapping[str, Any], folder: Path) -> str:
    said = str(config.get("prediction_type", "epsilon"))
    if said not in PREDICTIONS:
        fix = ", ".join(PREDICTIONS)
        raise CheckpointError("a prediction that is not known here", where=str(folder), seen=said, fix=fix)
    return PREDICTIONS[said]


def _sampling(config: Mapping[str, Any]) -> dict[str, Any]:
    """What is recommended: the checkpoint's own sampler and grid, or where they are not known here the defaults."""
    base = {"steps": 50, "guidance": 7.5}
    try:
        sampler, grid = sampler_named(config)
    except ConfigError:
        return {**base, "sampler": {"kind": "dpmpp_2m"}, "grid": {"kind": "trailing"}}
    return {**base, "sampler": sampler, "grid": grid}


def as_size(size: int | Sequence[int]) -> int | list[int]:
    """One side of a square, or height and width."""
    sides = _pair(size)
    return sides[0] if sides[0] == sides[1] else sides


def _pair(size: int | Sequence[int]) -> list[int]:
    return [size, size] if isinstance(size, int) else list(size)

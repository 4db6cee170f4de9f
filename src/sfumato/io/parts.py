"""The parts that folders of diffusers share: schedulers as paths and grids, the autoencoder, what describes a folder.

Each is read into a slot of our spec and weights under our names, and written from them. `sfumato.json` beside them
holds what such a folder has no place for (recommended settings, facts), so that the way back is exact.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sfumato.codecs import Latents
from sfumato.errors import CheckpointError, ConfigError
from sfumato.io.directory import write_weights
from sfumato.io.families import autoencoder
from sfumato.io.keymap import DIFFUSERS, OURS, renamed
from sfumato.io.pretrained import codec_from, read_json
from sfumato.model import Model
from sfumato.names import sampler_named, spelled_out
from sfumato.paths import Tabulated

INDEX = "model_index.json"
OWN = "sfumato.json"  # what a folder of diffusers has no place for, where this library wrote it
WEIGHTS = "diffusion_pytorch_model.safetensors"
VERSION = "0.42.1"  # of diffusers, whose layout is written
SCHEDULES = {"linear": "linear", "scaled_linear": "scaled_linear", "squaredcos_cap_v2": "cosine"}
PREDICTIONS = {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}


# Files


def write_json(path: Path, said: Mapping[str, Any]) -> None:
    """A description, with the folder it lies in."""
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(said, indent=2) + "\n", encoding="utf-8")


def write_part(path: Path, state: Mapping[str, Tensor], dtype: torch.dtype) -> None:
    """Weights, with the folder they lie in."""
    path.parent.mkdir(exist_ok=True)
    write_weights(path, state, dtype)


def write_index(place: Path, kind: str, parts: Mapping[str, Any], model: Model) -> None:
    """model_index.json, and beside it what it has no place for."""
    write_json(place / INDEX, {"_class_name": kind, "_diffusers_version": VERSION, **dict(sorted(parts.items()))})
    own = {name: model.spec[name] for name in ("sampling", "size")} | {"facts": model.facts}
    if "answers" in model.spec["model"]:  # of a student, which nothing else tells
        own["answers"] = model.spec["model"]["answers"]
    write_json(place / OWN, own)


def read_own(folder: Path) -> dict[str, Any]:
    """What this library wrote beside a model_index.json, or nothing."""
    return read_json(folder / OWN) if (folder / OWN).is_file() else {}


def part_of(folder: Path, name: str) -> Path:
    """Where a part of a folder of diffusers lies: below it, or as in Google's DDPMs in the folder itself."""
    return folder / name if (folder / name).is_dir() else folder


def facts_of(folder: Path, index: Mapping[str, Any]) -> dict[str, Any]:
    """Where a folder of diffusers is from."""
    return {"from": str(index.get("_name_or_path") or folder.name), "pipeline": str(index.get("_class_name"))}


# Schedulers of a table of betas


def read_table(folder: Path) -> tuple[dict[str, Any], str, dict[str, Any]]:
    """Of the scheduler in a folder: the slot of the path, the prediction, and the recommended sampler and grid."""
    config = read_json(part_of(folder, "scheduler") / "scheduler_config.json")
    return _table(config, folder), _prediction(config, folder), recommended(config)


def _table(config: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    if given := config.get("trained_betas"):
        return {"kind": "tabulated", "betas": [float(beta) for beta in given]}
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


def recommended(config: Mapping[str, Any]) -> dict[str, Any]:
    """The checkpoint's own sampler and grid, or one that suits a table where they are not known here."""
    try:
        sampler, grid = sampler_named(config)
    except ConfigError:
        return {"sampler": {"kind": "dpmpp_2m"}, "grid": {"kind": "trailing"}}
    return {"sampler": sampler, "grid": grid}


def scheduler_of(sampling: Mapping[str, Any]) -> dict[str, Any]:
    """The scheduler of diffusers that samples a table as is recommended, as far as it has one; DDIM's else.

    What is said is the class and the options of its own, among them the spacing of its times.
    """
    sampler, grid = slots_of(sampling)
    kind = grid.get("kind")
    spacing: dict[str, Any] = {"steps_offset": int(grid.get("offset", 0)) if kind == "leading" else 1}
    spacing["timestep_spacing"] = kind if kind in ("linspace", "trailing") else "leading"
    if sampler.get("kind") == "dpmpp_2m":
        spacing["steps_offset"] = 0
        return {
            "_class_name": "DPMSolverMultistepScheduler",
            "algorithm_type": "dpmsolver" if sampler.get("of") == "noise" else "dpmsolver++",
            "lower_order_final": bool(sampler.get("lower_order_final", True)),
            "solver_order": 2,
            "solver_type": str(sampler.get("form", "midpoint")),
            "use_karras_sigmas": kind == "karras",
            **spacing,
        }
    return {"_class_name": "DDIMScheduler", "clip_sample": False, "set_alpha_to_one": True, **spacing}


def scheduler_of_lcm(sampling: Mapping[str, Any]) -> dict[str, Any]:
    """The scheduler of latent consistency models, with their boundary and the grid that they were distilled on."""
    sampler, grid = slots_of(sampling)
    return {
        "_class_name": "LCMScheduler",
        "clip_sample": False,
        "original_inference_steps": int(grid.get("of", 50)),
        "set_alpha_to_one": True,
        "timestep_scaling": float(sampler.get("boundary") or 10.0),
    }


def slots_of(sampling: Mapping[str, Any]) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """The sampler and the grid that are recommended, as slots of the catalogue."""
    known = spelled_out({name: sampling[name] for name in ("sampler", "grid") if sampling.get(name)})
    return slot_of(known.get("sampler")), slot_of(known.get("grid"))


def slot_of(said: Any) -> Mapping[str, Any]:
    """A slot, from a name or a mapping with `kind`."""
    return said if isinstance(said, Mapping) else {"kind": said}


def write_table(
    place: Path,
    path: Tabulated,
    prediction: Any,
    sampling: Mapping[str, Any] | None = None,
    scheduler: Mapping[str, Any] | None = None,
) -> None:
    """The scheduler of a table of betas. ConfigError where diffusers has none like it.

    prediction: its slot, a name or a mapping with `kind`, as what was trained here has it.
    sampling: what the model recommends, as far as diffusers can say it; Stable Diffusion's way of DDIM if not said.
    scheduler: the class and its options, where the family says them.
    """
    theirs = {ours: name for name, ours in PREDICTIONS.items()}
    schedules = {ours: name for name, ours in SCHEDULES.items()}
    prediction = str(slot_of(prediction)["kind"])
    given = {"trained_betas": list(path.betas)} if isinstance(path.betas, tuple) else {}
    if prediction not in theirs or (path.betas not in schedules and not given):
        seen = f"prediction {prediction}, betas {path.betas}"
        raise ConfigError("diffusers' table-based schedulers have no such model", where="--to diffusers", seen=seen)
    said = {
        **(scheduler or scheduler_of(sampling or {})),
        "beta_schedule": "linear" if isinstance(path.betas, tuple) else schedules[path.betas],
        **given,
        "num_train_timesteps": path.steps,
        "prediction_type": theirs[prediction],
        "rescale_betas_zero_snr": path.zero_terminal_snr,
    }
    ends = {"beta_start": path.start, "beta_end": path.end}
    said |= {name: value for name, value in ends.items() if value is not None}
    write_json(place / "scheduler" / "scheduler_config.json", said)


# Schedulers of flow matching

FLOW: dict[str, Any] = {  # the model section that all of them share
    "path": {"kind": "linear"},
    "prediction": "velocity",
    "time_input": "thousandths",
    "scale_input": None,
}


def write_flow(place: Path, model: Model) -> None:
    """The scheduler of a flow on the straight path, with the shift that the model's recommended grid has."""
    grid = model.spec["sampling"].get("grid") or {}
    slot = grid if isinstance(grid, Mapping) else {"kind": grid}
    said: dict[str, Any] = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000}
    if slot.get("kind") == "dynamic_shift":
        said |= {
            "base_image_seq_len": int(slot.get("fewest", 256)),
            "max_image_seq_len": int(slot.get("most", 4096)),
            "base_shift": float(slot.get("low", 0.5)),
            "max_shift": float(slot.get("high", 1.15)),
            "use_dynamic_shifting": True,
            "shift": float(slot.get("by", 3.0)),
            "shift_terminal": slot.get("terminal"),
            "time_shift_type": str(slot.get("form", "exponential")),
        }
    else:
        said |= {"shift": float(slot.get("by", 3.0)) if slot.get("kind") == "shifted" else 1.0}
        said |= {"use_dynamic_shifting": False}
    write_json(place / "scheduler" / "scheduler_config.json", said)


# The autoencoder


def read_vae(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor], int]:
    """Of `vae` in a folder, or of a file: the slot of the codec, its weights, and how much smaller latents are."""
    codec, state = codec_from({"kind": "latents", "weights": str(folder)})
    return codec, {f"codec.{key}": value for key, value in state.items()}, 2 ** (len(codec["channels"]) - 1)


def write_vae(place: Path, codec: Latents, dtype: torch.dtype) -> None:
    """diffusers' AutoencoderKL in `vae`."""
    shape = codec.autoencoder.config
    write_json(place / "vae" / "config.json", _vae(codec))
    state = renamed(codec.autoencoder.state_dict(), autoencoder.lines(shape), OURS, DIFFUSERS, str(place))
    write_part(place / "vae" / WEIGHTS, state, dtype)


def _vae(codec: Latents) -> dict[str, Any]:
    config, levels = codec.autoencoder.config, len(codec.autoencoder.config.channels)
    scale, shift = codec.scale.flatten().tolist(), codec.shift.flatten().tolist()
    if len(scale) > 1 or len(shift) > 1:
        seen = f"{len(scale)} scales, {len(shift)} shifts"
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
        "scaling_factor": short(scale[0]),
        "shift_factor": short(shift[0]) if shift[0] else None,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "use_post_quant_conv": config.quant,
        "use_quant_conv": config.quant,
    }


def short(value: float) -> float:
    """The shortest number that is this float32: 0.18215, and not 0.18215000629425049."""
    return next(float(f"{value:.{n}g}") for n in range(1, 18) if _same(float(f"{value:.{n}g}"), value))


def _same(one: float, other: float) -> bool:
    return bool(torch.tensor(one, dtype=torch.float32) == torch.tensor(other, dtype=torch.float32))


# Sizes


def as_size(size: int | Sequence[int]) -> int | list[int]:
    """One side of a square, or height and width."""
    sides = pair(size)
    return sides[0] if sides[0] == sides[1] else sides


def pair(size: int | Sequence[int]) -> list[int]:
    """Height and width of a size."""
    return [size, size] if isinstance(size, int) else list(size)

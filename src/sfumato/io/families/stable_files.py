"""Original single files of Stable Diffusion 1, 2, XL and XL's refiner: U-Net, autoencoder and text encoders in one.

Such a file tells no heads of the first version, no latent size, and not whether version 2 says the noise or v; and it
has no tokenizer. These come from a folder of diffusers beside it (`parts`), and where that says nothing of shapes, from
what was published.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from sfumato.codecs import Latents
from sfumato.errors import CheckpointError
from sfumato.io import parts as shared
from sfumato.io import text_parts
from sfumato.io.families import autoencoder, encoders, stable
from sfumato.io.families.encoders import SD1, SD2, SDXL, SDXL_REFINER, Place
from sfumato.io.family import Published
from sfumato.io.keymap import ORIGINAL, OURS, renamed, some
from sfumato.io.pretrained import codec_of, read_json
from sfumato.model import Model
from sfumato.nets.stable_unet import StableUNet

VAE = autoencoder.PREFIXES[0]
TOLD_XL = f"{stable.PREFIX}label_emb.0.0.weight"
FOURTH = f"{stable.PREFIX}input_blocks.9.0.op.weight"  # a step to a fourth level, which XL's refiner has and XL has not
ENTRY = f"{stable.PREFIX}input_blocks.0.0.weight"
WORDS = f"{stable.PREFIX}input_blocks.{{}}.1.transformer_blocks.0.attn2.to_k.weight"
# What training left in such files and no model needs: the table of betas, an average under flattened names, counters.
LEFT_OVER = (
    "alphas_",
    "betas",
    "denoiser.",
    "log_one_minus_",
    "logvar",
    "lvlb_weights",
    "model_ema.",
    "posterior_",
    "scale_factor",
    "sqrt_",
)
LEFT = "left out"  # the fact that says so
SCALES = {"sd": 0.18215, "xl": 0.13025}
XL = ("xl", "refiner")  # of the versions those that are told sizes
OPENCLIP = 1024  # the width of the words that version 2 is told


def version(keys: Mapping[str, Tensor]) -> str:
    """ "sd1", "sd2", "xl" or "refiner"."""
    if TOLD_XL in keys:
        return "refiner" if FOURTH in keys else "xl"
    words = next(keys[key] for n in range(20) if (key := WORDS.format(n)) in keys)
    return "sd2" if words.shape[1] == OPENCLIP or SD2[0].within(keys) else "sd1"


def places(kind: str) -> Sequence[Place]:
    """Where the text encoders of a version lie."""
    return {"sd1": SD1, "sd2": SD2, "xl": SDXL, "refiner": SDXL_REFINER}[kind]


def read(
    state: Mapping[str, Tensor], file: Path, parts: Path | None, conditioner: dict[str, Any], sampling: dict[str, Any]
) -> Published:
    """A file of any of the four. conditioner, sampling: the slot, and what is recommended if `parts` says nothing."""
    kind, where = version(state), str(file)
    _checked(state, kind, where)
    path, prediction, own = _scheduler(parts, kind, where)
    shape, net = _network(state, where, _told(parts, "unet"))
    told = _told(parts, "vae")
    if any(key.startswith(VAE) for key in state):
        inside = {key: value for key, value in state.items() if key.startswith(VAE)}
        codec, latents = codec_of(inside, where, {"scaling_factor": SCALES["xl" if kind in XL else "sd"], **told})
        latents = {f"codec.{key}": value for key, value in latents.items()}
    elif parts is not None:
        codec, latents, _ = shared.read_vae(parts / "vae")
    else:
        raise CheckpointError("this file has no autoencoder", where=where, fix="--parts FOLDER, one of diffusers")
    text, files = text_parts.read_text_file(state, places(kind), parts, where, joined=kind in XL)
    if kind not in XL and shape.in_channels == 2 * codec["latent"] + 1:
        conditioner, text, files = text_parts.join_text(conditioner, text, files, {"kind": "inpainting"})
    elif shape.in_channels != codec["latent"]:
        seen = f"{shape.in_channels} channels, where the autoencoder has {codec['latent']}"
        raise CheckpointError("a U-Net that takes more than is known here", where=where, seen=seen)
    side = _told(parts, "unet").get("sample_size") or {"sd1": 64, "xl": 128, "refiner": 128}.get(
        kind, 96 if prediction == "v" else 64
    )
    section = {
        "path": path,
        "prediction": prediction,
        "time_input": "index",
        "scale_input": None,
        "net": stable.slot_of(shape, shared.as_size(side)),
        "codec": codec,
        "conditioner": conditioner,
    }
    size = [int(one) * 2 ** (len(codec["channels"]) - 1) for one in shared.pair(shared.as_size(side))]
    facts = {"from": file.name} | _left_out(state, kind)
    return Published(section, size, {**sampling, **own}, net | latents | text, files, facts)


def write(model: Model, kind: str) -> dict[str, Tensor]:
    """The inverse: a model's weights as the original file of a version names them."""
    net, codec = model.net, model.codec
    conditioner = text_parts.text_of(model.conditioner) or model.conditioner
    assert isinstance(net, StableUNet) and isinstance(codec, Latents) and conditioner is not None
    state = renamed(net.state_dict(), stable.lines(net.config), OURS, ORIGINAL, "the network")
    out = {f"{stable.PREFIX}{key}": value for key, value in state.items()}
    shape = codec.autoencoder.config
    state = renamed(codec.autoencoder.state_dict(), autoencoder.lines(shape), OURS, ORIGINAL, "the autoencoder")
    out |= {f"{VAE}{key}": value for key, value in state.items()}
    return out | text_parts.text_for_file(conditioner, places(kind))  # type: ignore[arg-type]


def _checked(state: Mapping[str, Tensor], kind: str, where: str) -> None:
    """Everything in a file has a place, or is known to need none."""
    known = (stable.PREFIX, VAE, *(one.prefix for one in places(kind)), *LEFT_OVER)
    if odd := [key for key in state if not key.startswith(known)]:
        raise CheckpointError(
            f"{len(odd)} weights belong to no part of this model", where=where, seen=some(odd), fix="a whole model"
        )


def _left_out(state: Mapping[str, Tensor], kind: str) -> dict[str, str]:
    """What a file has and the model has not, in words, for its facts."""
    text = [key for place in places(kind) for key in encoders.unread(state, place)]
    rest = [key for key in state if key.startswith(LEFT_OVER)]
    said = [f"{len(text)} weights of text encoders that nothing reads ({some(text)})"] if text else []
    said += [f"{len(rest)} left by training ({some({key.partition('.')[0] for key in rest})})"] if rest else []
    return {LEFT: "; ".join(said)} if said else {}


def _scheduler(parts: Path | None, kind: str, where: str) -> tuple[dict[str, Any], str, dict[str, Any]]:
    """The path, the prediction, and the recommended sampler and grid."""
    if parts is not None and (parts / "scheduler" / "scheduler_config.json").is_file():
        return shared.read_table(parts)
    if kind == "sd2":
        raise CheckpointError(
            "a file of version 2 does not say whether it says the noise or v",
            where=where,
            fix="--parts FOLDER, one of diffusers with its scheduler",
        )
    path = {"kind": "tabulated", "betas": "scaled_linear", "steps": 1000, "start": 8.5e-4, "end": 0.012}
    config = {"_class_name": "DDIMScheduler", "timestep_spacing": "leading", "steps_offset": 1}
    return path, "eps", shared.recommended(config)


def _network(
    state: Mapping[str, Tensor], where: str, told: Mapping[str, Any]
) -> tuple[stable.StableUNetConfig, dict[str, Tensor]]:
    inner = {key.removeprefix(stable.PREFIX): v.float() for key, v in state.items() if key.startswith(stable.PREFIX)}
    heads = told.get("num_attention_heads") or told.get("attention_head_dim")  # which means heads, by mistake
    levels = len(told.get("block_out_channels", ()))
    each = tuple(heads) if isinstance(heads, list) else (int(heads),) * levels if heads and levels else None
    shape = stable.config_of(inner, ORIGINAL, where, each, int(told.get("norm_num_groups") or 32))
    named = renamed(inner, stable.lines(shape), ORIGINAL, OURS, where)
    return shape, {f"net.{key}": value for key, value in named.items()}


def _told(parts: Path | None, name: str) -> dict[str, Any]:
    """diffusers' config of a part, if there is one."""
    path = None if parts is None else parts / name / "config.json"
    return read_json(path) if path is not None and path.is_file() else {}

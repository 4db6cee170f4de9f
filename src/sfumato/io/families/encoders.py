"""Text encoders inside original single files: where they lie, their names there, and the config that weights tell.

Stable Diffusion 1 and SDXL keep OpenAI's CLIP by the names of `transformers`, behind a prefix, and Stable Diffusion 3
all of its encoders. Stable Diffusion 2 and SDXL keep OpenCLIP's by its own names: queries, keys and values are the rows
of one matrix, and the projection is a bare matrix (in, out). Heads leave no trace in CLIP's weights, and are 64
channels wide in every published one; OpenAI's activation is `quick_gelu`, OpenCLIP's `gelu`. T5 tells its heads.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sfumato.errors import CheckpointError
from sfumato.io.keymap import DIFFUSERS, ORIGINAL, Line, line, renamed
from sfumato.text import CLIP, PROJECTED, T5

HEAD = 64  # channels of a head of CLIP
OPENAI = 768  # the width of OpenAI's CLIP that is published in diffusion models
WORDS = 49_408  # in the vocabulary of CLIP, begin and end the last of them
BARE = (
    "embeddings.",
    "encoder.",
    "final_layer_norm.",
)  # what newer versions of transformers write without "text_model."


@dataclass(frozen=True)
class Place:
    """Where a text encoder lies in an original file.

    part: its folder in diffusers' layout. prefix: of its keys. kind: the class of `transformers`. layout: DIFFUSERS for
    the names of `transformers`, ORIGINAL for OpenCLIP's. layers: those that are ever read, if not all.
    """

    part: str
    prefix: str
    kind: str
    layout: str = DIFFUSERS
    layers: int = 0

    def within(self, keys: Mapping[str, Tensor]) -> bool:
        """Whether a file has it."""
        return any(key.startswith(self.prefix) for key in keys)


_SD3 = "text_encoders.{}.transformer."
SD1 = (Place("text_encoder", "cond_stage_model.transformer.", CLIP),)
SD2 = (Place("text_encoder", "cond_stage_model.model.", CLIP, ORIGINAL, layers=23),)
SDXL = (
    Place("text_encoder", "conditioner.embedders.0.transformer.", CLIP),
    Place("text_encoder_2", "conditioner.embedders.1.model.", PROJECTED, ORIGINAL),
)
SDXL_REFINER = (Place("text_encoder_2", "conditioner.embedders.0.model.", PROJECTED, ORIGINAL),)
SD3 = (
    Place("text_encoder", _SD3.format("clip_l"), PROJECTED),
    Place("text_encoder_2", _SD3.format("clip_g"), PROJECTED),
    Place("text_encoder_3", _SD3.format("t5xxl"), T5),
)
FLUX = (
    Place("text_encoder", _SD3.format("clip_l"), CLIP),
    Place("text_encoder_2", _SD3.format("t5xxl"), T5),
)


def lines(layers: int) -> Iterator[Line]:
    """Every module of a CLIP of so many layers, by the names of `transformers` (DIFFUSERS) and OpenCLIP (ORIGINAL)."""
    words = "text_model.embeddings"
    yield line(bare=True, diffusers=f"{words}.token_embedding.weight", original="token_embedding.weight")
    yield line(bare=True, diffusers=f"{words}.position_embedding.weight", original="positional_embedding")
    yield line(diffusers="text_model.final_layer_norm", original="ln_final")
    yield line(turned=(ORIGINAL,), bare=True, diffusers="text_projection.weight", original="text_projection")
    for i in range(layers):
        there, original = f"text_model.encoder.layers.{i}", f"transformer.resblocks.{i}"
        for leaf in ("weight", "bias"):
            each = tuple(f"{there}.self_attn.{one}_proj.{leaf}" for one in "qkv")
            yield line(bare=True, diffusers=each, original=f"{original}.attn.in_proj_{leaf}")
        for name, origin in _LAYER:
            yield line(diffusers=f"{there}.{name}", original=f"{original}.{origin}")


_LAYER = (
    ("self_attn.out_proj", "attn.out_proj"),
    ("layer_norm1", "ln_1"),
    ("layer_norm2", "ln_2"),
    ("mlp.fc1", "mlp.c_fc"),
    ("mlp.fc2", "mlp.c_proj"),
)


def read(state: Mapping[str, Tensor], place: Place, where: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The config of an encoder in an original file, and its weights as `transformers` names them."""
    found = {key.removeprefix(place.prefix): value for key, value in state.items() if key.startswith(place.prefix)}
    try:
        if place.kind == T5:
            return t5_config(found), found
        found = {key: value for key, value in found.items() if not key.endswith(("position_ids", "logit_scale"))}
        found = _of_openclip(found, place, where) if place.layout == ORIGINAL else _of_transformers(found)
        if place.kind == CLIP:
            found.pop("text_projection.weight", None)
        elif "text_projection.weight" not in found:  # the original had none, where diffusers has one that does nothing
            found["text_projection.weight"] = torch.eye(len(found["text_model.final_layer_norm.weight"]))
        return clip_config(found, place), found
    except KeyError as error:
        raise CheckpointError("a text encoder's weight is missing", where=where, seen=str(error)) from None


def unread(state: Mapping[str, Tensor], place: Place) -> list[str]:
    """The weights of an encoder in an original file that no diffusion model reads, and that `read` leaves out.

    Stable Diffusion 2 takes the states before OpenCLIP's last layer, and no pooled state: its files have that layer and
    the projection all the same. The temperature of CLIP's own training is of use to nobody.
    """
    found = [key.removeprefix(place.prefix) for key in state if key.startswith(place.prefix)]
    if place.kind == T5:
        return []
    dead = ("logit_scale", "text_projection", "text_projection.weight") if place.kind == CLIP else ("logit_scale",)
    out = [key for key in found if key in dead]
    if place.layout == ORIGINAL and place.layers:
        layers = [key for key in found if key.startswith("transformer.resblocks.")]
        out += [key for key in layers if int(key.split(".")[2]) >= place.layers]
    return [f"{place.prefix}{key}" for key in sorted(out)]


def write(state: Mapping[str, Tensor], place: Place) -> dict[str, Tensor]:
    """The inverse: weights as `transformers` names them, by their names in the original file."""
    if place.layout == ORIGINAL:
        state = renamed(state, lines(_layers(state)), DIFFUSERS, ORIGINAL, place.part)
    return {f"{place.prefix}{key}": value for key, value in state.items()}


def _of_transformers(found: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"text_model.{key}" if key.startswith(BARE) else key: value for key, value in found.items()}


def _of_openclip(found: dict[str, Tensor], place: Place, where: str) -> dict[str, Tensor]:
    layers = 1 + max(int(key.split(".")[2]) for key in found if key.startswith("transformer.resblocks."))
    if 0 < place.layers < layers:
        unread = tuple(f"transformer.resblocks.{i}." for i in range(place.layers, layers))
        found, layers = {key: one for key, one in found.items() if not key.startswith(unread)}, place.layers
    return renamed(found, lines(layers), ORIGINAL, DIFFUSERS, where)


def _layers(state: Mapping[str, Tensor]) -> int:
    n = 0
    while f"text_model.encoder.layers.{n}.mlp.fc1.weight" in state:
        n += 1
    return n


def clip_config(state: Mapping[str, Tensor], place: Place) -> dict[str, Any]:
    """The config of a CLIP text encoder, from weights as `transformers` names them."""
    words, width = state["text_model.embeddings.token_embedding.weight"].shape
    projected = state.get("text_projection.weight")
    end = min(words, WORDS) - 1
    return {
        "architectures": [place.kind],
        "attention_dropout": 0.0,
        "bos_token_id": end - 1,
        "eos_token_id": end,
        "hidden_act": "quick_gelu" if width == OPENAI and place.layout == DIFFUSERS else "gelu",
        "hidden_size": width,
        "intermediate_size": len(state["text_model.encoder.layers.0.mlp.fc1.weight"]),
        "layer_norm_eps": 1e-5,
        "max_position_embeddings": len(state["text_model.embeddings.position_embedding.weight"]),
        "model_type": "clip_text_model",
        "num_attention_heads": max(1, width // HEAD),
        "num_hidden_layers": _layers(state),
        "pad_token_id": end if place.layout == DIFFUSERS and width == OPENAI else 0,
        "projection_dim": width if projected is None else len(projected),
        "vocab_size": words,
    }


def t5_config(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """The config of a T5 encoder, from weights as `transformers` names them."""
    words, width = state["shared.weight"].shape
    first = "encoder.block.0.layer"
    buckets, heads = state[f"{first}.0.SelfAttention.relative_attention_bias.weight"].shape
    gated = f"{first}.1.DenseReluDense.wi_0.weight"
    n = 0
    while f"encoder.block.{n}.layer.0.layer_norm.weight" in state:
        n += 1
    return {
        "architectures": [T5],
        "d_ff": len(state[gated if gated in state else f"{first}.1.DenseReluDense.wi.weight"]),
        "d_kv": len(state[f"{first}.0.SelfAttention.q.weight"]) // heads,
        "d_model": width,
        "dropout_rate": 0.1,
        "eos_token_id": 1,
        "feed_forward_proj": "gated-gelu" if gated in state else "relu",
        "is_encoder_decoder": True,
        "layer_norm_epsilon": 1e-6,
        "model_type": "t5",
        "num_heads": heads,
        "num_layers": n,
        "pad_token_id": 0,
        "relative_attention_max_distance": 128,
        "relative_attention_num_buckets": buckets,
        "vocab_size": words,
    }

"""PixArt-alpha and PixArt-Sigma in diffusers' folders and in the original files (Chen et al. 2023, 2024).

The transformer is a DiT with one modulation for all blocks and cross-attention to T5's states, of which the filling is
hidden. Both versions have the same names; alpha reads 120 pieces of words and was told, at 1024 pixels, how large its
pictures had been, Sigma reads 300. The originals keep a caption that stands for none, which diffusers dropped for the
empty prompt. Positions run over the same span at every size. Heads leave no trace in the weights.
"""

import math
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sfumato.codecs import Latents
from sfumato.conditioners import Conditioner, Joined, Sizes
from sfumato.denoiser import VARIANCE, as_index
from sfumato.errors import CheckpointError, ConfigError
from sfumato.io import parts as shared
from sfumato.io import text_parts
from sfumato.io.families import dit
from sfumato.io.family import Published
from sfumato.io.keymap import DIFFUSERS, ORIGINAL, OURS, Line, line, renamed
from sfumato.io.pretrained import read_json, read_state
from sfumato.model import Model
from sfumato.nets.dit import DiT, DiTConfig
from sfumato.paths import Tabulated
from sfumato.text import Text

ALPHA, SIGMA = "PixArtAlphaPipeline", "PixArtSigmaPipeline"
LENGTHS = {ALPHA: 120, SIGMA: 300}  # pieces of words
SPAN = 32.0  # of positions, in all published models
OPTIONS = ("text", "adaln", "span", "unsaid", "sizes", "context_dim")  # in which a PixArt is no plain DiT


# Names


def lines(config: DiTConfig) -> list[Line]:
    """Every module of a PixArt of this shape."""
    return [*_ends(config), *(each for i in range(config.depth) for each in _block(i))]


def _ends(config: DiTConfig) -> Iterator[Line]:
    yield dit.patches(config)
    embed = "adaln_single.emb"
    for ours, theirs, original in (
        ("time", "timestep_embedder", "t_embedder"),
        ("sizes.side", "resolution_embedder", "csize_embedder"),
        ("sizes.ratio", "aspect_ratio_embedder", "ar_embedder"),
    ):
        for i, name in ((0, "linear_1"), (2, "linear_2")):
            yield line(ours=f"{ours}.mlp.{i}", diffusers=f"{embed}.{theirs}.{name}", original=f"{original}.mlp.{i}")
    for i, name, origin in ((0, "linear_1", "fc1"), (2, "linear_2", "fc2")):
        yield line(ours=f"context.{i}", diffusers=f"caption_projection.{name}", original=f"y_embedder.y_proj.{origin}")
    yield line(bare=True, ours="unsaid", original="y_embedder.y_embedding")
    yield line(ours="shared.1", diffusers="adaln_single.linear", original="t_block.1")
    yield line(bare=True, ours="head.offset", diffusers="scale_shift_table", original="final_layer.scale_shift_table")
    yield dit.answer(config, "proj_out")


def _block(i: int) -> Iterator[Line]:
    ours, theirs, original = f"blocks.{i}", f"transformer_blocks.{i}", f"blocks.{i}"
    table = "scale_shift_table"
    yield line(bare=True, ours=f"{ours}.offset", diffusers=f"{theirs}.{table}", original=f"{original}.{table}")
    yield from dit.halves(ours, theirs, original)
    yield line(ours=f"{ours}.cross.q", diffusers=f"{theirs}.attn2.to_q", original=f"{original}.cross_attn.q_linear")
    yield line(
        ours=f"{ours}.cross.kv",
        diffusers=(f"{theirs}.attn2.to_k", f"{theirs}.attn2.to_v"),
        original=f"{original}.cross_attn.kv_linear",
    )
    yield line(ours=f"{ours}.cross.out", diffusers=f"{theirs}.attn2.to_out.0", original=f"{original}.cross_attn.proj")


# Shapes

MARKS = {
    DIFFUSERS: {
        "entry": "pos_embed.proj.weight",
        "caption": "caption_projection.linear_1.weight",
        "sizes": "adaln_single.emb.resolution_embedder.linear_1.weight",
        "feed": "transformer_blocks.{}.ff.net.0.proj.weight",
        "out": "proj_out.weight",
    },
    ORIGINAL: {
        "entry": "x_embedder.proj.weight",
        "caption": "y_embedder.y_proj.fc1.weight",
        "sizes": "csize_embedder.mlp.0.weight",
        "unsaid": "y_embedder.y_embedding",
        "feed": "blocks.{}.mlp.fc1.weight",
        "out": "final_layer.linear.weight",
    },
}


def config_of(
    state: Mapping[str, Tensor], layout: str, where: str, *, heads: int = 0, size: int = 0, span: float = 0.0
) -> DiTConfig:
    """The shape that the weights of diffusers' or the original layout tell.

    heads: where they are known; else of 64 channels, or 16 of the XL's. size: of the latents, where it is known; else
    what the table of positions says, or 128. span: of the positions, where it is known; else as the table says, or 32.
    """
    marks = MARKS[layout]
    try:
        dim, channels, patch = state[marks["entry"]].shape[:3]
        null = state.get(marks.get("unsaid", ""))
        return DiTConfig(
            size=size or dit.size_of(state, layout, patch, 128),
            patch=patch,
            dim=dim,
            depth=dit.counted(state, marks["feed"]),
            heads=heads or dit.HEADS.get(dim, max(1, dim // 64)),
            mlp_ratio=len(state[marks["feed"].format(0)]) / dim,
            in_channels=channels,
            out_channels=len(state[marks["out"]]) // patch**2,
            context_dim=state[marks["caption"]].shape[1],
            text="cross",
            adaln="shared",
            span=span or _span(state.get(dit.POSITIONS[layout])),
            unsaid=0 if null is None else len(null),
            sizes=marks["sizes"] in state,
        )
    except (KeyError, ValueError) as error:
        raise CheckpointError("a weight of the PixArt is missing", where=where, seen=str(error)) from None


def _span(table: Tensor | None) -> float:
    """How far a table of positions reaches: the second place of its first row tells the step."""
    if table is None:
        return SPAN
    places = table.flatten(0, -2)
    side, sine, cosine = math.isqrt(len(places)), places[1, 0], places[1, places.shape[1] // 4]
    return round(float(torch.atan2(sine.float(), cosine.float())) * side, 2)


# The family


class PixArt:
    """The family. See `sfumato.io.family.Family`."""

    pipelines = (ALPHA, SIGMA)

    def read_folder(self, folder: Path, index: Mapping[str, Any]) -> Published:
        path, prediction, sampling = shared.read_table(folder)
        config, net = _transformer(folder / "transformer")
        section = {"path": path, "prediction": prediction}
        length = LENGTHS[str(index["_class_name"])]
        found = _with_parts(config, net, section, folder, length, shared.facts_of(folder, index))
        found.sampling |= sampling
        return found

    def owns(self, model: Model) -> bool:
        net, denoiser = model.net, model.denoiser
        told = denoiser.time_input is as_index and denoiser.scale_input is None and isinstance(denoiser.path, Tabulated)
        text = _text_of(model.conditioner)
        fits = isinstance(net, DiT) and _is_pixart(net.config) and text is not None
        return told and fits and isinstance(model.codec, Latents)

    def write_folder(self, place: Path, model: Model, dtype: torch.dtype) -> None:
        net, codec, text, path = model.net, model.codec, _text_of(model.conditioner), model.denoiser.path
        assert isinstance(net, DiT) and isinstance(codec, Latents)
        assert text is not None and isinstance(path, Tabulated)
        kinds = [kind for kind, length in LENGTHS.items() if length == text.length]
        if not kinds:
            seen, fix = f"{text.length} pieces of words", "--to sfumato"
            raise ConfigError("diffusers' PixArt reads 120 or 300", where="--to diffusers", seen=seen, fix=fix)
        sampling = model.spec["sampling"]
        parts = {**INDEX, "scheduler": ["diffusers", shared.scheduler_of(sampling)["_class_name"]]}
        shared.write_index(place, kinds[0], parts, model)
        shared.write_table(place, path, model.spec["model"]["prediction"], sampling)
        shared.write_json(place / "transformer" / "config.json", _described(net.config))
        state = {key: value for key, value in net.state_dict().items() if key != "unsaid"}
        named = renamed(state, lines(net.config), OURS, DIFFUSERS, str(place))
        shared.write_part(place / "transformer" / shared.WEIGHTS, named, dtype)
        shared.write_vae(place, codec, dtype)
        text_parts.write_text(place, text, dtype)

    def knows(self, keys: Collection[str]) -> bool:
        return {MARKS[ORIGINAL]["caption"], "t_block.1.weight"} <= set(keys)

    def read_file(self, state: Mapping[str, Tensor], file: Path, parts: Path | None) -> Published:
        if parts is None:
            fix = "--parts FOLDER, one of diffusers with vae, text_encoder and tokenizer: another PixArt's"
            raise CheckpointError("a file of a PixArt is its network alone", where=str(file), seen="no parts", fix=fix)
        config = config_of(state, ORIGINAL, str(file))
        net = dit.without_positions(dict(state), dit.table_of(config), ORIGINAL, str(file))
        net = renamed({key: value.float() for key, value in net.items()}, lines(config), ORIGINAL, OURS, str(file))
        section = {"path": dit.TABLE, "prediction": "eps"}
        facts = {"from": file.name, "pipeline": SIGMA if config.unsaid > LENGTHS[ALPHA] else ALPHA}
        length = config.unsaid or LENGTHS[ALPHA]
        return _with_parts(config, net, section, parts, length, facts)

    def write_file(self, model: Model) -> dict[str, Tensor]:
        net = model.net
        assert isinstance(net, DiT)
        if not net.config.unsaid or not dit.is_original(model):
            seen = f"{model.denoiser.path}, {model.spec['model']['prediction']}, {net.config.unsaid} words for none"
            what = "an original PixArt says the noise and a variance, and has a caption for none"
            raise ConfigError(what, where="--to single-file", seen=seen, fix="--to diffusers")
        named = renamed(net.state_dict(), lines(net.config), OURS, ORIGINAL, "--to single-file")
        return {dit.POSITIONS[ORIGINAL]: dit.table_of(net.config), **named}


INDEX: dict[str, Any] = {
    "text_encoder": ["transformers", "T5EncoderModel"],
    "tokenizer": ["transformers", "T5Tokenizer"],
    "transformer": ["diffusers", "PixArtTransformer2DModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}
SAMPLING: dict[str, Any] = {
    "sampler": {"kind": "dpmpp_2m"},
    "grid": {"kind": "linspace", "spare": True},
    "steps": 20,
    "guidance": 4.5,
}


def _with_parts(
    config: DiTConfig,
    net: Mapping[str, Tensor],
    section: Mapping[str, Any],
    folder: Path,
    length: int,
    facts: dict[str, Any],
) -> Published:
    """A network with the autoencoder and the text encoder of a folder. length: pieces of words it reads."""
    codec, autoencoder, factor = shared.read_vae(folder / "vae")
    text, files = text_parts.read_text(folder)
    slot: dict[str, Any] = {"kind": "text", "length": length, "masked": True, "lower": True}
    slot |= {"silent": True} if config.unsaid else {}
    if config.sizes:
        slot = {"kind": "joined", "parts": [slot, {"kind": "sizes"}]}
        head = "conditioner."
        text = {f"{head}parts.0.{key.removeprefix(head)}": value for key, value in text.items()}
        files = {f"0.{name}": data for name, data in files.items()}
    learned = config.out_channels == 2 * config.in_channels
    whole = {
        **section,
        "time_input": "index",
        "scale_input": None,
        "net": dit.slot_of(config),
        "codec": codec,
        "conditioner": slot,
        "answers": ["x0", VARIANCE] if learned else ["x0"],
    }
    state = {f"net.{key}": value for key, value in net.items()} | autoencoder | text
    size = [side * factor for side in shared.pair(config.size)]
    return Published(whole, size, dict(SAMPLING), state, files, facts)


def _text_of(conditioner: Conditioner | None) -> Text | None:
    """The text encoder of a conditioner that is PixArt's."""
    if isinstance(conditioner, Joined) and [type(part) for part in conditioner.parts] == [Text, Sizes]:
        conditioner = conditioner.parts[0]  # type: ignore[assignment]
    fits = isinstance(conditioner, Text) and conditioner.masked and conditioner.lower
    return conditioner if fits and isinstance(conditioner, Text) and conditioner.kind == "T5EncoderModel" else None


def _is_pixart(config: DiTConfig) -> bool:
    single = config.text == "cross" and config.adaln == "shared" and config.span > 0 and config.context_dim > 0
    return single and not config.classes and dit.is_plain(config, *OPTIONS)


# diffusers' transformer


def _transformer(folder: Path) -> tuple[DiTConfig, dict[str, Tensor]]:
    """The shape of the network of a folder `transformer`, and its weights under our names."""
    said, where = read_json(folder / "config.json"), str(folder)
    state = {key: value.float() for key, value in read_state(folder).items()}
    size = int(said.get("sample_size") or 128)
    scale = float(said.get("interpolation_scale") or max(size // 64, 1))
    span = size // int(said.get("patch_size", 2)) / scale
    heads = int(said.get("num_attention_heads", 16))
    config = config_of(state, DIFFUSERS, where, heads=heads, size=size, span=span)
    state = dit.without_positions(state, dit.table_of(config), DIFFUSERS, where)
    return config, renamed(state, lines(config), DIFFUSERS, OURS, where)


def _described(config: DiTConfig) -> dict[str, Any]:
    height, _ = shared.pair(config.size)
    scale = height // config.patch / config.span
    return {
        "_class_name": "PixArtTransformer2DModel",
        "activation_fn": "gelu-approximate",
        "attention_bias": True,
        "attention_head_dim": config.dim // config.heads,
        "caption_channels": config.context_dim,
        "cross_attention_dim": config.dim,
        "dropout": config.dropout,
        "in_channels": config.in_channels,
        "interpolation_scale": int(scale) if scale == int(scale) else scale,
        "norm_elementwise_affine": False,
        "norm_eps": 1e-6,
        "norm_type": "ada_norm_single",
        "num_attention_heads": config.heads,
        "num_embeds_ada_norm": 1000,
        "num_layers": config.depth,
        "out_channels": config.out_channels or config.in_channels,
        "patch_size": config.patch,
        "sample_size": shared.as_size(config.size),
        "use_additional_conditions": config.sizes,
    }

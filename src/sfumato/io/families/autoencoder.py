"""AutoencoderKL in diffusers' folders and in the original files: their names, and the shape that their weights tell.

The original counts the decoder's levels from the picture's size, diffusers and this library in the order of running.
The original's attention has 1x1 convolutions where the others have linear layers.
"""

from collections.abc import Iterator, Mapping, Sequence

from torch import Tensor

from sfumato.errors import CheckpointError
from sfumato.io.keymap import DIFFUSERS, ORIGINAL, OURS, Line, line, some
from sfumato.nets.autoencoder import AutoencoderConfig

PREFIXES = ("first_stage_model.", "vae.", "")  # where it lies in a single file of a whole model


def lines(config: AutoencoderConfig) -> list[Line]:
    """Every module of an autoencoder of this shape."""
    return [*_half("encoder", config), *_half("decoder", config), *_quants(config)]


def _quants(config: AutoencoderConfig) -> Iterator[Line]:
    if config.quant:
        for ours, theirs in (("quant", "quant_conv"), ("post_quant", "post_quant_conv")):
            yield line(ours=ours, diffusers=theirs, original=theirs)


def _half(half: str, config: AutoencoderConfig) -> Iterator[Line]:
    decodes, levels = half == "decoder", len(config.channels)
    yield line(ours=f"{half}.entry", diffusers=f"{half}.conv_in", original=f"{half}.conv_in")
    yield line(ours=f"{half}.norm", diffusers=f"{half}.conv_norm_out", original=f"{half}.norm_out")
    yield line(ours=f"{half}.exit", diffusers=f"{half}.conv_out", original=f"{half}.conv_out")
    for i, (ours, resnet, block) in enumerate((("first", 0, 1), ("second", 1, 2))):
        names = (f"{half}.middle.{ours}", f"{half}.mid_block.resnets.{resnet}", f"{half}.mid.block_{block}")
        yield from _block(*names)
    if config.attention:
        yield from _attention(f"{half}.middle.attention", f"{half}.mid_block.attentions.0", f"{half}.mid.attn_1")
    way, resampler = ("up", "upsample") if decodes else ("down", "downsample")
    for i in range(levels):
        there = levels - 1 - i if decodes else i
        for j in range(config.blocks + decodes):
            yield from _block(
                f"{half}.levels.{i}.blocks.{j}",
                f"{half}.{way}_blocks.{i}.resnets.{j}",
                f"{half}.{way}.{there}.block.{j}",
            )
        yield line(
            ours=f"{half}.levels.{i}.resample.conv",
            diffusers=f"{half}.{way}_blocks.{i}.{resampler}rs.0.conv",
            original=f"{half}.{way}.{there}.{resampler}.conv",
        )


def _block(ours: str, diffusers: str, original: str) -> Iterator[Line]:
    for name in ("norm1", "conv1", "norm2", "conv2"):
        yield line(ours=f"{ours}.{name}", diffusers=f"{diffusers}.{name}", original=f"{original}.{name}")
    yield line(ours=f"{ours}.skip", diffusers=f"{diffusers}.conv_shortcut", original=f"{original}.nin_shortcut")


def _attention(ours: str, diffusers: str, original: str) -> Iterator[Line]:
    yield line(ours=f"{ours}.norm", diffusers=f"{diffusers}.group_norm", original=f"{original}.norm")
    for name in "qkv":
        yield line([ORIGINAL], ours=f"{ours}.{name}", diffusers=f"{diffusers}.to_{name}", original=f"{original}.{name}")
    yield line([ORIGINAL], ours=f"{ours}.out", diffusers=f"{diffusers}.to_out.0", original=f"{original}.proj_out")


# What attention was called in diffusers before 0.17, as in many a folder
OLD_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def modern(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state of diffusers under its present names; the old ones were 1x1 convolutions in some files."""
    out = {}
    for key, value in state.items():
        parts = key.split(".")
        old = parts[-2] if len(parts) > 1 else ""
        if old in OLD_NAMES:
            key = ".".join([*parts[:-2], OLD_NAMES[old], parts[-1]])
        if ".attentions." in key and value.ndim == 4:
            value = value.flatten(1)
        out[key] = value
    return out


def layout_of(keys: Sequence[str], where: str) -> str:
    """Which layout some keys are in. CheckpointError where they are of none."""
    marks = {
        OURS: "decoder.levels.0.blocks.0.conv1.weight",
        DIFFUSERS: "decoder.up_blocks.0.resnets.0.conv1.weight",
        ORIGINAL: "decoder.up.0.block.0.conv1.weight",
    }
    known = set(keys)
    for layout, mark in marks.items():
        if mark in known:
            return layout
    raise CheckpointError(
        "this is no autoencoder of a known layout",
        where=where,
        seen=some(known),
        fix="a diffusers `vae` or a single file",
    )


def config_of(state: Mapping[str, Tensor], layout: str, where: str, groups: int = 32) -> AutoencoderConfig:
    """The shape that the weights tell. groups leave no trace in them; all published autoencoders have 32."""
    block = {OURS: "encoder.levels.{}.blocks.{}", DIFFUSERS: "encoder.down_blocks.{}.resnets.{}"}.get(
        layout, "encoder.down.{}.block.{}"
    )
    middle = {OURS: "encoder.middle.attention", DIFFUSERS: "encoder.mid_block.attentions"}.get(
        layout, "encoder.mid.attn_1"
    )
    entry, exit_ = ("entry", "exit") if layout == OURS else ("conv_in", "conv_out")
    try:
        widths: list[int] = []
        while (key := block.format(len(widths), 0) + ".conv1.weight") in state:
            widths.append(state[key].shape[0])
        blocks = 0
        while block.format(0, blocks) + ".conv1.weight" in state:
            blocks += 1
        return AutoencoderConfig(
            in_channels=state[f"encoder.{entry}.weight"].shape[1],
            latent=state[f"encoder.{exit_}.weight"].shape[0] // 2,
            channels=tuple(widths),
            blocks=blocks,
            groups=groups,
            attention=any(key.startswith(middle) for key in state),
            quant=("quant.weight" if layout == OURS else "quant_conv.weight") in state,
        )
    except KeyError as error:
        raise CheckpointError("an autoencoder's weight is missing", where=where, seen=str(error)) from None

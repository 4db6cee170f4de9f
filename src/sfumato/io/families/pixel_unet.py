"""The U-Nets of DDPM, ADM and consistency models in diffusers' and the original layout: names, and what weights tell.

The original numbers every step of the way down and up in one row, whose entries hold a residual block (0), attention
(1) and on the way up perhaps the step to the next size; diffusers numbers levels, and blocks within them. Originals
keep queries, keys and values as the rows of one convolution, of one axis (ADM) or two (consistency models), and ADM's
own order of those rows deals them out to heads first, but for its model of 64 pixels. Heads, the order, and the order
of the time's waves leave no trace in the weights.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from sfumato.errors import CheckpointError
from sfumato.io.families.stable import residual
from sfumato.io.keymap import DIFFUSERS, ORIGINAL, OURS, Line, line
from sfumato.nets.pixel_unet import PixelUNetConfig

MARKS = {DIFFUSERS: "down_blocks.0.resnets.0.conv1.weight", ORIGINAL: "input_blocks.1.0.in_layers.2.weight"}


@dataclass(frozen=True)
class Original:
    """How an original file keeps its attention. axes: of the convolutions. by_head: whether heads run slowest."""

    axes: int = 1
    by_head: bool = False


def lines(config: PixelUNetConfig, original: Original | None = None) -> list[Line]:
    """Every module of a U-Net of this shape."""
    kept = original or Original()
    return [*_ends(config), *_way_down(config, kept), *_middle(config, kept), *_way_up(config, kept)]


def _ends(config: PixelUNetConfig) -> Iterator[Line]:
    yield line(ours="entry", diffusers="conv_in", original="input_blocks.0.0")
    yield line(ours="norm", diffusers="conv_norm_out", original="out.0")
    yield line(ours="exit", diffusers="conv_out", original="out.2")
    for i, name in ((0, "linear_1"), (2, "linear_2")):
        yield line(ours=f"time.{i}", diffusers=f"time_embedding.{name}", original=f"time_embed.{i}")
    if config.classes:
        yield line(ours="label", diffusers="class_embedding", original="label_emb")


def _way_down(config: PixelUNetConfig, kept: Original) -> Iterator[Line]:
    n = 0
    for level, heads in enumerate(config.heads):
        for j in range(config.blocks):
            yield from _stage(f"down.{n}", f"down_blocks.{level}", f"input_blocks.{n + 1}", j, heads, kept)
            n += 1
        if level + 1 < len(config.channels):
            names = (f"down.{n}", f"down_blocks.{level}.downsamplers.0", f"input_blocks.{n + 1}.0")
            yield from _resampler(*names, "op", config)
            n += 1


def _way_up(config: PixelUNetConfig, kept: Original) -> Iterator[Line]:
    n, levels = 0, len(config.channels)
    for i, heads in enumerate(reversed(config.heads)):
        for j in range(config.blocks + 1):
            yield from _stage(f"up.{n}", f"up_blocks.{i}", f"output_blocks.{n}", j, heads, kept)
            if j == config.blocks and i + 1 < levels:
                original = f"output_blocks.{n}.{2 if heads else 1}"
                yield from _resampler(f"up.{n}.grow", f"up_blocks.{i}.upsamplers.0", original, "conv", config)
            n += 1


def _middle(config: PixelUNetConfig, kept: Original) -> Iterator[Line]:
    yield from residual("middle.first", "mid_block.resnets.0", "middle_block.0")
    yield from residual("middle.second", "mid_block.resnets.1", f"middle_block.{2 if config.middle else 1}")
    if config.middle:
        yield from _attention("middle.layer", "mid_block.attentions.0", "middle_block.1", config.middle, kept)


def _stage(ours: str, diffusers: str, original: str, j: int, heads: int, kept: Original) -> Iterator[Line]:
    yield from residual(f"{ours}.residual", f"{diffusers}.resnets.{j}", f"{original}.0")
    if heads:
        yield from _attention(f"{ours}.layer", f"{diffusers}.attentions.{j}", f"{original}.1", heads, kept)


def _resampler(ours: str, diffusers: str, original: str, conv: str, config: PixelUNetConfig) -> Iterator[Line]:
    if config.resample == "block":
        yield from residual(ours, diffusers, original)
    else:
        yield line(ours=f"{ours}.conv", diffusers=f"{diffusers}.conv", original=f"{original}.{conv}")


def _attention(ours: str, diffusers: str, original: str, heads: int, kept: Original) -> Iterator[Line]:
    flat = {"long": [ORIGINAL]} if kept.axes == 1 else {"square": [ORIGINAL]}
    yield line(ours=f"{ours}.norm", diffusers=f"{diffusers}.group_norm", original=f"{original}.norm")
    yield line(
        ours=(f"{ours}.attention.q", f"{ours}.attention.kv"),
        diffusers=tuple(f"{diffusers}.to_{part}" for part in "qkv"),
        original=f"{original}.qkv",
        shares={OURS: (1, 2)},
        by_head=[ORIGINAL] if kept.by_head else (),
        heads=heads,
        **flat,  # type: ignore[arg-type]
    )
    theirs, origin = f"{diffusers}.to_out.0", f"{original}.proj_out"
    yield line(ours=f"{ours}.attention.out", diffusers=theirs, original=origin, **flat)  # type: ignore[arg-type]


# Shapes


@dataclass(frozen=True)
class Seen:
    """What the weights of a U-Net tell. attended: for each level whether it has attention; middle: the bottom."""

    channels: tuple[int, ...]
    blocks: int
    attended: tuple[bool, ...]
    middle: bool
    resamples: bool
    scales: bool
    frequencies: int
    classes: int
    in_channels: int
    out_channels: int
    axes: int

    def config(self, heads: "Heads", **known: object) -> PixelUNetConfig:
        """The shape. known: what weights do not tell, by the fields of `PixelUNetConfig`."""
        return PixelUNetConfig(
            in_channels=self.in_channels,
            out_channels=self.out_channels,
            channels=self.channels,
            blocks=self.blocks,
            heads=tuple(heads.of(w) if has else 0 for w, has in zip(self.channels, self.attended, strict=True)),
            middle=heads.of(self.channels[-1]) if self.middle else 0,
            modulation="scale" if self.scales else "add",
            resample="block" if self.resamples else "convolution",
            frequencies=0 if self.frequencies == self.channels[0] else self.frequencies,
            classes=self.classes,
            unlabelled=False,
            **known,  # type: ignore[arg-type]
        )


@dataclass(frozen=True)
class Heads:
    """How many heads a width has: so many, or of so many channels each; one if neither is said."""

    number: int = 1
    channels: int = 0

    def of(self, width: int) -> int:
        return max(1, width // self.channels) if self.channels else self.number


def seen_in(state: Mapping[str, Tensor], layout: str, where: str) -> Seen:
    """What the weights of diffusers' or the original layout tell."""
    try:
        return (_of_diffusers if layout == DIFFUSERS else _of_original)(state)
    except (KeyError, IndexError) as error:
        raise CheckpointError("a weight of the U-Net is missing", where=where, seen=str(error)) from None


def is_original(keys: Collection[str]) -> bool:
    """Whether a file is a U-Net of this kind, and not one of those that read words."""
    return {MARKS[ORIGINAL], "time_embed.0.weight", "out.2.weight"} <= set(keys) and not any(
        ".transformer_blocks." in key for key in keys
    )


def is_of_two_axes(shapes: Mapping[str, Sequence[int]]) -> bool:
    """Whether the attention of an original file is in convolutions of two axes, as consistency models have it."""
    return any(name.endswith(".qkv.weight") and len(shape) == 4 for name, shape in shapes.items())


def _of_diffusers(state: Mapping[str, Tensor]) -> Seen:
    levels = _count(state, "down_blocks.{}.resnets.0.conv1.weight")
    widths = tuple(len(state[f"down_blocks.{i}.resnets.0.conv1.weight"]) for i in range(levels))
    first = "down_blocks.0.resnets.0"
    attended = tuple(f"down_blocks.{i}.attentions.0.to_q.weight" in state for i in range(levels))
    return Seen(
        channels=widths,
        blocks=_count(state, "down_blocks.0.resnets.{}.conv1.weight"),
        attended=attended,
        middle="mid_block.attentions.0.to_q.weight" in state,
        resamples="down_blocks.0.downsamplers.0.conv1.weight" in state,
        scales=len(state[f"{first}.time_emb_proj.weight"]) == 2 * widths[0],
        frequencies=state["time_embedding.linear_1.weight"].shape[1],
        classes=len(state["class_embedding.weight"]) if "class_embedding.weight" in state else 0,
        in_channels=state["conv_in.weight"].shape[1],
        out_channels=len(state["conv_out.weight"]),
        axes=0,
    )


def _of_original(state: Mapping[str, Tensor]) -> Seen:
    steps = _steps(state)
    widths, attended, blocks, here = [], [], 0, 0
    for n, kind in enumerate(steps, 1):
        if kind != "stage":
            here = 0
            continue
        if here == 0:
            widths.append(len(state[f"input_blocks.{n}.0.in_layers.2.weight"]))
            attended.append(f"input_blocks.{n}.1.qkv.weight" in state)
        here += 1
        blocks = max(blocks, here)
    qkv = state.get("middle_block.1.qkv.weight")
    return Seen(
        channels=tuple(widths),
        blocks=blocks,
        attended=tuple(attended),
        middle=qkv is not None,
        resamples="block" in steps,
        scales=len(state["input_blocks.1.0.emb_layers.1.weight"]) == 2 * widths[0],
        frequencies=state["time_embed.0.weight"].shape[1],
        classes=len(state["label_emb.weight"]) if "label_emb.weight" in state else 0,
        in_channels=state["input_blocks.0.0.weight"].shape[1],
        out_channels=len(state["out.2.weight"]),
        axes=1 if qkv is None else qkv.ndim - 2,
    )


def _steps(state: Mapping[str, Tensor]) -> list[str]:
    """What each step of the original's way down is: a "stage", or the change of size by a "block" or a "convolution".

    A block that halves has the shape of a stage without attention. It is told by the way up, which has one stage more
    a level, and the step to the next size in the last of them.
    """
    total = _count(state, "input_blocks.{}.0.in_layers.2.weight", 1, "input_blocks.{}.0.op.weight") - 1
    ups = _count(state, "output_blocks.{}.0.in_layers.2.weight")
    grows = [n for n in range(ups) if _grows(state, n)]
    blocks = grows[0] if grows else ups - 1  # residual blocks a level: the first level on the way up has one more
    steps: list[str] = []
    while len(steps) < total:
        steps += ["stage"] * blocks
        if len(steps) < total:
            n = len(steps) + 1
            steps.append("convolution" if f"input_blocks.{n}.0.op.weight" in state else "block")
    return steps


def _grows(state: Mapping[str, Tensor], n: int) -> bool:
    """Whether a step of the original's way up doubles the size."""
    places = (f"output_blocks.{n}.{i}.{name}.weight" for i in (1, 2) for name in ("conv", "in_layers.2"))
    return any(place in state for place in places)


def _count(state: Mapping[str, Tensor], template: str, start: int = 0, other: str | None = None) -> int:
    """The first number from `start` on that no key has, in either template."""
    n = start
    while template.format(n) in state or (other is not None and other.format(n) in state):
        n += 1
    return n

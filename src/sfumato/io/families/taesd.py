"""Tiny autoencoders: diffusers' AutoencoderTiny, and the original's two files of numbered layers.

Both number the layers of each half in the order of running. The original's decoder counts the bend of the latents as
its layer 0, so its numbers are one higher. Layers without weights (rectifiers, doublings) have numbers too.
"""

from collections.abc import Iterable, Iterator, Mapping

from torch import Tensor

from sfumato.errors import CheckpointError
from sfumato.io.keymap import DIFFUSERS, ORIGINAL, OURS, Line, line, some
from sfumato.nets.tiny_autoencoder import TinyAutoencoderConfig

HALVES = ("encoder", "decoder")
INSIDE = {"first": "conv.0", "second": "conv.2", "third": "conv.4"}


def lines(config: TinyAutoencoderConfig) -> list[Line]:
    """Every module of a tiny autoencoder of this shape. The original's halves are told apart by `encoder.`, `decoder.`,
    which its files are read under.
    """
    return [*_half("encoder", config.encoder), *_half("decoder", config.decoder)]


def _half(half: str, counts: Iterable[int]) -> Iterator[Line]:
    decodes, number = half == "decoder", 0

    def at(ours: str, inside: str = "") -> Line:
        there = f"{number}{inside}"
        original = f"{number + decodes}{inside}"
        return line(ours=f"{half}.{ours}", diffusers=f"{half}.layers.{there}", original=f"{half}.{original}")

    yield at("entry")
    number += 2 if decodes else 1  # the decoder's rectifier
    for i, count in enumerate(counts):
        if i:
            if decodes:
                number += 1  # the doubling
            yield at(f"stages.{i}.resample{'.conv' if decodes else ''}")
            number += 1
        for j in range(count):
            for name, inside in INSIDE.items():
                yield at(f"stages.{i}.blocks.{j}.{name}", f".{inside}")
            number += 1
    yield at("exit")


def layout_of(keys: Iterable[str], where: str) -> str:
    """Which layout some keys are in. CheckpointError where they are of none."""
    known = set(keys)
    for layout, mark in ((OURS, "entry"), (DIFFUSERS, "layers.0"), (ORIGINAL, "0")):
        if f"encoder.{mark}.weight" in known:
            return layout
    fix = "a folder of diffusers, or of taesd_encoder and taesd_decoder"
    raise CheckpointError("this is no tiny autoencoder", where=where, seen=some(known), fix=fix)


def halves(state: Mapping[str, Tensor], half: str) -> dict[str, Tensor]:
    """The state of an original file of one half, under its name. What a whole file calls it already stays so."""
    return {key if key.startswith(HALVES) else f"{half}.{key}": value for key, value in state.items()}


def config_of(state: Mapping[str, Tensor], layout: str, where: str) -> TinyAutoencoderConfig:
    """The shape that the weights tell. CheckpointError where a weight is missing that would tell it."""
    try:
        if layout == OURS:
            entry, latent = "encoder.entry.weight", state["encoder.exit.weight"].shape[0]
            counts = [[_ours(state, half)] for half in HALVES]
            sizes = [tuple(one[0]) for one in counts]
        else:
            inside = "layers." if layout == DIFFUSERS else ""
            entry = f"encoder.{inside}0.weight"
            sizes = [_counted(state, f"{half}.{inside}") for half in HALVES]
            last = max(_numbers(state, f"encoder.{inside}"))
            latent = state[f"encoder.{inside}{last}.weight"].shape[0]
        width, colours = state[entry].shape[:2]
    except (KeyError, ValueError) as error:
        raise CheckpointError("a tiny autoencoder's weight is missing", where=where, seen=str(error)) from None
    return TinyAutoencoderConfig(int(colours), int(latent), int(width), sizes[0], sizes[1])


def _ours(state: Mapping[str, Tensor], half: str) -> list[int]:
    counts: list[int] = []
    while True:
        head = f"{half}.stages.{len(counts)}."
        if not any(key.startswith(head) for key in state):
            return counts
        counts.append(len({key.split(".")[4] for key in state if key.startswith(f"{head}blocks.")}))


def _numbers(state: Mapping[str, Tensor], head: str) -> set[int]:
    return {int(key.removeprefix(head).split(".")[0]) for key in state if key.startswith(head)}


def _counted(state: Mapping[str, Tensor], head: str) -> tuple[int, ...]:
    """Residual blocks at each size: what stands between two plain layers, which change it."""
    counts = [0]
    numbers = sorted(_numbers(state, head))
    for number in numbers[1:-1]:
        if f"{head}{number}.weight" in state:
            counts.append(0)
        else:
            counts[-1] += 1
    return tuple(counts)

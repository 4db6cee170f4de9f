"""Drawing scenes: things at whole pixels on a plain dark ground, with smooth edges, never touching.

Each shape's coverage of its pixels is computed once by sampling 16 x 16 points a pixel, so drawing an object is one
blend of a small rectangle.
"""

from dataclasses import replace
from functools import lru_cache
from random import Random

import numpy as np
from numpy.typing import NDArray

from sfumato.data.picture import Image
from sfumato.data.scenes.grammar import (
    COLOURS,
    HIDDEN_COLOURS,
    HIDDEN_SIZE,
    SIZES,
    Caption,
    Phrase,
    Thing,
    lies,
    pick,
)

RGB = {
    "red": (220, 40, 40),
    "green": (40, 175, 60),
    "blue": (45, 80, 235),
    "yellow": (245, 225, 50),
    "purple": (155, 50, 205),
    "orange": (245, 135, 25),
    "cyan": (50, 210, 225),
    "white": (245, 245, 245),
}
FINE = 16  # samples a pixel side


def extents(height: int, width: int) -> dict[str, int]:
    """How many pixels a small and a large object measure, in a picture of this size."""
    short = min(height, width)
    return {"small": round(0.22 * short), "large": round(0.34 * short)}


def coverage(shape: str, extent: float, canvas: int, cy: float, cx: float) -> NDArray[np.float32]:
    """How much of each pixel of a canvas a shape covers, 0 to 1: (canvas, canvas), its box centred at (cy, cx)."""
    places = (np.arange(canvas * FINE) + 0.5) / FINE
    y, x = (places[:, None] - cy) / extent, (places[None, :] - cx) / extent  # the box is -0.5 to 0.5
    inside = (np.abs(y) <= 0.5) & (np.abs(x) <= 0.5)
    if shape == "circle":
        inside = y**2 + x**2 <= 0.25
    elif shape == "triangle":
        inside &= np.abs(x) <= (y + 0.5) / 2
    elif shape == "cross":
        inside &= (np.abs(y) <= 1 / 6) | (np.abs(x) <= 1 / 6)
    share: NDArray[np.float32] = inside.reshape(canvas, FINE, canvas, FINE).mean((1, 3), dtype=np.float32)
    return share


@lru_cache(maxsize=256)
def _mask(shape: str, extent: int) -> NDArray[np.float32]:
    return coverage(shape, extent, extent, extent / 2, extent / 2)[:, :, None]


def painted(things: tuple[Thing, ...], height: int, width: int, background: int) -> Image:
    """The picture (H, W, 3) uint8."""
    image = np.full((height, width, 3), background, np.float32)
    for thing in things:
        extent = int(thing.extent)
        top, left = int(thing.cy - extent / 2), int(thing.cx - extent / 2)
        window = image[top : top + extent, left : left + extent]
        window += _mask(thing.shape, extent) * (np.array(RGB[thing.colour], np.float32) - window)
    return (image + 0.5).astype(np.uint8)


def arranged(rng: Random, caption: Caption, height: int, width: int) -> tuple[Thing, ...]:
    """Things that a caption describes, placed at random: apart from each other, inside, and as the relation says."""
    kinds = [_kind(rng, caption, phrase) for phrase in caption.phrases for _ in range(phrase.count)]
    measures = extents(height, width)
    for attempt in range(400):
        if attempt == 100:  # too tight: what has no stated size becomes small
            kinds = [(shape, colour, "small") for shape, colour, _ in kinds] if not _sized(caption) else kinds
        # In a long strip two things seldom lie side by side across it: look closer together.
        near = min(height, width) if attempt >= 200 and caption.relation else None
        things = _placed(rng, kinds, measures, height, width, near)
        if things is not None and (caption.relation is None or _clear(things, caption.relation)):
            return things
    raise AssertionError(f"no room for {caption.text!r} in {height}x{width}")


def _sized(caption: Caption) -> bool:
    return any(phrase.size for phrase in caption.phrases)


def _kind(rng: Random, caption: Caption, phrase: Phrase) -> tuple[str, str, str]:
    shape = phrase.shape
    colour = phrase.colour or pick(rng, COLOURS)
    while phrase.colour is None and (colour, shape) in HIDDEN_COLOURS:
        colour = pick(rng, COLOURS)
    size = phrase.size or pick(rng, SIZES)
    if caption.task == "single" and phrase.size is None and (size, shape) == HIDDEN_SIZE:
        size = "large"
    return shape, colour, size


def _placed(
    rng: Random,
    kinds: list[tuple[str, str, str]],
    measures: dict[str, int],
    height: int,
    width: int,
    near: int | None = None,
) -> tuple[Thing, ...] | None:
    """Things at random places, or None if there was no room. near: all within a square of this side."""
    if near:
        below, right = int(rng.random() * (height - near + 1)), int(rng.random() * (width - near + 1))
        inner = _placed(rng, kinds, measures, near, near) or ()
        moved = tuple(replace(thing, cy=thing.cy + below, cx=thing.cx + right) for thing in inner)
        return moved or None
    gap = max(2, min(height, width) // 16)
    things: list[Thing] = []
    for shape, colour, size in kinds:
        extent = measures[size]
        for _ in range(12):
            top = int(rng.random() * (height - extent + 1))
            left = int(rng.random() * (width - extent + 1))
            thing = Thing(shape, colour, size, top + extent / 2, left + extent / 2, extent)
            if all(_apart(thing, other, gap) for other in things):
                things.append(thing)
                break
        else:
            return None
    return tuple(things)


def _apart(a: Thing, b: Thing, gap: int) -> bool:
    reach = (a.extent + b.extent) / 2 + gap
    return abs(a.cy - b.cy) >= reach or abs(a.cx - b.cx) >= reach


def _clear(things: tuple[Thing, ...], relation: str) -> bool:
    """Nobody would doubt the relation: it holds, and by more than an object's extent along its axis."""
    a, b = things[:2]
    along = abs(b.cx - a.cx) if relation in ("left of", "right of") else abs(b.cy - a.cy)
    return lies(a, relation, b) and along >= (a.extent + b.extent) / 2

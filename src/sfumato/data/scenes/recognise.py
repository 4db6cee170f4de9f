"""Reading a scene back from its pixels: which things are in it, and where.

The ground is the median of what is dark; what stands out from it falls into connected components; each component's
colour is the median of its core, and its shape and size are those of the drawn template that explains its pixels best.
Pictures much larger than 32 px are averaged down first, which also removes noise. A component that resembles no
template, or no colour, is a thing that is "unknown", so that a malformed blob never passes.
"""

from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from sfumato.data.picture import Image
from sfumato.data.scenes.draw import RGB, coverage, extents
from sfumato.data.scenes.grammar import SHAPES, Thing
from sfumato.errors import DataError

Floats = NDArray[np.float32]
STANDS_OUT = 62.0  # Euclidean distance in RGB from the ground: less than half of the least vivid colour's
SPECK = 0.12  # of a small object's box: less is ignored
WORST = 0.30  # of a template's area: more unexplained coverage than this, and it is no shape
STRANGE = 85.0  # RGB distance beyond which a colour is none of the eight
_NAMES = tuple(RGB)
_PALETTE = np.array([RGB[name] for name in _NAMES], np.float32)


class Bank(NamedTuple):
    """Templates (N, canvas^2) with, for each: shape, size, extent, area, and its centroid's offset from its centre."""

    masks: Floats
    names: list[tuple[str, str, float]]
    areas: Floats
    offsets: Floats


def recognise(image: Image) -> list[Thing]:
    """The things in a picture (H, W, 3) uint8, in no particular order. Centres and extents are in its own pixels.

    DataError for anything else: pictures in [-1, 1] would silently hold nothing.
    """
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or min(image.shape[:2]) < 32:
        raise DataError(
            "recognise reads pictures (height, width, 3) of bytes, from 32 px on",
            where="recognise",
            seen=f"{image.dtype} {image.shape}",
        )
    height, width = image.shape[:2]
    factor = max(1, min(height, width) // 32)
    small = _averaged(image.astype(np.float32), factor)
    ground = _ground(small)
    distance = np.sqrt(((small - ground) ** 2).sum(2))
    measures = {name: extent / factor for name, extent in extents(height, width).items()}
    bank = _bank(measures["small"], measures["large"])
    found, labels = _components(distance > STANDS_OUT)
    things = []
    for label, pixels in enumerate(found, 1):
        if len(pixels) >= SPECK * measures["small"] ** 2:
            things.append(_judged(small, distance, labels, label, pixels, ground, bank, factor))
    return things


def _averaged(image: Floats, factor: int) -> Floats:
    if factor == 1:
        return image
    height, width = (side // factor * factor for side in image.shape[:2])
    blocks = image[:height, :width].reshape(height // factor, factor, width // factor, factor, 3)
    small: Floats = blocks.mean((1, 3))
    return small


def _ground(image: Floats) -> Floats:
    flat = image.reshape(-1, 3)
    dark = flat[flat.max(1) < 100]
    ground: Floats = np.median(dark, 0) if len(dark) > 0.05 * len(flat) else np.full(3, 40, np.float32)
    return ground


def _components(mask: NDArray[np.bool_]) -> tuple[list[list[int]], NDArray[np.int32]]:
    """The 8-connected components of a mask, as flat pixel numbers, and the map of their labels (0 is none)."""
    height, width = mask.shape
    stride = width + 2
    padded = np.zeros((height + 2, stride), bool)
    padded[1:-1, 1:-1] = mask
    free = set(np.flatnonzero(padded).tolist())
    steps = (1, -1, stride, -stride, stride + 1, stride - 1, 1 - stride, -1 - stride)
    found, labels = [], np.zeros(padded.size, np.int32)
    while free:
        reached = [free.pop()]
        for place in reached:  # grows while it is walked
            for step in steps:
                if place + step in free:
                    free.remove(place + step)
                    reached.append(place + step)
        found.append(reached)
        labels[reached] = len(found)
    return found, labels.reshape(height + 2, stride)[1:-1, 1:-1]


def _judged(
    image: Floats,
    distance: Floats,
    labels: NDArray[np.int32],
    label: int,
    pixels: list[int],
    ground: Floats,
    bank: Bank,
    factor: int,
) -> Thing:
    places = np.array(pixels)
    stride = image.shape[1] + 2
    rows, columns = places // stride - 1, places % stride - 1
    top, bottom, left, right = rows.min(), rows.max() + 1, columns.min(), columns.max() + 1
    colour, rgb = _colour(image[rows, columns], distance[rows, columns])
    centre = (top + bottom) / 2 * factor, (left + right) / 2 * factor
    extent = float(max(bottom - top, right - left))
    canvas = int(np.sqrt(bank.masks.shape[1]))
    if extent > canvas - 2:
        return Thing("unknown", colour, "unknown", *centre, extent * factor)
    corner = (top + bottom) // 2 - canvas // 2, (left + right) // 2 - canvas // 2
    cover = _cover(image, labels, label, ground, rgb, corner, canvas)
    unexplained = np.abs(bank.masks - cover.reshape(1, -1)).sum(1) / bank.areas
    best = int(unexplained.argmin())
    shape, size, fitted = bank.names[best]
    if unexplained[best] > WORST:
        return Thing("unknown", colour, "unknown", *centre, extent * factor)
    grid, total = np.arange(canvas) + 0.5, cover.sum()
    middle = (cover.sum(1) @ grid / total, cover.sum(0) @ grid / total) - bank.offsets[best]
    cy, cx = ((float(m) + float(c)) * factor for m, c in zip(middle, corner, strict=True))
    return Thing(shape, colour, size, cy, cx, fitted * factor)


def _colour(pixels: Floats, distance: Floats) -> tuple[str, Floats]:
    """The name of a component's colour, and the colour itself: the median of the third that stands out most."""
    core = pixels[distance >= np.quantile(distance, 0.67)]
    rgb: Floats = np.median(core, 0).astype(np.float32)
    apart = np.sqrt(((_PALETTE - rgb) ** 2).sum(1))
    best = int(apart.argmin())
    return (_NAMES[best] if apart[best] <= STRANGE else "unknown"), rgb


def _cover(
    image: Floats,
    labels: NDArray[np.int32],
    label: int,
    ground: Floats,
    rgb: Floats,
    corner: tuple[int, int],
    canvas: int,
) -> Floats:
    """How much of each pixel around a component it covers, (canvas, canvas), with every other thing left out."""
    cover = np.zeros((canvas + 2, canvas + 2), np.float32)
    own = np.zeros((canvas + 2, canvas + 2), bool)
    y0, x0 = corner[0] - 1, corner[1] - 1
    top, left = max(y0, 0), max(x0, 0)
    bottom, right = min(y0 + canvas + 2, image.shape[0]), min(x0 + canvas + 2, image.shape[1])
    inner = np.s_[top - y0 : bottom - y0, left - x0 : right - x0]
    toward = (rgb - ground) / max(float(((rgb - ground) ** 2).sum()), 1.0)
    cover[inner] = ((image[top:bottom, left:right] - ground) @ toward).clip(0, 1)
    own[inner] = labels[top:bottom, left:right] == label
    near = own.copy()
    near[1:] |= own[:-1]
    near[:-1] |= own[1:]
    wide = near.copy()
    wide[:, 1:] |= near[:, :-1]
    wide[:, :-1] |= near[:, 1:]
    kept: Floats = (cover * wide)[1:-1, 1:-1]
    return kept


@lru_cache(maxsize=32)
def _bank(small: float, large: float) -> Bank:
    """Every shape in both sizes, a little smaller and larger too, at half-pixel places around the canvas' middle."""
    canvas = int(np.ceil(large * 1.13)) + 4
    canvas += 1 - canvas % 2
    middle, masks, names, offsets = canvas // 2, [], [], []
    grid = np.arange(canvas) + 0.5
    for size, extent in (("small", small), ("large", large)):
        for stretch in (0.87, 1.0, 1.13):
            for shape in SHAPES:
                for dy in (-0.5, 0.0, 0.5):
                    for dx in (-0.5, 0.0, 0.5):
                        cy, cx = middle + 0.25 + dy, middle + 0.25 + dx
                        mask = coverage(shape, extent * stretch, canvas, cy, cx)
                        masks.append(mask.ravel())
                        names.append((shape, size, extent * stretch))
                        total = mask.sum()
                        offsets.append((mask.sum(1) @ grid / total - cy, mask.sum(0) @ grid / total - cx))
    stacked = np.stack(masks)
    return Bank(stacked, names, stacked.sum(1), np.array(offsets, np.float32))

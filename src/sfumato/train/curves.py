"""Curves as pictures, drawn with Pillow: a run need not bring a plotting library to show how it goes."""

import io
import math
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

from PIL import Image, ImageDraw, ImageFont

from sfumato import files

WIDTH, HEIGHT, SCALE = 720, 420, 2
LEFT, RIGHT, TOP, BOTTOM = 70, 20, 40, 46
PAPER, INK, GRID = (255, 255, 255), (50, 50, 50), (225, 225, 225)
COLOURS = (
    *((38, 90, 168), (208, 90, 40), (60, 140, 80), (140, 80, 160)),
    *((20, 20, 20), (0, 160, 190), (200, 150, 0), (220, 110, 160)),
)


class Curve(NamedTuple):
    """A named line through points; `faint` draws it pale, for raw values beneath a smooth one."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    faint: bool = False


def plot(path: Path, title: str, curves: Sequence[Curve], x_label: str, *, log_y: bool = False) -> None:
    """Draws curves with axes, ticks and a legend into a PNG.

    Points that are not finite, or not positive where the axis is logarithmic, are left out; without any there is none.
    """
    kept = [_finite(curve, log_y) for curve in curves]
    kept = [curve for curve in kept if curve.x]
    if not kept:
        return
    x_range = _range([x for curve in kept for x in curve.x], False)
    y_range = _range([y for curve in kept for y in curve.y], log_y)
    lines = [
        [(_across(x, x_range), _up(y, y_range, log_y)) for x, y in zip(curve.x, curve.y, strict=True)] for curve in kept
    ]
    font, names = ImageFont.load_default(size=12 * SCALE), [curve.name for curve in kept if not curve.faint]
    corner, spare = _place(font, names, lines)
    image = Image.new("RGB", (WIDTH * SCALE + spare, HEIGHT * SCALE), PAPER)
    draw = ImageDraw.Draw(image)
    _axes(draw, font, x_range, y_range, log_y, x_label)
    draw.text((LEFT * SCALE, 12 * SCALE), title, INK, ImageFont.load_default(size=15 * SCALE))
    for i, (curve, points) in enumerate(zip(kept, lines, strict=True)):
        colour = COLOURS[sum(not c.faint for c in kept[:i]) % len(COLOURS)]
        pale = tuple((c + 2 * 255) // 3 for c in colour)
        if len(points) > 1:
            draw.line(points, pale if curve.faint else colour, SCALE * (1 if curve.faint else 2), joint="curve")
        else:
            draw.circle(points[0], 3 * SCALE, colour)
    _legend(draw, font, names, corner)
    path.parent.mkdir(parents=True, exist_ok=True)
    data = io.BytesIO()
    image.resize((image.width // SCALE, HEIGHT), Image.Resampling.LANCZOS).save(data, "PNG")
    files.write_atomic(path, data.getvalue())


def smoothed(values: Sequence[float], window: int) -> list[float]:
    """Means over the last `window` values."""
    result, total = [], 0.0
    for i, value in enumerate(values):
        total += value - (values[i - window] if i >= window else 0.0)
        result.append(total / min(i + 1, window))
    return result


def _finite(curve: Curve, log_y: bool) -> Curve:
    points = [(x, y) for x, y in zip(curve.x, curve.y, strict=True) if math.isfinite(y) and (y > 0 or not log_y)]
    return curve._replace(x=[x for x, _ in points], y=[y for _, y in points])


def _range(values: Sequence[float], log: bool) -> tuple[float, float]:
    low, high = min(values), max(values)
    if log:
        return low / 1.1, high * 1.1
    spare = (high - low) * 0.04 or abs(high) * 0.1 or 1.0
    return low - spare * (low != 0), high + spare


def _across(x: float, bounds: tuple[float, float]) -> float:
    return SCALE * (LEFT + (x - bounds[0]) / (bounds[1] - bounds[0]) * (WIDTH - LEFT - RIGHT))


def _up(y: float, bounds: tuple[float, float], log: bool) -> float:
    if log:
        y, bounds = math.log(y), (math.log(bounds[0]), math.log(bounds[1]))
    return SCALE * (HEIGHT - BOTTOM - (y - bounds[0]) / (bounds[1] - bounds[0]) * (HEIGHT - TOP - BOTTOM))


def _axes(
    draw: ImageDraw.ImageDraw,
    font: ImageFont.FreeTypeFont | ImageFont.ImageFont,
    x_range: tuple[float, float],
    y_range: tuple[float, float],
    log_y: bool,
    x_label: str,
) -> None:
    for value in _ticks(*x_range, False):
        x = _across(value, x_range)
        draw.line((x, TOP * SCALE, x, (HEIGHT - BOTTOM) * SCALE), GRID, SCALE)
        draw.text((x, (HEIGHT - BOTTOM + 6) * SCALE), f"{value:,.6g}", INK, font, anchor="ma")
    for value in _ticks(*y_range, log_y):
        y = _up(value, y_range, log_y)
        draw.line((LEFT * SCALE, y, (WIDTH - RIGHT) * SCALE, y), GRID, SCALE)
        draw.text(((LEFT - 8) * SCALE, y), f"{value:.4g}", INK, font, anchor="rm")
    draw.rectangle(
        (LEFT * SCALE, TOP * SCALE, (WIDTH - RIGHT) * SCALE, (HEIGHT - BOTTOM) * SCALE), outline=INK, width=SCALE
    )
    draw.text(((WIDTH + LEFT) / 2 * SCALE, (HEIGHT - 8) * SCALE), x_label, INK, font, anchor="mb")


def _place(
    font: ImageFont.FreeTypeFont | ImageFont.ImageFont,
    names: Sequence[str],
    lines: Sequence[Sequence[tuple[float, float]]],
) -> tuple[tuple[float, float], int]:
    """Where the legend stands: in a corner that no curve crosses, or beside the plot; and the width that this takes.

    lines: the curves. All of it in pixels.
    """
    width = max((font.getlength(name) for name in names), default=0) + 44 * SCALE
    height = (18 * len(names) + 6) * SCALE
    left, right = (LEFT + 8) * SCALE, (WIDTH - RIGHT - 8) * SCALE - width
    top, bottom = (TOP + 6) * SCALE, (HEIGHT - BOTTOM - 6) * SCALE - height
    passed = [point for line in lines for point in _walked(line)]
    for x0, y0 in ((right, top), (left, top), (right, bottom), (left, bottom)):
        if not any(x0 <= x <= x0 + width and y0 <= y <= y0 + height for x, y in passed):
            return (x0, y0), 0
    return ((WIDTH - RIGHT + 8) * SCALE, top), math.ceil(width / SCALE) * SCALE


def _legend(
    draw: ImageDraw.ImageDraw,
    font: ImageFont.FreeTypeFont | ImageFont.ImageFont,
    names: Sequence[str],
    corner: tuple[float, float],
) -> None:
    """Names with their colours. corner: the upper left one, in pixels."""
    x0, y0 = corner
    for i, name in enumerate(names):
        y = y0 + (12 + 18 * i) * SCALE
        draw.line((x0 + 4 * SCALE, y, x0 + 29 * SCALE, y), COLOURS[i % len(COLOURS)], 3 * SCALE)
        draw.text((x0 + 36 * SCALE, y), name, INK, font, anchor="lm")


def _walked(line: Sequence[tuple[float, float]]) -> Iterator[tuple[float, float]]:
    """Points of a line, and some between them."""
    yield from line[:1]
    for (x0, y0), (x1, y1) in pairwise(line):
        yield from ((x0 + (x1 - x0) * part / 16, y0 + (y1 - y0) * part / 16) for part in range(1, 17))


def _ticks(low: float, high: float, log: bool) -> list[float]:
    """Round numbers within a range, about six of them."""
    if log:
        decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        found = [digit * 10.0**d for d in decades for digit in (1, 2, 5) if low <= digit * 10.0**d <= high]
        if len(found) >= 2:
            return found
    raw = (high - low) / 6
    unit = 10 ** math.floor(math.log10(raw))
    step = next(unit * digit for digit in (1, 2, 5, 10) if unit * digit >= raw)
    return [step * i for i in range(math.ceil(low / step), math.floor(high / step) + 1)]

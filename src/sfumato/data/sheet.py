"""Contact sheets: many pictures on one, with what is said of them underneath."""

from collections.abc import Sequence

import numpy as np
from PIL import Image as Pillow
from PIL import ImageDraw, ImageFont

from sfumato.data.picture import Image

PAPER, INK, MARGIN = (250, 250, 248), (40, 40, 40), 6
LINES = 4  # of a caption


def sheet(
    images: Sequence[Image],
    captions: Sequence[str] | None = None,
    *,
    columns: int | None = None,
    scale: int | None = None,
    frames: Sequence[tuple[int, int, int] | None] | None = None,
) -> Pillow.Image:
    """Pictures (H, W, 3) uint8 in rows. scale: each is magnified as often, by default until about 128 px.

    captions are wrapped below each; frames give some a coloured border.
    """
    height = max(image.shape[0] for image in images)
    width = max(image.shape[1] for image in images)
    scale = scale or max(1, round(128 / max(height, width)))
    columns = min(columns or _columns(len(images), width, height), len(images))
    font = ImageFont.load_default(size=11)
    texts = [_wrapped(text, font, width * scale) for text in captions or [""] * len(images)]
    line = 14
    below = line * max(len(text) for text in texts) + (4 if captions else 0)
    cell_w, cell_h = width * scale + 2 * MARGIN, height * scale + below + 2 * MARGIN
    rows = -(-len(images) // columns)
    paper = Pillow.new("RGB", (columns * cell_w, rows * cell_h), PAPER)
    draw = ImageDraw.Draw(paper)
    for i, image in enumerate(images):
        left, top = i % columns * cell_w + MARGIN, i // columns * cell_h + MARGIN
        big = Pillow.fromarray(np.ascontiguousarray(image)).resize(
            (image.shape[1] * scale, image.shape[0] * scale), Pillow.Resampling.NEAREST
        )
        if frames is not None and frames[i] is not None:
            draw.rectangle((left - 3, top - 3, left + big.width + 2, top + big.height + 2), fill=frames[i])
        paper.paste(big, (left, top))
        for row, text in enumerate(texts[i]):
            draw.text((left, top + height * scale + 4 + row * line), text, INK, font)
    return paper


def _columns(n: int, width: int, height: int) -> int:
    """As many that the sheet is a little wider than high."""
    return max(1, min(n, round((1.5 * n * height / width) ** 0.5)))


def _wrapped(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> list[str]:
    """At most LINES lines of this width; what does not fit is cut, and ends in three dots."""
    lines: list[str] = []
    for word in text.split():
        if lines and font.getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    kept = [_cut(one, font, width) for one in lines[:LINES]]
    if len(lines) > LINES:
        kept[-1] = _cut(f"{lines[LINES - 1]} {lines[LINES]}", font, width)
    return kept


def _cut(line: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> str:
    kept = line
    while kept and font.getlength(kept if kept == line else f"{kept}...") > width:
        kept = kept[:-1]
    return line if kept == line else f"{kept}..."

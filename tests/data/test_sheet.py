"""Contact sheets: every picture whole and at its place, captions below their own."""

import numpy as np
import pytest

from sfumato.data.sheet import INK, MARGIN, PAPER, sheet

GREEN = (60, 160, 80)


def pictures(n: int, height: int = 32, width: int = 32) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (height, width, 3), dtype=np.uint8) for _ in range(n)]


def found(paper: np.ndarray, image: np.ndarray, scale: int, left: int, top: int) -> bool:
    """Whether the magnified picture lies exactly there."""
    big = image.repeat(scale, 0).repeat(scale, 1)
    return np.array_equal(paper[top : top + big.shape[0], left : left + big.shape[1]], big)


@pytest.mark.parametrize(("height", "width", "scale"), [(32, 32, 4), (32, 32, 1), (8, 24, 3)])
def test_pictures_lie_in_rows(height: int, width: int, scale: int) -> None:
    images = pictures(5, height, width)
    paper = np.asarray(sheet(images, columns=3, scale=scale))
    cell_h, cell_w = height * scale + 2 * MARGIN, width * scale + 2 * MARGIN
    assert paper.shape == (2 * cell_h, 3 * cell_w, 3)
    for i, image in enumerate(images):
        assert found(paper, image, scale, i % 3 * cell_w + MARGIN, i // 3 * cell_h + MARGIN)
    assert (paper[cell_h:, 2 * cell_w :] == PAPER).all()  # the sixth is empty


@pytest.mark.parametrize(("side", "scale"), [(8, 16), (32, 4), (64, 2), (100, 1), (512, 1)])
def test_small_pictures_are_magnified(side: int, scale: int) -> None:
    paper = np.asarray(sheet(pictures(1, side, side)))
    assert paper.shape[:2] == (side * scale + 2 * MARGIN,) * 2


@pytest.mark.parametrize(
    ("n", "height", "width"), [(1, 32, 32), (24, 32, 32), (7, 96, 32), (100, 32, 96), (3, 512, 512)]
)
def test_a_sheet_is_a_little_wider_than_high(n: int, height: int, width: int) -> None:
    paper = np.asarray(sheet(pictures(n, height, width)))
    if n >= 24:
        assert 1 <= paper.shape[1] / paper.shape[0] < 2.5
    assert paper.shape[0] * paper.shape[1] >= n * height * width


def test_frames_are_drawn_around_those_that_have_one() -> None:
    images = pictures(2)
    paper = np.asarray(sheet(images, columns=2, scale=1, frames=[GREEN, None]))
    assert found(paper, images[0], 1, MARGIN, MARGIN)
    assert (paper[MARGIN - 3 : MARGIN, MARGIN : MARGIN + 32] == GREEN).all()
    assert (paper[: MARGIN - 3] == PAPER).all()
    assert (paper[:MARGIN, 32 + 2 * MARGIN :] == PAPER).all()


def below(caption: str, columns: int = 2) -> tuple[np.ndarray, np.ndarray]:
    """The places for the captions of a picture with one and of its neighbour without."""
    paper = np.asarray(sheet(pictures(2), [caption, ""], columns=columns, scale=3))
    text = paper[96 + MARGIN :]
    return text[:, : 96 + 2 * MARGIN], text[:, 96 + 2 * MARGIN :]


@pytest.mark.parametrize(
    "caption", ["a red circle", "word " * 40, "w" * 300, "short " + "w" * 100 + " short", "été 猫 ü " * 20]
)
def test_captions_stay_below_their_own_picture(caption: str) -> None:
    own, other = below(caption)
    dark = (own < 120).all(2)
    assert dark.any()
    assert (other == PAPER).all()
    assert not dark[:, :MARGIN].any() and not dark[:, -MARGIN:].any()
    assert tuple(own[dark].min(0)) >= INK


def test_long_captions_take_four_lines_and_end_in_dots() -> None:
    heights = [below(" ".join(["word"] * n))[0].shape[0] for n in (1, 3, 6, 9, 12, 100)]
    assert heights == sorted(heights) and heights[-1] == heights[-2]
    assert heights[-1] - heights[0] == 3 * 14
    four, more = below(" ".join(["word"] * 12))[0], below(" ".join(["word"] * 13))[0]
    assert not np.array_equal(four, more)  # what is cut is said to be
    assert np.array_equal(more, below(" ".join(["word"] * 40))[0])


def test_pictures_of_different_sizes_share_a_sheet() -> None:
    images = [*pictures(1, 16, 48), *pictures(1, 40, 20)]
    paper = np.asarray(sheet(images, columns=2, scale=1))
    assert paper.shape == (40 + 2 * MARGIN, 2 * (48 + 2 * MARGIN), 3)
    assert found(paper, images[0], 1, MARGIN, MARGIN)
    assert found(paper, images[1], 1, 48 + 3 * MARGIN, MARGIN)

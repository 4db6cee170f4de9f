"""The recogniser: exact on clean, noisy and blurred pictures, and not to be fooled by what is no scene."""

import numpy as np
import pytest
from numpy.typing import NDArray

from sfumato.data.scenes import COLOURS, RGB, SHAPES, Scene, Scenes, Thing, recognise
from sfumato.data.scenes.draw import extents

Image = NDArray[np.uint8]


def noisy(image: NDArray[np.float64] | Image, rng: np.random.Generator, std: float = 6.0) -> Image:
    return np.clip(np.rint(image + rng.normal(0, std, image.shape)), 0, 255).astype(np.uint8)


def blurred(image: Image) -> Image:
    """The mean of 3 x 3 pixels."""
    height, width = image.shape[:2]
    wide = np.pad(image.astype(float), ((1, 1), (1, 1), (0, 0)), "edge")
    return np.rint(sum(wide[y : y + height, x : x + width] for y in range(3) for x in range(3)) / 9).astype(np.uint8)


def exact(told: tuple[Thing, ...], read: list[Thing], within: float = 1.0) -> bool:
    """The same kinds, as often, at the same places."""
    left = list(read)
    for thing in told:
        kind = (thing.shape, thing.colour, thing.size)
        same = [
            t
            for t in left
            if (t.shape, t.colour, t.size) == kind and max(abs(t.cy - thing.cy), abs(t.cx - thing.cx)) <= within
        ]
        if not same:
            return False
        left.remove(same[0])
    return not left


def one(
    shape: str,
    colour: str = "red",
    size: str = "large",
    side: int = 64,
    at: tuple[float, float] | None = None,
) -> Thing:
    extent = extents(side, side)[size]
    cy, cx = at or (side // 2, side // 2)
    return Thing(shape, colour, size, cy + extent % 2 / 2, cx + extent % 2 / 2, extent)


def painted(*things: Thing, side: int = 64) -> Image:
    return Scene(things, side, side, background=40).paint()


@pytest.mark.parametrize("size", [32, 64, 128, (48, 80)])
def test_noisy_pictures_are_read_exactly(size: int | tuple[int, int]) -> None:
    data, rng, misses = Scenes(size=size, seed=8, rich=0.2), np.random.default_rng(0), 0
    for index in range(400):
        scene, _ = data.scene(index)
        misses += not exact(scene.things, recognise(noisy(scene.paint(), rng)))
    assert misses <= 1


@pytest.mark.parametrize("size", [32, 64, (95, 127)])
def test_clean_pictures_are_read_exactly(size: int | tuple[int, int]) -> None:
    data = Scenes(size=size, seed=9, rich=0.2)
    assert all(exact(scene.things, recognise(scene.paint())) for scene, _ in map(data.scene, range(200)))


def test_blurred_pictures_are_read() -> None:
    data = Scenes(size=64, seed=10)
    scenes = [data.scene(index)[0] for index in range(300)]
    assert sum(exact(scene.things, recognise(blurred(scene.paint()))) for scene in scenes) >= 0.98 * 300


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("colour", COLOURS)
def test_every_kind_is_read_in_both_sizes(shape: str, colour: str) -> None:
    for side in (32, 64):
        for size in ("small", "large"):
            thing = one(shape, colour, size, side)
            assert exact((thing,), recognise(painted(thing, side=side)), within=0.5)


@pytest.mark.parametrize("colour", COLOURS)
def test_a_colour_a_little_off_is_still_that_colour(colour: str) -> None:
    image = painted(one("square", colour)).astype(float)
    for shift in ((15, -15, 15), (-20, 0, 0), (0, 20, -10)):
        (thing,) = recognise(np.clip(image + shift, 0, 255).astype(np.uint8))
        assert (thing.shape, thing.colour) == ("square", colour)


def test_a_colour_of_none_of_the_eight_is_unknown() -> None:
    image = painted(one("circle", "white"))
    inside = image.min(2) > 200
    image[inside] = (128, 128, 128)
    assert [thing.colour for thing in recognise(image)] == ["unknown"]


def test_an_empty_picture_holds_nothing() -> None:
    rng = np.random.default_rng(1)
    for ground in (0, 40, 60):
        assert recognise(noisy(np.full((64, 64, 3), ground, np.uint8), rng)) == []


def test_specks_are_ignored() -> None:
    image = painted(one("circle"))
    image[2:4, 2:4] = RGB["white"]
    assert [thing.shape for thing in recognise(image)] == ["circle"]


def shapeless() -> dict[str, Image]:
    """Blobs that a network might draw, none of which is one of the four shapes."""
    square, circle = painted(one("square")), painted(one("circle"))
    half, bar, upside = circle.copy(), square.copy(), painted(one("triangle"))[::-1]
    half[32:], bar[28:] = 40, 40
    fused = np.maximum(circle, np.roll(circle, 18, axis=1))
    everything = np.full((64, 64, 3), 200, np.uint8)
    return {
        "half a circle": half,
        "a bar": bar,
        "two fused": fused,
        "upside down": upside,
        "a flood": everything,
    }


@pytest.mark.parametrize("name", shapeless())
def test_a_malformed_blob_is_of_no_shape(name: str) -> None:
    assert [thing.shape for thing in recognise(shapeless()[name])] == ["unknown"]


def test_noise_holds_no_scene() -> None:
    image = np.random.default_rng(2).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    assert all("unknown" in (thing.shape, thing.colour) for thing in recognise(image))


def test_neighbours_do_not_disturb_each_other() -> None:
    """The tightest packing that is drawn: two pixels apart, at 32 px."""
    things = [one("square", "white", "large", 32, at) for at in ((6, 6), (6, 19), (19, 6), (19, 19))]
    assert exact(tuple(things), recognise(painted(*things, side=32)))


def test_what_is_read_does_not_depend_on_where_it_is() -> None:
    thing = one("triangle", "green", "small")
    image = painted(thing)
    for dy, dx in ((-20, 3), (11, -17), (20, 20)):
        (read,) = recognise(np.roll(image, (dy, dx), axis=(0, 1)))
        assert (read.shape, read.colour, read.size) == ("triangle", "green", "small")
        assert max(abs(read.cy - thing.cy - dy), abs(read.cx - thing.cx - dx)) <= 0.5

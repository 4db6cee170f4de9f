"""Scenes at its limits: long strips, sentences that nearly mean something, and pictures of the wrong kind."""

import numpy as np
import pytest

from sfumato.data.scenes import Scenes, parse, recognise
from sfumato.errors import ConfigError, DataError


@pytest.mark.parametrize("size", [(512, 32), (32, 512)])
def test_relations_are_drawn_in_long_strips(size: tuple[int, int]) -> None:
    data = Scenes(size=size, tasks={"position": 1})
    for index in range(500):
        scene, caption = data.scene(index)
        assert caption.matches(scene.things)
        for thing in scene.things:
            assert 0 <= thing.cy - thing.extent / 2 <= size[0] - thing.extent
            assert 0 <= thing.cx - thing.extent / 2 <= size[1] - thing.extent


@pytest.mark.parametrize("text", ["two circles left of a square", "a circle above three squares"])
def test_a_relation_is_between_one_object_and_another(text: str) -> None:
    with pytest.raises(DataError, match="one object"):
        parse(text)


def test_rich_captions_do_not_speak_of_bindings_that_are_held_out() -> None:
    data = Scenes(seed=2, rich=1.0)
    for index in range(3000):
        _, caption = data.scene(index)
        if [phrase.count for phrase in caption.phrases] == [1, 1]:
            pair = " and ".join(
                f"a {phrase.colour} {phrase.shape}".replace("a o", "an o") for phrase in caption.phrases
            )
            assert not parse(pair).hidden


@pytest.mark.parametrize(
    "image",
    [
        np.zeros((32, 32, 3), np.float32),
        np.zeros((3, 32, 32), np.uint8),
        np.zeros((32, 32), np.uint8),
        np.zeros((64, 64, 4), np.uint8),
    ],
)
def test_only_pictures_of_bytes_are_read(image: np.ndarray) -> None:
    with pytest.raises(DataError):
        recognise(image)  # type: ignore[arg-type]


@pytest.mark.parametrize("options", [{"size": (32,)}, {"size": (32, 32, 3)}, {"tasks": {"single": -1, "two": 2}}])
def test_sizes_and_shares_of_the_wrong_kind_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        Scenes(**options)  # type: ignore[arg-type]

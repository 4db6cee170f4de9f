"""Scenes: the embedded data set. Captioned pictures of coloured shapes, as many as one likes, and an exact reader.

A picture is a pure function of (seed, split, index), so nothing is stored and nothing is downloaded; `recognise`
reads a picture back, so that "does it show what the prompt says" is a number. `prompts` gives what to ask, on
combinations that training shows and on such that it never does.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate
from random import Random
from typing import ClassVar, Literal

import numpy as np

from sfumato.data.picture import Fields, Image, Picture
from sfumato.data.scenes.draw import RGB, arranged, painted
from sfumato.data.scenes.grammar import (
    COLOURS,
    RELATIONS,
    SHAPES,
    SIZES,
    TASKS,
    VOCABULARY,
    WEIGHTS,
    Caption,
    Phrase,
    Thing,
    every_word,
    parse,
    prompts,
    spoken,
)
from sfumato.data.scenes.recognise import recognise
from sfumato.errors import ConfigError, nearest

# The colours of things in a layout, by their shape.
LAYOUTS: Mapping[str, Mapping[str, str]] = {
    "places": dict.fromkeys(SHAPES, "white"),
    "shapes": dict(zip(SHAPES, ("red", "green", "blue", "yellow"), strict=True)),
}

__all__ = [
    "COLOURS",
    "LAYOUTS",
    "RELATIONS",
    "RGB",
    "SHAPES",
    "SIZES",
    "TASKS",
    "VOCABULARY",
    "WEIGHTS",
    "Caption",
    "Phrase",
    "Scene",
    "Scenes",
    "Thing",
    "check_layout",
    "parse",
    "prompts",
    "recognise",
]


def check_layout(name: str, where: str) -> None:
    """ConfigError for a kind of layout that is neither one of `LAYOUTS` nor "none". where: it was asked for."""
    if name not in ("none", *LAYOUTS):
        raise ConfigError("no such layout", where=where, seen=name, fix=nearest(name, LAYOUTS))


@dataclass(frozen=True)
class Scene:
    """What a picture holds: things, its size, and the grey level of its ground."""

    things: tuple[Thing, ...]
    height: int
    width: int
    background: int

    def paint(self) -> Image:
        """The picture (H, W, 3) uint8."""
        return painted(self.things, self.height, self.width, self.background)

    def layout(self, kind: str) -> Image:
        """Where its things are, (H, W, 3) uint8 on black: "places" in white, "shapes" each kind in a colour."""
        things = tuple(replace(thing, colour=LAYOUTS[kind][thing.shape]) for thing in self.things)
        return painted(things, self.height, self.width, 0)


@dataclass(frozen=True)
class Scenes:
    """A data set of scenes.

    size: one side, or (height, width), 32 to 512 px. count: how many pictures; they are drawn when asked for.
    split: "train", or "validation" for other pictures of the same kind. tasks: how often each of the six tasks is
    spoken of, in any proportion. rich: the share of longer captions, of up to four fully described objects.
    A picture's label is the task that its caption is of.
    layout: also the field "layout", a picture of where the things are: "places", white on black, or "shapes", each kind
    of shape in a colour of its own, whatever its colour in the picture.
    """

    classes: ClassVar[tuple[str, ...]] = (*TASKS, "rich")

    size: int | tuple[int, int] = 32
    seed: int = 0
    count: int = 1_000_000
    split: str = "train"
    tasks: Mapping[str, float] | None = None
    rich: float = 0.0
    layout: Literal["none", "places", "shapes"] = "none"

    def __post_init__(self) -> None:
        sides = [self.size] if isinstance(self.size, int) else [*self.size]
        if len(sides) != (1 if isinstance(self.size, int) else 2) or not all(isinstance(side, int) for side in sides):
            raise ConfigError(
                "a size is one side, or height and width", where="data.size", seen=str(self.size), fix="data.size=64"
            )
        if not all(32 <= side <= 512 for side in self.shape):
            raise ConfigError(
                "scenes draws sides of 32 to 512 px", where="data.size", seen=str(self.size), fix="data.size=64"
            )
        if self.count < 1:
            raise ConfigError("a data set has at least one picture", where="data.count", seen=str(self.count))
        if self.split not in ("train", "validation"):
            raise ConfigError("no such split", where="data.split", seen=str(self.split), fix="data.split=validation")
        if not 0 <= self.rich <= 1:
            raise ConfigError(
                "a share lies between 0 and 1", where="data.rich", seen=str(self.rich), fix="data.rich=0.2"
            )
        check_layout(self.layout, "data.layout")
        for task in self.tasks or {}:
            if task not in TASKS:
                raise ConfigError("scenes has no such task", where="data.tasks", seen=task, fix=nearest(task, TASKS))
        if any(not share >= 0 for share in (self.tasks or {}).values()):
            raise ConfigError("a task's share is not negative", where="data.tasks", seen=str(dict(self.tasks or {})))
        if self.tasks is not None and not sum(self.tasks.values()) > 0:
            raise ConfigError("the tasks' shares add up to nothing", where="data.tasks", seen=str(dict(self.tasks)))

    @property
    def shape(self) -> tuple[int, int]:
        """Height and width."""
        return (self.size, self.size) if isinstance(self.size, int) else (self.size[0], self.size[1])

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Picture:
        scene, caption = self.scene(index)
        return Picture(scene.paint(), self._fields(scene, caption))

    def batch(self, indices: Sequence[int]) -> tuple[Image, list[Fields]]:
        """Images (B, H, W, 3) uint8 and their fields."""
        pictures = [self[int(index)] for index in indices]
        return np.stack([picture.image for picture in pictures]), [picture.fields for picture in pictures]

    def fields(self, indices: Sequence[int]) -> list[Fields]:
        """The fields of some pictures, which are not painted for it."""
        return [self._fields(*self.scene(int(index))) for index in indices]

    def _fields(self, scene: Scene, caption: Caption) -> Fields:
        layout = {} if self.layout == "none" else {"layout": scene.layout(self.layout)}
        return {"caption": caption.text, "label": caption.task, **layout}

    def identity(self) -> str:
        """What the pictures depend on, and some of them, in case they are painted in another way one day."""
        some = hashlib.sha256(b"".join(self[i].image.tobytes() for i in range(min(4, self.count)))).hexdigest()
        said = {name: value for name, value in vars(self).items() if name in self.__dataclass_fields__}
        del said["layout"]  # of the fields, not of the pictures
        return json.dumps({"kind": "scenes", **said, "some": some}, sort_keys=True)

    def captions(self) -> Iterator[str]:
        """The whole vocabulary."""
        return every_word()

    def scene(self, index: int) -> tuple[Scene, Caption]:
        """What picture `index` holds, and what is said of it. IndexError beyond the end."""
        if not -self.count <= index < self.count:
            raise IndexError(f"picture {index} of {self.count}")
        rng = Random((self.seed << 64) | ((self.split == "validation") << 63) | (index % self.count))
        caption = self._caption(rng)
        things = arranged(rng, caption, *self.shape)
        return Scene(things, *self.shape, background=24 + int(rng.random() * 33)), caption

    def _caption(self, rng: Random) -> Caption:
        task = "rich" if self.rich and rng.random() < self.rich else self._task(rng)
        while True:
            caption = spoken(rng, task)
            if not caption.hidden:
                return caption

    def _task(self, rng: Random) -> str:
        drawn = rng.random()
        return next((task for task, upto in self._upto if drawn < upto), self._upto[-1][0])

    @cached_property
    def _upto(self) -> list[tuple[str, float]]:
        weights = self.tasks if self.tasks is not None else WEIGHTS
        total = sum(weights.values())
        return list(zip(weights, (part / total for part in accumulate(weights.values())), strict=True))

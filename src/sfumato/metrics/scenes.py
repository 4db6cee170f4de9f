"""The scenes suite: draw what prompts say, read the pictures back, count.

A picture is a hit when the recogniser finds in it exactly what its prompt describes: every object, with its colour,
size and place where they are named, and nothing else. Six tasks, as in GenEval (Ghosh et al. 2023), each on
combinations that training showed and on such that it never did; the overall score is the unweighted mean of the tasks.
A model that is told the kind of scene alone is judged by whether its pictures hold what such scenes hold; of one that
is told nothing they show objects, and nothing that is none, which is its one task, "whole". A model that reads a layout
is given one with each prompt, and the objects that stand where it has them are counted besides.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Any, Literal

from sfumato.data.picture import Image
from sfumato.data.scenes import TASKS, VOCABULARY, Caption, Scene, Thing, check_layout, prompts, recognise
from sfumato.data.scenes.draw import arranged
from sfumato.data.sheet import sheet
from sfumato.errors import ConfigError, DataError
from sfumato.metrics.intervals import mean_of_shares, told_share
from sfumato.model import Model
from sfumato.pipeline import Pipeline

HIT, MISS = (60, 160, 80), (205, 60, 50)
FIX = "a model that was trained on scenes: sfumato train quickstart"
WHOLE = "whole"  # the task of a model that is asked for nothing
# How many things scenes of a kind hold, and of how many shapes if that is fixed.
KINDS: dict[str, tuple[range, int | None]] = {
    "single": (range(1, 2), None),
    "colours": (range(1, 2), None),
    "two": (range(2, 3), 2),
    "counting": (range(2, 5), 1),
    "position": (range(2, 3), 2),
    "binding": (range(2, 3), None),
    WHOLE: (range(1, 100), None),
}
NEAR = 2 / 32  # of a picture's shorter side: how far off a thing may stand and still be where it should

Layout = Literal["none", "places", "shapes"]


def stands(wanted: Thing, found: Thing, size: tuple[int, int]) -> bool:
    """Whether a thing of that shape was found at that place of a picture of (height, width)."""
    near = NEAR * min(size)
    there = abs(wanted.cy - found.cy) <= near and abs(wanted.cx - found.cx) <= near
    return there and wanted.shape == found.shape


@dataclass(frozen=True)
class Judged:
    """A picture, what it should show, whether it does, and whether its combination was held out of training.

    task: that it counts for. caption: None where no words were said. layout: what was shown; wanted, placed: the things
    of that, and how many of them stand there.
    """

    task: str
    caption: Caption | None
    image: Image
    hit: bool
    held_out: bool
    layout: Image | None = None
    wanted: int = 0
    placed: int = 0

    @property
    def said(self) -> str:
        """What a sheet says of it."""
        told = "" if self.task == WHOLE else self.task if self.caption is None else self.caption.text
        return told + (" (held out)" if self.held_out else "")


@dataclass(frozen=True)
class Report:
    """All that was judged, and how it was drawn."""

    judged: list[Judged]
    settings: dict[str, Any]
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        """Scores with 95% intervals, as plain data. placed: of the things of layouts, where there were any."""
        seen, hidden = ([one for one in self.judged if one.held_out is flag] for flag in (False, True))
        held_out = _scores(hidden) if hidden else {"overall": None, "tasks": {}}
        facts = {"images": len(self.judged), "seconds": round(self.seconds, 1), "settings": self.settings}
        wanted, placed = (sum(getattr(one, name) for one in seen) for name in ("wanted", "placed"))
        layout = {"placed": told_share(placed, wanted)} if wanted else {}
        return {"suite": "scenes", **_scores(seen), "held_out": held_out, **layout, **facts}

    def sheets(self, folder: Path, each: int = 8) -> list[Path]:
        """One contact sheet a task, hits framed in green and misses in red; the paths."""
        folder.mkdir(parents=True, exist_ok=True)
        paths = []
        for task in (*TASKS, WHOLE):
            mine = [one for one in self.judged if one.task == task]
            shown = [one for hit in (True, False) for one in [j for j in mine if j.hit is hit][:each]]
            if shown:
                frames = [HIT if one.hit else MISS for one in shown]
                paths.append(folder / f"{task}.png")
                sheet([one.image for one in shown], [one.said for one in shown], columns=each, frames=frames).save(
                    paths[-1]
                )
        return paths


@dataclass(frozen=True)
class Asked:
    """What a model is asked for: a task's caption, a kind of scene alone, or nothing; and a layout with its things."""

    task: str = WHOLE
    caption: Caption | None = None
    held_out: bool = False
    things: tuple[Thing, ...] = ()
    layout: Image | None = None

    def judge(self, image: Image) -> Judged:
        """A picture that was drawn for it."""
        found = recognise(image)
        hit = of_kind(self.task, found) if self.caption is None else self.caption.matches(found)
        placed = sum(any(stands(thing, there, image.shape[:2]) for there in found) for thing in self.things)
        return Judged(self.task, self.caption, image, hit, self.held_out, self.layout, len(self.things), placed)


def of_kind(task: str, things: Sequence[Thing]) -> bool:
    """Whether a scene of that kind may hold these things: all known, as many, and of like or unlike shapes."""
    counts, shapes = KINDS[task]
    kinds = len({thing.shape for thing in things})
    return all(thing.known for thing in things) and len(things) in counts and shapes in (None, kinds)


def evaluate(
    pipeline: Pipeline,
    *,
    per_task: int = 100,
    held_out: int = 50,
    seed: int = 0,
    batch: int = 100,
    layout: Layout | None = None,
    progress: Callable[[int, int], None] | None = None,
    **settings: Any,
) -> Report:
    """Judges a pipeline on `per_task` prompts of each task, and on `held_out` ones of held-out combinations.

    A model without words has no held-out ones. layout: how a model that reads one is shown where things are, as in
    `sfumato.data.scenes.Scenes`; "places", unless said, and "none" shows it nothing. settings: of `Pipeline.sample`.
    Raises DataError if the model does not know the words or the kinds, ConfigError for sizes that scenes are not drawn
    in, and for layouts that do not exist or that the model does not read.
    """
    model = pipeline.model
    if "caption" in _fields(model):
        check(model)
    else:
        _without_words(model)
    shown = _layout(model, layout)
    if per_task < 1 or held_out < 0:
        raise ConfigError(
            "at least one prompt a task is needed", where="per_task", seen=str(per_task), fix="--per-task 100"
        )
    started = time.perf_counter()
    asked = _questions(_fields(model), per_task, held_out, seed)
    seeds = [seed * 1_000_003 + i for i in range(len(asked))]
    if shown != "none":
        asked = [_arranged(one, each, model.size, shown) for one, each in zip(asked, seeds, strict=True)]
    said = [_said(model, one) for one in asked]
    drawn = pipeline.sample(said, seeds=seeds, batch=batch, progress=progress, **settings)
    judged = [one.judge(image) for one, image in zip(asked, drawn.images, strict=True)]
    once = ("prompt", "seed", "negative", "fields")
    used = {key: value for key, value in drawn.settings[0].items() if key not in once}
    counts = {"seed": seed, "per_task": per_task, "held_out": held_out} | ({} if shown == "none" else {"layout": shown})
    return Report(judged, used | counts, time.perf_counter() - started)


def _fields(model: Model) -> tuple[str, ...]:
    """What a model is told; nothing without a conditioner."""
    return () if model.conditioner is None else tuple(model.conditioner.fields)


def _questions(fields: Sequence[str], per_task: int, held_out: int, seed: int) -> list[Asked]:
    """What a model that is told these fields is asked, the held-out combinations last."""
    if "caption" not in fields:
        return [Asked(task if fields else WHOLE) for task in TASKS for _ in range(per_task)]
    seen = [Asked(task, c) for task in TASKS for c in prompts(task, per_task, seed=seed)]
    return seen + [Asked(task, c, True) for task in TASKS for c in prompts(task, held_out, held_out=True, seed=seed)]


def _layout(model: Model, layout: Layout | None) -> str:
    """How the model is shown where things are."""
    reads = "layout" in _fields(model)
    if layout is not None:
        check_layout(layout, "layout")
    if layout not in (None, "none") and not reads:
        raise ConfigError("this model reads no layout", where="layout", seen=str(layout), fix="leave it out")
    return layout or ("places" if reads else "none")


def _arranged(asked: Asked, seed: int, size: tuple[int, int], layout: str) -> Asked:
    """With things that its caption describes, somewhere, and a layout of them."""
    if asked.caption is None:
        return asked
    things = arranged(Random(seed), asked.caption, *size)
    return replace(asked, things=things, layout=Scene(things, *size, background=0).layout(layout))


def _said(model: Model, asked: Asked) -> Any:
    """A prompt, as the pipeline takes it."""
    if asked.caption is None:
        return None if asked.task == WHOLE else {"label": asked.task}
    said: dict[str, Any] = {"caption": asked.caption.text}
    if "label" in _fields(model):  # the kind of scene is a class
        said["label"] = asked.caption.task
    if asked.layout is not None:
        said["layout"] = asked.layout
    return said if len(said) > 1 else asked.caption.text


def _without_words(model: Model) -> None:
    """Raises DataError for a model that is told something else than the kind of scene."""
    _sized(model)
    if model.conditioner is None:
        return
    if _fields(model) != ("label",):
        what, seen = "scenes are asked for in words or by their kind", ", ".join(_fields(model))
        raise DataError(what, where="scenes", seen=seen, fix=FIX)
    try:
        model.conditioner.check([{"label": task} for task in TASKS])
    except DataError as error:
        what = "the classes of this model are not the kinds of scenes"
        raise DataError(what, where="scenes", seen=error.seen, fix=FIX) from None


def check(model: Model) -> None:
    """Raises DataError for a model that cannot be asked for scenes, ConfigError for one of another size than theirs."""
    if model.conditioner is None or "caption" not in model.conditioner.fields:
        seen = ", ".join(_fields(model)) or "no conditions"
        raise DataError("scenes are asked for in words, and this model takes none", where="scenes", seen=seen, fix=FIX)
    _sized(model)
    try:
        model.conditioner.check([{"caption": word} for word in VOCABULARY])
    except DataError as error:
        raise DataError(
            "this model does not know the words of scenes", where="scenes", seen=error.seen, fix=FIX
        ) from None


def _sized(model: Model) -> None:
    if not 32 <= min(model.size) <= max(model.size) <= 512:
        seen = f"{model.size[0]}x{model.size[1]}"
        raise ConfigError("scenes are 32 to 512 px wide and high", where="the model's size", seen=seen, fix=FIX)


def _scores(judged: Sequence[Judged]) -> dict[str, Any]:
    tasks, counts = {}, []
    for task in (*TASKS, WHOLE):
        mine = [one.hit for one in judged if one.task == task]
        if mine:
            tasks[task] = told_share(sum(mine), len(mine))
            counts.append((sum(mine), len(mine)))
    low, high = mean_of_shares(counts)
    overall = sum(hits / n for hits, n in counts) / len(counts)
    return {"overall": round(overall, 4), "low": round(low, 4), "high": round(high, 4), "tasks": tasks}

"""The scenes suite: draw what prompts say, read the pictures back, count.

A picture is a hit when the recogniser finds in it exactly what its prompt describes: every object, with its colour,
size and place where they are named, and nothing else. Six tasks, as in GenEval (Ghosh et al. 2023), each on
combinations that training showed and on such that it never did; the overall score is the unweighted mean of the tasks.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sfumato.data.picture import Image
from sfumato.data.scenes import TASKS, VOCABULARY, Caption, prompts, recognise
from sfumato.data.sheet import sheet
from sfumato.errors import ConfigError, DataError
from sfumato.metrics.intervals import mean_of_shares, wilson
from sfumato.model import Model
from sfumato.pipeline import Pipeline

HIT, MISS = (60, 160, 80), (205, 60, 50)


@dataclass(frozen=True)
class Judged:
    """A picture, what it should show, whether it does, and whether its combination was held out of training."""

    caption: Caption
    image: Image
    hit: bool
    held_out: bool


@dataclass(frozen=True)
class Report:
    """All that was judged, and how it was drawn."""

    judged: list[Judged]
    settings: dict[str, Any]
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        """Scores with 95% intervals, as plain data."""
        seen, hidden = ([one for one in self.judged if one.held_out is flag] for flag in (False, True))
        held_out = _scores(hidden) if hidden else {"overall": None, "tasks": {}}
        facts = {"images": len(self.judged), "seconds": round(self.seconds, 1), "settings": self.settings}
        return {"suite": "scenes", **_scores(seen), "held_out": held_out, **facts}

    def sheets(self, folder: Path, each: int = 8) -> list[Path]:
        """One contact sheet a task, hits framed in green and misses in red; the paths."""
        folder.mkdir(parents=True, exist_ok=True)
        paths = []
        for task in TASKS:
            mine = [one for one in self.judged if one.caption.task == task]
            shown = [one for hit in (True, False) for one in [j for j in mine if j.hit is hit][:each]]
            if shown:
                frames = [HIT if one.hit else MISS for one in shown]
                said = [one.caption.text + (" (held out)" if one.held_out else "") for one in shown]
                paths.append(folder / f"{task}.png")
                sheet([one.image for one in shown], said, columns=each, frames=frames).save(paths[-1])
        return paths


def evaluate(
    pipeline: Pipeline,
    *,
    per_task: int = 100,
    held_out: int = 50,
    seed: int = 0,
    batch: int = 100,
    progress: Callable[[int, int], None] | None = None,
    **settings: Any,
) -> Report:
    """Judges a pipeline on `per_task` prompts of each task, and on `held_out` ones of held-out combinations.

    settings: of `Pipeline.sample`. Raises DataError if the model does not know the words, ConfigError for sizes that
    scenes are not drawn in.
    """
    check(pipeline.model)
    if per_task < 1 or held_out < 0:
        raise ConfigError(
            "at least one prompt a task is needed", where="per_task", seen=str(per_task), fix="--per-task 100"
        )
    started = time.perf_counter()
    asked = [(c, False) for task in TASKS for c in prompts(task, per_task, seed=seed)]
    asked += [(c, True) for task in TASKS for c in prompts(task, held_out, held_out=True, seed=seed)]
    seeds = [seed * 1_000_003 + i for i in range(len(asked))]
    labelled = "label" in getattr(pipeline.model.conditioner, "fields", ())  # the kind of scene is a class
    said = [{"caption": c.text, "label": c.task} if labelled else c.text for c, _ in asked]
    drawn = pipeline.sample(said, seeds=seeds, batch=batch, progress=progress, **settings)
    judged = [
        Judged(caption, image, caption.matches(recognise(image)), hidden)
        for (caption, hidden), image in zip(asked, drawn.images, strict=True)
    ]
    once = ("prompt", "seed", "negative", "fields")
    used = {key: value for key, value in drawn.settings[0].items() if key not in once}
    counts = {"seed": seed, "per_task": per_task, "held_out": held_out}
    return Report(judged, used | counts, time.perf_counter() - started)


def check(model: Model) -> None:
    """Raises DataError for a model that cannot be asked for scenes, ConfigError for one of another size than theirs."""
    fix = "a model that was trained on scenes: sfumato train quickstart"
    if model.conditioner is None or "caption" not in model.conditioner.fields:
        seen = "no conditions" if model.conditioner is None else ", ".join(model.conditioner.fields)
        raise DataError("scenes are asked for in words, and this model takes none", where="scenes", seen=seen, fix=fix)
    if not 32 <= min(model.size) <= max(model.size) <= 512:
        seen = f"{model.size[0]}x{model.size[1]}"
        raise ConfigError("scenes are 32 to 512 px wide and high", where="the model's size", seen=seen, fix=fix)
    try:
        model.conditioner.check([{"caption": word} for word in VOCABULARY])
    except DataError as error:
        raise DataError(
            "this model does not know the words of scenes", where="scenes", seen=error.seen, fix=fix
        ) from None


def _scores(judged: Sequence[Judged]) -> dict[str, Any]:
    tasks, counts = {}, []
    for task in TASKS:
        mine = [one.hit for one in judged if one.caption.task == task]
        if mine:
            hits, n = sum(mine), len(mine)
            low, high = wilson(hits, n)
            tasks[task] = {"score": round(hits / n, 4), "low": round(low, 4), "high": round(high, 4), "n": n}
            counts.append((hits, n))
    low, high = mean_of_shares(counts)
    overall = sum(hits / n for hits, n in counts) / len(counts)
    return {"overall": round(overall, 4), "low": round(low, 4), "high": round(high, 4), "tasks": tasks}

"""How long a picture takes, of a teacher and of its students, measured side by side.

Every turn draws with all of them, one after the other, so that what else the machine does falls on all alike; a turn
before the first warms up. What counts are medians over the turns: milliseconds of one picture alone, and pictures a
second of a batch. On a shared CPU these vary by the hour, and their ratio to the teacher's of the same turns less.
"""

import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from sfumato import Pipeline

PROMPT = "a red circle left of a blue square"


class Line(NamedTuple):
    """Who draws, with how many steps of the settings that it recommends."""

    name: str
    pipeline: Pipeline
    steps: int


class Took(NamedTuple):
    """Medians: milliseconds of one picture alone, and pictures a second in a batch."""

    ms: float
    per_second: float

    def as_dict(self) -> dict[str, float]:
        """Plain data."""
        return {"ms": round(self.ms, 2), "images_per_second": round(self.per_second, 2)}


def side_by_side(lines: Sequence[Line], batch: int, turns: int) -> list[Took]:
    """What every line took, measured in turns."""
    alone, together = [list[float]() for _ in lines], [list[float]() for _ in lines]
    for turn in range(turns + 1):
        for i, line in enumerate(lines):
            one, many = _seconds(line, 1), _seconds(line, batch)
            if turn:
                alone[i].append(one)
                together[i].append(many)
    return [
        Took(1000 * statistics.median(one), batch / statistics.median(many))
        for one, many in zip(alone, together, strict=True)
    ]


def speeds(
    teacher: Pipeline,
    students: Mapping[str, Pipeline],
    *,
    whole: int,
    calls: Sequence[int],
    batch: int,
    turns: int,
    facts: Mapping[str, Any],
) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """What is kept of the teacher's speed at `whole` steps, and of each student's by steps: with the teacher's beside
    it, and how many times as fast it is, for one picture and for a batch. facts: machine, threads and precision.
    """
    lines = [Line("", teacher, whole)]
    lines += [Line(name, pipeline, steps) for name, pipeline in students.items() for steps in calls]
    first, *rest = side_by_side(lines, batch, turns)
    how = {"batch": batch, "turns": turns, **facts}
    of_teacher = {"steps": whole, **first.as_dict()}
    rows: dict[str, dict[str, Any]] = {name: {**how, "teacher": of_teacher} for name in students}
    for line, took in zip(lines[1:], rest, strict=True):
        faster = {
            "times_teacher": round(first.ms / took.ms, 2),
            "times_teacher_in_batch": round(took.per_second / first.per_second, 2),
        }
        rows[line.name][str(line.steps)] = took.as_dict() | faster
    return {**how, **of_teacher}, rows


def _seconds(line: Line, n: int) -> float:
    """The time that n pictures take, in one batch; they are bytes in main memory in the end, so nothing is pending."""
    asked: list[Any] = [PROMPT if _reads_words(line.pipeline) else None] * n
    begun = time.perf_counter()
    line.pipeline.sample(asked, seeds=0, steps=line.steps, batch=n)
    return time.perf_counter() - begun


def _reads_words(pipeline: Pipeline) -> bool:
    conditioner = pipeline.model.conditioner
    return conditioner is not None and "caption" in conditioner.fields

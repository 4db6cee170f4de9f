"""What a student keeps: calls as they are made, shares with their intervals, and pictures by their energy score."""

from pathlib import Path
from typing import Any

import pytest

from sfumato.metrics import kept
from sfumato.metrics.kept import kept_of_pictures, kept_of_scenes
from sfumato.pipeline import Pipeline, load


@pytest.fixture(scope="module")
def tiny(tiny_run: Path) -> Pipeline:
    return load(tiny_run, "cpu")


class Judged:
    """A report with known scores: 0.8 for a teacher's steps, 0.6 in 4 and less in fewer."""

    def __init__(self, steps: int | None) -> None:
        self.steps = steps

    def as_dict(self) -> dict[str, Any]:
        score = {None: 0.8, 16: 0.72, 4: 0.6, 2: 0.4, 1: 0.0}[self.steps]
        low, high = max(0.0, score - 0.05), score + 0.05
        settings = {"steps": self.steps or 16}
        return {"images": 120, "overall": score, "low": low, "high": high, "settings": settings}


def test_shares_are_told_in_a_sentence(tiny: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def evaluate(pipeline: Pipeline, **options: Any) -> Judged:
        asked.append((options["steps"], options["per_task"], options["held_out"], options["seed"]))
        pipeline.sample("a red circle", steps=options["steps"])
        return Judged(options["steps"])

    monkeypatch.setattr(kept, "evaluate", evaluate)
    found = kept_of_scenes(tiny, tiny, 20)
    assert asked == [(steps, 20, 0, kept.SEED) for steps in (None, 16, 1, 2, 4)]  # what it recommends first
    shares = [way.kept for way in found.student]
    assert shares == pytest.approx([0.9, 0.0, 0.5, 0.75])
    assert (
        found.lines()[3].startswith("keeps 75% of its teacher in ")
        and "(0.60 of 0.80, 95%: 67 to 83%)" in found.lines()[3]
    )
    assert found.student[1].kept_low == 0 and found.as_dict()["student"][0]["score"] == 0.72


def test_a_teacher_that_draws_nothing_right_has_no_share(tiny: Pipeline) -> None:
    found = kept_of_scenes(tiny, tiny, 1, few=(2,))
    assert [way.calls for way in (found.teacher, *found.student)] == [32, 32, 4]  # guided: two calls a step
    assert all(
        "too few pictures to say" in line
        for line, way in zip(found.lines(), found.student, strict=True)
        if way.kept is None
    )
    assert found.teacher.score == found.student[0].score  # the same model, prompts and noise


def test_pictures_are_compared_by_their_energy(tiny: Pipeline) -> None:
    raw = [{"caption": "a red circle"}, {"caption": "a blue square"}, {"caption": "two green circles"}]
    found = kept_of_pictures(tiny, tiny, raw, few=(2,))
    own, few = found.student
    assert (own.steps, own.calls, few.steps, few.calls) == (16, 32, 2, 4)
    assert own.score == found.teacher.score == own.equal and few.equal == few.score  # which is itself
    assert few.score != own.score and own.low < own.score < own.high
    assert "in 4 calls" in found.lines()[1] and "itself" in found.lines()[1] and "in as many calls" in found.lines()[1]


@pytest.mark.parametrize(
    ("calls", "settings"), [(8, {"steps": 4}), (1, {"steps": 1, "guidance": 1.0}), (3, {"steps": 1})]
)
def test_equal_calls_of_a_guided_teacher(calls: float, settings: dict[str, Any]) -> None:
    assert kept._equal(kept.Way(16, 32.0, 0.5, 0.4, 0.6), calls) == settings

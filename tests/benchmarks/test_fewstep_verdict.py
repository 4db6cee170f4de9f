"""When a student counts, by hand; and that rows of earlier results stay valid."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from students import telling
from students.verdict import above, calls_of, verdicts

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"


def score(overall: float, reach: float) -> dict[str, float]:
    return {"overall": overall, "low": overall - reach, "high": overall + reach}


def student(calls: str, seen: dict[str, float], hidden: dict[str, float] | None) -> dict[str, Any]:
    row = {calls: seen["overall"], f"{calls} interval": [seen["low"], seen["high"]]}
    return row | ({} if hidden is None else {f"{calls} held out": hidden})


def teacher(seen: dict[str, float], hidden: dict[str, float] | None) -> dict[str, Any]:
    return {"score": 0.8, "steps": 50, "equal": {"4": seen | ({} if hidden is None else {"held out": hidden})}}


def counts(seen: float, hidden: float) -> Any:
    """Of a student of these scores and reach 0.03 and 0.04, beside a teacher of 0.5 and 0.4 and reach 0.04 and 0.03:
    both differences have a reach of 0.05.
    """
    row = student("4", score(seen, 0.03), score(hidden, 0.04))
    found = {"teacher": teacher(score(0.5, 0.04), score(0.4, 0.03)), "students": {"one": row}}
    verdicts(found)
    return row["counts"]["4"]


@pytest.mark.parametrize(
    ("seen", "hidden", "counted"),
    [(0.56, 0.46, True), (0.54, 0.46, False), (0.56, 0.44, False), (0.54, 0.44, False), (0.4, 0.3, False)],
)
def test_both_must_be_above_by_more_than_the_interval(seen: float, hidden: float, counted: bool) -> None:
    assert counts(seen, hidden) is counted


def test_a_difference_lies_in_the_middle_of_its_interval_where_those_of_scores_are_even() -> None:
    row = student("4", score(0.7, 0.03), score(0.5, 0.06))
    found = above(row, teacher(score(0.5, 0.04), score(0.4, 0.08)), "4")
    assert found["overall"] == pytest.approx([0.2, 0.15, 0.25])
    assert found["held out"] == pytest.approx([0.1, 0.0, 0.2])


def test_beside_a_teacher_of_nothing_its_upper_end_counts() -> None:
    """An interval that is cut off at 0 has its whole reach above the score: 0.04, with the student's 0.03 0.05."""
    nothing = {"overall": 0.0, "low": 0.0, "high": 0.04}
    row = student("4", score(0.05, 0.03), None)
    assert above(row, teacher(nothing, None), "4")["overall"][1] == pytest.approx(0.0, abs=1e-9)


def test_what_was_not_judged_has_no_verdict() -> None:
    full = score(0.9, 0.01)
    rows = {
        "of no held-out ones": student("4", full, None),
        "at other calls": student("16", full, full),
        "of another metric": student("4", full, full) | {"metric": "whole"},
        "timed alone": {"speed": {"4": {"ms": 1.0}}},
    }
    found = {"teacher": teacher(score(0.5, 0.01), score(0.4, 0.01)), "students": rows}
    verdicts(found)
    assert all(row["counts"] == {} for row in rows.values())
    assert [*rows["of no held-out ones"]["above"]["4"]] == ["overall"]
    assert all(row["above"] == {} for name, row in rows.items() if name != "of no held-out ones")
    del found["teacher"]
    verdicts(found)
    assert all(row["above"] == {} for row in rows.values())
    assert telling.summary(found) and telling.table(found)


@pytest.mark.parametrize("file", sorted(RESULTS.glob("fewstep-*.json")), ids=lambda path: path.stem)
def test_results_of_before_are_still_read(file: Path) -> None:
    """Their scores stay, and are all in the summary and in the table."""
    before = json.loads(file.read_text(encoding="utf-8"))
    found = copy.deepcopy(before)
    verdicts(found)
    for name, row in before["students"].items():
        after = found["students"][name]
        assert all(after[key] == value for key, value in row.items() if key not in ("above", "counts"))
        lines = [line for line in telling.summary(found).splitlines() if line.startswith(f"{name:28} ")]
        assert len(lines) == len(calls_of(row)) > 0
    assert all(f"| `{name}` |" in telling.table(found) for name in before["students"])


WHOLE: dict[str, Any] = {
    "teacher": {
        **{"steps": 50, "score": 0.85, "low": 0.8, "high": 0.9, "held out": score(0.7, 0.04)},
        "equal": {"1": score(0.0, 0.01) | {"held out": score(0.0, 0.01)}, "4": score(0.47, 0.04)},
        "speed": {"steps": 50, "ms": 812.4, "images_per_second": 2.0},
    },
    "students": {
        "lcm": {
            **{"1": 0.34, "1 interval": [0.3, 0.38], "1 held out": score(0.25, 0.04), "4": 0.68},
            **{"4 interval": [0.64, 0.72], "8": 0.7, "8 interval": [0.66, 0.74]},
            **{"seconds": 1354.0, "images": 48000, "method": "latent_consistency"},
            "speed": {"batch": 32, "1": {"ms": 8.04}, "4": {"ms": 30.96}},
        },
        "add": {"4": 0.7, "4 interval": [0.66, 0.74]},
        "ot": {"4": 0.9, "4 interval": [0.86, 0.94], "metric": "whole", "seconds": None},
    },
}

TABLE = """\
Scores by calls of the network, and after the stroke of combinations held out of training. Bold: counts.
The teacher at 50 steps: 0.85 / 0.70, 812 ms a picture.

| recipe | 1 | 4 | 8 | minutes | pictures | ms a picture |
|---|---|---|---|---|---|---|
| the teacher, by the best way found | 0.00 / 0.00 | 0.47 |  |  |  |  |
| `ot` |  | 0.90 (whole) |  |  |  |  |
| `add` |  | 0.70 |  |  |  |  |
| `lcm` | **0.34** / 0.25 | 0.68 | 0.70 | 22.6 | 48,000 | 8.0 / 31.0 |"""


def test_the_table_in_full() -> None:
    found = copy.deepcopy(WHOLE)
    verdicts(found)
    assert telling.table(found) == TABLE
    assert [line for line in telling.table(found, ["add"]).splitlines() if "`" in line] == ["| `add` | 0.70 |  |  |  |"]


def test_the_summary_says_how_far_above_and_whether_it_counts() -> None:
    found = copy.deepcopy(WHOLE)
    verdicts(found)
    lines = telling.summary(found).splitlines()
    said = "lcm 1: 0.34 (40%); overall +0.34 (+0.30 to +0.38); held out +0.25 (+0.21 to +0.29); counts"
    assert len(lines) == 5 and lines[0].split() == said.split()
    assert lines[1].endswith("overall +0.21 (+0.15 to +0.27)") and lines[2].endswith("8: 0.70 (82%)")


def test_recipes_are_told_of_students_alone() -> None:
    row = {
        **{"1": 0.3, "2": 0.5, "4": 0.7, "8": 0.8, "4 interval": [0.66, 0.74], "4 held out": score(0.6, 0.04)},
        **{"seconds": 60.0, "images": None, "trained_on": None, "method": "latent_consistency"},
    }
    assert telling.measured(row) == {
        **{"score": 0.7, "steps": {"1": 0.3, "2": 0.5, "4": 0.7}, "low": 0.66, "high": 0.74},
        **{"held_out": 0.6, "seconds": 60.0},
    }
    for_one = telling.measured(row | {"recommended": 1, "1 interval": [0.26, 0.34], "1 held out": score(0.2, 0.04)})
    assert for_one is not None and [for_one[name] for name in ("score", "high", "held_out")] == [0.3, 0.34, 0.2]
    assert telling.measured(row | {"recommended": 8}) == telling.measured(row)
    assert telling.measured(row | {"method": None}) is None
    assert telling.measured({name: value for name, value in row.items() if name != "2"}) is None


def test_curves_are_drawn_of_what_there_is(tmp_path: Path) -> None:
    telling.drawn(tmp_path / "curves.png", WHOLE)
    telling.drawn(tmp_path / "alone.png", {"students": WHOLE["students"]})
    assert (tmp_path / "curves.png").is_file() and (tmp_path / "alone.png").is_file()

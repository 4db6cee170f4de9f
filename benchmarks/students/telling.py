"""What is made of the results: a summary, a table for the guide, an entry for `sfumato recipes`, pictures."""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sfumato import Pipeline
from sfumato.data.sheet import sheet
from sfumato.train.curves import Curve, plot
from students.verdict import calls_of

MEASURED = ("1", "2", "4")  # calls that `sfumato recipes` tells of
SHOWN = (
    "a large red circle",
    "a blue square and a yellow triangle",
    "three green circles",
    "a red circle left of a blue square",
)


def told(text: str) -> None:
    """A line for those who wait."""
    print(text, file=sys.stderr, flush=True)


def summary(found: Mapping[str, Any]) -> str:
    """Each student at each number of calls: its score, as a share of the teacher's at 50 steps too; how far above the
    teacher's at as many calls, with the interval of that, on prompts and on held-out combinations; whether it counts.
    """
    whole, lines = found.get("teacher", {}).get("score"), list[str]()
    for name, row in found["students"].items():
        for calls in calls_of(row):
            share = f" ({row[calls] / whole:.0%})" if whole and "metric" not in row else ""
            parts = [f"{name:28} {calls:>2}: {row[calls]:.2f}{share}"]
            for kind, (more, low, high) in row.get("above", {}).get(calls, {}).items():
                parts.append(f"{kind} {more:+.2f} ({low:+.2f} to {high:+.2f})")
            verdict = row.get("counts", {}).get(calls)
            parts += [] if verdict is None else ["counts" if verdict else "does not count"]
            lines.append("; ".join(parts))
    return "\n".join(lines)


def table(found: Mapping[str, Any], names: Sequence[str] = ()) -> str:
    """Markdown: methods by calls, with what their teaching took and how long a picture takes. names: of the students,
    all unless said.
    """
    students = {name: row for name, row in found["students"].items() if not names or name in names}
    columns = sorted({calls for row in students.values() for calls in calls_of(row)}, key=int)
    ranked = sorted(students, key=lambda name: -students[name].get("4", -1.0))
    lines = [
        "| recipe | " + " | ".join(columns) + " | minutes | pictures | ms a picture |",
        "|---" * (4 + len(columns)) + "|",
    ]
    if equal := found.get("teacher", {}).get("equal"):
        scores = [_cell(equal[calls]) if calls in equal else "" for calls in columns]
        lines.append(_line(["the teacher, by the best way found", *scores, "", "", ""]))
    for name in ranked:
        lines.append(
            _line([f"`{name}`", *(_of_student(students[name], calls) for calls in columns), *_took(students[name])])
        )
    return "\n".join([*_legend(found), "", *lines])


def _legend(found: Mapping[str, Any]) -> list[str]:
    """What the table's cells mean, and the teacher that is not hurried."""
    lines = ["Scores by calls of the network, and after the stroke of combinations held out of training. Bold: counts."]
    if teacher := found.get("teacher"):
        score = _cell({"overall": teacher["score"]} | {key: teacher[key] for key in ("held out",) if key in teacher})
        ms = f", {teacher['speed']['ms']:.0f} ms a picture" if "speed" in teacher else ""
        lines.append(f"The teacher at {teacher['steps']} steps: {score}{ms}.")
    return lines


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _cell(score: Mapping[str, Any], bold: bool = False) -> str:
    """A score, and that of held-out combinations after a stroke."""
    first = f"**{score['overall']:.2f}**" if bold else f"{score['overall']:.2f}"
    return f"{first} / {score['held out']['overall']:.2f}" if "held out" in score else first


def _of_student(row: Mapping[str, Any], calls: str) -> str:
    """Its cell at so many calls; empty where it was not judged."""
    if calls not in row:
        return ""
    score = {"overall": row[calls]} | ({"held out": row[f"{calls} held out"]} if f"{calls} held out" in row else {})
    return _cell(score, row.get("counts", {}).get(calls, False)) + (f" ({row['metric']})" if "metric" in row else "")


def _took(row: Mapping[str, Any]) -> list[str]:
    """Minutes and pictures of the teaching, and milliseconds of a picture at each number of calls."""
    minutes = "" if row.get("seconds") is None else f"{row['seconds'] / 60:.1f}"
    images = "" if row.get("images") is None else f"{row['images']:,}"
    speed = row.get("speed", {})
    return [minutes, images, " / ".join(f"{speed[calls]['ms']:.1f}" for calls in calls_of(speed))]


def measured(row: Mapping[str, Any]) -> dict[str, Any] | None:
    """A student's row as `sfumato recipes` tells of it, its score that of the steps it recommends, or of 4; None of
    no student, and of one not judged at those calls.
    """
    if row.get("method") is None or "metric" in row or any(calls not in row for calls in MEASURED):
        return None
    own = str(row.get("recommended", 4))
    own = own if own in MEASURED else "4"
    low, high = row[f"{own} interval"]
    entry = {"score": row[own], "steps": {calls: row[calls] for calls in MEASURED}, "low": low, "high": high}
    hidden, on = row.get(f"{own} held out", {}).get("overall"), row["trained_on"]
    of_machine = {**on["machine"], "threads": on["threads"]} if isinstance(on, dict) else on
    found = {"held_out": hidden, "seconds": row["seconds"], "images": row["images"], "machine": of_machine}
    return entry | {name: value for name, value in found.items() if value is not None}


def drawn(path: Path, found: Mapping[str, Any]) -> None:
    """Score against calls, a curve a method, and the teacher's."""
    equal = found.get("teacher", {}).get("equal", {})
    curves = [Curve("teacher", [float(calls) for calls in equal], [one["overall"] for one in equal.values()])]
    for name, row in found["students"].items():
        calls = calls_of(row)
        curves.append(Curve(name, [float(n) for n in calls], [row[n] for n in calls]))
    plot(path, "scene score", curves, "calls of the network")


def shown(path: Path, lines: Sequence[tuple[str, Pipeline, int]], prompts: Sequence[str]) -> None:
    """A sheet, a row of pictures for each line, of what is said of it, who draws and in how many steps. Those that read
    no words are named and left out.
    """
    images, said = [], []
    for name, pipeline, steps in lines:
        conditioner = pipeline.model.conditioner
        if conditioner is None or "caption" not in conditioner.fields:
            told(f"{name}: reads no words, and is not on the sheet")
            continue
        images += list(pipeline.sample(list(prompts), seeds=3, steps=steps).images)
        said += [f"{name}: {prompt}" for prompt in prompts]
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet(images, said, columns=len(prompts) * (1 if len(prompts) > 4 else 2)).save(path)

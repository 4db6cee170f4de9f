"""Students against their teacher, on scenes: score at 1, 2 and 4 calls of the network, and what the teaching took.

    python benchmarks/fewstep.py --train --json
    python benchmarks/fewstep.py lcm runs/my-dmd2 --calls 1,2,4,8 --device cuda --measured
    python benchmarks/fewstep.py lcm --no-judge --speed
    python benchmarks/fewstep.py --table

The teacher is judged at 50 steps under its guidance, and at 1, 2, 4 and 8 calls by the best that is found for it: among
samplers, grids, a sampler tuned for so many steps, guided (a guided step is two calls) and not, the one with the best
score on other prompts. Every student is judged with the settings that it recommends. Scores are those of the scenes
suite, with 95% intervals; prompts and noises are the same for all. A student counts at so many calls if it is above
the teacher by more than the 95% interval of the difference, on prompts of combinations that training showed and on such
that it never did.

What is there already is kept: students can be judged one by one, also by a file that another machine began (--results).
A student is the folder of a run, by whose name it goes, or a recipe, whose run is runs/RECIPE; --train teaches those
that are not there. A recipe that makes no student, like flow-matching, can be named too, and is judged as the teacher
is. What the teaching took, and where, is what the run itself has kept of it.
"""

import argparse
import json
import re
from pathlib import Path
from typing import Any

import torch
from machine import machine
from measured import write_measured
from students.judging import WHOLE, Judging, of_student, of_teacher
from students.speed import speeds
from students.teaching import TEACHER, all_methods, is_there, recipe_of, run_of, taught
from students.telling import SHOWN, drawn, measured, shown, summary, table, told
from students.verdict import verdicts

from sfumato import Pipeline, load
from sfumato.files import write_atomic
from sfumato.model import pick_device

HERE = Path(__file__).parent


def calls_from(text: str) -> tuple[int, ...]:
    """Numbers of calls, as "1,2,4": ascending, each once."""
    found = sorted({int(one) for one in text.split(",")})
    if found[0] < 1:
        raise argparse.ArgumentTypeError("a picture takes at least one call")
    return tuple(found)


def arguments(words: list[str] | None = None) -> argparse.Namespace:
    options = argparse.ArgumentParser(description="Students against their teacher.")
    add = options.add_argument
    add("students", nargs="*", help="folders of runs, and recipes; all few-step recipes on scenes, unless said")
    add("--teacher", type=Path, default=TEACHER)
    add("--device", default="auto", help="on which to judge and, with --train, to teach")
    add("--precision", default="fp32", help="in which to judge and to draw: fp32, bf16, fp16")
    add("--threads", type=int, help="of the CPU; as many as torch takes, unless said")
    add("--train", action="store_true", help="teach the students of recipes that are not there")
    add("--calls", type=calls_from, default=(1, 2, 4), help="at which to judge students: 1,2,4 unless said")
    add("--per-task", type=int, default=100, help="prompts of each of six tasks")
    add("--held-out", type=int, help="prompts of each task of held-out combinations; as many, unless said")
    add("--judge-teacher", action="store_true", help="again, where it was judged before")
    add("--tuning-seconds", type=float, default=120, help="of each sampler tuned to the teacher; 0: none")
    add("--no-judge", action="store_true", help="judge nobody: only what else is asked for, of what is there")
    add("--speed", action="store_true", help="time pictures of the teacher and of the students, side by side")
    add("--batch", type=int, default=32, help="of --speed, beside one picture alone")
    add("--turns", type=int, default=5, help="of --speed, of which medians are taken")
    add("--results", type=Path, help="the file to add to; that of this machine, unless said")
    add("--measured", action="store_true", help="write beside the recipes what came of them")
    add("--table", action="store_true", help="print what is in the results as a Markdown table, and do nothing else")
    add("--picture", type=Path, help="draw scores against calls here")
    add("--sheet", type=Path, help="draw pictures of the teacher and of the students side by side here")
    add("--prompt", action="append", help="of --sheet, in place of its own four; can be given again")
    add("--json", action="store_true", help="print one JSON object")
    return options.parse_args(words)


class Results:
    """The file of results: what is in it, and who adds to it. Other facts than students' are kept as they are."""

    def __init__(self, chosen: argparse.Namespace, here: dict[str, Any]) -> None:
        slug = re.sub(r"\W+", "-", f"{here['gpu'] or here['cpu']}".lower()).strip("-")
        self.place: Path = chosen.results or HERE / "results" / f"fewstep-{slug}.json"
        there = self.place.is_file()
        kept = json.loads(self.place.read_text(encoding="utf-8")) if there else {"students": {}}
        self.all: dict[str, Any] = {"benchmark": "fewstep", "machine": here, "per_task": chosen.per_task} | kept
        self.by = {"precision": chosen.precision} | ({} if self.all["machine"] == here else {"judged_on": here})
        verdicts(self.all)

    def teacher(self, row: dict[str, Any]) -> None:
        """Keeps the teacher's row, with the speed that was measured before."""
        before = self.all.get("teacher", {})
        self.all["teacher"] = row | self.by | {name: before[name] for name in ("speed",) if name in before}
        self.write()

    def student(self, name: str, row: dict[str, Any]) -> None:
        """Keeps a student's row, with the speed that was measured before."""
        before = self.all["students"].get(name, {})
        self.all["students"][name] = row | self.by | {name: before[name] for name in ("speed",) if name in before}
        self.write()

    def speed(self, teacher: dict[str, Any], students: dict[str, dict[str, Any]]) -> None:
        """Keeps speeds beside scores, if any."""
        if "teacher" in self.all:
            self.all["teacher"]["speed"] = teacher
        for name, row in students.items():
            self.all["students"].setdefault(name, {})["speed"] = row
        self.write()

    def write(self) -> None:
        """To the file, with the verdicts that follow."""
        verdicts(self.all)
        self.place.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(self.place, json.dumps(self.all, indent=1) + "\n")


def judge(chosen: argparse.Namespace, results: Results, students: dict[str, Path]) -> list[str]:
    """The teacher, if need be, and every student that is there or can be taught. Those whose teaching failed."""
    failed = list[str]()
    hidden = chosen.per_task if chosen.held_out is None else chosen.held_out
    how = Judging(chosen.per_task, hidden, chosen.calls, chosen.tuning_seconds)
    if "teacher" not in results.all or chosen.judge_teacher:
        results.teacher(of_teacher(opened(chosen.teacher, chosen), chosen.teacher, how))
    for name, run in students.items():
        missing = not is_there(run)
        if missing and not (chosen.train and run == run_of(name)):
            continue
        if missing and not taught(name, run, chosen.teacher, chosen.device):
            failed.append(name)  # though something of it may be there now
            continue
        results.student(name, of_student(opened(run, chosen), run, how))
        row = results.all["students"][name]
        told(f"{name}: {row}")
        entry = measured(row)
        if chosen.measured and entry is not None and (recipe := recipe_of(run)) is not None:
            write_measured(recipe, entry)
    return failed


def opened(run: Path, chosen: argparse.Namespace) -> Pipeline:
    """A run's pipeline, where and how it was asked for."""
    return load(run, chosen.device, precision=chosen.precision)


def timed(chosen: argparse.Namespace, results: Results, here: dict[str, Any], runs: dict[str, Path]) -> None:
    """The speed of the teacher and of some students."""
    facts = {"machine": here, "threads": torch.get_num_threads(), "precision": chosen.precision}
    students = {name: opened(run, chosen) for name, run in runs.items()}
    how: dict[str, Any] = {"calls": chosen.calls, "batch": chosen.batch, "turns": chosen.turns, "facts": facts}
    teacher, rows = speeds(opened(chosen.teacher, chosen), students, whole=WHOLE, **how)
    told(f"teacher: {teacher}")
    for name, row in rows.items():
        told(f"{name}: {row}")
    results.speed(teacher, rows)


def pictured(chosen: argparse.Namespace, runs: dict[str, Path]) -> None:
    """The sheet of the teacher's pictures and the students'."""
    lines = [(f"teacher, {WHOLE}", opened(chosen.teacher, chosen), WHOLE)]
    for name, run in runs.items():
        pipeline = opened(run, chosen)
        lines += [(f"{name}, {calls}", pipeline, calls) for calls in chosen.calls]
    shown(chosen.sheet, lines, chosen.prompt or SHOWN)


def main(words: list[str] | None = None) -> None:
    chosen = arguments(words)
    if chosen.threads:
        torch.set_num_threads(chosen.threads)
    here = machine(pick_device(chosen.device))
    results = Results(chosen, here)
    students = {run_of(one).name: run_of(one) for one in chosen.students or all_methods()}
    if chosen.table:
        print(table(results.all, [*students] if chosen.students else ()))
        return
    failed = [] if chosen.no_judge else judge(chosen, results, students)
    there = {name: run for name, run in students.items() if is_there(run) and name not in failed}
    missing = [str(run) for name, run in students.items() if name not in [*there, *failed]]
    if chosen.speed:
        timed(chosen, results, here, there)
    told(summary(results.all))
    if chosen.picture:
        drawn(chosen.picture, results.all)
    if chosen.sheet:
        pictured(chosen, there)
    if chosen.json:
        print(json.dumps(results.all))
    if missing:
        told(f"no model in {', '.join(missing)}: --train teaches those of recipes")
    if failed:
        raise SystemExit(f"could not be taught: {', '.join(failed)}")


if __name__ == "__main__":
    main()

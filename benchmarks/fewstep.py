"""Students against their teacher, on scenes: score at 1, 2 and 4 calls of the network, and what the teaching took.

    python benchmarks/fewstep.py --train --json
    python benchmarks/fewstep.py lcm runs/my-dmd2 --device cuda --measured

The teacher is judged at 50 steps under its guidance, and at 1, 2, 4 and 8 calls by the best that is found for it: among
samplers, grids, a sampler tuned for so many steps, guided (a guided step is two calls) and not, the one with the best
score on other prompts. Every student is judged with the settings that it recommends. Scores are those of the scenes
suite, with 95% intervals; prompts and noises are the same for all. What is there already is kept: students can be
judged one by one, also by a file that another machine began (--results). A student is the folder of a run, by whose
name it goes, or a recipe, whose run is runs/RECIPE; --train teaches those that are not there. What the teaching took,
and where, is what the run itself has kept of it.
"""

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from machine import machine
from measured import write_measured

from sfumato import Pipeline, load, load_config
from sfumato.config import Config
from sfumato.data.sheet import sheet
from sfumato.files import write_atomic
from sfumato.metrics.scenes import evaluate
from sfumato.model import pick_device
from sfumato.overlay import recipes, resolved
from sfumato.train.curves import Curve, plot
from sfumato.train.timing import timing
from sfumato.tuning.model import examples, tune_model

HERE = Path(__file__).parent
CALLS = (1, 2, 4)
EQUAL = (*CALLS, 8)  # at which the teacher is judged
SEARCH, JUDGE = 11, 12  # seeds of the prompts and the noise
SAMPLERS = ("ipndm", "dpmpp_2m", "unipc", "ddim")
TUNED = 48  # conditions that a sampler is tuned on
# What makes a student what it is, beside whom it learns from: a run with these is one of its recipe.
TELLING = (
    *("seed", "data", "objective", "optim", "steps", "batch", "accumulate", "condition_dropout", "lora", "pairs"),
    *("ema", "sampling"),
)
SHOWN = (
    "a large red circle",
    "a blue square and a yellow triangle",
    "three green circles",
    "a red circle left of a blue square",
)


def judged(pipeline: Pipeline, per_task: int, seed: int, **settings: Any) -> dict[str, float]:
    """The overall score with its interval, of prompts that no recipe's seed makes."""
    found = evaluate(pipeline, per_task=per_task, held_out=0, seed=seed, **settings).as_dict()
    return {name: found[name] for name in ("overall", "low", "high")}


def candidates(pipeline: Pipeline, teacher: Path, calls: int, seconds: float) -> list[dict[str, Any]]:
    """Ways for the teacher to draw in so many calls. seconds: for tuning each of those that are tuned; 0 tunes none."""
    own, found = pipeline.settings().guidance, []
    for guidance, steps in ((1.0, calls), (own, calls // 2)):
        if steps < 1:
            continue
        for sampler in SAMPLERS:
            found += [
                {"sampler": sampler, "grid": grid, "steps": steps, "guidance": guidance}
                for grid in ("logistic", pipeline.settings().grid)
            ]
        if steps > 1 and seconds:
            raw = pipeline.model.known(examples(teacher, TUNED))
            slots = tune_model(pipeline, raw, steps, guidance=float(guidance), iterations=400, seconds=seconds)
            tuned = {name: slots.settings()[name] for name in ("sampler", "grid")}
            found.append({**tuned, "steps": steps, "guidance": guidance})
    return found


def of_teacher(pipeline: Pipeline, teacher: Path, per_task: int, seconds: float) -> dict[str, Any]:
    """The teacher at 50 steps, and the best of it at few calls."""
    whole = judged(pipeline, per_task, JUDGE, steps=50)
    told(f"teacher at 50 steps: {whole}")
    equal = {}
    for calls in EQUAL:
        ways = candidates(pipeline, teacher, calls, seconds)
        scores = [judged(pipeline, max(4, per_task // 5), SEARCH, **way)["overall"] for way in ways]
        best = ways[scores.index(max(scores))]
        equal[str(calls)] = judged(pipeline, per_task, JUDGE, **best) | {"way": best, "tried": len(ways)}
        told(f"teacher at {calls} calls: {equal[str(calls)]}")
    row = {"steps": 50, "score": whole["overall"], "low": whole["low"], "high": whole["high"], "equal": equal}
    return row | {"per_task": per_task, "tuning_seconds": seconds}


def of_student(pipeline: Pipeline, run: Path, per_task: int) -> dict[str, Any]:
    """A student at 1, 2 and 4 steps, by the settings that it recommends, and what its teaching took."""
    if pipeline.settings().steers:
        raise SystemExit(f"{run} recommends guidance, whose steps are two calls: its scores would be of twice as many")
    row: dict[str, Any] = {}
    for calls in CALLS:
        found = judged(pipeline, per_task, JUDGE, steps=calls)
        row[str(calls)] = found["overall"]
        row[f"{calls} interval"] = [found["low"], found["high"]]
    facts = pipeline.model.facts
    row |= {"per_task": per_task, "method": facts.get("method"), "images": facts.get("images")}
    return row | {name: facts[name] for name in ("teacher", "start") if name in facts} | taken(run)


def taken(run: Path) -> dict[str, Any]:
    """Seconds, and the machine or the machines, of a run's training; null where the run does not know."""
    parts = timing(run)
    machines = [{name: one[name] for name in ("machine", "threads", "precision")} for one in parts]
    known = [one for i, one in enumerate(machines) if one not in machines[:i]]
    seconds = round(sum(one["seconds"] for one in parts), 1) if parts else None
    return {"seconds": seconds, "trained_on": known[0] if len(known) == 1 else known or None}


def taught(recipe: str, run: Path, teacher: Path, device: str) -> None:
    """Teaches a student by a recipe."""
    command = [
        sys.executable,
        "-m",
        "sfumato",
        "distill",
        recipe,
        "--judge",
        "0",
        f"teacher={teacher}",
        f"device={device}",
    ]
    subprocess.run([*command, "--run", str(run)], check=True)


def recipe_of(run: Path) -> str | None:
    """The recipe that a run is a training of, with nothing that matters changed."""
    if not (run / "config.yaml").is_file():
        return None
    said = load_config(str(run / "config.yaml")).config
    configs = {one.name: load_config(one.name).config for one in recipes()}
    return next((name for name, config in configs.items() if told_alike(config, said)), None)


def told_alike(recipe: Config, run: Config) -> bool:
    """Whether a run's configuration teaches as a recipe does, and begins where it does, or with its teacher."""
    mine, theirs = resolved(recipe), resolved(run)
    return run.start in (recipe.start, run.teacher) and all(mine[name] == theirs[name] for name in TELLING)


def measured(row: dict[str, Any]) -> dict[str, Any]:
    """A student's row as `sfumato recipes` tells of it."""
    low, high = row["4 interval"]
    entry = {"score": row["4"], "steps": {str(calls): row[str(calls)] for calls in CALLS}, "low": low, "high": high}
    found, on = {"seconds": row["seconds"], "images": row["images"]}, row["trained_on"]
    of_machine = {**on["machine"], "threads": on["threads"]} if isinstance(on, dict) else on
    return entry | {name: value for name, value in (found | {"machine": of_machine}).items() if value is not None}


def side_by_side(path: Path, device: str, teacher: Path, students: dict[str, Path]) -> None:
    """Four prompts: the teacher at 50 steps, then every student at 1, 2 and 4."""
    rows: list[tuple[str, Pipeline, int]] = [("teacher, 50", load(teacher, device), 50)]
    for name, run in students.items():
        rows += [(f"{name}, {calls}", load(run, device), calls) for calls in CALLS]
    images, said = [], []
    for name, pipeline, steps in rows:
        images += list(pipeline.sample(list(SHOWN), seeds=3, steps=steps).images)
        said += [f"{name}: {prompt}" for prompt in SHOWN]
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet(images, said, columns=2 * len(SHOWN)).save(path)


def drawn(path: Path, found: dict[str, Any]) -> None:
    """Score against calls, a curve a method, and the teacher's."""
    equal = found["teacher"]["equal"]
    curves = [Curve("teacher", [float(calls) for calls in equal], [one["overall"] for one in equal.values()])]
    curves += [
        Curve(name, [float(calls) for calls in CALLS], [row[str(calls)] for calls in CALLS])
        for name, row in found["students"].items()
    ]
    plot(path, "scene score", curves, "calls of the network")


def told(text: str) -> None:
    """A line for those who wait."""
    print(text, file=sys.stderr, flush=True)


def all_methods() -> list[str]:
    """The small recipes that teach a student from a teacher on scenes."""
    found = []
    for one in recipes():
        config = load_config(one.name).config
        if config.method is not None and config.teacher is not None and config.data["kind"] == "scenes":
            found.append(one.name)
    return found


def run_of(student: str) -> Path:
    """The folder of a student's run."""
    return Path("runs") / student if student in {one.name for one in recipes()} else Path(student)


def summary(found: dict[str, Any]) -> str:
    """Scores at each number of calls, as shares of the teacher's at 50 steps, and how far above the teacher's at as
    many calls, with the half of the interval of that difference.
    """
    teacher, lines = found["teacher"], list[str]()
    for name, row in found["students"].items():
        parts = []
        for calls in map(str, CALLS):
            equal, (low, high) = teacher["equal"][calls], row[f"{calls} interval"]
            half = ((high - low) ** 2 + (equal["high"] - equal["low"]) ** 2) ** 0.5 / 2
            kept = row[calls] / teacher["score"]
            parts.append(f"{calls}: {row[calls]:.2f} ({kept:.0%}; {row[calls] - equal['overall']:+.2f} ± {half:.2f})")
        lines.append(f"{name:28} " + "  ".join(parts))
    return "\n".join(lines)


def arguments() -> argparse.Namespace:
    options = argparse.ArgumentParser(description="Students against their teacher.")
    options.add_argument("students", nargs="*", help="folders of runs, and recipes; all recipes on scenes, unless said")
    options.add_argument("--teacher", type=Path, default=Path("runs/quickstart"))
    options.add_argument("--device", default="auto", help="on which to judge and, with --train, to teach")
    options.add_argument("--train", action="store_true", help="teach the students of recipes that are not there")
    options.add_argument("--per-task", type=int, default=100, help="prompts of each of six tasks")
    options.add_argument("--judge-teacher", action="store_true", help="again, where it was judged before")
    options.add_argument(
        "--tuning-seconds", type=float, default=120, help="of each sampler tuned to the teacher; 0: none"
    )
    options.add_argument("--results", type=Path, help="the file to add to; that of this machine, unless said")
    options.add_argument("--measured", action="store_true", help="write beside the recipes what came of them")
    options.add_argument("--picture", type=Path, help="draw scores against calls here")
    options.add_argument("--sheet", type=Path, help="draw pictures of all students side by side here")
    options.add_argument("--json", action="store_true", help="print one JSON object")
    return options.parse_args()


def main() -> None:
    chosen = arguments()
    here = machine(pick_device(chosen.device))
    slug = re.sub(r"\W+", "-", f"{here['gpu'] or here['cpu']}".lower()).strip("-")
    place = chosen.results or HERE / "results" / f"fewstep-{slug}.json"
    kept = json.loads(place.read_text(encoding="utf-8")) if place.is_file() else {"students": {}}
    kept = {"benchmark": "fewstep", "machine": here, "per_task": chosen.per_task} | kept
    elsewhere = {} if kept["machine"] == here else {"judged_on": here}

    def keep() -> None:
        place.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(place, json.dumps(kept, indent=1) + "\n")

    if "teacher" not in kept or chosen.judge_teacher:
        teacher = load(chosen.teacher, chosen.device)
        kept["teacher"] = of_teacher(teacher, chosen.teacher, chosen.per_task, chosen.tuning_seconds) | elsewhere
        keep()
    students = {run_of(one).name: run_of(one) for one in chosen.students or all_methods()}
    for name, run in list(students.items()):
        if not (run / "model" / "model.json").is_file():
            if not chosen.train or run != run_of(name):
                told(f"{run}: not taught yet; of recipes, see --train")
                del students[name]
                continue
            taught(name, run, chosen.teacher, chosen.device)
        kept["students"][name] = row = of_student(load(run, chosen.device), run, chosen.per_task) | elsewhere
        told(f"{name}: {row}")
        keep()
        if chosen.measured and (recipe := recipe_of(run)) is not None:
            write_measured(recipe, measured(row))
    told(summary(kept))
    if chosen.picture:
        drawn(chosen.picture, kept)
    if chosen.sheet:
        side_by_side(chosen.sheet, chosen.device, chosen.teacher, students)
    if chosen.json:
        print(json.dumps(kept))


if __name__ == "__main__":
    main()

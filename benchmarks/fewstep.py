"""Students against their teacher, on scenes: score at 1, 2 and 4 calls of the network, and what the teaching took.

    python benchmarks/fewstep.py --train --json
    python benchmarks/fewstep.py --methods lcm dmd2

The teacher is judged at 50 steps under its guidance, and at 1, 2, 4 and 8 calls by the best that is found for it: among
samplers, grids, a sampler tuned for so many steps, guided (a guided step is two calls) and not, the one with the best
score on other prompts. Every student is judged with the settings that it recommends. Scores are those of the scenes
suite, with 95% intervals; prompts and noises are the same for all. What is there already is kept: methods can be judged
one by one. A student is in runs/METHOD; --train teaches those that are not there, alone and timed.
"""

import argparse
import json
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from machine import machine

from sfumato import Pipeline, load, load_config
from sfumato.data.sheet import sheet
from sfumato.files import write_atomic
from sfumato.metrics.scenes import evaluate
from sfumato.overlay import recipes
from sfumato.train.curves import Curve, plot
from sfumato.tuning.model import examples, tune_model

HERE = Path(__file__).parent
CALLS = (1, 2, 4)
EQUAL = (*CALLS, 8)  # at which the teacher is judged
SEARCH, JUDGE = 11, 12  # seeds of the prompts and the noise
SAMPLERS = ("ipndm", "dpmpp_2m", "unipc", "ddim")
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


def candidates(pipeline: Pipeline, teacher: Path, calls: int) -> list[dict[str, Any]]:
    """Ways for the teacher to draw in so many calls."""
    own, found = pipeline.settings().guidance, []
    for guidance, steps in ((1.0, calls), (own, calls // 2)):
        if steps < 1:
            continue
        for sampler in SAMPLERS:
            found += [
                {"sampler": sampler, "grid": grid, "steps": steps, "guidance": guidance}
                for grid in ("logistic", pipeline.settings().grid)
            ]
        if steps > 1:
            raw = pipeline.model.known(examples(teacher, 48))
            slots = tune_model(pipeline, raw, steps, guidance=float(guidance), iterations=60).settings()
            tuned = {name: slots[name] for name in ("sampler", "grid")}
            found.append({**tuned, "steps": steps, "guidance": guidance})
    return found


def of_teacher(teacher: Path, per_task: int) -> dict[str, Any]:
    """The teacher at 50 steps, and the best of it at few calls."""
    pipeline = load(teacher)
    whole = judged(pipeline, per_task, JUDGE, steps=50)
    told(f"teacher at 50 steps: {whole}")
    equal = {}
    for calls in EQUAL:
        ways = candidates(pipeline, teacher, calls)
        scores = [judged(pipeline, max(4, per_task // 5), SEARCH, **way)["overall"] for way in ways]
        best = ways[scores.index(max(scores))]
        equal[str(calls)] = judged(pipeline, per_task, JUDGE, **best) | {"way": best}
        told(f"teacher at {calls} calls: {equal[str(calls)]}")
    return {"steps": 50, "score": whole["overall"], "low": whole["low"], "high": whole["high"], "equal": equal}


def of_student(run: Path, per_task: int) -> dict[str, Any]:
    """A student at 1, 2 and 4 steps, by the settings that it recommends."""
    pipeline, row = load(run), dict[str, Any]()
    if pipeline.settings().steers:
        raise SystemExit(f"{run} recommends guidance, whose steps are two calls: its scores would be of twice as many")
    for calls in CALLS:
        found = judged(pipeline, per_task, JUDGE, steps=calls)
        row[str(calls)] = found["overall"]
        row[f"{calls} interval"] = [found["low"], found["high"]]
    return row


def taught(method: str, teacher: Path) -> float | None:
    """Teaches a student that is not there yet; the seconds that its run took, as it kept them."""
    run = Path("runs") / method
    if not (run / "model" / "model.json").is_file():
        command = [sys.executable, "-m", "sfumato", "distill", method, f"teacher={teacher}"]
        started = time.perf_counter()
        subprocess.run(command, check=True)
        write_atomic(run / "seconds.json", json.dumps(round(time.perf_counter() - started, 1)))
    kept = run / "seconds.json"
    return float(json.loads(kept.read_text(encoding="utf-8"))) if kept.is_file() else None


def side_by_side(path: Path, teacher: Path, methods: list[str]) -> None:
    """Four prompts: the teacher at 50 steps, then every student at 1, 2 and 4."""
    rows: list[tuple[str, Pipeline, int]] = [("teacher, 50", load(teacher), 50)]
    for method in methods:
        rows += [(f"{method}, {calls}", load(Path("runs") / method), calls) for calls in CALLS]
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


def main() -> None:
    options = argparse.ArgumentParser(description="Students against their teacher.")
    options.add_argument("--teacher", type=Path, default=Path("runs/quickstart"))
    options.add_argument("--methods", nargs="*", help="recipes; all that teach a student on scenes, unless said")
    options.add_argument("--train", action="store_true", help="teach the students that are not there")
    options.add_argument("--per-task", type=int, default=100, help="prompts of each of six tasks")
    options.add_argument("--judge-teacher", action="store_true", help="again, where it was judged before")
    options.add_argument("--results", type=Path)
    options.add_argument("--picture", type=Path, help="draw scores against calls here")
    options.add_argument("--sheet", type=Path, help="draw pictures of all methods side by side here")
    options.add_argument("--json", action="store_true", help="print one JSON object")
    chosen = options.parse_args()
    here = machine()
    slug = re.sub(r"\W+", "-", f"{here['gpu'] or here['cpu']}".lower()).strip("-")
    place = chosen.results or HERE / "results" / f"fewstep-{slug}.json"
    kept = json.loads(place.read_text(encoding="utf-8")) if place.is_file() else {"students": {}}
    kept |= {"benchmark": "fewstep", "machine": here, "per_task": chosen.per_task}
    if "teacher" not in kept or chosen.judge_teacher:
        kept["teacher"] = of_teacher(chosen.teacher, chosen.per_task)
    methods = chosen.methods if chosen.methods is not None else all_methods()
    for method in methods:
        if not chosen.train and not (Path("runs") / method / "model").is_dir():
            told(f"{method}: not taught yet, see --train")
            continue
        seconds = taught(method, chosen.teacher)
        kept["students"][method] = of_student(Path("runs") / method, chosen.per_task) | {"seconds": seconds}
        told(f"{method}: {kept['students'][method]}")
        place.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(place, json.dumps(kept, indent=1) + "\n")
    write_atomic(place, json.dumps(kept, indent=1) + "\n")
    if chosen.picture:
        drawn(chosen.picture, kept)
    if chosen.sheet:
        side_by_side(chosen.sheet, chosen.teacher, [name for name in methods if name in kept["students"]])
    if chosen.json:
        print(json.dumps(kept))


if __name__ == "__main__":
    main()

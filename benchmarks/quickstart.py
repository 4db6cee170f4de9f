"""The learning curve of a recipe on scenes: score against seconds of training.

    python benchmarks/quickstart.py --json
    python benchmarks/quickstart.py --name adamw optim.kind=adamw optim.lr=1e-3

Trains in parts (stop, judge, resume: training continues bit for bit), so that judging takes no training time. Only the
time inside `train` counts. The last point is judged on all prompts and on held-out ones, those before it on a quarter.
Curves of several names are kept in one file and drawn in one picture.
"""

import argparse
import contextlib
import json
import shutil
import sys
import time
from pathlib import Path
from typing import Any

from machine import machine
from measured import write_measured

from sfumato import load, load_config, train
from sfumato.errors import Interrupted
from sfumato.files import write_atomic
from sfumato.metrics.scenes import evaluate
from sfumato.train.curves import Curve, plot

HERE = Path(__file__).parent


def learning_curve(
    recipe: str, overrides: list[str], folder: Path, points: int, per_task: int, precision: str
) -> list[dict[str, Any]]:
    """Scores at evenly spaced moments of one training run, in a folder that is made anew."""
    shutil.rmtree(folder, ignore_errors=True)
    config = load_config(recipe, overrides).config
    part, rows, seconds = -(-config.steps // points), [], 0.0
    for i in range(points):
        started = time.perf_counter()
        with contextlib.suppress(Interrupted):
            train(config, run=folder, resume=i > 0, stop_after=part)
        seconds += time.perf_counter() - started
        pipeline = load(folder, precision=precision)
        last = i == points - 1
        prompts, hidden = (per_task, per_task // 2) if last else (max(1, per_task // 4), 0)
        report = evaluate(pipeline, per_task=prompts, held_out=hidden).as_dict()
        tasks = {name: one["score"] for name, one in report["tasks"].items()}
        row = {"seconds": round(seconds, 1), "images": pipeline.model.facts["images"], "overall": report["overall"]}
        row |= {"low": report["low"], "high": report["high"], "tasks": tasks}
        if "placed" in report:
            row["placed"] = report["placed"]["score"]
        if last:
            row["held_out"] = report["held_out"]["overall"]
        rows.append(row)
        print(f"{row['seconds']:7.0f} s  {row['images']:8,} images  {row['overall']:.3f}  {tasks}", file=sys.stderr)
    return rows


def main() -> None:
    options = argparse.ArgumentParser(description="Score against seconds of training.")
    options.add_argument("overrides", nargs="*", help="key=value, as of sfumato train")
    options.add_argument("--recipe", default="quickstart")
    options.add_argument("--name", default="quickstart", help="what this curve is called")
    options.add_argument("--points", type=int, default=6, help="how often to judge")
    options.add_argument("--per-task", type=int, default=100, help="prompts of each task")
    options.add_argument("--precision", default="fp32", help="of the judging; training has the recipe's")
    options.add_argument("--results", type=Path, default=HERE / "results" / "recipes.json")
    options.add_argument("--picture", type=Path, help="draw every curve of the results here")
    options.add_argument("--run", type=Path, default=Path("runs/benchmark-quickstart"))
    options.add_argument("--measured", action="store_true", help="write the last row beside the recipe, as measured")
    options.add_argument("--json", action="store_true", help="print one JSON object")
    chosen = options.parse_args()
    judging = {"points": chosen.points, "per_task": chosen.per_task, "precision": chosen.precision}
    rows = learning_curve(chosen.recipe, chosen.overrides, chosen.run, **judging)
    kept = json.loads(chosen.results.read_text(encoding="utf-8")) if chosen.results.is_file() else {"curves": {}}
    kept["curves"][chosen.name] = {
        "recipe": chosen.recipe,
        "overrides": chosen.overrides,
        "judging": judging,
        "machine": machine(),
        "curve": rows,
    }
    chosen.results.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(chosen.results, json.dumps(kept, indent=1) + "\n")
    if chosen.measured:
        row = {name: rows[-1][name] for name in ("low", "high", "held_out", "seconds", "images")}
        write_measured(chosen.recipe, {"score": rows[-1]["overall"], **row, "machine": machine()})
    if chosen.picture:
        curves = [
            Curve(name, [row["seconds"] for row in one["curve"]], [row["overall"] for row in one["curve"]])
            for name, one in kept["curves"].items()
        ]
        plot(chosen.picture, "overall scene score", curves, "seconds of training")
    if chosen.json:
        print(json.dumps({"benchmark": "quickstart", "machine": machine(), "curve": rows}))


if __name__ == "__main__":
    main()

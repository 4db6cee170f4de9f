"""The learning curve of a recipe on scenes: score against seconds of training.

    python benchmarks/quickstart.py --json
    python benchmarks/quickstart.py --name adamw optim.kind=adamw optim.lr=1e-3
    python benchmarks/quickstart.py --recipe mmdit-scenes --run runs/mmdit-scenes --precision bf16 --measured threads=1

An autoencoder is judged by the objects that it keeps, everything else by the scenes suite.

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

import torch
from machine import machine
from measured import write_measured

from sfumato import Pipeline, load, load_config, train
from sfumato.errors import Interrupted
from sfumato.files import write_atomic
from sfumato.metrics.flow import examples
from sfumato.metrics.reconstruction import autoencoder, judge_reconstruction
from sfumato.metrics.scenes import evaluate
from sfumato.model import pick_device
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
        last = i == points - 1
        facts = json.loads((folder / "model" / "model.json").read_text(encoding="utf-8"))["facts"]
        row = {"seconds": round(seconds, 1), "images": facts["images"]}
        if config.model is not None and config.model.net is None:
            row |= kept(folder)
        else:
            prompts, hidden = (per_task, per_task // 2) if last else (max(1, per_task // 4), 0)
            row |= scored(load(folder, precision=precision), prompts, hidden)
        rows.append(row)
        print(f"{row['seconds']:7.0f} s  {row['images']:8,} images  {row['overall']:.3f}", file=sys.stderr)
    return rows


def scored(pipeline: Pipeline, per_task: int, held_out: int) -> dict[str, Any]:
    """What the scenes suite says of a model."""
    report = evaluate(pipeline, per_task=per_task, held_out=held_out).as_dict()
    tasks = {name: one["score"] for name, one in report["tasks"].items()}
    row = {**{name: report[name] for name in ("overall", "low", "high")}, "tasks": tasks}
    told = pipeline.model.conditioner
    if told is None or "caption" not in told.fields:
        row["metric"] = "whole" if told is None else "kind"
    if "placed" in report:
        row["placed"] = report["placed"]["score"]
    return row if report["held_out"]["overall"] is None else {**row, "held_out": report["held_out"]["overall"]}


def kept(folder: Path) -> dict[str, Any]:
    """What an autoencoder keeps of the pictures that its run held out."""
    device = pick_device("auto")
    report = judge_reconstruction(autoencoder(folder, device), examples(folder, 192), device)
    share, means = report["kept"], {name: report[name]["mean"] for name in ("psnr", "ms_ssim")}
    ends = {"overall": share["score"], "low": share["low"], "high": share["high"]}
    return {**ends, "tasks": {"kept": share["score"]}, "metric": "kept", **means}


def main() -> None:
    options = argparse.ArgumentParser(description="Score against seconds of training.")
    options.add_argument("overrides", nargs="*", help="key=value, as of sfumato train")
    options.add_argument("--recipe", default="quickstart")
    options.add_argument("--name", help="what this curve is called; the recipe, unless said")
    options.add_argument("--points", type=int, default=6, help="how often to judge")
    options.add_argument("--per-task", type=int, default=100, help="prompts of each task")
    options.add_argument("--precision", default="fp32", help="of the judging; training has the recipe's")
    options.add_argument("--results", type=Path, default=HERE / "results" / "recipes.json")
    options.add_argument("--picture", type=Path, help="draw every curve of the results here")
    options.add_argument("--run", type=Path, default=Path("runs/benchmark-quickstart"))
    options.add_argument("--measured", action="store_true", help="write the last row beside the recipe, as measured")
    options.add_argument("--beside", action="store_true", help="other work runs on the machine, and is told of")
    options.add_argument("--json", action="store_true", help="print one JSON object")
    chosen = options.parse_args()
    judging = {"points": chosen.points, "per_task": chosen.per_task, "precision": chosen.precision}
    rows = learning_curve(chosen.recipe, chosen.overrides, chosen.run, **judging)
    here = {**machine(), "threads": torch.get_num_threads(), **({"alone": False} if chosen.beside else {})}
    found = json.loads(chosen.results.read_text(encoding="utf-8")) if chosen.results.is_file() else {"curves": {}}
    found["curves"][chosen.name or chosen.recipe] = {
        "recipe": chosen.recipe,
        "overrides": chosen.overrides,
        "judging": judging,
        "machine": here,
        "curve": rows,
    }
    chosen.results.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(chosen.results, json.dumps(found, indent=1) + "\n")
    if chosen.measured:
        told = ("metric", "low", "high", "held_out", "placed", "psnr", "ms_ssim", "seconds", "images")
        row = {name: rows[-1][name] for name in told if name in rows[-1]}
        write_measured(chosen.recipe, {"score": rows[-1]["overall"], **row, "machine": here})
    if chosen.picture:
        curves = [
            Curve(name, [row["seconds"] for row in one["curve"]], [row["overall"] for row in one["curve"]])
            for name, one in found["curves"].items()
        ]
        plot(chosen.picture, "overall scene score", curves, "seconds of training")
    if chosen.json:
        print(json.dumps({"benchmark": "quickstart", "machine": here, "curve": rows}))


if __name__ == "__main__":
    main()

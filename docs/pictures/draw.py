"""Draws the pictures of the documentation.

python docs/pictures/draw.py                                # those that follow from the library alone
python docs/pictures/draw.py runs/quickstart                # and those of a trained model
python docs/pictures/draw.py --recipe dit-scenes runs/dit-scenes   # a recipe's learning curve, and what came of it
"""

import json
import sys
from pathlib import Path as File

import torch

from sfumato import load
from sfumato.bench import samplers as measured
from sfumato.catalogue import build
from sfumato.data.scenes import Scenes
from sfumato.data.sheet import sheet
from sfumato.metrics.scenes import evaluate
from sfumato.paths import log_snr
from sfumato.train.curves import Curve, plot

HERE = File(__file__).parent
PROMPT = "a red circle left of a blue square"
SAMPLERS = ("ddim", "dpmpp_2m", "ipndm", "euler_ancestral")
STEPS = (3, 4, 6, 8, 12, 20, 40)
SCALES = (1.0, 1.5, 2.0, 3.0, 5.0, 8.0)
GUIDANCES: dict[str, dict[str, object]] = {
    "cfg": {"kind": "cfg"},
    "cfg, 0.3 to 5": {"kind": "cfg", "interval": [0.3, 5.0]},
    "cfg_zero": {"kind": "cfg_zero"},
    "apg": {"kind": "apg"},
}
SHOWN = {
    "linear": "linear",
    "cosine": "cosine",
    "variance_preserving": "variance preserving",
    "variance_exploding": "variance exploding",
}


def scenes() -> None:
    """Twelve scenes with their captions, two of each task."""
    data, kept = Scenes(size=32, seed=1), dict[str, list[int]]()
    for index in range(200):
        kept.setdefault(str(data[index].fields["task"]), []).append(index)
    shown = [data[index] for task in sorted(kept) for index in kept[task][:2]]
    captions = [str(one.fields["caption"]) for one in shown]
    sheet([one.image for one in shown], captions, columns=6).save(HERE / "scenes.png", optimize=True)


def paths() -> None:
    """log_snr over time."""
    t = torch.linspace(0.01, 0.99, 99, dtype=torch.float64)
    curves = [Curve(said, t.tolist(), log_snr(build(name, "Path"), t).tolist()) for name, said in SHOWN.items()]
    plot(HERE / "paths.png", "log_snr = log(alpha^2 / sigma^2)", curves, "time (0 data, 1 noise)")


def errors() -> None:
    """Error against calls of some samplers on the mixture whose solution is known."""
    found = measured(("ddim", "heun", "dpmpp_2m", "unipc", "deis", "ipndm", "rk4"), paths=["tabulated"])
    curves = []
    for name, row in found.items():
        error = next(iter(row.error.values()))
        curves.append(Curve(name, [float(calls) for calls in error], list(error.values())))
    plot(HERE / "samplers-errors.png", "median error on the exact mixture", curves, "calls of the network", log_y=True)


def tries() -> None:
    """The loss of what was tried for the quickstart, as those runs wrote it down."""
    kept = json.loads((HERE.parents[1] / "benchmarks" / "results" / "quickstart-tries.json").read_text())
    curves = []
    for name, run in kept["runs"].items():
        images, loss = zip(*run["loss"][1:], strict=True)
        curves.append(Curve(name, [float(n) for n in images], list(loss)))
    plot(HERE / "quickstart-tries.png", "training loss", curves, "pictures", log_y=True)


def of_a_model(run: str) -> None:
    """One noise and prompt by several samplers at several numbers of steps, and by several guidances and scales."""
    pipeline = load(run)
    drawn, said = [], []
    for sampler in SAMPLERS:
        for steps in STEPS:
            drawn.append(pipeline.sample(PROMPT, sampler=sampler, grid="logistic", steps=steps, seeds=3).images[0])
            said.append(f"{sampler} {steps}")
    sheet(drawn, said, columns=len(STEPS)).save(HERE / "samplers-steps.png", optimize=True)
    drawn, said = [], []
    for name, slot in GUIDANCES.items():
        for scale in SCALES:
            drawn.append(pipeline.sample(PROMPT, guidance={**slot, "scale": scale}, steps=20, seeds=3).images[0])
            said.append(f"{name} {scale:g}")
    sheet(drawn, said, columns=len(SCALES)).save(HERE / "guidances.png", optimize=True)


def of_a_recipe(recipe: str, run: str) -> None:
    """The curve that `benchmarks/quickstart.py` measured, and twelve pictures, two of each task, with their layouts
    above them where the model reads one.
    """
    kept = json.loads((HERE.parents[1] / "benchmarks" / "results" / "recipes.json").read_text())["curves"]
    rows = kept[recipe]["curve"] if recipe in kept else []
    if len(rows) > 1:
        shares = {"overall": [row["overall"] for row in rows]}
        if len(rows[0]["tasks"]) > 1:
            shares |= {task: [row["tasks"][task] for row in rows] for task in rows[0]["tasks"]}
        seconds = [row["seconds"] for row in rows]
        curves = [Curve(name, seconds, shown) for name, shown in shares.items()]
        plot(HERE / f"{recipe}-curve.png", f"{recipe}: scene score", curves, "seconds of training")
    judged = evaluate(load(run), per_task=2, held_out=0, seed=21).judged
    images, said = [one.image for one in judged], [one.said for one in judged]
    layouts = [one.layout for one in judged if one.layout is not None]
    columns = len(judged) if layouts else len(judged) // 2
    drawn = sheet([*layouts, *images], [""] * len(layouts) + said, columns=columns)
    drawn.save(HERE / f"{recipe}-grid.png", optimize=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--recipe"]:
        of_a_recipe(*sys.argv[2:])
    else:
        scenes()
        paths()
        errors()
        tries()
        for one in sys.argv[1:]:
            of_a_model(one)

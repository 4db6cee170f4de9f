"""`sfumato eval`: how well a model does what it is for."""

from pathlib import Path
from typing import Any

import typer
from rich.table import Table

from sfumato.cli.show import as_json, bar, home, made, out, say
from sfumato.errors import ConfigError, nearest

SUITES = ("scenes",)


def evaluate(
    run: Path = typer.Argument(..., help="A run's folder, or a model directory.", metavar="RUN|MODEL"),
    suite: str = typer.Option("scenes", "--suite", help="What to judge by: scenes."),
    per_task: int = typer.Option(100, "--per-task", min=1, help="Prompts of each task."),
    held_out: int = typer.Option(
        50, "--held-out", min=0, help="Prompts of each task on combinations that training never showed."
    ),
    steps: int | None = typer.Option(None, "--steps", help="Steps of the sampler."),
    sampler: str | None = typer.Option(None, "--sampler", help="The sampler."),
    times: str | None = typer.Option(None, "--times", help="The grid of times."),
    guidance: float | None = typer.Option(None, "--guidance", help="How strongly to follow the prompt; 1 is off."),
    seed: int = typer.Option(0, "--seed", help="Of the prompts and of the noise."),
    batch: int = typer.Option(100, "--batch", min=1, help="Pictures at a time."),
    folder: Path | None = typer.Option(None, "--out", help="Where to write scores and sheets. [default: RUN/eval]"),
    device: str = typer.Option("auto", "--device", help="cpu, cuda, mps, ..."),
    precision: str = typer.Option("fp32", "--precision", help="fp32, bf16 or fp16."),
    json: bool = typer.Option(False, "--json", help="Print the scores as JSON."),
) -> None:
    """Judge a model: the share of pictures that show exactly what the prompt says, with 95% intervals."""
    if suite not in SUITES:
        raise ConfigError("no such suite", where="--suite", seen=suite, fix=f"--suite {nearest(suite, SUITES)}")
    from json import dumps

    from sfumato.files import write_atomic
    from sfumato.metrics.scenes import evaluate as judge
    from sfumato.pipeline import load

    pipeline = load(run, device, precision=precision)
    place = made(folder or home(run) / "eval")
    with bar("drawing") as progress:
        report = judge(
            pipeline,
            per_task=per_task,
            held_out=held_out,
            seed=seed,
            batch=batch,
            progress=progress,
            steps=steps,
            sampler=sampler,
            grid=times,
            guidance=guidance,
        )
    scores = report.as_dict()
    sheets = report.sheets(place)
    write_atomic(place / "scenes.json", dumps(scores, indent=1) + "\n")
    if json:
        as_json(scores)
    else:
        out.print(_table(scores))
    say(f"scores in {place / 'scenes.json'}, hits and misses in {', '.join(path.name for path in sheets)}")


def _table(scores: dict[str, Any]) -> Table:
    table = Table("task", "score", "95%", "held out", "95%", box=None, header_style="bold", padding=(0, 2, 0, 0))
    hidden = scores["held_out"]
    for task, one in scores["tasks"].items():
        table.add_row(task, *_cells(one), *_cells(hidden["tasks"].get(task)))
    table.add_row(
        "[bold]overall",
        *_cells({"score": scores["overall"], **scores}),
        *_cells({"score": hidden["overall"], **hidden}),
    )
    return table


def _cells(one: dict[str, Any] | None) -> tuple[str, str]:
    if not one or one.get("score") is None:
        return "", ""
    return f"{one['score']:.2f}", f"{one['low']:.2f}-{one['high']:.2f}"

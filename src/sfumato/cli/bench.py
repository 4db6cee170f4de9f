"""`sfumato bench`: what samplers are worth, on data whose solution is known or on a trained run."""

from pathlib import Path
from typing import Any

import typer
from rich.table import Table

from sfumato.cli.show import as_json, bar, out, say

bench = typer.Typer(help="Measure.", no_args_is_help=True, rich_markup_mode="rich")


@bench.callback()
def top() -> None:
    """Measure."""


@bench.command()
def samplers(
    names: list[str] | None = typer.Argument(None, help="Which samplers. [default: all]", metavar="[SAMPLER]..."),
    own: str | None = typer.Option(None, "--sampler", help="Your own: module:function."),
    run: Path | None = typer.Option(None, "--run", help="Error against calls on this trained run instead."),
    paths: list[str] | None = typer.Option(None, "--path", help="Only on these paths."),
    picture: Path = typer.Option(Path("samplers.png"), "--out", help="The plot to write."),
    json: bool = typer.Option(False, "--json", help="As JSON."),
) -> None:
    """Order of convergence on every path, error at equal calls, microseconds and waits outside the network."""
    from sfumato.catalogue import SAMPLERS

    if run is not None:
        _on_run(run, names or [name for name, line in SAMPLERS.items() if _usual(line)], picture, json)
        return
    from sfumato import bench as measure

    with bar("measuring") as progress:
        rows = measure.samplers(names, own, paths=paths, progress=progress)
    plain = {name: row.as_dict() for name, row in rows.items()}
    shown = {name: next(iter(row["error"].values())) for name, row in plain.items() if row["error"]}
    _plot(picture, "median error on the exact mixture", shown)
    if json:
        as_json({"samplers": plain})
        return
    out.print(_table(plain))
    say(f"error against calls is drawn in {picture}")


def _usual(line: Any) -> bool:
    return line.order > 0 and not (line.stochastic or line.adaptive or line.inverse)


def _on_run(run: Path, names: list[str], picture: Path, json: bool) -> None:
    import torch

    from sfumato.bench import on_model
    from sfumato.pipeline import load
    from sfumato.tuning.model import examples, problems

    pipeline = load(run, "auto")
    raw = pipeline.model.known(examples(run, 16))
    (problem,) = problems(pipeline, raw, batch=len(raw))
    with torch.inference_mode():
        rows = on_model(problem.denoise, problem.x, names)
    _plot(picture, f"median distance to the 1,000-step solution, {run.name}", rows)
    if json:
        as_json({"run": str(run), "error": rows})
        return
    table = Table("sampler", *next(iter(rows.values())), box=None, header_style="bold", padding=(0, 2, 0, 0))
    for name, row in sorted(rows.items(), key=lambda one: one[1]["10"]):
        table.add_row(name, *(f"{value:.4f}" for value in row.values()))
    out.print(table)
    say(f"error against calls is drawn in {picture}")


def _plot(path: Path, title: str, rows: dict[str, dict[str, float]]) -> None:
    from sfumato.train.curves import Curve, plot

    best = sorted(rows, key=lambda name: rows[name]["10"])[:8]
    curves = [Curve(name, [float(calls) for calls in rows[name]], list(rows[name].values())) for name in best]
    plot(path, title, curves, "calls of the network", log_y=True)


def _table(rows: dict[str, dict[str, Any]]) -> Table:
    paths = list(next(iter(rows.values()))["order"])
    heads = ("sampler", "order", *paths, "calls", "error at 10", "us a step", "operations", "waits")
    table = Table(*heads, box=None, header_style="bold", padding=(0, 1, 0, 0))
    for name, row in rows.items():
        orders = ["" if row["order"][path] is None else f"{row['order'][path]:.2f}" for path in paths]
        at = next((errors["10"] for errors in row["error"].values()), None)
        nominal = "" if row["nominal"] is None else str(row["nominal"])
        shown = "" if at is None else f"{at:.2e}"
        cost = (f"{row['overhead_us']:.0f}", f"{row['operations']:g}", str(row["syncs"]))
        table.add_row(name, nominal, *orders, f"{row['calls_per_step']:g}", shown, *cost)
    return table

"""`sfumato eval`: how well a model does what it is for."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import typer
from rich.table import Table

from sfumato.cli.show import as_json, bar, home, made, out, say
from sfumato.errors import ConfigError, nearest

SUITES = ("scenes", "reconstruction", "likelihood", "straightness")


def evaluate(
    run: Path = typer.Argument(..., help="A run's folder, or a model directory.", metavar="RUN|MODEL"),
    suite: str = typer.Option(
        "scenes", "--suite", help="What to judge by: scenes, reconstruction, likelihood or straightness."
    ),
    per_task: int = typer.Option(100, "--per-task", min=1, help="Prompts of each task."),
    held_out: int = typer.Option(
        50, "--held-out", min=0, help="Prompts of each task on combinations that training never showed."
    ),
    layout: str | None = typer.Option(
        None,
        "--layout",
        help="How a model that reads layouts is shown where things are: places, shapes or none. [default: places]",
    ),
    pictures: int = typer.Option(
        64, "--pictures", min=1, help="Held-out pictures, of every suite but scenes; of straightness, trajectories."
    ),
    probes: str = typer.Option(
        "1",
        "--probes",
        help="Random probes of the likelihood, for each picture; or exact, one for each of its numbers.",
    ),
    level: float | None = typer.Option(
        None, "--level", help="The noise through which the likelihood is bounded. [default: even noise within a level]"
    ),
    steps: int | None = typer.Option(None, "--steps", help="Steps of the sampler, or of the flow's solver."),
    sampler: str | None = typer.Option(None, "--sampler", help="The sampler."),
    times: str | None = typer.Option(None, "--times", help="The grid of times."),
    guidance: float | None = typer.Option(None, "--guidance", help="How strongly to follow the prompt; 1 is off."),
    against: Path | None = typer.Option(
        None, "--against", help="Another run or model, to be seen beside this one (straightness).", metavar="RUN|MODEL"
    ),
    seed: int = typer.Option(0, "--seed", help="Of the prompts and of the noise."),
    batch: int = typer.Option(100, "--batch", min=1, help="Pictures at a time."),
    folder: Path | None = typer.Option(None, "--out", help="Where to write scores and sheets. [default: RUN/eval]"),
    device: str = typer.Option("auto", "--device", help="cpu, cuda, mps, ..."),
    precision: str = typer.Option("fp32", "--precision", help="fp32, bf16 or fp16."),
    json: bool = typer.Option(False, "--json", help="Print the scores as JSON."),
) -> None:
    """Judge a model: the share of pictures that show exactly what the prompt says (scenes), what its autoencoder keeps
    of pictures (reconstruction), bits a dimension of pictures that it never saw (likelihood), or how straight its flow
    is (straightness); with 95% intervals.
    """
    if suite in SUITES[1:] and precision != "fp32":
        raise ConfigError("this suite works in fp32", where="--precision", seen=precision, fix="--precision fp32")
    if suite not in SUITES:
        raise ConfigError("no such suite", where="--suite", seen=suite, fix=f"--suite {nearest(suite, SUITES)}")
    if against is not None and suite != "straightness":
        what, fix = "only straightness is seen beside another's", "--suite straightness, or each run by itself"
        raise ConfigError(what, where="--against", seen=f"--suite {suite}", fix=fix)
    if layout is not None:
        from sfumato.data.scenes import check_layout

        check_layout(layout, "--layout")
    chosen = _probes(probes)
    from sfumato.metrics.scenes import evaluate as judge
    from sfumato.pipeline import load

    place = folder or home(run) / "eval"
    if suite == "reconstruction":
        _reconstruction(run, place, pictures, batch, device, json)
        return
    if suite == "likelihood":
        _likelihood(run, place, pictures, chosen, level, steps, guidance, seed, batch, device, json)
        return
    if suite == "straightness":
        _straightness(run, against, place, pictures, steps, guidance, seed, batch, device, json)
        return
    pipeline = load(run, device, precision=precision)
    made(place)
    with bar("drawing") as progress:
        report = judge(
            pipeline,
            per_task=per_task,
            held_out=held_out,
            seed=seed,
            batch=batch,
            layout=layout,  # type: ignore[arg-type]
            progress=progress,
            steps=steps,
            sampler=sampler,
            grid=times,
            guidance=guidance,
        )
    scores = report.as_dict()
    sheets = report.sheets(place)
    _kept(scores, place / "scenes.json", json)
    if not json:
        out.print(_table(scores))
    say(f"scores in {place / 'scenes.json'}, hits and misses in {', '.join(path.name for path in sheets)}")


def _reconstruction(run: Path, place: Path, pictures: int, batch: int, device: str, json: bool) -> None:
    """The suite of autoencoders."""
    from sfumato.metrics.flow import examples
    from sfumato.metrics.reconstruction import autoencoder, judge_reconstruction
    from sfumato.model import pick_device

    where = pick_device(device)
    codec, found = autoencoder(run, where), examples(run, pictures)
    with bar("reconstructing") as progress:
        scores = judge_reconstruction(codec, found, where, batch=batch, folder=made(place), progress=progress)
    _kept(scores, place / "reconstruction.json", json)
    if not json:
        shown = (("psnr", "PSNR in dB", 2), ("ms_ssim", "MS-SSIM", 4), ("kept", "pictures kept", 3))
        for name, said, digits in shown:
            if one := scores.get(name):
                _line(said, one, digits)
    _all_seen(found.held_out)
    say(f"scores in {place / 'reconstruction.json'}, pictures in {place / 'reconstruction.png'}")


def _line(name: str, one: dict[str, Any], digits: int) -> None:
    """A share or a mean, with its interval where it has one."""
    within = f", 95% {one['low']:.{digits}f}-{one['high']:.{digits}f}" if "low" in one else ""
    value = one["mean"] if "mean" in one else one["score"]
    out.print(f"{name}  {value:.{digits}f}{within}, of {one['n']}", markup=False, soft_wrap=True)


def _all_seen(held_out: bool) -> None:
    if not held_out:
        say("the run held no pictures out: these are of those that it saw")


def _probes(said: str) -> int | Literal["exact"]:
    if said == "exact":
        return "exact"
    if not said.isdecimal() or int(said) < 1:
        what = "probes are a number of random ones, from 1, or exact"
        raise ConfigError(what, where="--probes", seen=said, fix="--probes exact")
    return int(said)


def _likelihood(
    run: Path,
    place: Path,
    pictures: int,
    probes: int | Literal["exact"],
    level: float | None,
    steps: int | None,
    guidance: float | None,
    seed: int,
    batch: int,
    device: str,
    json: bool,
) -> None:
    """The suite of how likely pictures are."""
    from sfumato.metrics.flow import examples, judge_likelihood
    from sfumato.pipeline import load

    if guidance not in (None, 1):
        seen = f"{guidance:g}"
        raise ConfigError("a likelihood is of the model itself", where="--guidance", seen=seen, fix="leave it out")
    pipeline, found = load(run, device), examples(run, pictures)
    made(place)
    with bar("likelihood") as progress:
        scores = judge_likelihood(
            pipeline, found, probes=probes, steps=steps, level=level, seed=seed, batch=batch, progress=progress
        )
    _kept(scores, place / "likelihood.json", json)
    if not json:
        _line("bits a dimension", scores["bits_per_dim"], 4)
    _all_seen(found.held_out)
    say(f"scores in {place / 'likelihood.json'}")


def _straightness(
    run: Path,
    against: Path | None,
    place: Path,
    pictures: int,
    steps: int | None,
    guidance: float | None,
    seed: int,
    batch: int,
    device: str,
    json: bool,
) -> None:
    """The suite of how straight a flow is, alone or beside another's: from the same noise, for the same prompts."""
    from sfumato.metrics.flow import examples, judge_straightness
    from sfumato.pipeline import load
    from sfumato.train.curves import Curve, plot

    names = _names([run] if against is None else [run, against])
    pipelines, each = [load(one, device) for one in names.values()], list[dict[str, Any]]()
    found = examples(run, pictures)
    made(place)
    for name, pipeline in zip(names, pipelines, strict=True):
        with bar(f"straightness of {name}") as progress:
            scores = judge_straightness(
                pipeline,
                found.fields,
                steps=100 if steps is None else steps,
                guidance=1.0 if guidance is None else guidance,
                seed=seed,
                batch=batch,
                progress=progress,
            )
        each.append(scores)
    alone, own = against is None, f"{next(iter(names))}: straightness"
    said = ["|dz/dt - (z1 - z0)|^2"] if alone else list(names)
    curves = [Curve(name, one["curve"]["t"], one["curve"]["error"]) for name, one in zip(said, each, strict=True)]
    title = own if alone else "straightness: |dz/dt - (z1 - z0)|^2"
    plot(place / "straightness.png", title, curves, "time (0 data, 1 noise)", log_y=True)  # most of it is at the ends
    more = {} if against is None else {"against": {"run": str(against), **each[1]}}
    _kept({**each[0], **more}, place / "straightness.json", json)
    for name, one in [] if json else zip(names, each, strict=True):
        _line(f"straightness a dimension{'' if alone else f', {name}'}", one["straightness"], 4)
    _all_seen(found.held_out)
    say(f"scores in {place / 'straightness.json'}, the curve in {place / 'straightness.png'}")


def _names(runs: Sequence[Path]) -> dict[str, Path]:
    """Runs by their own names; by where they are, where two have one name."""
    short = [home(one).name or str(one) for one in runs]
    return dict(zip(short if len(set(short)) == len(runs) else map(str, runs), runs, strict=True))


def _kept(scores: dict[str, Any], file: Path, json: bool) -> None:
    """Writes scores, and prints them for programs."""
    from json import dumps

    from sfumato.files import write_atomic

    write_atomic(file, dumps(scores, indent=1) + "\n")
    if json:
        as_json(scores)


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
    if "placed" in scores:
        table.add_row("things in place", *_cells(scores["placed"]))
    return table


def _cells(one: dict[str, Any] | None) -> tuple[str, str]:
    if not one or one.get("score") is None:
        return "", ""
    return f"{one['score']:.2f}", f"{one['low']:.2f}-{one['high']:.2f}"

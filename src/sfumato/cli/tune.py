"""`sfumato tune-sampler`: a sampler of few calls, fitted to a model."""

from pathlib import Path
from typing import Any

import typer

from sfumato.cli.sample import read_lines
from sfumato.cli.show import as_json, bar, out, say
from sfumato.errors import ConfigError
from sfumato.hub import place_of


def tune_sampler(
    run: Path = typer.Argument(..., help="A run's folder, or a model directory.", metavar="RUN|MODEL"),
    steps: int = typer.Option(..., "--steps", min=1, max=40, help="Calls of the network the sampler shall take."),
    file: Path | None = typer.Option(
        None, "--prompts", help="A file with a prompt on each line, to tune for. [default: the run's data]"
    ),
    n: int = typer.Option(64, "--n", "-n", min=2, help="Pictures to tune on; a quarter of them to choose by."),
    iterations: int = typer.Option(100, "--iterations", min=0, help="Gradient steps; 0 only searches the times."),
    guidance: float | None = typer.Option(None, "--guidance", help="The guidance to tune for. [default: the model's]"),
    teacher: Path | None = typer.Option(
        None, "--teacher", help="Of a model of jumps: whose pictures to come near. [default: the run's, else its data]"
    ),
    batch: int = typer.Option(16, "--batch", min=1, help="Pictures at a time."),
    seed: int = typer.Option(0, "--seed", help="Of the noise."),
    device: str = typer.Option("auto", "--device", help="cpu, cuda, mps, ..."),
    json: bool = typer.Option(False, "--json", help="As JSON."),
) -> None:
    """Fit times and coefficients of a few-call sampler to a model; `sfumato sample` then uses it for so many steps.

    Of a student that jumps (consistency models, flow maps) only the times are searched for, by what is then drawn.

    sfumato tune-sampler runs/quickstart --steps 6
    sfumato tune-sampler runs/consistency-distillation --steps 4 --teacher runs/quickstart
    """
    if place_of(run) is not None:
        fix = f"sfumato convert {run} FOLDER --to sfumato"
        raise ConfigError("a model of the hub is not written into", where=str(run), seen="no folder", fix=fix)
    from sfumato.io.models import model_folder
    from sfumato.io.tuned import save_tuned
    from sfumato.pipeline import load
    from sfumato.tuning.jumps import Chosen, choose_times, jumps, references
    from sfumato.tuning.learn import Tuned
    from sfumato.tuning.model import examples, tune_model

    pipeline = load(run, device)
    said: list[Any] | None = [{"caption": text} for text in read_lines(file)] if file else None
    found: Tuned | Chosen
    with bar("tuning") as progress:
        if jumps(pipeline):
            told, truth = references(run, said, n, teacher)
            known = pipeline.model.known(told)
            found = choose_times(pipeline, known, truth, steps, batch=batch, seed=seed, progress=progress)
        else:
            raw = said or examples(run, n)
            known = pipeline.model.known([raw[i % len(raw)] for i in range(n)])
            options: dict[str, Any] = {"guidance": guidance, "iterations": iterations}
            found = tune_model(pipeline, known, steps, batch=batch, seed=seed, progress=progress, **options)
    slots = found.settings()
    facts = {"guidance": pipeline.settings(guidance=guidance).scale, "error": found.error, "before": found.before}
    path = save_tuned(model_folder(run), found.steps, {name: slots[name] for name in ("sampler", "grid")}, facts)
    if json:
        as_json({"path": str(path), "error": found.error, "before": found.before, **slots})
        return
    out.print(str(path), markup=False, soft_wrap=True)
    what = "energy score" if isinstance(found, Chosen) else "distance to the exact solution"
    say(
        f"{what} {found.error:.4g}, before {found.before:.4g}; "
        f"used from now on by: sfumato sample {run} --steps {steps}"
    )

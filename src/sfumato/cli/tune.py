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
    batch: int = typer.Option(16, "--batch", min=1, help="Pictures at a time."),
    seed: int = typer.Option(0, "--seed", help="Of the noise."),
    device: str = typer.Option("auto", "--device", help="cpu, cuda, mps, ..."),
    json: bool = typer.Option(False, "--json", help="As JSON."),
) -> None:
    """Fit times and coefficients of a few-call sampler to a model; `sfumato sample` then uses it for so many steps.

    sfumato tune-sampler runs/quickstart --steps 6
    """
    if place_of(run) is not None:
        fix = f"sfumato convert {run} FOLDER --to sfumato"
        raise ConfigError("a model of the hub is not written into", where=str(run), seen="no folder", fix=fix)
    from sfumato.io.tuned import save_tuned
    from sfumato.pipeline import load, model_folder
    from sfumato.tuning.model import examples, tune_model

    pipeline = load(run, device)
    raw: list[Any] = [{"caption": text} for text in read_lines(file)] if file else examples(run, n)
    known = pipeline.model.known([raw[i % len(raw)] for i in range(n)])
    with bar("tuning") as progress:
        found = tune_model(
            pipeline, known, steps, batch=batch, guidance=guidance, iterations=iterations, seed=seed, progress=progress
        )
    slots = found.settings()
    facts = {"guidance": pipeline.settings(guidance=guidance).scale, "error": found.error, "before": found.before}
    path = save_tuned(model_folder(run), found.steps, {name: slots[name] for name in ("sampler", "grid")}, facts)
    if json:
        as_json({"path": str(path), "error": found.error, "before": found.before, **slots})
        return
    out.print(str(path), markup=False, soft_wrap=True)
    say(
        f"distance to the exact solution {found.error:.4g}, before {found.before:.4g}; "
        f"used from now on by: sfumato sample {run} --steps {steps}"
    )

"""`sfumato tune-sampler`: a sampler of few calls, fitted to a model."""

from pathlib import Path
from typing import Any

import typer

from sfumato.cli.sample import read_lines
from sfumato.cli.show import as_json, bar, out, say


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
    from sfumato.pipeline import load, model_folder
    from sfumato.tuning.model import save_tuned, tune_model

    pipeline = load(run, device)
    raw = [{"caption": text} for text in read_lines(file)][:n] if file else _of_data(run, n)
    raw = [raw[i % len(raw)] for i in range(n)]
    fields = set(getattr(pipeline.model.conditioner, "fields", ()))
    known = [{name: value for name, value in one.items() if name in fields} for one in raw]
    with bar("tuning") as progress:
        found = tune_model(
            pipeline, known, steps, batch=batch, guidance=guidance, iterations=iterations, seed=seed, progress=progress
        )
    used = pipeline.settings(guidance=guidance).scale
    path = save_tuned(model_folder(run), found, used)
    if json:
        as_json({"path": str(path), "error": found.error, "before": found.before, **found.settings()})
        return
    out.print(str(path), markup=False, soft_wrap=True)
    say(
        f"distance to the exact solution {found.error:.4g}, before {found.before:.4g}; "
        f"used from now on by: sfumato sample {run} --steps {steps}"
    )


def _of_data(run: Path, n: int) -> list[Any]:
    """The fields of the first pictures of a run's data; nothing said where there is none."""
    config = run / "config.yaml"
    if not config.is_file():
        return [{}]
    from sfumato.catalogue import build
    from sfumato.overlay import parse_yaml

    dataset = build(parse_yaml(config.read_text(encoding="utf-8"), str(config))["data"], "Data")
    return list(dataset.batch(range(min(n, len(dataset))))[1])

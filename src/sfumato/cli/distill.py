"""`sfumato distill`: a model that needs fewer calls, from one that is trained."""

from pathlib import Path

import typer

from sfumato.cli.train import train
from sfumato.errors import ConfigError


def distill(
    method: str = typer.Argument(..., help="A recipe's name, or a YAML file.", metavar="METHOD|FILE"),
    overrides: list[str] | None = typer.Argument(
        None, help="teacher=RUN|MODEL, student=RUN|MODEL, lora.rank=16, and any key=value.", metavar="[KEY=VALUE]..."
    ),
    run: Path | None = typer.Option(None, "--run", help="The run's folder. [default: runs/NAME]"),
    stop_after: int | None = typer.Option(
        None, "--stop-after", min=1, help="Save and stop after so many steps, to be resumed."
    ),
    print_config: bool = typer.Option(
        False, "--print-config", help="Print the whole configuration, and where each value comes from."
    ),
    json: bool = typer.Option(False, "--json", help="Print where the model is, as JSON."),
) -> None:
    """Teach a student to draw in a few steps what a teacher draws in many.

    sfumato distill lcm teacher=runs/quickstart
    sfumato distill lcm-lora teacher=runs/quickstart lora.rank=32
    sfumato train --resume runs/lcm
    """
    from sfumato.overlay import load_config

    changes = [
        f"start={one.removeprefix('student=')}" if one.startswith("student=") else one for one in overrides or []
    ]
    if load_config(method, changes).config.method is None:
        fix = f"sfumato train {method}"
        raise ConfigError("this configuration makes no student of another model", where=method, fix=fix)
    train(method, changes, False, run, stop_after, print_config, json)

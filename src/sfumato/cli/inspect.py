"""`sfumato inspect`: what a file or a folder of weights is."""

from pathlib import Path

import typer

from sfumato.cli.show import as_json, line


def inspect(
    path: Path = typer.Argument(
        ..., help="A run, a model, a folder of diffusers, a file, or a name of the hub.", metavar="PATH"
    ),
    json: bool = typer.Option(False, "--json", help="As JSON."),
) -> None:
    """Say what a file or folder is: its family, its parts and their sizes, what it predicts, what is missing.

    sfumato inspect models/v1-5-pruned-emaonly.safetensors
    """
    from sfumato.io.inspect import as_text, inspected

    said = inspected(path)
    if json:
        as_json(said)
        return
    line(as_text(said))

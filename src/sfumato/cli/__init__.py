"""The command line. Thin: it reads arguments, calls the library, and prints. Nothing here imports torch until it must.

Results go to stdout, talk to stderr. Exit codes: 0 fine, 2 usage or config, 3 environment, 4 data, 5 out of memory, 6
interrupted and resumable, 1 the rest. An error is told without a traceback unless --debug is given.
"""

import os
import sys
import traceback

import typer

from sfumato.cli.data import data
from sfumato.cli.doctor import doctor
from sfumato.cli.eval import evaluate
from sfumato.cli.recipes import recipes
from sfumato.cli.sample import sample
from sfumato.cli.train import train
from sfumato.errors import SfumatoError

app = typer.Typer(
    name="sfumato",
    help="Train, sample and evaluate diffusion models.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    rich_markup_mode="rich",
    epilog="Begin with: sfumato train quickstart",
)
app.command(name="train")(train)
app.command(name="sample")(sample)
app.command(name="eval")(evaluate)
app.command(name="recipes")(recipes)
app.add_typer(data, name="data")
app.command(name="doctor")(doctor)


@app.callback(invoke_without_command=True)
def top(version: bool = typer.Option(False, "--version", help="Print the version and stop.")) -> None:
    """Train, sample and evaluate diffusion models."""
    if version:
        from sfumato import __version__

        typer.echo(__version__)
        raise typer.Exit


def main(argv: list[str] | None = None) -> None:
    """Runs the command line and exits with the code that its outcome has."""
    given = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in given or bool(os.environ.get("SFUMATO_DEBUG"))
    try:
        app([word for word in given if word != "--debug"], prog_name="sfumato")
    except SfumatoError as error:
        if debug:
            traceback.print_exc()
        _told(error)
        sys.exit(error.exit_code)
    except MemoryError as error:
        if debug:
            traceback.print_exc()
        print(f"✗ out of memory: {error}\n  fix    a smaller batch", file=sys.stderr)
        sys.exit(5)
    except Exception as error:
        if debug:
            raise
        what = f"{type(error).__name__}: {error}"
        print(
            f"✗ something that should not happen: {what}\n  fix    run it again with --debug and report what it says",
            file=sys.stderr,
        )
        sys.exit(1)


def _told(error: SfumatoError) -> None:
    mark = "■" if error.exit_code == 6 else "✗"
    print(f"{mark} {error}", file=sys.stderr)

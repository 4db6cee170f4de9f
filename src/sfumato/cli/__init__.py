"""The command line. Thin: it reads arguments, calls the library, and prints. Nothing here imports torch until it must.

Results go to stdout, talk to stderr. Exit codes: 0 fine, 2 usage or config, 3 environment, 4 data, 5 out of memory, 6
interrupted and resumable, 1 the rest (and 130 for Ctrl-C, as shells have it). An error is told without a traceback
unless --debug is given.
"""

import os
import sys
import traceback

import typer

from sfumato.cli.bench import bench
from sfumato.cli.convert import convert
from sfumato.cli.data import data
from sfumato.cli.distill import distill
from sfumato.cli.doctor import doctor
from sfumato.cli.eval import evaluate
from sfumato.cli.inspect import inspect
from sfumato.cli.lora import lora
from sfumato.cli.plan import plan
from sfumato.cli.push import push
from sfumato.cli.recipes import recipes
from sfumato.cli.sample import sample
from sfumato.cli.train import train
from sfumato.cli.tune import tune_sampler
from sfumato.errors import ConfigError, MachineError, MemoryShortage, SfumatoError

app = typer.Typer(
    name="sfumato",
    help="Train, distill, sample and evaluate diffusion models.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    rich_markup_mode="rich",
    epilog="Begin with: sfumato train quickstart",
)
app.command(name="train")(train)
app.command(name="distill")(distill)
app.command(name="sample")(sample)
app.command(name="eval")(evaluate)
app.command(name="recipes")(recipes)
app.command(name="plan")(plan)
app.command(name="convert")(convert)
app.command(name="inspect")(inspect)
app.command(name="push")(push)
app.add_typer(lora, name="lora")
app.add_typer(data, name="data")
app.command(name="doctor")(doctor)
app.command(name="tune-sampler")(tune_sampler)
app.add_typer(bench, name="bench")


@app.callback(invoke_without_command=True)
def top(
    version: bool = typer.Option(False, "--version", help="Print the version and stop."),
    debug: bool = typer.Option(False, "--debug", help="Show the traceback of an error; works in any place."),
) -> None:
    """Train, distill, sample and evaluate diffusion models."""
    if version:
        from sfumato import __version__

        typer.echo(__version__)
        raise typer.Exit


def main(argv: list[str] | None = None) -> None:
    """Runs the command line and exits with the code that its outcome has."""
    given = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in given or bool(os.environ.get("SFUMATO_DEBUG"))
    try:
        code = app([word for word in given if word != "--debug"], prog_name="sfumato", standalone_mode=False)
        sys.stdout.flush()
    except BrokenPipeError:  # whoever read us has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    except Exception as error:
        code = (
            2 if type(error).__name__ == "NoArgsIsHelpError" else _told(error, debug)
        )  # the former has shown its help
    sys.exit(code if isinstance(code, int) else 0)


def _told(error: Exception, debug: bool) -> int:
    """Tells of an error; its exit code."""
    if debug:
        traceback.print_exception(error)
    ours = _as_ours(error)
    print(f"{'■' if ours.exit_code == 6 else '✗'} {ours}", file=sys.stderr)
    return ours.exit_code


def _as_ours(error: Exception) -> SfumatoError:
    """Any error as one that says what, where, seen and fix."""
    if isinstance(error, SfumatoError):
        return error
    if hasattr(error, "format_message"):  # of the library that reads arguments, whose classes are its own affair
        return _usage(error)
    first = next(iter(str(error).splitlines()), "")
    if isinstance(error, MemoryError) or "OutOfMemory" in type(error).__name__ or "can't allocate memory" in str(error):
        return MemoryShortage("out of memory", seen=first, fix="a smaller batch")
    if isinstance(error, ImportError):
        return MachineError("a library cannot be imported", where=error.name, seen=first, fix="pip install sfumato")
    if isinstance(error, OSError):
        return MachineError(
            "the system refuses",
            where=error.filename,
            seen=error.strerror or first,
            fix="check the path and what may be done there",
        )
    what = f"something that should not happen: {type(error).__name__}: {first}"
    return SfumatoError(what, fix="run it again with --debug and report what it says")


def _usage(error: Exception) -> SfumatoError:
    """A command that is not one."""
    context = getattr(error, "ctx", None)
    command = getattr(context, "command_path", "sfumato")
    said = " ".join(getattr(error, "format_message")().split())  # noqa: B009  # not of every exception
    return ConfigError(said[:1].lower() + said[1:], where=command, fix=f"{command} --help")

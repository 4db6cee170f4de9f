"""`sfumato distill`: a model that needs fewer calls, from one that is trained."""

from pathlib import Path
from typing import TYPE_CHECKING

import typer

from sfumato.cli.show import as_json, bar, line, made, say
from sfumato.cli.train import Done, trained
from sfumato.errors import ConfigError, SfumatoError

if TYPE_CHECKING:
    from sfumato.metrics.kept import Kept


def distill(
    method: str = typer.Argument(..., help="A recipe's name, or a YAML file.", metavar="METHOD|FILE"),
    overrides: list[str] | None = typer.Argument(
        None, help="teacher=RUN|MODEL, student=RUN|MODEL, lora.rank=16, and any key=value.", metavar="[KEY=VALUE]..."
    ),
    run: Path | None = typer.Option(None, "--run", help="The run's folder. [default: runs/NAME]"),
    stop_after: int | None = typer.Option(
        None, "--stop-after", min=1, help="Save and stop after so many steps, to be resumed."
    ),
    judge: int = typer.Option(
        20,
        "--judge",
        min=0,
        help="Prompts, of scenes for each task, on which student and teacher are compared at the end; 0 for none.",
    ),
    print_config: bool = typer.Option(
        False, "--print-config", help="Print the whole configuration, and where each value comes from."
    ),
    json: bool = typer.Option(False, "--json", help="Print where the model is, and what it has kept, as JSON."),
) -> None:
    """Teach a student to draw in a few steps what a teacher draws in many, and say what it has kept of it.

    sfumato distill lcm teacher=runs/quickstart
    sfumato distill lcm-lora teacher=runs/quickstart lora.rank=32
    sfumato train --resume runs/lcm
    """
    changes = changes_of(method, overrides or [])
    done = trained(method, changes, False, run, stop_after, print_config, json)
    if done is None:
        return
    if not json:
        done.tell()
    found = _kept(done, judge) if judge else None
    if json:
        as_json(done.as_dict() | ({} if found is None else {"kept": found.as_dict()}))
    elif found is not None:
        for said in found.lines():
            line(said)


def changes_of(method: str, overrides: list[str]) -> list[str]:
    """What is asked for, in the words of a configuration. A method that has no teacher begins with whom it is given.

    ConfigError for a configuration that makes no student, and for two models to begin with.
    """
    from sfumato.overlay import load_config

    changes = [f"start={one.removeprefix('student=')}" if one.startswith("student=") else one for one in overrides]
    teachers = [one for one in changes if one.startswith("teacher=")]
    others = [one for one in changes if one not in teachers]
    if teachers and _has_no_teacher(method, others):
        teacher = teachers[-1].removeprefix("teacher=")
        if starts := [one for one in others if one.startswith("start=")]:
            what, seen = "this method has no teacher, and begins with one model", f"{teachers[-1]} and {starts[-1]}"
            raise ConfigError(what, where=method, seen=seen, fix=f"sfumato distill {method} teacher={teacher}")
        changes = [*others, f"start={teacher}"]
        say(f"{method} learns from data and has no teacher: it begins with {teacher}, whose network it has")
    if load_config(method, changes).config.method is None:
        fix = f"sfumato train {method}"
        raise ConfigError("this configuration makes no student of another model", where=method, fix=fix)
    return changes


def _has_no_teacher(method: str, changes: list[str]) -> bool:
    """Whether the method of a configuration, which need not be whole, learns from data alone."""
    from sfumato.catalogue import METHODS
    from sfumato.config import objective_of
    from sfumato.overlay import unchecked

    found = METHODS.get(objective_of(unchecked(method, changes)))
    return found is not None and found.teacher == "none"


def _kept(done: Done, n: int) -> "Kept | None":
    """What a student has kept of what it learned from, or began with, which is written into its run."""
    reference = done.config.teacher or done.config.start
    if reference is None:
        return None
    of = "its teacher" if done.config.teacher is not None else "what it began with"
    from json import dumps

    from sfumato.files import write_atomic
    from sfumato.metrics.flow import examples
    from sfumato.metrics.kept import kept_of_pictures, kept_of_scenes
    from sfumato.pipeline import load

    scenes = done.config.data["kind"] == "scenes"
    try:
        teacher, student = load(reference, done.config.device), load(done.run, done.config.device)
        say(f"judging the student and {of} on {n} prompts{' of each task' if scenes else ''}; --judge 0 does not")
        if scenes:
            found = kept_of_scenes(teacher, student, n, showing=bar, of=of)
        else:
            found = kept_of_pictures(teacher, student, examples(done.run, n).fields, showing=bar, of=of)
    except SfumatoError as error:
        say(f"what the student keeps is not judged: {error.what} ({error.where}, {error.seen})")
        return None
    write_atomic(made(done.run / "eval") / "kept.json", dumps(found.as_dict(), indent=1) + "\n")
    return found

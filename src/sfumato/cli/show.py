"""What commands share: JSON on stdout, talk and progress on stderr, where results are written."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from sfumato.hub import place_of

talk = Console(stderr=True, highlight=False, emoji=False)
out = Console(highlight=False, emoji=False)


def as_json(value: Any) -> None:
    """The result, for programs."""
    print(json.dumps(value, indent=1, ensure_ascii=False))


def say(text: str) -> None:
    """A line for people."""
    talk.print(text, markup=False, soft_wrap=True)


def line(text: object) -> None:
    """A line of the result, as it is."""
    out.print(str(text), markup=False, soft_wrap=True)


def home(run: Path) -> Path:
    """Where that belongs which is made with a model: the run's folder, also for its `model/`, which is rewritten; for a
    single file the folder that it lies in, and for a model of the hub the current one.
    """
    if place_of(run) is not None:
        return Path()
    run = run.expanduser()
    if run.is_file():
        return run.parent
    return run.parent if run.name == "model" and (run.parent / "config.yaml").is_file() else run


def made(folder: Path) -> Path:
    """The folder, which is there from now on: better to learn that it cannot be before an hour of drawing."""
    from sfumato.files import explained

    with explained(folder):
        folder.mkdir(parents=True, exist_ok=True)
    return folder


@contextmanager
def bar(name: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar on stderr, told (done, of how many); nothing where nobody looks."""
    columns = (
        TextColumn("[bold]{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=talk, disable=not talk.is_terminal, transient=True) as progress:
        task = progress.add_task(name, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)

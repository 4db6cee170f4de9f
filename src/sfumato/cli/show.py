"""What commands share: JSON on stdout, talk and progress on stderr, paths of runs."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

talk = Console(stderr=True, highlight=False)
out = Console(highlight=False)


def as_json(value: Any) -> None:
    """The result, for programs."""
    print(json.dumps(value, indent=1, ensure_ascii=False))


def say(text: str) -> None:
    """A line for people."""
    talk.print(text, markup=False, soft_wrap=True)


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

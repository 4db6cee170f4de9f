"""What a run tells: a progress line with rate and remaining time, plain lines where there is no terminal,
`metrics.jsonl` for programs, `log.txt` for later, and the loss curve as a picture.
"""

import errno
import json
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from sfumato import files
from sfumato.train.curves import Curve, plot, smoothed

SETTLING = 3  # steps that do not count for the rate: compilation, caches


class Log:
    """The log of a run's folder, from `step` on. Rows of steps that are about to be done again are dropped."""

    def __init__(self, run: Path, step: int, total: int, console: Console | None = None) -> None:
        self.run, self.first, self.total = run, step, total
        self.console = console or Console(stderr=True)
        self.metrics = run / "metrics.jsonl"
        self.rows = [row for row in read_rows(self.metrics) if row["step"] <= step]
        files.write_atomic(self.metrics, "".join(_line(row) for row in self.rows))
        self._started, self._images, self._unsettled = time.perf_counter(), 0, 0.0
        self._progress = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[said]}"),
            TimeRemainingColumn(),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        self._task = self._progress.add_task(run.name, total=total, completed=step, said="")

    def __enter__(self) -> "Log":
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def say(self, text: str, *, shown: bool = True) -> None:
        """A line for people, in log.txt and on stderr."""
        _append(self.run / "log.txt", f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")
        if shown:
            self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def stepped(self, step: int, images: int) -> None:
        """A step was made with so many images."""
        self._images += images
        if step - self.first == SETTLING:
            self._unsettled = self.rate
            self._started, self._images = time.perf_counter(), 0
        self._progress.update(self._task, completed=step)

    @property
    def rate(self) -> float:
        """Images a second, since the run has settled; before, since it began."""
        return self._images / max(time.perf_counter() - self._started, 1e-9) if self._images else self._unsettled

    def paused(self, seconds: float) -> None:
        """Time that was not spent training, and shall not count for the rate."""
        self._started += seconds

    def row(self, row: Mapping[str, Any]) -> None:
        """A row of metrics: what is not finite is written as null. People see those that have a loss."""
        self.rows.append(dict(row))
        _append(self.metrics, _line(row))
        if "loss" in row:
            per_step = row["images"] / max(row["step"], 1)
            left = (self.total - row["step"]) * per_step / max(self.rate, 1e-9)
            said = f"loss {row['loss']:.4f}  {self.rate:.0f} images/s"
            self._progress.update(self._task, said=said)
            text = f"step {row['step']}/{self.total}  {said}  {_clock(left)} left"
            self.say(text, shown=not self.console.is_terminal)  # a terminal has the progress line

    def draw(self) -> None:
        """loss.png and loss_by_noise.png, from all rows so far."""
        train = [row for row in self.rows if row.get("loss") is not None]
        if not train:
            return
        x, y = [row["step"] for row in train], [row["loss"] for row in train]
        curves = [Curve("each", x, y, faint=True), Curve("training", x, smoothed(y, max(1, len(y) // 20)))]
        held = [row for row in self.rows if row.get("validation") is not None]
        curves.append(Curve("validation (average)", [row["step"] for row in held], [row["validation"] for row in held]))
        plot(self.run / "loss.png", f"{self.run.name}: loss", curves, "step", log_y=True)
        shown = [held[0], held[len(held) // 2], held[-1]] if len(held) > 2 else held
        by = [_by_noise(row) for row in shown]
        plot(
            self.run / "loss_by_noise.png", f"{self.run.name}: error by time", by, "time (0 data, 1 noise)", log_y=True
        )


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics file; lines that were cut off are left out."""
    if not path.exists():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            rows.append(row)
    return rows


def _by_noise(row: Mapping[str, Any]) -> Curve:
    known = [(t, error) for t, error in row["by_noise"] if error is not None]
    return Curve(f"step {row['step']}", [t for t, _ in known], [error for _, error in known])


def _line(row: Mapping[str, Any]) -> str:
    return json.dumps(_plain(row), allow_nan=False) + "\n"


def _plain(value: Any) -> Any:
    """The same with null for numbers that JSON does not have."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {name: _plain(one) for name, one in value.items()}
    return [_plain(one) for one in value] if isinstance(value, list | tuple) else value


def _append(path: Path, text: str) -> None:
    """Adds to a file, unbuffered: what was written stays when the process is killed. MachineError on a full disk."""
    data = text.encode("utf-8", errors="replace")
    with files.explained(path), path.open("ab", buffering=0) as file:
        if file.write(data) != len(data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"

"""What a run tells: a progress line with rate and remaining time, plain lines where there is no terminal,
`metrics.jsonl` for programs, and the loss curve as a picture.
"""

import json
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from sfumato.train.curves import Curve, plot, smoothed

SETTLING = 3  # steps that do not count for the rate: compilation, caches


class Log:
    """The log of a run's folder, from `step` on. Rows of steps that are about to be done again are dropped."""

    def __init__(self, run: Path, step: int, total: int) -> None:
        self.run, self.first, self.total = run, step, total
        self.console = Console(stderr=True)
        self.metrics = run / "metrics.jsonl"
        self.rows = [row for row in read_rows(self.metrics) if row["step"] <= step]
        self.metrics.write_text("".join(json.dumps(row) + "\n" for row in self.rows), encoding="utf-8")
        self._file = self.metrics.open("a", encoding="utf-8")
        self._text = (run / "log.txt").open("a", encoding="utf-8")
        self._started, self._images = time.perf_counter(), 0
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
        self._file.close()
        self._text.close()

    def say(self, text: str) -> None:
        """A line for people, on stderr and in log.txt."""
        stamp = time.strftime("%H:%M:%S")
        self._text.write(f"{stamp} {text}\n")
        self._text.flush()
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def stepped(self, step: int, images: int) -> None:
        """A step was made with so many images."""
        if step - self.first == SETTLING:
            self._started, self._images = time.perf_counter(), 0
        else:
            self._images += images
        self._progress.update(self._task, completed=step)

    @property
    def rate(self) -> float:
        """Images a second, since the run has settled."""
        return self._images / max(time.perf_counter() - self._started, 1e-9)

    def paused(self, seconds: float) -> None:
        """Time that was not spent training, and shall not count for the rate."""
        self._started += seconds

    def row(self, row: dict[str, Any], *, shown: bool = True) -> None:
        """A row of metrics, and what of it people see."""
        self.rows.append(row)
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()
        if shown:
            loss, per_step = row["loss"], row["images"] / max(row["step"], 1)
            left = (self.total - row["step"]) * per_step / max(self.rate, 1e-9)
            said = f"loss {loss:.4f}  {self.rate:.0f} images/s"
            self._progress.update(self._task, said=said)
            if not self.console.is_terminal:
                self.say(f"step {row['step']}/{self.total}  {said}  {_clock(left)} left")

    def draw(self) -> None:
        """loss.png and loss_by_noise.png, from all rows so far."""
        train = [row for row in self.rows if "loss" in row]
        if not train:
            return
        x, y = [row["step"] for row in train], [row["loss"] for row in train]
        curves = [Curve("each", x, y, faint=True), Curve("training", x, smoothed(y, max(1, len(y) // 20)))]
        held = [row for row in self.rows if "validation" in row]
        curves.append(Curve("validation (average)", [row["step"] for row in held], [row["validation"] for row in held]))
        plot(self.run / "loss.png", f"{self.run.name}: loss", curves, "step", log_y=True)
        if held:
            shown = [held[0], held[len(held) // 2], held[-1]] if len(held) > 2 else held
            by = [Curve(f"step {row['step']}", *zip(*row["by_noise"], strict=True)) for row in shown]  # type: ignore[arg-type]
            plot(
                self.run / "loss_by_noise.png",
                f"{self.run.name}: error by time",
                by,
                "time (0 data, 1 noise)",
                log_y=True,
            )


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics file; a last line that was cut off is left out."""
    if not path.exists():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"

"""The life of a run around its steps: its folder, its lock, the signals that stop it, and a memory that is too
small.
"""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import torch
import yaml

from sfumato import files
from sfumato.config import Config
from sfumato.errors import ConfigError, MemoryShortage
from sfumato.overlay import resolved
from sfumato.train.run import Run


def train(config: Config, *, run: str | Path, resume: bool = False, stop_after: int | None = None) -> Path:
    """Trains, or goes on training, in the folder `run`; returns its `model/`.

    stop_after: save and stop after so many steps of this call, as an interruption would (for machines lent by the
    hour). Raises ConfigError if the folder holds another run, Interrupted when it was stopped and can be resumed,
    CheckpointError if there is nothing whole to resume from, DataError if the data or the gradients are unusable.
    """
    folder = Path(run)
    begun = (folder / "checkpoints").exists()
    if begun and not resume:
        raise ConfigError(
            "this run exists already", where=str(folder), fix=f"sfumato train --resume {folder}, or name=ANOTHER"
        )
    if resume and not begun:
        raise ConfigError(
            "there is no run to resume", where=str(folder), seen="no checkpoints", fix="leave --resume out"
        )
    with _stop_signal() as stopping, _explained_memory(config):
        made = Run(config, folder, resume)
        with files.lock(folder), made.loader_closed():
            text = yaml.safe_dump(resolved(config), sort_keys=False, allow_unicode=True)
            files.write_atomic(folder / "config.yaml", text)
            return made.go(stopping, stop_after)


@contextmanager
def _stop_signal() -> Iterator[Callable[[], bool]]:
    """Whether Ctrl-C or SIGTERM has asked to stop: the step is finished first. A second Ctrl-C stops at once."""
    asked = threading.Event()

    def ask(number: int, frame: FrameType | None) -> None:
        if asked.is_set() and number == signal.SIGINT:
            raise KeyboardInterrupt
        asked.set()

    if threading.current_thread() is not threading.main_thread():
        yield asked.is_set
        return
    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked.is_set
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _explained_memory(config: Config) -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError as error:
        half = max(1, config.batch // 2)
        fix = f"batch={half} accumulate={config.accumulate * 2}, which trains the same, or checkpointing=true"
        raise MemoryShortage(
            "the device has too little memory", where="training", seen=str(error).splitlines()[0], fix=fix
        ) from error

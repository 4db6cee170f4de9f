"""The life of a run around its steps: its folder, its lock, the signals that stop it, and a memory that is too
small.
"""

import os
import shlex
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import NamedTuple

import torch

from sfumato import files
from sfumato.config import Config
from sfumato.errors import ConfigError, MemoryShortage
from sfumato.model import Model, pick_device
from sfumato.overlay import as_yaml, resolved
from sfumato.train import checkpoint, pairs
from sfumato.train.begin import begun, resumed
from sfumato.train.possible import check_possible
from sfumato.train.run import Run
from sfumato.train.start import FOLDER, Start
from sfumato.train.step import pick_precision
from sfumato.train.teaching import as_student, read_teacher

# What a run has written before its first checkpoint: another may begin over it, if there is a run's lock beside it.
LOGS = {".lock", "config.yaml", "log.txt", "metrics.jsonl", "loss.png", "loss_by_noise.png"}
UNSAVED = LOGS | {"samples", checkpoint.FOLDER, FOLDER, pairs.FOLDER}
STOPPING = b"\nstopping after this step; Ctrl-C again stops at once, unsaved\n"


def train(config: Config, *, run: str | Path, resume: bool = False, stop_after: int | None = None) -> Path:
    """Trains, or goes on training, in the folder `run`; returns its `model/`.

    The folder gets config.yaml, metrics.jsonl, log.txt, timing.json, loss.png, samples/, checkpoints/, and for every
    average of `config.ema` a model directory: `model/` for the first, `model-1/`, `model-2/` for others. Training an
    adapter (`config.lora`) also leaves `lora.safetensors`, and `start/`, the model that it changes.
    stop_after: save and stop after so many steps of this call, as an interruption would (for machines lent by the
    hour). Raises ConfigError if the folder holds another run or other things, or is in use, Interrupted when it was
    stopped and can be resumed, CheckpointError if there is nothing whole to resume from, DataError if the data or the
    gradients are unusable, MachineError if the disk is full, MemoryShortage.
    """
    folder = Path(run)
    if stop_after is not None and stop_after < 1:
        raise ConfigError("a run stops after one step at least", where="stop_after", seen=str(stop_after))
    _check_folder(folder, resume)
    with _explained_memory(config):
        prepared = _prepared(config, folder, resume)
    config = prepared.config
    with files.lock(folder), _stop_signal() as stopping, _explained_memory(config):
        _check_folder(folder, resume)  # again: another process may have trained here while this one waited
        for place in (folder, folder / checkpoint.FOLDER, folder / "samples"):
            files.sweep(place)
        with closing(Run(config, folder, resume, prepared.start, stopping, prepared.teacher)) as made:
            files.write_atomic(folder / "config.yaml", as_yaml(resolved(config)))
            return made.go(stopping, stop_after)


class Prepared(NamedTuple):
    """A complete configuration, and the models that it names: to begin with, and to learn from."""

    config: Config
    start: Start | None = None
    teacher: Model | None = None


def _prepared(config: Config, folder: Path, resume: bool) -> Prepared:
    """All that a run needs to know of other models; nothing is written. ConfigError for what cannot be."""
    precision = pick_precision(config.precision, pick_device(config.device))
    config = config.model_copy(update={"precision": precision})  # so that the folder says what was meant
    if resume:
        return Prepared(as_student(resumed(config, folder), None)[0])
    config, start = begun(config)
    teacher = None if config.teacher is None else read_teacher(config.teacher)
    check_possible(config, start, teacher)
    return Prepared(*as_student(config, start), teacher)


def _check_folder(folder: Path, resume: bool) -> None:
    """A new run needs a folder in which nothing can be lost, a resumed one needs checkpoints."""
    if folder.exists() and not folder.is_dir():
        raise ConfigError("a run is a folder", where=str(folder), seen="a file", fix="name=ANOTHER")
    begun, quoted = bool(checkpoint.found(folder / checkpoint.FOLDER)), shlex.quote(str(folder))
    if resume and not begun:
        again = f"sfumato train {shlex.quote(str(folder / 'config.yaml'))} --run {quoted}"
        fix = again if (folder / "config.yaml").exists() else "leave --resume out"
        raise ConfigError("there is no run to resume", where=str(folder), seen="no checkpoints", fix=fix)
    if resume or not folder.exists():
        return
    if begun:
        fix = f"sfumato train --resume {quoted}, or name=ANOTHER"
        raise ConfigError("this run exists already", where=str(folder), fix=fix)
    names = sorted(path.name for path in folder.iterdir())
    ours = UNSAVED if ".lock" in names else set[str]()
    if other := [name for name in names if name not in ours and not files.LEFT_BEHIND.fullmatch(name)]:
        raise ConfigError(
            "this folder holds other things already", where=str(folder), seen=", ".join(other[:5]), fix="name=ANOTHER"
        )


@contextmanager
def _stop_signal() -> Iterator[Callable[[], bool]]:
    """Whether Ctrl-C or SIGTERM has asked to stop: the step is finished first. A second Ctrl-C stops at once."""
    asked = False

    def ask(number: int, frame: FrameType | None) -> None:  # no locks in here: a second signal may interrupt it
        nonlocal asked
        if asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        if not asked:
            with suppress(OSError):
                os.write(2, STOPPING)
        asked = True

    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _explained_memory(config: Config) -> Iterator[None]:
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        said = str(error).splitlines()[0] if str(error) else type(error).__name__
        if not isinstance(error, torch.OutOfMemoryError | MemoryError) and "can't allocate memory" not in str(error):
            raise
        half = f"batch={config.batch // 2} accumulate={config.accumulate * 2}, which trains alike, or "
        fix = (half if config.batch % 2 == 0 else "a smaller batch, or ") + "checkpointing=true"
        raise MemoryShortage("there is too little memory", where="training", seen=said, fix=fix) from error

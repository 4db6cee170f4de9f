"""What tests of whole runs share: what a run keeps, a run that is stopped, a file that is damaged."""

import json
from pathlib import Path
from typing import Any

import pytest

from sfumato.config import Config
from sfumato.errors import Interrupted
from sfumato.train import train


def bytes_of(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def kept(run: Path) -> dict[str, bytes]:
    """All that a run keeps but its log and what it took, which have the time of day, and pictures of it."""
    timed = (".txt", ".png", ".lock", "timing.json")
    return {name: data for name, data in bytes_of(run).items() if not name.endswith(timed)}


def stopped(config: Config, run: Path, after: int, resume: bool = False) -> None:
    with pytest.raises(Interrupted):
        train(config, run=run, resume=resume, stop_after=after)


def damage(path: Path, harm: str) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    if harm == "lose":
        path.unlink()
    else:
        path.write_bytes(data if harm == "flip" else data[:-1])


def rows_of(run: Path) -> list[dict[str, Any]]:
    path = run / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

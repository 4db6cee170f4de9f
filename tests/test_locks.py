"""Folders that one process works in at a time, and how much room there is for it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from sfumato.errors import ConfigError
from sfumato.files import free_space, lock


def test_a_folder_is_locked_once(tmp_path: Path) -> None:
    place = tmp_path / "runs" / "one"
    with lock(place):
        with pytest.raises(ConfigError, match="another process") as caught, lock(place):
            pass
        assert caught.value.where == str(place) and str(os.getpid()) in str(caught.value.seen)
        with lock(tmp_path / "runs" / "two"):
            pass
    with lock(place):
        pass


def test_an_error_unlocks(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), lock(tmp_path):
        raise RuntimeError
    with lock(tmp_path):
        pass


def test_a_lock_is_held_against_other_processes_and_goes_with_its_own(tmp_path: Path) -> None:
    script = """
import sys, time
from pathlib import Path
from sfumato.files import lock
with lock(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""
    other = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout is not None and other.stdout.readline() == "held\n"
        with pytest.raises(ConfigError, match="another process") as caught, lock(tmp_path):
            pass
        assert str(other.pid) in str(caught.value.seen)
    finally:
        other.kill()
        other.wait()
    with lock(tmp_path):
        pass


def test_free_space_is_that_of_the_nearest_folder_there_is(tmp_path: Path) -> None:
    assert free_space(tmp_path / "not" / "yet" / "there") > 0
    assert free_space(Path("not-yet-there")) > 0

"""Exit codes, usage errors, and where what is said goes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from commands import Command, told

from sfumato import overlay
from sfumato.cli import main
from sfumato.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    Interrupted,
    MachineError,
    MemoryShortage,
    SfumatoError,
)

COMMANDS = (["train"], ["sample"], ["eval"], ["recipes"], ["doctor"], ["data", "check"], ["data", "preview"])


def test_help_names_every_command(sfumato: Command) -> None:
    outcome = sfumato("--help")
    assert (outcome.code, outcome.err) == (0, "")
    for words in COMMANDS:
        assert words[0] in outcome.out
    assert "--debug" in outcome.out and "sfumato train quickstart" in outcome.out


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_every_command_has_help_and_json(sfumato: Command, words: list[str]) -> None:
    outcome = sfumato(*words, "--help")
    assert outcome.code == 0 and "--json" in outcome.out


def test_the_version_is_the_librarys(sfumato: Command) -> None:
    import sfumato as library

    assert sfumato("--version") == (0, f"{library.__version__}\n", "")


@pytest.mark.parametrize("words", [[], ["data"]])
def test_a_command_that_is_missing_shows_help(sfumato: Command, words: list[str]) -> None:
    outcome = sfumato(*words)
    assert outcome.code == 2 and "Commands" in outcome.out and outcome.err == ""


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["trian"], ["no such command 'trian'. Did you mean 'train'?", "where  sfumato\n", "fix    sfumato --help"]),
        (["data", "chek"], ["Did you mean 'check'", "where  sfumato data\n", "fix    sfumato data --help"]),
        (["train"], ["missing argument", "where  sfumato train\n", "fix    sfumato train --help"]),
        (["train", "tiny", "--foo"], ["no such option: --foo"]),
        (["train", "tiny", "--stop-after", "0"], ["invalid value for '--stop-after'"]),
        (["sample", "x", "--steps", "many"], ["invalid value for '--steps'"]),
        (["sample", "x", "--n", "0"], ["invalid value for '--n'"]),
        (["sample", "x", "--steps"], ["--steps", "requires an argument"]),
        (["eval", "x", "--per-task", "0"], ["invalid value for '--per-task'"]),
        (["eval", "x", "y"], ["unexpected extra argument"]),
        (["recipes", "all"], ["unexpected extra argument"]),
        (["data", "preview", "x", "-n", "-3"], ["invalid value for '--n'"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_usage_errors_look_like_all_others(sfumato: Command, words: list[str], parts: list[str]) -> None:
    told(sfumato(*words), 2, *parts)


def fails(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    """Makes `sfumato recipes` fail in this way."""

    def recipes() -> list[overlay.Recipe]:
        raise error

    monkeypatch.setattr(overlay, "recipes", recipes)


@pytest.mark.parametrize(
    ("error", "code", "parts"),
    [
        (ConfigError("a", where="b", seen="c", fix="d"), 2, ["✗ a\n  where  b\n  seen   c\n  fix    d\n"]),
        (MachineError("a"), 3, ["✗ a"]),
        (DataError("a"), 4, ["✗ a"]),
        (CheckpointError("a"), 4, ["✗ a"]),
        (MemoryShortage("a"), 5, ["✗ a"]),
        (Interrupted("stopped", fix="sfumato train --resume x"), 6, ["■ stopped\n  fix    sfumato train --resume x"]),
        (SfumatoError("a"), 1, ["✗ a"]),
        (RuntimeError("a wheel came off\nand more"), 1, ["RuntimeError: a wheel came off\n", "--debug"]),
        (MemoryError(), 5, ["out of memory", "a smaller batch"]),
        (torch.OutOfMemoryError("CUDA out of memory.\nmore"), 5, ["out of memory", "seen   CUDA out of memory.\n"]),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: 8 TB"), 5, ["out of memory"]),
        (ImportError("No module named 'torch'", name="torch"), 3, ["where  torch", "No module named 'torch'"]),
        (OSError(28, "No space left on device", "/full/a"), 3, ["where  /full/a", "No space left on device"]),
        (PermissionError(13, "Permission denied", "/etc/a"), 3, ["where  /etc/a", "Permission denied"]),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else None,
)
def test_the_exit_code_says_what_kind_of_error_it_was(
    sfumato: Command, monkeypatch: pytest.MonkeyPatch, error: Exception, code: int, parts: list[str]
) -> None:
    fails(monkeypatch, error)
    told(sfumato("recipes"), code, *parts)


def test_ctrl_c_ends_as_shells_have_it(sfumato: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    fails(monkeypatch, KeyboardInterrupt())
    assert sfumato("recipes") == (130, "", "")


@pytest.mark.parametrize("place", ["before", "after", "environment"])
def test_debug_shows_the_traceback_and_changes_nothing_else(
    sfumato: Command, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    for error, code in ((DataError("bad data"), 4), (RuntimeError("a wheel came off"), 1)):
        fails(monkeypatch, error)
        if place == "environment":
            monkeypatch.setenv("SFUMATO_DEBUG", "1")
        words = {"before": ["--debug", "recipes"], "after": ["recipes", "--debug"], "environment": ["recipes"]}[place]
        outcome = sfumato(*words)
        assert outcome.code == code and outcome.out == ""
        assert "Traceback (most recent call last)" in outcome.err and "raise error" in outcome.err
        assert outcome.err.count("✗ ") == 1


def test_recipes_are_listed(sfumato: Command) -> None:
    outcome = sfumato("recipes")
    assert outcome.code == 0 and outcome.err == ""
    for name in ("quickstart", "tiny"):
        assert name in outcome.out
    rows = sfumato("recipes", "--json").data
    assert {row["name"] for row in rows} == {recipe.name for recipe in overlay.recipes()}
    assert all(set(row) == {"name", "summary", "path", "measured"} and Path(row["path"]).is_file() for row in rows)


def test_recipes_tell_what_came_of_them(sfumato: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A student's scores at each number of steps, beside its name."""
    entry = {"score": 0.71, "steps": {"1": 0.33, "2": 0.605, "4": 0.71}, "low": 0.66, "high": 0.76, "images": 9600}
    (tmp_path / "measured.json").write_text(json.dumps({"lcm": entry, "quickstart": {"score": 0.83}}))
    monkeypatch.setattr(overlay, "MEASURED", tmp_path / "measured.json")
    monkeypatch.setenv("COLUMNS", "200")
    lines = sfumato("recipes").out.splitlines()
    (own,) = (line for line in lines if line.startswith("lcm "))
    assert own.split()[-4:] == ["0.71", "0.33", "0.60", "0.71"]
    (other,) = (line for line in lines if line.startswith("quickstart "))
    assert other.split()[-1] == "0.83"
    rows = {row["name"]: row["measured"] for row in sfumato("recipes", "--json").data}
    assert rows["lcm"] == entry and rows["tiny"] is None


def test_a_reader_who_has_read_enough_is_no_error(tmp_path: Path) -> None:
    """`sfumato ... | head`: the pipe is closed long before the output ends."""
    code = "from sfumato.cli import main; main(['train', 'quickstart', '--print-config', '--json'])"
    script = f"import sys; sys.stdout.reconfigure(write_through=True); {code}"
    writer = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=tmp_path, text=True
    )
    assert writer.stdout is not None and writer.stderr is not None
    writer.stdout.close()
    said = writer.stderr.read()
    writer.stderr.close()
    assert writer.wait(60) in (0, 1) and said == ""


def test_arguments_come_from_the_command_line_by_default(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["sfumato", "--version"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 0 and capsys.readouterr().out

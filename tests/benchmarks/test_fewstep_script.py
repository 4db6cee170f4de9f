"""The script as it is called, with a tiny model as teacher and students: rows are kept, tables and sheets come out."""

import json
import shutil
from pathlib import Path
from typing import Any

import fewstep
import pytest
from PIL import Image
from students import judging

from sfumato.files import seal

SMALL = ("--per-task", "1", "--device", "cpu", "--tuning-seconds", "0")


@pytest.fixture
def place(tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with runs/quickstart and runs/lcm, and with what another machine found of lcm and of another student."""
    for name in ("quickstart", "lcm"):
        shutil.copytree(tiny_run, tmp_path / "runs" / name)
    model = tmp_path / "runs" / "lcm" / "model" / "model.json"
    spec = json.loads(model.read_text())
    spec["sampling"] |= {"guidance": 1.0}
    spec["facts"] |= {"method": "latent_consistency"}
    model.write_text(json.dumps(spec))
    seal(model.parent)
    equal = {calls: {"overall": 0.1, "low": 0.05, "high": 0.15} for calls in ("1", "2", "4", "8")}
    before = {
        **{"benchmark": "fewstep", "machine": {"cpu": "another"}, "per_task": 50, "note": "kept"},
        "teacher": {"steps": 50, "score": 0.85, "low": 0.8, "high": 0.9, "equal": equal},
        "students": {
            "lcm": {
                "4": 0.9,
                "4 interval": [0.85, 0.95],
                "8": 0.95,
                "8 interval": [0.9, 1.0],
                "speed": {"4": {"ms": 5}},
            },
            "dmd2": {"4": 0.7, "4 interval": [0.65, 0.75], "seconds": 2066.0},
        },
    }
    (tmp_path / "found.json").write_text(json.dumps(before))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "found.json"


def called(place: Path, *words: str) -> dict[str, Any]:
    fewstep.main([*words, *SMALL, "--results", str(place)])
    found: dict[str, Any] = json.loads(place.read_text())
    return found


def test_a_student_is_judged_anew_and_all_else_is_kept(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = json.loads(place.read_text())
    after = called(place, "lcm", "elsewhere/nothing", "--calls", "1,8", "--json")
    assert all(after[name] == before[name] for name in ("note", "teacher", "machine"))
    assert before["students"]["dmd2"].items() <= after["students"]["dmd2"].items()
    row = after["students"]["lcm"]
    assert "4" not in row and {"1", "8", "8 interval", "8 held out"} <= row.keys() and row["speed"] == {"4": {"ms": 5}}
    assert row["judged_on"]["cpu"] != "another" and row["method"] == "latent_consistency"
    assert row["counts"] == {} and row["above"]["8"].keys() == {"overall"}  # the teacher's held-out ones are not known
    out, talk = capsys.readouterr()
    assert json.loads(out) == after and "no model in elsewhere/nothing" in talk


def test_the_teacher_is_judged_anew_when_asked(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judging, "SAMPLERS", ("ddim",))
    after = called(place, "lcm", "--judge-teacher", "--calls", "2", "--held-out", "2")
    assert after["teacher"]["held_out_per_task"] == 2 and after["teacher"]["per_task"] == 1
    assert {"won", "tried", "held out"} <= after["teacher"]["equal"]["2"].keys()
    assert after["students"]["lcm"]["counts"].keys() == {"2"}


def test_speed_alone_judges_nobody(place: Path) -> None:
    after = called(place, "lcm", "--no-judge", "--speed", "--batch", "2", "--turns", "1", "--calls", "1,2")
    row = after["students"]["lcm"]
    assert (row["4"], row["8"]) == (0.9, 0.95)
    assert row["speed"]["teacher"]["ms"] > 0 and row["speed"]["2"]["times_teacher"] > 1
    assert after["teacher"]["speed"]["steps"] == 50 and row["speed"]["threads"] >= 1
    assert row["speed"]["machine"]["torch"] and "speed" not in after["students"]["dmd2"]


def test_the_table_is_of_the_file_and_changes_nothing(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = place.read_text()
    called(place, "--table")
    out = capsys.readouterr().out
    assert place.read_text() == before and "| `dmd2` |" in out and "| `lcm` |" in out
    called(place, "dmd2", "--table")
    assert "lcm" not in capsys.readouterr().out


def test_the_sheet_has_a_row_for_each_chosen_student(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompts = ("--prompt", "a red circle", "--prompt", "two blue squares", "--prompt", "a green cross")
    called(place, "lcm", "dmd2", "--no-judge", "--sheet", "sheets/one.png", "--calls", "1,2", *prompts)
    with Image.open("sheets/one.png") as found:  # two groups of three abreast: the teacher and 1 call, then 2 calls
        assert found.width == 6 * (4 * 32 + 12) and found.height > 2 * (4 * 32 + 12)
    assert "no model in runs/dmd2" in capsys.readouterr().err


def test_students_that_cannot_be_taught_are_named_at_the_end(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(fewstep, "taught", lambda name, *rest: bool(asked.append(name)))
    with pytest.raises(SystemExit, match="could not be taught: ict, scm"):
        called(place, "ict", "lcm", "scm", "elsewhere/nothing", "--train", "--calls", "1")
    assert asked == ["ict", "scm"] and "1" in json.loads(place.read_text())["students"]["lcm"]


def test_calls_are_sorted_and_told_apart() -> None:
    assert fewstep.calls_from("8,1,2,2") == (1, 2, 8)
    with pytest.raises(SystemExit):
        fewstep.arguments(["--calls", "0,1"])
    with pytest.raises(SystemExit):
        fewstep.arguments(["--calls", "some"])

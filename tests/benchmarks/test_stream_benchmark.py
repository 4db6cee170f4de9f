"""The benchmark of streams writes what it found, and where."""

import json
from pathlib import Path

import pytest
import stream


def test_numbers_are_written_where_they_should(
    tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "results" / "stream.json"
    how = ("--steps", "2", "--strength", "1", "--frames", "3", "--turns", "1", "--guidance", "1", "--device", "cpu")
    stream.main([str(tiny_run), *how, "--out", str(out)])
    found = json.loads(out.read_text())
    assert json.loads(capsys.readouterr().out) == found
    assert found["differ_by"] <= 1 and found["stream"] > 0 and found["ratio"] > 0
    assert (found["model"], found["frames"], found["steps"]) == ("tiny", 3, 2)
    assert found["threads"] >= 1 and found["machine"]["gpu"] is None

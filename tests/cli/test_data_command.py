"""`sfumato data check|preview`: counts, sizes, captions, faults by name, and a sheet of what training will see."""

from pathlib import Path

import numpy as np
import pytest
from commands import QUICK, Command, told
from PIL import Image as Pillow


def test_a_good_folder(sfumato: Command, pictures: Path) -> None:
    outcome = sfumato("data", "check", "pictures")
    assert (outcome.code, outcome.err) == (0, "")
    lines = dict(line.split(maxsplit=1) for line in outcome.out.splitlines())
    assert lines["pictures"] == "20, fitted to 256x256"
    assert lines["captions"] == "20, 6 different words, the longest: 'a green square'"
    assert lines["formats"] == "PNG (20)"
    assert "enlarged    20 are smaller" in outcome.out and "file sizes  40x64 (1)" in outcome.out


def test_counts_for_programs(sfumato: Command, pictures: Path) -> None:
    found = sfumato("data", "check", "pictures", "--size", "32", "--json").data
    assert found["ok"] is True
    assert (found["pictures"], found["captioned"], found["size"], found["enlarged"]) == (20, 20, [32, 32], 0)


def test_every_fault_is_named_and_the_exit_code_says_so(sfumato: Command, pictures: Path) -> None:
    (pictures / "p00.png").write_bytes((pictures / "p00.png").read_bytes()[:100])
    (pictures / "p01.png").write_text("words")
    (pictures / "p02.txt").unlink()
    (pictures / "p04.png").write_bytes((pictures / "p03.png").read_bytes())
    outcome = sfumato("data", "check", "pictures")
    assert outcome.code == 4
    assert "pictures    18" in outcome.out and "captions    17" in outcome.out
    for part in (
        "unreadable  p00.png: image file is truncated",
        "unreadable  p01.png: not a picture",
        "no caption  p02.png",
        "the same    p03.png, p04.png",
        "✗ the data has faults\n  where  pictures\n  seen   2 unreadable, 1 without a caption\n",
    ):
        assert part in outcome.err
    as_json = sfumato("data", "check", "pictures", "--json")
    assert as_json.code == 4 and as_json.data["ok"] is False
    assert [name for name, _ in as_json.data["unreadable"]] == ["p00.png", "p01.png"]


def test_many_faults_are_counted_and_not_all_shown(sfumato: Command, tmp_path: Path) -> None:
    (tmp_path / "many").mkdir()
    Pillow.new("RGB", (8, 8)).save(tmp_path / "many" / "z.png")
    for i in range(25):
        (tmp_path / "many" / f"{i}.png").touch()
    outcome = sfumato("data", "check", "many")
    assert outcome.err.count("the file is empty") == 20 and "... and 5 more (--json names all)" in outcome.err
    assert len(sfumato("data", "check", "many", "--json").data["unreadable"]) == 25


def test_a_folder_without_captions_is_told_of_and_no_fault(sfumato: Command, pictures: Path) -> None:
    for path in pictures.glob("*.txt"):
        path.unlink()
    outcome = sfumato("data", "check", "pictures")
    assert outcome.code == 0 and "captions    0" in outcome.out
    assert "picture.txt" in outcome.err and "model.conditioner=null" in outcome.err


def test_classes_are_listed(sfumato: Command, tmp_path: Path) -> None:
    for name in ("fox", "badger"):
        (tmp_path / "zoo" / name).mkdir(parents=True)
        Pillow.new("RGB", (8, 8), (name == "fox" and "red") or "grey").save(tmp_path / "zoo" / name / "a.png")
    assert "classes     2: badger, fox" in sfumato("data", "check", "zoo").out


def test_the_data_of_recipes_files_and_runs(sfumato: Command, pictures: Path, tmp_path: Path) -> None:
    scenes = sfumato("data", "check", "scenes")
    assert scenes.code == 0 and "pictures    1,000,000, fitted to 32x32" in scenes.out
    assert sfumato("data", "check", "tiny", "data.size=[48, 64]", "--json").data["size"] == [48, 64]
    words = ("data.kind=folder", f"data.path={pictures}")
    assert sfumato("data", "check", "quickstart", *words, "--json").data["pictures"] == 20
    (tmp_path / "mine.yaml").write_text("extends: tiny\ndata: {kind: folder, path: pictures}\n")
    assert sfumato("data", "check", "mine.yaml", "--json").data["size"] == [32, 32]
    assert sfumato("train", "mine.yaml", *QUICK).code == 0
    assert sfumato("data", "check", "runs/mine", "--json").data["pictures"] == 20


@pytest.mark.parametrize(
    ("words", "code", "parts"),
    [
        (["nope"], 4, ["there is no such folder", "seen   nope"]),
        (["nothing"], 4, ["holds no pictures", "an empty folder"]),
        (["bad"], 4, ["no picture of this folder can be used", "a.png: the file is empty"]),
        (["nope.yaml"], 2, ["no such configuration"]),
        (["tiny", "data.siz=3"], 2, ["data.siz is no option of scenes"]),
        (["tiny", "--size", "64"], 2, ["a size of its own", "data.size=64"]),
        (["nothing", "mirror=true"], 2, ["only a configuration can be changed", "data.kind=folder data.path=nothing"]),
        (["nothing", "--size", "many"], 2, ["--size"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) and len(value) < 4 else None,
)
@pytest.mark.parametrize("command", ["check", "preview"])
def test_what_cannot_be_looked_at(
    sfumato: Command, tmp_path: Path, command: str, words: list[str], code: int, parts: list[str]
) -> None:
    (tmp_path / "nothing").mkdir()
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "a.png").touch()
    told(sfumato("data", command, *words), code, *parts)
    assert not (tmp_path / "preview.png").exists()


def test_sizes_that_cannot_be(sfumato: Command, pictures: Path) -> None:
    for size in (0, 7):
        told(sfumato("data", "check", "pictures", "--size", size), 2, "at least 8 px", f"seen   {size}")


def test_a_preview_shows_what_training_sees(sfumato: Command, pictures: Path, tmp_path: Path) -> None:
    outcome = sfumato("data", "preview", "pictures", "--size", "64", "-n", "6", "--out", "in/sheet.png", "--json")
    assert outcome.code == 0 and outcome.data["path"] == "in/sheet.png"
    assert len(outcome.data["captions"]) == 6 and all(text.startswith("a ") for text in outcome.data["captions"])
    first = np.asarray(Pillow.open(tmp_path / "in" / "sheet.png"))
    assert min(first.shape[:2]) > 128
    again = sfumato("data", "preview", "pictures", "--size", "64", "-n", "6")
    assert again.out == "preview.png\n"
    assert np.array_equal(np.asarray(Pillow.open(tmp_path / "preview.png")), first)
    other = sfumato("data", "preview", "pictures", "--size", "64", "-n", "6", "--seed", "1", "--json").data
    assert other["captions"] != outcome.data["captions"] or not np.array_equal(
        np.asarray(Pillow.open("preview.png")), first
    )


def test_a_preview_of_all_and_of_scenes(sfumato: Command, pictures: Path) -> None:
    captions = sfumato("data", "preview", "pictures", "-n", "100", "--json").data["captions"]
    assert sorted(captions) == sorted(path.read_text().strip() for path in pictures.glob("*.txt"))
    assert sfumato("data", "preview", "scenes", "-n", "2").code == 0


@pytest.mark.parametrize("how", ["head", "tail"])
def test_a_preview_leaves_out_what_cannot_be_read(sfumato: Command, pictures: Path, how: str) -> None:
    data = (pictures / "p07.png").read_bytes()
    (pictures / "p07.png").write_bytes(data[:100] if how == "tail" else b"no picture")
    outcome = sfumato("data", "preview", "pictures", "-n", "50", "--json")
    assert outcome.code == 0 and len(outcome.data["captions"]) == 19
    assert "left out" in outcome.err and "sfumato data check pictures" in outcome.err


def test_previews_that_cannot_be_written(sfumato: Command, pictures: Path, tmp_path: Path) -> None:
    told(sfumato("data", "preview", "pictures", "--out", "a.txt"), 2, "a preview is a PNG", "fix    --out a.png")
    (tmp_path / "a_file").touch()
    told(sfumato("data", "preview", "pictures", "--out", "a_file/a.png"), 3, "a_file")

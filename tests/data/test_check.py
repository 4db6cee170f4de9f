"""What `sfumato data check` reports."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image as Pillow

from sfumato.data.check import report
from sfumato.data.folder import Folder
from sfumato.data.scenes import Scenes


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Six pictures with captions, two of them the same, one turned on its side."""
    rng = np.random.default_rng(0)
    for i in range(5):
        side = 40 if i else 100
        Pillow.fromarray(rng.integers(0, 256, (30, side, 3), dtype=np.uint8)).save(tmp_path / f"{i}.png")
    turned = Pillow.Exif()
    turned[0x0112] = 6
    Pillow.fromarray(rng.integers(0, 256, (40, 80, 3), dtype=np.uint8)).save(tmp_path / "5.jpg", exif=turned)
    shutil.copy(tmp_path / "1.png", tmp_path / "4.png")
    for i in range(6):
        (tmp_path / f"{i}.txt").write_text(f"a circle {'and a square ' * i}")
    return tmp_path


@pytest.mark.parametrize("unreadable", ["error", "skip"])
def test_a_good_folder(pictures: Path, unreadable: str) -> None:
    found = report(Folder(str(pictures), size=(32, 40), unreadable=unreadable))  # type: ignore[arg-type]
    assert found.ok
    assert (found.pictures, found.captioned, found.size) == (6, 6, (32, 40))
    assert (found.words, found.longest) == (4, "a circle" + " and a square" * 5)
    assert found.formats == {"PNG": 5, "JPEG": 1}
    assert found.file_sizes == ["40x30 (4)", "100x30 (1)", "40x80 (1)"]  # the last as it is seen, upright
    assert found.enlarged == 5  # 30 is less than 32
    assert found.duplicates == [["1.png", "4.png"]]
    assert (found.unreadable, found.uncaptioned, found.classes) == ([], [], [])


@pytest.mark.parametrize("unreadable", ["error", "skip"])
def test_a_truncated_picture_is_found_either_way(pictures: Path, unreadable: str) -> None:
    data = (pictures / "0.png").read_bytes()
    (pictures / "0.png").write_bytes(data[: len(data) // 2])
    found = report(Folder(str(pictures), size=32, unreadable=unreadable))  # type: ignore[arg-type]
    assert not found.ok
    assert [name for name, _ in found.unreadable] == ["0.png"]
    assert (found.pictures, found.captioned) == (5, 5)


def test_every_kind_of_fault_is_named(pictures: Path) -> None:
    (pictures / "0.txt").unlink()
    (pictures / "1.png").write_text("no picture")
    (pictures / "metadata.csv").write_text("file_name,text\n2.png,a cross\ngone.png,nothing\n")
    found = report(Folder(str(pictures), size=32, unreadable="skip"))
    assert not found.ok
    assert dict(found.unreadable) == {
        "1.png": "not a picture, whatever its name says",
        "gone.png": "named in the metadata, but not there",
    }
    assert found.uncaptioned == ["0.png"]
    assert (found.pictures, found.captioned, found.duplicates) == (5, 4, [])


def test_a_folder_without_any_caption_is_for_a_model_without_conditions(pictures: Path) -> None:
    for path in pictures.glob("*.txt"):
        path.unlink()
    found = report(Folder(str(pictures), size=32))
    assert found.ok
    assert (found.captioned, found.words, found.longest, found.uncaptioned) == (0, 0, "", [])


def test_classes_are_named(pictures: Path) -> None:
    for name in ("fox", "badger"):
        (pictures / name).mkdir()
        (pictures / "0.png" if name == "fox" else pictures / "2.png").rename(pictures / name / "0.png")
    for path in pictures.glob("*.*"):
        path.unlink()
    found = report(Folder(str(pictures), size=32))
    assert (found.classes, found.captioned) == (["badger", "fox"], 2)


def test_data_that_is_made_is_looked_at_in_part() -> None:
    found = report(Scenes(size=64, count=3000))
    assert found.ok
    assert (found.pictures, found.captioned, found.size) == (3000, 3000, (64, 64))
    assert 20 < found.words <= 29
    assert found.longest.startswith("a") and len(found.longest.split()) < 13


def test_a_report_is_plain_data(pictures: Path) -> None:
    found = report(Folder(str(pictures), size=32))
    plain = json.loads(json.dumps(found.as_dict()))
    assert plain["ok"] is True and plain["pictures"] == 6 and plain["duplicates"] == [["1.png", "4.png"]]

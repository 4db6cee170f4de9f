"""Folders of one's own pictures: every kind of file, caption and fault that people have."""

import json
import struct
import unicodedata
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image as Pillow

from sfumato.data.folder import Folder, fault, fitted
from sfumato.errors import ConfigError, DataError

RED, BLUE = (200, 30, 20), (10, 40, 220)


def save(path: Path, colour: Any = RED, size: tuple[int, int] = (16, 16), mode: str = "RGB", **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Pillow.new(mode, size, colour).save(path, **options)
    return path


def halves(left: Any = RED, right: Any = BLUE, size: tuple[int, int] = (16, 16)) -> Pillow.Image:
    image = Pillow.new("RGB", size, left)
    image.paste(right, (size[0] // 2, 0, *size))
    return image


def caught(path: Path, kind: type[Exception] = DataError, **options: Any) -> Any:
    with pytest.raises(kind) as error:
        Folder(str(path), size=16, **options)
    return error.value


def captions(path: Path, **options: Any) -> dict[str, object]:
    folder = Folder(str(path), size=16, **options)
    return {
        str(Path(str(one["file"])).relative_to(path)): one.get("caption") for one in folder.batch(range(len(folder)))[1]
    }


# pictures


def test_pictures_are_upright(tmp_path: Path) -> None:
    """The eight orientations of EXIF all show the same scene."""
    scene = np.zeros((24, 32, 3), np.uint8)
    scene[:12, :16], scene[:12, 16:], scene[12:, :16] = (255, 0, 0), (0, 255, 0), (0, 0, 255)
    stored = {  # what the camera stores, so that turning it as the tag says gives the scene
        1: scene,
        2: scene[:, ::-1],
        3: scene[::-1, ::-1],
        4: scene[::-1],
        5: scene.transpose(1, 0, 2),
        6: np.rot90(scene, 1),
        7: scene[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(scene, -1),
    }
    for orientation, pixels in stored.items():
        exif = Pillow.Exif()
        exif[0x0112] = orientation
        Pillow.fromarray(np.ascontiguousarray(pixels)).save(tmp_path / "a.png", exif=exif)
        assert np.array_equal(fitted(tmp_path / "a.png", (24, 32)), scene), orientation


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_sixteen_bits_are_scaled_and_not_clipped(tmp_path: Path, share: float) -> None:
    Pillow.fromarray(np.full((16, 16), round(65535 * share), np.uint16)).save(tmp_path / "a.png")
    assert np.unique(fitted(tmp_path / "a.png", (16, 16))).tolist() == [int(255 * share)]


def test_dark_sixteen_bits_stay_dark(tmp_path: Path) -> None:
    Pillow.fromarray(np.full((16, 16), 200, np.uint16)).save(tmp_path / "a.png")  # of 65535
    assert fitted(tmp_path / "a.png", (16, 16)).max() == 0


@pytest.mark.parametrize(
    ("white", "dtype"), [(1.0, np.float32), (255.0, np.float32), (255, np.int32), (65535, np.int32)]
)
def test_whatever_white_is_called_it_is_white(tmp_path: Path, white: float, dtype: type) -> None:
    values = np.zeros((16, 16), dtype)
    values[:, 8:] = white
    Pillow.fromarray(values).save(tmp_path / "a.tif")
    image = fitted(tmp_path / "a.tif", (16, 16))
    assert image[:, :8].max() == 0 and image[:, 8:].min() == 255


@pytest.mark.parametrize("alpha", [0, 128, 255])
def test_what_is_transparent_lies_on_white(tmp_path: Path, alpha: int) -> None:
    save(tmp_path / "a.png", (*RED, alpha), mode="RGBA")
    expected = [value * alpha / 255 + 255 * (1 - alpha / 255) for value in RED]
    assert np.abs(fitted(tmp_path / "a.png", (16, 16)) - np.array(expected)).max() <= 1


def test_a_palette_with_a_transparent_colour_lies_on_white(tmp_path: Path) -> None:
    image = halves().quantize(2)
    image.save(tmp_path / "a.gif", transparency=image.getpixel((0, 0)))
    image_read = fitted(tmp_path / "a.gif", (16, 16))
    assert image_read[:, :8].min() == 255
    assert np.abs(image_read[:, 8:].astype(int) - BLUE).max() <= 2


@pytest.mark.parametrize(
    ("mode", "colour", "seen"),
    [
        ("CMYK", (0, 255, 255, 0), (255, 0, 0)),
        ("L", 77, (77, 77, 77)),
        ("1", 1, (255, 255, 255)),
        ("LA", (10, 255), (10, 10, 10)),
    ],
)
def test_other_modes_are_colour(tmp_path: Path, mode: str, colour: Any, seen: tuple[int, int, int]) -> None:
    save(tmp_path / "a.tif", colour, mode=mode)
    assert (fitted(tmp_path / "a.tif", (16, 16)) == np.array(seen)).all()


def test_a_cmyk_jpeg_is_not_inverted(tmp_path: Path) -> None:
    save(tmp_path / "a.jpg", (0, 255, 255, 0), mode="CMYK", quality=95)
    assert np.abs(fitted(tmp_path / "a.jpg", (16, 16)).astype(int) - (255, 0, 0)).max() <= 4


def test_pictures_cover_the_size_and_are_cropped_in_the_middle(tmp_path: Path) -> None:
    image = Pillow.new("RGB", (60, 20), RED)
    image.paste(BLUE, (20, 0, 40, 20))
    image.save(tmp_path / "a.png")
    assert (fitted(tmp_path / "a.png", (20, 20)) == np.array(BLUE)).all()
    tall = fitted(tmp_path / "a.png", (40, 10))  # twice as high, so 120 px wide, of which the middle ten
    assert tall.shape == (40, 10, 3) and (tall == np.array(BLUE)).all()


@pytest.mark.parametrize("suffix", ["png", "JPG", "jpeg", "webp", "bmp", "gif", "tif", "TIFF"])
def test_every_format_is_found_whatever_the_case(tmp_path: Path, suffix: str) -> None:
    save(tmp_path / f"a.{suffix}", format={"JPG": "JPEG", "tif": "TIFF"}.get(suffix))
    assert len(Folder(str(tmp_path), size=16)) == 1


def test_a_picture_is_its_first_frame(tmp_path: Path) -> None:
    Pillow.new("RGB", (16, 16), RED).save(
        tmp_path / "a.gif", save_all=True, append_images=[Pillow.new("RGB", (16, 16), BLUE)]
    )
    assert np.abs(fitted(tmp_path / "a.gif", (16, 16)).astype(int) - RED).max() <= 2


def test_mirroring_doubles_the_pictures(tmp_path: Path) -> None:
    for name in ("a", "b"):
        halves().save(tmp_path / f"{name}.png")
    folder = Folder(str(tmp_path), size=16, mirror=True)
    assert len(folder) == 4
    assert np.array_equal(folder[2].image, folder[0].image[:, ::-1]) and not np.array_equal(
        folder[0].image, folder[2].image
    )
    assert folder[3].fields == folder[1].fields
    with pytest.raises(IndexError):
        folder[4]


@pytest.mark.parametrize("memory", [0, 1, 512])
def test_what_is_kept_in_memory_changes_nothing_but_reading(
    tmp_path: Path, memory: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for i in range(6):
        save(tmp_path / f"{i}.png", (i, i, i))
    from sfumato.data import folder as module

    reads: list[Path] = []
    monkeypatch.setattr(module, "fitted", lambda path, shape: reads.append(path) or fitted(path, shape))
    folder = Folder(str(tmp_path), size=300, memory=memory)  # 0.26 MiB each
    for _ in range(2):
        assert [folder[i].image[0, 0, 0] for i in range(6)] == list(range(6))
    assert len(reads) == {0: 12, 1: 12, 512: 6}[memory]
    assert len(folder._kept) == {0: 0, 1: 3, 512: 6}[memory]


# captions


def test_captions_lie_beside_their_pictures(tmp_path: Path) -> None:
    for name, text in {"a": "a red circle\n", "b": "\ufeffa blue square", "c": "  \n"}.items():
        save(tmp_path / f"{name}.png")
        (tmp_path / f"{name}.txt").write_text(text, encoding="utf-8")
    save(tmp_path / "d.png")
    assert captions(tmp_path) == {"a.png": "a red circle", "b.png": "a blue square", "c.png": None, "d.png": None}
    assert list(Folder(str(tmp_path), size=16).captions()) == ["a red circle", "a blue square"]


@pytest.mark.parametrize("key", ["text", "caption", "prompt"])
def test_captions_come_from_jsonl(tmp_path: Path, key: str) -> None:
    save(tmp_path / "a.png")
    save(tmp_path / "in" / "b.png")
    rows = [{"file_name": "./a.png", key: "a red circle"}, {"file_name": "in\\b.png", key: "ein grüner Kreis"}]
    text = "\ufeff" + "\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n"
    (tmp_path / "metadata.jsonl").write_text(text, encoding="utf-8")
    assert captions(tmp_path) == {"a.png": "a red circle", "in/b.png": "ein grüner Kreis"}


def test_captions_come_from_csv(tmp_path: Path) -> None:
    for name in "abc":
        save(tmp_path / f"{name}.png")
    table = '\ufefffile_name,text,other\r\na.png,"a red circle, left of\na blue square",1\r\nb.png,,2\r\nc.png\r\n'
    (tmp_path / "metadata.csv").write_text(table, encoding="utf-8", newline="")
    assert captions(tmp_path) == {"a.png": "a red circle, left of\na blue square", "b.png": None, "c.png": None}


def test_class_folders_are_labels_and_captions(tmp_path: Path) -> None:
    for name in ("red_fox/1.png", "red_fox/2.png", "badger/deep/3.png"):
        save(tmp_path / name)
    folder = Folder(str(tmp_path), size=16)
    assert folder.classes == ("badger", "red_fox")
    assert [(one["label"], one["caption"]) for one in folder.batch(range(3))[1]] == [
        (0, "badger"),
        (1, "red fox"),
        (1, "red fox"),
    ]
    save(tmp_path / "loose.png")
    assert Folder(str(tmp_path), size=16).classes == ()


def test_a_class_of_broken_pictures_is_no_class(tmp_path: Path) -> None:
    save(tmp_path / "b" / "1.png")
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "1.png").touch()
    folder = Folder(str(tmp_path), size=16, unreadable="skip")
    assert folder.classes == ("b",)
    assert folder[0].fields["label"] == 0


def test_where_captions_come_from_can_be_said(tmp_path: Path) -> None:
    save(tmp_path / "fox" / "a.png")
    (tmp_path / "fox" / "a.txt").write_text("beside")
    (tmp_path / "metadata.csv").write_text("file_name,text\nfox/a.png,in the table\n")
    found = {
        source: captions(tmp_path, captions_from=source)["fox/a.png"]
        for source in ("auto", "metadata", "sidecar", "class", "none")
    }
    assert found == {
        "auto": "in the table",
        "metadata": "in the table",
        "sidecar": "beside",
        "class": "fox",
        "none": None,
    }
    (tmp_path / "metadata.csv").unlink()
    assert captions(tmp_path)["fox/a.png"] == "beside"
    assert "no captions in metadata" in str(caught(tmp_path, captions_from="metadata"))


def test_names_are_names_in_any_alphabet_and_spelling(tmp_path: Path) -> None:
    composed, apart = unicodedata.normalize("NFC", "é猫 ü.png"), unicodedata.normalize("NFD", "é猫 ü.png")
    assert composed != apart
    save(tmp_path / apart)
    (tmp_path / "metadata.jsonl").write_text(json.dumps({"file_name": composed, "text": "une猫"}), encoding="utf-8")
    assert captions(tmp_path) == {apart: "une猫"}


# faults


def png_chunks_cut(path: Path, share: float) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])


@pytest.fixture
def broken(tmp_path: Path) -> Path:
    """Two good pictures among six that are not."""
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    for name in ("good.png", "also.jpg", "half.png", "half.jpg"):
        Pillow.fromarray(noise).save(tmp_path / name)
    png_chunks_cut(tmp_path / "half.png", 0.5)
    png_chunks_cut(tmp_path / "half.jpg", 0.5)
    (tmp_path / "empty.png").touch()
    (tmp_path / "text.jpg").write_text("I am a picture")
    (tmp_path / "gone.png").symlink_to(tmp_path / "nowhere.png")
    save(tmp_path / "words.png")
    (tmp_path / "words.txt").write_bytes(b"\xff\xfea red circle")
    (tmp_path / "folder.png").mkdir()  # a folder, whatever its name says
    (tmp_path / ".thumbs").mkdir()
    save(tmp_path / ".thumbs" / "hidden.png")
    return tmp_path


def test_what_can_be_seen_to_be_broken_is_named(broken: Path) -> None:
    error = caught(broken)
    assert error.what == "4 of 8 pictures cannot be used"
    assert error.fix == "data.unreadable=skip, or remove them"
    for part in (
        "empty.png: the file is empty",
        "text.jpg: not a picture",
        "gone.png: No such file",
        "words.txt, is not UTF-8",
    ):
        assert part in error.seen


def test_broken_pictures_are_left_out_however_broken(broken: Path) -> None:
    folder = Folder(str(broken), size=16, unreadable="skip")
    assert [entry.path.name for entry in folder.entries] == ["also.jpg", "good.png"]
    assert sorted(path.name for path, _ in folder.found[1]) == [
        "empty.png",
        "gone.png",
        "half.jpg",
        "half.png",
        "text.jpg",
        "words.png",
    ]
    assert folder.batch([0, 1])[0].shape == (2, 16, 16, 3)


def test_a_truncated_picture_is_named_when_it_is_read(broken: Path) -> None:
    for name in ("empty.png", "text.jpg", "gone.png", "words.png"):
        (broken / name).unlink()
    folder = Folder(str(broken), size=16)
    assert len(folder) == 4
    with pytest.raises(DataError) as error:
        folder.batch(range(4))
    assert error.value.where == str(broken / "half.jpg") and "truncated" in str(error.value.seen)


@pytest.mark.parametrize("whole", [False, True])
def test_heads_that_lie_are_faults_and_no_crash(tmp_path: Path, whole: bool) -> None:
    """A PNG that claims 100,000 x 100,000 px: a decompression bomb."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0))
    (tmp_path / "bomb.png").write_bytes(
        b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    )
    said = fault(tmp_path / "bomb.png", whole=whole)
    assert said is not None and "decompression bomb" in said


def test_a_folder_of_nothing_usable_says_why(tmp_path: Path) -> None:
    for i in range(7):
        (tmp_path / f"{i}.png").touch()
    error = caught(tmp_path, unreadable="skip")
    assert error.what == "no picture of this folder can be used"
    assert error.seen.startswith("0.png: the file is empty; 1.png") and error.seen.endswith("; and 2 more")


def test_folders_that_are_not_there_or_hold_no_pictures(tmp_path: Path) -> None:
    assert caught(tmp_path / "no").what == "there is no such folder"
    assert caught(tmp_path).seen == "an empty folder"
    (tmp_path / "notes.md").touch()
    assert caught(tmp_path).seen == "1 other files: notes.md"
    assert caught(tmp_path / "notes.md").what == "this is no folder"


@pytest.mark.parametrize(
    ("name", "content", "where", "what"),
    [
        ("metadata.jsonl", '{"file_name": "a.png", "text": "a"}\n\n{"file_name": ', "line 3", "not JSON"),
        ("metadata.jsonl", '["a.png", "a"]', "line 1", "is an object"),
        ("metadata.jsonl", '{"file": "a.png", "text": "a"}', "line 1", "needs file_name and text"),
        ("metadata.jsonl", '{"file_name": "a.png", "label": "a"}', "line 1", "needs file_name and text"),
        ("metadata.csv", "file_name;text\na.png;a\n", "line 2", "needs file_name and text"),
        ("metadata.csv", '"file_name","text\nin two lines"\na.png,"a\nb"\n', "line 4", "needs file_name and text"),
        ("metadata.csv", b"file_name,text\na.png,\xff\xfe\n", "metadata.csv", "cannot be read"),
        ("metadata.csv", "file_name,text\na.png," + "x" * 200_000, "metadata.csv", "cannot be read"),
        ("metadata.jsonl", b"\xff\xfe{", "metadata.jsonl", "cannot be read"),
    ],
)
def test_faults_of_metadata_are_told_by_line(
    tmp_path: Path, name: str, content: str | bytes, where: str, what: str
) -> None:
    save(tmp_path / "a.png")
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    error = caught(tmp_path)
    assert what in error.what and error.where.endswith(where) and name in error.where


def test_metadata_that_names_what_is_not_there(tmp_path: Path) -> None:
    save(tmp_path / "a.png")
    (tmp_path / "metadata.csv").write_text("file_name,text\na.png,a\nb.png,b\n/etc/c.png,c\n")
    error = caught(tmp_path)
    assert error.what == "2 of 3 pictures cannot be used"
    assert "b.png: named in the metadata, but not there" in error.seen
    assert captions(tmp_path, unreadable="skip") == {"a.png": "a"}


@pytest.mark.parametrize("size", [7, (16, 4), 0])
def test_sizes_that_cannot_be_are_refused(tmp_path: Path, size: Any) -> None:
    save(tmp_path / "a.png")
    with pytest.raises(ConfigError) as error:
        Folder(str(tmp_path), size=size)
    assert error.value.where == "data.size"


# Pictures beside pictures


def test_a_field_may_be_a_picture_of_the_same_name(tmp_path: Path) -> None:
    for name, suffix in (("photos", ".png"), ("edges", ".jpg")):
        (tmp_path / name / "cats").mkdir(parents=True)
        for i in range(3):
            left = Pillow.new("RGB", (16, 16), (40 * i, 0, 200 if name == "edges" else 0))
            left.paste((255, 255, 255), (0, 0, 8, 16))
            left.save(tmp_path / name / "cats" / f"{i}{suffix}", quality=95)
    data = Folder(str(tmp_path / "photos"), size=16, mirror=True, beside={"edges": str(tmp_path / "edges")})
    for i in (0, 2, 3, 5):
        edges = data[i].fields["edges"]
        assert isinstance(edges, np.ndarray) and edges.shape == (16, 16, 3) and edges.dtype == np.uint8
        dark = edges[:, 12] if i < 3 else edges[:, 3]  # mirrored with its picture
        assert np.abs(dark.astype(int) - (40 * (i % 3), 0, 200)).max() < 12
        assert (np.asarray(data.fields([i])[0]["edges"]) == edges).all()
    (tmp_path / "edges" / "cats" / "1.jpg").unlink()
    with pytest.raises(DataError, match=r"cats/1\.png"):
        Folder(str(tmp_path / "photos"), size=16, beside={"edges": str(tmp_path / "edges")})

"""A folder of one's own pictures. Captions come from `metadata.jsonl` or `metadata.csv` (columns file_name and text,
the Hugging Face "imagefolder" convention), from `picture.txt` beside `picture.png`, or, without either, from the names
of class folders.

Pictures are turned upright (EXIF), freed of transparency on white, scaled until they cover the asked-for size, and
cropped to it in the middle.
"""

import csv
import json
import os
import threading
import unicodedata
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image as Pillow
from PIL import ImageOps, UnidentifiedImageError

from sfumato.data.picture import Fields, Image, Picture
from sfumato.errors import ConfigError, DataError

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"})
CAPTION_KEYS = ("text", "caption", "prompt")
ROW = '{"file_name": "a.png", "text": "a red circle"}'
READERS = 4  # threads that look at files; decoding gives up the interpreter's lock


@dataclass(frozen=True)
class Entry:
    """A picture's file and what is known of it."""

    path: Path
    caption: str | None
    label: int | None


class Look(NamedTuple):
    """What a first look at a picture gave: why it cannot be used, or its sidecar's text where it has one."""

    fault: str | None
    text: str | None


@dataclass(frozen=True)
class Folder:
    """Pictures in a folder and the folders within.

    path: the folder. size: one side, or (height, width). captions: where they come from, by default whatever is there.
    unreadable: "error" stops at a broken file; "skip" reads every file whole at the start, and leaves broken ones out.
    mirror: every picture also mirrored (not for
    captions that speak of left and right). memory: MiB of decoded pictures to keep in memory.
    beside: fields that are pictures, too, {"edges": FOLDER}: of each picture the one that has its name there, whatever
    its suffix.
    """

    path: str
    size: int | tuple[int, int] = 256
    captions_from: Literal["auto", "sidecar", "metadata", "class", "none"] = "auto"
    unreadable: Literal["error", "skip"] = "error"
    mirror: bool = False
    memory: int = 512
    beside: Mapping[str, str] = field(default_factory=dict)
    _kept: "OrderedDict[Path, Image]" = field(default_factory=OrderedDict, init=False, repr=False, compare=False)
    _guard: threading.Lock = field(default_factory=threading.Lock, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if min(self.shape) < 8:
            raise ConfigError("pictures are at least 8 px", where="data.size", seen=str(self.size), fix="data.size=64")
        if not self.entries:
            raise DataError(
                "no picture of this folder can be used",
                where=self.path,
                seen=_named(Path(self.path).expanduser(), self.found[1]),
                fix="a folder with pictures that other programs open",
            )
        _ = self._beside  # whose faults are told now, and not in the middle of training

    @property
    def shape(self) -> tuple[int, int]:
        """Height and width."""
        return (self.size, self.size) if isinstance(self.size, int) else (self.size[0], self.size[1])

    @cached_property
    def found(self) -> tuple[list[Entry], list[tuple[Path, str]]]:
        """Every picture that can be read, and what is wrong with the others. Whole with "skip", else by their heads."""
        root = Path(self.path).expanduser()
        if not root.is_dir():
            what = "this is no folder" if root.exists() else "there is no such folder"
            raise DataError(what, where="data.path", seen=str(root), fix="data.path=A_FOLDER_OF_PICTURES")
        paths = sorted(path for path in root.rglob("*") if _is_picture(path, root))
        if not paths:
            raise DataError(
                "the folder holds no pictures",
                where=str(root),
                seen=_contents(root),
                fix=f"pictures ending in {', '.join(sorted(SUFFIXES))}",
            )
        entries, faults = self._sorted_out(root, paths)
        if faults and self.unreadable == "error":
            raise DataError(
                f"{len(faults)} of {len(entries) + len(faults)} pictures cannot be used",
                where=str(root),
                seen=_named(root, faults),
                fix="data.unreadable=skip, or remove them",
            )
        return entries, faults

    @cached_property
    def entries(self) -> list[Entry]:
        return self.found[0]

    @cached_property
    def classes(self) -> tuple[str, ...]:
        """The names of the class folders, if the pictures lie in such."""
        root = Path(self.path).expanduser()
        parents = {
            entry.relative_to(root).parts[0]
            for entry in (e.path for e in self.entries)
            if len(entry.relative_to(root).parts) > 1
        }
        loose = any(len(e.path.relative_to(root).parts) == 1 for e in self.entries)
        return tuple(sorted(parents)) if parents and not loose else ()

    def __len__(self) -> int:
        return len(self.entries) * (2 if self.mirror else 1)

    def __getitem__(self, index: int) -> Picture:
        if not 0 <= index < len(self):
            raise IndexError(f"picture {index} of {len(self)}")
        mirrored, place = divmod(index, len(self.entries))
        entry = self.entries[place]
        return Picture(self._image(entry.path, bool(mirrored)), self._fields(entry, bool(mirrored)))

    def batch(self, indices: Sequence[int]) -> tuple[Image, list[Fields]]:
        """Images (B, H, W, 3) uint8 and their fields."""
        pictures = [self[int(index)] for index in indices]
        return np.stack([picture.image for picture in pictures]), [picture.fields for picture in pictures]

    def fields(self, indices: Sequence[int]) -> list[Fields]:
        """The fields of some pictures, without reading these."""
        places = (divmod(int(index), len(self.entries)) for index in indices)
        return [self._fields(self.entries[place], bool(mirrored)) for mirrored, place in places]

    def identity(self) -> str:
        """Names, sizes and times of the files, and what is made of them; captions do not count."""
        root = Path(self.path).expanduser()
        looks = [(entry.path.relative_to(root).as_posix(), entry.path.stat()) for entry in self.entries]
        listed = [(name, seen.st_size, seen.st_mtime_ns) for name, seen in looks]
        return json.dumps({"kind": "folder", "shape": self.shape, "mirror": self.mirror, "files": listed})

    def captions(self) -> Iterator[str]:
        """Every caption there is."""
        return (entry.caption for entry in self.entries if entry.caption)

    def _fields(self, entry: Entry, mirrored: bool) -> Fields:
        fields = {"caption": entry.caption, "label": entry.label, "file": str(entry.path)}
        known = {name: value for name, value in fields.items() if value is not None}
        return known | {name: self._image(path, mirrored) for name, path in self._beside.get(entry.path, {}).items()}

    @cached_property
    def _beside(self) -> dict[Path, dict[str, Path]]:
        """Of each picture, those that belong to it, by field. DataError where one is missing."""
        root, found = Path(self.path).expanduser(), dict[Path, dict[str, Path]]()
        for name, folder in self.beside.items():
            there = Path(folder).expanduser()
            paths = {_key(path.relative_to(there).with_suffix("")): path for path in there.rglob("*")}
            for entry in self.entries:
                other = paths.get(_key(entry.path.relative_to(root).with_suffix("")))
                if other is None or not _is_picture(other, there):
                    seen = f"none for {inside(root, entry.path)}"
                    raise DataError("a picture beside is missing", where=f"data.beside.{name}: {there}", seen=seen)
                found.setdefault(entry.path, {})[name] = other
        return found

    def _image(self, path: Path, mirrored: bool) -> Image:
        image = self._read(path)
        return np.ascontiguousarray(image[:, ::-1]) if mirrored else image

    def _read(self, path: Path) -> Image:
        with self._guard:
            if path in self._kept:
                self._kept.move_to_end(path)
                return self._kept[path]
        try:
            image = fitted(path, self.shape)
        except Exception as error:  # whatever a decoder makes of foreign bytes
            fix = "data.unreadable=skip, or remove it"
            raise DataError("a picture cannot be read", where=str(path), seen=reason(error), fix=fix) from error
        with self._guard:
            self._kept[path] = image
            while len(self._kept) * image.nbytes > self.memory * 2**20:
                self._kept.popitem(last=False)
        return image

    def _sorted_out(self, root: Path, paths: list[Path]) -> tuple[list[Entry], list[tuple[Path, str]]]:
        table = _metadata(root) if self.captions_from in ("auto", "metadata") else {}
        if self.captions_from == "metadata" and not table:
            raise DataError(
                "there are no captions in metadata.jsonl or metadata.csv",
                where=str(root),
                fix="data.captions_from=auto",
            )
        with ThreadPoolExecutor(READERS) as readers:
            looks = list(readers.map(lambda path: self._look(path, _key(path.relative_to(root)) in table), paths))
        faults = [(path, look.fault) for path, look in zip(paths, looks, strict=True) if look.fault]
        there = {_key(path.relative_to(root)) for path in paths}
        faults += [(root / name, "named in the metadata, but not there") for name in table if name not in there]
        usable = [(path, look.text) for path, look in zip(paths, looks, strict=True) if not look.fault]
        names = sorted({path.relative_to(root).parts[0] for path, _ in usable if path.parent != root})
        return [self._entry(path, path.relative_to(root), table, text, names) for path, text in usable], faults

    def _look(self, path: Path, told: bool) -> "Look":
        """A picture and its sidecar, which is read unless the metadata has told the caption."""
        why, sidecar = fault(path, whole=self.unreadable == "skip"), path.with_suffix(".txt")
        if why or told or self.captions_from not in ("auto", "sidecar") or not sidecar.is_file():
            return Look(why, None)
        try:
            return Look(None, sidecar.read_text(encoding="utf-8-sig").strip())
        except (OSError, UnicodeDecodeError) as error:
            return Look(f"its caption, {sidecar.name}, is not UTF-8 text: {reason(error)}", None)

    def _entry(self, path: Path, inner: Path, table: Mapping[str, str], text: str | None, names: list[str]) -> Entry:
        label = names.index(inner.parts[0]) if len(inner.parts) > 1 else None
        caption = table.get(_key(inner), text)
        if caption is None and self.captions_from in ("auto", "class") and label is not None:
            caption = inner.parts[0].replace("_", " ")
        return Entry(path, caption or None, label)


def fitted(path: Path, shape: tuple[int, int]) -> Image:
    """A picture file as (H, W, 3) uint8 of this shape: upright, on white, scaled to cover it, cropped in the middle."""
    with Pillow.open(path) as opened:
        image = _coloured(ImageOps.exif_transpose(opened))
        small = ImageOps.fit(image, (shape[1], shape[0]), Pillow.Resampling.LANCZOS)
        return np.array(small, np.uint8)


def fault(path: Path, *, whole: bool) -> str | None:
    """Why a file is no picture, or None; `whole` decodes all of it, otherwise its head must do."""
    try:
        if path.stat().st_size == 0:
            return "the file is empty"
        with Pillow.open(path) as image:
            if whole:
                _coloured(ImageOps.exif_transpose(image))
        return None
    except UnidentifiedImageError:
        return "not a picture, whatever its name says"
    except Exception as error:  # whatever a decoder makes of foreign bytes
        return reason(error)


def reason(error: Exception) -> str:
    """What a decoder or the system says, without the path, which is told beside it."""
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


def _coloured(image: Pillow.Image) -> Pillow.Image:
    """RGB on white. 16 and 32 bits a pixel are scaled down: `convert` would clip them."""
    if image.mode.startswith(("I", "F")):
        values = np.asarray(image, np.float64)
        return Pillow.fromarray((values * (255 / _white(image.mode, values))).clip(0, 255).astype(np.uint8)).convert(
            "RGB"
        )
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Pillow.new("RGBA", image.size, (255, 255, 255, 255))
        return Pillow.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def _white(mode: str, values: NDArray[np.float64]) -> float:
    """The value of white: known for 16 bits, guessed from the largest value for 32 bits and for floats."""
    if mode.startswith("I;16"):
        return 65535
    most = values.max()
    if mode == "F":
        return 1 if most <= 1 else 255
    return 65535 if most > 255 else 255


def _is_picture(path: Path, root: Path) -> bool:
    hidden = any(part[0] == "." for part in path.relative_to(root).parts)
    return path.suffix.lower() in SUFFIXES and not hidden and not path.is_dir()


def _key(path: Path) -> str:
    """A path as metadata and the disk can be compared: some systems store accents apart from their letters."""
    return unicodedata.normalize("NFC", path.as_posix())


def _metadata(root: Path) -> dict[str, str]:
    """Captions by file name, relative to the folder."""
    jsonl, table = root / "metadata.jsonl", root / "metadata.csv"
    path, rows = (jsonl, _json_rows) if jsonl.is_file() else (table, _csv_rows)
    if not path.is_file():
        return {}
    found = {}
    try:
        for number, row in rows(path):
            key = next((key for key in CAPTION_KEYS if key in row), None)
            if key is None or "file_name" not in row:
                raise DataError(
                    "metadata needs file_name and text",
                    where=f"{path}, line {number}",
                    seen=", ".join(map(str, row)),
                    fix=ROW if path == jsonl else "file_name,text in the first line",
                )
            found[_key(Path(str(row["file_name"]).replace("\\", "/")))] = str(row[key] or "").strip()
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(
            "metadata cannot be read", where=str(path), seen=reason(error), fix="save it as UTF-8"
        ) from None
    return found


def _csv_rows(path: Path) -> Iterator[tuple[int, Mapping[str, object]]]:
    """The rows of a table, each with the number of its (last) line."""
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file)
        for row in reader:
            yield reader.line_num, row


def _json_rows(path: Path) -> Iterator[tuple[int, Mapping[str, object]]]:
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").split("\n"), 1):
        if line.strip():
            yield number, _object(line, f"{path}, line {number}")


def _object(line: str, where: str) -> Mapping[str, object]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError("this line is not JSON", where=where, seen=str(error), fix=ROW) from None
    if not isinstance(row, dict):
        raise DataError("a line of metadata is an object", where=where, seen=line[:60], fix=ROW)
    return row


def _named(root: Path, faults: Iterable[tuple[Path, str]]) -> str:
    """The first few faults, by file, and how many more there are."""
    rows = [f"{inside(root, path)}: {why}" for path, why in faults]
    return "; ".join(rows[:5]) + (f"; and {len(rows) - 5} more" if len(rows) > 5 else "")


def inside(root: Path, path: Path) -> str:
    """A path as seen from the folder, for people; metadata can name one that lies elsewhere."""
    return os.path.relpath(path, root)


def _contents(root: Path) -> str:
    names = sorted(path.name for path in root.iterdir())
    return f"{len(names)} other files: {', '.join(names[:5])}" if names else "an empty folder"

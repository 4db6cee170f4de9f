"""A folder of one's own pictures. Captions come from `picture.txt` beside `picture.png`, from `metadata.jsonl` or
`metadata.csv` (columns file_name and text, the Hugging Face "imagefolder" convention), or, without either, from the
names of class folders.

Pictures are turned upright (EXIF), freed of transparency on white, scaled until they cover the asked-for size, and
cropped to it in the middle.
"""

import csv
import json
import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image as Pillow
from PIL import ImageOps, UnidentifiedImageError

from sfumato.data.picture import Fields, Image, Picture
from sfumato.errors import ConfigError, DataError

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"})
CAPTION_KEYS = ("text", "caption", "prompt")


@dataclass(frozen=True)
class Entry:
    """A picture's file and what is known of it."""

    path: Path
    caption: str | None
    label: int | None


@dataclass(frozen=True)
class Folder:
    """Pictures in a folder and the folders within.

    path: the folder. size: one side, or (height, width). captions: where they come from, by default whatever is there.
    unreadable: "error" stops at a broken file, "skip" leaves it out. mirror: every picture also mirrored (not for
    captions that speak of left and right). cache: MiB of decoded pictures to keep in memory.
    """

    path: str
    size: int | tuple[int, int] = 256
    captions_from: Literal["auto", "sidecar", "metadata", "class", "none"] = "auto"
    unreadable: Literal["error", "skip"] = "error"
    mirror: bool = False
    cache: int = 512
    _kept: "OrderedDict[int, Image]" = field(default_factory=OrderedDict, init=False, repr=False, compare=False)
    _guard: threading.Lock = field(default_factory=threading.Lock, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if min(self.shape) < 8:
            raise ConfigError("pictures are at least 8 px", where="data.size", seen=str(self.size), fix="data.size=64")
        if not self.entries:
            raise DataError(
                "no picture of this folder can be used", where=self.path, fix=f"sfumato data check {self.path}"
            )

    @property
    def shape(self) -> tuple[int, int]:
        """Height and width."""
        return (self.size, self.size) if isinstance(self.size, int) else (self.size[0], self.size[1])

    @cached_property
    def found(self) -> tuple[list[Entry], list[tuple[Path, str]]]:
        """Every picture whose head can be read, and the others with the reason."""
        root = Path(self.path).expanduser()
        if not root.is_dir():
            raise DataError(
                "there is no such folder", where="data.path", seen=str(root), fix="data.path=A_FOLDER_OF_PICTURES"
            )
        files = sorted(
            p
            for p in root.rglob("*")
            if p.suffix.lower() in SUFFIXES and not any(part[0] == "." for part in p.relative_to(root).parts)
        )
        if not files:
            raise DataError(
                "the folder holds no pictures",
                where=str(root),
                seen=_contents(root),
                fix=f"pictures ending in {', '.join(sorted(SUFFIXES))}",
            )
        faults = [(path, fault) for path in files if (fault := _fault(path))]
        if faults and self.unreadable == "error":
            named = "; ".join(f"{path.relative_to(root)}: {why}" for path, why in faults[:5])
            raise DataError(
                f"{len(faults)} of {len(files)} pictures cannot be read",
                where=str(root),
                seen=named,
                fix="data.unreadable=skip, or remove them",
            )
        broken = {path for path, _ in faults}
        return self._captioned(root, [path for path in files if path not in broken]), faults

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
        entry, image = self.entries[place], self._image(place)
        fields = {"caption": entry.caption, "label": entry.label, "file": str(entry.path)}
        known = {name: value for name, value in fields.items() if value is not None}
        return Picture(np.ascontiguousarray(image[:, ::-1]) if mirrored else image, known)

    def batch(self, indices: Sequence[int]) -> tuple[Image, list[Fields]]:
        """Images (B, H, W, 3) uint8 and their fields."""
        pictures = [self[int(index)] for index in indices]
        return np.stack([picture.image for picture in pictures]), [picture.fields for picture in pictures]

    def captions(self) -> Iterator[str]:
        """Every caption there is."""
        return (entry.caption for entry in self.entries if entry.caption)

    def _image(self, place: int) -> Image:
        with self._guard:
            if place in self._kept:
                self._kept.move_to_end(place)
                return self._kept[place]
        try:
            image = fitted(self.entries[place].path, self.shape)
        except (OSError, SyntaxError, ValueError, Pillow.DecompressionBombError) as error:
            path = str(self.entries[place].path)
            raise DataError(
                "a picture cannot be read", where=path, seen=str(error), fix=f"sfumato data check {self.path}"
            ) from error
        with self._guard:
            self._kept[place] = image
            while len(self._kept) * image.nbytes > self.cache * 2**20:
                self._kept.popitem(last=False)
        return image

    def _captioned(self, root: Path, paths: list[Path]) -> list[Entry]:
        table = _metadata(root) if self.captions_from in ("auto", "metadata") else {}
        if self.captions_from == "metadata" and not table:
            raise DataError(
                "there is no metadata.jsonl or metadata.csv", where=str(root), fix="data.captions_from=auto"
            )
        names = sorted({path.relative_to(root).parts[0] for path in paths if len(path.relative_to(root).parts) > 1})
        return [self._entry(root, path, table, names) for path in paths]

    def _entry(self, root: Path, path: Path, table: Mapping[str, str], names: list[str]) -> Entry:
        inner, sidecar = path.relative_to(root), path.with_suffix(".txt")
        label = names.index(inner.parts[0]) if len(inner.parts) > 1 else None
        caption = table.get(inner.as_posix())
        if caption is None and self.captions_from in ("auto", "sidecar") and sidecar.is_file():
            caption = sidecar.read_text(encoding="utf-8", errors="replace").strip()
        if caption is None and self.captions_from in ("auto", "class") and label is not None:
            caption = inner.parts[0].replace("_", " ")
        return Entry(path, caption or None, label)


def fitted(path: Path, shape: tuple[int, int]) -> Image:
    """A picture file as (H, W, 3) uint8 of this shape: upright, on white, scaled to cover it, cropped in the middle."""
    with Pillow.open(path) as opened:
        image = _coloured(ImageOps.exif_transpose(opened))
        small = ImageOps.fit(image, (shape[1], shape[0]), Pillow.Resampling.LANCZOS)
        return np.array(small, np.uint8)


def _coloured(image: Pillow.Image) -> Pillow.Image:
    if image.mode.startswith(("I", "F")):  # 16 and 32 bits a pixel: `convert` would clip them
        values = np.asarray(image, np.float64)
        top = 65535 if image.mode.startswith("I") and values.max() > 255 else 255
        return Pillow.fromarray((values * (255 / top)).clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Pillow.new("RGBA", image.size, (255, 255, 255, 255))
        return Pillow.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def _fault(path: Path) -> str | None:
    """Why a file is no picture, as far as its head tells; `sfumato data check` decodes it all."""
    if path.stat().st_size == 0:
        return "the file is empty"
    try:
        with Pillow.open(path) as image:
            return None if min(image.size) > 0 else "it has no pixels"
    except UnidentifiedImageError:
        return "not a picture, whatever its name says"
    except (OSError, SyntaxError, ValueError, Pillow.DecompressionBombError) as error:
        return str(error)


def _metadata(root: Path) -> dict[str, str]:
    """Captions by file name, relative to the folder."""
    jsonl, table = root / "metadata.jsonl", root / "metadata.csv"
    rows: list[tuple[str, Mapping[str, object]]] = []
    if jsonl.is_file():
        for number, line in enumerate(jsonl.read_text(encoding="utf-8").splitlines(), 1):
            if line.strip():
                rows.append((f"{jsonl}, line {number}", _object(line, f"{jsonl}, line {number}")))
    elif table.is_file():
        with table.open(encoding="utf-8-sig", newline="") as file:
            rows = [(f"{table}, line {number}", dict(row)) for number, row in enumerate(csv.DictReader(file), 2)]
    found = {}
    for where, row in rows:
        key = next((key for key in CAPTION_KEYS if key in row), None)
        if key is None or "file_name" not in row:
            raise DataError(
                "metadata needs file_name and text",
                where=where,
                seen=", ".join(map(str, row)),
                fix='{"file_name": "a.png", "text": "a red circle"}',
            )
        found[Path(str(row["file_name"])).as_posix()] = str(row[key] or "").strip()
    return found


def _object(line: str, where: str) -> Mapping[str, object]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise DataError(
            "this line is not JSON", where=where, seen=str(error), fix='{"file_name": "a.png", "text": "a red circle"}'
        ) from None
    if not isinstance(row, dict):
        raise DataError(
            "a line of metadata is an object",
            where=where,
            seen=line[:60],
            fix='{"file_name": "a.png", "text": "a red circle"}',
        )
    return row


def _contents(root: Path) -> str:
    names = sorted(path.name for path in root.iterdir())
    return f"{len(names)} other files: {', '.join(names[:5])}" if names else "an empty folder"

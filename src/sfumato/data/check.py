"""What a data source holds, told before a run is spent on it."""

import hashlib
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image as Pillow
from PIL.ExifTags import Base

from sfumato.data.folder import Folder, fault, inside
from sfumato.data.order import indices
from sfumato.data.picture import Dataset

LOOKED_AT = 500  # pictures of a source that makes them
ORIENTATION = Base.Orientation


@dataclass
class Report:
    """Counts of what is there and of what is wrong. `ok` when training can begin."""

    pictures: int = 0
    size: tuple[int, int] = (0, 0)
    captioned: int = 0
    words: int = 0
    longest: str = ""
    classes: list[str] = field(default_factory=list)
    formats: dict[str, int] = field(default_factory=dict)
    file_sizes: list[str] = field(default_factory=list)
    enlarged: int = 0
    duplicates: list[list[str]] = field(default_factory=list)
    unreadable: list[tuple[str, str]] = field(default_factory=list)
    uncaptioned: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return self.pictures > 0 and not self.unreadable and not self.uncaptioned

    def as_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return {"ok": self.ok, **asdict(self)}


def report(dataset: Dataset) -> Report:
    """Looks at a source: every file of a folder is decoded; of others some captions are looked at."""
    some = indices(0, min(len(dataset), LOOKED_AT), len(dataset), 0).tolist()
    own = isinstance(dataset, Folder)
    captions = list(dataset.captions()) if own else [str(dataset[i].fields.get("caption") or "") for i in some]
    words = {word for text in captions for word in text.lower().split()}
    found = Report(
        pictures=len(dataset), size=dataset.shape, words=len(words), longest=max(captions, key=len, default="")
    )
    found.captioned = len(dataset) if any(captions) else 0
    found.classes = list(getattr(dataset, "classes", ()))
    if isinstance(dataset, Folder):
        _files(dataset, found)
    return found


def _files(folder: Folder, found: Report) -> None:
    root, height, width = Path(folder.path).expanduser(), *folder.shape
    found.unreadable = [(inside(root, path), why) for path, why in folder.found[1]]
    sizes, contents, formats = Counter[str](), dict[str, list[str]](), Counter[str]()
    for entry in folder.entries:
        name = inside(root, entry.path)
        why = None if folder.unreadable == "skip" else fault(entry.path, whole=True)  # "skip" has decoded them
        if why:
            found.unreadable.append((name, why))
            continue
        with Pillow.open(entry.path) as image:
            formats[image.format or "?"] += 1
            w, h = image.size if image.getexif().get(ORIENTATION, 1) < 5 else image.size[::-1]
            sizes[f"{w}x{h}"] += 1
            found.enlarged += w < width or h < height
        contents.setdefault(hashlib.sha256(entry.path.read_bytes()).hexdigest(), []).append(name)
        if entry.caption is None:
            found.uncaptioned.append(name)
    found.pictures = sum(formats.values())
    found.captioned = found.pictures - len(found.uncaptioned)
    if not found.captioned:  # a folder without any is one for a model without conditions
        found.uncaptioned = []
    found.formats, found.file_sizes = dict(formats), [f"{size} ({n})" for size, n in sizes.most_common(8)]
    found.duplicates = [names for names in contents.values() if len(names) > 1]

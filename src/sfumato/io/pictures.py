"""PNGs that carry how they were made, in two text chunks: `sfumato`, exact JSON, and `parameters`, the line that other tools
(A1111's and those after it) write and read.
"""

import json
import re
import unicodedata
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image as Pillow
from PIL.PngImagePlugin import PngInfo

from sfumato.data.picture import Image
from sfumato.errors import DataError


def save_png(path: Path, image: Image, settings: Mapping[str, Any]) -> None:
    """Writes (H, W, 3) uint8 with its settings; refuses to overwrite (FileExistsError)."""
    info = PngInfo()
    info.add_itxt("parameters", parameters(settings))
    info.add_itxt("sfumato", json.dumps(dict(settings), ensure_ascii=False))
    with Path(path).open("xb") as file:
        Pillow.fromarray(np.ascontiguousarray(image)).save(file, "PNG", pnginfo=info)


def read_settings(path: Path) -> dict[str, Any]:
    """The settings that a picture of ours carries; DataError if it has none."""
    with Pillow.open(path) as image:
        text = getattr(image, "text", {}).get("sfumato")
    if text is None:
        raise DataError("this picture does not say how it was made", where=str(path), fix="a PNG written by sfumato sample")
    return dict(json.loads(text))


def parameters(settings: Mapping[str, Any]) -> str:
    """The settings as other tools write them: the prompt, then one line of `Name: value` pairs."""
    names = {"Steps": "steps", "Sampler": "sampler", "Schedule type": "grid", "CFG scale": "guidance", "Seed": "seed"}
    said = {name: _name(settings[key]) for name, key in names.items() if key in settings}
    if "size" in settings:
        height, width = settings["size"]
        said["Size"] = f"{width}x{height}"
    said |= {"RNG": "CPU", "Version": f"sfumato {settings.get('version', '')}".strip()}
    line = ", ".join(f"{name}: {value}" for name, value in said.items())
    negative = f"\nNegative prompt: {settings['negative']}" if settings.get("negative") else ""
    return f"{settings.get('prompt') or ''}{negative}\n{line}"


def _name(value: Any) -> Any:
    return value.get("kind", value) if isinstance(value, Mapping) else value


def slug(text: str, most: int = 80) -> str:
    """A file name of a prompt: letters, digits and dashes, at most `most` bytes, never empty, never a path."""
    plain = unicodedata.normalize("NFKC", text).lower()
    name = re.sub(r"[^\w]+", "-", plain, flags=re.UNICODE).strip("-_")
    return name.encode()[:most].decode(errors="ignore").rstrip("-_") or "picture"


def unused(folder: Path, stem: str, suffix: str = ".png") -> Path:
    """A path in the folder that nothing has yet: stem-0000.png, stem-0001.png, ..."""
    number = 0
    while (path := folder / f"{stem}-{number:04d}{suffix}").exists():
        number += 1
    return path

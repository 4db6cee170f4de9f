"""PNGs that carry how they were made, in two text chunks: `sfumato`, exact JSON, and `parameters`, the line that
other tools (A1111's and those after it) write and read.
"""

import io
import json
import re
import unicodedata
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image as Pillow
from PIL import UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo

from sfumato.data.picture import Image
from sfumato.errors import DataError, MachineError
from sfumato.files import write_atomic

NOT_OURS = "a PNG written by sfumato sample, not since saved by another program"


def png(image: Image, settings: Mapping[str, Any]) -> bytes:
    """A PNG file of (H, W, 3) uint8 with its settings in it; they must be plain data."""
    info, file = PngInfo(), io.BytesIO()
    info.add_text("parameters", parameters(settings))
    info.add_text("sfumato", json.dumps(dict(settings), default=_plain, allow_nan=False))
    Pillow.fromarray(np.ascontiguousarray(image)).save(file, "PNG", pnginfo=info)
    return file.getvalue()


def save_png(path: Path, image: Image, settings: Mapping[str, Any]) -> None:
    """Writes a picture with its settings, whole or not at all; refuses to overwrite (FileExistsError)."""
    path, data = Path(path), png(image, settings)
    try:
        path.open("xb").close()  # the name is ours from here on
    except FileExistsError:
        raise
    except OSError as error:
        raise MachineError(
            "cannot write here", where=str(path), seen=error.strerror or str(error), fix="another folder"
        ) from None
    try:
        write_atomic(path, data)
    except BaseException:
        path.unlink(missing_ok=True)
        raise


def read_settings(path: Path) -> dict[str, Any]:
    """The settings that a picture of ours carries; DataError if it has none, or is no picture."""
    try:
        with Pillow.open(path) as image:
            text = getattr(image, "text", {}).get("sfumato")
    except UnidentifiedImageError:
        raise DataError("this is no picture", where=str(path), fix=NOT_OURS) from None
    except (OSError, SyntaxError, ValueError, Pillow.DecompressionBombError) as error:
        # a SyntaxError is Pillow's word for a broken PNG, a ValueError for one with too much text in it
        raise DataError("this picture cannot be read", where=str(path), seen=str(error)) from None
    if text is None:
        raise DataError("this picture does not say how it was made", where=str(path), fix=NOT_OURS)
    try:
        return dict(json.loads(text))
    except (ValueError, TypeError, RecursionError) as error:
        raise DataError(
            "this picture's settings cannot be read", where=str(path), seen=str(error), fix=NOT_OURS
        ) from None


def parameters(settings: Mapping[str, Any]) -> str:
    """The settings as other tools write them: the prompt, then one line of `Name: value` pairs."""
    names = {"Steps": "steps", "Sampler": "sampler", "Schedule type": "grid", "CFG scale": "guidance", "Seed": "seed"}
    names["Denoising strength"] = "strength"
    said = {name: _name(settings[key]) for name, key in names.items() if key in settings}
    if "size" in settings:
        height, width = settings["size"]
        said["Size"] = f"{width}x{height}"
    if run := dict(settings.get("model") or {}).get("run"):
        said["Model"] = run
    said |= {"RNG": "CPU", "Version": f"sfumato {settings.get('version', '')}".strip()}
    line = ", ".join(f"{name}: {_quoted(value)}" for name, value in said.items())
    negative = f"\nNegative prompt: {settings['negative']}" if settings.get("negative") else ""
    text = f"{settings.get('prompt') or ''}{negative}\n{line}"
    return text.encode(errors="replace").decode()


def slug(text: str, most: int = 80) -> str:
    """A file name of a prompt: letters, digits and dashes, at most `most` bytes, never empty, never a path."""
    plain = unicodedata.normalize("NFKC", text).lower()
    name = re.sub(r"[^\w]+", "-", plain).strip("-_")
    return name.encode()[:most].decode(errors="ignore").rstrip("-_") or "picture"


def unused(folder: Path, stem: str, suffix: str = ".png", start: int = 0) -> Path:
    """A path in the folder that nothing has yet: stem-0000.png, stem-0001.png, ..., counted from `start`."""
    number = start
    while (path := folder / f"{stem}-{number:04d}{suffix}").exists():
        number += 1
    return path


def _name(value: Any) -> Any:
    return value.get("kind", value) if isinstance(value, Mapping) else value


def _quoted(value: Any) -> str:
    """As the grammar wants it: what would be taken for its punctuation stands in JSON's quotes."""
    text = str(value)
    return json.dumps(text, ensure_ascii=False) if re.search(r"[,:\n]", text) else text


def _plain(value: Any) -> Any:
    """A number of another library as a number; anything else as text."""
    return value.item() if hasattr(value, "item") else str(value)

"""What a pipeline drew: the pictures, each with all that is needed to draw it again."""

import contextlib
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image as Pillow

from sfumato.data.picture import Image
from sfumato.data.sheet import sheet
from sfumato.errors import MachineError
from sfumato.io.pictures import save_png, slug, unused


class Samples(NamedTuple):
    """Pictures (N, H, W, 3) uint8, and for each all that is needed to draw it again."""

    images: Image
    settings: list[dict[str, Any]]

    def save(self, folder: str | Path) -> list[Path]:
        """Writes each as a PNG named after its prompt, overwriting nothing; the paths. MachineError where it cannot."""
        place, paths, next_numbers = Path(folder), list[Path](), dict[str, int]()
        try:
            place.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise MachineError(
                "cannot make this folder", where=str(place), seen=error.strerror, fix="another folder"
            ) from None
        for image, settings in zip(self.images, self.settings, strict=True):
            stem = slug(str(settings.get("prompt") or "picture"))
            while True:
                path = unused(place, stem, start=next_numbers.get(stem, 0))
                next_numbers[stem] = int(path.stem.rpartition("-")[2]) + 1
                with contextlib.suppress(FileExistsError):  # another process was faster: the next number
                    save_png(path, image, settings)
                    break
            paths.append(path)
        return paths

    def grid(self, columns: int | None = None) -> Pillow.Image:
        """All of them on one sheet, with their prompts."""
        return sheet(list(self.images), [str(one.get("prompt") or "") for one in self.settings], columns=columns)

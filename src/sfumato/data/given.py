"""Pictures that people give, as arrays of one size: a path, a Pillow picture, an array; and what records say of them.

A record holds the path of a picture, or a digest of its pixels where there is no path: never the pixels themselves.
"""

from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image as Pillow
from PIL import ImageOps, UnidentifiedImageError

from sfumato.data.folder import fitted
from sfumato.data.picture import Image
from sfumato.errors import DataError


def is_picture(value: object) -> bool:
    """Whether a value of a raw field is a picture in memory."""
    return isinstance(value, (np.ndarray, Pillow.Image))


def given(source: Any, size: tuple[int, int], where: str = "image") -> Image:
    """Any kind of picture as (H, W, 3) uint8, scaled to cover (height, width) and cropped in the middle.

    where: the field or option, for errors. DataError for what is no picture.
    """
    try:
        if isinstance(source, (str, Path)):
            return fitted(Path(source).expanduser(), size)
        if isinstance(source, np.ndarray) and source.dtype == np.uint8 and source.shape == (*size, 3):
            return source
        picture = source if isinstance(source, Pillow.Image) else Pillow.fromarray(np.asarray(source))
        small = ImageOps.fit(picture.convert("RGB"), (size[1], size[0]), Pillow.Resampling.LANCZOS)
        return np.array(small, np.uint8)
    except FileNotFoundError:
        raise DataError("there is no such picture", where=str(source), fix="the path of a PNG or JPEG") from None
    except (UnidentifiedImageError, OSError, SyntaxError, TypeError, ValueError) as error:
        seen = f"{type(source).__name__}: {error}" if is_picture(source) else f"{str(source)[:200]}: {error}"
        raise DataError("this is no picture that can be read", where=where, seen=seen) from None


def recorded(value: object) -> Any:
    """A raw field's value as a record holds it: a picture by its path or its digest, all else as it is."""
    if isinstance(value, Path):
        return str(value)
    if not is_picture(value):
        return value
    pixels = np.ascontiguousarray(np.asarray(value))
    told = f"{pixels.shape} {pixels.dtype}".encode()
    return f"sha256:{sha256(told + pixels.tobytes()).hexdigest()[:16]}"

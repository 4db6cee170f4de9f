"""What sampling starts from beside noise: a picture to change, and a mask of what may change.

Image-to-image starts part of the way, from the picture with the noise of that time (SDEdit: Meng et al. 2022). For
inpainting the model's answer is replaced by the picture where that is known: so each sampler's own step carries the
known region along with the noise of each time, and ends on the picture itself.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image as Pillow
from PIL import ImageOps, UnidentifiedImageError
from torch import Tensor

from sfumato.codecs import Codec
from sfumato.data.folder import fitted
from sfumato.data.picture import Image
from sfumato.denoiser import Bound
from sfumato.errors import ConfigError, DataError


@dataclass(frozen=True)
class Begin:
    """images (N, H, W, 3) uint8, one for each picture; mask (H, W) bool, True where it may change, or None for all;
    strength: the share of the steps that is made, 1 for all of them.
    """

    images: Image
    mask: np.ndarray[Any, np.dtype[np.bool_]] | None
    strength: float

    def part(self, start: int, stop: int) -> "Begin":
        return Begin(self.images[start:stop], self.mask, self.strength)

    def encoded(self, codec: Codec, device: torch.device) -> Tensor:
        """The pictures as the network sees them."""
        pixels = torch.from_numpy(self.images).to(device).permute(0, 3, 1, 2).float() / 127.5 - 1
        return codec.encode(pixels)

    def free(self, like: Tensor) -> Tensor | None:
        """The mask for encoded states (1, 1, h, w): 1 where any pixel may change, 0 where all are known."""
        if self.mask is None:
            return None
        mask = torch.from_numpy(self.mask)[None, None].float()
        return torch.nn.functional.adaptive_max_pool2d(mask, like.shape[-2:]).to(like)

    def restored(self, drawn: Image) -> Image:
        """The drawn pictures with what was known put back, pixel by pixel."""
        return drawn if self.mask is None else np.where(self.mask[None, :, :, None], drawn, self.images)


def begin(image: Any, mask: Any, strength: float | None, n: int, size: tuple[int, int]) -> Begin | None:
    """What was asked for, checked: None where there is no picture to start from.

    image: a path, a Pillow picture or an array (H, W, 3) uint8, or one of these for each of n. mask: likewise, one;
    white is redrawn. strength: by default 1 with a mask, and 0.6 else.
    """
    if image is None:
        if mask is not None or strength is not None:
            what = "a mask and a strength need a picture to start from"
            raise ConfigError(what, where="image", seen="none", fix="image=picture.png")
        return None
    chosen = strength if strength is not None else (0.6 if mask is None else 1.0)
    if isinstance(chosen, bool) or not isinstance(chosen, (int, float)) or not 0 < chosen <= 1:
        raise ConfigError(
            "a strength lies above 0 and up to 1", where="strength", seen=repr(chosen), fix="strength=0.6"
        )
    several = isinstance(image, Sequence) and not isinstance(image, str)
    given = list(image) if several else [image] * n
    if len(given) != n:
        raise ConfigError("one picture, or one for each prompt", where="image", seen=f"{len(given)} for {n} prompts")
    images = np.stack([_picture(one, size) for one in given])
    free = None if mask is None else _picture(mask, size).mean(-1) > 127
    if free is not None and not free.any():
        raise DataError("the mask leaves nothing to draw: white is redrawn", where="mask", seen="all black")
    return Begin(images, free, float(chosen))


def known_where(denoise: Bound, known: Tensor, free: Tensor) -> Bound:
    """The same denoiser, which knows the answer wherever `free` is 0."""

    def fn(x: Tensor, t: float | Tensor) -> Tensor:
        return torch.lerp(known, denoise(x, t), free)

    return Bound(denoise.path, fn)


def _picture(source: Any, size: tuple[int, int]) -> Image:
    """Any kind of picture as (H, W, 3) uint8, fitted to a size."""
    try:
        if isinstance(source, (str, Path)):
            return fitted(Path(source).expanduser(), size)
        picture = source if isinstance(source, Pillow.Image) else Pillow.fromarray(np.asarray(source))
        small = ImageOps.fit(picture.convert("RGB"), (size[1], size[0]), Pillow.Resampling.LANCZOS)
        return np.array(small, np.uint8)
    except FileNotFoundError:
        raise DataError("there is no such picture", where=str(source), fix="the path of a PNG or JPEG") from None
    except (UnidentifiedImageError, OSError, SyntaxError, TypeError, ValueError) as error:
        raise DataError("this is no picture that can be read", where=str(source)[:200], seen=str(error)) from None

"""What sampling starts from beside noise: a picture to change, and a mask of what may change.

Image-to-image starts part of the way, from the picture with the noise of that time (SDEdit: Meng et al. 2022). For
inpainting the model's answer is replaced by the picture where that is known: so each sampler's own step carries the
known region along with the noise of each time, and ends on the picture itself. What is encoded already, or is a step of
another model's walk, is taken as it is: so a refiner goes on where a base model stopped.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from numbers import Real
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sfumato.codecs import Codec
from sfumato.data.given import given
from sfumato.data.picture import Image
from sfumato.denoiser import Bound
from sfumato.errors import ConfigError, DataError
from sfumato.samplers import Step


@dataclass(frozen=True)
class Begin:
    """images: (N, H, W, 3) uint8, one for each picture, or (N, ...) as a codec encodes them; mask (H, W) bool, True
    where it may change, or None for all; strength: the share of the steps that is made, 1 for all of them. told: the
    model is told the picture and the mask, and needs no help on the way. time: that of the noise which is in `images`.
    """

    images: Image | Tensor
    mask: np.ndarray[Any, np.dtype[np.bool_]] | None
    strength: float
    told: bool = False
    time: float | None = None

    def part(self, start: int, stop: int) -> "Begin":
        return replace(self, images=self.images[start:stop])

    def times(self, grid: Tensor) -> Tensor:
        """What is left of a grid (n + 1,) of falling times."""
        if self.time is None:
            n = len(grid) - 1
            return grid[n - max(1, round(n * self.strength)) :]
        left = grid[grid < self.time * (1 - 1e-9)]  # of the very time is what is there already
        return torch.cat([grid.new_tensor([self.time]), left])

    @property
    def from_noise(self) -> bool:
        """Whether nothing of the picture is in what sampling starts from."""
        return self.told and self.strength == 1

    def encoded(self, codec: Codec, device: torch.device) -> Tensor:
        """The pictures as the network sees them."""
        if isinstance(self.images, Tensor):
            return self.images.to(device).float()
        pixels = torch.from_numpy(self.images).to(device).permute(0, 3, 1, 2).float() / 127.5 - 1
        return codec.encode(pixels)

    def free(self, like: Tensor) -> Tensor | None:
        """The mask for encoded states (1, 1, h, w): 1 where any pixel may change, 0 where all are known."""
        if self.mask is None or self.told:
            return None
        mask = torch.from_numpy(self.mask)[None, None].float()
        return torch.nn.functional.adaptive_max_pool2d(mask, like.shape[-2:]).to(like)

    def restored(self, drawn: Image) -> Image:
        """The drawn pictures with what was known put back, pixel by pixel."""
        if self.mask is None or isinstance(self.images, Tensor):
            return drawn
        return np.where(self.mask[None, :, :, None], drawn, self.images)


def begin(
    image: Any, mask: Any, strength: float | None, n: int, size: tuple[int, int], usual: float | None = None
) -> Begin | None:
    """What was asked for, checked: None where there is no picture to start from.

    image: a path, a Pillow picture or an array (H, W, 3) uint8, or one of these for each of n; or encoded pictures
    (1 or n, ...), which the codec's states are; or a `Step` of a model on the same path, whose state is gone on with
    from its time. mask: a picture likewise, one; white is redrawn. strength: by default `usual`, which a model
    recommends; where it says nothing, 1 with a mask, and 0.6 else.
    """
    if image is None:
        if mask is not None or strength is not None:
            what = "a mask and a strength need a picture to start from"
            raise ConfigError(what, where="image", seen="none", fix="image=picture.png")
        return None
    own = usual if usual is not None else (0.6 if mask is None else 1.0)
    chosen = strength if strength is not None else own
    check_strength(chosen)
    if isinstance(image, (Tensor, Step)):
        return _encoded(image, mask, strength, float(chosen), n)
    images = np.stack([given(one, size) for one in one_each(image, n)])
    free = None if mask is None else given(mask, size, "mask").mean(-1) > 127
    if free is not None and not free.any():
        raise DataError("the mask leaves nothing to draw: white is redrawn", where="mask", seen="all black")
    return Begin(images, free, float(chosen))


def check_strength(value: object) -> None:
    """ConfigError for what is no strength."""
    if isinstance(value, bool) or not isinstance(value, Real) or not 0 < float(value) <= 1:
        raise ConfigError("a strength lies above 0 and up to 1", where="strength", seen=repr(value), fix="strength=0.6")


def _encoded(image: Tensor | Step, mask: Any, strength: float | None, chosen: float, n: int) -> Begin:
    """What is encoded already, for each of n."""
    if mask is not None:
        seen = "what is encoded already"
        raise ConfigError("a mask needs the picture itself", where="mask", seen=seen, fix="image=picture.png")
    if isinstance(image, Step) and strength is not None:
        what = "a step has its noise, and says where to begin"
        raise ConfigError(what, where="strength", seen=repr(strength), fix="no strength, or image=step.x0")
    states = image.x if isinstance(image, Step) else image
    if len(states) not in (1, n):
        raise ConfigError("one picture, or one for each prompt", where="image", seen=f"{len(states)} for {n} prompts")
    if isinstance(image, Step) and image.t <= 0:
        raise ConfigError("this step is the last, which nothing follows", where="image", seen="t = 0", fix="step.x")
    time = image.t if isinstance(image, Step) else None
    return Begin(states.detach().expand(n, *states.shape[1:]), None, chosen, time=time)


def one_each(image: Any, n: int) -> list[Any]:
    """A picture for each of n, from one for all or a sequence of them."""
    several = isinstance(image, Sequence) and not isinstance(image, str)
    each = list(image) if several else [image] * n
    if len(each) != n:
        raise ConfigError("one picture, or one for each prompt", where="image", seen=f"{len(each)} for {n} prompts")
    return each


def known_where(denoise: Bound, known: Tensor, free: Tensor) -> Bound:
    """The same denoiser, which knows the answer wherever `free` is 0."""

    def fn(x: Tensor, t: float | Tensor, **asked: Any) -> Tensor:
        answer = denoise(x, t, **asked)
        said, more = answer[:, : x.shape[1]], answer[:, x.shape[1] :]  # the channels of a learned variance, if any
        return torch.cat([torch.lerp(known, said, free), more], 1)

    return Bound(denoise.path, fn, denoise.answers)

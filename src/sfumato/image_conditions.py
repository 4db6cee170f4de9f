"""Pictures as conditions: beside x_t, channel by channel, or as vectors that the network attends to.

What tells a network of places (a layout, a smaller picture, what is to stay) is concatenated to its input: each place
sees its own (SR3: Saharia et al. 2021; Palette: Saharia et al. 2022; latent diffusion: Rombach et al. 2022). What tells
it of content or style is read into vectors that stand in the context, as words do (IP-Adapter: Ye et al. 2023).
"""

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from PIL import Image as Pillow
from torch import Generator, Tensor, nn

from sfumato.codecs import Codec, Latents
from sfumato.conditioners import Conditioner, Raw
from sfumato.data.given import given
from sfumato.data.picture import Image
from sfumato.denoiser import CONCAT, Cond
from sfumato.errors import ConfigError, DataError
from sfumato.nets.controlled import HINT, SCALE
from sfumato.prompts import EncoderBlock

Size = tuple[int, int]


class OfPictures(Conditioner):
    """The base of conditioners that read pictures. size: of the model's pictures; codec: what encodes them."""

    def __init__(self, *fields: str, kept: bool) -> None:
        super().__init__()
        self.fields = self.pictures = fields
        self.kept = fields if kept else ()
        self.size: Size = (0, 0)
        self._codec: list[Codec] = []  # not a module of this one: its weights are the model's
        self.here: Tensor
        self.register_buffer("here", torch.empty(0), persistent=False)

    def of_size(self, size: Size) -> None:
        self.size = size

    def of_codec(self, codec: Codec) -> None:
        self._codec = [codec]

    @property
    def codec(self) -> Codec:
        """What encodes the model's pictures."""
        if not self._codec:
            raise ConfigError("a conditioner of pictures needs a model around it", where="model.conditioner")
        return self._codec[0]

    def seen_at(self, size: Size) -> Size:
        """The size at which pictures are read for a model's pictures of this size."""
        return size

    def sized(self, raw: Sequence[Raw], size: Size) -> list[Raw]:
        return [{**one, **self._read(one, size)} for one in raw]

    def check(self, raw: Sequence[Raw]) -> None:
        for one in raw:
            self._read(one, self.size)

    def _read(self, one: Raw, size: Size) -> dict[str, Image]:
        """The pictures that are there, fitted to a size."""
        there = {name: one[name] for name in self.fields if one.get(name) is not None}
        return {name: given(value, self.seen_at(size), name) for name, value in there.items()}

    def stacked(self, images: Sequence[Image], where: str) -> Tensor:
        """Pictures as (B, 3, H, W) in [0, 1] on the conditioner's device; DataError where they differ in size."""
        if len({image.shape for image in images}) > 1:
            seen = ", ".join(sorted({f"{image.shape[0]}x{image.shape[1]}" for image in images}))
            raise DataError("pictures of a batch have one size", where=where, seen=seen)
        pixels = torch.from_numpy(np.stack(images)).to(self.here.device)
        return pixels.permute(0, 3, 1, 2).float().div(255).contiguous()

    def encoded(self, pixels: Tensor, shifted: bool = True) -> Tensor:
        """Pictures (B, 3, H, W) in [-1, 1] as the network sees them; nothing of it is learned. See `encoded`."""
        place = pixels.device
        if isinstance(self.codec, nn.Module):  # which may lie elsewhere
            place = next((p.device for p in self.codec.parameters()), place)
        with torch.no_grad(), torch.autocast(place.type, enabled=False):
            return encoded(pixels.to(place), self.codec, shifted=shifted).to(pixels.device)

    def read(self, raw: Sequence[Raw], field: str) -> list[Image | None]:
        """A field's pictures: arrays are taken as they are, all else is read at the model's size."""
        found: list[Image | None] = []
        for one in raw:
            value = one.get(field)
            whole = isinstance(value, np.ndarray) and value.dtype == np.uint8 and value.ndim == 3
            found.append(value if whole or value is None else given(value, self.seen_at(self.size), field))  # type: ignore[arg-type]
        return found


class ImageMap(OfPictures):
    """A picture concatenated to x_t. Cond: concat (B, channels, h, w); the null condition is zeros.

    through: "codec", as the model's own pictures are encoded, or "pixels", its three colours at the size of x_t.
    shrink: for super-resolution, how many times smaller than the model's pictures it is; it is enlarged (bicubic)
    before it is encoded, and where the data has no such field, training makes it of the picture itself.
    kept: it stays where guidance compares with no condition, and training never hides it; so for super-resolution.
    """

    def __init__(
        self,
        *,
        field: str = "image",
        through: Literal["codec", "pixels"] = "codec",
        shrink: int = 1,
        kept: bool | None = None,
    ) -> None:
        super().__init__(field, kept=shrink > 1 if kept is None else kept)
        if shrink < 1:
            raise ConfigError("a picture shrinks by 1 or more", where="model.conditioner.shrink", seen=str(shrink))
        if through not in ("codec", "pixels"):
            where = "model.conditioner.through"
            raise ConfigError("a picture comes in no such way", where=where, seen=through, fix="codec")
        self.field, self.through, self.shrink = field, through, shrink
        self.channels = 3

    def of_codec(self, codec: Codec) -> None:
        super().of_codec(codec)
        self.channels = codec.channels if self.through == "codec" else 3

    def of_size(self, size: Size) -> None:
        super().of_size(size)
        if any(side % self.shrink for side in size):
            seen = f"{size[0]}x{size[1]} by {self.shrink}"
            raise ConfigError("a picture shrinks to whole pixels", where="model.conditioner.shrink", seen=seen)

    def seen_at(self, size: Size) -> Size:
        return max(1, size[0] // self.shrink), max(1, size[1] // self.shrink)

    def examples(self, images: Image | None, raw: Sequence[Raw], rng: Generator) -> list[Raw]:
        if self.shrink == 1:
            return list(raw)
        if images is None:
            return _all_there(raw, self.field)
        small = self.seen_at((images.shape[1], images.shape[2]))
        own = [self._read(one, (images.shape[1], images.shape[2])) for one in raw]
        made = [{self.field: shrunk(image, small)} for image in images]
        return [{**one, **(told or new)} for one, told, new in zip(raw, own, made, strict=True)]

    def forward(self, raw: Sequence[Raw]) -> Cond:
        found = self.read(raw, self.field)
        there = [image for image in found if image is not None]
        if not there:
            return {CONCAT: torch.zeros(len(raw), self.channels, 1, 1, device=self.here.device)}
        maps = self._maps(self.stacked(there, self.field))
        if len(there) == len(raw):
            return {CONCAT: maps}
        out = maps.new_zeros(len(raw), *maps.shape[1:])
        out[[i for i, image in enumerate(found) if image is not None]] = maps
        return {CONCAT: out}

    def _maps(self, pixels: Tensor) -> Tensor:
        pixels = 2 * pixels - 1
        if self.shrink > 1:
            pixels = nn.functional.interpolate(pixels, scale_factor=self.shrink, mode="bicubic").clamp(-1, 1)
        if self.through == "codec":
            return self.encoded(pixels)
        size = self.codec.shape(pixels.shape[2], pixels.shape[3])[1:]
        same = size == tuple(pixels.shape[2:])
        return pixels if same else nn.functional.interpolate(pixels, size, mode="bilinear", antialias=True)


class Inpainting(OfPictures):
    """A picture and a mask, white where it is drawn anew. Cond: concat (B, 1 + C, h, w): the mask, then the picture
    without what is masked, encoded. So Stable Diffusion's nine channels: latents, mask, masked latents.

    whole: the mask keeps all its pixels, as channels behind the picture's, (B, C + f^2, h, w) where the codec makes f x
    f pixels a place (FLUX.1 Fill). Both stay where guidance compares with no condition. Where there is no picture, all
    is masked. Training masks its pictures itself: everything in a quarter of them, else up to four rectangles (Rombach
    et al. 2022, section 4.5).
    """

    def __init__(self, *, image: str = "image", mask: str = "mask", whole: bool = False) -> None:
        super().__init__(image, mask, kept=True)
        self.image, self.mask, self.whole = image, mask, whole

    def of_codec(self, codec: Codec) -> None:
        super().of_codec(codec)
        self.channels = codec.channels + (factor_of(codec) ** 2 if self.whole else 1)

    def sized(self, raw: Sequence[Raw], size: Size) -> list[Raw]:
        return [{**one, **(self._read(one, size) or self._nothing(size))} for one in raw]

    def check(self, raw: Sequence[Raw]) -> None:
        for one in raw:
            there = [name for name in self.fields if one.get(name) is not None]
            if len(there) == 1:
                lacks = self.mask if there[0] == self.image else self.image
                raise DataError("inpainting takes a picture and a mask", where="prompts", seen=f"no {lacks}")
        super().check(raw)

    def examples(self, images: Image | None, raw: Sequence[Raw], rng: Generator) -> list[Raw]:
        if images is None:
            return _all_there(raw, self.image)
        masks = [_rectangles(image.shape[0], image.shape[1], rng) for image in images]
        made = [{self.image: image, self.mask: mask} for image, mask in zip(images, masks, strict=True)]
        return [one if self.image in one else {**one, **own} for one, own in zip(raw, made, strict=True)]

    def forward(self, raw: Sequence[Raw]) -> Cond:
        found = [self.read(raw, name) for name in (self.image, self.mask)]
        sizes = [image.shape for image in found[0] if image is not None]
        nothing = self._nothing((sizes[0][0], sizes[0][1]) if sizes else self.size)
        pixels, masks = (
            self.stacked([nothing[name] if image is None else image for image in images], name)
            for name, images in zip((self.image, self.mask), found, strict=True)
        )
        free = (masks.mean(1, keepdim=True) >= 0.5).float()
        latents = self.encoded((2 * pixels - 1) * (1 - free))
        if self.whole:
            inside = nn.functional.pixel_unshuffle(free, free.shape[2] // latents.shape[2])
            return {CONCAT: torch.cat([latents, inside], 1)}
        return {CONCAT: torch.cat([nn.functional.interpolate(free, latents.shape[2:]), latents], 1)}

    def _nothing(self, size: Size) -> dict[str, Image]:
        return {self.image: np.zeros((*size, 3), np.uint8), self.mask: np.full((*size, 3), 255, np.uint8)}


class ImageTokens(OfPictures):
    """A picture as vectors for the context, by a small transformer over its patches that learns with the network.

    Cond: context (B, (side / patch)^2, dim). side: what pictures are scaled to; patch: pixels a side of each. The null
    condition is one learned vector in every place.
    """

    def __init__(
        self,
        *,
        field: str = "image",
        side: int = 32,
        patch: int = 8,
        dim: int = 128,
        depth: int = 2,
        heads: int = 4,
        kept: bool = False,
    ) -> None:
        super().__init__(field, kept=kept)
        where = "model.conditioner"
        if patch < 1 or side < patch or side % patch:
            raise ConfigError("a side divides into patches", where=f"{where}.patch", seen=f"{side} by {patch}")
        if dim < 1 or heads < 1 or dim % heads:
            raise ConfigError("a width divides into heads", where=f"{where}.heads", seen=f"dim {dim}, heads {heads}")
        self.field, self.side, self.context_dim = field, side, dim
        self.patches = nn.Conv2d(3, dim, patch, stride=patch)
        self.place = nn.Parameter(torch.randn((side // patch) ** 2, dim) / 2)
        self.blocks = nn.ModuleList(EncoderBlock(dim, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(dim)
        self.absent = nn.Parameter(torch.randn(dim) / dim**0.5)

    def seen_at(self, size: Size) -> Size:
        return self.side, self.side

    def forward(self, raw: Sequence[Raw]) -> Cond:
        found = [
            None if image is None else given(image, (self.side, self.side)) for image in self.read(raw, self.field)
        ]
        blank = np.zeros((self.side, self.side, 3), np.uint8)
        pixels = self.stacked([blank if image is None else image for image in found], self.field)
        x = self.patches(2 * pixels - 1).flatten(2).mT + self.place
        for block in self.blocks:
            x = block(x)
        there = torch.tensor([image is not None for image in found]).to(x.device)
        return {"context": torch.where(there[:, None, None], self.norm(x), self.absent.to(x.dtype))}


class Hint(OfPictures):
    """The picture that a network's own ControlNet reads. Cond: hint (B, 3, H, W) in [0, 1], or encoded (B, C, h, w);
    and hint_scale (B,) where some have none.

    through: "pixels" for controls of U-Nets; "codec" for those of transformers, "unshifted" for such as have latents
    without the codec's shift, "stretched" for such as were trained on 127.5 x + 0.5 of pixels x in [0, 1]. It stays
    where guidance compares with no condition, as published controls are used.
    """

    def __init__(
        self,
        *,
        field: str = "control",
        through: Literal["pixels", "codec", "unshifted", "stretched"] = "pixels",
    ) -> None:
        super().__init__(field, kept=True)
        if through not in ("pixels", "codec", "unshifted", "stretched"):
            where = "model.conditioner.through"
            raise ConfigError("a picture comes in no such way", where=where, seen=through, fix="pixels")
        self.field, self.through = field, through

    def forward(self, raw: Sequence[Raw]) -> Cond:
        found = self.read(raw, self.field)
        there = [image for image in found if image is not None]
        if not there:
            return {}
        blank = np.zeros_like(there[0])
        pixels = self.stacked([blank if image is None else image for image in found], self.field)
        values = stretched(pixels) if self.through == "stretched" else 2 * pixels - 1
        hint = pixels if self.through == "pixels" else self.encoded(values, self.through != "unshifted")
        if len(there) == len(raw):
            return {HINT: hint}
        return {HINT: hint, SCALE: torch.tensor([float(image is not None) for image in found]).to(pixels.device)}


def factor_of(codec: Codec) -> int:
    """Pixels a side of a place of a codec's maps."""
    side = 1024  # a multiple of all
    return side // codec.shape(side, side)[1]


def stretched(pixels: Tensor) -> Tensor:
    """Pixels in [0, 1] as Stability AI's control for edges was trained on them, far outside of what codecs are for."""
    return 127.5 * pixels + 0.5


def encoded(pixels: Tensor, codec: Codec, *, shifted: bool = True) -> Tensor:
    """Pictures (B, 3, H, W) in [-1, 1] encoded; without the codec's shift unless `shifted`, if it has one."""
    z = codec.encode(pixels)
    return z if shifted or not isinstance(codec, Latents) else z + codec.shift * codec.scale


def shrunk(image: Image, size: Size) -> Image:
    """A picture (H, W, 3) at a smaller (height, width), antialiased."""
    return np.array(Pillow.fromarray(image).resize((size[1], size[0]), Pillow.Resampling.BICUBIC), np.uint8)


def _all_there(raw: Sequence[Raw], field: str) -> list[Raw]:
    """Raw conditions that need nothing of the pictures. ConfigError where the field would be made of them."""
    if any(field not in one for one in raw):
        seen = f"no field {field!r}, and of the pictures their latents alone"
        raise ConfigError(
            "a condition is made of the pictures themselves", where="data.cache", seen=seen, fix="data.cache=null"
        )
    return list(raw)


def _rectangles(height: int, width: int, rng: Generator) -> Image:
    """A mask to train with: white everywhere in a quarter of them, else in up to four rectangles."""
    mask = np.zeros((height, width, 3), np.uint8)
    draws = torch.rand(2 + 4 * 4, generator=rng, dtype=torch.float64).tolist()
    if draws[0] < 0.25:
        mask[:] = 255
    for i in range(1 + int(4 * draws[1])):
        y, x, tall, wide = draws[2 + 4 * i : 6 + 4 * i]
        h, w = (max(1, round((0.1 + 0.5 * share) * side)) for share, side in ((tall, height), (wide, width)))
        top, left = int(y * (height - h + 1)), int(x * (width - w + 1))
        mask[top : top + h, left : left + w] = 255
    return mask

"""Codecs: what a picture is to the network. Latent diffusion is a codec; so is working on pixels.

A codec owns every normalisation: pictures are (B, 3, H, W) in [-1, 1] on one side, and on the other whatever the
network works on, of about unit variance. It may fold space into channels and it may have weights.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import inf
from typing import ClassVar, NoReturn, Protocol

import torch
from torch import Tensor, nn

from sfumato.errors import ConfigError
from sfumato.nets.autoencoder import Autoencoder, AutoencoderConfig
from sfumato.nets.tiny_autoencoder import TinyAutoencoder, TinyAutoencoderConfig


class Codec(Protocol):
    """Pictures to what the network sees, and back."""

    @property
    def channels(self) -> int: ...

    def shape(self, height: int, width: int) -> tuple[int, int, int]:
        """(C, h, w) of an encoded picture; raises ConfigError for sizes that the codec cannot take."""
        ...

    def encode(self, images: Tensor) -> Tensor: ...

    def decode(self, x: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class Pixels:
    """The picture itself. scale: a factor on it, for data whose spread is far from 1 (EDM's sigma_data / scale)."""

    scale: float = 1.0
    channels: ClassVar[int] = 3

    def __post_init__(self) -> None:
        if not 0 < self.scale < inf:
            raise ConfigError("a scale is above 0", where="model.codec.scale", seen=f"{self.scale:g}", fix="scale=1")

    def shape(self, height: int, width: int) -> tuple[int, int, int]:
        return self.channels, height, width

    def encode(self, images: Tensor) -> Tensor:
        return images if self.scale == 1 else images * self.scale

    def decode(self, x: Tensor) -> Tensor:
        return (x if self.scale == 1 else x / self.scale).clamp(-1, 1)


class Latents(nn.Module):
    """Latent diffusion: the mean of an autoencoder's latents, shifted and scaled to about unit variance; frozen.

    encode: (B, 3, H, W) in [-1, 1] to (B, latent, H/f, W/f); decode: the way back. ConfigError for what cannot be.
    weights: a diffusers folder (`vae`), or a single file that holds an autoencoder, read when a run starts; its shape,
    scale and shift are then taken from there, and what is kept with the model needs no such file any more.
    channels to quant: see `AutoencoderConfig`. scale, shift: z = (latent - shift) * scale, a number or one a channel;
    Stable Diffusion's 0.18215 and 0, SDXL's 0.13025 and 0, SD3's 1.5305 and 0.0609, FLUX's 0.3611 and 0.1159.
    tile: places a side of the latent map beyond which pictures are encoded and decoded in overlapping tiles, whose
    memory does not grow with the picture; 0 is never. Group norms see one tile at a time, so tiles differ a little from
    the whole. sampled: training draws each latent from the encoder's distribution, as Stable Diffusion did, and does
    not take its mean; editing takes the mean always.
    """

    def __init__(
        self,
        *,
        weights: str | None = None,
        channels: tuple[int, ...] = (128, 256, 512, 512),
        latent: int = 4,
        blocks: int = 2,
        groups: int = 32,
        attention: bool = True,
        quant: bool = True,
        scale: float | tuple[float, ...] = 0.18215,
        shift: float | tuple[float, ...] = 0.0,
        tile: int = 0,
        sampled: bool = False,
    ) -> None:
        super().__init__()
        if weights is not None:
            _unread(weights)
        config = AutoencoderConfig(
            latent=latent, channels=tuple(channels), blocks=blocks, groups=groups, attention=attention, quant=quant
        )
        self.autoencoder = Autoencoder(config).requires_grad_(False).eval()
        for name in ("scale", "shift"):
            self.register_buffer(name, torch.ones(1, 1, 1), persistent=False)
        self.normalise(*(torch.tensor(given, dtype=torch.float32).flatten() for given in (scale, shift)))
        if tile and tile < 8:
            raise ConfigError("a tile is 8 places or more a side", where="model.codec.tile", seen=str(tile), fix="64")
        self.tile, self.sampled = tile, sampled
        self.eval()

    scale: Tensor
    shift: Tensor

    def normalise(self, scale: Tensor, shift: Tensor) -> None:
        """Takes up a scale and a shift, (1,) or (latent,). ConfigError for such as cannot be undone."""
        latent = self.autoencoder.config.latent
        for name, numbers in (("scale", scale), ("shift", shift)):
            if len(numbers) not in (1, latent) or not bool(numbers.isfinite().all()):
                seen = f"{len(numbers)} numbers for {latent} channels"
                raise ConfigError(f"{name} is one number, or one a channel", where=f"model.codec.{name}", seen=seen)
        if not bool((scale > 0).all()):
            seen = str(scale.tolist())
            raise ConfigError("a scale is above 0", where="model.codec.scale", seen=seen, fix="scale=0.18215")
        self.scale, self.shift = scale.to(self.scale)[:, None, None], shift.to(self.shift)[:, None, None]

    @property
    def channels(self) -> int:
        return self.autoencoder.config.latent

    def shape(self, height: int, width: int) -> tuple[int, int, int]:
        return _divided(self.channels, self.autoencoder.config.factor, height, width)

    def encode(self, images: Tensor) -> Tensor:
        return self.moments(images)[0]

    def moments(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the encoder's distribution, shifted and scaled, (B, latent, H/f, W/f) each."""

        def both(part: Tensor) -> Tensor:
            posterior = self.autoencoder.encode(part)
            return torch.cat([posterior.mean, torch.exp(posterior.logvar / 2)], 1)

        mean, spread = self._tiled(both, images, self.autoencoder.config.factor, 1, 2 * self.channels).chunk(2, 1)
        return (mean - self.shift) * self.scale, spread * self.scale

    def decode(self, x: Tensor) -> Tensor:
        z = x / self.scale + self.shift
        colours = self.autoencoder.config.in_channels
        return self._tiled(self.autoencoder.decode, z, 1, self.autoencoder.config.factor, colours).clamp(-1, 1)

    def train(self, mode: bool = True) -> "Latents":
        """Stays in evaluation mode, whatever becomes of the network: it is frozen."""
        return super().train(False)

    def _tiled(self, half: Callable[[Tensor], Tensor], x: Tensor, down: int, up: int, channels: int) -> Tensor:
        """`half` of the autoencoder, whole or tile by tile, blended where tiles overlap by a quarter.

        down, up: how much smaller or larger its answer is. The tile's side is in places of the latent map.
        """
        height, width = x.shape[2] // down, x.shape[3] // down
        if not self.tile or max(height, width) <= self.tile:
            return half(x)
        out = x.new_zeros(len(x), channels, height * up, width * up)
        total = x.new_zeros(1, 1, height * up, width * up)
        for top, bottom in _spans(height, self.tile):
            for left, right in _spans(width, self.tile):
                part = half(x[:, :, top * down : bottom * down, left * down : right * down])
                weight = _ramp(part.shape[2], x.device)[:, None] * _ramp(part.shape[3], x.device)
                rows, columns = slice(top * up, bottom * up), slice(left * up, right * up)
                out[:, :, rows, columns] += part * weight
                total[:, :, rows, columns] += weight
        return out / total


class TinyLatents(nn.Module):
    """Latents by a tiny autoencoder (TAESD): nearly those of the large one that it was distilled from, at a small part
    of the time and memory; frozen. For previews, and for machines that are too small for more.

    weights: a folder of diffusers' AutoencoderTiny, or `..._encoder` of the original's two files, read when a run
    starts. latent to decoder: see `TinyAutoencoderConfig`. scale, shift: z = (latent - shift) * scale; its latents are
    normalised already, so 1 and 0 unless a checkpoint says otherwise.
    """

    def __init__(
        self,
        *,
        weights: str | None = None,
        latent: int = 4,
        width: int = 64,
        encoder: tuple[int, ...] = (1, 3, 3, 3),
        decoder: tuple[int, ...] = (3, 3, 3, 1),
        scale: float = 1.0,
        shift: float = 0.0,
    ) -> None:
        super().__init__()
        if weights is not None:
            _unread(weights)
        if not (0 < scale < inf and abs(shift) < inf):
            seen = f"scale {scale:g}, shift {shift:g}"
            raise ConfigError("a scale is above 0", where="model.codec.scale", seen=seen, fix="scale=1")
        config = TinyAutoencoderConfig(latent=latent, width=width, encoder=tuple(encoder), decoder=tuple(decoder))
        self.autoencoder = TinyAutoencoder(config).requires_grad_(False)
        self.scale, self.shift = scale, shift
        self.eval()

    @property
    def channels(self) -> int:
        return self.autoencoder.config.latent

    def shape(self, height: int, width: int) -> tuple[int, int, int]:
        return _divided(self.channels, self.autoencoder.config.factor, height, width)

    def encode(self, images: Tensor) -> Tensor:
        return (self.autoencoder.encode(images) - self.shift) * self.scale

    def moments(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """The latents, and a spread of nothing: there is no distribution."""
        z = self.encode(images)
        return z, torch.zeros_like(z)

    def decode(self, x: Tensor) -> Tensor:
        return self.autoencoder.decode(x / self.scale + self.shift).clamp(-1, 1)

    def train(self, mode: bool = True) -> "TinyLatents":
        """Stays in evaluation mode: it is frozen."""
        return super().train(False)


def _unread(weights: str) -> NoReturn:
    fix = "sfumato.io.pretrained.codec_from, as a run does when it starts"
    raise ConfigError("an autoencoder was not read", where="model.codec.weights", seen=weights, fix=fix)


def _divided(channels: int, factor: int, height: int, width: int) -> tuple[int, int, int]:
    """The shape of latents. ConfigError for pictures whose sides the factor does not divide."""
    if height % factor or width % factor:
        near = "x".join(str(max(factor, round(side / factor) * factor)) for side in (height, width))
        what, seen = f"this autoencoder takes sizes that are multiples of {factor}", f"{height}x{width}"
        raise ConfigError(what, where="data.size", seen=seen, fix=near)
    return channels, height // factor, width // factor


def _spans(length: int, tile: int) -> Iterator[tuple[int, int]]:
    """Where tiles begin and end along a side: all of one size, overlapping by a quarter at least."""
    if length <= tile:
        yield 0, length
        return
    count = -(-(length - tile) // (tile * 3 // 4)) + 1
    for i in range(count):
        start = round(i * (length - tile) / (count - 1))
        yield start, start + tile


def _ramp(length: int, device: torch.device) -> Tensor:
    """Weights along a side of a tile: one in its middle, falling over a quarter towards both edges, never zero."""
    edge = torch.arange(1, length + 1, dtype=torch.float32, device=device) / max(length // 4, 1)
    return torch.minimum(edge, edge.flip(0)).clamp(max=1)

"""Codecs: what a picture is to the network. Latent diffusion is a codec; so is working on pixels.

A codec owns every normalisation: pictures are (B, 3, H, W) in [-1, 1] on one side, and on the other whatever the
network works on, of about unit variance. It may fold space into channels and it may have weights.
"""

from dataclasses import dataclass
from math import inf
from typing import ClassVar, Protocol

from torch import Tensor

from sfumato.errors import ConfigError


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

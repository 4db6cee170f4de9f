"""How far apart two pictures look, without a trained network: what an autoencoder's reconstruction is judged by beside
the difference of its pixels.

A plain difference of pixels counts an edge that is soft or out of place like as many pixels that are a little too
bright, and so an autoencoder that minimises it blurs. Both distances here look at several scales, at each of which an
edge counts again; the second also measures differences against the contrast around them. They are not LPIPS (Zhang et
al. 2018), which compares features of a classifier and needs its weights: neither knows textures or objects.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from sfumato.errors import ConfigError

FIVE_TAPS = (1 / 16, 4 / 16, 6 / 16, 4 / 16, 1 / 16)  # Burt & Adelson's generating kernel, a = 0.375
SCALES = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)  # of MS-SSIM, as its authors fitted them to what people see
WINDOW, SPREAD = 11, 1.5  # of SSIM's Gaussian window, in pixels
K1, K2, RANGE = 0.01, 0.03, 2.0


class Distance(Protocol):
    """Pictures (B, C, H, W) in [-1, 1] and others of their shape to a number for each, (B,): 0 where they are equal."""

    def __call__(self, images: Tensor, others: Tensor, /) -> Tensor: ...


@dataclass(frozen=True)
class Laplacian:
    """The mean absolute difference of each band of a Laplacian pyramid (Burt & Adelson 1983), summed over the bands.

    Bojanowski et al. 2018, eq. 5 ("Lap1"): their factor 2^2j makes up for the pixels that band j has fewer of, which
    a mean over its pixels does too. levels: of the pyramid, the rest included, as far as halving leaves 4 pixels.
    """

    levels: int = 4

    def __post_init__(self) -> None:
        if self.levels < 1:
            raise ConfigError("a pyramid has a level", where="objective.distance.levels", seen=str(self.levels))

    def __call__(self, images: Tensor, others: Tensor, /) -> Tensor:
        rest = images - others  # the pyramid is linear: of the difference is the difference of the pyramids
        total = rest.new_zeros(len(rest))
        for _ in range(self.levels - 1):
            if min(rest.shape[-2:]) < 8:
                break
            small = blurred(rest, torch.tensor(FIVE_TAPS))[..., ::2, ::2]
            band = rest - F.interpolate(small, rest.shape[-2:], mode="bilinear", align_corners=False)
            total = total + band.abs().flatten(1).mean(1)
            rest = small
        return total + rest.abs().flatten(1).mean(1)


@dataclass(frozen=True)
class StructuralSimilarity:
    """1 - MS-SSIM, from 0 to 2 (Wang, Simoncelli & Bovik 2003, eq. 7; as a loss: Zhao et al. 2017).

    Local means, contrasts and correlations are compared in a Gaussian window of 11 pixels, at up to five scales: as
    many as leave a window's size. The published exponents of those that are used are scaled to a sum of 1.
    scales: at most so many; 1 is plain SSIM. ConfigError for pictures below 11 pixels.
    """

    scales: int = 5

    def __post_init__(self) -> None:
        if not 1 <= self.scales <= len(SCALES):
            seen = str(self.scales)
            raise ConfigError("one to five scales", where="objective.distance.scales", seen=seen, fix="scales=5")

    def __call__(self, images: Tensor, others: Tensor, /) -> Tensor:
        side, scales = min(images.shape[-2:]), 0
        while scales < self.scales and side // 2**scales >= WINDOW:
            scales += 1
        if not scales:
            raise ConfigError("SSIM needs 11 pixels", where="objective.distance", seen=str(side), fix="laplacian")
        exponents = torch.tensor(SCALES[:scales]) / sum(SCALES[:scales])
        product = images.new_ones(len(images))
        for i, exponent in enumerate(exponents.tolist()):
            luminance, structure = _compared(images, others)
            seen = structure * luminance if i == scales - 1 else structure
            # An anticorrelated scale has no real power: it counts as unrelated. The floor keeps gradients finite.
            product = product * seen.flatten(1).mean(1).clamp(min=1e-6) ** exponent
            images, others = F.avg_pool2d(images, 2), F.avg_pool2d(others, 2)
        return 1 - product


def _compared(images: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
    """Luminance, and contrast with structure, of SSIM at every place where the whole window fits."""
    places = torch.arange(WINDOW) - WINDOW // 2
    taps = torch.exp(-(places**2) / (2 * SPREAD**2))
    taps = taps / taps.sum()
    seen = blurred(torch.cat([images, others, images**2, others**2, images * others]), taps, padded=False)
    mean, other, square, other_square, product = seen.chunk(5)
    c1, c2 = (K1 * RANGE) ** 2, (K2 * RANGE) ** 2
    luminance = (2 * mean * other + c1) / (mean**2 + other**2 + c1)
    spread = square - mean**2 + other_square - other**2
    return luminance, (2 * (product - mean * other) + c2) / (spread + c2)


def blurred(x: Tensor, taps: Tensor, *, padded: bool = True) -> Tensor:
    """x (B, C, H, W) filtered along both sides, channel by channel; mirrored at its edges, or smaller by the window."""
    taps, channels = taps.to(x), x.shape[1]
    if padded:
        half = len(taps) // 2
        x = F.pad(x, (half, half, half, half), mode="reflect")
    down = taps[None, None, :, None].expand(channels, 1, -1, 1)
    x = F.conv2d(x, down, groups=channels)
    return F.conv2d(x, down.transpose(2, 3), groups=channels)

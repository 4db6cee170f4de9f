"""The energy score: how far from a picture two draws for its prompt are, less half of how far they are apart.

E|x - y| - E|x - x'| / 2 is least in the mean where x and y are drawn alike (Gneiting & Raftery 2007). So it compares
distributions, picture by picture, and a model that draws blurs, or the same for all noise, is found out.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from sfumato.data.picture import Image


def numbers(images: Image) -> Tensor:
    """Pictures (N, H, W, C) of bytes as numbers in [-1, 1]."""
    return torch.from_numpy(images).float() / 127.5 - 1


def energy_scores(drawn: Sequence[Tensor], truth: Tensor) -> Tensor:
    """Of two draws of each prompt, (N, ...) each, against a picture of it (N, ...): (N,), in root mean squares."""
    one, two = drawn

    def apart(x: Tensor, y: Tensor) -> Tensor:
        return (x - y).flatten(1).square().mean(1).sqrt()

    return (apart(one, truth) + apart(two, truth)) / 2 - apart(one, two) / 2


def energy_score(drawn: Sequence[Tensor], truth: Tensor) -> float:
    """Their mean."""
    return float(energy_scores(drawn, truth).mean())

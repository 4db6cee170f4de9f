"""The suite of autoencoders, judged itself: by codecs that keep everything, or lose something on purpose."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image as Pillow
from torch import Tensor

from sfumato.data.scenes import Scenes, recognise
from sfumato.metrics.flow import Examples
from sfumato.metrics.reconstruction import judge_reconstruction, same
from sfumato.metrics.scenes import HIT, MISS


class Codec:
    """A codec whose decoder does something to pictures."""

    channels = 3

    def __init__(self, lose: float = 0.0, shift: int = 0, noise: float = 0.0) -> None:
        self.lose, self.shifted, self.noise = lose, shift, noise

    def shape(self, height: int, width: int) -> tuple[int, int, int]:
        return 3, height, width

    def encode(self, images: Tensor) -> Tensor:
        return images

    def decode(self, x: Tensor) -> Tensor:
        lost = x.roll(self.shifted, 3).clone()
        lost[: round(len(x) * self.lose)] = -0.7
        return lost + self.noise * torch.where(torch.arange(x[0].numel()) % 2 == 0, 1.0, -1.0).reshape(x[0].shape)


def found(n: int = 12, kind: str = "scenes") -> Examples:
    images, fields = Scenes(size=32, seed=4).batch(range(n))
    return Examples(images, list(fields), True, kind)


def test_who_keeps_everything() -> None:
    scores = judge_reconstruction(Codec(), found(), torch.device("cpu"), batch=5)
    assert scores["suite"] == "reconstruction" and scores["images"] == 12 and scores["held_out"] is True
    assert scores["psnr"]["mean"] > 100 and scores["ms_ssim"]["mean"] == 1.0 and scores["kept"]["score"] == 1.0


def test_noise_of_one_size_is_its_ratio_in_decibels() -> None:
    """An error of 0.05 everywhere, of a range of 2: 20 log10(40), but for what is clipped, of which there is none."""
    noise = 0.05
    calm = Examples(np.full((3, 32, 32, 3), 128, np.uint8), [{}] * 3, True, "folder")
    scores = judge_reconstruction(Codec(noise=noise), calm, torch.device("cpu"))
    assert scores["psnr"]["mean"] == pytest.approx(20 * math.log10(2 / noise), abs=1e-3)
    assert "kept" not in scores and 0 < scores["ms_ssim"]["mean"] < 1


def test_lost_and_moved_things_are_not_kept(tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    scores = judge_reconstruction(
        Codec(lose=1 / 3), found(), torch.device("cpu"), folder=tmp_path, progress=lambda *step: told.append(step)
    )
    assert scores["kept"]["score"] == round(2 / 3, 4) and told == [(12, 12)]
    pixels = np.asarray(Pillow.open(tmp_path / "reconstruction.png")).reshape(-1, 3)
    assert all((pixels == colour).all(1).any() for colour in (HIT, MISS))
    assert judge_reconstruction(Codec(shift=6), found(), torch.device("cpu"))["kept"]["score"] < 0.2


def test_the_same_things_in_any_order() -> None:
    image = next(one.image for one in map(Scenes(seed=1).__getitem__, range(99)) if len(recognise(one.image)) == 3)
    things = recognise(image)
    assert same(things, things[::-1], (32, 32))
    assert not same(things, things[:-1], (32, 32)) and not same(things[:-1], things, (32, 32))
    assert not same([things[0], things[0]], [things[0], things[1]], (32, 32))

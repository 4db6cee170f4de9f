"""Distances between pictures: against their formulas written out otherwise, and what each of them sees."""

import numpy as np
import pytest
import torch
from torch import Tensor

from sfumato.errors import ConfigError
from sfumato.objectives.distances import SCALES, Distance, Laplacian, StructuralSimilarity, blurred

ndimage = pytest.importorskip("scipy.ndimage")
distances = pytest.mark.parametrize("distance", [Laplacian(), StructuralSimilarity()], ids=["laplacian", "ssim"])


def pictures(seed: int = 0, size: tuple[int, int] = (48, 40)) -> Tensor:
    return torch.rand(3, 3, *size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2 - 1


@distances
def test_equal_pictures_have_no_distance_and_rows_do_not_meet(distance: Distance) -> None:
    x, y = pictures(), pictures(1)
    assert torch.allclose(distance(x, x), torch.zeros(3, dtype=torch.float64), atol=1e-9)
    apart = distance(x, y)
    assert apart.shape == (3,) and bool((apart > 0.05).all())
    torch.testing.assert_close(apart, distance(y, x))
    torch.testing.assert_close(apart[1:2], distance(x[1:2], y[1:2]))


@distances
def test_gradients_are_those_of_the_formula(distance: Distance) -> None:
    x = pictures(size=(16, 12))[:1, :1].requires_grad_()
    assert torch.autograd.gradcheck(lambda one: distance(one, pictures(1, (16, 12))[:1, :1]), (x,), atol=1e-4)


@distances
def test_it_decreases_towards_the_picture(distance: Distance) -> None:
    x, y = pictures(), pictures(1)
    found = torch.stack([distance(x, x + share * (y - x)) for share in (1.0, 0.5, 0.25, 0.1, 0.01)])
    assert bool((found.diff(dim=0) < 0).all())


def test_ssim_is_that_of_the_paper() -> None:
    """One scale, written with another library's filter: sigma 1.5, 11 taps, places where the window fits."""
    x, y = (one[0, 0].numpy() for one in (pictures(), pictures(1)))

    def mean(image: np.ndarray) -> np.ndarray:
        return ndimage.gaussian_filter(image, 1.5, truncate=5 / 1.5)[5:-5, 5:-5]

    c1, c2 = (0.01 * 2) ** 2, (0.03 * 2) ** 2
    mx, my = mean(x), mean(y)
    sx, sy, sxy = mean(x * x) - mx**2, mean(y * y) - my**2, mean(x * y) - mx * my
    ssim = (2 * mx * my + c1) * (2 * sxy + c2) / ((mx**2 + my**2 + c1) * (sx + sy + c2))
    told = StructuralSimilarity(1)(pictures()[:1, :1], pictures(1)[:1, :1])
    assert float(told) == pytest.approx(1 - ssim.mean(), abs=1e-9)


def test_scales_of_ssim_multiply_by_their_exponents() -> None:
    x = pictures()
    y = 0.7 * x + 0.3 * pictures(1)
    half = torch.nn.functional.avg_pool2d(x, 2), torch.nn.functional.avg_pool2d(y, 2)
    from sfumato.objectives.distances import _compared

    _, contrast = _compared(x, y)
    first, second = SCALES[0] / sum(SCALES[:2]), SCALES[1] / sum(SCALES[:2])
    whole = 1 - StructuralSimilarity(1)(*half)
    expected = 1 - contrast.flatten(1).mean(1) ** first * whole**second
    torch.testing.assert_close(StructuralSimilarity()(x, y), expected)  # 40 pixels leave room for two scales


def test_the_bands_of_the_pyramid() -> None:
    """A constant difference lies in the rest alone; a checkerboard of pixels in the finest band alone."""
    x = pictures(size=(32, 32))
    assert float(Laplacian()(x, x + 0.25)[0]) == pytest.approx(0.25)
    rows = torch.arange(32)
    board = ((rows[:, None] + rows) % 2 * 2 - 1).double() * 0.1
    seen = Laplacian()(x, x + board)
    assert float(seen[0]) == pytest.approx(0.1, rel=0.05)
    assert float(blurred(board[None, None], torch.tensor([1, 4, 6, 4, 1]) / 16).abs().max()) < 1e-7
    assert torch.allclose(Laplacian(1)(x, x + board), torch.full((3,), 0.1, dtype=torch.float64))


def test_an_edge_out_of_place_costs_more_than_the_same_error_in_brightness() -> None:
    """What a plain difference of pixels does not tell apart."""
    x = -torch.ones(1, 1, 32, 32, dtype=torch.float64)
    x[..., 8:20, 8:20] = 0.5
    shifted = x.roll(2, 3)
    flat = x + (shifted - x).abs().mean()
    for distance in (Laplacian(), StructuralSimilarity()):
        assert float(distance(x, shifted).mean()) > 1.5 * float(distance(x, flat).mean())


def test_what_cannot_be_is_refused() -> None:
    for wrong in (lambda: Laplacian(0), lambda: StructuralSimilarity(6), lambda: StructuralSimilarity(0)):
        with pytest.raises(ConfigError):
            wrong()
    with pytest.raises(ConfigError, match="11 pixels"):
        StructuralSimilarity()(torch.zeros(1, 3, 8, 32), torch.zeros(1, 3, 8, 32))

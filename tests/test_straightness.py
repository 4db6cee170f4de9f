"""Straightness: of flows whose trajectories are known, on any path; and what is straight has none."""

import pytest
import torch
from torch import Generator, Tensor

from oracles import Gaussian, three_modes
from sfumato.denoiser import Bound
from sfumato.errors import ConfigError
from sfumato.paths import Cosine, Linear, Path, VarianceExploding, VariancePreserving
from sfumato.straightness import straightness

NOISE = torch.randn(64, 2, generator=Generator().manual_seed(0), dtype=torch.float64)
STD = torch.tensor([0.2, 0.5], dtype=torch.float64)


def known(t: Tensor) -> Tensor:
    """|dz/dt - (z1 - z0)|^2 a dimension at some times (n, B), for N(0.7, STD^2): z_t = (1 - t) m + sqrt(V_t) z1."""
    time = t[:, None, None]
    variance = (1 - time) ** 2 * STD**2 + time**2
    rate = ((time - (1 - time) * STD**2) / variance.sqrt() - 1 + STD) * NOISE
    return rate.square().mean(2)


@pytest.mark.parametrize("path", [Linear(), Cosine(), VariancePreserving(), VarianceExploding()], ids=str)
def test_one_gaussian_on_any_path(path: Path) -> None:
    data = Gaussian(torch.full((2,), 0.7, dtype=torch.float64), STD)
    found = straightness(data.denoiser(path), NOISE, 200)
    middle = (torch.arange(4000, dtype=torch.float64) + 0.5) / 4000
    exact = known(middle).mean(0)
    # paths that never reach pure noise start from a normal that is not quite the data's
    torch.testing.assert_close(found.each, exact, rtol=0.03, atol=0.02)
    assert abs(float(found.each.mean() / exact.mean()) - 1) < 0.03
    assert found.t.shape == found.curve.shape == (200,) and bool((found.t.diff() < 0).all())
    inside = (found.t > 0.1) & (found.t < 0.9)
    torch.testing.assert_close(found.curve[inside], known(found.t[inside]).mean(1), rtol=0.1, atol=0.02)


def test_the_error_is_of_second_order() -> None:
    data = Gaussian(torch.full((2,), 0.7, dtype=torch.float64), STD)
    middle = (torch.arange(8000, dtype=torch.float64) + 0.5) / 8000
    exact = known(middle).mean(0)
    errors = [float((straightness(data.denoiser(Linear()), NOISE, n).each - exact).abs().max()) for n in (100, 200)]
    assert errors[1] < 0.4 * errors[0] < 0.1


def test_optimal_transport_is_straight() -> None:
    def x0_hat(x: Tensor, t: float) -> Tensor:
        return (x + t * 1.4) / ((1 - t) + t / 0.5)

    found = straightness(Bound(Linear(), x0_hat), NOISE)
    assert float(found.each.max()) < 1e-20 and float(found.curve.max()) < 1e-20
    torch.testing.assert_close(found.x0, 0.7 + 0.5 * NOISE)


def test_rows_do_not_meet_and_ends_are_the_flows() -> None:
    data = three_modes()
    noise = NOISE[:8, :1]
    whole = straightness(data.denoiser(Linear()), noise, 50)
    parts = [straightness(data.denoiser(Linear()), noise[i : i + 1], 50).each for i in range(8)]
    torch.testing.assert_close(torch.cat(parts), whole.each)
    torch.testing.assert_close(whole.x0, data.flow(Linear(), noise, 1.0, 0.0), rtol=0, atol=0.02)


def test_what_has_none() -> None:
    with pytest.raises(ConfigError, match="four steps"):
        straightness(three_modes().denoiser(Linear()), NOISE[:, :1], 3)
    with pytest.raises(ConfigError, match="posterior mean"):
        straightness(Bound(Linear(), lambda x, t: x, ("endpoint",)), NOISE)

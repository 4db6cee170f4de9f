"""What is done where nothing is said: on exact answers it converges at its order, to the data itself."""

import math

import pytest
import torch
from torch import Tensor

from oracles import mixture_like
from sfumato.catalogue import build
from sfumato.config import SamplingSection
from sfumato.exact import Gaussian
from sfumato.paths import Linear, Path, Tabulated
from sfumato.samplers import drive, sample
from sfumato.samplers.adams_moulton import exp_abm
from sfumato.samplers.coefficients import inverse_square_integrals
from sfumato.settings import Settings, fitted_grid

SECTION = SamplingSection()


def drawn(path: Path, x: Tensor, n: int, data: Gaussian) -> Tensor:
    times = build(fitted_grid(SECTION.grid, 8, 8), "Grid")(path, n)
    return drive(build(SECTION.sampler, "Sampler")(path, x, times), data.denoiser(path))


def test_settings_and_configurations_have_the_same_default() -> None:
    assert build(Settings().sampler, "Sampler") == build(SECTION.sampler, "Sampler")
    assert {"kind": Settings().grid} == SECTION.grid


@pytest.mark.parametrize("path", [Linear(), Tabulated()], ids=["linear", "table"])
def test_the_default_converges_to_the_data_at_its_order(path: Path) -> None:
    data = mixture_like((5, 8))
    x = torch.randn(32, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    truth = data.flow(path, x, 1.0, 0.0)
    few, some, many = (float((drawn(path, x, n, data) - truth).square().mean().sqrt()) for n in (100, 200, 400))
    assert many < 1e-5 and math.log2(few / some) > 2.75 and math.log2(some / many) > 2.75


def test_the_last_answer_is_moved_with_the_state_it_was_asked_at() -> None:
    """What is left of the error of the last answer alone, on data of the standard deviation it is made for."""
    path, data = Tabulated(), Gaussian(torch.zeros(1, dtype=torch.float64), 0.5)
    x = torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None]
    times = build("fitted", "Grid")(path, 6)
    *_, last, end = sample(exp_abm(path, x, times), data.denoiser(path))
    truth = data.flow(path, x, 1.0, 0.0)
    assert float((end.x - truth).abs().max()) < 0.5 * float((last.x0 - truth).abs().max())


def test_integrals_against_an_inverse_square_are_those_of_calculus() -> None:
    """Of 1, u and u^2 between 0.3 and 0.02: the differences of -1 / u, ln u and u."""
    nodes, (start, end) = [0.3, 0.5, 0.9], (0.3, 0.02)
    weights = inverse_square_integrals(nodes, start, end)
    for power, exact in ((0, 1 / end - 1 / start), (1, math.log(start / end)), (2, start - end)):
        assert sum(c * u**power for c, u in zip(weights, nodes, strict=True)) == pytest.approx(exact, rel=1e-12)

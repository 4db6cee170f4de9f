"""Rows of different times walk as they would alone, with one call of the model a round."""

import pytest
import torch
from torch import Tensor

from oracles import SHAPES, gaussian_like
from sfumato.catalogue import SAMPLERS
from sfumato.errors import ConfigError
from sfumato.paths import Cosine, Linear, Path, Tabulated
from sfumato.samplers import drive
from sfumato.samplers.rows import walked

GRIDS = torch.tensor(
    [[1.0, 0.7, 0.4], [0.5, 0.25, 0.0], [1.0, 0.7, 0.4], [0.3, 0.2, 0.1], [0.9, 0.45, 0.0]], dtype=torch.float64
)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("path", [Linear(), Cosine(), Tabulated()], ids=str)
@pytest.mark.parametrize("name", ["ddim", "heun", "dpmpp_2m"])
def test_a_row_ends_where_it_ends_alone(name: str, path: Path, shape: tuple[int, ...]) -> None:
    """Also where rows make different numbers of calls: Heun makes one in the step to the data."""
    exact, fn = gaussian_like(shape), SAMPLERS[name].fn
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    calls = []

    def denoise(rows: Tensor, t: Tensor) -> Tensor:
        calls.append(t)
        return exact.x0(path, rows, t)

    ends = walked(fn, path, x, GRIDS, denoise)
    for i in range(len(x)):
        alone = drive(fn(path, x[i : i + 1], GRIDS[i]), exact.denoiser(path))
        torch.testing.assert_close(ends[i : i + 1], alone, rtol=1e-12, atol=1e-12)
    assert len(calls) == (4 if name == "heun" else 2) and all(t.shape == (5,) for t in calls)


def test_states_keep_their_precision() -> None:
    x = torch.zeros(2, 3)
    ends = walked(SAMPLERS["ddim"].fn, Linear(), x, GRIDS[:2, :2], lambda rows, t: rows.double() + 1)
    assert ends.dtype == x.dtype and torch.equal(x, torch.zeros(2, 3))


def test_a_sampler_that_draws_is_refused() -> None:
    with pytest.raises(ConfigError, match="draws no noise"):
        walked(SAMPLERS["ddpm"].fn, Linear(), torch.zeros(2, 3), GRIDS[:2, :2], lambda rows, t: rows)

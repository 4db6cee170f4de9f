"""Flow matching: what minimises its loss is the velocity that carries the mixture, on every path it is used on."""

import pytest
import torch
from torch import Generator, Tensor, nn

from oracles import three_modes
from sfumato.denoiser import Denoiser
from sfumato.objectives import Denoising
from sfumato.paths import Cosine, Linear, OptimalTransport, Path, VariancePreserving, noised
from sfumato.predictions import VELOCITY

PATHS: tuple[Path, ...] = (Linear(), Cosine(), VariancePreserving(), OptimalTransport())


class At:
    """One time, of density 1."""

    def __init__(self, t: float) -> None:
        self.t = t

    def __call__(self, n: int, path: Path, rng: Generator | None = None) -> Tensor:
        return torch.full((n,), self.t, dtype=torch.float64)

    def pdf(self, path: Path, t: Tensor) -> Tensor:
        return torch.ones_like(t)


class Table(nn.Module):
    """A function of one number by its values at even knots, straight between them."""

    def __init__(self, low: float, high: float, n: int) -> None:
        super().__init__()
        self.knots = torch.linspace(low, high, n, dtype=torch.float64)
        self.values = nn.Parameter(torch.zeros(n, dtype=torch.float64))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        h = self.knots[1] - self.knots[0]
        hats = (1 - (x - self.knots).abs() / h).clamp(min=0)  # (B, n)
        return (hats @ self.values)[:, None]


@pytest.mark.parametrize("t", [0.15, 0.6])
@pytest.mark.parametrize("path", PATHS, ids=lambda path: type(path).__name__)
def test_the_minimiser_is_the_velocity_of_the_mixture(path: Path, t: float) -> None:
    data, n = three_modes(), 30_000
    x0 = data.draw(n, Generator().manual_seed(0))
    model = Denoiser(Table(-3.5, 3.5, 29), path, VELOCITY)
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=60, line_search_fn="strong_wolfe")

    def closure() -> float:
        optimizer.zero_grad()
        loss = Denoising(At(t))(model, x0, rng=Generator().manual_seed(1)).value
        loss.backward()
        return float(loss.detach())

    optimizer.step(closure)
    loss = closure()
    x = torch.linspace(-1.25, 1.25, 11, dtype=torch.float64)[:, None]
    off = model.net(x, x).detach() - data.velocity(path, x, t)
    standard_error = (loss / 1000) ** 0.5  # each knot within this range has a thousand draws around it
    assert float(off.abs().max()) < 5 * standard_error and float(off.square().mean().sqrt()) < 2.5 * standard_error


def test_lipmans_path_has_the_papers_velocity() -> None:
    """(x1 - (1 - sigma_min) x) / (1 - (1 - sigma_min) s) with s = 1 - t, reversed (Lipman et al. 2022, eq. 21)."""
    path, rng = OptimalTransport(0.02), Generator().manual_seed(0)
    x0, eps = (torch.randn(9, 2, 3, generator=rng, dtype=torch.float64) for _ in range(2))
    t = torch.linspace(0, 1, 9, dtype=torch.float64)
    x, s = noised(path, x0, eps, t), (1 - t)[:, None, None]
    paper = (x0 - (1 - 0.02) * x) / (1 - (1 - 0.02) * s)
    torch.testing.assert_close(VELOCITY.target(path, x0, eps, t), -paper, rtol=1e-9, atol=1e-9)

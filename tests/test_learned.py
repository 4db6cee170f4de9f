"""The learned schedule: monotone whatever its weights, a path like others, and a bound that its shape does not move."""

import pytest
import torch

from sfumato.catalogue import build
from sfumato.denoiser import Denoiser
from sfumato.errors import ConfigError
from sfumato.exact import Gaussian
from sfumato.learned import Learned
from sfumato.objectives.vdm import VDM
from sfumato.paths import along, log_snr
from sfumato.predictions import EPS

T = torch.linspace(0.001, 1, 400, dtype=torch.float64)


def shaped(seed: int, **options: object) -> Learned:
    torch.manual_seed(seed)
    path = Learned(**options)  # type: ignore[arg-type]
    with torch.no_grad():
        for name in ("rate", "height", "offset"):
            getattr(path, name).add_(torch.randn_like(getattr(path, name)))
    return path.double()


@pytest.mark.parametrize("seed", range(5))
def test_the_noise_rises_whatever_the_weights(seed: int) -> None:
    path = shaped(seed)
    level = log_snr(path, T)
    assert bool((level.diff() < 0).all())
    assert float(level[0]) == pytest.approx(13.3, abs=1e-5) and float(level[-1]) == pytest.approx(-5.0, abs=1e-5)
    torch.testing.assert_close(path.alpha(T) ** 2 + path.sigma(T) ** 2, torch.ones_like(T))


@pytest.mark.parametrize("seed", range(3))
def test_rates_are_derivatives_and_time_the_inverse(seed: int) -> None:
    path = shaped(seed)
    t = T[5:-5:20].clone().requires_grad_()
    for scale, rate in zip((path.alpha, path.sigma), path.rates(t.detach()), strict=True):
        (slope,) = torch.autograd.grad(scale(t).sum(), t)
        torch.testing.assert_close(slope, rate, rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(path.time(log_snr(path, t.detach())), t.detach(), rtol=1e-9, atol=1e-9)


class Exact(torch.nn.Module):
    """The exact noise of a Gaussian, told the noise level."""

    def __init__(self, data: Gaussian, path: Learned) -> None:
        super().__init__()
        self.data, self.path = data, path

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        gamma = -log_snr(self.path, t)
        alpha, sigma = (along(torch.sigmoid(sign * gamma).sqrt(), x) for sign in (-1, 1))
        x0 = self.data.mean + alpha * self.data.std**2 / ((alpha * self.data.std) ** 2 + sigma**2) * (
            x - alpha * self.data.mean
        )
        return (x - alpha * x0) / sigma


def test_the_bound_does_not_depend_on_the_shape_inside() -> None:
    data = Gaussian(torch.full((6,), 0.2, dtype=torch.float64), torch.full((6,), 0.5, dtype=torch.float64))
    losses = []
    for seed in range(3):
        path, rng = shaped(seed), torch.Generator().manual_seed(9)
        model, x0 = Denoiser(Exact(data, path), path, EPS), data.draw(40_000, torch.Generator().manual_seed(8))
        losses.append(float(VDM(levels=None)(model, x0, rng=rng).value))
    assert max(losses) - min(losses) < 0.02 * max(losses)  # Monte Carlo over 40,000 times


def test_training_moves_the_shape_and_the_ends_stay_unless_they_may_not() -> None:
    data = Gaussian(torch.zeros(6, dtype=torch.float64), torch.full((6,), 0.5, dtype=torch.float64))
    path = shaped(0)
    model = Denoiser(Exact(data, path), path, EPS)
    VDM(levels=None)(
        model, data.draw(64, torch.Generator().manual_seed(1)), rng=torch.Generator().manual_seed(2)
    ).value.backward()
    assert path.height.grad is not None and float(path.height.grad.abs().sum()) > 0
    assert path.ends.grad is None
    ending = shaped(0, learn_ends=True)
    model = Denoiser(Exact(data, ending), ending, EPS)
    x0 = (data.draw(64, torch.Generator().manual_seed(1)) * 127.5).round() / 127.5
    VDM()(model, x0.clamp(-1, 1), rng=torch.Generator().manual_seed(2)).value.backward()
    assert ending.ends.grad is not None and float(ending.ends.grad.abs().sum()) > 0
    with pytest.raises(ConfigError, match="nothing holds the ends"):
        VDM(levels=None)(model, x0)


def test_it_is_a_slot_and_refuses_what_cannot_be() -> None:
    assert isinstance(build({"kind": "learned", "hidden": 8}, "Path"), Learned)
    with pytest.raises(ConfigError, match="log_snr falls"):
        Learned(log_snr_max=-6.0)

"""Expectations over one Gaussian without chance: a batch of corners, one time for all, and students that are lines.

What is linear in data and noise has square errors, and gradients, of degree two in them. Over x0 = mean +- std and
noise +-1, all combinations alike, such a polynomial has exactly the mean that it has over the Gaussians (it is Gauss
and Hermite's rule with two nodes). So where a method stands still on average, a batch of corners brings no gradient,
to rounding, and where it does not, it does.
"""

import sys
from collections.abc import Callable, Iterable
from itertools import cycle, product

import pytest
import torch
from flowmaps import DATA
from torch import Generator, Tensor, nn

from sfumato.denoiser import Denoiser
from sfumato.paths import Path, along
from sfumato.predictions import Prediction

Reset = Callable[[], Tensor]


def fixed(monkeypatch: pytest.MonkeyPatch, noises: int = 1) -> Reset:
    """Makes objectives draw the corners of so many noises, one after the other. What it returns begins anew, and gives
    the data, (2^(noises + 1), 3).
    """
    signs = torch.tensor(list(product((-1.0, 1.0), repeat=noises + 1)), dtype=torch.float64)
    columns = [column[:, None].expand(-1, len(DATA.mean)) for column in signs.unbind(1)]
    left = iter(cycle(columns[1:]))
    modules = [module for name, module in sys.modules.items() if name.startswith("sfumato.objectives.")]
    for module in modules:
        if hasattr(module, "noise_like"):
            monkeypatch.setattr(module, "noise_like", lambda x0, rng: next(left))

    def reset() -> Tensor:
        nonlocal left
        left = iter(cycle(columns[1:]))
        return DATA.mean + DATA.std * columns[0]

    return reset


class At:
    """Times of density 1 that are not drawn: one for all, or so many in equal parts of the draws."""

    def __init__(self, *times: float) -> None:
        self.times = torch.tensor(times, dtype=torch.float64)

    def __call__(self, n: int, path: Path, rng: Generator | None = None) -> Tensor:
        return self.times.repeat_interleave(n // len(self.times))

    def pdf(self, path: Path, t: Tensor) -> Tensor:
        return torch.ones_like(t)


class Lines(nn.Module):
    """At each of some times, mean + shift + slope (x - alpha mean) for x0, its slopes and shifts free: (n, D) each,
    where D is 3, or fewer for the first elements alone.
    """

    def __init__(self, path: Path, prediction: Prediction, times: Tensor, slopes: Tensor) -> None:
        super().__init__()
        self.path, self.prediction, self.times, self.mean = path, prediction, times, DATA.mean[: slopes.shape[1]]
        self.slopes, self.shifts = nn.Parameter(slopes.clone()), nn.Parameter(torch.zeros_like(slopes))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        near = (t[:, None] - self.times).abs().min(1)
        assert float(near.values.max()) < 1e-9, "asked at a time that it does not know"
        i = near.indices
        x0 = self.mean + self.shifts[i] + self.slopes[i] * (x - self.path.alpha(along(t, x)) * self.mean)
        return self.prediction.answer(self.path, x0, x, t)


def lines(path: Path, prediction: Prediction, times: Tensor, slopes: Tensor) -> Denoiser:
    return Denoiser(Lines(path, prediction, times, slopes), path, prediction)


def slope_of_means(path: Path, t: Tensor) -> Tensor:
    """Of E[x0 | x_t] at times (n,): (n, 3)."""
    alpha, sigma = path.alpha(t)[:, None], path.sigma(t)[:, None]
    return alpha * DATA.std**2 / (alpha**2 * DATA.std**2 + sigma**2)


def slope_of_ends(path: Path, t: Tensor) -> Tensor:
    """Of where the exact flow ends: (n, 3)."""
    alpha, sigma = path.alpha(t)[:, None], path.sigma(t)[:, None]
    return DATA.std / torch.sqrt(alpha**2 * DATA.std**2 + sigma**2)


def slopes_of_one_noise(path: Path, times: Tensor) -> Tensor:
    """What pairs with one noise in both make of falling times, which end at the data: (n, 3).

    The best answer at t is E[what is said at s | x_t], which has the slope there times Cov(x_s, x_t) / Var(x_t).
    """
    alpha, sigma = path.alpha(times)[:, None], path.sigma(times)[:, None]
    both = alpha[1:] * alpha[:-1] * DATA.std**2 + sigma[1:] * sigma[:-1]
    kept = both / (alpha**2 * DATA.std**2 + sigma**2)[:-1]
    found = [(1 / alpha[-1]).expand_as(DATA.std)]
    for one in kept.flip(0):
        found.append(found[-1] * one)
    return torch.stack(found[::-1])


def slopes_of_steps(path: Path, times: Tensor) -> Tensor:
    """Where DDIM's steps with exact means end, from each of falling times: (n, 3)."""
    alpha, sigma = path.alpha(times)[:, None], path.sigma(times)[:, None]
    q = sigma[1:] / sigma[:-1]
    kept = q + (alpha[1:] - q * alpha[:-1]) * slope_of_means(path, times[:-1])
    found = [(1 / alpha[-1]).expand_as(DATA.std)]
    for one in kept.flip(0):
        found.append(found[-1] * one)
    return torch.stack(found[::-1])


def pull(student: nn.Module) -> float:
    """The largest gradient of any weight."""
    return max(float(p.grad.abs().max()) for p in student.parameters() if p.grad is not None)


def pulls(student: nn.Module, losses: Iterable[Tensor]) -> float:
    """The largest gradient of any weight over some losses, each by itself."""
    worst = 0.0
    for loss in losses:
        student.zero_grad()
        loss.backward()
        worst = max(worst, pull(student))
    return worst

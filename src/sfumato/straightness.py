"""How straight the flow of a model is: what it costs to walk it in few steps.

Liu et al. 2022, eq. 9: S = the integral over t of E |dz/dt - (z1 - z0)|^2, for z on the way from the data z0 to the
noise z1. It is 0 exactly where every trajectory is a line walked at even speed, and then one step of Euler's method is
the flow. It is measured in the linear path's coordinates, z = x / (alpha + sigma) at the time sigma / (alpha + sigma),
in which any model with any path can be compared with any other.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from sfumato.denoiser import Denoise, on_path
from sfumato.errors import ConfigError
from sfumato.paths import Linear
from sfumato.samplers.adams import ipndm
from sfumato.samplers.drive import sample

MOST = 0.9995  # of time, where a path never becomes pure noise and so has no such time


class Straightness(NamedTuple):
    """each (B,): S of every trajectory, a dimension, in units of the data's square. t (n,) from noise to data, curve
    (n,): the mean over trajectories of |dz/dt - (z1 - z0)|^2 a dimension at each. x0 (B, ...): where they end.
    """

    each: Tensor
    t: Tensor
    curve: Tensor
    x0: Tensor


@torch.no_grad()
def straightness(denoise: Denoise, noise: Tensor, steps: int = 100) -> Straightness:
    """Of the trajectories from normal noise (B, ...), of a model that answers "x0", bound to conditions and guidance.

    steps: calls, even in time, of a method of fourth order. The integral is exact to second order in the step.
    """
    if steps < 4:
        raise ConfigError("a trajectory has four steps or more", where="steps", seen=str(steps), fix="steps=100")
    start, model = 1.0, denoise
    one = torch.ones((), dtype=torch.float64)
    if not isinstance(denoise.path, Linear):
        alpha, sigma = float(denoise.path.alpha(one)), float(denoise.path.sigma(one))
        start = min(sigma / (alpha + sigma), MOST)
        model = on_path(denoise, Linear())
    spread = (start**2 + (1 - start) ** 2) ** 0.5  # of data of unit variance there, as samplers begin
    times = torch.linspace(start, 0, steps + 1, dtype=torch.float64)
    walk = list(sample(ipndm(Linear(), noise * spread, times, variable="time"), model))
    t = [step.t for step in walk[:-1]]
    end, begin = walk[-1].x, walk[0].x
    line = (begin - end) / start
    off = [((step.x - step.x0) / step.t - line).flatten(1).square().mean(1).double().cpu() for step in walk[:-1]]
    rows = torch.stack(off)  # (n, B), at t = start ... start / n
    weights = torch.full((len(t),), start / steps, dtype=torch.float64)
    weights[0] /= 2
    weights[-1] *= 1.5  # the last interval, at whose end nothing can be asked, counts as its beginning
    return Straightness(
        (weights[:, None] * rows).sum(0) / start, torch.tensor(t, dtype=torch.float64), rows.mean(1), end
    )

"""DDPM's ancestral sampler: draw x_s from the posterior q(x_s | x_t, x0) with the model's x0 in place of the data.

Ho et al. 2020, algorithm 2, on any path and any sub-grid. The variance is the posterior's ("small", the optimum for
data that is one point), the forward kernel's ("large", the optimum for data that is itself standard normal), or what
the network says between the two, on a scale of logarithms ("learned": Nichol & Dhariwal 2021, eq. 15).
"""

import math
from typing import Literal

import torch
from torch import Tensor

from sfumato.denoiser import VARIANCE
from sfumato.paths import Path
from sfumato.samplers.core import Ask, Draw, Running, Table, added_std, check_clip, posterior_move
from sfumato.samplers.plan import checked_choice

Variance = Literal["small", "large", "learned"]


def ddpm(
    path: Path,
    x: Tensor,
    times: Tensor,
    *,
    variance: Variance = "small",
    clip: float | None = None,
) -> Running:
    """One draw a step; the last step is its mean, x0 itself.

    variance: "learned" asks for "x0_variance", see `Denoiser`; a channel of -1 means "small" and of 1 "large".
    clip: clamp x0 to [-clip, clip] before the mean is formed, as pixel models do; never for latents.
    """
    checked_choice("variance", variance, ("small", "large", "learned"))
    check_clip(clip)
    table, learned = Table.of(path, times), variance == "learned"
    for i in table.steps:
        answer = yield Ask(x, table.t[i], VARIANCE if learned else "x0")
        x0, *share = answer.chunk(2, 1) if learned else (answer,)
        if clip is not None:
            x0 = x0.clamp(-clip, clip)
        move, large = posterior_move(table, i), added_std(table, i)
        x = move.mean(x, x0)
        if move.std > 0:
            std = _between(share[0], move.std, large) if learned else large if variance == "large" else move.std
            x = yield Draw(x, std)
    return x


def _between(share: Tensor, small: float, large: float) -> Tensor:
    """Between two numbers on a scale of logarithms, for shares from -1 to 1."""
    middle, half = math.log(small * large) / 2, math.log(large / small) / 2
    return torch.exp(share * half + middle)

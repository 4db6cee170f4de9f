"""Jumps between any two times, with models that have learned the flow itself (flow maps).

A MeanFlow, shortcut or consistency-trajectory model answers "jump": the x0 for which DDIM's straight step from t to s
lands on the flow through x_t. So one step of any length is exact as far as the model is, and more of them mend what it
has not learned. Noise may be drawn anew between jumps (Kim et al. 2024, algorithm 3, gamma-sampling): a jump then goes
to a lower noise level than is wanted, and the missing noise is added.
"""

import math

import torch
from torch import Tensor

from sfumato.denoiser import JUMP
from sfumato.errors import ConfigError
from sfumato.paths import Path, log_snr
from sfumato.samplers.core import Ask, Draw, Running, Table


def jump(path: Path, x: Tensor, times: Tensor, *, gamma: float = 0.0) -> Running:
    """One jump for each pair of times.

    gamma: how much of the noise is drawn anew after each jump but the last: 0 none, which is deterministic; 1 all of
    it, which is multistep consistency sampling (`sfumato.samplers.consistency`).
    """
    if not 0 <= gamma <= 1:
        raise ConfigError("gamma is a share of the noise", where="sampler.gamma", seen=f"{gamma:g}", fix="gamma=0")
    table = Table.of(path, times)
    ends = _ends(path, table, gamma)
    alpha, sigma = ([float(scale(end)) for end in ends] for scale in (path.alpha, path.sigma))
    for i, end in enumerate(ends.tolist()):
        x0 = yield Ask(x, table.t[i], JUMP, end)
        ratio = sigma[i] / table.sigma[i]
        x = torch.add(x * ratio, x0, alpha=alpha[i] - ratio * table.alpha[i])
        if gamma > 0 and table.sigma[i + 1] > 0:
            x = yield Draw(x * (table.alpha[i + 1] / alpha[i]), gamma * table.sigma[i + 1])
    return x


def _ends(path: Path, table: Table, gamma: float) -> Tensor:
    """Where each jump ends: noise of a share gamma of the variance below the next time, which is then added."""
    times = torch.tensor(table.t[1:], dtype=torch.float64)
    if gamma == 0:
        return times
    if gamma == 1:
        return torch.zeros_like(times)
    inside = times > 0
    lower = path.time(log_snr(path, times[inside]) - math.log1p(-(gamma**2)))
    return times.masked_scatter(inside, lower.detach())

"""DPM-Solver++: exponential integrators in half log_snr for the data prediction (Lu et al. 2022b).

With l = log(alpha / sigma) the ODE is solved exactly but for x0 as a function of l:
x_s = (sigma_s / sigma_t) x_t + sigma_s * integral of e^l x0(l) dl. The multistep method of second order extrapolates
x0 from the last two answers, so it costs one call a step.
"""

import math

import torch
from torch import Tensor

from sfumato.paths import Path
from sfumato.samplers.core import Ask, Noise, Running, Table


def dpmpp_2m(path: Path, x: Tensor, times: Tensor, noise: Noise = torch.randn_like) -> Running:
    """DPM-Solver++(2M), midpoint form. The first step and the step to the data are of first order."""
    table = Table.of(path, times)
    level, previous = table.half_log_snr, None
    for i in table.steps:
        x0 = yield Ask(x, table.t[i])
        h = level[i + 1] - level[i]
        data = x0
        if previous is not None and math.isfinite(h) and math.isfinite(level[i - 1]):
            data = torch.add(x0, x0 - previous, alpha=h / (2 * (level[i] - level[i - 1])))
        x = torch.add(x * (table.sigma[i + 1] / table.sigma[i]), data, alpha=-table.alpha[i + 1] * math.expm1(-h))
        previous = x0
    return x

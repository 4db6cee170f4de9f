"""SDE-DPM-Solver++: exponential integrators for the reverse SDE, of the data prediction (Lu et al. 2022b).

With l = log(alpha / sigma), h the step in l and eta the strength of the noise (1 is the reverse SDE, 0 the ODE),
x_s = (sigma_s / sigma_t) e^(-eta h) x_t + alpha_s (1 + eta) * integral of e^((1 + eta)(l - l_s)) x0(l) dl + noise,
whose variance is sigma_s^2 (1 - e^(-2 eta h)): exact but for x0 as a function of l. That is taken for a constant (1,
DDPM's step) or for the polynomial through the last answers (2M, 3M), at one call a step.
"""

import math
from collections.abc import Sequence
from itertools import takewhile
from typing import Literal

from torch import Tensor

from sfumato.errors import ConfigError
from sfumato.paths import Path
from sfumato.samplers.coefficients import lagrange_integrals
from sfumato.samplers.core import Ask, Draw, Running, Table
from sfumato.samplers.plan import Row, checked_choice, checked_order, combined

Form = Literal["midpoint", "heun"]


def sde_dpmpp(
    path: Path,
    x: Tensor,
    times: Tensor,
    *,
    order: int = 2,
    eta: float = 1.0,
    form: Form = "midpoint",
) -> Running:
    """order: 1, 2 (2M) or 3 (3M), reached step by step; the step to the data, and what pure noise says, count as one.

    eta: as in e^(-eta h), k-diffusion's, which agrees with DDIM's at 0 and 1 only.
    form: of order 2, how the difference of two answers is weighed: by half, as published first, or by its integral.
    """
    checked_order(order, 3, "SDE-DPM-Solver++")
    checked_choice("form", form, ("midpoint", "heun"))
    if not 0 <= eta < math.inf:
        raise ConfigError(
            "the noise of this sampler has a strength from 0", where="sampler.eta", seen=f"{eta:g}", fix="eta=1"
        )
    table = Table.of(path, times)
    answers: list[Tensor] = []
    for i in table.steps:
        x0 = yield Ask(x, table.t[i])
        answers = [x0, *answers[: order - 1]]
        row, std = _step(table, i, order, eta, form)
        x = combined(x, row, answers)
        if std > 0:
            x = yield Draw(x, std)
    return x


def _step(table: Table, i: int, order: int, eta: float, form: Form) -> tuple[Row, float]:
    """The mean's coefficients and the noise of one step."""
    level, alpha, sigma = table.half_log_snr, table.alpha[i + 1], table.sigma[i + 1]
    h = level[i + 1] - level[i]
    kept = math.exp(-eta * h) if eta else 1.0  # h may be infinite
    nodes = list(takewhile(math.isfinite, (level[k] for k in range(i, max(i - order, -1), -1))))
    keep, std = sigma / table.sigma[i] * kept, sigma * math.sqrt(-math.expm1(-2 * eta * h)) if eta else 0.0
    if math.isfinite(h) and len(nodes) > 1:
        weights = _weights(nodes, level[i + 1], 1 + eta, midpoint=form == "midpoint" and order == 2)
    else:
        weights = [-math.expm1(-(1 + eta) * h)]
    return Row(keep, tuple(alpha * weight for weight in weights)), std


def _weights(nodes: Sequence[float], end: float, rate: float, midpoint: bool) -> list[float]:
    """What the answers at some levels, newest first, are worth: they sum to 1 - e^(-rate h)."""
    if not midpoint:
        return [rate * c for c in lagrange_integrals(nodes, nodes[0], end, rate)]
    whole = -math.expm1(-rate * (end - nodes[0]))
    slope = whole * (end - nodes[0]) / (2 * (nodes[0] - nodes[1]))
    return [whole + slope, -slope]

"""Adams-Bashforth-Moulton of the data: predict by a polynomial through the last answers, then correct by one more.

With kappa = alpha / sigma the ODE is d(x / sigma) = x0 dkappa. Here x0 is a polynomial in the linear path's time,
u = sigma / (alpha + sigma), on whatever path: at pure noise it is 1 and at the data 0, where half log_snr is infinite,
and as a function of it the answer is smooth up to both ends. The answer at the predicted state also corrects that state
(as in UniPC, Zhao et al. 2023), which raises the order by one at no further call. A trained network's answers waver a
little from time to time: a low order with a correction averages over that, where a high order amplifies it.
"""

import math

import torch
from torch import Tensor

from sfumato.paths import Path
from sfumato.samplers.coefficients import inverse_square_integrals
from sfumato.samplers.core import Ask, Running, Table
from sfumato.samplers.plan import Row, checked_order, combined, ddim_row

DATA_STD = 0.5  # of pictures in [-1, 1] (Karras et al. 2022)


def exp_abm(path: Path, x: Tensor, times: Tensor, *, order: int = 2) -> Running:
    """Predictions of order 1 to 3, corrected to one more; the first step, of first order, caps the whole at 3.

    The step to the data takes the answer itself, moved by as much as the last correction moved the state it was asked
    at: what a small change of x is worth in x0, for data of standard deviation 0.5. One call a step. The default.
    """
    checked_order(order, 3, "exponential Adams-Bashforth-Moulton")
    table = Table.of(path, times)
    u = [sigma / (alpha + sigma) for alpha, sigma in zip(table.alpha, table.sigma, strict=True)]
    predicting = [_row(table, u, i, range(i, max(i - order, -1), -1)) for i in table.steps]
    correcting = [_row(table, u, i, range(i + 1, max(i - order, -1), -1)) for i in table.steps[:-1]]
    answers: list[Tensor] = []
    base = x
    for i in table.steps:
        x0 = yield Ask(x, table.t[i])
        answers = [x0, *answers[:order]]
        base, asked = (combined(base, correcting[i - 1], answers) if i else x), x
        x = combined(base, predicting[i], answers)
    if table.sigma[-1] == 0 and len(table.steps) > 1:
        x = torch.add(x, base - asked, alpha=_slope(table.alpha[-2], table.sigma[-2]))
    return x


def _row(table: Table, u: list[float], i: int, nodes: range) -> Row:
    """The step from time i to the next, x0 being the polynomial through its values at the nodes; DDIM's to the data."""
    if table.sigma[i + 1] == 0:
        return ddim_row(table, i, i + 1)
    weights = inverse_square_integrals([u[k] for k in nodes], u[i], u[i + 1])
    return Row(table.sigma[i + 1] / table.sigma[i], tuple(table.sigma[i + 1] * c for c in weights))


def _slope(alpha: float, sigma: float) -> float:
    """How fast E[x0 | x] changes with x, for Gaussian data."""
    return alpha * DATA_STD**2 / math.hypot(alpha * DATA_STD, sigma) ** 2

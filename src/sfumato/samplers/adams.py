"""Adams-Bashforth methods: the next state from a polynomial through the last answers, one call a step.

What differs is what the polynomial is of, and in what. In a frame (`Frame`) the whole slope is extrapolated: LMS
(k-diffusion) in sigma / alpha, iPNDM in a variable that suits the path. In half log_snr only what is not linear is, and
the rest is exact: exponential Adams-Bashforth of the data (`exp_ab`), and of the noise, which is DEIS's "log rho" form
(Zhang & Chen 2023, tAB-DEIS). All coefficients are exact for the grid that is given, however uneven.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from sfumato.paths import Path
from sfumato.samplers.coefficients import lagrange_integrals
from sfumato.samplers.core import Running, Table
from sfumato.samplers.frames import Frame, Variable, resolved
from sfumato.samplers.plan import (
    Row,
    Start,
    Update,
    checked_choice,
    checked_order,
    ddim_row,
    exponential_updates,
    multistep,
    pasts,
    step_orders,
)
from sfumato.samplers.runge_kutta import starting_steps


def exp_ab(
    path: Path,
    x: Tensor,
    times: Tensor,
    *,
    order: int = 3,
    start: Start = "ramp",
    lower_order_final: bool = True,
) -> Running:
    """Exponential Adams-Bashforth of the data in half log_snr, order 1 (DDIM) to 4.

    Order 2 is DPM-Solver++(2M) in its Heun form, order 3 the 3M as it should be. The step to the data is infinite in
    half log_snr, and so of first order; so is that from pure noise, where alpha = 0. start: see `starting_steps`.
    lower_order_final: with fewer than 15 steps the last two are of order 2 and 1.
    """
    return (yield from _exponential(path, x, times, order, start, lower_order_final, noise=False))


def deis(
    path: Path,
    x: Tensor,
    times: Tensor,
    *,
    order: int = 3,
    start: Start = "ramp",
    lower_order_final: bool = True,
) -> Running:
    """DEIS, order 1 (DDIM) to 4: the noise as a polynomial in log(sigma / alpha). Options and ends as of `exp_ab`."""
    return (yield from _exponential(path, x, times, order, start, lower_order_final, noise=True))


def _exponential(
    path: Path, x: Tensor, times: Tensor, order: int, start: Start, lower_order_final: bool, noise: bool
) -> Running:
    table = Table.of(path, times)
    orders = step_orders(table, checked_order(order, 4, "an Adams-Bashforth method"), lower_order_final)
    starts = starting_steps(path, table, start, order, pasts(table))

    def integrals(levels: Sequence[float], end: float) -> list[float]:
        return lagrange_integrals(levels, levels[0], end, rate=-1.0 if noise else 1.0)

    return (yield from multistep(x, exponential_updates(table, orders, starts, noise, integrals)))


def lms(path: Path, x: Tensor, times: Tensor, *, order: int = 4, start: Start = "ramp") -> Running:
    """The linear multistep method in sigma / alpha, order 1 (DDIM) to 4, with integrals that are exact on any grid.

    It keeps its order to the data. Where alpha = 0 sigma / alpha is infinite: DDIM's step. start: see `starting_steps`.
    """
    checked_order(order, 4, "LMS")
    return (yield from multistep(x, adams_updates(path, times, order, "sigma", start)))


def ipndm(
    path: Path,
    x: Tensor,
    times: Tensor,
    *,
    order: int = 4,
    variable: Variable = "auto",
    coefficients: Literal["exact", "published"] = "exact",
    start: Start = "ramp",
) -> Running:
    """Improved PNDM (Zhang & Chen 2023, appendix): Adams-Bashforth, order 1 (DDIM) to 4, up to both ends of a path.

    variable: see `Frame`; "auto" is the path's time if it is linear, and the angle else. coefficients: those of the
    grid, or the "published" ones of an even grid on any, which are of second order on an uneven one.
    """
    checked_order(order, 4, "iPNDM")
    checked_choice("coefficients", coefficients, ("exact", "published"))
    even = coefficients == "published"
    return (yield from multistep(x, adams_updates(path, times, order, variable, start, even)))


def adams_updates(
    path: Path, times: Tensor, order: int, variable: Variable, start: Start, even: bool = False
) -> list[Update]:
    """The plan of an Adams-Bashforth method in a frame. even: with the coefficients of an even grid."""
    table = Table.of(path, times)
    frame = Frame.of(path, torch.tensor(table.t, dtype=torch.float64), variable)
    tau, scale, slope, mix = (part.tolist() for part in frame)
    unbounded = resolved(path, variable) == "sigma"  # at pure noise, so the past starts after it
    past = pasts(table) if unbounded else [i + 1 for i in table.steps]
    starts = starting_steps(path, table, start, order, past)
    updates = []
    for i in table.steps:
        if past[i] == 0:
            updates.append(Update(table.t[i], 0.0, ddim_row(table, i, i + 1), starts[i]))
            continue
        nodes = range(i, i - min(order, past[i]), -1)
        if len(nodes) == 1:
            updates.append(Update(table.t[i], mix[i], _ddim_of_term(table, i, mix[i]), starts[i]))
            continue
        if even:
            h = tau[i + 1] - tau[i]
            integrals = [h * c for c in lagrange_integrals([float(k - i) for k in nodes], 0.0, 1.0)]
        else:
            integrals = lagrange_integrals([tau[k] for k in nodes], tau[i], tau[i + 1])
        weights = [scale[i + 1] * slope[k] * c for k, c in zip(nodes, integrals, strict=True)]
        updates.append(Update(table.t[i], mix[i], Row(scale[i + 1] / scale[i], tuple(weights)), starts[i]))
    return updates


def _ddim_of_term(table: Table, i: int, mix: float) -> Row:
    """DDIM's step, for a term that holds some of x: a step of first order that is exact if x0 were constant."""
    keep, (weight,) = ddim_row(table, i, i + 1)
    return Row(keep - weight * mix, (weight,))

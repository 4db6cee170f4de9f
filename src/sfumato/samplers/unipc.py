"""UniPC: predict with the last answers, then correct the step with the answer at its end (Zhao et al. 2023).

The predictor (UniP) is an exponential multistep method of the data in half log_snr. The answer at the predicted state
serves twice: as the first value of the next prediction, and to correct the state that it was asked at, which raises
the order by one at no further call. The last step is not corrected, as nobody asks at its end.
B(h), of the steps where the paper simplifies, is h ("bh1") or e^h - 1 ("bh2"); for third order it cancels.
"""

from typing import Literal, NamedTuple

from torch import Tensor

from sfumato.paths import Path
from sfumato.samplers.coefficients import lagrange_integrals, moments
from sfumato.samplers.core import Ask, Running, Table
from sfumato.samplers.plan import (
    Row,
    SingleStep,
    Start,
    checked_choice,
    checked_order,
    combined,
    ddim_row,
    exponential_row,
    pasts,
    single_step,
    step_orders,
)
from sfumato.samplers.runge_kutta import starting_steps

Variant = Literal["bh1", "bh2"]


class _Step(NamedTuple):
    """One step: its prediction from the last answers, and its correction from the answer at its end and those."""

    t: float
    predict: Row
    correct: Row | None
    start: SingleStep | None


def unipc(
    path: Path,
    x: Tensor,
    times: Tensor,
    *,
    order: int = 2,
    variant: Variant = "bh2",
    corrector: bool = True,
    start: Start = "ramp",
    lower_order_final: bool = True,
) -> Running:
    """UniPC-p of the data, p from 1 to 3, of order p + 1; without its corrector, UniP, of order p.

    The step to the data is infinite in half log_snr and so of first order; that from pure noise, where alpha = 0, is
    DDIM's and is not corrected. start: see `starting_steps`; the ramp caps p = 3 at order 3. lower_order_final: with
    fewer than 15 steps the last two are of order 2 and 1.
    """
    checked_order(order, 3, "UniPC")
    checked_choice("variant", variant, ("bh1", "bh2"))
    table = Table.of(path, times)
    plan = _planned(path, table, order, variant, start, lower_order_final)
    answers: list[Tensor] = []
    base: Tensor | None = None  # the state that the last step was made from
    correct: Row | None = None
    for step in plan:
        if step.start is not None:
            x, x0 = yield from single_step(x, step.start)
            answers, correct = [x0, *answers[: order - 1]], None
            continue
        x0 = yield Ask(x, step.t)
        if corrector and base is not None and correct is not None:
            x = combined(base, correct, [x0, *answers])
        answers = [x0, *answers[: order - 1]]
        base, correct, x = x, step.correct, combined(x, step.predict, answers)
    return x


def _planned(
    path: Path, table: Table, order: int, variant: Variant, start: Start, lower_order_final: bool
) -> list[_Step]:
    past = pasts(table)
    orders = step_orders(table, order, lower_order_final)
    starts = starting_steps(path, table, start, order, past)
    plan = []
    for i in table.steps:
        if past[i] == 0 or table.sigma[i + 1] == 0:
            plan.append(_Step(table.t[i], ddim_row(table, i, i + 1), None, starts[i]))
            continue
        nodes = range(i, i - orders[i], -1)
        levels, end = [table.half_log_snr[k] for k in nodes], table.half_log_snr[i + 1]
        predict = exponential_row(table, i + 1, nodes, _predicting(levels, end, variant), noise=False)
        weights = _correcting(levels, end, variant)
        correct = Row(predict.keep, tuple(table.alpha[i + 1] * c for c in weights))
        plan.append(_Step(table.t[i], predict, correct, starts[i]))
    return plan


def _predicting(levels: list[float], end: float, variant: Variant) -> list[float]:
    """What the last answers are worth, newest first: exactly, but at second order by the paper's rho = 1 / 2."""
    if len(levels) != 2:
        return lagrange_integrals(levels, levels[0], end, rate=1.0)
    h = end - levels[0]
    whole, _, _ = moments(h, 1.0)
    change = (h if variant == "bh1" else whole) / 2 * h / (levels[0] - levels[1])
    return [whole + change, -change]


def _correcting(levels: list[float], end: float, variant: Variant) -> list[float]:
    """What the answer at the end and the last ones are worth: exactly, but at first order by rho = 1 / 2."""
    if len(levels) > 1:
        return lagrange_integrals([end, *levels], levels[0], end, rate=1.0)
    h = end - levels[0]
    whole, _, _ = moments(h, 1.0)
    change = (h if variant == "bh1" else whole) / 2
    return [change, whole - change]

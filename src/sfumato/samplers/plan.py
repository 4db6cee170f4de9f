"""Plans: a deterministic sampler as numbers, and the two ways to carry them out.

All of them do only this: ask at a state, keep a *term* x0 + mix * x of the answer and the state, and form the next
state as a linear combination of an earlier one and the terms. One differs from another by the coefficients, which
depend on the grid alone. So a sampler plans first, in plain floats, and then one of two loops runs the plan: single
steps (Runge-Kutta: several questions a step, nothing kept) or multistep (one question a step, earlier terms kept).
"""

import math
from collections.abc import Callable, Generator, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from sfumato.errors import ConfigError
from sfumato.samplers.core import Ask, Running, Table

Start = Literal["ramp", "runge_kutta"]
SHORT = 15  # steps below which the last ones are better of low order (Lu et al. 2022b)


class Row(NamedTuple):
    """One linear combination: keep * x + the sum of weights[k] * terms[k]."""

    keep: float
    weights: tuple[float, ...]


class Stage(NamedTuple):
    """A question at time t and the state that `row` makes, and what the term of the answer is: x0 + mix * x."""

    t: float
    row: Row
    mix: float


class SingleStep(NamedTuple):
    """A step that needs no past: its stages in the order of asking, and the row of its result."""

    stages: tuple[Stage, ...]
    end: Row


class Update(NamedTuple):
    """A step of a multistep method: a stage at x itself and the row of the next state, from the terms, newest first.

    start: a single step that stands in for the row where there is too little past.
    """

    t: float
    mix: float
    row: Row
    start: SingleStep | None = None


def combined(x: Tensor, row: Row, terms: Sequence[Tensor]) -> Tensor:
    """The row's combination, one pass over memory for x and for each term that counts."""
    out = None if row.keep == 0 else x if row.keep == 1 else x * row.keep
    for weight, term in zip(row.weights, terms, strict=False):
        if weight != 0:
            out = _scaled(term, weight) if out is None else torch.add(out, term, alpha=weight)
    return torch.zeros_like(x) if out is None else out


def _scaled(term: Tensor, weight: float) -> Tensor:
    return term if weight == 1 else term * weight


def mixed(x0: Tensor, x: Tensor, mix: float) -> Tensor:
    """The term of an answer."""
    return x0 if mix == 0 else torch.add(x0, x, alpha=mix)


def single_step(x: Tensor, plan: SingleStep) -> Generator[Ask, Tensor, tuple[Tensor, Tensor]]:
    """Carry out one step from x. Returns the next state, and the answer at x."""
    terms: list[Tensor] = []
    first: Tensor | None = None
    for stage in plan.stages:
        state = combined(x, stage.row, terms)
        x0 = yield Ask(state, stage.t)
        first = x0 if first is None else first
        terms.append(mixed(x0, state, stage.mix))
    assert first is not None  # a step has a stage
    return combined(x, plan.end, terms), first


def single_steps(x: Tensor, plans: Sequence[SingleStep]) -> Running:
    """Carry out step after step."""
    for plan in plans:
        x, _ = yield from single_step(x, plan)
    return x


def multistep(x: Tensor, updates: Sequence[Update]) -> Running:
    """Carry out the updates, keeping as many terms as the longest row has."""
    most = max(len(update.row.weights) for update in updates)
    terms: list[Tensor] = []
    for update in updates:
        if update.start is None:
            x0 = yield Ask(x, update.t)
            terms = [mixed(x0, x, update.mix), *terms[: most - 1]]
            x = combined(x, update.row, terms)
        else:
            here = x
            x, x0 = yield from single_step(x, update.start)
            terms = [mixed(x0, here, update.mix), *terms[: most - 1]]
    return x


def ddim_row(table: Table, i: int, j: int) -> Row:
    """The first-order step from time i to time j, on x and x0 themselves (mix = 0): it works at both ends of a path."""
    ratio = table.sigma[j] / table.sigma[i]
    return Row(ratio, (table.alpha[j] - ratio * table.alpha[i],))


def ddim_single(table: Table, i: int) -> SingleStep:
    """The same as a step of its own: what single-step methods do where theirs is not defined."""
    return SingleStep((Stage(table.t[i], Row(1.0, ()), 0.0),), ddim_row(table, i, i + 1))


def pasts(table: Table) -> list[int]:
    """How many finite values of half log_snr, and so of what is polynomial in it, there are at each step's start.

    None at pure noise, where alpha = 0: a step from there is of first order, and its answer is of no use later.
    """
    first = next((i for i in table.steps if table.alpha[i] > 0), len(table.t))
    return [max(i - first + 1, 0) for i in table.steps]


def step_orders(table: Table, order: int, lower_order_final: bool) -> list[int]:
    """The order of each step: what the past allows, 1 where half log_snr is infinite at either end.

    lower_order_final: with fewer than 15 steps, 2 in the last but one and 1 in the last, as few long steps want it.
    """
    last = len(table.steps)
    orders = [max(min(order, past), 1) for past in pasts(table)]
    if lower_order_final and last < SHORT:
        orders = [min(k, last - i) for i, k in enumerate(orders)]
    if table.sigma[-1] == 0:
        orders[-1] = 1
    return orders


def exponential_row(table: Table, j: int, nodes: Sequence[int], integrals: Sequence[float], noise: bool) -> Row:
    """A step to time j from nodes[0], given the integrals of e^(+-(l - l_j)) that each node's value is worth.

    The values are x0, or the noise as (x - alpha x0) / sigma if `noise`, whose term is x0 - x / alpha.
    """
    i, level = nodes[0], table.half_log_snr
    if noise:
        weights = [table.alpha[j] * math.exp(level[k] - level[j]) * c for k, c in zip(nodes, integrals, strict=True)]
        return Row(table.alpha[j] / table.alpha[i], tuple(weights))
    return Row(table.sigma[j] / table.sigma[i], tuple(table.alpha[j] * c for c in integrals))


def noise_mix(table: Table, i: int, noise: bool) -> float:
    """The mix of a term in a method of the noise, or of the data."""
    return -1 / table.alpha[i] if noise and table.alpha[i] > 0 else 0.0


Integrals = Callable[[Sequence[float], float], Sequence[float]]  # (levels, newest first; the end) -> one each


def exponential_updates(
    table: Table,
    orders: Sequence[int],
    starts: Sequence[SingleStep | None],
    noise: bool,
    integrals: Integrals,
) -> list[Update]:
    """The plan of a multistep method in half log_snr: what `integrals` says of the last values, as many as the order.

    Where half log_snr is infinite at either end, the step is DDIM's.
    """
    updates = []
    for i, (order, start) in enumerate(zip(orders, starts, strict=True)):
        level, end = table.half_log_snr, table.half_log_snr[i + 1]
        if not (math.isfinite(level[i]) and math.isfinite(end)):
            mix, row = 0.0, ddim_row(table, i, i + 1)
        else:
            nodes = range(i, i - order, -1)
            mix = noise_mix(table, i, noise)
            row = exponential_row(table, i + 1, nodes, integrals([level[k] for k in nodes], end), noise)
        updates.append(Update(table.t[i], mix, row, start))
    return updates


def checked_order(order: int, most: int, name: str) -> int:
    """The order, if the method has it."""
    if isinstance(order, bool) or order not in range(1, most + 1):
        raise ConfigError(
            f"{name} is of order 1 to {most}", where="sampler.order", seen=repr(order), fix=f"order={min(3, most)}"
        )
    return order


def checked_choice(option: str, value: str, allowed: Sequence[str]) -> str:
    """The value, if the option has it."""
    if value not in allowed:
        raise ConfigError(
            f"no such {option}", where=f"sampler.{option}", seen=repr(value), fix=f"{option}={' or '.join(allowed)}"
        )
    return value

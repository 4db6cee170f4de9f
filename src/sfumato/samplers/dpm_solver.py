"""DPM-Solver: exponential integrators in half log_snr, of the noise (Lu et al. 2022a) and of the data (++, 2022b).

With l = log(alpha / sigma) the ODE is solved exactly but for what the model says, as a function of l:
x_s = (sigma_s / sigma_t) x_t + sigma_s * integral of e^l x0(l) dl, or
x_s = (alpha_s / alpha_t) x_t - alpha_s * integral of e^-l eps(l) dl.
Single-step methods ask in between (2S, 3); multistep ones extrapolate from the last answers (2M, 3M), at one call a
step. Where l is infinite, from pure noise with alpha = 0 and to the data, the step is of first order, and so DDIM's.
"""

import math
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

from sfumato.errors import ConfigError
from sfumato.paths import Path
from sfumato.samplers.coefficients import moments
from sfumato.samplers.core import Running, Table
from sfumato.samplers.plan import (
    Row,
    SingleStep,
    Stage,
    Start,
    checked_choice,
    ddim_single,
    exponential_row,
    exponential_updates,
    multistep,
    noise_mix,
    pasts,
    single_steps,
    step_orders,
)
from sfumato.samplers.runge_kutta import starting_steps

Form = Literal["midpoint", "heun"]  # how the first derivative is weighed: as published first, or by its exact integral
Of = Literal["data", "noise"]  # what is extrapolated


def dpm_1(path: Path, x: Tensor, times: Tensor) -> Running:
    """DPM-Solver-1, which is DDIM."""
    table = Table.of(path, times)
    return (yield from single_steps(x, [ddim_single(table, i) for i in table.steps]))


def dpm_2(path: Path, x: Tensor, times: Tensor, *, r: float = 0.5, form: Form = "midpoint") -> Running:
    """DPM-Solver-2, two calls a step: the second at the share `r` of the step in half log_snr."""
    return (yield from _single(path, x, times, (r,), form, noise=True))


def dpm_3(
    path: Path, x: Tensor, times: Tensor, *, r1: float = 1 / 3, r2: float = 2 / 3, form: Form = "midpoint"
) -> Running:
    """DPM-Solver-3, three calls a step, at its start and at the shares r1 < r2 of it.

    form: "midpoint" is the paper's, whose result forgets the second answer; "heun" has the parabola through all three.
    """
    return (yield from _single(path, x, times, (r1, r2), form, noise=True))


def dpmpp_2s(path: Path, x: Tensor, times: Tensor, *, r: float = 0.5, form: Form = "midpoint") -> Running:
    """DPM-Solver++(2S), two calls a step: the second at the share `r` of the step in half log_snr."""
    return (yield from _single(path, x, times, (r,), form, noise=False))


def dpmpp_2m(
    path: Path,
    x: Tensor,
    times: Tensor,
    *,
    form: Form = "midpoint",
    of: Of = "data",
    lower_order_final: bool = True,
) -> Running:
    """DPM-Solver++(2M); of="noise" is the multistep DPM-Solver-2. The first step is of first order.

    lower_order_final: with fewer than 15 steps the last one is of first order, as that to the data always is.
    """
    checked_choice("form", form, ("midpoint", "heun"))
    noise = _of_noise(of)
    table = Table.of(path, times)
    orders = step_orders(table, 2, lower_order_final)

    def integrals(levels: Sequence[float], end: float) -> Sequence[float]:
        return _two(levels, end, form, noise)

    updates = exponential_updates(table, orders, [None] * len(orders), noise, integrals)
    return (yield from multistep(x, updates))


def dpmpp_3m(
    path: Path,
    x: Tensor,
    times: Tensor,
    *,
    coef: Literal["exact", "published"] = "exact",
    form: Form = "heun",
    of: Of = "data",
    start: Start = "ramp",
    lower_order_final: bool = True,
) -> Running:
    """DPM-Solver++(3M); of="noise" is the multistep DPM-Solver-3.

    coef: the published code takes half of the second derivative's integral, which leaves it of second order; "exact"
    takes all of it. form: of the steps of second order at either end. start: see `starting_steps`.
    """
    checked_choice("coef", coef, ("exact", "published"))
    checked_choice("form", form, ("midpoint", "heun"))
    noise = _of_noise(of)
    table = Table.of(path, times)
    starts = starting_steps(path, table, start, 3, pasts(table))

    def integrals(levels: Sequence[float], end: float) -> Sequence[float]:
        if len(levels) < 3:
            return _two(levels, end, form, noise)
        return _three(levels, end, 1.0 if coef == "exact" else 0.5, noise)

    updates = exponential_updates(table, step_orders(table, 3, lower_order_final), starts, noise, integrals)
    return (yield from multistep(x, updates))


def _of_noise(of: str) -> bool:
    return checked_choice("of", of, ("data", "noise")) == "noise"


def _rate(noise: bool) -> float:
    return -1.0 if noise else 1.0


def _two(levels: Sequence[float], end: float, form: Form, noise: bool) -> list[float]:
    """What the last one or two values are worth: m0 and (m0 - m1) / r, the change that it makes in one step."""
    h = end - levels[0]
    whole, first, _ = moments(h, _rate(noise))
    if len(levels) == 1:
        return [whole]
    change = (whole / 2 if form == "midpoint" else first) * h / (levels[0] - levels[1])
    return [whole + change, -change]


def _three(levels: Sequence[float], end: float, share: float, noise: bool) -> list[float]:
    """What the last three values are worth. share: of the integral of the second difference's part."""
    h = end - levels[0]
    r0, r1 = (levels[0] - levels[1]) / h, (levels[1] - levels[2]) / h
    whole, first, second = moments(h, _rate(noise))
    d10, d11 = (1 / r0, -1 / r0, 0.0), (0.0, 1 / r1, -1 / r1)  # the first differences, as weights of the three values
    weights = []
    for k in range(3):
        slope = d10[k] + (r0 / (r0 + r1)) * (d10[k] - d11[k])
        curve = (d10[k] - d11[k]) / (r0 + r1)
        weights.append((whole if k == 0 else 0.0) + first * slope + share * second * curve)
    return weights


def _single(path: Path, x: Tensor, times: Tensor, shares: Sequence[float], form: Form, noise: bool) -> Running:
    """The single-step methods that ask at these shares of a step."""
    checked_choice("form", form, ("midpoint", "heun"))
    checked_shares(shares)
    table = Table.of(path, times)
    plans = [single_plan(path, table, i, table.t[i + 1], shares, form, noise) for i in table.steps]
    return (yield from single_steps(x, plans))


def checked_shares(shares: Sequence[float]) -> None:
    """ConfigError if a step cannot be asked at these shares of it."""
    if not all(low < high for low, high in zip([0.0, *shares], [*shares, 1.0 + 1e-9], strict=True)):
        raise ConfigError(
            "a step is asked at rising shares of it, from 0 to 1",
            where="sampler.r",
            seen=", ".join(f"{r:g}" for r in shares),
            fix="r=0.5, or r1=1/3 and r2=2/3",
        )


def single_plan(
    path: Path, table: Table, i: int, end: float, shares: Sequence[float], form: Form, noise: bool
) -> SingleStep:
    """One step from time i of a table to the time `end`; DDIM's where half log_snr is infinite at either."""
    both = Table.of(path, torch.tensor([table.t[i], end], dtype=torch.float64))
    level, to = both.half_log_snr
    if not (math.isfinite(level) and math.isfinite(to)):
        return ddim_single(both, 0)
    levels = torch.tensor([level + r * (to - level) for r in shares], dtype=torch.float64)
    inside = path.time(2 * levels).tolist()
    nodes = Table.of(path, torch.tensor([table.t[i], *inside, end], dtype=torch.float64))
    make = _second if len(shares) == 1 else _third
    return _planned(nodes, make(shares, to - level, form, noise), noise)


def _planned(nodes: Table, rows: Sequence[Sequence[float]], noise: bool) -> SingleStep:
    """A step through the nodes: what the values so far are worth at each node after the first."""
    made = [exponential_row(nodes, j, range(len(c)), c, noise) for j, c in enumerate(rows, start=1)]
    states = [Row(1.0, ()), *made[:-1]]
    stages = [Stage(nodes.t[k], row, noise_mix(nodes, k, noise)) for k, row in enumerate(states)]
    return SingleStep(tuple(stages), made[-1])


Rows = list[list[float]]
Make = Callable[[Sequence[float], float, Form, bool], Rows]


def _second(shares: Sequence[float], h: float, form: Form, noise: bool) -> Rows:
    """DPM-Solver-2 (Lu et al. 2022a, algorithm 1 and its general r)."""
    (r,) = shares
    whole, first, _ = moments(h, _rate(noise))
    change = (whole / 2 if form == "midpoint" else first) / r
    return [[moments(r * h, _rate(noise))[0]], [whole - change, change]]


def _third(shares: Sequence[float], h: float, form: Form, noise: bool) -> Rows:
    """DPM-Solver-3 (Lu et al. 2022a, algorithm 2)."""
    r1, r2 = shares
    whole, first, second = moments(h, _rate(noise))
    inner, change, _ = moments(r2 * h, _rate(noise))
    change *= r2 / r1
    rows = [[moments(r1 * h, _rate(noise))[0]], [inner - change, change]]
    if form == "midpoint":
        return [*rows, [whole - first / r2, 0.0, first / r2]]
    to_1, to_2 = r2 / (r1 * (r2 - r1)), -r1 / (r2 * (r2 - r1))  # the parabola's slope at 0 from the two differences
    curve_1, curve_2 = -1 / (r1 * (r2 - r1)), 1 / (r2 * (r2 - r1))
    one, two = first * to_1 + second * curve_1, first * to_2 + second * curve_2
    return [*rows, [whole - one - two, one, two]]

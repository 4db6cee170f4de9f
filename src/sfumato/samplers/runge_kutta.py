"""Runge-Kutta methods: Euler's, the classical one of fourth order, and Dormand and Prince's with a step that adapts.

A step is several questions and keeps no past, so these are for flows that are worth solving well: reflow's pairs,
likelihoods, references. Nothing may be asked at the data, where sigma = 0, so the step that lands there is one of third
order whose questions all lie before it (Bogacki & Shampine 1989); a single step costs the whole no order.
"""

import math
from collections.abc import Generator
from typing import NamedTuple

import torch
from torch import Tensor

from sfumato.errors import ConfigError, DataError
from sfumato.paths import Path
from sfumato.samplers.core import Ask, Running, Table
from sfumato.samplers.frames import Frame, Variable, resolved, time_at
from sfumato.samplers.plan import (
    Row,
    SingleStep,
    Stage,
    Start,
    checked_choice,
    combined,
    ddim_single,
    mixed,
    single_steps,
)


class Tableau(NamedTuple):
    """An explicit Runge-Kutta method. error: the weights less those of the embedded method, if there is one."""

    nodes: tuple[float, ...]
    rows: tuple[tuple[float, ...], ...]
    weights: tuple[float, ...]
    error: tuple[float, ...] = ()


EULER = Tableau((0,), ((),), (1,))
HEUN = Tableau((0, 1), ((), (1,)), (1 / 2, 1 / 2))
RK4 = Tableau((0, 1 / 2, 1 / 2, 1), ((), (1 / 2,), (0, 1 / 2), (0, 0, 1)), (1 / 6, 1 / 3, 1 / 3, 1 / 6))
LANDING = Tableau(  # third order; the midpoint rule, of second, is embedded in it
    (0, 1 / 2, 3 / 4), ((), (1 / 2,), (0, 3 / 4)), (2 / 9, 1 / 3, 4 / 9), (2 / 9, -2 / 3, 4 / 9)
)
DORMAND_PRINCE = Tableau(  # Dormand & Prince 1980; its last stage is asked at the result
    (0, 1 / 5, 3 / 10, 4 / 5, 8 / 9, 1, 1),
    (
        (),
        (1 / 5,),
        (3 / 40, 9 / 40),
        (44 / 45, -56 / 15, 32 / 9),
        (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
        (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
        (35 / 384, 0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
    ),
    (35 / 384, 0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84, 0),
    (71 / 57600, 0, -71 / 16695, 71 / 1920, -17253 / 339200, 22 / 525, -1 / 40),
)


def euler(path: Path, x: Tensor, times: Tensor, *, variable: Variable = "sigma") -> Running:
    """Euler's method for the probability-flow ODE.

    variable: what it is solved in, see `Frame`. "sigma" is k-diffusion's, which is DDIM on every path; "time" is
    dx/dt = alpha' x0 + sigma' eps in the path's own time. On the linear path, that of flow matching, both are one.
    """
    table = Table.of(path, times)
    return (yield from single_steps(x, [runge_kutta_step(path, table, i, EULER, variable) for i in table.steps]))


def rk4(path: Path, x: Tensor, times: Tensor, *, variable: Variable = "auto") -> Running:
    """The classical method of fourth order, four calls a step, three in the one to the data.

    variable: what the ODE is solved in, see `Frame`; "auto" is the path's time if it is linear, and the angle else.
    """
    table = Table.of(path, times)
    return (yield from single_steps(x, [runge_kutta_step(path, table, i, RK4, variable) for i in table.steps]))


def runge_kutta_step(path: Path, table: Table, i: int, tableau: Tableau, variable: Variable) -> SingleStep:
    """Step i of a grid by a method; by `LANDING` where it would ask at the data, by DDIM where tau is infinite."""
    if table.alpha[i] == 0 and resolved(path, variable) == "sigma":
        return ddim_single(table, i)
    if table.sigma[i + 1] == 0 and 1 in tableau.nodes:
        tableau = LANDING
    return _planned(path, table.t[i], table.t[i + 1], tableau, variable)[0]


def starting_steps(path: Path, table: Table, start: Start, order: int, past: list[int]) -> list[SingleStep | None]:
    """What stands in for a multistep method where its past is too short for its order: nothing, or `RK4` in the angle.

    start: "ramp" lets the order rise from 1, which caps the order of the whole at 2 (but for UniPC, whose corrector
    adds one); "runge_kutta" costs three more calls for each of the first order - 1 steps, and keeps it.
    """
    checked_choice("start", start, ("ramp", "runge_kutta"))
    short = [start == "runge_kutta" and known < order for known in past]
    return [runge_kutta_step(path, table, i, RK4, "angle") if short[i] else None for i in table.steps]


def _planned(path: Path, t: float, s: float, tableau: Tableau, variable: Variable) -> tuple[SingleStep, Row]:
    """A step from t to s, and the row of its estimated error, which is in units of y."""
    ends = Frame.of(path, torch.tensor([t, s], dtype=torch.float64), variable)
    (start, end), (scale, scale_end) = ends.tau.tolist(), ends.scale.tolist()
    h = end - start
    inside = time_at(path, torch.tensor([start + c * h for c in tableau.nodes], dtype=torch.float64), variable).tolist()
    times = [t if c == 0 else s if c == 1 else min(max(u, s), t) for c, u in zip(tableau.nodes, inside, strict=True)]
    frame = Frame.of(path, torch.tensor(times, dtype=torch.float64), variable)
    scales, slopes, mixes = frame.scale.tolist(), frame.slope.tolist(), frame.mix.tolist()

    def row(at: float, weights: tuple[float, ...]) -> Row:
        return Row(at / scale, tuple(at * h * w * slope for w, slope in zip(weights, slopes, strict=False)))

    stages = [Stage(times[k], row(scales[k], a), mixes[k]) for k, a in enumerate(tableau.rows)]
    return SingleStep(tuple(stages), row(scale_end, tableau.weights)), Row(0.0, row(1.0, tableau.error).weights)


def dopri5(
    path: Path,
    x: Tensor,
    times: Tensor,
    *,
    rtol: float = 1e-5,
    atol: float = 1e-5,
    variable: Variable = "auto",
    max_steps: int = 1000,
) -> Running:
    """Dormand and Prince's method of fifth order, whose steps are as long as the tolerances allow: six calls each.

    Of the grid only the two ends count, and its first step as the first to be tried. The error of a step is measured
    per sample, as the root mean square over its elements of error / (atol + rtol |y|), and the worst sample of the
    batch decides; so here, and nowhere else, batch-mates move a result, within the tolerances, and the device is waited
    for once a step. ConfigError if max_steps tries do not reach the end, DataError if an answer is not finite.
    """
    if not (rtol > 0 and atol > 0 and max_steps >= 1):
        seen = f"rtol={rtol:g}, atol={atol:g}, max_steps={max_steps}"
        raise ConfigError("tolerances are above 0, and so are steps", where="sampler", seen=seen, fix="rtol=1e-5")
    table = Table.of(path, times)
    if resolved(path, variable) == "sigma" and table.alpha[0] == 0:
        raise ConfigError("sigma / alpha is infinite at pure noise", where="sampler.variable", fix="variable=angle")
    tau = Frame.of(path, torch.tensor(table.t, dtype=torch.float64), variable).tau.tolist()
    t, here, goal, h = table.t[0], tau[0], tau[-1], tau[1] - tau[0]
    known: tuple[Tensor, ...] = ()
    for _ in range(max_steps):
        left = goal - here
        ends = abs(h) >= abs(left) * (1 - 1e-12)
        landing = ends and table.sigma[-1] == 0
        s = table.t[-1] if ends else float(time_at(path, torch.tensor(here + h, dtype=torch.float64), variable))
        tableau = LANDING if landing else DORMAND_PRINCE
        state, terms, error = yield from _attempt(path, x, t, s, tableau, variable, known, rtol, atol)
        growth = 0.9 * max(error, 1e-10) ** (-1 / 3 if landing else -1 / 5)
        if error <= 1:
            if ends:
                return state
            x, t, here, known = state, s, here + h, (terms[-1],)
            h *= min(growth, 5.0)
        else:  # a landing that failed is tried again from nearer by
            h = left * (1 - max(growth, 0.1)) if landing else h * max(growth, 0.1)
            known = (terms[0],)
    raise ConfigError(
        "the tolerances are too tight for the steps allowed",
        where="sampler.max_steps",
        seen=f"t = {t:.4g} after {max_steps} steps",
        fix="rtol=1e-4 atol=1e-4",
    )


def _attempt(
    path: Path,
    x: Tensor,
    t: float,
    s: float,
    tableau: Tableau,
    variable: Variable,
    known: tuple[Tensor, ...],
    rtol: float,
    atol: float,
) -> Generator[Ask, Tensor, tuple[Tensor, list[Tensor], float]]:
    """One step from t to s: its result, its terms, and its error in tolerances. `known` is the first term, if known."""
    plan, wrong = _planned(path, t, s, tableau, variable)
    terms, state = list(known), x
    for stage in plan.stages[len(known) :]:
        state = combined(x, stage.row, terms)
        x0 = yield Ask(state, stage.t)
        terms.append(mixed(x0, state, stage.mix))
    if tableau.nodes[-1] != 1:
        state = combined(x, plan.end, terms)
    scale, scale_end = Frame.of(path, torch.tensor([t, s], dtype=torch.float64), variable).scale.tolist()
    size = torch.maximum(x.detach().abs() / scale, state.detach().abs() / scale_end)
    share = combined(x, wrong, terms).detach() / (atol + rtol * size)
    error = float(share.square().reshape(len(x), -1).mean(1).sqrt().max())
    if not math.isfinite(error):
        raise DataError("the model's answers are not finite numbers", where="sampling", seen=f"between t = {s} and {t}")
    return state, terms, error

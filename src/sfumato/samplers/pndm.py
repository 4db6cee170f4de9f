"""PNDM: Adams-Bashforth with the coefficients of an even grid, carried from time to time by DDIM (Liu et al. 2022).

A step moves x by DDIM with a mean of the last four noises in the place of one ("pseudo linear multistep", PLMS). In
sigma / alpha that is Adams-Bashforth with the wrong coefficients wherever the grid is uneven in it, so the order is 2.
The past that it lacks at first is made by a pseudo Runge-Kutta method, or by one step of Heun's.
"""

from typing import Literal

import torch
from torch import Tensor

from sfumato.paths import Path
from sfumato.samplers.adams import adams_updates
from sfumato.samplers.core import Running, Table
from sfumato.samplers.frames import Frame
from sfumato.samplers.plan import Row, SingleStep, Stage, checked_choice, multistep, pasts
from sfumato.samplers.runge_kutta import HEUN, runge_kutta_step


def pndm(path: Path, x: Tensor, times: Tensor, *, start: Literal["plms", "runge_kutta"] = "plms") -> Running:
    """start: "plms" asks once more in the first step, and lets the order rise (as Stable Diffusion is sampled);
    "runge_kutta" makes the first three steps of four calls each, in the middle of the path's time (as published).
    """
    checked_choice("start", start, ("plms", "runge_kutta"))
    table = Table.of(path, times)
    updates = adams_updates(path, times, 4, "sigma", "ramp", even=True)
    for i, past in enumerate(pasts(table)):
        if past == 0 or table.sigma[i + 1] == 0:
            continue
        if start == "runge_kutta" and past < 4:
            updates[i] = updates[i]._replace(start=_pseudo_runge_kutta(path, table, i))
        elif past == 1:
            updates[i] = updates[i]._replace(start=runge_kutta_step(path, table, i, HEUN, "sigma"))
    return (yield from multistep(x, updates))


def _pseudo_runge_kutta(path: Path, table: Table, i: int) -> SingleStep:
    """The classical method's four noises and their mean, carried on by DDIM and not by tangents (Liu et al. 2022, eq.
    13).
    """
    t, s = table.t[i], table.t[i + 1]
    times = [t, (t + s) / 2, (t + s) / 2, s]
    frame = Frame.of(path, torch.tensor(times, dtype=torch.float64), "sigma")
    tau, scale, slope, mix = (part.tolist() for part in frame)

    def row(k: int, weights: tuple[float, ...]) -> Row:
        """To node k, along a mean of the noises."""
        move = scale[k] * (tau[k] - tau[0])
        return Row(scale[k] / scale[0], tuple(move * w * a for w, a in zip(weights, slope, strict=False)))

    rows = (Row(1.0, ()), row(1, (1,)), row(2, (0, 1)), row(3, (0, 0, 1)))
    stages = tuple(Stage(times[k], rows[k], mix[k]) for k in range(4))
    return SingleStep(stages, row(3, (1 / 6, 1 / 3, 1 / 3, 1 / 6)))

"""Ancestral noise: a solver steps down past the next noise level, and fresh noise is drawn to come back up to it.

k-diffusion has these for the variance-exploding path, which every path is in x / alpha and sigma / alpha. In x itself
that rescales what the fresh noise is added to: on the linear path the signal must fall as the noise is put back. So
Euler's with eta = 1 is the posterior's step, and thus DDPM's, on all paths; the others solve the way down in two calls.
eta: fresh noise in units of the posterior's; 0 is the solver alone; more than 1 is allowed, up to where all of the old
noise is replaced. noise: a factor on what is drawn, for models that underestimate it.
"""

import math
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from sfumato.errors import ConfigError
from sfumato.paths import Path
from sfumato.samplers.core import Ask, Draw, Move, Running, Table, ddim_move, posterior_move
from sfumato.samplers.dpm_solver import checked_shares, single_plan
from sfumato.samplers.plan import Row, SingleStep, ddim_single, single_step


def euler_ancestral(path: Path, x: Tensor, times: Tensor, *, eta: float = 1.0, noise: float = 1.0) -> Running:
    """Euler's method in sigma / alpha, so DDIM's way down; eta = 1 is DDPM's step on any grid."""
    _checked(eta, noise)
    table = Table.of(path, times)
    for i in table.steps:
        x0 = yield Ask(x, table.t[i])
        move = _move(table, i, eta)
        x = move.mean(x, x0)
        if move.std * noise > 0:
            x = yield Draw(x, move.std * noise)
    return x


def dpm_2_ancestral(
    path: Path, x: Tensor, times: Tensor, *, r: float = 0.5, eta: float = 1.0, noise: float = 1.0
) -> Running:
    """DPM-Solver-2's way down ("DPM2 a"), two calls a step, the second at the share `r` of it in half log_snr."""
    return (yield from _downward(path, x, times, r, eta, noise, of_noise=True))


def dpmpp_2s_ancestral(
    path: Path, x: Tensor, times: Tensor, *, r: float = 0.5, eta: float = 1.0, noise: float = 1.0
) -> Running:
    """DPM-Solver++(2S)'s way down ("DPM++ 2S a"), two calls a step, the second at the share `r` of it."""
    return (yield from _downward(path, x, times, r, eta, noise, of_noise=False))


def dpmpp_sde(path: Path, x: Tensor, times: Tensor, *, r: float = 0.5, eta: float = 1.0, noise: float = 1.0) -> Running:
    """ "DPM++ SDE": like 2S, but the state that the second call sees, at the share `r` of the step, has fresh noise."""
    _checked(eta, noise)
    checked_shares((r,))
    table = Table.of(path, times)
    inner = [_inside(path, table, i, r, eta) for i in table.steps]
    for i in table.steps:
        x0 = yield Ask(x, table.t[i])
        if (inside := inner[i]) is not None:
            t, move = inside
            state = yield Draw(move.mean(x, x0), move.std * noise)
            x0 = torch.lerp(x0, (yield Ask(state, t)), 1 / (2 * r))
        move = _move(table, i, eta)
        x = move.mean(x, x0)
        if move.std * noise > 0:
            x = yield Draw(x, move.std * noise)
    return x


def _checked(eta: float, noise: float) -> None:
    for name, value in (("eta", eta), ("noise", noise)):
        if not value >= 0:
            raise ConfigError(f"{name} is not negative", where=f"sampler.{name}", seen=f"{value:g}", fix=f"{name}=1")


def _move(table: Table, i: int, eta: float) -> Move:
    """One step of Euler's: the way down and the noise back up, as one draw."""
    return ddim_move(table, i, min(eta * posterior_move(table, i).std, table.sigma[i + 1]))


class _Inside(NamedTuple):
    """The question inside a step: when, and the ancestral step to it."""

    t: float
    move: Move


def _inside(path: Path, table: Table, i: int, r: float, eta: float) -> _Inside | None:
    """None at pure noise and before the data, where the share of a step in half log_snr means nothing."""
    level, end = table.half_log_snr[i : i + 2]
    if not (math.isfinite(level) and math.isfinite(end)):
        return None
    t = float(path.time(torch.tensor(2 * (level + r * (end - level)), dtype=torch.float64)))
    return _Inside(t, _move(Table.of(path, torch.tensor([table.t[i], t], dtype=torch.float64)), 0, eta))


class _Down(NamedTuple):
    """A solver's step past the next noise level, in units of the next time's signal, and the noise to come back."""

    step: SingleStep
    std: float


def _downward(path: Path, x: Tensor, times: Tensor, r: float, eta: float, noise: float, of_noise: bool) -> Running:
    _checked(eta, noise)
    checked_shares((r,))
    table = Table.of(path, times)
    for step, std in [_down(path, table, i, r, eta, of_noise) for i in table.steps]:
        x, _ = yield from single_step(x, step)
        if std * noise > 0:
            x = yield Draw(x, std * noise)
    return x


def _down(path: Path, table: Table, i: int, r: float, eta: float, of_noise: bool) -> _Down:
    std = min(eta * posterior_move(table, i).std, table.sigma[i + 1])
    left = math.sqrt(table.sigma[i + 1] ** 2 - std**2)
    if std == 0 or left == 0:
        step = ddim_single(replace(table, sigma=[*table.sigma[: i + 1], left]), i) if std else None
        return _Down(step or single_plan(path, table, i, table.t[i + 1], (r,), "midpoint", of_noise), std)
    end = path.time(torch.tensor(2 * math.log(table.alpha[i + 1] / left), dtype=torch.float64))
    step = single_plan(path, table, i, float(end), (r,), "midpoint", of_noise)
    scale = table.alpha[i + 1] / float(path.alpha(end))
    row = Row(step.end.keep * scale, tuple(weight * scale for weight in step.end.weights))
    return _Down(step._replace(end=row), std)

"""The teacher: trajectories of the ODE by very many steps, and the best few of their times for short runs.

One long step from t to s that keeps x0 is wrong by how far the trajectory bends in between. Every such step is known
from the trajectory alone, without asking the model again; the n steps with the least total error are a shortest path,
found by dynamic programming (GITS: Chen et al. 2024).
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sfumato.denoiser import Denoise
from sfumato.errors import ConfigError
from sfumato.grids import uniform_log_snr
from sfumato.samplers.adams import exp_ab
from sfumato.samplers.core import Table
from sfumato.samplers.drive import sample


class Problem(NamedTuple):
    """States of pure noise (B, ...), and the model that answers for just these rows, guidance and conditions within."""

    x: Tensor
    denoise: Denoise


class Trajectories(NamedTuple):
    """times (M + 1,), the states at them (M + 1, B, ...), and the model's answers at all but the last (M, B, ...)."""

    times: Tensor
    x: Tensor
    x0: Tensor


@torch.no_grad()
def solved(problem: Problem, steps: int = 100, *, start: float = 1.0) -> Trajectories:
    """The trajectories through a problem's states, by a method of third order with very many steps."""
    path = problem.denoise.path
    times = uniform_log_snr(path, steps, start=start)
    walk = list(sample(exp_ab(path, problem.x, times, order=3), problem.denoise))
    states = torch.stack([step.x for step in walk])
    return Trajectories(times, states, torch.stack([step.x0 for step in walk[:-1]]))


def step_errors(found: Trajectories, table: Table) -> Tensor:
    """The error of one step that keeps x0, from any time to any later one: (M + 1, M + 1), infinite where it goes back.

    A median over the samples of the root mean square in units of the data: x / sqrt(alpha^2 + sigma^2).
    """
    last = len(table.t) - 1
    cost = torch.full((last + 1, last + 1), torch.inf, dtype=torch.float64)
    for i in range(last):
        for j in range(i + 1, last + 1):
            ratio = table.sigma[j] / table.sigma[i]
            guess = found.x[i] * ratio + found.x0[i] * (table.alpha[j] - ratio * table.alpha[i])
            size = (table.alpha[j] ** 2 + table.sigma[j] ** 2) ** 0.5
            error = (guess - found.x[j]).flatten(1).square().mean(1).sqrt() / size
            cost[i, j] = error.double().median().cpu()
    return cost


def best_times(problems: Sequence[Problem], n: int, *, candidates: int = 40, start: float = 1.0) -> Tensor:
    """The n + 1 times, of a fine grid's, whose n steps have the least total error: float64, from `start` to 0."""
    if n < 1 or n > candidates:
        raise ConfigError(f"1 to {candidates} steps can be tuned", where="steps", seen=str(n), fix="steps=8")
    path, total, times = problems[0].denoise.path, torch.zeros(()), torch.zeros(0)
    for problem in problems:
        found = solved(problem, candidates, start=start)
        times = found.times
        total = total + step_errors(found, Table.of(path, times))
    return times[_shortest(total, n)]


def _shortest(cost: Tensor, n: int) -> list[int]:
    """The path of n edges from the first node to the last with the least total cost."""
    nodes = len(cost)
    best, before = torch.full((nodes,), torch.inf, dtype=torch.float64), []
    best[0] = 0.0
    for _ in range(n):
        through = best[:, None] + cost
        best, previous = through.min(0)
        before.append(previous)
    place = [nodes - 1]
    for previous in reversed(before):
        place.append(int(previous[place[-1]]))
    return place[::-1]

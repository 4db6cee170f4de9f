"""Learning a sampler of n calls: its times and coefficients are numbers, and gradients flow through the whole run to
them (S4S: Frankel et al. 2025; bespoke solvers: Shaul et al. 2024). The model itself is not touched.

The run is `learned`'s. It starts as a known sampler, on a known grid or on the times of the dynamic programme,
whichever is better; so before the first update it is sound, and the best one met on other noise is what is kept.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sfumato.grids import logistic
from sfumato.paths import Path, log_snr
from sfumato.samplers.adams import ipndm
from sfumato.samplers.learned import rows_of
from sfumato.tuning.teacher import Problem, best_times, solved

Progress = Callable[[int, int], None]
EARLIEST = 1e-4  # as near to the start and to the data as times may be pushed, in t


@dataclass(frozen=True)
class Tuned:
    """What was found. error: on noise that was not tuned on, the median over the samples of the root mean square
    distance to the end of the teacher's trajectory; before: that of the sampler it started as.
    """

    times: list[float]
    rows: list[list[float]]
    error: float
    before: float

    @property
    def steps(self) -> int:
        return len(self.times) - 1

    def settings(self) -> dict[str, Any]:
        """The slots of a sampler and a grid that do what was found."""
        sampler: Mapping[str, Any] = {"kind": "learned", "rows": self.rows}
        return {"sampler": sampler, "grid": {"kind": "explicit", "times": self.times}, "steps": self.steps}


def tune(
    problems: Sequence[Problem],
    held_out: Sequence[Problem],
    n: int,
    *,
    iterations: int = 300,
    rate: float = 0.02,
    teacher_steps: int = 200,
    seconds: float | None = None,
    progress: Progress | None = None,
) -> Tuned:
    """The best sampler of n calls found in so many gradient steps, each on one of the problems in turn.

    held_out: problems to choose by and to measure on. rate: of Adam, falling to 0 by a cosine. seconds: after which no
    further step is made, however many are left.
    """
    until = math.inf if seconds is None else time.perf_counter() + seconds
    path = problems[0].denoise.path
    ends = [solved(problem, teacher_steps).x[-1] for problem in problems]
    held_ends = [solved(problem, teacher_steps).x[-1] for problem in held_out]
    starts = [_Numbers(path, times) for times in (logistic(path, n), best_times(problems[:1], n))]
    errors = [_measured(numbers, held_out, held_ends) for numbers in starts]
    before = best = min(errors)
    numbers = starts[errors.index(best)]
    optimizer = torch.optim.Adam(numbers.parameters(), lr=rate, betas=(0.9, 0.95))
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(iterations, 1))
    kept = numbers.plain()
    for i in range(iterations):
        problem, end = problems[i % len(problems)], ends[i % len(problems)]
        optimizer.zero_grad()
        _distances(numbers, problem, end).add(1e-6).log().mean().backward()
        torch.nn.utils.clip_grad_norm_(numbers.parameters(), 1.0)
        optimizer.step()
        decay.step()
        over = i + 1 == iterations or time.perf_counter() > until
        if (i + 1) % 20 == 0 or over:
            error = _measured(numbers, held_out, held_ends)
            if error < best:
                best, kept = error, numbers.plain()
        if progress is not None:
            progress(i + 1, iterations)
        if over:
            break
    return Tuned(*kept, error=best, before=before)


class _Numbers(torch.nn.Module):
    """The free numbers: the half log_snr of the second time and the gaps to those after it; what is kept of the state
    beyond sigma_s / sigma_t; and the weights, in units of DDIM's, each of every answer so far.
    """

    def __init__(self, path: Path, times: Tensor) -> None:
        super().__init__()
        self.path, self.start = path, times[:1].double()
        level = log_snr(path, times[1:-1].double()) / 2
        self.first = torch.nn.Parameter(level[:1].clone())
        self.gaps = torch.nn.Parameter(level.diff().clamp(min=1e-3).log())
        ratio, gain = self._ddim(times.double())
        n = len(ratio)
        rows = rows_of(ipndm(path, torch.eye(n + 1, dtype=torch.float64)[0], times, variable="angle"), n)
        self.extra = torch.nn.Parameter(torch.tensor([row[0] for row in rows], dtype=torch.float64) - ratio)
        padded = [[*row[1:], *[0.0] * (n + 1 - len(row))] for row in rows]
        self.weights = torch.nn.Parameter(torch.tensor(padded, dtype=torch.float64) / gain[:, None])

    def times(self) -> Tensor:
        """n + 1 of them, float64."""
        later = self.first + torch.cumsum(self.gaps.exp(), 0) if len(self.first) else self.gaps
        inner = self.path.time(2 * torch.cat([self.first, later]))
        inner = torch.minimum(inner, self.start - EARLIEST).clamp(min=EARLIEST)
        return torch.cat([self.start, inner, torch.zeros(1, dtype=torch.float64)])

    def rows(self, times: Tensor) -> tuple[Tensor, Tensor]:
        """keep (n,) and the weights (n, n), newest answer first."""
        ratio, gain = self._ddim(times)
        return ratio + self.extra, gain[:, None] * self.weights

    def forward(self, problem: Problem) -> Tensor:
        """Where a run ends: (B, ...)."""
        x, times, answers = problem.x, self.times(), list[Tensor]()
        keep, weights = (part.to(x) for part in self.rows(times))
        for i in range(len(keep)):
            answers.insert(0, problem.denoise(x, times[i]))
            x = keep[i] * x
            for k, answer in enumerate(answers):
                x = x + weights[i, k] * answer
        return x

    def plain(self) -> tuple[list[float], list[list[float]]]:
        """Times and rows, the latter without the weights that have no answer to weigh."""
        with torch.no_grad():
            times = self.times()
            keep, weights = self.rows(times)
        rows = [[k, *row[: i + 1]] for i, (k, row) in enumerate(zip(keep.tolist(), weights.tolist(), strict=True))]
        return times.tolist(), rows

    def _ddim(self, times: Tensor) -> tuple[Tensor, Tensor]:
        """What DDIM keeps of the state, and its weight of the answer."""
        alpha, sigma = self.path.alpha(times), self.path.sigma(times)
        ratio = sigma[1:] / sigma[:-1]
        return ratio, alpha[1:] - ratio * alpha[:-1]


def _distances(numbers: _Numbers, problem: Problem, end: Tensor) -> Tensor:
    """The root mean square distance of each sample to where it should end: (B,)."""
    return (numbers(problem) - end).flatten(1).square().mean(1).add(1e-20).sqrt()


@torch.no_grad()
def _measured(numbers: _Numbers, problems: Sequence[Problem], ends: Sequence[Tensor]) -> float:
    found = [_distances(numbers, problem, end) for problem, end in zip(problems, ends, strict=True)]
    return float(torch.cat(found).median())

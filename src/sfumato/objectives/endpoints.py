"""Where a teacher's flow ends, shown to a student from each of its times: how students of a few steps may begin.

At pure noise a denoiser's answer is a blur of all data, far from any picture that a critic has seen; a short regression
on the ends of the teacher's own walks gives the student an answer of the right kind everywhere (Yin et al. 2024, DMD2,
does so before a single step; Liu et al. 2023 train so to the end). The teacher walks from noise under its guidance, and
all states on a walk that the student will meet are learned from at once.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Generator, Tensor

from sfumato.denoiser import Cond
from sfumato.objectives.critics import ended, rows_of, wide
from sfumato.objectives.denoising import Loss
from sfumato.objectives.draws import noise_like
from sfumato.objectives.teaching import Lesson, Teacher
from sfumato.paths import Path, spread
from sfumato.samplers.dpm_solver import dpmpp_2m
from sfumato.samplers.drive import sample


class Shown(NamedTuple):
    """loss: the student's square error. drawn: its answers (N, ...), rows: of the batch, (N,), for which they are."""

    loss: Loss
    drawn: Tensor
    rows: Tensor


def regression(
    lesson: Lesson, x0: Tensor, cond: Cond | None, rng: Generator | None, at: Sequence[float], flow: int
) -> Shown:
    """The student's square error, at each of its times, against where the teacher's flow through there ends.

    A share of the batch is walked for, such that there are as many states as the batch is large. flow: the teacher's
    steps between two of the times.
    """
    few, many, student = torch.arange(math.ceil(len(x0) / len(at))), len(at), lesson.student
    eps = noise_like(x0[: len(few)], rng)
    begun, end = walked(teacher_of(lesson.taught, few), eps, at, flow)
    t, rows = wide(x0.new_tensor(at)).repeat_interleave(len(few)), few.repeat(many)
    drawn = ended(student, torch.cat(begun), t, rows_of(cond, rows))
    each = (drawn - torch.cat([end] * many)).square().flatten(1).mean(1)
    return Shown(Loss(each.mean(), each.detach(), t, {"regression": each.mean().detach()}), drawn, rows)


def teacher_of(teacher: Teacher, rows: Tensor) -> Teacher:
    """A teacher with the conditions of some samples of its batch, (N,) on the CPU."""
    return replace(teacher, cond=rows_of(teacher.cond, rows), null=lambda: rows_of(teacher.null(), rows))


def walked(teacher: Teacher, eps: Tensor, at: Sequence[float], flow: int) -> tuple[list[Tensor], Tensor]:
    """The teacher's path from noise by DPM-Solver++(2M): its states at some times, and its end."""
    stops = torch.tensor([*at, 0.0], dtype=torch.float64)
    share = torch.arange(flow, dtype=torch.float64) / flow
    times = torch.cat([torch.lerp(a, b, share) for a, b in pairwise(stops)] + [stops[-1:]])
    running = dpmpp_2m(teacher.path, begun_with(teacher.path, eps, at[0]), times)
    walk = [step.x for step in sample(running, teacher.bound())]
    return walk[:-1:flow], walk[-1]


def begun_with(path: Path, eps: Tensor, t: float) -> Tensor:
    """Noise as sampling begins with at a time: of the spread that x_t has for data of unit variance."""
    return eps * spread(path, torch.tensor(t, dtype=torch.float64))

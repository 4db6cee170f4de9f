"""Where a teacher's flow ends, shown to a student from each of its times: how students of a few steps may begin.

At pure noise a denoiser's answer is a blur of all data, far from any picture that a critic has seen; a short regression
on the ends of the teacher's own walks gives the student an answer of the right kind everywhere (Yin et al. 2024, DMD2,
does so before a single step; Liu et al. 2023 train so to the end). The teacher walks from noise under its guidance, and
all states on a walk that the student will meet are learned from at once.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from itertools import pairwise

import torch
from torch import Generator, Tensor

from sfumato.denoiser import Cond
from sfumato.objectives.critics import ended, rows_of
from sfumato.objectives.denoising import Loss
from sfumato.objectives.teaching import Lesson, Teacher
from sfumato.paths import Path
from sfumato.samplers.dpm_solver import dpmpp_2m
from sfumato.samplers.drive import sample


def regression(
    lesson: Lesson, x0: Tensor, cond: Cond | None, rng: Generator | None, at: Sequence[float], flow: int
) -> Loss:
    """The student's square error, at each of its times, against where the teacher's flow through there ends."""
    rows, many = torch.arange(math.ceil(len(x0) / len(at))), len(at)
    whole, student = lesson.taught, lesson.student
    null = partial(_rows_of_none, whole, rows)
    teacher = replace(whole, cond=rows_of(whole.cond, rows), null=null)
    eps = torch.randn(x0[: len(rows)].shape, generator=rng, dtype=x0.dtype).to(x0.device)
    begun, end = walked(teacher, eps, at, flow)
    t = x0.new_tensor(at, dtype=torch.promote_types(x0.dtype, torch.float32)).repeat_interleave(len(rows))
    told = {name: torch.cat([value] * many) for name, value in rows_of(cond, rows).items()}
    said = ended(student, torch.cat(begun), t, told)
    each = (said - torch.cat([end] * many)).square().flatten(1).mean(1)
    return Loss(each.mean(), each.detach(), t, {"regression": each.mean().detach()})


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
    first = torch.tensor(t, dtype=torch.float64)
    return eps * math.hypot(float(path.alpha(first)), float(path.sigma(first)))


def _rows_of_none(teacher: Teacher, rows: Tensor) -> Cond:
    return rows_of(teacher.null(), rows)

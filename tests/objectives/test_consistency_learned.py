"""What small networks learn of a mixture by each way to a consistency model: draws in 1, 2 and 4 steps from pure noise.

They are held against what the exact denoiser draws by DDIM in as many calls, which is what one has without a student:
0.94, 0.30 and 0.16 of sliced Wasserstein distance.
"""

from copy import deepcopy
from functools import cache, partial
from typing import Any

import pytest
import torch
from taught import Small, four_modes, rng, sliced_wasserstein, teacher_of
from torch import Generator, Tensor

from sfumato.catalogue import SAMPLERS
from sfumato.denoiser import Bound, Cond, Denoiser
from sfumato.grids import logistic
from sfumato.objectives import (
    ConsistencyDistillation,
    ConsistencyTraining,
    ContinuousConsistency,
    Denoising,
    EasyConsistencyTraining,
    ImprovedConsistencyTraining,
    Loss,
)
from sfumato.objectives.teaching import Lesson, Teacher
from sfumato.objectives.weights import SNRPlusOne
from sfumato.paths import Linear
from sfumato.predictions import VELOCITY, X0, Prediction, bounded
from sfumato.samplers import drive
from sfumato.times import LogNormal

PATH = Linear()
GRID = partial(logistic, level=0.5, spread=1.3)  # from pure noise, t = 1
HEUN = partial(SAMPLERS["heun"].fn, variable="angle")
STEPS = (1, 2, 4)
DRAWS = 4000


class Plain:
    """Denoising, as a method: what a diffusion model is trained by."""

    def __call__(self, lesson: Lesson, x0: Tensor, cond: Cond | None = None, rng: Generator | None = None) -> Loss:
        return Denoising(LogNormal(0.0, 1.5), SNRPlusOne(20.0))(lesson.student, x0, cond, rng)


def fresh(prediction: Prediction = VELOCITY) -> Denoiser:
    torch.manual_seed(0)
    return Denoiser(Small(PATH), PATH, prediction)


def learned(objective: Any, student: Denoiser, teacher: Teacher | None, steps: int, lr: float) -> Denoiser:
    """The average of a student's last weights."""
    torch.manual_seed(0)
    data, chance = four_modes(), rng(3)
    slow, kept = (deepcopy(student).requires_grad_(False) for _ in range(2))
    optimizer = torch.optim.Adam(student.parameters(), lr=lr, betas=(0.9, 0.99))
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1.0, 3 * (1 - step / steps))
        loss = objective(
            Lesson(student, teacher, slow, step=step, steps=steps), data.draw(256, chance).float(), rng=chance
        )
        optimizer.zero_grad()
        loss.value.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        follows = objective.follow(step, steps) if hasattr(objective, "follow") else 1.0
        with torch.no_grad():
            for copy, much in ((slow, follows), (kept, 0.98)):
                for own, new in zip(copy.parameters(), student.parameters(), strict=True):
                    own.lerp_(new, 1 - much)
    return kept


@cache
def diffusion_model(prediction: Prediction = VELOCITY) -> Denoiser:
    return learned(Plain(), fresh(prediction), None, 500, 4e-3)


def distances(denoise: Any, sampler: str) -> list[float]:
    """Of what a sampler draws in 1, 2 and 4 steps."""
    truth, found = four_modes().draw(DRAWS, rng(11)), []
    for n in STEPS:
        noise = rng(9)
        x = torch.randn(DRAWS, 2, generator=noise)
        with torch.no_grad():
            walk = SAMPLERS[sampler].fn(PATH, x, GRID(PATH, n))
            ends = drive(walk, denoise, lambda like, noise=noise: torch.randn(like.shape, generator=noise))
        found.append(sliced_wasserstein(ends, truth))
    return found


def test_few_calls_of_the_exact_denoiser_are_as_bad_as_is_said() -> None:
    found = distances(four_modes().denoiser(PATH), "ddim")
    assert found[0] > 0.9 and found[1] > 0.28 and found[2] > 0.14


CASES: dict[str, tuple[Any, int, float, tuple[float, float, float]]] = {
    "CD": (ConsistencyDistillation(GRID, 9, HEUN, 0.8), 400, 4e-3, (0.12, 0.08, 0.08)),
    "CT": (ConsistencyTraining(GRID, 4, 40, 0.9), 1000, 4e-3, (0.33, 0.2, 0.14)),
    "iCT": (ImprovedConsistencyTraining(GRID, 4, 40), 700, 4e-3, (0.25, 0.2, 0.15)),
    "ECT": (EasyConsistencyTraining(stages=5), 400, 2e-3, (0.25, 0.2, 0.15)),
    "ECT of x0": (EasyConsistencyTraining(LogNormal(0.0, 1.6), 4.0, 3, c=0.1), 400, 1e-3, (0.25, 0.2, 0.15)),
    "sCD": (ContinuousConsistency(sigma_data=1.0, warmup=150, adaptive=False), 300, 2e-3, (0.25, 0.12, 0.1)),
    "sCT": (ContinuousConsistency(sigma_data=1.0, warmup=150, adaptive=False), 300, 2e-3, (0.3, 0.18, 0.14)),
}


@pytest.mark.parametrize("name", CASES)
def test_students_draw_in_few_steps(name: str) -> None:
    objective, steps, lr, most = CASES[name]
    teacher = teacher_of(four_modes(), PATH) if name in ("CD", "sCD") else None
    begun = deepcopy(diffusion_model()).requires_grad_(True) if name in ("ECT", "sCD", "sCT") else fresh()
    if name == "ECT of x0":  # which without a boundary ends anywhere
        begun = Denoiser(deepcopy(diffusion_model(X0).net).requires_grad_(True), PATH, bounded())
    student = learned(objective, begun, teacher, steps, lr)
    ends = Bound(PATH, lambda x, t: student(x, t), ("endpoint",))
    found = distances(ends, "consistency")
    assert all(one < limit for one, limit in zip(found, most, strict=True)), found

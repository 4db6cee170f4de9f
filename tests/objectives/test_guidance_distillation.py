"""Guidance distillation: a student that answers as the guided teacher has no loss, whatever the guidance; others do."""

import pytest
import torch
from taught import knows, lesson, rng
from torch import Tensor, nn

from sfumato.denoiser import Cond, Denoiser
from sfumato.errors import ConfigError
from sfumato.guidance import APG, CFG, CFGZero, Guidance, Rescaled, Thresholded, Unguided, Within
from sfumato.objectives.guidance import GuidanceDistillation
from sfumato.objectives.teaching import Teacher
from sfumato.objectives.weights import SNRPlusOne
from sfumato.paths import Cosine, Linear, Path, VariancePreserving
from sfumato.predictions import EPS, VELOCITY, X0, Prediction, V
from sfumato.times import Uniform

N = 32
TIMES = Uniform(0.05, 0.95)
GUIDANCES: tuple[Guidance, ...] = (
    Unguided(),
    CFG(scale=3.0),
    CFG(scale=3.0, interval=(0.3, 3.0)),
    CFG(scale=3.0, rescale=0.7),
    CFGZero(scale=2.0),
    APG(scale=4.0),
    Rescaled(of=CFG(scale=4.0)),
    Thresholded(of=CFG(scale=4.0)),
    Within(of=APG(scale=4.0), interval=(0.3, 3.0)),
)


class Heard(nn.Module):
    """x0-hat under a condition `on`: nonlinear in x, and more so where it is on. `scale`: of guidance within."""

    def forward(self, x: Tensor, t: Tensor, *, on: Tensor, guidance: Tensor | None = None) -> Tensor:
        said, silent = (torch.tanh(x * (1 + one)[:, None]) + one[:, None] for one in (on, torch.zeros_like(on)))
        return said if guidance is None else silent + guidance.to(x)[:, None] * (said - silent)


def told() -> tuple[Cond, Cond]:
    on = torch.linspace(0.2, 1.0, N, dtype=torch.float64)
    return {"on": on}, {"on": torch.zeros(N, dtype=torch.float64)}


def taught_by(path: Path, guidance: Guidance) -> Teacher:
    cond, null = told()
    return Teacher(Denoiser(Heard(), path, X0), cond, lambda: null, guidance)


def data() -> Tensor:
    return torch.randn(N, 3, generator=rng(4), dtype=torch.float64)


@pytest.mark.parametrize("guidance", GUIDANCES, ids=str)
@pytest.mark.parametrize("prediction", [X0, EPS, V, VELOCITY], ids=lambda p: p.name)
def test_who_answers_as_the_guided_teacher_has_no_loss(prediction: Prediction, guidance: Guidance) -> None:
    path = VariancePreserving()
    teacher, objective = taught_by(path, guidance), GuidanceDistillation(times=TIMES, weight=SNRPlusOne(50.0))
    student = knows(lambda x, t: teacher(x, t), path, prediction)
    assert objective.told == ()
    assert float(objective(lesson(student, teacher), data(), told()[0], rng()).value.detach()) < 1e-20
    plain = Denoiser(Heard(), path, X0)
    loss = objective(lesson(plain, teacher), data(), told()[0], rng())
    assert (float(loss.value) > 1e-4) == (guidance != Unguided())


@pytest.mark.parametrize("path", [Linear(), Cosine(), VariancePreserving()], ids=str)
def test_scales_are_drawn_and_told(path: Path) -> None:
    """The student that is told the scale answers for it; the teacher's own guidance has no say."""
    objective = GuidanceDistillation(scales=(1.0, 5.0), times=TIMES)
    assert objective.told == ("guidance",)
    seen: list[Tensor] = []

    class Noting(Heard):
        def forward(self, x: Tensor, t: Tensor, *, on: Tensor, guidance: Tensor | None = None) -> Tensor:
            assert guidance is not None
            seen.append(guidance)
            return super().forward(x, t, on=on, guidance=guidance)

    student = Denoiser(Noting(), path, X0)
    loss = objective(lesson(student, taught_by(path, APG(scale=9.0))), data(), told()[0], rng())
    assert float(loss.value) < 1e-20 and loss.t is not None and loss.t.shape == (N,)
    assert 1.0 <= float(seen[0].min()) < 2.0 and 4.0 < float(seen[0].max()) <= 5.0


def test_the_same_error_costs_the_same_in_every_prediction() -> None:
    path, values = Cosine(), []
    teacher = taught_by(path, CFG(scale=3.0))
    for prediction in (X0, EPS, V, VELOCITY):
        student = knows(lambda x, t: teacher(x, t), path, prediction, by=0.1)
        objective = GuidanceDistillation(times=TIMES, weight=SNRPlusOne())
        values.append(float(objective(lesson(student, teacher), data(), told()[0], rng()).value.detach()))
    assert values == pytest.approx([values[0]] * 4, rel=1e-5)


def test_what_cannot_be_meant_is_named() -> None:
    for wrong in ((3.0, 1.0), (-1.0, 2.0)):
        with pytest.raises(ConfigError, match="between a low and a high"):
            GuidanceDistillation(scales=wrong)

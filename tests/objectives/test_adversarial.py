"""Adversarial distillation: its terms, whom each of them moves, and what a student learns from them."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from test_distribution import Small, apart, mixture, moved, rng, taught
from torch import Tensor, nn

from sfumato.denoiser import Denoiser
from sfumato.errors import ConfigError
from sfumato.guidance import Unguided
from sfumato.nets.features import on_features
from sfumato.objectives import Adversarial
from sfumato.objectives.teaching import Lesson, Teacher
from sfumato.paths import Cosine, Linear, Path, VarianceExploding, along
from sfumato.predictions import X0
from sfumato.times import Uniform


class Linearly(nn.Module):
    """Heads whose logits are w f of the teacher's answers f: what the objective makes of them can be written down."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([0.5, -1.0], dtype=torch.float64))

    @contextmanager
    def listening(self, net: nn.Module) -> Iterator[dict[str, Tensor]]:
        heard: dict[str, Tensor] = {}
        hook = net.register_forward_hook(lambda module, given, said: heard.update(said=said))
        yield heard
        hook.remove()

    def forward(self, heard: dict[str, Tensor], t: Tensor, pooled: Tensor | None = None) -> Tensor:
        return heard["said"] @ self.weight[:, None]


class Scales(nn.Module):
    """A network that answers a multiple of what it is given."""

    def __init__(self, by: float) -> None:
        super().__init__()
        self.by = nn.Parameter(torch.tensor(by, dtype=torch.float64))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.by * x


def lesson_on(path: Path, objective: Adversarial, step: int | None = 0) -> Lesson:
    student, teacher = (Denoiser(Scales(by), path, X0) for by in (0.8, 0.5))
    teacher.requires_grad_(False)
    return Lesson(student, Teacher(teacher, {}, dict, Unguided()), critic=objective.critic(teacher), step=step)


@pytest.mark.parametrize("path", [Linear(), Cosine(), VarianceExploding(4.0)], ids=str)
def test_its_terms_are_the_published_ones(path: Path) -> None:
    objective = Adversarial(Linearly, at=(0.7,), times=Uniform(0.2, 0.9), adversarial=0.3, r1=0.1)
    x0 = torch.randn(16, 2, generator=rng(1), dtype=torch.float64)
    loss = objective(lesson_on(path, objective), x0, rng=rng())
    draws = rng()

    def noised(x: Tensor, t: Tensor) -> Tensor:
        t = along(t, x)
        return path.alpha(t) * x + path.sigma(t) * torch.randn(x.shape, generator=draws, dtype=torch.float64)

    torch.randperm(16, generator=draws), torch.randint(1, (1,), generator=draws)  # which step
    drawn = 0.8 * noised(x0, torch.full((16,), 0.7, dtype=torch.float64))
    t = objective.scored(16, path, draws).double()
    distilled = (path.alpha(t) * (drawn - 0.5 * noised(drawn, t)).square().mean(1)).mean()
    w = torch.tensor([0.5, -1.0], dtype=torch.float64)
    of_drawn = 0.5 * noised(drawn, objective.times(16, path, draws).double()) @ w
    of_real = 0.5 * noised(x0, objective.times(16, path, draws).double()) @ w
    hinge = (1 + of_drawn).relu().mean() + (1 - of_real).relu().mean()
    for name, expected in {
        "distillation": distilled,
        "adversarial": -of_drawn.mean(),
        "discriminator": hinge,
        "slope": w.square().sum(),  # the logit is linear in the features, so its slope is w everywhere
    }.items():
        torch.testing.assert_close(loss.parts[name], expected)
    torch.testing.assert_close(loss.value.detach(), distilled)


def test_what_each_term_moves() -> None:
    objective = Adversarial(Linearly, distillation=0.0, r1=0.0)
    x0 = torch.randn(16, 2, generator=rng(1), dtype=torch.float64)
    lesson = lesson_on(Linear(), objective)
    objective(lesson, x0, rng=rng()).value.backward()
    assert lesson.teacher is not None and isinstance(lesson.critic, Linearly) and lesson.critic.weight.grad is not None
    assert all(moved(lesson.student)) and not any(moved(lesson.teacher.denoiser))
    alone = lesson_on(Linear(), replace(objective, adversarial=0.0))
    replace(objective, adversarial=0.0)(alone, x0, rng=rng()).value.backward()
    assert isinstance(alone.critic, Linearly) and alone.critic.weight.grad is not None
    assert torch.equal(alone.critic.weight.grad, lesson.critic.weight.grad)  # the student's term does not reach heads
    assert float(alone.student.net.by.grad or 0) == 0  # nor the heads' the student


def test_the_penalty_smooths_the_heads() -> None:
    """Where real pictures and drawn ones are told apart for certain, it alone is left, and w falls."""
    objective = Adversarial(Linearly, distillation=0.0, adversarial=0.0, r1=1.0)
    lesson = lesson_on(Linear(), objective)
    assert isinstance(lesson.critic, Linearly)
    x0 = 1e-9 * torch.randn(8, 2, generator=rng(1), dtype=torch.float64)
    both = [replace(objective, r1=r1) for r1 in (0.0, 1.0)]
    slopes = []
    for one in both:
        lesson.critic.weight.grad = None
        one(lesson, x0, rng=rng()).value.backward()
        slopes.append(lesson.critic.weight.grad)
    torch.testing.assert_close(slopes[1] - slopes[0], lesson.critic.weight.detach())  # of |w|^2 / 2


def test_in_the_warm_up_the_heads_learn_and_the_student_learns_from_the_teacher_alone() -> None:
    objective = Adversarial(Linearly, warmup=1)
    x0 = torch.randn(16, 2, generator=rng(1), dtype=torch.float64)
    lesson = lesson_on(Linear(), objective)
    loss = objective(lesson, x0, rng=rng())
    loss.value.backward()
    assert torch.equal(loss.value.detach(), loss.parts["regression"]) and "discriminator" in loss.parts
    assert isinstance(lesson.critic, Linearly) and lesson.critic.weight.grad is not None
    strong = lesson_on(Linear(), objective)
    replace(objective, adversarial=100.0)(strong, x0, rng=rng()).value.backward()
    assert torch.equal(strong.student.net.by.grad, lesson.student.net.by.grad)


def test_judged_nothing_is_contested_and_the_number_is_the_distance() -> None:
    objective = Adversarial(Linearly)
    x0 = torch.randn(16, 2, generator=rng(1), dtype=torch.float64)
    judged = objective(lesson_on(Linear(), objective, None), x0, rng=rng())
    learned = objective(lesson_on(Linear(), objective), x0, rng=rng())
    torch.testing.assert_close(judged.value, learned.value)
    assert not judged.parts and judged.t is not None and judged.each.shape == judged.t.shape == (16,)
    plain = replace(objective, distillation=0.0)
    t, drawn = plain.answers(lesson_on(Linear(), plain).student, x0, None, rng())
    torch.testing.assert_close(plain(lesson_on(Linear(), plain), x0, rng=rng()).value, (drawn - x0).square().mean())
    assert sorted(t.tolist()) == sorted([1.0, 0.75, 0.5, 0.25] * 4)


@pytest.mark.parametrize("wrong", [{"at": (0.2, 0.4)}, {"r1": -1.0}, {"distillation": -1.0}, {"adversarial": -0.1}])
def test_impossible_options_are_named(wrong: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match="objective"):
        Adversarial(Linearly, **wrong)  # type: ignore[arg-type]


def test_a_student_draws_a_mixture_in_few_steps() -> None:
    """Five modes of the plane; what it began with, the teacher, draws them in few steps far worse."""
    data, teacher = mixture(), taught(mixture())
    objective = Adversarial(
        lambda net: on_features(net, blocks=("middle.1", "middle.3"), width=64),
        times=Uniform(),
        distillation=0.1,
        adversarial=0.1,
    )
    student, critic = Denoiser(Small(128), Linear(), X0, answers=("endpoint",)), objective.critic(teacher)
    student.load_state_dict(teacher.state_dict())
    lesson = Lesson(student, Teacher(teacher, {}, dict, Unguided()), critic=critic)
    optimizer = torch.optim.Adam([*student.parameters(), *critic.parameters()], 1e-3, betas=(0.5, 0.95))
    for i in range(500):
        optimizer.zero_grad()
        optimizer.param_groups[0]["lr"] = 1e-3 * (1 - i / 500)
        objective(replace(lesson, step=i), data.draw(256, rng(i)).float(), rng=rng(i)).value.backward()
        optimizer.step()
    seen = {steps: (apart(student, steps), apart(teacher, steps)) for steps in (1, 2, 4)}
    for steps, (own, before) in seen.items():
        assert own < 0.12 and own < before / 2, (steps, own, before)

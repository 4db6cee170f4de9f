"""Distribution matching: with exact scores its gradient is the divergence's own; who moves when; what a student learns.

The exact teacher is a Gaussian. The exact fake score is that of the Gaussian which the student draws.
"""

from dataclasses import replace
from itertools import product

import pytest
import torch
from torch import Generator, Tensor, nn

from oracles import Gaussian, Mixture, gaussian_like
from sfumato.denoiser import Bound, Denoiser
from sfumato.errors import ConfigError
from sfumato.guidance import Unguided
from sfumato.nets.features import on_features
from sfumato.objectives import Denoising, DistributionMatching
from sfumato.objectives.distribution import FakeScore
from sfumato.objectives.endpoints import begun_with, walked
from sfumato.objectives.teaching import Lesson, Teacher
from sfumato.paths import Cosine, Linear, Path, VarianceExploding, VariancePreserving, along
from sfumato.predictions import EPS, VELOCITY, X0, Prediction, V
from sfumato.samplers import drive
from sfumato.samplers.consistency import consistency

SHAPE = (4096, 3)
MATCHING = DistributionMatching(at=(1.0,), every=1)


def rng(seed: int = 0) -> Generator:
    return Generator().manual_seed(seed)


class Knows(nn.Module):
    """A network that answers for a Gaussian."""

    def __init__(self, exact: Gaussian, path: Path, prediction: Prediction) -> None:
        super().__init__()
        self.exact, self.path, self.prediction = exact, path, prediction

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.prediction.answer(self.path, self.exact.x0(self.path, x, t), x, t)


class Draws(nn.Module):
    """A student of one step: noise to a Gaussian of its own."""

    def __init__(self, path: Path, prediction: Prediction, mean: Tensor, std: Tensor) -> None:
        super().__init__()
        self.path, self.prediction = path, prediction
        self.mean, self.std = nn.Parameter(mean.clone()), nn.Parameter(std.clone())

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        x0 = self.mean + self.std * x / self.path.sigma(along(t, x))
        return self.prediction.answer(self.path, x0, x, t)


def exact_lesson(path: Path, prediction: Prediction, other: Path, mean: Tensor, std: Tensor) -> Lesson:
    """A student that draws N(mean, std^2), with the exact fake score of that and an exact teacher on another path."""
    data = gaussian_like(SHAPE)
    student = Denoiser(Draws(path, prediction, mean, std), path, prediction)
    knows = Denoiser(Knows(data, other, V), other, V)
    critic = FakeScore(knows, None)
    critic.denoiser.net = Knows(Gaussian(mean, std), other, V)
    return Lesson(student, Teacher(knows, {}, dict, Unguided(), path), critic=critic, step=0, steps=10)


def gradients(lesson: Lesson, objective: DistributionMatching = MATCHING, seed: int = 0) -> tuple[Tensor, Tensor]:
    loss = objective(lesson, torch.zeros(SHAPE, dtype=torch.float64), rng=rng(seed))
    loss.value.backward()
    net = lesson.student.net
    assert isinstance(net, Draws) and net.mean.grad is not None and net.std.grad is not None
    return net.mean.grad, net.std.grad


PATHS = (Linear(), Cosine(), VariancePreserving(), VarianceExploding(5.0))


@pytest.mark.parametrize("prediction", (X0, VELOCITY), ids=lambda p: p.name)
@pytest.mark.parametrize(("path", "other"), list(product(PATHS, (Linear(), VariancePreserving()))), ids=str)
def test_where_the_distributions_are_equal_nothing_pulls(path: Path, other: Path, prediction: Prediction) -> None:
    data = gaussian_like(SHAPE)
    lesson = exact_lesson(path, prediction, other, data.mean, data.std)
    for one in gradients(lesson):
        assert float(one.abs().max()) < 1e-6
    judged = MATCHING(replace(lesson, step=None), torch.zeros(SHAPE, dtype=torch.float64), rng=rng())
    assert float(judged.value) < 1e-12


@pytest.mark.parametrize("path", PATHS, ids=str)
def test_else_each_number_is_pulled_towards_the_data(path: Path) -> None:
    """The gradient of a Gaussian's mean and spread has the sign of what is wrong with them, element by element."""
    data = gaussian_like(SHAPE)
    by = torch.tensor([0.3, -0.4, 0.2], dtype=torch.float64)
    of_mean, _ = gradients(exact_lesson(path, X0, path, data.mean + by, data.std))
    assert torch.equal(of_mean.sign(), by.sign())
    _, of_std = gradients(exact_lesson(path, X0, path, data.mean, data.std * (1 + by)))
    assert torch.equal(of_std.sign(), by.sign())


def test_followed_to_its_end_the_gradient_finds_the_data() -> None:
    data = gaussian_like(SHAPE)
    lesson = exact_lesson(Linear(), X0, Linear(), data.mean + 0.5, data.std / 2)
    net, critic = lesson.student.net, lesson.critic
    assert isinstance(net, Draws) and isinstance(critic, FakeScore)
    optimizer = torch.optim.Adam(net.parameters(), 0.02)
    x0 = torch.zeros(256, 3, dtype=torch.float64)
    for i in range(120):
        critic.denoiser.net = Knows(Gaussian(net.mean.detach(), net.std.detach()), Linear(), V)
        optimizer.param_groups[0]["lr"] = 0.03 * (1 - i / 120)
        optimizer.zero_grad()
        MATCHING(lesson, x0, rng=rng(i)).value.backward()
        optimizer.step()
    torch.testing.assert_close(net.mean.detach(), data.mean, rtol=0, atol=0.01)
    torch.testing.assert_close(net.std.detach().abs(), data.std, rtol=0, atol=0.01)


def test_the_gradient_is_normalised_for_each_sample() -> None:
    """Its formula, for one sample: (fake - real) / mean |drawn - real|, through the student (DMD, eq. 7 and 8)."""
    path, data = Linear(), gaussian_like((1, 3))
    by = torch.tensor([0.3, -0.4, 0.2], dtype=torch.float64)
    lesson = exact_lesson(path, X0, path, data.mean + by, data.std)
    critic, net = lesson.critic, lesson.student.net
    assert isinstance(critic, FakeScore) and isinstance(net, Draws)
    loss = MATCHING(lesson, torch.zeros(1, 3, dtype=torch.float64), rng=rng(3))
    loss.value.backward()
    draws = rng(3)
    torch.randperm(1, generator=draws), torch.randint(1, (1,), generator=draws)  # which step
    drawn = data.mean + by + data.std * torch.randn(1, 3, generator=draws, dtype=torch.float64)
    t = MATCHING.times(1, path, draws).double()
    x_t = (1 - t) * drawn + t * torch.randn(1, 3, generator=draws, dtype=torch.float64)
    real, fake = data.x0(path, x_t, t), Gaussian(data.mean + by, data.std).x0(path, x_t, t)
    expected = (fake - real) / (drawn - real).abs().mean() / 3
    torch.testing.assert_close(net.mean.grad, expected[0])
    torch.testing.assert_close(loss.parts["distance"], (fake - real).square().mean())


# how the student walks


@pytest.mark.parametrize("k", range(3))
@pytest.mark.parametrize("path", PATHS, ids=str)
def test_it_walks_as_it_will_be_sampled(path: Path, k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    data, at = gaussian_like((64, 3)), (1.0, 0.6, 0.3)
    student = Denoiser(Knows(data, path, X0), path, X0)
    monkeypatch.setattr("sfumato.objectives.distribution.drawn_which", lambda n, *_: torch.full((n,), k))
    drawn = DistributionMatching(at=at).generated(student, torch.zeros(64, 3, dtype=torch.float64), None, rng(5))
    draws = rng(5)

    def noise(like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=draws, dtype=like.dtype)

    x = begun_with(path, noise(drawn), 1.0)
    running = consistency(path, x, torch.tensor([*at[: k + 1], 0.0], dtype=torch.float64))
    torch.testing.assert_close(drawn, drive(running, Bound(path, student, ("endpoint",)), noise))


def test_each_step_is_drawn_as_often_as_any_other_and_the_last_alone_has_gradients() -> None:
    seen: list[tuple[Tensor, bool]] = []

    class Watched(Draws):
        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            seen.append((t.clone(), torch.is_grad_enabled()))
            return super().forward(x, t)

    net = Watched(Linear(), X0, torch.zeros(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64))
    student = Denoiser(net, Linear(), X0)
    x0 = torch.randn(12, 3, dtype=torch.float64, generator=rng())
    DistributionMatching().generated(student, x0, None, rng()).sum().backward()
    assert [(len(t), grad) for t, grad in seen] == [(9, False), (6, False), (3, False), (12, True)]
    assert seen[-1][0].sort()[0].tolist() == sorted([1.0, 0.75, 0.5, 0.25] * 3)
    seen.clear()
    DistributionMatching(simulate=False).generated(student, x0, None, rng())
    assert [len(t) for t, _ in seen] == [12]


def test_what_a_noise_prediction_cannot_answer_is_refused() -> None:
    student = Denoiser(nn.Identity(), Linear(), EPS)
    with pytest.raises(ConfigError, match="says nothing of the data"):
        MATCHING.generated(student, torch.zeros(2, 3), None, rng())


@pytest.mark.parametrize("wrong", [{"at": ()}, {"at": (0.5, 0.5)}, {"at": (1.5,)}, {"every": 0}, {"contest": -1.0}])
def test_impossible_options_are_named(wrong: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match="objective"):
        DistributionMatching(**wrong)  # type: ignore[arg-type]


# the warm-up


@pytest.mark.parametrize("path", PATHS, ids=str)
def test_the_warm_up_shows_where_the_flow_ends(path: Path) -> None:
    """States on the teacher's flow and its end, beside the exact solution."""
    data = gaussian_like((6, 3))
    knows = Denoiser(Knows(data, path, X0), path, X0)
    eps = torch.randn(6, 3, generator=rng(), dtype=torch.float64)
    at = (0.9, 0.5)
    begun, end = walked(Teacher(knows, {}, dict, Unguided(), path), eps, at, 200)
    assert len(begun) == 2 and torch.equal(begun[0], begun_with(path, eps, 0.9))
    for x, t in zip(begun, at, strict=True):
        torch.testing.assert_close(end, data.flow(path, x, t, 0.0), rtol=0, atol=2e-3)


# who learns, and when


class Small(nn.Module):
    """A network of vectors, told a class."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.entry, self.exit = nn.Linear(2 + 1, width), nn.Linear(width, 2)
        self.middle = nn.Sequential(nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU())

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        h = self.entry(torch.cat([x, t[:, None].to(x)], 1))
        out: Tensor = self.exit(self.middle(h))
        return out


def small_lesson(objective: DistributionMatching, step: int | None = 0) -> Lesson:
    torch.manual_seed(0)
    teacher, student = (Denoiser(Small(), Linear(), X0) for _ in range(2))
    return Lesson(student, Teacher(teacher, {}, dict, Unguided()), critic=objective.critic(teacher), step=step)


def moved(module: nn.Module) -> list[bool]:
    return [p.grad is not None for p in module.parameters()]


HEADED = DistributionMatching(every=2, heads=lambda net: on_features(net, blocks=("middle",), width=8), adversarial=0.5)


def test_the_student_moves_at_every_nth_step_and_its_critic_always() -> None:
    for step, moves in ((0, True), (1, False), (2, True)):
        lesson = small_lesson(HEADED, step)
        assert lesson.teacher is not None and lesson.critic is not None
        loss = HEADED(lesson, torch.randn(8, 2, generator=rng(1)), rng=rng())
        loss.value.backward()
        assert set(moved(lesson.student)) == {moves} and all(moved(lesson.critic))
        assert not any(moved(lesson.teacher.denoiser))  # although its weights could learn
        assert ("gradient" in loss.parts) == moves and "discriminator" in loss.parts
        assert torch.equal(loss.value.detach(), loss.parts["fake"])


def test_what_moves_the_student_leaves_the_critic_alone_and_the_other_way_round() -> None:
    lesson = small_lesson(HEADED)
    assert isinstance(lesson.critic, FakeScore)
    drawn = HEADED.generated(lesson.student, torch.zeros(8, 2), None, rng())
    HEADED._towards(lesson, lesson.critic, drawn, rng(), {}).backward()
    assert all(moved(lesson.student)) and not any(moved(lesson.critic))
    lesson = small_lesson(HEADED)
    assert isinstance(lesson.critic, FakeScore)
    HEADED._learning(lesson.taught, lesson.critic, drawn.detach(), torch.zeros(8, 2), rng(), {})[0].backward()
    assert not any(moved(lesson.student)) and all(moved(lesson.critic))


def test_heads_pull_the_student_towards_what_they_take_for_real() -> None:
    lesson = small_lesson(HEADED)
    assert isinstance(lesson.critic, FakeScore)
    drawn = torch.zeros(64, 2, requires_grad=True)
    parts: dict[str, Tensor] = {}
    HEADED._towards(lesson, lesson.critic, drawn, rng(), parts).backward()
    plain = torch.zeros(64, 2, requires_grad=True)
    replace(HEADED, adversarial=0.0)._towards(lesson, lesson.critic, plain, rng(), {}).backward()
    assert drawn.grad is not None and plain.grad is not None
    step = plain.detach() - (drawn.grad - plain.grad)  # what the heads add to a step down
    again: dict[str, Tensor] = {}
    HEADED._towards(lesson, lesson.critic, step.requires_grad_(), rng(), again)
    assert bool(again["adversarial"] < parts["adversarial"])


# what comes of it


def mixture() -> Mixture:
    angles = torch.arange(5, dtype=torch.float64) * (2 * torch.pi / 5)
    means = torch.stack([angles.cos(), angles.sin()], 1)
    return Mixture(torch.full((5,), 0.2, dtype=torch.float64), means, torch.full((5, 1), 0.15, dtype=torch.float64))


def sliced(a: Tensor, b: Tensor) -> float:
    """The sliced 1-Wasserstein distance of as many points in the plane."""
    angles = torch.arange(32, dtype=torch.float64) * (torch.pi / 32)
    along_ = torch.stack([angles.cos(), angles.sin()])
    return float(((a.double() @ along_).sort(0)[0] - (b.double() @ along_).sort(0)[0]).abs().mean())


def taught(data: Mixture) -> Denoiser:
    """A network of the plane that knows a mixture, frozen."""
    torch.manual_seed(0)
    teacher = Denoiser(Small(128), Linear(), X0)
    optimizer = torch.optim.Adam(teacher.parameters(), 3e-3)
    learn = Denoising()
    for i in range(800):
        optimizer.zero_grad()
        optimizer.param_groups[0]["lr"] = 3e-3 * (1 - i / 800)
        learn(teacher, data.draw(512, rng(i)).float(), rng=rng(i)).value.backward()
        optimizer.step()
    return teacher.requires_grad_(False)


def apart(model: Denoiser, steps: int) -> float:
    """How far what a model draws in some jumps lies from the mixture."""
    draws = rng(1)
    running = consistency(Linear(), torch.randn(4096, 2, generator=draws), torch.linspace(1, 0, steps + 1))
    with torch.no_grad():
        told = Bound(Linear(), lambda x, t, **_: model(x, t), ("endpoint",))
        found = drive(running, told, lambda x: torch.randn(x.shape, generator=draws))
    return sliced(found, mixture().draw(4096, rng(2)))


def test_a_student_draws_a_mixture_in_few_steps() -> None:
    """Five modes of the plane; what it began with, the teacher, draws them in few steps far worse."""
    teacher = taught(mixture())
    objective = DistributionMatching(every=2, warmup=150)
    student, critic = Denoiser(Small(128), Linear(), X0, answers=("endpoint",)), objective.critic(teacher)
    student.load_state_dict(teacher.state_dict())
    lesson = Lesson(student, Teacher(teacher, {}, dict, Unguided()), critic=critic)
    optimizer = torch.optim.Adam([*student.parameters(), *critic.parameters()], 1e-3, betas=(0.5, 0.95))
    for i in range(800):
        optimizer.zero_grad()
        optimizer.param_groups[0]["lr"] = 1e-3 * (1 - i / 800)
        objective(replace(lesson, step=i), torch.zeros(256, 2), rng=rng(i)).value.backward()
        optimizer.step()
    seen = {steps: (apart(student, steps), apart(teacher, steps)) for steps in (1, 2, 4)}
    for steps, (own, before) in seen.items():  # the teacher in a hundred steps: 0.07; the data itself: 0.02
        assert own < 0.12 and own < before / 2, (steps, own, before)

"""Shortcut models: exact jumps stand still, two steps are one, targets are the paper's, and few steps are enough."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from flowmaps import DATA, MODES, PATHS, Plane, distances, exact_student, exact_teacher, plane_student, trained
from torch import Tensor

from sfumato.denoiser import Denoiser
from sfumato.errors import ConfigError
from sfumato.guidance import Unguided
from sfumato.objectives.denoising import Denoising
from sfumato.objectives.shortcut import Shortcut, averaged, straight
from sfumato.objectives.teaching import Lesson, Teacher
from sfumato.paths import Linear, Path
from sfumato.predictions import VELOCITY
from sfumato.times import Uniform

paths = pytest.mark.parametrize("path", PATHS.values(), ids=PATHS.keys())
COND = {"label": torch.tensor([1, 2, 1, 2, 1, 2, 1, 2])}
NONE = {"label": torch.zeros(8, dtype=torch.long)}


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def labelled(seed: int = 0) -> Denoiser:
    torch.manual_seed(seed)
    return Denoiser(Plane(labels=2), Linear(), VELOCITY, answers=("jump",)).double()


@paths
def test_two_straight_steps_are_one(path: Path) -> None:
    t = torch.tensor([0.99, 0.7, 0.5, 0.2], dtype=torch.float64)
    middle, end = t * 0.6, t * torch.tensor([0.3, 0.1, 0.0, 0.5], dtype=torch.float64)
    x, first, second = torch.randn(3, 4, 3, generator=rng(), dtype=torch.float64)
    one = straight(path, x, averaged(path, first, second, t, middle, end), t, end)
    two = straight(path, straight(path, x, first, t, middle), second, middle, end)
    torch.testing.assert_close(one, two, rtol=0, atol=1e-10)
    torch.testing.assert_close(averaged(path, first, first, t, middle, end), first)


@paths
def test_exact_jumps_are_two_exact_halves(path: Path) -> None:
    student = exact_student(path)
    lesson = Lesson(student, exact_teacher(path), slow=student)
    method = Shortcut(bootstrap=1.0)
    begins, lengths, shortest = method.jumps(64, rng(1))
    x = straight(path, DATA.draw(64, rng(2)), torch.randn(64, 3, generator=rng(3), dtype=torch.float64), begins, begins)
    with torch.no_grad():
        halves = method.halves(lesson, x, begins, begins - lengths, shortest, {})
    error = (halves - DATA.jump(path, x, begins, begins - lengths)).abs().amax(1)
    assert 0 < shortest < 64 and float(error[shortest:].max()) < 1e-9
    assert 1e-9 < float(error[:shortest].max()) < 0.1  # of the shortest, halves are DDIM's steps


@paths
def test_an_exact_student_of_an_exact_teacher_stands_still(path: Path) -> None:
    """No loss but that of the shortest steps, and nothing where these are very short."""
    student = exact_student(path)
    lesson = Lesson(student, exact_teacher(path), slow=exact_student(path).requires_grad_(False))
    found = []
    for finest in (32, 2**20):
        method = Shortcut(finest=finest, bootstrap=0.5, times=Uniform(0.02, 0.98))
        student.zero_grad()
        loss = method(lesson, DATA.draw(512, rng(1)), None, rng(2))
        loss.value.backward()
        found.append((float(loss.value.detach()), abs(float(student.net.weight.grad))))  # type: ignore[arg-type, union-attr]
        assert float(loss.parts["means"]) < 1e-20
    assert found[1][0] < 1e-6 and found[1][1] < 1e-6 < found[0][1], found


def test_jumps_are_of_dyadic_lengths_at_multiples_of_them_the_shortest_first() -> None:
    begins, lengths, shortest = Shortcut(finest=128).jumps(7000, rng(1))
    assert set(lengths.tolist()) == {2.0**-k for k in range(7)}
    assert torch.equal((begins / lengths).round(), begins / lengths)
    assert float((begins - lengths).min()) == 0 and float(begins.max()) == 1
    assert bool((lengths[:shortest] == 2 / 128).all()) and bool((lengths[shortest:] > 2 / 128).all())
    counts = torch.stack([(lengths == 2.0**-k).sum() for k in range(7)])
    assert int(counts.min()) > 850 and int(counts.max()) < 1150  # each length as often
    fine = begins[:shortest] * 64
    assert set(fine.tolist()) == set(range(1, 65))


def test_the_loss_is_the_papers() -> None:
    """7/8 flow matching, 1/8 the mean of two half steps by the slow copy, guided where they are the shortest."""
    student, slow = labelled(0), labelled(1)
    method = Shortcut(finest=4, bootstrap=0.75, guidance=2.5)
    x0 = MODES.draw(8, rng(1))
    loss = method(Lesson(student, slow=slow, null=lambda: NONE), x0, COND, rng(2))
    chance = rng(2)
    t = method.times(8, Linear(), chance).double()
    begins, lengths, shortest = method.jumps(6, chance)
    assert 0 < shortest < 6
    t, d = torch.cat([begins, t[6:]]), torch.cat([lengths, torch.zeros(2, dtype=torch.float64)])
    e = torch.randn(8, 2, generator=chance, dtype=torch.float64)
    z = (1 - t[:, None]) * x0 + t[:, None] * e
    target = e - x0
    with torch.no_grad():
        for i in range(6):
            at, half = t[i : i + 1], d[i : i + 1] / 2

            def u(z: Tensor, t: Tensor, half: Tensor = half, i: int = i) -> Tensor:
                until = t if i < shortest else t - half
                said: Tensor = slow.net(z, t, until=until, label=COND["label"][i : i + 1])
                silent: Tensor = slow.net(z, t, until=until)
                return silent + 2.5 * (said - silent) if i < shortest else said

            first = u(z[i : i + 1], at)
            second = u(z[i : i + 1] - half[:, None] * first, at - half)
            target[i] = (first + second)[0] / 2
        expected = (student.net(z, t, until=t - d, **COND) - target).square().mean(1)
    torch.testing.assert_close(loss.each, expected, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(loss.value.detach(), expected.mean(), rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(loss.parts["jumps"], expected[:6].mean(), rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(loss.parts["means"], expected[6:].mean(), rtol=1e-6, atol=1e-9)


def test_without_jumps_it_is_denoising() -> None:
    student, x0 = plane_student(), MODES.draw(32, rng(1)).float()
    loss = Shortcut(bootstrap=0.0)(Lesson(student), x0, None, rng(2))
    plain = Denoising()(student, x0, None, rng(2))
    torch.testing.assert_close(loss.value, plain.value)
    assert set(loss.parts) == {"means"}


def test_a_teacher_says_the_means_and_the_shortest_steps_of_its_own_rows() -> None:
    student, slow, x0 = labelled(0), labelled(1), MODES.draw(8, rng(1))
    method = Shortcut(finest=2, bootstrap=0.5, means="teacher")  # all jumps are of the shortest steps
    lesson = Lesson(student, Teacher(labelled(2), COND, lambda: NONE, Unguided(COND)), slow, null=lambda: NONE)
    said = method(lesson, x0, COND, rng(2))
    other = replace(lesson, slow=labelled(3))
    assert torch.equal(said.each, method(other, x0, COND, rng(2)).each)  # the slow copy has no say in them
    swapped = {"label": COND["label"].flip(0)}
    with_others = replace(lesson, teacher=Teacher(labelled(2), swapped, lambda: NONE, Unguided(swapped)))
    assert not torch.allclose(said.each, method(with_others, x0, COND, rng(2)).each)
    with pytest.raises(ConfigError, match="no teacher whose means"):
        method(Lesson(student, slow=slow), x0, COND, rng(2))


def test_targets_of_jumps_can_be_clipped() -> None:
    student = exact_student(Linear())
    t = torch.full((16,), 1.0, dtype=torch.float64)
    x = 3 * torch.randn(16, 3, generator=rng(), dtype=torch.float64)
    free, clipped = (Shortcut(clip=clip).halves(Lesson(student), x, t, t * 0, 0, {}) for clip in (None, 0.7))
    assert float(free.detach().abs().max()) > 0.7 and float(clipped.detach().abs().max()) <= 0.7


def test_the_slow_copy_follows_evenly_and_what_cannot_be_is_named() -> None:
    assert Shortcut(decay=0.99).follow(5, 100) == 0.99 and Shortcut().told == ("until",)
    for wrong, where in (({"finest": 100}, "objective.finest"), ({"bootstrap": 2.0}, "objective.bootstrap")):
        with pytest.raises(ConfigError) as caught:
            Shortcut(**wrong)  # type: ignore[arg-type]
        assert caught.value.where == where


def test_three_modes_are_learned_in_few_steps() -> None:
    """From data alone, against DDIM with the exact means."""
    method: Any = Shortcut(finest=32, bootstrap=0.25, decay=0.98)
    found = distances(trained(method, VELOCITY))
    assert found[1][0] < 0.25 < 0.9 < found[1][1], found
    assert found[2][0] < 0.2 < 0.35 < found[2][1], found
    assert found[4][0] < 0.13, found

"""MeanFlow and iMF: the exact jumps are where they stand still, on every path; the papers' own formulas on the linear
one; and small networks that learn three modes of a plane by them.
"""

from dataclasses import replace
from typing import Any

import pytest
import torch
from flowmaps import DATA, MODES, PATHS, Plane, distances, exact_student, exact_teacher, plane_student, trained
from torch import Tensor

from sfumato.denoiser import Denoiser
from sfumato.errors import ConfigError
from sfumato.guidance import Unguided
from sfumato.objectives.meanflow import Adaptive, ImprovedMeanFlow, MeanFlow, SecondHead, change
from sfumato.objectives.teaching import Lesson, Teacher
from sfumato.paths import Linear, Path, Tabulated, noised
from sfumato.predictions import VELOCITY, X0, Prediction, V
from sfumato.times import LogitNormal, Uniform

paths = pytest.mark.parametrize("path", PATHS.values(), ids=PATHS.keys())
both_methods = pytest.mark.parametrize("method", [MeanFlow(), ImprovedMeanFlow()], ids=["meanflow", "improved"])
TIMES = Uniform(0.02, 0.98)


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def some_data(n: int = 64) -> Tensor:
    return DATA.draw(n, rng(1))


# The fixed point


@both_methods
@paths
@pytest.mark.parametrize("prediction", [X0, VELOCITY, V], ids=lambda one: one.name)
def test_exact_jumps_of_an_exact_teacher_have_no_loss(method: Any, path: Path, prediction: Prediction) -> None:
    """To rounding, and no gradient; a student that is one percent off has both."""
    method = replace(method, times=TIMES, still=0.25, power=0.0)
    student = exact_student(path, prediction)
    lesson = Lesson(student, exact_teacher(path))
    loss = method(lesson, some_data(), None, rng(2))
    loss.value.backward()
    gradient = student.net.weight.grad  # type: ignore[union-attr]
    assert float(loss.value.detach()) < 1e-14 and abs(float(gradient)) < 1e-6  # type: ignore[arg-type]
    with torch.no_grad():
        student.net.weight.fill_(1.01)  # type: ignore[union-attr, operator]
    student.zero_grad()
    off = method(lesson, some_data(), None, rng(2))
    off.value.backward()
    assert float(off.value.detach()) > 1e-6 and float(student.net.weight.grad) > 0  # type: ignore[arg-type, union-attr]


@both_methods
@pytest.mark.parametrize("path", ["linear", "cosine", "vp"])
def test_on_data_alone_exact_jumps_stand_still_on_average(method: Any, path: str) -> None:
    """x0 stands for its mean: the gradient is noise around nothing, and far from it where the student is off."""
    method = replace(method, times=TIMES, still=0.25, power=0.0, space=None)
    found = {}
    for weight in (1.0, 1.3):
        student = exact_student(PATHS[path])
        with torch.no_grad():
            student.net.weight.fill_(weight)  # type: ignore[union-attr, operator]
        each = []
        for k in range(16):
            student.zero_grad()
            method(Lesson(student), DATA.draw(500, rng(k)), None, rng(100 + k)).value.backward()
            each.append(float(student.net.weight.grad))  # type: ignore[arg-type, union-attr]
        spread = torch.tensor(each)
        found[weight] = float(spread.mean() / (spread.std() / 4))
    assert abs(found[1.0]) < 3.5 and found[1.3] > 8, found


@paths
def test_the_derivative_along_the_flow_is_a_central_difference(path: Path) -> None:
    student, x = exact_student(path), some_data(32)
    t = (150.4 + 23 * torch.arange(32, dtype=torch.float64)) / 1000  # between those of a table, where it has kinks
    until, velocity = t * 0.6, DATA.velocity(path, x, t)
    exact = change(student, x, t, until, velocity, {})
    for by, close in ((1e-5, 1e-6),) if isinstance(path, Tabulated) else ((1e-3, 3e-4), (1e-5, 1e-6)):
        torch.testing.assert_close(change(student, x, t, until, velocity, {}, by), exact, rtol=close, atol=close)
    end = torch.zeros_like(t)  # where the flow ends does not change along it
    assert float(change(student, x, t, end, velocity, {}).detach().abs().max()) < 1e-9


def test_a_difference_stays_between_the_end_of_a_jump_and_pure_noise() -> None:
    seen: list[Tensor] = []

    class Watching(torch.nn.Module):
        def forward(self, x: Tensor, t: Tensor, until: Tensor) -> Tensor:
            seen.append(t)
            return x * t[:, None]

    student = Denoiser(Watching(), Linear(), X0, answers=("jump",))
    t, until = torch.tensor([1.0, 0.5, 0.99, 0.3]), torch.tensor([0.0, 0.49, 0.98, 0.0])
    x = torch.ones(4, 2)
    got = change(student, x, t, until, torch.zeros(4, 2), {}, 0.1)
    torch.testing.assert_close(seen[0], torch.tensor([1.0, 0.6, 1.0, 0.4]))
    torch.testing.assert_close(seen[1], torch.tensor([0.9, 0.49, 0.98, 0.2]))
    torch.testing.assert_close(got, torch.ones(4, 2))


# The papers' formulas


def original(u: Any, x0: Tensor, t: Tensor, r: Tensor, e: Tensor, v: Tensor, improved: bool) -> Tensor:
    """Geng et al. 2025, algorithm 1; 2025b, algorithm 1, with the network's own velocity: the errors, (B, D)."""
    z = (1 - t[:, None]) * x0 + t[:, None] * e
    tangent = u(z, t, t).detach() if improved else v
    said, dudt = torch.func.jvp(lambda z, t: u(z, t, r), (z, t), (tangent, torch.ones_like(t)))
    return said + (t - r)[:, None] * dudt.detach() - v


@both_methods
@pytest.mark.parametrize("power", [0.0, 0.5, 1.0])
def test_on_the_linear_path_for_velocities_it_is_the_papers(method: Any, power: float) -> None:
    """The loss, and the gradient of every weight."""
    student = plane_student().double()
    method = replace(method, still=0.5, power=power)
    x0 = MODES.draw(8, rng(1))
    loss = method(Lesson(student), x0, None, rng(2))
    grads = torch.autograd.grad(loss.value, list(student.parameters()))
    chance = rng(2)
    one, two = (part.double() for part in method.times(16, Linear(), chance).chunk(2))
    e = torch.randn(8, 2, generator=chance, dtype=torch.float64)
    t, r = torch.maximum(one, two), torch.minimum(one, two)
    r = torch.cat([t[:4], r[4:]])
    assert torch.equal(loss.t, t)

    def u(z: Tensor, t: Tensor, r: Tensor) -> Tensor:
        said: Tensor = student.net(z, t, until=r)
        return said

    square = original(u, x0, t, r, e, e - x0, isinstance(method, ImprovedMeanFlow)).square().sum(1)
    value = (square / (square.detach() + 0.01) ** power).mean()
    torch.testing.assert_close(loss.value, value, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(loss.each, square.detach() / 2, rtol=1e-9, atol=1e-12)
    for ours, theirs in zip(grads, torch.autograd.grad(value, list(student.parameters())), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-12)


@both_methods
def test_jumps_of_no_length_are_flow_matching(method: Any) -> None:
    student, x0 = plane_student(), MODES.draw(32, rng(1)).float()
    loss = replace(method, still=1.0, power=0.0)(Lesson(student), x0, None, rng(2))
    chance = rng(2)
    t = method.times(64, Linear(), chance).chunk(2)
    t, e = torch.maximum(*t), torch.randn(32, 2, generator=chance)
    said = student.predict(noised(Linear(), x0, e, t), t)
    torch.testing.assert_close(loss.each, (said - (e - x0)).square().mean(1).detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(loss.value.detach(), 2 * loss.each.mean())


# The velocity by a second head


def headed(student: Denoiser) -> SecondHead:
    """A second head that is not the first any more."""
    head = ImprovedMeanFlow(head="auxiliary").critic(student)
    assert isinstance(head, SecondHead)
    for p, own in zip(head.layer.parameters(), student.net.head.parameters(), strict=True):  # type: ignore[union-attr]
        assert torch.equal(p, own) and p is not own
    with torch.no_grad():
        head.layer.weight.mul_(1.3)  # type: ignore[union-attr, operator]
    return head


@pytest.mark.parametrize("guided", [False, True])
def test_a_second_head_is_the_papers(guided: bool) -> None:
    """It is the tangent and, of data, the guidance; it learns the same target; gradients of both reach the network."""
    student = labelled() if guided else plane_student().double()
    head, x0, cond = headed(student), MODES.draw(6, rng(1)), COND if guided else {}
    method = ImprovedMeanFlow(head="auxiliary", power=0.5, scales=(1.0, 8.0) if guided else None)
    loss = method(Lesson(student, critic=head, null=lambda: NONE), x0, cond, rng(2))
    weights = [*student.parameters(), *head.parameters()]
    grads = torch.autograd.grad(loss.value, weights)
    chance = rng(2)
    one, two = (part.double() for part in method.times(12, Linear(), chance).chunk(2))
    e = torch.randn(6, 2, generator=chance, dtype=torch.float64)
    t, r = torch.maximum(one, two), torch.minimum(one, two)
    r, z, v = torch.cat([t[:3], r[3:]]), (1 - t[:, None]) * x0 + t[:, None] * e, e - x0
    told = dict(cond)
    if guided:
        told["guidance"] = 8.0 ** torch.rand(6, generator=chance).double()

    def at_t(z: Tensor, t: Tensor, **said: Tensor) -> Tensor:
        net: Any = student.net
        inside: list[Tensor] = []
        hook = net.head.register_forward_pre_hook(lambda module, given: inside.append(given[0]))
        net(z, t, until=t, **{**told, **said})
        hook.remove()
        out: Tensor = head.layer(inside[0])
        return out

    if guided:
        v = v + ((1 - 1 / told["guidance"])[:, None] * (at_t(z, t) - at_t(z, t, **NONE))).detach()
    said, dudt = torch.func.jvp(
        lambda z, t: student.net(z, t, until=r, **told), (z, t), (at_t(z, t).detach(), torch.ones_like(t))
    )
    squares = [error.square().sum(1) for error in (said + (t - r)[:, None] * dudt.detach() - v, at_t(z, t) - v)]
    value = sum((square / (square.detach() + 0.01) ** 0.5).mean() for square in squares)
    assert isinstance(value, Tensor)
    torch.testing.assert_close(loss.value, value, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(loss.parts["head"], squares[1].detach().mean() / 2, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(loss.each, squares[0].detach() / 2, rtol=1e-8, atol=1e-10)
    theirs = torch.autograd.grad(value, weights, allow_unused=True)
    for ours, other in zip(grads, theirs, strict=True):
        torch.testing.assert_close(ours, other, rtol=1e-6, atol=1e-8)  # scales are drawn in float32


def test_only_networks_with_a_known_last_layer_have_a_second_head() -> None:
    with pytest.raises(ConfigError, match=r"objective\.head=own"):
        ImprovedMeanFlow(head="auxiliary").critic(exact_student(Linear()))
    with pytest.raises(ConfigError, match="no such head"):
        ImprovedMeanFlow(head="both")  # type: ignore[arg-type]
    assert not list(ImprovedMeanFlow().critic(exact_student(Linear())).parameters())


def test_an_error_in_another_space_is_that_times_its_gain() -> None:
    student, x0 = plane_student(prediction=X0), MODES.draw(32, rng(1)).float()
    plain, weighed = (
        MeanFlow(power=0.0, still=1.0, space=space)(Lesson(student), x0, None, rng(2)) for space in (None, VELOCITY)
    )
    torch.testing.assert_close(weighed.each, plain.each / plain.t.square())  # type: ignore[union-attr]


def test_adaptive_weights_are_powers_of_the_error() -> None:
    square = torch.tensor([0.0, 0.5, 40.0], requires_grad=True)
    found = Adaptive(power=1.0, floor=0.01)(square)
    found.sum().backward()
    torch.testing.assert_close(square.grad, 1 / (square.detach() + 0.01))
    torch.testing.assert_close(Adaptive(0.0)(square), square)


# Guidance


def labelled(seed: int = 0) -> Denoiser:
    torch.manual_seed(seed)
    return Denoiser(Plane(labels=2), Linear(), VELOCITY, answers=("jump",)).double()


COND = {"label": torch.tensor([1, 2, 1, 2, 1, 2])}
NONE = {"label": torch.zeros(6, dtype=torch.long)}


def test_guidance_inside_is_the_papers_mix_of_velocities() -> None:
    """v_g = omega v + (1 - omega - kappa) u(z, t, t) + kappa u(z, t, t, c), at a scale of omega / (1 - kappa)."""
    student, x0 = labelled(), MODES.draw(6, rng(1))
    method = MeanFlow(still=0.5, power=0.0, guidance=3.0, kappa=0.6, interval=(0.0, 1.0))
    loss = method(Lesson(student, null=lambda: NONE), x0, COND, rng(2))
    chance = rng(2)
    one, two = (part.double() for part in method.times(12, Linear(), chance).chunk(2))
    e = torch.randn(6, 2, generator=chance, dtype=torch.float64)
    t, r = torch.maximum(one, two), torch.minimum(one, two)
    r = torch.cat([t[:3], r[3:]])
    z = (1 - t[:, None]) * x0 + t[:, None] * e
    omega, kappa = 3.0 * 0.4, 0.6
    with torch.no_grad():
        own, silent = (student.net(z, t, **cond) for cond in (COND, NONE))
        guided = omega * (e - x0) + (1 - omega - kappa) * silent + kappa * own
    v = torch.where((t <= 0.5)[:, None], guided, e - x0)  # sigma / alpha is at most 1 in the first half
    assert 0 < int((t <= 0.5).sum()) < 6
    error = original(lambda z, t, r: student.net(z, t, until=r, **COND), x0, t, r, e, v, False)
    torch.testing.assert_close(loss.each, error.square().mean(1).detach(), rtol=1e-8, atol=1e-10)


def test_scales_are_told_and_are_in_the_target() -> None:
    """v_g = v + (1 - 1 / omega) (v_c - v_u), and every scale between the ends comes up."""
    student, x0 = labelled(), MODES.draw(6, rng(1))
    method = ImprovedMeanFlow(still=1.0, power=0.0, scales=(1.0, 8.0))
    assert method.told == ("until", "guidance") and MeanFlow().told == ("until",)
    loss = method(Lesson(student, null=lambda: NONE), x0, COND, rng(2))
    chance = rng(2)
    t = torch.maximum(*(part.double() for part in method.times(12, Linear(), chance).chunk(2)))
    e = torch.randn(6, 2, generator=chance, dtype=torch.float64)
    scale = 8.0 ** torch.rand(6, generator=chance).double()
    z = (1 - t[:, None]) * x0 + t[:, None] * e
    with torch.no_grad():
        own, silent = (student.net(z, t, guidance=scale, **cond) for cond in (COND, NONE))
        v = e - x0 + (1 - 1 / scale)[:, None] * (own - silent)
    torch.testing.assert_close(loss.each, (own - v).square().mean(1), rtol=1e-6, atol=1e-8)


def test_a_teachers_guidance_is_its_own() -> None:
    student = labelled()
    lesson = Lesson(student, Teacher(labelled(1), COND, lambda: NONE, Unguided(COND)), null=lambda: NONE)
    x0 = MODES.draw(6, rng(1))
    with pytest.raises(ConfigError, match="guidance of its own"):
        MeanFlow(guidance=2.0)(lesson, x0, COND, rng(2))
    taught, alone = (MeanFlow(means=means)(lesson, x0, COND, rng(2)) for means in (None, "data"))  # type: ignore[arg-type]
    assert torch.equal(alone.each, MeanFlow()(Lesson(student), x0, COND, rng(2)).each)
    assert not torch.allclose(taught.each, alone.each)
    with pytest.raises(ConfigError, match="no teacher whose means"):
        MeanFlow(means="teacher")(Lesson(student), x0, COND, rng(2))


def test_what_cannot_be_is_named() -> None:
    for wrong, where in (
        ({"still": 1.5}, "objective.still"),
        ({"kappa": 1.0}, "objective.kappa"),
        ({"difference": -0.1}, "objective.difference"),
    ):
        with pytest.raises(ConfigError) as caught:
            MeanFlow(**wrong)  # type: ignore[arg-type]
        assert caught.value.where == where
    with pytest.raises(ConfigError, match="scales run"):
        ImprovedMeanFlow(scales=(0.5, 2.0))


# Learning


@pytest.mark.parametrize(
    ("method", "prediction"),
    [
        (MeanFlow(times=LogitNormal(0.0, 1.2), still=0.5, power=0.0), X0),
        (ImprovedMeanFlow(times=LogitNormal(0.0, 1.2), power=0.0), VELOCITY),
        (ImprovedMeanFlow(times=LogitNormal(0.0, 1.2), power=0.0, head="auxiliary"), VELOCITY),
    ],
    ids=["meanflow", "improved", "headed"],
)
def test_three_modes_are_learned_in_few_steps(method: Any, prediction: Prediction) -> None:
    """From data alone, against DDIM with the exact means: far nearer in one step, and in two."""
    found = distances(trained(method, prediction))
    assert found[1][0] < 0.25 < 0.9 < found[1][1], found
    assert found[2][0] < 0.25 < 0.35 < found[2][1], found
    assert found[4][0] < 0.18, found

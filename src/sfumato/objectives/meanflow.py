"""MeanFlow: a model of average velocities, from data alone or from a teacher (Geng et al. 2025).

In y = x / sigma and rho = alpha / sigma the flow's velocity is E[x0 | x_t], on every path, and so what a "jump" from t
to s answers, x, is its average over the way (see `sfumato.denoiser.Denoise`). That a jump lands on the same point from
wherever on the flow it starts, d/dt (q x_t + (alpha_s - q alpha) x) = 0 with q = sigma_s / sigma, is the identity

    q (x - E[x0 | x_t]) + (alpha_s - q alpha) sigma / (alpha sigma' - alpha' sigma) dx/dt = 0

where dx/dt follows the flow. What is left of it is the error. On the linear path, for velocities, this is the paper's
u - (v - (t - s) du/dt), times -t; and the network may as well predict x0, where nothing is divided by small numbers.
"""

import copy
import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Generator, Tensor, nn
from torch.func import functional_call

from sfumato.denoiser import JUMP, Cond, Denoiser, joined
from sfumato.derivatives import across, along_direction, widened
from sfumato.errors import ConfigError
from sfumato.guidance import all_within
from sfumato.guidance.core import Interval
from sfumato.objectives.denoising import Loss
from sfumato.objectives.draws import beside, noise_like
from sfumato.objectives.teaching import Lesson, Teacher
from sfumato.paths import Path, along, noised
from sfumato.predictions import VELOCITY, Prediction
from sfumato.times import Density, LogitNormal

LAST = ("head", "exit")  # what networks call their last layer
LOGIT_NORMAL = LogitNormal(-0.4, 1.0)  # the papers'
Means = Literal["data", "teacher"]


@dataclass(frozen=True)
class Adaptive:
    """Square errors of samples over a power of themselves, (error + floor)^power, so that none outweighs the others.

    Geng et al. 2025, eq. 22: 1 makes all weigh the same, 1/2 is like a pseudo-Huber loss, 0 is the square error.
    """

    power: float = 1.0
    floor: float = 0.01

    def __call__(self, square: Tensor) -> Tensor:
        """square: (B,), summed over a sample."""
        weight: Tensor = (square.detach() + self.floor) ** -self.power
        return square * weight


@dataclass(frozen=True)
class MeanFlow:
    """The residual of the identity of jumps, as a square error, of velocities whatever the network predicts.

    times: two draws for a sample are where a jump begins, the later one, and where it ends. still: the share of a batch
    whose jumps have no length: these learn E[x0 | x_t]. means: where that comes from, the "data" (x0 stands for its
    mean) or the "teacher" under its guidance; the teacher where there is one, unless said. guidance: of the data, a
    scale that the student's answers have within them, 1 is off; kappa: how much of it comes from the student's own
    conditional answer, which calms the target (eq. 20 and 21: omega = guidance (1 - kappa)); interval: noise levels
    (low, high] within which it is guided. difference: 0 takes the derivative along the flow itself, which needs a
    network that is told the time smoothly (`time_input=time`); else it is a central difference over so much time to
    both sides, since a network that is told thousandths has ripples in time that samplers do not see, and a derivative
    does. power, floor: see `Adaptive`; where samples have few dimensions, a power above 0 finds a middle of velocities
    that is not their mean. space: the prediction whose error is weighed; None for the network's own.
    """

    times: Density = LOGIT_NORMAL
    still: float = 0.75
    means: Means | None = None
    guidance: float = 1.0
    kappa: float = 0.5
    interval: Interval = (0.0, None)
    difference: float = 0.0
    power: float = 1.0
    floor: float = 0.01
    space: Prediction | None = VELOCITY

    def __post_init__(self) -> None:
        _check_shares(still=self.still, kappa=self.kappa, difference=self.difference)

    @property
    def told(self) -> tuple[str, ...]:
        return ("until",)

    def suits(self, student: Denoiser, teacher: Denoiser | None) -> None:
        if checked_means(self.means, teacher):
            self._check_guidance()

    def __call__(self, lesson: Lesson, x0: Tensor, cond: Cond | None = None, rng: Generator | None = None) -> Loss:
        """x0: (B, ...). Times and noise come from `rng` on the CPU, times first."""
        student, told = lesson.student, dict(cond or {})
        t, until, still = pairs(self.times, self.still, x0, student.path, rng)
        eps = noise_like(x0, rng)
        x_t = noised(student.path, x0, eps, t).to(x0.dtype)
        mean = self._mean(lesson, x_t, t, x0, told)
        said = student.predict(x_t, t, told, until=until)
        with torch.no_grad():
            jump = student.prediction.x0(student.path, said, x_t, t)
            left = jump - mean
            if still < len(x0):
                rows = slice(still, None)
                x, at, end = x_t[rows], t[rows], until[rows]
                left[rows] = residual(student, x, at, end, mean[rows], jump[rows], some(told, rows), self.difference)
        return weighed(student, said, jump - left, x_t, t, self.space, Adaptive(self.power, self.floor))

    @torch.no_grad()
    def _mean(self, lesson: Lesson, x_t: Tensor, t: Tensor, x0: Tensor, cond: Cond) -> Tensor:
        """What stands for E[x0 | x_t], guided."""
        if taught(lesson, self.means):
            self._check_guidance()
            return lesson.taught(x_t, t)
        if self.guidance == 1 or not cond:
            return x0
        rows = torch.cat([x_t, x_t]), torch.cat([t, t]), joined([cond, lesson.null()])
        own, silent = lesson.student(*rows, to="x0").chunk(2)
        omega = self.guidance * (1 - self.kappa)
        guided = omega * x0 + (1 - omega - self.kappa) * silent + self.kappa * own
        return torch.where(along(all_within(self.interval, lesson.path, t), x0), guided, x0)

    def _check_guidance(self) -> None:
        if self.guidance != 1:
            seen, fix = f"{self.guidance:g}", f"teacher_guidance={self.guidance:g}"
            raise ConfigError("a teacher has guidance of its own", where="objective.guidance", seen=seen, fix=fix)


@dataclass(frozen=True)
class ImprovedMeanFlow:
    """MeanFlow as a regression of the instantaneous velocity, whose target does not move (Geng et al. 2025b, iMF).

    What the network says of a jump is composed to what it implies for E[x0 | x_t], along its own velocity at t, where a
    jump of no length answers; that is compared with the data or the teacher. scales: the range of guidance scales that
    the network is told, and has within it; they are drawn evenly in their logarithm; None for no guidance. interval:
    noise levels within which it is guided. head: who says the velocity at t: jumps of no length themselves ("own"), or
    a second last layer of the network, which learns it along and is not kept ("auxiliary"); the paper has both. Its
    networks are told intervals too. times, still, means, difference, power, floor, space: as of `MeanFlow`.
    """

    times: Density = LOGIT_NORMAL
    still: float = 0.5
    means: Means | None = None
    scales: tuple[float, float] | None = None
    interval: Interval = (0.0, None)
    head: Literal["own", "auxiliary"] = "own"
    difference: float = 0.0
    power: float = 1.0
    floor: float = 0.01
    space: Prediction | None = VELOCITY

    def __post_init__(self) -> None:
        _check_shares(still=self.still, difference=self.difference)
        if self.head not in ("own", "auxiliary"):
            raise ConfigError("no such head", where="objective.head", seen=repr(self.head), fix="own or auxiliary")
        if self.scales is not None and not 1 <= self.scales[0] <= self.scales[1]:
            seen = str(self.scales)
            raise ConfigError("scales run from 1 or more up", where="objective.scales", seen=seen, fix="[1, 8]")

    @property
    def told(self) -> tuple[str, ...]:
        return ("until",) if self.scales is None else ("until", "guidance")

    def suits(self, student: Denoiser, teacher: Denoiser | None) -> None:
        checked_means(self.means, teacher)

    def critic(self, denoiser: Denoiser) -> nn.Module:
        return SecondHead(denoiser.net) if self.head == "auxiliary" else nn.Identity()

    def __call__(self, lesson: Lesson, x0: Tensor, cond: Cond | None = None, rng: Generator | None = None) -> Loss:
        """x0: (B, ...). Times, noise and scales come from `rng` on the CPU, in this order.

        With an auxiliary head the value is the sum of both losses, which parts tell apart.
        """
        student, told = lesson.student, dict(cond or {})
        t, until, still = pairs(self.times, self.still, x0, student.path, rng)
        eps = noise_like(x0, rng)
        x_t = noised(student.path, x0, eps, t).to(x0.dtype)
        scale: Tensor | None = None
        if self.scales is not None:
            low, high = (math.log(one) for one in self.scales)
            scale = torch.exp(low + (high - low) * torch.rand(len(x0), generator=rng)).to(t)
            told["guidance"] = scale
        mean = self._mean(lesson, x_t, t, x0, told, scale)
        said = student.predict(x_t, t, told, until=until)
        with torch.no_grad():
            jump = student.prediction.x0(student.path, said, x_t, t)
            left = jump - mean
            if still < len(x0):
                rows = slice(still, None)
                x, at, given = x_t[rows], t[rows], some(told, rows)
                own = self._own(lesson, x, at, given)
                along_own = residual(student, x, at, until[rows], own, jump[rows], given, self.difference)
                left[rows] = along_own + own - mean[rows]
        by = Adaptive(self.power, self.floor)
        loss = weighed(student, said, jump - left, x_t, t, self.space, by)
        if not isinstance(lesson.critic, SecondHead):
            return loss
        beside = weighed(student, lesson.critic(student, x_t, t, told), mean, x_t, t, self.space, by)
        return loss._replace(value=loss.value + beside.value, parts={**loss.parts, "head": beside.parts["error"]})

    def _own(self, lesson: Lesson, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """The network's own E[x0 | x_t]."""
        if isinstance(lesson.critic, SecondHead):
            said = lesson.critic(lesson.student, x_t, t, cond)
            return lesson.student.prediction.x0(lesson.path, said, x_t, t)
        own: Tensor = lesson.student(x_t, t, cond, to="x0")
        return own

    @torch.no_grad()
    def _mean(self, lesson: Lesson, x_t: Tensor, t: Tensor, x0: Tensor, cond: Cond, scale: Tensor | None) -> Tensor:
        if taught(lesson, self.means):
            return lesson.taught(x_t, t, scale)
        if scale is None or cond.keys() == {"guidance"}:
            return x0
        null = {**lesson.null(), "guidance": scale}
        rows = torch.cat([x_t, x_t]), torch.cat([t, t]), joined([cond, null])
        own, silent = self._own(lesson, *rows).chunk(2)
        less = torch.where(all_within(self.interval, lesson.path, t), 1 - 1 / scale, 0.0)
        return x0 + along(less, x0) * (own - silent)


class SecondHead(nn.Module):
    """A second last layer of a network, which says velocities while the first says jumps. It begins as the first."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.layer = copy.deepcopy(net.get_submodule(last_layer(net))).requires_grad_(True)

    def forward(self, student: Denoiser, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """What the network predicts for a jump of no length, through this layer: as `Denoiser.predict`."""
        place = f"denoiser.net.{last_layer(student.net)}"
        own: dict[str, Tensor] = {f"{place}.{name}": p for name, p in self.layer.named_parameters()}
        said: Tensor = functional_call(_Predicts(student), own, (x_t, t, cond))
        return said


class _Predicts(nn.Module):
    """A denoiser, called for what its network says."""

    def __init__(self, denoiser: Denoiser) -> None:
        super().__init__()
        self.denoiser = denoiser

    def forward(self, *given: Any) -> Tensor:
        return self.denoiser.predict(*given)


def last_layer(net: nn.Module) -> str:
    """The name of a network's last layer. ConfigError for networks that have none that is known."""
    found: list[str] = [name for name, _ in net.named_modules() if name.rpartition(".")[2] in LAST]
    if not found:
        what, seen = "a second head is made of a last layer, named head or exit", type(net).__name__
        raise ConfigError(what, where="model.net", seen=seen, fix="objective.head=own")
    return min(found, key=_depth)


def _depth(name: str) -> int:
    return name.count(".")


def pairs(times: Density, still: float, x0: Tensor, path: Path, rng: Generator | None) -> tuple[Tensor, Tensor, int]:
    """Where jumps begin and end, (B,) each, and how many of them, the first ones, have no length."""
    n = len(x0)
    drawn = beside(x0, times(2 * n, path, rng)).chunk(2)
    t, until = torch.maximum(*drawn), torch.minimum(*drawn)
    count = min(n, round(still * n))
    until = torch.cat([t[:count], until[count:]])
    return t, until, count


def residual(
    student: Denoiser,
    x_t: Tensor,
    t: Tensor,
    until: Tensor,
    mean: Tensor,
    jump: Tensor,
    cond: Cond,
    difference: float = 0.0,
) -> Tensor:
    """What is left of the identity of jumps: (B, ...). mean: E[x0 | x_t], which tells the flow; jump: the answer."""
    path = student.path
    alpha, sigma, alpha_, sigma_ = (along(f(s), x_t) for s in (t, until) for f in (path.alpha, path.sigma))
    rates = [along(rate, x_t) for rate in path.rates(t)]
    velocity = rates[0] * mean + rates[1] * (x_t - alpha * mean) / sigma
    slope = change(student, x_t, t, until, velocity, cond, difference)
    q = sigma_ / sigma
    return q * (jump - mean) + (alpha_ - q * alpha) * sigma / (alpha * rates[1] - rates[0] * sigma) * slope


def change(
    student: Denoiser, x_t: Tensor, t: Tensor, until: Tensor, velocity: Tensor, cond: Cond, difference: float = 0.0
) -> Tensor:
    """How a jump's answer changes along the flow, by time: (B, ...). difference: see `MeanFlow`; its points lie between
    the jump's end and pure noise.
    """

    wide = widened(cond)

    def answer(x: Tensor, at: Tensor) -> Tensor:
        said: Tensor = student(x, at, wide, to=JUMP, until=until)
        return said

    if difference == 0:
        return along_direction(answer, (x_t, t), (velocity, torch.ones_like(t)))[1]
    down, up = (t - until).clamp(max=difference), (1 - t).clamp(max=difference)
    return across(answer, x_t, t, velocity, down, up)


def weighed(
    student: Denoiser, said: Tensor, target: Tensor, x_t: Tensor, t: Tensor, space: Prediction | None, by: Adaptive
) -> Loss:
    """The loss of what a network said, its own prediction, against a target for x0. The errors are means over a sample,
    the weight is of their sum.
    """
    path, own = student.path, student.prediction
    error = (said - own.answer(path, target.detach(), x_t, t)).square()  # of x0, what was said is the jump itself
    if space is not None and space != own:
        error = error * along((space.gain(path, t) / own.gain(path, t)) ** 2, error)
    each = error.flatten(1).sum(1)
    mean = each.detach() / error[0].numel()
    return Loss(by(each).mean(), mean, t, {"error": mean.mean()})


def taught(lesson: Lesson, means: Means | None) -> bool:
    """Whether E[x0 | x_t] is the teacher's."""
    return checked_means(means, lesson.teacher)


def checked_means(means: Means | None, teacher: Denoiser | Teacher | None) -> bool:
    """Whether E[x0 | x_t] is the teacher's. ConfigError where it should be, and there is none."""
    if means == "teacher" and teacher is None:
        fix = "objective.means=data, or teacher=runs/quickstart"
        raise ConfigError("there is no teacher whose means to learn", where="objective.means", seen="teacher", fix=fix)
    return teacher is not None if means is None else means == "teacher"


def some(cond: Cond, rows: slice) -> Cond:
    """The conditions of some rows."""
    return {name: value[rows] for name, value in cond.items()}


def _check_shares(**shares: float) -> None:
    for name, share in shares.items():
        if not 0 <= share <= 1 or (name != "still" and share == 1):
            where = f"objective.{name}"
            raise ConfigError(f"{name} lies between 0 and 1", where=where, seen=f"{share:g}", fix=f"{where}=0.5")

"""Consistency in continuous time (sCM: Lu & Song 2025): two neighbouring points of a flow, infinitely near.

Along a flow the end f does not change. How it does change is the tangent, one forward-mode derivative of the network,
and gradients push against it; at f = the flow's end it is 0. The paper's TrigFlow is any path here: with the angle
theta = atan(sigma / (alpha sigma_data)), its network F is -edm(sigma_data), f = cos x' - sin sigma_data F for the state
x' = x_t of unit scale, and cos sin d/dtheta is d/dl, the derivative by the log noise level l = log(sigma / alpha). So
its tangent is sin g = cos^2 (f - v) + r (df/dl - cos^2 (f - v)), where v is the data, or the teacher's E[x0 | x_t].
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Generator, Tensor, nn

from sfumato.denoiser import Cond, Denoiser
from sfumato.derivatives import across, along_direction, widened
from sfumato.devices import same_chance
from sfumato.errors import ConfigError
from sfumato.objectives.critics import check_not_negative
from sfumato.objectives.denoising import Denoising, Loss
from sfumato.objectives.draws import noise_like, times_for
from sfumato.objectives.teaching import Lesson
from sfumato.objectives.weights import EDM, Weight
from sfumato.paths import Path, along, noised
from sfumato.predictions import edm
from sfumato.times import Density, LogNormal


@dataclass(frozen=True)
class ContinuousConsistency:
    """Against the tangent of where the flow ends: of data alone (sCT), or of a teacher's guided flow (sCD).

    times: where in time to look. sigma_data: the standard deviation of the data. warmup: steps over which r, the share
    of what is hard to learn in the tangent, rises to 1. tangent: "normalised" is g / (|g| + c) for its root mean square
    |g| over a sample; "clipped" to [-1, 1]; "raw". weight: of the error of F, `EDM(sigma_data)` is 1; by_level: also
    divided by the noise level, as in the paper. adaptive: also divided by what the error at such a time is, as a small
    network beside the student learns (Karras et al. 2024, eq. 22). difference: 0 takes the derivative itself, which
    needs a network that is told the time smoothly, as the paper's; else it is a central difference over so much log
    noise level to both sides, see `MeanFlow`.
    """

    times: Density = LogNormal(-1.0, 1.4)
    sigma_data: float = 0.5
    warmup: int = 10_000
    tangent: Literal["normalised", "clipped", "raw"] = "normalised"
    c: float = 0.1
    weight: Weight = EDM()
    by_level: bool = True
    adaptive: bool = True
    difference: float = 0.0

    def __post_init__(self) -> None:
        if self.tangent not in ("normalised", "clipped", "raw"):
            fix = "normalised, clipped or raw"
            raise ConfigError("no such tangent", where="objective.tangent", seen=repr(self.tangent), fix=fix)
        if not self.sigma_data > 0:
            raise ConfigError("data has a spread", where="objective.sigma_data", seen=f"{self.sigma_data:g}", fix="0.5")
        check_not_negative(self, "difference")

    def critic(self, denoiser: Denoiser) -> nn.Module:
        return Uncertainty() if self.adaptive else nn.Identity()

    def __call__(self, lesson: Lesson, x0: Tensor, cond: Cond | None = None, rng: Generator | None = None) -> Loss:
        """x0: (B, ...). Times and noise come from `rng` on the CPU. Errors told are the mean squares of the tangent."""
        student, path = lesson.student, lesson.path
        t = times_for(x0, self.times, path, rng)
        eps = noise_like(x0, rng)
        x_t = noised(path, x0, eps, t).to(x0.dtype)
        level = path.sigma(t) / path.alpha(t)
        wide = along(torch.atan2(path.sigma(t), path.alpha(t) * self.sigma_data), x0)
        with torch.no_grad():
            pull = self.tangent_of(lesson, x_t, t, x0, eps, cond)
            push = self._tamed(pull)
        said = student(x_t, t, cond)
        error = (said - said.detach()) / (self.sigma_data * wide.sin()) + push
        each = self.factor(student, t, level) * error.square().flatten(1).mean(1)
        if isinstance(lesson.critic, Uncertainty) and lesson.step is not None:
            log_error = lesson.critic(level)
            each = each / log_error.exp() + log_error
        return Loss(each.mean(), pull.square().flatten(1).mean(1), t)

    @torch.no_grad()
    def tangent_of(
        self, lesson: Lesson, x_t: Tensor, t: Tensor, x0: Tensor, eps: Tensor, cond: Cond | None = None
    ) -> Tensor:
        """g (B, ...) at states x_t = alpha x0 + sigma eps and times t (B,), in at least float32."""
        path = lesson.path
        if lesson.teacher is not None:
            x0 = lesson.teacher(x_t, t)
            eps = (x_t - along(path.alpha(t), x_t) * x0) / along(path.sigma(t), x_t)
        alpha_rate, sigma_rate = (along(one, x_t) for one in path.rates(t))
        end, change = self._changing(lesson.student, x_t, t, alpha_rate * x0 + sigma_rate * eps, cond)
        theta = along(torch.atan2(path.sigma(t), path.alpha(t) * self.sigma_data), x_t)
        easy = theta.cos() ** 2 * (end - x0)
        return (easy + self.risen(lesson) * (change - easy)) / theta.sin()

    def _changing(
        self, student: Denoiser, x_t: Tensor, t: Tensor, velocity: Tensor, cond: Cond | None
    ) -> tuple[Tensor, Tensor]:
        """Where the flow ends from x_t, and how that changes along it, by the log noise level: both like x_t.

        velocity: of x_t, by time.
        """
        wide, rate = widened(cond), by_log_level(student.path, t)

        def answer(x: Tensor, at: Tensor) -> Tensor:
            said: Tensor = student(x, at, wide)
            return said

        if self.difference == 0:
            with same_chance(x_t.device):
                return along_direction(answer, (x_t, t), (along(rate, x_t) * velocity, rate))
        with same_chance(x_t.device), torch.autocast(x_t.device.type, enabled=False):
            end = answer(x_t, t)
        far = self.difference * rate
        down, up = torch.minimum(far, t / 2), torch.minimum(far, 1 - t)  # never asked at the data
        return end, along(rate, x_t) * across(answer, x_t, t, velocity, down, up)

    def risen(self, lesson: Lesson) -> float:
        """r, which rises to 1 over the first steps."""
        return 1.0 if lesson.step is None or self.warmup == 0 else min(1.0, lesson.step / self.warmup)

    def factor(self, student: Denoiser, t: Tensor, level: Tensor) -> Tensor:
        """What the square error of F is multiplied by: (B,)."""
        own = Denoising(self.times, self.weight).factor(student, t)  # of the student's own prediction
        gain = student.prediction.gain(student.path, t) / edm(self.sigma_data).gain(student.path, t)
        return own * gain**2 / (level if self.by_level else 1)

    def _tamed(self, g: Tensor) -> Tensor:
        if self.tangent == "clipped":
            return g.clamp(-1, 1)
        if self.tangent == "raw":
            return g
        return g / (along(g.square().flatten(1).mean(1).sqrt(), g) + self.c)


class Uncertainty(nn.Module):
    """u, the log of how large errors are at a noise level: a line in random waves of its log. Learned, then dropped."""

    rate: Tensor
    phase: Tensor

    def __init__(self, waves: int = 128) -> None:
        super().__init__()
        rng = torch.Generator().manual_seed(0)
        self.register_buffer("rate", 2 * math.pi * torch.randn(waves, generator=rng))
        self.register_buffer("phase", 2 * math.pi * torch.rand(waves, generator=rng))
        self.time = nn.Linear(waves, 1, bias=False)
        nn.init.zeros_(self.time.weight)

    def forward(self, level: Tensor) -> Tensor:
        """Noise levels (B,) to u (B,)."""
        place = torch.log(level.clamp(1e-4, 1e4)).to(self.rate)[:, None] / 4  # EDM's c_noise
        waves = math.sqrt(2) * torch.cos(place * self.rate + self.phase)
        u: Tensor = self.time(waves / math.sqrt(waves.shape[1]))[:, 0]
        return u.float()


def by_log_level(path: Path, t: Tensor) -> Tensor:
    """dt / dl for l = log(sigma / alpha), as times change when noise levels do: 0 at the data and at pure noise."""
    (alpha_rate, sigma_rate), alpha, sigma = path.rates(t), path.alpha(t), path.sigma(t)
    return alpha * sigma / (alpha * sigma_rate - alpha_rate * sigma)

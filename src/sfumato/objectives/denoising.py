"""DDPM, v-prediction, EDM, flow matching, rectified flow, min-SNR: one objective, four choices.

Draw a time from a density, noise the data, compare what the network says with what a perfect one would. The square
error is averaged over each sample and weighted. A weight is stated for the error of one prediction (the paper's);
because at fixed x_t the errors of two predictions differ by a known gain, it applies to every network alike. And the
noise may be paired with the data, see `sfumato.objectives.couplings`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import NamedTuple, Protocol, runtime_checkable

from torch import Generator, Tensor

from sfumato.denoiser import Cond, Denoiser
from sfumato.objectives.couplings import Coupling, Independent
from sfumato.objectives.draws import noise_like, times_for
from sfumato.objectives.weights import Flat, Weight
from sfumato.paths import Path, log_snr, noised
from sfumato.predictions import Prediction
from sfumato.times import Density, Uniform, log_snr_rate


class Loss(NamedTuple):
    """value (): what is minimised. each (B,): the unweighted errors, detached, for the loss by noise level. t (B,), or
    None where nothing was noised. parts: terms of the value that are worth a line of their own, () and detached.
    """

    value: Tensor
    each: Tensor
    t: Tensor | None
    parts: Mapping[str, Tensor] = MappingProxyType({})


class Objective(Protocol):
    """A frozen choice of how to train."""

    def __call__(self, model: Denoiser, x0: Tensor, cond: Cond | None = None, rng: Generator | None = None) -> Loss: ...


@runtime_checkable
class Phased(Protocol):
    """An objective whose loss begins anew on the way, so that its numbers before and after are not to be compared."""

    def phase(self, step: int, steps: int) -> int:
        """Of which part of training step `step` (from 0, of those that were made) of `steps` is."""
        ...


@runtime_checkable
class Particular(Protocol):
    """An objective that not every model can learn by."""

    def check(self, model: Denoiser) -> None:
        """ConfigError for a model that cannot."""
        ...


@dataclass(frozen=True)
class Denoising:
    """A weighted square error of the network's answer.

    times: where in time to look. weight: how much each noise level counts, see `sfumato.objectives.weights`.
    space: the prediction whose error is weighed: by default the one that the weight is stated for, else the network's.
    coupling: which noise each sample gets.
    """

    times: Density = Uniform()
    weight: Weight = Flat()
    space: Prediction | None = None
    coupling: Coupling = Independent()

    def __call__(self, model: Denoiser, x0: Tensor, cond: Cond | None = None, rng: Generator | None = None) -> Loss:
        """x0: (B, ...). Times and noise come from `rng` on the CPU, so they do not depend on the device."""
        t = times_for(x0, self.times, model.path, rng)
        eps = noise_like(x0, rng)
        x0, eps = self.coupling(model.path, x0, eps, t, rng)
        x_t = noised(model.path, x0, eps, t).to(x0.dtype)
        said = model.predict(x_t, t, cond)
        target = model.prediction.target(model.path, x0, eps, t)
        each = (said - target).square().flatten(1).mean(1)
        return Loss((self.factor(model, t) * each).mean(), each.detach(), t)

    def notes(self, conditional: bool) -> tuple[str, ...]:
        """What a person should know before training with it."""
        if isinstance(self.coupling, Independent):
            return ()
        said = "noise is paired with data: sample by the ODE (euler, heun, dpmpp_2m), not by a method that draws noise"
        biased = (
            "and with conditions, so given one the noise seen is not normal; unconditional training has no such bias"
        )
        return (said, biased) if conditional else (said,)

    def factor(self, model: Denoiser, t: Tensor) -> Tensor:
        """What the square error of the network's own answer is multiplied by: (B,)."""
        path, own = Inside(model.path), model.prediction
        space = self.space or self.weight.space or own
        factor = self.weight(log_snr(path, t))
        if space != own:
            factor = factor * (space.gain(path, t) / own.gain(path, t)) ** 2
        if self.weight.per_log_snr:  # a density over log_snr, realised with draws from a density over t
            factor = factor * (-log_snr_rate(path, t) / (2 * self.times.pdf(model.path, t)))
        return factor


@dataclass(frozen=True)
class Inside:
    """A path that never quite reaches its ends, where weights and gains are 0 / 0 although their product has a limit.

    1e-9 is far below what any schedule reaches before its end, and its fourth power is still a float32.
    """

    path: Path

    def alpha(self, t: Tensor) -> Tensor:
        return self.path.alpha(t).clamp(min=1e-9)

    def sigma(self, t: Tensor) -> Tensor:
        return self.path.sigma(t).clamp(min=1e-9)

    def rates(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return self.path.rates(t)

    def time(self, log_snr: Tensor) -> Tensor:
        return self.path.time(log_snr)

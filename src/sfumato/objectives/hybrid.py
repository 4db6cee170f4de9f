"""A learned variance beside the mean: the hybrid objective of Nichol & Dhariwal 2021 (section 3.1, eq. 14-16).

The mean of a reverse step x_t -> x_s follows from E[x0 | x_t], which the square error teaches best; but how wide the
step should be, only the likelihood says. So the network gives a share r for each number, which puts the log variance
between those of the posterior and of the forward kernel, and L = L_simple + lambda L_vlb teaches both: in the bound
the mean is held fixed, so that it moves the share alone. On data that is one Gaussian the bound is stationary where the
step has the variance of p(x_s | x_t), the posterior's and what x0 leaves open: b^2 Var[x0 | x_t].
"""

import math
from collections.abc import Hashable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, cast

import torch
from torch import Generator, Tensor

from sfumato.denoiser import VARIANCE, Cond, Denoiser
from sfumato.devices import moved
from sfumato.errors import ConfigError
from sfumato.learned import Learned
from sfumato.objectives.denoising import Denoising, Loss
from sfumato.objectives.draws import noise_like, times_for
from sfumato.objectives.weights import Flat, Weight
from sfumato.paths import Path, Tabulated, along, noised, posterior, transition
from sfumato.predictions import Prediction
from sfumato.times import Uniform

STEPS = 1000  # of the reverse process, on paths that have no number of their own
EDGE = 0.999  # from here on a value is the last of its levels


@dataclass(frozen=True)
class Hybrid:
    """A weighted square error of the prediction, and the variational bound for the variance beside it.

    For models that answer "x0_variance" (`model.answers=[x0,x0_variance]`), on any path and prediction; what was
    learned is drawn with by the sampler {kind: ddpm, variance: learned}.
    weight, space: of the square error, as of `Denoising`. scale: of the bound in bits a dimension, summed over the
    steps; the paper's lambda. steps: of the reverse process, even in t: the table's own, or 1,000. levels: how many
    values a number of the data can have, evenly from -1 to 1 (pixels: 256), for the likelihood of the step to the data;
    None for latents, of which a density is taken.
    """

    weight: Weight = Flat()
    space: Prediction | None = None
    scale: float = 1e-3
    steps: int | None = None
    levels: int | None = 256

    def __post_init__(self) -> None:
        for name, value, least in (("steps", self.steps, 2), ("levels", self.levels, 2), ("scale", self.scale, 0)):
            if value is not None and value < least:
                raise ConfigError(f"{name} is at least {least}", where=f"objective.{name}", seen=f"{value:g}")

    def __call__(self, model: Denoiser, x0: Tensor, cond: Cond | None = None, rng: Generator | None = None) -> Loss:
        """x0: (B, ...). Steps and noise come from `rng` on the CPU, so they do not depend on the device."""
        self.check(model)
        n = self.count(model.path)
        i = (times_for(x0, Uniform(), model.path, rng) * n).ceil().long().clamp(1, n) - 1
        t = ((i + 1) / n).to(torch.promote_types(x0.dtype, torch.float32))
        eps = noise_like(x0, rng)
        x_t = noised(model.path, x0, eps, t).to(x0.dtype)
        said, share = model.outputs(x_t, t, cond)
        square = (said - model.prediction.target(model.path, x0, eps, t)).square().flatten(1).mean(1)
        simple = (Denoising(Uniform(), self.weight, self.space).factor(model, t) * square).mean()
        mean = model.prediction.x0(model.path, said.detach(), x_t, t)
        known = mean.flatten(1).isfinite().all(1)  # of pure noise the noise says nothing of x0, and of the step neither
        mean = torch.where(along(known, x0), mean, x0)
        bound = n * torch.where(known, self.bound(model.path, i, x0, mean, share), 0.0).mean()
        parts = {"simple": simple.detach(), "bound": bound.detach()}
        return Loss(simple + self.scale * bound, square.detach(), t, parts)

    def check(self, model: Denoiser) -> None:
        """ConfigError for a model that answers no variance, and for a schedule that is learned."""
        if VARIANCE not in model.answers:
            what, fix = "this objective teaches a variance", f"model.answers=[x0,{VARIANCE}], or objective=denoising"
            raise ConfigError(what, where="model.answers", seen=", ".join(model.answers), fix=fix)
        if isinstance(model.path, Learned):
            what, fix = "a learned schedule has a bound of its own", "objective=vdm"
            raise ConfigError(what, where="objective.kind", seen="hybrid", fix=fix)

    def count(self, path: Path) -> int:
        """How many steps the reverse process has."""
        return self.steps or (path.steps if isinstance(path, Tabulated) else STEPS)

    def bound(self, path: Path, i: Tensor, x0: Tensor, mean: Tensor, share: Tensor) -> Tensor:
        """The terms of the bound for steps i (B,) to i / n, in bits a dimension: (B,).

        The divergence of the model's step from the posterior, and for i = 0 the likelihood of the data. mean: the
        model's E[x0 | x_t]. share: -1 for the posterior's variance, 1 for the forward kernel's, logarithms between.
        """
        kind = torch.promote_types(x0.dtype, torch.float32)
        table = _table(cast(Hashable, path), self.count(path), x0.device, kind)[i]
        small, large, by = (along(column, x0) for column in table.unbind(1))
        log_var = (small + large) / 2 + share * (large - small) / 2
        apart = (by * (x0 - mean)) ** 2 * torch.exp(-log_var)
        divergence = (torch.exp(small - log_var) + apart - 1 - (small - log_var)) / 2
        nats = torch.where(along(i, x0) == 0, -self._likelihood(x0, mean, log_var), divergence)
        return nats.flatten(1).mean(1) / math.log(2)

    def _likelihood(self, x0: Tensor, mean: Tensor, log_var: Tensor) -> Tensor:
        """log p(x0) of the last step, each number alone."""
        if self.levels is None:
            return -((x0 - mean) ** 2 * torch.exp(-log_var) + log_var + math.log(2 * math.pi)) / 2
        half, narrow = 1 / (self.levels - 1), torch.exp(-log_var / 2)
        above, below = (x0 - mean + half) * narrow, (x0 - mean - half) * narrow
        inside = torch.special.ndtr(above) - torch.special.ndtr(below)
        # the logarithms of both ends are had without a difference, and so is that of what is far outside
        whole = torch.where(inside > 1e-6, inside, 1.0).log()
        far = -((x0 - mean) ** 2 * torch.exp(-log_var) + log_var + math.log(2 * math.pi)) / 2 + math.log(2 * half)
        whole = torch.where(inside > 1e-6, whole, far)
        ends = torch.where(x0 < -EDGE, torch.special.log_ndtr(above), torch.special.log_ndtr(-below))
        return torch.where(x0.abs() > EDGE, ends, whole)


@lru_cache(maxsize=16)
def _table(path: Any, n: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """For each of n steps of a path (n, 3): the log variances of the posterior and of the forward kernel, and what the
    mean moves by for a unit of x0. The posterior of the step to the data has none: the next one's is there.

    Made in float64, and moved to the device once: a step waits for no copy.
    """
    t = torch.arange(n + 1, dtype=torch.float64) / n
    small, large = posterior(path, t[:-1], t[1:]), transition(path, t[:-1], t[1:]).std
    std = torch.cat([small.std[1:2], small.std[1:]])
    return moved(torch.stack([2 * std.log(), 2 * large.log(), small.x0], 1).to(dtype), device)

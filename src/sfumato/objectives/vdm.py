"""The variational bound of a diffusion model in nats a dimension, and the schedule it teaches (Kingma et al. 2021).

-log p(x) is at most: what is lost between the data and the first noise level (reconstruction), what is left of the
data at the last (prior), and half the noise error per unit of log_snr between them. On a `Learned` path the ends follow
this bound. It does not depend on the shape between them, so the shape follows the variance of its estimate: the
gradient of the mean square of each sample's loss, which is had from the one backward pass by weighing with the loss.
"""

import copy
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from sfumato.denoiser import Cond, Denoiser
from sfumato.devices import moved
from sfumato.errors import ConfigError
from sfumato.learned import Learned
from sfumato.objectives.denoising import Denoising, Loss
from sfumato.objectives.draws import noise_like, times_for
from sfumato.objectives.weights import ELBO
from sfumato.paths import Path, noised
from sfumato.times import Stratified, Uniform

ELEMENTS = 64  # of a sample, whose reconstruction is looked at: it depends on little but the noise level


@dataclass(frozen=True)
class VDM:
    """The variational bound, for any path and prediction; on a `Learned` path it trains the schedule too.

    levels: how many values a number of the data can have, evenly from -1 to 1 (pixels: 256); None for data without
    levels, latents say, whose bound has no reconstruction term. low: the time of the first noise level, which is what
    the bound reconstructs from.
    """

    levels: int | None = 256
    low: float = 1e-3

    def __call__(self, model: Denoiser, x0: Tensor, cond: Cond | None = None, rng: Generator | None = None) -> Loss:
        """x0: (B, ...). Times and noise come from `rng` on the CPU, so they do not depend on the device."""
        path = model.path
        if isinstance(path, Learned) and path.learn_ends and self.levels is None:
            raise ConfigError(
                "without a reconstruction term nothing holds the ends of a schedule",
                where="model.path.learn_ends",
                seen="objective.levels=null",
                fix="model.path.learn_ends=false",
            )
        bound = Denoising(Stratified(Uniform(self.low)), ELBO())
        t = times_for(x0, bound.times, path, rng)
        eps = noise_like(x0, rng)
        weights: list[Tensor] = []
        if isinstance(path, Learned):
            rows = path.rows(t, x0, lambda gradient: gradient * weights[0])
            told = path.time(-rows.gamma.detach()) if path.by_data else t
            model = _on(model, rows)
        else:
            told = t
        x_t = noised(model.path, x0, eps, t).to(x0.dtype)
        said = model.predict(x_t, told, cond)
        each = (said - model.prediction.target(model.path, x0, eps, t)).square().flatten(1).mean(1)
        lost = bound.factor(model, t) * each
        weights.append((lost / lost.mean().clamp(min=1e-30)).detach())
        return Loss(lost.mean() + self.ends(path, x0, rng), each.detach(), t)

    def ends(self, path: Path, x0: Tensor, rng: Generator | None = None) -> Tensor:
        """The prior and the reconstruction term, (), in nats a dimension."""
        (alpha, last), (beginning, first) = _scales(path, 1.0, x0), _scales(path, self.low, x0)
        prior = _prior(alpha, last, x0)
        return prior if self.levels is None else prior + self._reconstruction(first / beginning, x0, rng)

    def _reconstruction(self, level: Tensor, x0: Tensor, rng: Generator | None) -> Tensor:
        """-log p(x0 | x0 with noise of the first level), over some elements of each sample."""
        assert self.levels is not None  # `ends` has checked
        flat = x0.flatten(1)
        some = flat[:, moved(torch.randperm(flat.shape[1], generator=rng)[:ELEMENTS], x0.device)]
        noise = noise_like(some, rng)
        values = torch.linspace(-1, 1, self.levels, dtype=x0.dtype, device=x0.device)
        which = ((some + 1) * (self.levels - 1) / 2).round().long().clamp(0, self.levels - 1)
        logits = -(((some + level * noise)[..., None] - values) / level).square() / 2
        return (logits.logsumexp(-1) - logits.gather(-1, which[..., None])[..., 0]).mean()


def _scales(path: Path, t: float, x0: Tensor) -> tuple[Tensor, Tensor]:
    """(alpha, sigma) at a time, (1,); of a learned path with gradients to its ends."""
    time = x0.new_full((1,), t)
    known = path.rows(time) if isinstance(path, Learned) else path
    return known.alpha(time), known.sigma(time)


def _prior(alpha: Tensor, sigma: Tensor, x0: Tensor) -> Tensor:
    """KL(q(x_1 | x0) || N(0, alpha^2 + sigma^2)), a dimension: where sampling begins."""
    signal, noise = alpha**2, sigma**2
    whole = signal + noise
    return (((noise + signal * x0.square().mean()) / whole - 1 - torch.log(noise / whole)) / 2).mean()


def _on(model: Denoiser, path: Path) -> Denoiser:
    """The same denoiser on another path: a shallow copy."""
    clone = copy.copy(model)
    vars(clone)["_modules"] = {name: one for name, one in model._modules.items() if name != "path"}
    clone.path = path
    return clone

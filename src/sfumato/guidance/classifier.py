"""Classifier guidance: the gradient of what a classifier makes of x_t (Dhariwal & Nichol 2021).

Bayes' rule adds the score of p(y | x_t) to that of p(x_t). By Tweedie's formula a change of the score by g is one of
x0 by sigma^2 / alpha g. The classifier must have been trained on noisy x_t; with any differentiable log p it is the
general way to condition a model on what it was never told.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sfumato.denoiser import Cond
from sfumato.errors import ConfigError
from sfumato.guidance.core import ALWAYS, Branch, FilledIn, Guidance, check_interval, scales, within
from sfumato.paths import Path

LogProb = Callable[[Tensor, Tensor, Cond], Tensor]  # x_t (B, ...), t (B,), cond -> log p(what is wanted | x_t) (B,)


@dataclass(frozen=True)
class Classifier:
    """x0 + (scale - 1) sigma^2 / alpha grad log p(y | x_t). No guidance at pure noise, where x_t tells nothing of y.

    log_prob: of what is wanted, given x_t (B, ...), t (B,) and the rows' condition; differentiable in x_t.
    scale: 1 is off; an unconditional model follows Bayes' rule at 2, the published weight 1.
    interval, of: noise levels (low, high] within which it is on; the guidance that it is added to.
    """

    cond: FilledIn[Cond] = field(default_factory=dict)
    log_prob: LogProb | None = None
    scale: float = 2.0
    interval: tuple[float, float | None] = ALWAYS
    of: Guidance | None = None

    def __post_init__(self) -> None:
        check_interval(self.interval)
        if self.log_prob is None:
            fix = "guidance.log_prob=mine:log_prob"
            raise ConfigError("classifier guidance needs a classifier", where="guidance.log_prob", fix=fix)

    def branches(self, path: Path, t: float) -> tuple[Branch, ...]:
        return (Branch(self.cond),) if self.of is None else self.of.branches(path, t)

    def combine(self, path: Path, x_t: Tensor, t: float, answers: Sequence[Tensor]) -> Tensor:
        x0 = answers[0] if self.of is None else self.of.combine(path, x_t, t, answers)
        alpha, sigma = scales(path, t)
        if self.scale == 1 or alpha == 0 or not within(self.interval, path, t):
            return x0
        return torch.add(x0, self._gradient(x_t, t), alpha=(self.scale - 1) * sigma**2 / alpha)

    def _gradient(self, x_t: Tensor, t: float) -> Tensor:
        """That of log p in x_t, whatever mode the caller samples in; a clone leaves inference mode."""
        assert self.log_prob is not None  # __post_init__ has checked
        with torch.inference_mode(False), torch.enable_grad():
            x = x_t.clone().detach().requires_grad_()
            times = x.new_full((len(x),), t, dtype=torch.promote_types(x.dtype, torch.float32)).detach()
            said = self.log_prob(x, times, {name: value.clone() for name, value in self.cond.items()})
            return torch.autograd.grad(said.sum(), x)[0]

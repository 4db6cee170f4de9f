"""Guidance is data with two pure functions: what to ask of the model at time t, and how to make one x0 of the answers.

Answered directly (`guided`) the branches of all pictures go through the network in one batch; under a server they
join everybody else's rows. Samplers never know. There is one public scale: 1 is off and gives the conditional answer,
bit for bit. Ho & Salimans' weight w, which LCM also uses, is scale - 1 and is converted by `from_weight`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from sfumato.denoiser import Bound, Cond, joined
from sfumato.errors import ConfigError
from sfumato.paths import Path
from sfumato.predictions import X0, Prediction

Forward = Callable[[Tensor, Tensor, Cond], Tensor]  # x_t (B, ...), t (B,), cond -> x0 (B, ...): a Denoiser is one


class Branch(NamedTuple):
    """One evaluation that guidance wants: under which condition, and on which variant of the network, if not itself."""

    cond: Cond
    variant: str | None = None


class Guidance(Protocol):
    """Which branches to evaluate at time t, and how to combine their answers into one x0."""

    def branches(self, path: Path, t: float) -> tuple[Branch, ...]: ...

    def combine(self, path: Path, x_t: Tensor, t: float, answers: Sequence[Tensor]) -> Tensor: ...


@dataclass(frozen=True)
class Unguided:
    """The conditional answer as it is."""

    cond: Cond

    def branches(self, path: Path, t: float) -> tuple[Branch, ...]:
        return (Branch(self.cond),)

    def combine(self, path: Path, x_t: Tensor, t: float, answers: Sequence[Tensor]) -> Tensor:
        return answers[0]


@dataclass(frozen=True)
class CFG:
    """Classifier-free guidance: null + scale (cond - null) (Ho & Salimans 2022, with scale = 1 + w).

    cond, null: the condition and its absence (or a negative prompt). scale: 1 is off.
    interval: noise levels sigma / alpha, (low, high], within which guidance is on (Kynkaanniemi et al. 2024); outside,
        the null branch is not even evaluated. Never a count of steps, so that it means the same on every grid.
    rescale: 0..1, how far to bring the standard deviation of the guided answer back to the conditional one's
        (Lin et al. 2023, section 3.4), measured in `space`: the published form measures it on V or EPS.
    """

    cond: Cond
    null: Cond
    scale: float
    interval: tuple[float, float] = (0.0, float("inf"))
    rescale: float = 0.0
    space: Prediction = X0

    def __post_init__(self) -> None:
        low, high = self.interval
        if not 0 <= low < high:
            raise ConfigError(
                "a guidance interval runs from a lower to a higher noise level",
                where="guidance.interval",
                seen=f"({low:g}, {high:g})",
            )
        if not 0 <= self.rescale <= 1:
            raise ConfigError(
                "guidance rescale lies between 0 and 1", where="guidance.rescale", seen=f"{self.rescale:g}"
            )

    def branches(self, path: Path, t: float) -> tuple[Branch, ...]:
        if self.scale == 1 or not self._within(path, t):
            return (Branch(self.cond),)
        return Branch(self.cond), Branch(self.null)

    def combine(self, path: Path, x_t: Tensor, t: float, answers: Sequence[Tensor]) -> Tensor:
        if len(answers) == 1:
            return answers[0]
        cond, null = answers
        guided = torch.lerp(null, cond, self.scale)
        return self._rescaled(path, x_t, t, guided, cond) if self.rescale else guided

    def _within(self, path: Path, t: float) -> bool:
        low, high = self.interval
        time = torch.tensor(t, dtype=torch.float64)
        alpha, sigma = float(path.alpha(time)), float(path.sigma(time))
        return low * alpha < sigma <= high * alpha if alpha > 0 else high == float("inf")

    def _rescaled(self, path: Path, x_t: Tensor, t: float, guided: Tensor, cond: Tensor) -> Tensor:
        time = torch.tensor(t, dtype=torch.float64)
        said = [self.space.answer(path, x0, x_t, time).to(x_t) for x0 in (guided, cond)]
        dims = tuple(range(1, x_t.ndim))
        ratio = said[1].std(dims, keepdim=True) / said[0].std(dims, keepdim=True)
        return self.space.x0(path, said[0] * torch.lerp(torch.ones_like(ratio), ratio, self.rescale), x_t, time).to(x_t)


def from_weight(weight: float) -> float:
    """The scale of a guidance weight in Ho & Salimans' and LCM's convention, where 0 is off."""
    return 1 + weight


def guided(forward: Forward, path: Path, guidance: Guidance) -> Bound:
    """A `Denoise` that answers all branches of a guidance with one batched forward."""

    def fn(x_t: Tensor, t: float | Tensor) -> Tensor:
        t = float(t)
        branches = guidance.branches(path, t)
        if any(branch.variant is not None for branch in branches):
            raise ConfigError("this model has no variants", where="guidance", seen=str([b.variant for b in branches]))
        cond = branches[0].cond if len(branches) == 1 else joined([branch.cond for branch in branches])
        rows = x_t if len(branches) == 1 else torch.cat([x_t] * len(branches))
        times = rows.new_full((len(rows),), t, dtype=torch.promote_types(rows.dtype, torch.float32))
        return guidance.combine(path, x_t, t, forward(rows, times, cond).chunk(len(branches)))

    return Bound(path, fn)

"""What may be done around any guidance: bringing its contrast back, keeping its numbers in range, limiting it in noise.

Each wraps another guidance (`of`) and adds no branches. Rescaling and thresholding answer the same complaint, that a
large scale burns colours: the guided x0 has more contrast than any picture.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sfumato.errors import ConfigError
from sfumato.guidance.core import (
    ALWAYS,
    Branch,
    Guidance,
    Unguided,
    check_interval,
    check_share,
    log_snr_interval,
    within,
)
from sfumato.paths import Path
from sfumato.predictions import X0, Prediction


@dataclass(frozen=True)
class Rescaled:
    """A guidance whose answer is brought back to the standard deviation of the conditional one (Lin et al. 2023, 3.4).

    by: 0..1, how far. space: the prediction that it is measured in; the published form measures it on V or EPS.
    """

    of: Guidance = field(default_factory=Unguided)
    by: float = 0.7
    space: Prediction = X0

    def __post_init__(self) -> None:
        check_share(self.by, "by", "guidance rescale")

    def branches(self, path: Path, t: float) -> tuple[Branch, ...]:
        return self.of.branches(path, t)

    def combine(self, path: Path, x_t: Tensor, t: float, answers: Sequence[Tensor]) -> Tensor:
        guided = self.of.combine(path, x_t, t, answers)
        if len(answers) == 1 or self.by == 0:
            return guided
        return rescaled(path, x_t, t, guided, answers[0], self.by, self.space)


def rescaled(
    path: Path, x_t: Tensor, t: float, guided: Tensor, cond: Tensor, by: float, space: Prediction = X0
) -> Tensor:
    """A guided x0 whose deviation, over all of a sample, is brought back to the conditional one's: by = 1 is wholly."""
    time = torch.tensor(t, dtype=torch.float64)
    said = [space.answer(path, x0, x_t, time).to(x_t) for x0 in (guided, cond)]
    dims = tuple(range(1, x_t.ndim))
    ratio = said[1].std(dims, keepdim=True) / said[0].std(dims, keepdim=True)
    return space.x0(path, said[0] * torch.lerp(torch.ones_like(ratio), ratio, by), x_t, time).to(x_t)


@dataclass(frozen=True)
class Thresholded:
    """Dynamic thresholding (Saharia et al. 2022, Imagen): x0 is cut at a quantile of its own, and divided by it.

    quantile: of |x0| over each sample. floor, most: what it is kept between; at the floor of 1 this is a plain cut to
    [-1, 1]. Only for models of pixels in [-1, 1]: latents have no such range.
    """

    of: Guidance = field(default_factory=Unguided)
    quantile: float = 0.995
    floor: float = 1.0
    most: float | None = None

    def __post_init__(self) -> None:
        check_share(self.quantile, "quantile", "a quantile")
        if not 0 < self.floor <= (self.floor if self.most is None else self.most):
            seen = f"{self.floor:g} to {self.most}"
            raise ConfigError("a threshold is above 0, and its floor below its most", where="guidance.floor", seen=seen)

    def branches(self, path: Path, t: float) -> tuple[Branch, ...]:
        return self.of.branches(path, t)

    def combine(self, path: Path, x_t: Tensor, t: float, answers: Sequence[Tensor]) -> Tensor:
        x0 = self.of.combine(path, x_t, t, answers)
        size = x0.abs().flatten(1).sort(1).values  # torch.quantile refuses large tensors
        place = self.quantile * (size.shape[1] - 1)
        low = int(place)
        cut = torch.lerp(size[:, low], size[:, min(low + 1, size.shape[1] - 1)], place - low)
        cut = cut.clamp(min=self.floor, max=self.most).reshape(-1, *(1,) * (x0.ndim - 1))
        return x0.clamp(-cut, cut) / cut


@dataclass(frozen=True)
class Within:
    """A guidance that is on only in an interval of noise; outside, only its first branch is evaluated.

    interval: noise levels sigma / alpha, (low, high]. log_snr: the same said otherwise, [low, high); not both.
    """

    of: Guidance = field(default_factory=Unguided)
    interval: tuple[float, float | None] = ALWAYS
    log_snr: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        if self.log_snr is not None and self.interval != ALWAYS:
            seen = f"{self.interval} and {self.log_snr}"
            raise ConfigError("an interval is said in one way", where="guidance.log_snr", seen=seen)
        if self.log_snr is not None:
            object.__setattr__(self, "interval", log_snr_interval(*self.log_snr))
            object.__setattr__(self, "log_snr", None)
        check_interval(self.interval)

    def branches(self, path: Path, t: float) -> tuple[Branch, ...]:
        branches = self.of.branches(path, t)
        return branches if within(self.interval, path, t) else branches[:1]

    def combine(self, path: Path, x_t: Tensor, t: float, answers: Sequence[Tensor]) -> Tensor:
        return self.of.combine(path, x_t, t, answers) if within(self.interval, path, t) else answers[0]

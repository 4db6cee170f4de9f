"""A path whose schedule is learned: gamma(t) = -log_snr by a monotone network (Kingma et al. 2021, appendix H).

sigma^2 = sigmoid(gamma) and alpha^2 = sigmoid(-gamma), between two ends that may be learned too. The variational bound
depends on the ends alone: inside, every shape has the same loss, and the best is the one whose loss has least variance
over time (`sfumato.objectives.vdm`). For the same reason the shape may depend on the data that are noised, as long as
the ends do not, and as long as the network is told the noise level and not the time.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sfumato.errors import ConfigError

FLAT = 0.01  # how fast gamma rises at least, relative to the mean: `time` must be able to find it


class Learned(nn.Module):
    """A variance-preserving path with weights. t = `first` has the least noise, and below it the path is a straight
    line of noise level to the data, where no loss looks.

    log_snr_max, log_snr_min: at `first` and at 1, to begin with. learn_ends: whether they move; only the bound of data
    with few values, as pixels have, tells where to. hidden: units of the network. by_data: the shape depends on three
    numbers of the data, their mean, spread and roughness; sampling follows the shape of average data.
    As a path it passes no gradients to its weights, which a plain denoising loss would only spoil; `rows` does.
    """

    def __init__(
        self,
        *,
        log_snr_max: float = 13.3,
        log_snr_min: float = -5.0,
        learn_ends: bool = False,
        hidden: int = 64,
        by_data: bool = False,
        first: float = 1e-3,
    ) -> None:
        super().__init__()
        if not (log_snr_min < log_snr_max and 0 < first < 1):
            seen = f"log_snr from {log_snr_max:g} to {log_snr_min:g}, first {first:g}"
            raise ConfigError("log_snr falls from its maximum, at a time between 0 and 1", where="path", seen=seen)
        self.first, self.learn_ends, self.by_data = first, learn_ends, by_data
        ends = torch.tensor([-log_snr_max, log_snr_max - log_snr_min])  # gamma at `first`, and how much it rises
        self.ends = nn.Parameter(ends, requires_grad=learn_ends)
        self.slope = nn.Parameter(torch.ones(1))  # all are vectors: optimizers treat matrices in ways of their own
        self.rate = nn.Parameter(4 * torch.randn(hidden))
        self.offset = nn.Parameter(4 * torch.rand(hidden) - 2)
        self.height = nn.Parameter(0.1 * torch.randn(hidden))
        self.features = nn.Parameter(torch.zeros(3 * hidden)) if by_data else None

    def alpha(self, t: Tensor) -> Tensor:
        return self._scales(t)[0]

    def sigma(self, t: Tensor) -> Tensor:
        return self._scales(t)[1]

    def rates(self, t: Tensor) -> tuple[Tensor, Tensor]:
        alpha, sigma = self._scales(t)
        gamma_rate = self.gamma(t)[1]
        level = self._first_level(t)
        return (
            torch.where(t < self.first, -t * level**2 * alpha**3, -alpha * sigma**2 * gamma_rate / 2),
            torch.where(t < self.first, level * alpha**3, sigma * alpha**2 * gamma_rate / 2),
        )

    def time(self, log_snr: Tensor) -> Tensor:
        """By bisection, without gradients."""
        wide = torch.float32 if log_snr.device.type == "mps" else torch.float64
        gamma = -log_snr.detach().to(wide)
        low, width = self._ends(gamma)
        share = (gamma - low) / width
        below, above = torch.full_like(gamma, self.first), torch.ones_like(gamma)
        for _ in range(55):
            middle = (below + above) / 2
            rising = self.interior(middle)[0] < share
            below, above = torch.where(rising, middle, below), torch.where(rising, above, middle)
        straight = self.first * torch.exp((gamma - low) / 2)
        return torch.where(share < 0, straight, (below + above) / 2).to(log_snr)

    def gamma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """-log_snr and its rate, from `first` on; earlier times are taken for `first`."""
        low, width = self._ends(t)
        u, rate = self.interior(t.clamp(min=self.first))
        return low + width * u, width * rate

    def interior(self, t: Tensor, data: Tensor | None = None, learn: bool = False) -> tuple[Tensor, Tensor]:
        """The shape, which rises from 0 at `first` to 1 at 1, and its rate.

        data: (B, ...) for times (B,). learn: whether gradients go to the weights.
        """
        about = None if data is None or self.features is None else self._about(data).to(t)
        start, end = (self._rising(t.new_full((1,), one), about, learn)[0] for one in (0.0, 1.0))
        here, rate = self._rising(((t - self.first) / (1 - self.first)).reshape(-1), about, learn)
        u, du = (here - start) / (end - start), rate / ((end - start) * (1 - self.first))
        return u.reshape(t.shape), du.reshape(t.shape)

    def rows(self, t: Tensor, data: Tensor | None = None, weigh: Callable[[Tensor], Tensor] | None = None) -> "Rows":
        """The path of a batch of data (B, ...) at its own times (B,), from `first` on, with gradients to the weights.

        weigh: a function that the gradients (B,) of the shape go through, on their way back to its weights.
        """
        low, width = self._ends(t, learn=True)
        u, du = self.interior(t, data, learn=True)
        for one in (u, du):
            if weigh is not None and one.requires_grad:
                one.register_hook(weigh)  # type: ignore[no-untyped-call]
        return Rows(low + width * u, width * du)

    def _rising(self, s: Tensor, about: Tensor | None, learn: bool) -> tuple[Tensor, Tensor]:
        """A rising function of s (N,) in 0..1, and its rate: a line and a sum of sigmoids of positive weight."""
        rate, height, offset, slope = (
            _weight(one, s, learn) for one in (self.rate, self.height, self.offset, self.slope)
        )
        rate, height, slope = 2 * rate.abs(), height.abs() / len(height), slope.abs() + FLAT
        inner = rate * (s[:, None] - 0.5) + offset
        if about is not None and self.features is not None:
            inner = inner + (about[:, :, None] * _weight(self.features, s, learn).reshape(3, -1)).sum(1)
        step = torch.sigmoid(inner)
        return slope * s + (height * step).sum(1), slope + (height * rate * step * (1 - step)).sum(1)

    def _about(self, data: Tensor) -> Tensor:
        """Mean, spread and roughness of each sample, (B, 3), about zero for usual pictures."""
        flat = data.detach().flatten(1).float()
        rough = flat.diff(dim=1).abs().sum(1) / flat.shape[1]
        return torch.stack([flat.mean(1), flat.std(1, unbiased=False) - 0.5, rough - 0.1], 1)

    def _ends(self, like: Tensor, learn: bool = False) -> tuple[Tensor, Tensor]:
        low, width = _weight(self.ends, like, learn).unbind()
        return low, width.abs()

    def _first_level(self, like: Tensor) -> Tensor:
        """The rate of sigma / alpha before `first`."""
        return torch.exp(self._ends(like)[0] / 2) / self.first

    def _scales(self, t: Tensor) -> tuple[Tensor, Tensor]:
        gamma, ratio = self.gamma(t)[0], t * self._first_level(t)
        small = torch.rsqrt(1 + ratio**2)
        inside = t >= self.first
        return (
            torch.where(inside, torch.sigmoid(-gamma).sqrt(), small),
            torch.where(inside, torch.sigmoid(gamma).sqrt(), ratio * small),
        )


def _weight(weight: Tensor, like: Tensor, learn: bool) -> Tensor:
    """A weight where, and as precise as, the times are."""
    return (weight if learn else weight.detach()).to(like)


@dataclass(frozen=True)
class Rows:
    """A path that is known at one time a row, whatever time it is asked for: gamma and its rate, (B,)."""

    gamma: Tensor
    gamma_rate: Tensor

    def alpha(self, t: Tensor) -> Tensor:
        return torch.sigmoid(-self.gamma).sqrt().reshape(t.shape)

    def sigma(self, t: Tensor) -> Tensor:
        return torch.sigmoid(self.gamma).sqrt().reshape(t.shape)

    def rates(self, t: Tensor) -> tuple[Tensor, Tensor]:
        alpha, sigma, rate = self.alpha(t), self.sigma(t), self.gamma_rate.reshape(t.shape)
        return -alpha * sigma**2 * rate / 2, sigma * alpha**2 * rate / 2

    def time(self, log_snr: Tensor) -> Tensor:
        raise ConfigError("a path that is known at one time has no inverse", where="path")

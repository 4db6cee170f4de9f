"""What samplers are made of: what they ask for, the step that a driver shows, the table of the schedule, the noise."""

import math
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from sfumato.devices import moved
from sfumato.errors import ConfigError
from sfumato.paths import Path

Noise = Callable[[Tensor], Tensor]  # standard normal noise like x (B, ...)


class Ask(NamedTuple):
    """A sampler's question: the model's answer at x (B, ...) and time t. `to` names what is needed, see `Denoise`, and
    `until` is where a "jump" ends.
    """

    x: Tensor
    t: float
    to: str = "x0"
    until: float | None = None


class Draw(NamedTuple):
    """A sampler's wish for chance: a state (B, ...), normal with this mean and standard deviation.

    std: a number, or where the model has a say in it a tensor that broadcasts to the mean.
    """

    mean: Tensor
    std: float | Tensor

    def log_density(self, x: Tensor) -> Tensor:
        """log p(x), a number for each sample (B,): of a `Step` that is the log-likelihood of what was drawn."""
        std = torch.as_tensor(self.std, dtype=x.dtype)
        each = -(((x - self.mean) / std) ** 2) / 2 - torch.log(std) - math.log(2 * math.pi) / 2
        return each.flatten(1).sum(1)


class Step(NamedTuple):
    """What a driver shows after each answer: the state at time t, and what the model takes the data to be.

    drawn: where x was drawn from, if it was: the mean and standard deviation that policy gradients need.
    """

    t: float
    x: Tensor
    x0: Tensor
    drawn: Draw | None = None


Running = Generator[Ask | Draw, Tensor, Tensor]
SamplerFn = Callable[..., Running]  # (path, x, times, *, options)


@dataclass(frozen=True)
class Table:
    """The schedule at each time of a grid, as plain floats made once in float64: a step never waits for a device.

    half_log_snr is log(alpha / sigma): minus infinity at pure noise, infinity at the data.
    """

    t: list[float]
    alpha: list[float]
    sigma: list[float]
    half_log_snr: list[float]

    @classmethod
    def of(cls, path: Path, times: Tensor) -> "Table":
        """times: (n + 1,), falling. Raises ConfigError if they do not fall or leave [0, 1]."""
        times = times.detach().to("cpu", torch.float64)
        if (
            times.ndim != 1
            or len(times) < 2
            or any(later >= t for t, later in pairwise(times.tolist()))
            or not 0 <= times.tolist()[-1] <= times.tolist()[0] <= 1
        ):
            raise ConfigError(
                "the times of a sampler must fall from at most 1 to at least 0, two of them or more",
                where="times",
                seen=str([round(v, 4) for v in times.flatten().tolist()[:8]]),
                fix="sfumato.times.linear(path, 20)",
            )
        alpha, sigma = path.alpha(times).tolist(), path.sigma(times).tolist()
        return cls(times.tolist(), alpha, sigma, [_half_log_snr(a, s) for a, s in zip(alpha, sigma, strict=True)])

    @property
    def steps(self) -> range:
        """The indices that a step starts from."""
        return range(len(self.t) - 1)


def _half_log_snr(alpha: float, sigma: float) -> float:
    if sigma <= 0:
        return math.inf
    return math.log(alpha / sigma) if alpha > 0 else -math.inf


class Move(NamedTuple):
    """A step as numbers: the next state is normal with mean x * state + x0 * answer and this standard deviation."""

    x: float
    x0: float
    std: float

    def mean(self, x: Tensor, x0: Tensor) -> Tensor:
        return torch.add(x * self.x, x0, alpha=self.x0)


def added_std(table: Table, i: int) -> float:
    """The standard deviation of the noise that the path adds from time i + 1 back to time i, given the state there."""
    scale = table.alpha[i] / table.alpha[i + 1]
    return math.sqrt(max(table.sigma[i] ** 2 - (scale * table.sigma[i + 1]) ** 2, 0.0))


def posterior_move(table: Table, i: int) -> Move:
    """q(x_s | x_t, x0) from time i to the next (Ho et al. 2020, eq. 6-7, on any path): its last is x0 itself."""
    scale, added = table.alpha[i] / table.alpha[i + 1], added_std(table, i)
    ratio = table.sigma[i + 1] / table.sigma[i]
    return Move(scale * ratio**2, table.alpha[i + 1] * (added / table.sigma[i]) ** 2, ratio * added)


def ddim_move(table: Table, i: int, fresh: float) -> Move:
    """DDIM from time i to the next with noise of standard deviation `fresh`, at most sigma, in place of the old."""
    kept = math.sqrt(max(table.sigma[i + 1] ** 2 - fresh**2, 0.0)) / table.sigma[i]
    return Move(kept, table.alpha[i + 1] - kept * table.alpha[i], fresh)


def check_clip(clip: float | None) -> None:
    """ConfigError for an x0 that is clipped to nothing."""
    if clip is not None and not clip > 0:
        raise ConfigError("x0 is clipped to a range around 0", where="sampler.clip", seen=f"{clip:g}", fix="clip=1")


def ddim_step(x: Tensor, x0: Tensor, table: Table, i: int, j: int) -> Tensor:
    """From time i to time j along the straight line that x0 and the noise of x span: exact if x0 were constant."""
    ratio = table.sigma[j] / table.sigma[i]
    return torch.add(x * ratio, x0, alpha=table.alpha[j] - ratio * table.alpha[i])


@dataclass(frozen=True)
class SeededNoise:
    """Noise in which each picture has its own generator, so that it depends on its seed and never on its batch-mates.

    Drawn on the CPU in float32 (float64 for float64 states) and moved, so that the device does not change it either.
    """

    generators: tuple[torch.Generator, ...]

    @classmethod
    def of(cls, seeds: Sequence[int]) -> "SeededNoise":
        return cls(tuple(torch.Generator().manual_seed(seed % 2**63) for seed in seeds))

    def __call__(self, like: Tensor) -> Tensor:
        """Standard normal, of the shape, dtype and device of `like`, whose batch must be one row a seed."""
        if len(like) != len(self.generators):
            raise ConfigError(
                "one seed a picture is needed",
                where="seeds",
                seen=f"{len(self.generators)} seeds for {len(like)} pictures",
            )
        dtype = torch.promote_types(like.dtype, torch.float32)
        rows = [torch.randn(like.shape[1:], generator=g, dtype=dtype) for g in self.generators]
        return moved(torch.stack(rows), like.device, like.dtype)

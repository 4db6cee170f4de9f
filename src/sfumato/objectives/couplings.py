"""Which noise belongs to which data: drawn apart, or paired so that the lines between them cross less.

Flow matching holds for any joint distribution of noise and data with the right marginals (Tong et al. 2023; Pooladian
et al. 2023): the network learns the mean velocity, and its flow carries the one to the other. Paired by optimal
transport within each batch, flows come out straighter and the loss varies less; with noise on the way, a Schroedinger
bridge. What is learned is a velocity still, and no longer the score, so such a model is sampled by its ODE only. And
the pairing of a batch does not know conditions: given one, the noise that training saw is not normal any more.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Generator, Tensor

from sfumato.devices import moved
from sfumato.errors import ConfigError, MachineError
from sfumato.objectives.draws import noise_like
from sfumato.paths import Linear, Path, along

INNER = 1e-4  # how near to either end of time a bridge's velocity is still finite


class Pair(NamedTuple):
    """Data and noise, (B, ...) each, for which x_t = alpha x0 + sigma eps, and every target follows from them."""

    x0: Tensor
    eps: Tensor


class Coupling(Protocol):
    """Data (B, ...), independent noise of its shape and times (B,) to the pairs that training interpolates."""

    def __call__(self, path: Path, x0: Tensor, eps: Tensor, t: Tensor, rng: Generator | None = None) -> Pair: ...


@dataclass(frozen=True)
class Independent:
    """As they were drawn: diffusion, and flow matching as first published."""

    def __call__(self, path: Path, x0: Tensor, eps: Tensor, t: Tensor, rng: Generator | None = None) -> Pair:
        return Pair(x0, eps)


@dataclass(frozen=True)
class OptimalTransport:
    """The pairing within a batch whose squared distances have the least sum, exactly (OT-CFM: Tong et al. 2023).

    The noise is permuted, so that every picture is seen once and conditions stay with their data. It takes n^3
    operations, so at most `chunk` rows are paired at a time. MachineError without scipy (the extra "ot").
    """

    chunk: int = 1024

    def __post_init__(self) -> None:
        _at_least_two(self.chunk)

    def __call__(self, path: Path, x0: Tensor, eps: Tensor, t: Tensor, rng: Generator | None = None) -> Pair:
        places = [assigned(a, b) for a, b in _chunks(x0, eps, self.chunk)]
        return Pair(x0, _taken(eps, places))


@dataclass(frozen=True)
class SchroedingerBridge:
    """SB-CFM (Tong et al. 2023): noise from the entropic plan, and a Brownian bridge of scale sigma between the two.

    The plan is exp(-|x0 - eps|^2 / 2 sigma^2) with its rows and columns scaled to 1 / n, found by Sinkhorn's iteration;
    each row draws its noise from it. On the way, x_t = (1 - t) x0 + t eps + sigma sqrt(t (1 - t)) z, and the velocity
    (eps - x0) + sigma (1 - 2 t) / (2 sqrt(t (1 - t))) z. That is the straight line between x0 + (sigma / 2) sqrt(t / (1
    - t)) z and eps + (sigma / 2) sqrt((1 - t) / t) z, which is what is given here; so the prediction should be the
    velocity, since those ends are far at the ends of time. ConfigError for other paths than the linear one.
    iterations: of Sinkhorn at most; tolerance: of the plan's column sums, relatively, at which it ends.
    """

    sigma: float = 1.0
    chunk: int = 1024
    iterations: int = 200
    tolerance: float = 1e-3

    def __post_init__(self) -> None:
        _at_least_two(self.chunk)
        if not (self.sigma > 0 and self.iterations >= 1 and self.tolerance > 0):
            seen = f"sigma={self.sigma:g}, iterations={self.iterations}, tolerance={self.tolerance:g}"
            raise ConfigError("a bridge has noise, and is looked for", where=WHERE, seen=seen, fix="sigma=1")

    def __call__(self, path: Path, x0: Tensor, eps: Tensor, t: Tensor, rng: Generator | None = None) -> Pair:
        if not isinstance(path, Linear):
            fix = "model.path=linear, or objective.coupling=optimal_transport"
            raise ConfigError("bridges are on the linear path", where=WHERE, seen=str(path), fix=fix)
        places = [self._drawn(a, b, rng) for a, b in _chunks(x0, eps, self.chunk)]
        z = noise_like(x0, rng)
        odds = along(t.clamp(INNER, 1 - INNER), x0)
        root, half = torch.sqrt(odds / (1 - odds)), self.sigma / 2
        return Pair((x0 + half * root * z).to(x0), (_taken(eps, places) + half / root * z).to(x0))

    def _drawn(self, x0: Tensor, eps: Tensor, rng: Generator | None) -> Tensor:
        cost = squared_distances(x0, eps)
        plan = sinkhorn(cost, 2 * self.sigma**2, self.iterations, self.tolerance)
        return torch.multinomial(plan, 1, generator=rng)[:, 0]


WHERE = "objective.coupling"


def squared_distances(x0: Tensor, eps: Tensor) -> Tensor:
    """|x0_i - eps_j|^2 over all elements: (n, n) float64 on the CPU. What is not finite is far from everything."""
    dtype = torch.promote_types(x0.dtype, torch.float32)
    rows, columns = (one.detach().flatten(1).to(dtype) for one in (x0, eps))
    with torch.autocast(x0.device.type, enabled=False):  # half precision would round away what is compared
        squares = rows.square().sum(1)[:, None] + columns.square().sum(1) - 2 * rows @ columns.T
    return squares.nan_to_num(1e30, 1e30).clamp(0, 1e30).to("cpu", torch.float64)


def assigned(x0: Tensor, eps: Tensor) -> Tensor:
    """The permutation p (n,) that makes sum_i |x0_i - eps_p(i)|^2 least."""
    try:
        from scipy.optimize import linear_sum_assignment  # type: ignore[import-untyped]
    except ImportError as error:
        fix = "pip install 'sfumato[ot]'"
        raise MachineError("optimal transport needs scipy", where=WHERE, seen=str(error), fix=fix) from None
    return torch.from_numpy(linear_sum_assignment(squared_distances(x0, eps).numpy())[1])


def sinkhorn(cost: Tensor, regularisation: float, iterations: int = 1000, tolerance: float = 1e-6) -> Tensor:
    """The plan (n, m) with even marginals that minimises <plan, cost> - regularisation * entropy (Cuturi 2013).

    In logarithms, so that no cost is too large for its exponential. Its rows sum to 1 / n exactly, its columns to 1 / m
    within the tolerance, relatively, if the iterations suffice.
    """
    n, m = cost.shape
    kernel = -cost / regularisation
    columns = kernel.new_zeros(m)
    for _ in range(iterations):
        rows = -torch.logsumexp(kernel + columns, 1, keepdim=True)
        sums = torch.logsumexp(kernel + columns + rows, 0)  # which should be log(n / m)
        if float((torch.exp(sums) * m / n - 1).abs().max()) <= tolerance:
            break
        columns = columns - sums
    return torch.softmax(kernel + columns, 1) / n


def _chunks(x0: Tensor, eps: Tensor, chunk: int) -> Iterator[tuple[Tensor, Tensor]]:
    return zip(torch.split(x0, chunk), torch.split(eps, chunk), strict=True)


def _taken(eps: Tensor, places: list[Tensor]) -> Tensor:
    """The rows of the noise at some places of each chunk."""
    parts = torch.split(eps, [len(one) for one in places])
    return torch.cat([part[moved(place, eps.device)] for part, place in zip(parts, places, strict=True)])


def _at_least_two(chunk: int) -> None:
    if chunk < 2:
        raise ConfigError("pairing takes two rows or more", where=f"{WHERE}.chunk", seen=str(chunk), fix="chunk=1024")

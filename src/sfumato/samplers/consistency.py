"""Few-step sampling with consistency models: jump to the data, draw back up to the next noise level, jump again.

A consistency model answers where the flow through x_t ends (Song et al. 2023, algorithm 1, any path; Luo et al. 2023,
algorithm 3, for latent ones), so its first jump is a sample already, and each further one mends it. It is asked for its
"endpoint", which an ordinary denoiser does not know: E[x0 | x_t] is a blur of all ends.
"""

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from sfumato.errors import ConfigError
from sfumato.paths import Path, Tabulated
from sfumato.samplers.core import Ask, Draw, Move, Running, Table, check_clip
from sfumato.samplers.plan import checked_choice

To = Literal["endpoint", "x0"]


def consistency(
    path: Path,
    x: Tensor,
    times: Tensor,
    *,
    eta: float = 1.0,
    sigma_min: float = 0.0,
    clip: float | None = None,
    to: To = "endpoint",
) -> Running:
    """Multistep consistency sampling. The last jump is the result.

    eta: how much of the noise is drawn anew: 1 is the paper's, 0 keeps the noise that x holds.
    sigma_min: the noise level (sigma / alpha) at which the model's jumps end, 0.002 for the published ones: what is
    drawn is that much less. clip: clamp ends to [-clip, clip], as the published models of pixels do.
    to: "x0" takes an ordinary denoiser's mean for the end.
    """
    check_clip(clip)
    if not 0 <= sigma_min < math.inf:
        raise ConfigError("jumps end at a noise level", where="sampler.sigma_min", seen=f"{sigma_min:g}", fix="0.002")
    table = Table.of(path, times)
    levels = [
        math.sqrt(max(sigma**2 - (alpha * sigma_min) ** 2, 0.0))
        for alpha, sigma in zip(table.alpha, table.sigma, strict=True)
    ]
    return (yield from _jumps(table, x, levels, eta, to, None, clip))


def lcm(
    path: Path, x: Tensor, times: Tensor, *, eta: float = 1.0, boundary: float = 0.0, to: To = "endpoint"
) -> Running:
    """Multistep sampling with latent consistency models. eta, to: as for `consistency`.

    boundary: 10 for the published weights with to="x0", 0 for none: the end is then (x + 2 s sqrt(4 s^2 + 1) x0) /
    (4 s^2 + 1), where s is `boundary` times the index in the table of betas, so that it is x itself at index 0.
    """
    table = Table.of(path, times)
    shares = _shares(path, table, boundary) if boundary else None
    return (yield from _jumps(table, x, table.sigma, eta, to, shares))


def _jumps(
    table: Table,
    x: Tensor,
    levels: Sequence[float],
    eta: float,
    to: To,
    shares: Sequence[tuple[float, float]] | None,
    clip: float | None = None,
) -> Running:
    """levels: the noise to be added to an end at each time. shares: how much of x and of the answer make an end."""
    checked_choice("to", to, ("endpoint", "x0"))
    if not 0 <= eta <= 1:
        raise ConfigError("eta is a share of the noise", where="sampler.eta", seen=f"{eta:g}", fix="eta=1")
    for i in table.steps:
        end = yield Ask(x, table.t[i], to)
        if shares is not None:
            end = torch.add(x * shares[i][0], end, alpha=shares[i][1])
        if clip is not None:
            end = end.clamp(-clip, clip)
        kept = levels[i + 1] * math.sqrt(1 - eta**2) / table.sigma[i]
        move = Move(kept, table.alpha[i + 1] - kept * table.alpha[i], levels[i + 1] * eta)
        x = move.mean(x, end)
        if move.std > 0:
            x = yield Draw(x, move.std)
    return x


def boundary_shares(path: Path, t: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """c_skip and c_out of latent consistency models, what counts of x and of the answer at times t in an end.

    They are of the index in a table of betas, times `scale`; the published code leaves out sigma_data, 1/2, once.
    ConfigError for a path that has no indices.
    """
    if not isinstance(path, Tabulated):
        raise ConfigError(
            "this boundary counts the indices of a table of betas",
            where="boundary",
            seen=f"path {path}",
            fix="boundary=0",
        )
    square = (scale * path.index(t)) ** 2
    return 0.25 / (square + 0.25), torch.sqrt(square / (square + 0.25))


def _shares(path: Path, table: Table, scale: float) -> list[tuple[float, float]]:
    skip, out = boundary_shares(path, torch.tensor(table.t, dtype=torch.float64), scale)
    return list(zip(skip.tolist(), out.tolist(), strict=True))

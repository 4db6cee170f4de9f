"""Reverse diffusion and predictor-corrector sampling (Song et al. 2021, section 4.2 and appendices E-G), on any path.

A predictor walks to the next noise level: reverse diffusion discretises the reverse SDE as the forward one is, here by
the path's exact kernel, x_t = scale x_s + std z. A corrector then takes steps of Langevin dynamics at that level,
x + e score + sqrt(2 e) z, which leave the marginal as it is and mend what the predictor did. Its step is the
paper's r: e = 2 (r |z| / |score|)^2, with |z| at its expected size, so that no picture depends on another.
"""

import math
from typing import Literal

import torch
from torch import Tensor

from sfumato.errors import ConfigError
from sfumato.paths import Path
from sfumato.samplers.core import Ask, Draw, Move, Running, Table, added_std, posterior_move
from sfumato.samplers.plan import checked_choice

Predictor = Literal["reverse_diffusion", "ancestral"]
Size = Literal["score", "level"]


def reverse_diffusion(path: Path, x: Tensor, times: Tensor) -> Running:
    """The predictor alone. The step to the data is x0 itself, without noise."""
    return (yield from predictor_corrector(path, x, times, corrections=0))


def predictor_corrector(
    path: Path,
    x: Tensor,
    times: Tensor,
    *,
    predictor: Predictor = "reverse_diffusion",
    corrections: int = 1,
    ratio: float = 0.16,
    size: Size = "score",
) -> Running:
    """A step of the predictor, then `corrections` of Langevin dynamics at the new level, none at the data.

    predictor: "ancestral" is DDPM's step. ratio: r, called the signal-to-noise ratio in the paper.
    size: of the corrector's step, from the norm of each picture's score, or from the noise level, whose reciprocal is
    about the score's: e = 2 (r sigma)^2.
    """
    checked_choice("predictor", predictor, ("reverse_diffusion", "ancestral"))
    checked_choice("size", size, ("score", "level"))
    if isinstance(corrections, bool) or corrections != int(corrections) or corrections < 0:
        raise ConfigError(
            "a predictor is followed by a number of corrections",
            where="sampler.corrections",
            seen=repr(corrections),
            fix="corrections=1",
        )
    if not 0 < ratio < math.inf:
        raise ConfigError("Langevin steps have a size", where="sampler.ratio", seen=f"{ratio:g}", fix="ratio=0.16")
    table = Table.of(path, times)
    for i in table.steps:
        x0 = yield Ask(x, table.t[i])
        move = _predicted(table, i, predictor)
        x = move.mean(x, x0)
        if move.std > 0:
            x = yield Draw(x, move.std)
        if table.sigma[i + 1] > 0:
            for _ in range(int(corrections)):
                x0 = yield Ask(x, table.t[i + 1])
                x = yield _corrected(x, x0, table, i + 1, ratio, size)
    return x


def _predicted(table: Table, i: int, predictor: Predictor) -> Move:
    """From time i to the next: the posterior where the kernel has no inverse (pure noise), and to the data."""
    scale, added = table.alpha[i] / table.alpha[i + 1], added_std(table, i)
    if predictor == "ancestral" or scale == 0 or table.sigma[i + 1] == 0:
        return posterior_move(table, i)
    share = (added / table.sigma[i]) ** 2
    return Move(2 - scale - share, share * table.alpha[i], added)


def _corrected(x: Tensor, x0: Tensor, table: Table, i: int, ratio: float, size: Size) -> Draw:
    """A step of Langevin dynamics at time i. The score is (alpha x0 - x) / sigma^2."""
    alpha, sigma = table.alpha[i], table.sigma[i]
    towards = torch.add(-x, x0, alpha=alpha)  # sigma^2 score
    if size == "level":
        step = 2 * (ratio * sigma) ** 2
        return Draw(torch.add(x, towards, alpha=step / sigma**2), math.sqrt(2 * step))
    norm = torch.linalg.vector_norm(towards.flatten(1), dim=1).clamp(min=1e-12)  # (B,)
    root = ratio * math.sqrt(2 * towards[0].numel()) * sigma**2 / norm.reshape(-1, *(1,) * (x.ndim - 1))
    return Draw(torch.addcmul(x, towards, root**2 / sigma**2), math.sqrt(2) * root)

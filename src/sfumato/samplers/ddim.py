"""DDIM and its kin: first-order steps of the probability-flow ODE, with any share of DDPM's noise, and backwards.

DDIM (Song et al. 2021, eq. 12) keeps x0-hat and eps-hat of the current state and moves to the next noise level. On
every path it is Euler's method in sigma / alpha (see `euler`); Euler in t agrees with it on the linear path only.
"""

import torch
from torch import Tensor

from sfumato.errors import ConfigError
from sfumato.paths import Path
from sfumato.samplers.core import Ask, Draw, Running, Table, check_clip, ddim_move, ddim_step


def ddim(
    path: Path, x: Tensor, times: Tensor, *, eta: float = 0.0, clip: float | None = None, clipped_noise: bool = False
) -> Running:
    """eta = 0 is deterministic; eta = 1 is DDPM's ancestral step with the posterior's variance, on any grid.

    clip: clamp x0 to [-clip, clip], as pixel models do; never for latents. clipped_noise: the noise then is what is in
    x beside the clamped x0 (ADM's code), and not what the model took for it (diffusers').
    """
    if not 0 <= eta <= 1:
        raise ConfigError(
            "DDIM's eta lies between 0 and 1",
            where="sampler.eta",
            seen=f"{eta:g}",
            fix="eta=0 (deterministic) or eta=1 (ancestral)",
        )
    check_clip(clip)
    table = Table.of(path, times)
    for i in table.steps:
        answer = x0 = yield Ask(x, table.t[i])
        if clip is not None:
            x0 = x0.clamp(-clip, clip)
            answer = x0 if clipped_noise else answer
        fresh = eta * posterior_std(table, i)
        # with noise, what is left of the old keeps the variance at sigma^2
        mean = ddim_step(x, answer, table, i, i + 1) if fresh == 0 else ddim_move(table, i, fresh).mean(x, answer)
        if answer is not x0:
            mean = torch.add(mean, x0 - answer, alpha=table.alpha[i + 1])
        x = mean if fresh == 0 else (yield Draw(mean, fresh))
    return x


def initial_noise(path: Path, x: Tensor, times: Tensor) -> Running:
    """For straight flows in few steps: x_s = alpha x0 + sigma z with the noise z of the start, not the current one.

    After rectification (Liu et al. 2022) a trajectory keeps its noise, so an error in one answer moves the next state
    by alpha times itself and is then forgotten (Lee et al. 2024). z is the noise in the first answer: x / sigma at pure
    noise. This is no solver: where flows are curved, more steps do not bring it to the ODE's solution.
    """
    table = Table.of(path, times)
    z: Tensor | None = None
    for i in table.steps:
        x0 = yield Ask(x, table.t[i])
        if z is None:
            z = torch.add(x, x0, alpha=-table.alpha[i]) / table.sigma[i]
        x = torch.add(x0 * table.alpha[i + 1], z, alpha=table.sigma[i + 1])
    return x


def ddim_inversion(path: Path, x: Tensor, times: Tensor, *, refine: int = 0) -> Running:
    """DDIM backwards: from x at the last of `times`, usually the data, to the noise at the first.

    Walks the grid that sampling walks down, and takes the noise at the lower end of each step for that at the upper
    one, which is of first order; where the lower end is the data, where nothing can be asked, the noise is asked at the
    upper one, of the data without noise. refine: how often to ask again at the upper end, at the state found so far (a
    call each): this converges to what DDIM takes back to x exactly, where steps are short enough to converge at all
    (Pan et al. 2023). Guidance makes steps long; invert at scale 1.
    """
    if refine < 0:
        raise ConfigError("a step is refined 0 times or more", where="sampler.refine", seen=str(refine), fix="refine=0")
    table = Table.of(path, times)
    alpha, sigma = table.alpha, table.sigma
    for i in reversed(table.steps):
        low, high = i + 1, i
        keep = alpha[high] / alpha[low]
        new = sigma[high] - keep * sigma[low]  # how much noise the step adds
        base = x * keep
        again = refine if alpha[high] > 0 else 0
        if sigma[low] > 0:
            x0 = yield Ask(x, table.t[low])
            x = torch.add(base, torch.add(x, x0, alpha=-alpha[low]), alpha=new / sigma[low])
        else:
            x, again = base, again + 1
        for _ in range(again):
            x0 = yield Ask(x, table.t[high])
            x = torch.add(base, torch.add(x, x0, alpha=-alpha[high]), alpha=new / sigma[high])
    return x


def posterior_std(table: Table, i: int) -> float:
    """The standard deviation of x_s given x_t and x0, from time i to the next."""
    scale = table.alpha[i] / table.alpha[i + 1]
    added = max(table.sigma[i] ** 2 - (scale * table.sigma[i + 1]) ** 2, 0.0)
    return float(table.sigma[i + 1] * added**0.5 / table.sigma[i])

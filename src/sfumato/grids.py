"""Grids: the times that a sampler walks, n + 1 of them for n steps, falling from `start` (1, the noise) to the data.

Float64 on the CPU; the last step always lands on the data, t = 0, and no sampler asks anything there. Grids stated in
noise level (sigma / alpha) become times by the path, and grids that count the indices of a table of betas count those
of a table of 1000 where the path has none, so every grid works on every path, zero terminal SNR included.
Published names mean different grids in different libraries; here each has a name of its own (see `sfumato.names`).
"""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from sfumato.errors import ConfigError
from sfumato.paths import Linear, Path, Tabulated, log_snr
from sfumato.quantiles import beta_quantile

Grid = Callable[..., Tensor]  # (path, n, **options) -> (n + 1,) float64, strictly falling, ending in 0

STEPS = 1000  # of the table that indices are counted in, on a path without one
SIGMA_MIN, SIGMA_MAX = 0.002, 80.0  # EDM's noise levels, for paths whose own are 0 and infinite
NARROW, WIDE, FEW, ENOUGH = 1.15, 1.5, 12, 20  # of `fitted`: spreads, and the steps up to and from which they hold
LEAST, MANY = 0.01, 50  # of `fitted`: the last noise level on a path without a table, and the steps it holds for

AYS = {  # Sabour et al. 2024: indices in Stable Diffusion's table, noise levels for the video model; n + 1 for 10 steps
    "sd15": (999, 850, 736, 645, 545, 455, 343, 233, 124, 24, 0),
    "sdxl": (999, 845, 730, 587, 443, 310, 193, 116, 53, 13, 0),
    "svd": (700.0, 54.5, 15.886, 7.977, 4.248, 1.789, 0.981, 0.403, 0.173, 0.034, 0.002),
}


def linear(path: Path, n: int, *, start: float = 1.0) -> Tensor:
    """Even in t."""
    return torch.linspace(start, 0, n + 1, dtype=torch.float64)


# Indices of a table of betas


def trailing(path: Path, n: int, *, start: float = 1.0) -> Tensor:
    """Indices counted back from the end of the table: starts at pure noise (Lin et al. 2023, table 2)."""
    steps, tabulated = _steps(path, n, start)
    indices = steps - torch.arange(n, dtype=torch.float64) * (steps / n)
    return _at_indices(path, (indices.round() if tabulated else indices) - 1)


def leading(path: Path, n: int, *, offset: int = 0, spare: bool = False, start: float = 1.0) -> Tensor:
    """Every (steps // n)-th index counted from the data, plus `offset` (Stable Diffusion: 1): never visits the end.

    spare: every (steps // (n + 1))-th without the last, the one at the data: diffusers' multistep solvers.
    """
    steps, tabulated = _steps(path, n, start)
    stride = steps // (n + spare) if tabulated else steps / (n + spare)
    indices = (torch.arange(n, dtype=torch.float64) + spare) * stride + offset
    if tabulated and (stride == 0 or float(indices[-1]) > steps - 1):
        seen = f"{n} steps of {stride:g} indices, offset {offset}, in a table of {steps}"
        raise ConfigError("this grid does not fit into the table", where="grid.offset", seen=seen, fix="grid=trailing")
    return _at_indices(path, indices.clamp(max=steps - 1).flip(0))


def lcm(path: Path, n: int, *, of: int = 50, start: float = 1.0) -> Tensor:
    """Some of the indices of the `trailing` grid of `of` steps that a latent consistency model was distilled on.

    They lie even among those, counted from the noise (Luo et al. 2023, appendix).
    """
    if n > of:
        raise ConfigError(
            "more steps than this model was distilled on", where="steps", seen=f"{n} of {of}", fix=f"{of}"
        )
    picked = [i * of // n for i in range(n)]
    times = trailing(path, of, start=start)
    return torch.cat([times[picked], times[-1:]])


def linspace(path: Path, n: int, *, spare: bool = False, start: float = 1.0) -> Tensor:
    """Indices even from the last to the first, both included.

    spare: even over n + 1 without the last, the one at the data: diffusers' multistep solvers, ComfyUI's sgm_uniform.
    """
    steps, tabulated = _steps(path, n, start)
    indices = torch.linspace(0, steps - 1, n + spare, dtype=torch.float64).flip(0)[:n]
    if n + spare == 1:
        indices = torch.full_like(indices, steps - 1)  # others begin a single step at the data
    return _at_indices(path, indices.round() if tabulated else indices)


def beta_time(path: Path, n: int, *, alpha: float = 0.6, beta: float = 0.6, start: float = 1.0) -> Tensor:
    """Indices at the quantiles of a beta distribution, dense at both ends (Lee et al. 2024, as ComfyUI has it).

    Where ComfyUI rounds, and drops the steps that fall together, all n are kept here.
    """
    steps, _ = _steps(path, n, start)
    u = 1 - torch.arange(n, dtype=torch.float64) / n
    return _at_indices(path, beta_quantile(u, alpha, beta) * (steps - 1))


# Noise levels


def karras(
    path: Path,
    n: int,
    *,
    start: float = 1.0,
    sigma_min: float | None = None,
    sigma_max: float | None = None,
    rho: float = 7.0,
) -> Tensor:
    """Karras et al. 2022, eq. 5: the noise level even in its rho-th root, then 0.

    sigma_min, sigma_max: kept within the path's own range, which is what is taken where they are not given; a path
    that has no end is taken from 0.002 to 80.
    """
    high, low = _range(path, start, sigma_min, sigma_max)
    return _to_data(path, (high ** (1 / rho) + _even(n) * (low ** (1 / rho) - high ** (1 / rho))) ** rho, start)


def consistency(
    path: Path,
    n: int,
    *,
    of: int = 40,
    levels: Sequence[int] | None = None,
    sigma_min: float = SIGMA_MIN,
    sigma_max: float = SIGMA_MAX,
    rho: float = 7.0,
    start: float = 1.0,
) -> Tensor:
    """Some of the `of` noise levels, both ends included, that a consistency model learned to jump from, then 0.

    They are those of `karras` (Song et al. 2023), every (of // n)th of them from the noise. levels: their numbers,
    rising from 0, the noise, if others are better: [0, 22] for the published model of ImageNet in two steps.
    """
    picked = [i * (of // n) for i in range(n)] if levels is None else list(levels)
    if len(picked) != n or any(b <= a for a, b in pairwise([-1, *picked, of])):
        seen = f"{n} steps, levels {picked[:8]} of {of}"
        fix = f"steps={len(picked)}" if levels is not None else f"steps={of} or fewer"
        raise ConfigError("this grid has no such steps", where="grid.levels", seen=seen, fix=fix)
    even = torch.tensor(picked, dtype=torch.float64) / max(of - 1, 1)
    high, low = sigma_max ** (1 / rho), sigma_min ** (1 / rho)
    top = math.exp(_log_level(path, start))
    return _to_data(path, ((high + even * (low - high)) ** rho).clamp(max=top), start)


def polyexponential(
    path: Path,
    n: int,
    *,
    start: float = 1.0,
    sigma_min: float | None = None,
    sigma_max: float | None = None,
    rho: float = 1.0,
) -> Tensor:
    """The logarithm of the noise level falls as (1 - u)^rho, then 0: more of the steps at low noise for rho > 1.

    rho = 1 is k-diffusion's "exponential", which is even in log_snr. sigma_min, sigma_max: as for `karras`.
    """
    high, low = _range(path, start, sigma_min, sigma_max)
    return _to_data(path, torch.exp(math.log(low) + (1 - _even(n)) ** rho * math.log(high / low)), start)


def uniform_log_snr(
    path: Path, n: int, *, start: float = 1.0, sigma_min: float | None = None, sigma_max: float | None = None
) -> Tensor:
    """Even in log_snr (DPM-Solver's "logSNR" grid), then 0. sigma_min, sigma_max: as for `karras`."""
    return polyexponential(path, n, start=start, sigma_min=sigma_min, sigma_max=sigma_max)


def kl_optimal(
    path: Path, n: int, *, start: float = 1.0, sigma_min: float | None = None, sigma_max: float | None = None
) -> Tensor:
    """The angle atan(sigma / alpha) even, then 0: best in KL for Gaussian data of unit variance (Sabour et al. 2024).

    sigma_min, sigma_max: as for `karras`.
    """
    high, low = (math.atan(level) for level in _range(path, start, sigma_min, sigma_max))
    return _to_data(path, torch.tan(high + _even(n) * (low - high)), start)


def beta_sigma(
    path: Path,
    n: int,
    *,
    start: float = 1.0,
    sigma_min: float | None = None,
    sigma_max: float | None = None,
    alpha: float = 0.6,
    beta: float = 0.6,
) -> Tensor:
    """Noise levels at the quantiles of a beta distribution, then 0 (Lee et al. 2024, as diffusers has it).

    sigma_min, sigma_max: as for `karras`.
    """
    high, low = _range(path, start, sigma_min, sigma_max)
    return _to_data(path, low + (high - low) * beta_quantile(1 - _even(n), alpha, beta), start)


def ays(path: Path, n: int, *, start: float = 1.0, model: Literal["sd15", "sdxl", "svd"] = "sd15") -> Tensor:
    """Align Your Steps (Sabour et al. 2024): grids optimised for a model at 10 steps, log-linear between for others."""
    known = torch.tensor(AYS[model], dtype=torch.float64)
    if model != "svd":
        table = Tabulated("scaled_linear")
        known = torch.exp(-log_snr(table, table.at(known)) / 2)
    known = torch.log(known)
    top = min(_log_level(path, start), float(known[0]))
    if top <= float(known[-1]):
        seen = f"sigma / alpha of {math.exp(top):.4g} at t = {start:g}"
        raise ConfigError("this start has less noise than the end of this grid", where="grid", seen=seen, fix="karras")
    i = int((known[1:] >= top).sum())  # the segment that `top` lies in
    first = i + float((known[i] - top) / (known[i] - known[i + 1]))
    place = torch.linspace(first, len(known) - 1, n + 1, dtype=torch.float64)[:-1]
    i_ = place.long().clamp(max=len(known) - 2)
    return _to_data(path, torch.exp(torch.lerp(known[i_], known[i_ + 1], place - i_)), start)


def logistic(path: Path, n: int, *, level: float = 0.6, spread: float = 1.3, start: float = 1.0) -> Tensor:
    """log(sigma / alpha) at even quantiles of a logistic distribution: dense around `level`, sparse towards both ends.

    Trajectories bend most where the noise is about as strong as the data's details, and are nearly straight at both
    ends. level = spread = 1 is the linear path's own even grid, on any path; smaller levels suit data of smaller
    variance, larger spreads take more steps to both ends.
    """
    top = torch.sigmoid(torch.tensor((_log_level(path, start) - math.log(level)) / spread, dtype=torch.float64))
    inner = torch.logit(torch.linspace(float(top), 0, n + 1, dtype=torch.float64)[1:-1])
    times = path.time(-2 * (math.log(level) + spread * inner))
    return torch.cat([times.new_tensor([start]), times, times.new_zeros(1)])


def fitted(
    path: Path,
    n: int,
    *,
    pixels: int = 64,
    level: float = 0.59,
    spread: float | None = None,
    least: float | None = None,
    start: float = 1.0,
) -> Tensor:
    """`logistic`, fitted to the size of the picture and to the number of steps. The default grid.

    The centre is `level` for 8x8 and grows with the square root of the side, as larger pictures keep their shapes under
    more noise. The spread is 1.15 up to 12 steps and rises evenly to 1.5 at 20: a few steps are needed in the middle,
    where trajectories bend, and only many can also be spent on the ends. The last noise level is the centre's times
    e^(-n / 2), but not below `least`, under which a trained network has seen nothing: the table's own, 0.01 on other
    paths. Only past 50 steps does it fall on, as 1 / n^2, so that errors vanish where answers are exact.
    pixels: of what is diffused, height times width; a pipeline tells them where nothing is said.
    """
    if least is None:
        least = math.exp(_log_level(path, 1 / path.steps)) if isinstance(path, Tabulated) else LEAST
    if spread is None:
        spread = NARROW + (WIDE - NARROW) * min(max((n - FEW) / (ENOUGH - FEW), 0.0), 1.0)
    centre = level * (pixels / 64) ** 0.25
    top = _log_level(path, start)
    last = max(min(math.log(centre), top) - n / 2, math.log(least * min(1.0, MANY / n) ** 2))
    ends = torch.tensor([top, min(last, top - 0.5)], dtype=torch.float64)
    high, low = torch.sigmoid((ends - math.log(centre)) / spread).tolist()
    inner = torch.logit(torch.linspace(high, low, n, dtype=torch.float64)[1:])
    times = path.time(-2 * (math.log(centre) + spread * inner))
    return torch.cat([times.new_tensor([start]), times, times.new_zeros(1)])


def explicit(path: Path, n: int, *, times: Sequence[float], start: float = 1.0) -> Tensor:
    """These times, n + 1 of them: what was tuned for a model, or tried by hand."""
    if len(times) != n + 1:
        raise ConfigError(
            "this grid is for another number of steps",
            where="steps",
            seen=f"{n} steps, {len(times)} times",
            fix=f"steps={len(times) - 1}",
        )
    given = torch.tensor(times, dtype=torch.float64)
    return given if start == 1 else torch.cat([given.new_tensor([start]), given[given < start]])


# Shifts, for pictures larger than those the schedule was made for


def shifted(
    path: Path,
    n: int,
    *,
    by: float = 3.0,
    of: Grid = linear,
    compat: Literal["sd3"] | None = None,
    start: float = 1.0,
) -> Tensor:
    """A grid with the resolution shift (Esser et al. 2024, eq. 23): more of the steps at high noise for by > 1.

    of: the grid that is shifted. compat: "sd3" is the published grid of SD3 and of diffusers, whose smallest noise
    level is shifted twice: 0.0089 and not 0.003 for by = 3.
    """
    if compat == "sd3":
        if not isinstance(path, Linear):
            raise ConfigError("SD3's grid is for the linear path", where="grid.compat", seen=f"path {path}")
        last = min(1 / STEPS, start)
        even = start + _even(n) * (by * last / (1 + (by - 1) * last) - start)
        times = torch.cat([even, even.new_zeros(1)])
    else:
        times = of(path, n, start=start)
    return _strict(shift(path, times, by), by)


def dynamic_shift(
    path: Path,
    n: int,
    *,
    tokens: int | None = None,
    fewest: int = 256,
    most: int = 4096,
    low: float = 0.5,
    high: float = 1.15,
    form: Literal["exponential", "linear"] = "exponential",
    terminal: float | None = None,
    of: Grid = linear,
    start: float = 1.0,
) -> Tensor:
    """FLUX's shift, which grows with the picture: by e^mu, and mu rises in a line with the number of tokens.

    tokens: of the picture, (height / 16) (width / 16) for FLUX; a pipeline tells them where nothing is said. mu is
    `low` at `fewest` tokens and `high` at `most`.
    form: "linear" shifts by mu itself. terminal: the last time before the data, to which the grid is stretched.
    """
    if tokens is None or tokens < 1:
        raise ConfigError(
            "this grid depends on the number of tokens of a picture",
            where="grid.tokens",
            seen=repr(tokens),
            fix="grid.tokens=4096, that of FLUX at 1024x1024",
        )
    mu = low + (high - low) * (tokens - fewest) / (most - fewest)
    by = math.exp(mu) if form == "exponential" else mu
    times = _strict(shift(path, of(path, n, start=start), by), by)
    if terminal is None or n == 1:
        return times
    return torch.cat([1 - (1 - times[:-1]) * (1 - terminal) / (1 - times[-2]), times[-1:]])


def shift(path: Path, t: Tensor, by: float) -> Tensor:
    """Multiply sigma / alpha by `by`: log_snr falls by 2 ln(by). On the linear path t' = by t / (1 + (by - 1) t)."""
    if isinstance(path, Linear):
        return by * t / (1 + (by - 1) * t)
    return path.time(log_snr(path, t) - 2 * math.log(by)).clamp(0, 1)


def ending(path: Path, n: int, *, at: float, of: Grid = linear, start: float = 1.0) -> Tensor:
    """A grid that ends at a time before the data: to hand over to another model, or to stop at a table's first index.

    The only grid whose result is no picture but a state, x at time `at`. Steps of `of` that lie past it are an error.
    """
    times = torch.cat([of(path, n, start=start)[:-1], torch.tensor([at], dtype=torch.float64)])
    if bool((times.diff() >= 0).any()):
        raise ConfigError("a grid has steps past its own end", where="grid.at", seen=f"{at:g}", fix="a smaller grid.at")
    return times


def _strict(times: Tensor, by: float) -> Tensor:
    if bool((times.diff() >= 0).any()):
        raise ConfigError(
            f"a shift of {by:g} pushes several steps past the end of this path",
            where="grid.by",
            fix="use a smaller shift, or a path that reaches pure noise",
        )
    return times


def _even(n: int) -> Tensor:
    """n numbers from 0 to 1, both included; 0 alone for one."""
    return torch.linspace(0, 1, n, dtype=torch.float64)


def _log_level(path: Path, t: float) -> float:
    """log(sigma / alpha): infinite at pure noise."""
    return -float(log_snr(path, torch.tensor(t, dtype=torch.float64))) / 2


def _range(path: Path, start: float, sigma_min: float | None, sigma_max: float | None) -> tuple[float, float]:
    """The noise levels a grid runs between: what was asked for, within what the path has at `start`.

    The smallest that a network of a table has seen is that of index 0, and there is no use in asking it for less.
    """
    level = math.exp(_log_level(path, start))
    if sigma_max is None:
        sigma_max = level if level < math.inf else SIGMA_MAX
    if sigma_min is None:
        sigma_min = math.exp(_log_level(path, 1 / path.steps)) if isinstance(path, Tabulated) else SIGMA_MIN
    high = min(sigma_max, level)
    return high, min(sigma_min, high / 2)


def _to_data(path: Path, levels: Tensor, start: float) -> Tensor:
    """Noise levels, falling, as times, with 0 after them."""
    times = path.time(-2 * torch.log(levels)).clamp(max=start)
    return torch.cat([times, times.new_zeros(1)])


def _steps(path: Path, n: int, start: float) -> tuple[int, bool]:
    """How many indices there are up to `start`, and whether they are a table's own, which are whole numbers."""
    tabulated = isinstance(path, Tabulated)
    steps = round(start * (path.steps if isinstance(path, Tabulated) else STEPS))
    if n < 1 or (tabulated and n > steps):
        raise ConfigError(f"a table of {steps} has no grid of {n} steps", where="steps", fix=f"1 to {steps}")
    return steps, tabulated


def _at_indices(path: Path, indices: Tensor) -> Tensor:
    """The times of indices, falling, with 0 after them."""
    times = path.at(indices) if isinstance(path, Tabulated) else (indices + 1) / STEPS
    return torch.cat([times, indices.new_zeros(1)])

"""DDPM's ancestral sampler: draw x_s from the posterior q(x_s | x_t, x0) with the model's x0 in place of the data.

Ho et al. 2020, algorithm 2, on any path and any sub-grid. The variance is the posterior's ("small", the optimum for
data that is one point) or the forward kernel's ("large", the optimum for data that is itself standard normal).
"""

from typing import Literal

import torch
from torch import Tensor

from sfumato.errors import ConfigError
from sfumato.paths import Path
from sfumato.samplers.core import Ask, Noise, Running, Table
from sfumato.samplers.ddim import posterior_std


def ddpm(
    path: Path,
    x: Tensor,
    times: Tensor,
    noise: Noise = torch.randn_like,
    *,
    variance: Literal["small", "large"] = "small",
    clip: float | None = None,
) -> Running:
    """clip: clamp x0 to [-clip, clip] before the mean is formed, as pixel models do; never for latents."""
    if variance not in ("small", "large"):
        raise ConfigError(
            f"DDPM has no variance {variance!r}", where="sampler.variance", fix="variance=small or variance=large"
        )
    table = Table.of(path, times)
    alpha, sigma = table.alpha, table.sigma
    for i in table.steps:
        x0 = yield Ask(x, table.t[i])
        if clip is not None:
            x0 = x0.clamp(-clip, clip)
        scale = alpha[i] / alpha[i + 1]
        added = max(sigma[i] ** 2 - (scale * sigma[i + 1]) ** 2, 0.0)
        mean_x, mean_x0 = scale * (sigma[i + 1] / sigma[i]) ** 2, alpha[i + 1] * added / sigma[i] ** 2
        x = torch.add(x * mean_x, x0, alpha=mean_x0)
        if sigma[i + 1] > 0:  # the last step is the mean itself
            x = torch.add(x, noise(x), alpha=posterior_std(table, i) if variance == "small" else added**0.5)
    return x

"""Euler's method with ancestral noise: step down past the next noise level, then draw back up to it.

k-diffusion has it for the variance-exploding path, which every path is in x / alpha and sigma / alpha. In x itself that
rescales what the fresh noise is added to: on the linear path the signal must fall as the noise is put back. So eta = 1
is the posterior's step, and thus DDPM's, on all paths.
"""

from torch import Tensor

from sfumato.errors import ConfigError
from sfumato.paths import Path
from sfumato.samplers.core import Ask, Draw, Running, Table, ddim_move, posterior_move


def euler_ancestral(path: Path, x: Tensor, times: Tensor, *, eta: float = 1.0, noise: float = 1.0) -> Running:
    """eta: fresh noise in units of the posterior's; 0 is Euler in sigma / alpha, and so DDIM; more than 1 is allowed,
    up to where all of the old noise is replaced. noise: a factor on what is drawn, for models that underestimate it.
    """
    for name, value in (("eta", eta), ("noise", noise)):
        if not value >= 0:
            raise ConfigError(f"{name} is not negative", where=f"sampler.{name}", seen=f"{value:g}", fix=f"{name}=1")
    table = Table.of(path, times)
    for i in table.steps:
        x0 = yield Ask(x, table.t[i])
        move = ddim_move(table, i, min(eta * posterior_move(table, i).std, table.sigma[i + 1]))
        x = move.mean(x, x0)
        if move.std * noise > 0:
            x = yield Draw(x, move.std * noise)
    return x

"""What samplers are worth, measured: order of convergence, error at equal calls, calls, and cost outside the network.

On data whose ODE is known (`sfumato.exact`) an error is a distance to the truth, not to a longer run of the method.
The order is the slope of the error between two step sizes, over a range of noise levels that leaves out the ends, where
half log_snr is infinite; errors at equal calls go all the way, from pure noise to the data, on the default grid.
"""

import contextlib
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from sfumato.catalogue import PATHS, SAMPLERS, Sampler, build
from sfumato.denoiser import Denoise
from sfumato.errors import ConfigError
from sfumato.exact import three_modes
from sfumato.grids import logistic
from sfumato.paths import Path
from sfumato.registry import options_of
from sfumato.samplers.core import Ask, Draw
from sfumato.samplers.drive import drive

CALLS = (5, 8, 10, 15, 20, 30, 50)
STEPS = (80, 160)  # between which the order is measured
RANGE = (-3.0, 3.0)  # of half log_snr
WAITS = ("_local_scalar_dense", "item", "_to_copy")


@dataclass
class Row:
    """What was measured of one sampler. error: by calls, the median; None where there is nothing to measure."""

    nominal: int | None
    calls_per_step: float
    order: dict[str, float | None] = field(default_factory=dict)
    error: dict[str, dict[str, float]] = field(default_factory=dict)
    overhead_us: float = 0.0
    operations: float = 0.0
    syncs: int = 0

    def as_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


def samplers(
    names: Sequence[str] | None = None,
    own: str | None = None,
    *,
    paths: Sequence[str] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Row]:
    """The rows of some samplers, by default all; `own` is the user's, "module:function".

    ConfigError for unknown names.
    """
    chosen: dict[str, Sampler] = {}
    for name in names or ([own] if own else list(SAMPLERS)):
        if name not in SAMPLERS and name != own:
            raise ConfigError("no such sampler", where="--samplers", seen=name, fix=", ".join(SAMPLERS))
        chosen[name] = SAMPLERS.get(name) or Sampler(str(own), order=0)
    found = {}
    for i, (name, line) in enumerate(chosen.items()):
        found[name] = measured(line, paths or list(PATHS), own=name == own)
        if progress is not None:
            progress(i + 1, len(chosen))
    return found


def path_named(name: str) -> Path:
    """A path as it is built by default; one with weights as they are first drawn, in float64, with room for `RANGE`."""
    if name != "learned":
        path: Path = build(name, "Path")
        return path
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        learned = build({"kind": name, "log_snr_min": 4 * RANGE[0]}, "Path")
    return learned.double()  # type: ignore[no-any-return]


def measured(line: Sampler, paths: Sequence[str], *, own: bool = False) -> Row:
    """Everything about one sampler."""
    row = Row(None if own or line.stochastic or line.order == 0 else line.order, line.calls)
    usual = line.asks == "x0" and not (line.stochastic or line.inverse or line.adaptive)
    for name in paths:
        path = path_named(name)
        row.order[name] = order_of(line, path) if usual and (line.order or own) else None
        if usual:
            row.error[name] = errors(line, path)
    row.overhead_us, row.operations, row.syncs = overhead(line)
    return row


def order_of(line: Sampler, path: Path) -> float | None:
    """The slope of the largest error over 64 starts between 80 and 160 steps; None at the rounding error."""
    data, level = three_modes(), torch.linspace(*RANGE, 2, dtype=torch.float64)
    t, s = (float(v) for v in path.time(2 * level))
    x = float(path.sigma(torch.tensor(t, dtype=torch.float64))) * torch.linspace(-2.5, 2.5, 64, dtype=torch.float64)
    x = x[:, None]
    truth = data.flow(path, x, t, s)
    found = []
    for n in STEPS:
        times = path.time(2 * torch.linspace(*RANGE, n + 1, dtype=torch.float64))
        with torch.no_grad():
            end = drive(_started(line)(path, x, times), data.denoiser(path))
        found.append(float((end - truth).abs().max()))
    return round(math.log2(found[0] / found[1]), 3) if found[1] > 1e-13 else None


def errors(line: Sampler, path: Path) -> dict[str, float]:
    """The median error from pure noise to the data, for each number of calls."""
    data = three_modes()
    top = float(path.sigma(torch.ones((), dtype=torch.float64)))
    x = top * torch.linspace(-2.5, 2.5, 64, dtype=torch.float64)[:, None]
    truth = data.flow(path, x, 1.0, 0.0)
    found = {}
    for calls in CALLS:
        n = max(1, calls // line.calls)
        with torch.no_grad():
            end = drive(line.fn(path, x, logistic(path, n)), data.denoiser(path))
        found[str(calls)] = float((end - truth).abs().median())
    return found


def on_model(
    denoise: Denoise, noise: Tensor, names: Sequence[str], *, reference_steps: int = 1000
) -> dict[str, dict[str, float]]:
    """On a trained model: each sampler's median distance to the model's own solution by very many steps, by calls."""
    path = denoise.path
    with torch.no_grad():
        truth = drive(SAMPLERS["ipndm"].fn(path, noise, logistic(path, reference_steps)), denoise)
        rows: dict[str, dict[str, float]] = {}
        for name in names:
            line = SAMPLERS[name]
            rows[name] = {}
            for calls in CALLS:
                end = drive(line.fn(path, noise, logistic(path, max(1, calls // line.calls))), denoise)
                rows[name][str(calls)] = float((end - truth).flatten(1).square().mean(1).sqrt().median())
    return rows


class Counting(TorchDispatchMode):
    """Counts tensor operations, and those that wait for a device."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = self.waits = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        name = func.overloadpacket.__name__
        self.operations += name not in ("detach", "view", "alias", "expand", "slice", "chunk", "split")
        schedule = all(one.dtype == torch.float64 for one in args if isinstance(one, Tensor))  # on the CPU, always
        self.waits += name in WAITS and not schedule
        return func(*args, **(kwargs or {}))


def overhead(line: Sampler, steps: int = 30, rounds: int = 5) -> tuple[float, float, int]:
    """What a sampler's step costs, see `cost`: batch 1, 4x64x64, on the default grid."""
    path = build("linear" if not line.inverse else "variance_preserving", "Path")
    x, answer = torch.randn(1, 4, 64, 64), torch.randn(1, 4, 64, 64)
    times = logistic(path, steps)
    return cost(lambda: line.fn(path, x, times), answer, steps, rounds)


def cost(make: Callable[[], Any], answer: Tensor, steps: int, rounds: int = 1) -> tuple[float, float, int]:
    """Microseconds of CPU time a step (the least of the rounds, with the table of the schedule), tensor operations a
    step and waits in the whole run, of a sampler that is answered at once.
    """
    best = math.inf
    for _ in range(rounds):
        started = time.process_time()
        _through(make(), answer)
        best = min(best, time.process_time() - started)
    counting = Counting()
    _through(make(), answer, counting)
    return round(best / steps * 1e6, 2), round(counting.operations / steps, 2), counting.waits


def _through(running: Any, answer: Tensor, counting: Counting | None = None) -> None:
    """A sampler's whole run, every question answered by the same tensor at once.

    counting: from the first answer on, since the table of the schedule, made before, is on the CPU.
    """
    asked: Ask | Draw = next(running)
    twice = torch.cat([answer, answer], 1)
    with counting or contextlib.nullcontext(), contextlib.suppress(StopIteration):
        while True:
            both = isinstance(asked, Ask) and asked.to == "x0_variance"
            asked = running.send(twice if both else answer)


def _started(line: Sampler) -> Callable[..., Any]:
    """The sampler with a start that does not cap its order, where it has such an option."""
    known = options_of(line.target) or {}
    if "start" in known and line.order >= 3:
        return lambda *a: line.fn(*a, start="runge_kutta")
    return line.fn  # type: ignore[no-any-return]

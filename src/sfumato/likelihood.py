"""The exact likelihood of a model, by the flow that carries its data to noise.

Along the probability-flow ODE dx/dt = v(x, t) the log density changes by d log p = -div v dt (the instantaneous change
of variables: Chen et al. 2018; Song et al. 2021, section 4.3). So log p(x0) is that of the noise where the flow from
x0 ends, plus the integral of the divergence on the way. In the terms of a denoiser v = slope (x0-hat + mix x), see
`sfumato.samplers.frames`, and all that is asked for is the trace of d x0-hat / dx: exactly, one column at a time, or
with Hutchinson's estimate z . (d x0-hat / dx) z over signs z, which is unbiased.
"""

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Generator, Tensor

from sfumato.denoiser import Denoise
from sfumato.devices import moved
from sfumato.errors import ConfigError, DataError
from sfumato.paths import Path
from sfumato.samplers.frames import Frame, resolved, time_at
from sfumato.samplers.runge_kutta import DORMAND_PRINCE, RK4, Tableau

LEVEL = 1e-3  # sigma / alpha where the flow begins: nothing can be asked at the data itself


class Likelihood(NamedTuple):
    """log_p (B,): the log density of each sample, in nats, float64. noise (B, ...): where its flow ends. calls: how
    often the model was asked.
    """

    log_p: Tensor
    noise: Tensor
    calls: int


@dataclass(frozen=True)
class Adaptive:
    """Dormand and Prince's method: the error of a step, as of the sampler `dopri5`, is within the tolerances."""

    rtol: float = 1e-5
    atol: float = 1e-5
    max_steps: int = 1000

    def __post_init__(self) -> None:
        if not (self.rtol > 0 and self.atol > 0 and self.max_steps >= 1):
            seen = f"rtol={self.rtol:g}, atol={self.atol:g}, max_steps={self.max_steps}"
            raise ConfigError("tolerances are above 0, and so are steps", where="solver", seen=seen, fix="rtol=1e-5")


@dataclass(frozen=True)
class Fixed:
    """The classical method of fourth order on a grid of so many steps, even in the angle: four calls each."""

    steps: int = 50

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ConfigError("at least one step is needed", where="solver.steps", seen=str(self.steps), fix="steps=50")


def log_likelihood(
    denoise: Denoise,
    x0: Tensor,
    *,
    probes: int | Literal["exact"] = "exact",
    solver: Adaptive | Fixed | None = None,
    level: float = LEVEL,
    rng: Generator | None = None,
) -> Likelihood:
    """log p(x0) of samples (B, ...) under the flow of a model that answers "x0", bound to its conditions.

    probes: "exact" takes as many backward passes a call as a sample has elements; a number is that of Hutchinson's
    random signs, drawn once for the whole flow from `rng`. solver: `Adaptive` by default, whose worst sample decides
    for its batch. level: the noise sigma / alpha at which the flow begins. What lies before moves x0 by its square (by
    itself, where noise was paired with data), but there a network's errors count most. At the other end the noise is
    taken for normal, of variance alpha^2 + sigma^2, which is exact where alpha is 0. The model is asked in the type of
    x0; the state is float64, where the device has it. ConfigError for a model of another answer, DataError if an answer
    is not finite.
    """
    if "x0" not in denoise.answers:
        seen = f"a model that answers {', '.join(denoise.answers)}"
        raise ConfigError("only a model of E[x0 | x_t] has a flow to follow", where="likelihood", seen=seen)
    with torch.inference_mode(False), torch.no_grad():
        return _followed(_Flow(denoise, x0, _signs(x0, probes, rng)), x0, level, solver or Adaptive())


def _followed(flow: "_Flow", x0: Tensor, level: float, solver: Adaptive | Fixed) -> Likelihood:
    path = flow.path
    low, high = _ends(path, level)
    x, gained = flow.solved(low, high, solver)
    spread = float(path.alpha(high) ** 2 + path.sigma(high) ** 2)
    square = x.square().flatten(1).sum(1) / spread
    elements = x0[0].numel()
    prior = -(square + elements * math.log(2 * math.pi * spread)) / 2
    return Likelihood(
        (prior + gained + elements * torch.log(path.alpha(low)).to(x.device)).cpu().double(), x, flow.calls
    )


def bits_per_dim(log_p: Tensor, elements: int, cell: float = 1 / 127.5) -> Tensor:
    """Bits a dimension from nats of uniformly dequantised data, whose levels are `cell` apart: pixels in [-1, 1].

    With noise that fills the cell of each value, it is above the bits of the discrete data (Theis et al. 2016).
    """
    return -(log_p / elements + math.log(cell)) / math.log(2)


def bits_through_noise(log_p: Tensor, x0: Tensor, noisy: Tensor, level: float, cell: float = 1 / 127.5) -> Tensor:
    """An upper bound of the bits a dimension of discrete data x0 (B, ...), levels `cell` apart from -1 to 1, by way of
    noisy = x0 + level * normal noise, whose log density is log_p (B,) nats.

    -log P(x0) <= -E[log p(noisy) + log P(x0 | noisy) - log q(noisy | x0)], as in variational diffusion models (Kingma
    et al. 2021, eq. 11), with the decoder P(x0 | noisy): a normal around what is noisy, in cells, the outer ones open.
    The flow begins where the noise is, so nothing below this level is asked of the network.
    """
    x0, noisy = x0.double().cpu(), noisy.double().cpu()
    above = torch.where(x0 > 1 - cell / 2, torch.inf, (x0 + cell / 2 - noisy) / level)
    below = torch.where(x0 < -1 + cell / 2, -torch.inf, (x0 - cell / 2 - noisy) / level)
    decoded = torch.log((torch.special.ndtr(above) - torch.special.ndtr(below)).clamp(min=1e-300))
    drawn = -(((noisy - x0) / level) ** 2) / 2 - math.log(level * math.sqrt(2 * math.pi))
    each = (decoded - drawn).flatten(1).mean(1)
    return -(log_p / x0[0].numel() + each) / math.log(2)


def dequantised(x: Tensor, rng: Generator | None = None, cell: float = 1 / 127.5) -> Tensor:
    """Pixels in [-1, 1] with noise that is even over the cell around each value, which is then what is there."""
    noise = torch.rand(x.shape, generator=rng, dtype=torch.promote_types(x.dtype, torch.float32))
    return x + (cell * (noise - 0.5)).to(x)


def _signs(x0: Tensor, probes: int | Literal["exact"], rng: Generator | None) -> Tensor | None:
    if probes == "exact":
        return None
    if probes < 1:
        raise ConfigError("at least one probe is needed", where="probes", seen=str(probes), fix="probes=1")
    drawn = torch.randint(2, (probes, *x0.shape), generator=rng, dtype=torch.int8)
    return moved(2 * drawn - 1, x0.device, x0.dtype)


def _ends(path: Path, level: float) -> tuple[Tensor, Tensor]:
    """The times between which the flow is followed, float64."""
    high = torch.ones((), dtype=torch.float64)
    most = float(path.sigma(high)) / max(float(path.alpha(high)), 1e-300)
    if not 0 < level < most:
        seen = f"{level:g}; the noise goes to {most:g}"
        raise ConfigError("the flow begins at a noise level of the path", where="level", seen=seen, fix="level=0.001")
    least = float(path.sigma(0 * high)) / float(path.alpha(0 * high))  # of a path that never reaches the data
    return path.time(torch.tensor(-2 * math.log(max(level, least)), dtype=torch.float64)), high


class _Flow:
    """The ODE of a state and its log density, in the variable that suits the path; counts its calls.

    signs: the probes (P, B, ...), or None for the exact trace.
    """

    def __init__(self, denoise: Denoise, x0: Tensor, signs: Tensor | None) -> None:
        self.denoise, self.x0, self.signs = denoise, x0, signs
        self.path, self.variable = denoise.path, resolved(denoise.path, "auto")
        self.elements, self.calls = x0[0].numel(), 0
        self.wide = torch.float32 if x0.device.type == "mps" else torch.float64

    def solved(self, low: Tensor, high: Tensor, solver: Adaptive | Fixed) -> tuple[Tensor, Tensor]:
        """Where the flow from x0 ends, and the integral of its divergence: log p(x at low) - log p(x at high)."""
        ends = Frame.of(self.path, torch.stack([low, high]), self.variable)
        (start, goal), (scale, last) = ends.tau.tolist(), ends.scale.tolist()
        y = self.x0.to(self.wide) * float(self.path.alpha(low)) / scale
        state = (y, y.new_zeros(len(y)))
        if isinstance(solver, Fixed):
            h = (goal - start) / solver.steps
            for i in range(solver.steps):
                state, _, _ = self._step(state, start + i * h, h, RK4, (), float(high))
        else:
            state = self._adapted(state, start, goal, solver, float(high))
        y, gained = state
        return y * last, gained + self.elements * math.log(last / scale)

    def _adapted(
        self, state: tuple[Tensor, Tensor], here: float, goal: float, solver: Adaptive, high: float
    ) -> tuple[Tensor, Tensor]:
        h, known = (goal - here) / 100, tuple[tuple[Tensor, Tensor], ...]()
        for _ in range(solver.max_steps):
            ends = h >= (goal - here) * (1 - 1e-12)
            h = goal - here if ends else h
            new, terms, wrong = self._step(state, here, h, DORMAND_PRINCE, known, high)
            error = _error(state, new, wrong, solver)
            growth = 0.9 * max(error, 1e-10) ** (-1 / 5)
            if error <= 1:
                if ends:
                    return new
                state, here, known = new, here + h, (terms[-1],)
                h *= min(growth, 5.0)
            else:
                h, known = h * max(growth, 0.1), (terms[0],)
        raise ConfigError(
            "the tolerances are too tight for the steps allowed",
            where="solver.max_steps",
            seen=f"{here / goal:.1%} of the way after {solver.max_steps} steps",
            fix="rtol=1e-4 atol=1e-4",
        )

    def _step(
        self,
        state: tuple[Tensor, Tensor],
        here: float,
        h: float,
        tableau: Tableau,
        known: tuple[tuple[Tensor, Tensor], ...],
        high: float,
    ) -> tuple[tuple[Tensor, Tensor], list[tuple[Tensor, Tensor]], tuple[Tensor, Tensor]]:
        """One step of length h: the state, its terms, and its error where the method estimates one."""
        terms = list(known)
        for node, row in list(zip(tableau.nodes, tableau.rows, strict=True))[len(known) :]:
            terms.append(self._slope(_moved(state, h, row, terms)[0], here + node * h, high))
        zero = (torch.zeros_like(state[0]), torch.zeros_like(state[1]))
        return _moved(state, h, tableau.weights, terms), terms, _moved(zero, h, tableau.error, terms)

    def _slope(self, y: Tensor, tau: float, high: float) -> tuple[Tensor, Tensor]:
        """dy/dtau, and its divergence."""
        self.calls += 1
        t = min(float(time_at(self.path, torch.tensor(tau, dtype=torch.float64), self.variable)), high)
        frame = Frame.of(self.path, torch.tensor(t, dtype=torch.float64), self.variable)
        scale, slope, mix = float(frame.scale), float(frame.slope), float(frame.mix)
        x = (y * scale).to(self.x0.dtype).requires_grad_()
        with torch.enable_grad():
            said = self.denoise(x, t)
        if not bool(said.detach().isfinite().all()):
            raise DataError("the model's answers are not finite numbers", where="likelihood", seen=f"t = {t:.4g}")
        trace = self._trace(said, x)
        rate = slope * (said.detach().to(self.wide) + mix * y * scale)
        return rate, slope * scale * (trace + mix * self.elements)

    def _trace(self, said: Tensor, x: Tensor) -> Tensor:
        """The trace of d said / dx, (B,). Samples do not meet, so one backward pass serves all rows."""
        total = torch.zeros(len(x), dtype=self.wide, device=x.device)
        if not said.requires_grad:
            return total  # an answer that does not depend on the state

        def through(vector: Tensor, *, more: bool) -> Tensor:
            (found,) = torch.autograd.grad(said, x, vector.to(said), retain_graph=more)
            return found.to(self.wide)

        if self.signs is not None:
            for i, sign in enumerate(self.signs):
                found = through(sign, more=i + 1 < len(self.signs))
                total += (found * sign).flatten(1).sum(1) / len(self.signs)
            return total
        for i in range(self.elements):
            column = torch.zeros_like(said).flatten(1)
            column[:, i] = 1
            total += through(column.reshape(said.shape), more=i + 1 < self.elements).flatten(1)[:, i]
        return total


def _moved(
    state: tuple[Tensor, Tensor], h: float, row: tuple[float, ...], terms: list[tuple[Tensor, Tensor]]
) -> tuple[Tensor, Tensor]:
    """The state moved along its terms."""
    y, gained = state
    for weight, (rate, divergence) in zip(row, terms, strict=False):
        if weight != 0:
            y, gained = y + h * weight * rate, gained + h * weight * divergence
    return y, gained


def _error(old: tuple[Tensor, Tensor], new: tuple[Tensor, Tensor], wrong: tuple[Tensor, Tensor], by: Adaptive) -> float:
    """The error of a step in tolerances: of the state as the root mean square of a sample, of its log density a
    dimension; the worst sample counts.
    """
    each = new[0][0].numel()
    share = wrong[0] / (by.atol + by.rtol * torch.maximum(old[0].abs(), new[0].abs()))
    moved = share.square().flatten(1).mean(1).sqrt()
    gained = wrong[1].abs() / each / (by.atol + by.rtol * torch.maximum(old[1].abs(), new[1].abs()) / each)
    return float(torch.maximum(moved, gained).max())

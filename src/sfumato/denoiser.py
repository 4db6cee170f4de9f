"""Denoisers: E[x0 | x_t], the one thing that samplers, guidance and objectives share.

A network, the path it was trained on, and what it predicts make a `Denoiser`. How the network is told the time, and
how its input is scaled, belong to the network's history and so are two functions here. By Tweedie's formula
E[x0 | x_t] carries everything: the score is (alpha x0 - x_t) / sigma^2, the noise (x_t - alpha x0) / sigma.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from sfumato.errors import ConfigError
from sfumato.paths import Path, Tabulated, along, log_snr
from sfumato.predictions import Prediction

MASK = "context_mask"  # which vectors of a "context" count
CONCAT = "concat"  # maps (B, C', h, w) that stand beside x_t in the network's input
VARIANCE = "x0_variance"  # the answer that holds more than x0
JUMP = "jump"  # the answer about two times
FAR = 10_000.0  # what stands for an infinite time input

Cond = Mapping[str, Tensor]  # the network's keyword arguments; every tensor has the batch first
OfTime = Callable[[Path, Tensor], Tensor]


class Denoise(Protocol):
    """All that a sampler's driver needs: x0-hat(x_t, t), and the path x_t is on.

    answers: what it can be asked for. A plain call gives the first, `to` asks for another by its name:
        "x0" the posterior mean E[x0 | x_t] (B, C, ...);
        "x0_variance" the same and the network's C channels of a learned variance (B, 2 C, ...), see `samplers.ddpm`;
        "endpoint" where the flow through x_t ends at t = 0, which is what a consistency model has learned (B, C, ...);
        "jump" an average over the way to the time `until` (at most t), a float or one a row: the x0 for which DDIM's
        straight step from t to `until` lands on the flow through x_t (B, C, ...). On the linear path it is x_t - t u,
        where u is MeanFlow's average velocity. It is the posterior mean for until = t, and the endpoint for until = 0:
        who answers "jump" answers "x0" and "endpoint" by it.
    """

    @property
    def path(self) -> Path: ...

    @property
    def answers(self) -> tuple[str, ...]: ...

    def __call__(self, x_t: Tensor, t: float | Tensor, /, **asked: Any) -> Tensor:
        """asked: `to`, and with "jump" `until`."""
        ...


@dataclass(frozen=True)
class Bound:
    """A `Denoise` made of a function: a model with its condition filled in, or an exact solution in a test.

    fn: takes `to` as a keyword if it has more than one answer, and `until` if "jump" is one.
    """

    path: Path
    fn: Callable[..., Tensor]
    answers: tuple[str, ...] = ("x0",)

    def __call__(self, x_t: Tensor, t: float | Tensor, /, **asked: Any) -> Tensor:
        return self.fn(x_t, t, **asked)


class Denoiser(nn.Module):
    """A network, the path it learns on, and what it predicts.

    time_input: what the network is given for t (B,), see `TIME_INPUTS`. scale_input: a factor on x_t, see
    `SCALE_INPUTS`. Inputs are (B, ...); times are a float, () or (B,), in [0, 1].
    answers: what it was trained to be asked for, see `Denoise`. With "x0_variance" among them the network gives twice
    the channels of x_t: its prediction, and the share of the log variance of each step (Nichol & Dhariwal 2021).
    With "jump" among them the network is told `until` as one more time, and "x0" and "endpoint" are answered too; alone
    or first, it leaves a plain call to be for "x0". ConfigError where the network is told no such number.
    """

    def __init__(
        self,
        net: nn.Module,
        path: Path,
        prediction: Prediction,
        time_input: OfTime | None = None,
        scale_input: OfTime | None = None,
        answers: Sequence[str] = ("x0",),
    ) -> None:
        super().__init__()
        self.net, self.path, self.prediction = net, path, prediction
        self.time_input, self.scale_input = time_input or as_time, scale_input
        self.answers = answered(answers)
        numbers = getattr(getattr(net, "config", None), "told", None)
        if JUMP in self.answers and numbers is not None and "until" not in numbers:
            what = "a network that is asked for jumps must be told where they end"
            raise ConfigError(what, where="model.net.told", seen=str(list(numbers)), fix="model.net.told=[until]")

    def predict(
        self, x_t: Tensor, t: float | Tensor, cond: Cond | None = None, *, until: float | Tensor | None = None
    ) -> Tensor:
        """The network's prediction, in at least float32: what objectives compare with `prediction.target`.

        until: of a model that answers "jump", where the jump ends; t unless said.
        """
        return self.outputs(x_t, t, cond, until=until)[0]

    def outputs(
        self, x_t: Tensor, t: float | Tensor, cond: Cond | None = None, *, until: float | Tensor | None = None
    ) -> tuple[Tensor, ...]:
        """All that the network says: its prediction (B, C, ...), and if it learns a variance, that (B, C, ...) too.

        ConfigError if it gives another number of channels than its answers need, or is told a time that it knows not.
        """
        t = times_like(t, x_t)
        if self.scale_input is not None:
            x_t = (self.scale_input(self.path, along(t, x_t)) * x_t).to(x_t.dtype)  # the network's own, if half
        told = dict(cond or {})
        if JUMP in self.answers:
            end = t if until is None else times_like(until, x_t).to(t.dtype)
            told["until"] = self.time_input(self.path, end).clamp(-FAR, FAR)  # a level is infinite at the data
        elif until is not None:
            what = "only a model that answers jumps can be told where one ends"
            raise ConfigError(what, where="model.answers", seen=", ".join(self.answers), fix="model.answers=[jump]")
        given = x_t if CONCAT not in told else beside(x_t, told.pop(CONCAT))
        y: Tensor = self.net(given, self.time_input(self.path, t), **told)
        parts = 2 if VARIANCE in self.answers else 1
        if y.shape[1] != parts * x_t.shape[1]:
            raise ConfigError(
                f"a model that answers {', '.join(self.answers)} needs {parts} channels of the network for each of x",
                where="model.net",
                seen=f"{y.shape[1]} for {x_t.shape[1]}",
            )
        y = y.to(t.dtype)
        return y.chunk(2, 1) if parts == 2 else (y,)

    def forward(
        self,
        x_t: Tensor,
        t: float | Tensor,
        cond: Cond | None = None,
        *,
        to: str | None = None,
        until: float | Tensor | None = None,
    ) -> Tensor:
        """E[x0 | x_t]: (B, ...). A consistency model's endpoint has the same formula. to: another of the `answers`.

        until: of a "jump", where it ends: a float, () or (B,).
        """
        if JUMP in self.answers:
            until = _until(to or self.answers[0], until)
        y, *variance = self.outputs(x_t, t, cond, until=until)
        x0 = self.prediction.x0(self.path, y, x_t, times_like(t, x_t))
        return torch.cat([x0, *variance], 1) if to == VARIANCE else x0


def answered(answers: Sequence[str]) -> tuple[str, ...]:
    """All that a model answers that was trained for these: jumps of no length are means, and those to 0 endpoints."""
    if JUMP not in answers:
        return tuple(answers)
    first = answers[0] if answers[0] != JUMP else "x0"  # a plain call says no time to jump to
    return tuple(dict.fromkeys((first, JUMP, "x0", "endpoint", *answers)))


def _until(to: str, until: float | Tensor | None) -> float | Tensor | None:
    """Where a model of jumps is to jump to, for what it is asked; None is t itself. ConfigError without an end."""
    if to == JUMP:
        if until is None:
            raise ConfigError("a jump ends at a time", where="until", seen="none", fix="until=0.0")
        return until
    if until is not None:
        raise ConfigError("only a jump ends at a time", where="until", seen=f"to={to!r}", fix='to="jump"')
    return 0.0 if to == "endpoint" else None


def beside(x_t: Tensor, maps: Tensor) -> Tensor:
    """The network's input: x_t (B, C, h, w), then maps (B, C', h, w), or (B, C', 1, 1) that are the same everywhere.

    ConfigError for maps of another size. Ho et al. 2022, cascades; Rombach et al. 2022, section 3.3.
    """
    if maps.shape[2:] != x_t.shape[2:]:
        if any(side != 1 for side in maps.shape[2:]):
            seen = f"{tuple(maps.shape[2:])} beside {tuple(x_t.shape[2:])}"
            raise ConfigError("a picture that is told has another size", where="model.conditioner", seen=seen)
        maps = maps.expand(-1, -1, *x_t.shape[2:])
    return torch.cat([x_t, maps.to(x_t)], 1)


def times_like(t: float | Tensor, x: Tensor) -> Tensor:
    """One time a sample, (B,), in at least float32. Filling with a float does not wait for the device; copying does."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    if isinstance(t, Tensor) and (t.ndim or t.requires_grad or t.device.type != "cpu"):
        return t.to(x.device, dtype).expand(len(x))
    return x.new_full((len(x),), float(t), dtype=dtype)


def as_time(path: Path, t: Tensor) -> Tensor:
    """t itself, in [0, 1]."""
    return t


def as_reversed(path: Path, t: Tensor) -> Tensor:
    """1 - t: networks for which 1 is the data (SiT, flow matching's and rectified flow's own code)."""
    return 1 - t


def as_thousandths(path: Path, t: Tensor) -> Tensor:
    """1000 t (SD3, FLUX): sinusoidal embeddings were made for integers."""
    return 1000 * t


def as_index(path: Path, t: Tensor) -> Tensor:
    """The index in a table of betas, fractional between two (DDPM, Stable Diffusion, DiT)."""
    if not isinstance(path, Tabulated):
        raise ConfigError(
            "only a table of betas has indices",
            where="model.time_input",
            seen=f"path {path}",
            fix="model.time_input=thousandths",
        )
    return path.index(t)


def as_log_level(path: Path, t: Tensor) -> Tensor:
    """ln(sigma / alpha) / 4 (EDM's c_noise)."""
    return -log_snr(path, t) / 8


def as_log_level_thousandths(path: Path, t: Tensor) -> Tensor:
    """250 ln(sigma / alpha): EDM's c_noise in thousandths (consistency models)."""
    return 1000 * as_log_level(path, t)


def unit_variance(sigma_data: float = 0.5) -> OfTime:
    """EDM's c_in on any path: 1 / sqrt(alpha^2 sigma_data^2 + sigma^2)."""
    return lambda path, t: torch.rsqrt((sigma_data * path.alpha(t)) ** 2 + path.sigma(t) ** 2)


def on_path(denoise: Denoise, new: Path) -> Bound:
    """The same denoiser spoken to in another path's coordinates: equal log_snr, rescaled x."""

    def fn(x: Tensor, s: float | Tensor, *, until: float | Tensor | None = None, **asked: Any) -> Tensor:
        if until is not None:
            end = denoise.path.time(log_snr(new, _precise(until)))
            asked["until"] = end if end.ndim else float(end)
        x, t = translated(new, denoise.path, x, _precise(s))
        return denoise(x, t if t.ndim else float(t), **asked)

    return Bound(new, fn, denoise.answers)


def _precise(t: float | Tensor) -> Tensor:
    return torch.as_tensor(t, dtype=torch.float64 if isinstance(t, float) else None)


def translated(path: Path, to: Path, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """A state at times () or (B,) on one path as it is on another, where the noise level is the same: (x, times).

    Pure noise is the same on all paths, but for its size.
    """
    s = to.time(log_snr(path, t))
    alpha = path.alpha(t)
    ratio = torch.where(alpha > 0, to.alpha(s) / alpha.clamp(min=1e-30), to.sigma(s) / path.sigma(t))
    return x_t * along(ratio, x_t).to(x_t), s


def joined(conds: Sequence[Cond]) -> Cond:
    """Several conditions as one batch. Contexts of unequal length are padded with zeros, their masks with False; where
    there are none, masks are made, so that no padding is attended to. Maps that are the same everywhere are spread out.
    """
    keys = conds[0].keys()
    if any(cond.keys() != keys for cond in conds):
        names = " and ".join(sorted({"{" + ", ".join(sorted(cond)) + "}" for cond in conds}))
        raise ConfigError("conditions of different kinds cannot share a batch", where="cond", seen=names)
    if "context" in keys and MASK not in keys and len({cond["context"].shape[1] for cond in conds}) > 1:
        whole = [cond["context"] for cond in conds]
        conds = [
            {**cond, MASK: one.new_ones(one.shape[:2], dtype=torch.bool)}
            for cond, one in zip(conds, whole, strict=True)
        ]
    return {key: _stacked([cond[key] for cond in conds], spread=key == CONCAT) for key in conds[0]}


def _stacked(parts: Sequence[Tensor], *, spread: bool = False) -> Tensor:
    if spread:  # what is the same everywhere takes the size of the others
        size = max((part.shape[2:] for part in parts), key=torch.Size.numel)
        return torch.cat(
            [part.expand(-1, -1, *(size if part.shape[2:].numel() == 1 else part.shape[2:])) for part in parts]
        )
    if parts[0].ndim < 2 or len({part.shape[1] for part in parts}) == 1:
        return torch.cat(list(parts))
    longest = max(part.shape[1] for part in parts)
    return torch.cat([_padded(part, longest) for part in parts])


def _padded(part: Tensor, length: int) -> Tensor:
    missing = part.new_zeros(len(part), length - part.shape[1], *part.shape[2:])
    return torch.cat([part, missing], 1)

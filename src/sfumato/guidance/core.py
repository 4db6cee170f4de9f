"""What every guidance is made of: branches, where they are answered, intervals, and what a run fills in.

A guidance that a configuration can name is a frozen dataclass of plain options. Its fields `cond` and `null` (the
condition of the rows and its absence), `others` (of further prompts), `times` (the grid) and `memory` are no options:
`given` and `started` fill them in, in the guidance it wraps (`of`) too. The first branch is always the answer that
there would be without guidance, so that what wraps a guidance can compare with it.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Annotated, Any, NamedTuple, Protocol, TypeVar, cast

import torch
from torch import Tensor

from sfumato.denoiser import Bound, Cond, joined, times_like
from sfumato.errors import ConfigError
from sfumato.paths import Path

T = TypeVar("T")
FilledIn = Annotated[T, "no option: known when there is something to sample"]
Interval = tuple[float, float | None]  # noise levels sigma / alpha, (low, high]; no high is no end
ALWAYS: Interval = (0.0, None)

# x_t (B, ...), t (B,), cond, and perhaps `to` and `until` -> x0 (B, ...): a Denoiser is one
Forward = Callable[..., Tensor]
Variants = Callable[[str], Forward]  # the same for a variant of the network, by name


class Branch(NamedTuple):
    """One evaluation that guidance wants: under which condition, and on which variant of the network, if not itself."""

    cond: Cond
    variant: str | None = None


class Guidance(Protocol):
    """Which branches to evaluate at time t, and how to combine their answers into one x0."""

    def branches(self, path: Path, t: float) -> tuple[Branch, ...]: ...

    def combine(self, path: Path, x_t: Tensor, t: float, answers: Sequence[Tensor]) -> Tensor: ...


@dataclass(frozen=True)
class Unguided:
    """The conditional answer as it is."""

    cond: FilledIn[Cond] = field(default_factory=dict)

    def branches(self, path: Path, t: float) -> tuple[Branch, ...]:
        return (Branch(self.cond),)

    def combine(self, path: Path, x_t: Tensor, t: float, answers: Sequence[Tensor]) -> Tensor:
        return answers[0]


def from_weight(weight: float) -> float:
    """The scale of a guidance weight in Ho & Salimans' and LCM's convention, where 0 is off."""
    return 1 + weight


def given(
    guidance: Guidance, cond: Cond, null: Callable[[], Cond], read: Callable[[Any], Cond] | None = None
) -> Guidance:
    """A guidance with its conditions filled in.

    null: makes the absence of the condition, or a negative prompt's; read: makes the condition of one more prompt for
    all rows. They are called only where the guidance needs them. Raises ConfigError for prompts that nothing reads.
    """
    made: list[Cond] = []

    def once() -> Cond:
        made.extend([] if made else [null()])
        return made[0]

    return _filled(guidance, lambda name, one: _condition(name, one, cond, once, read))


def _condition(
    name: str, guidance: Any, cond: Cond, null: Callable[[], Cond], read: Callable[[Any], Cond] | None
) -> Any:
    if name == "cond":
        return cond
    if name == "null":
        return null()
    if name != "others" or not guidance.also:
        return None
    if read is None:
        raise ConfigError("nothing here reads further prompts", where="guidance.also", seen=str(guidance.also))
    return tuple(read(prompt) for prompt, _ in guidance.also)


def started(guidance: Guidance, times: Tensor | None = None) -> Guidance:
    """A guidance for one run, with an empty memory of its own.

    times: the run's grid, for a guidance that looks ahead; it keeps the one it has where none is given.
    """
    grid = None if times is None else tuple(times.detach().to("cpu", torch.float64).tolist())
    return _filled(guidance, lambda name, one: grid if name == "times" else None)


def _filled(guidance: Guidance, value: Callable[[str, Any], Any]) -> Guidance:
    """A copy with new values for fields, by name, where there is one; what it wraps is filled in alike."""
    plain: Any = guidance
    if not is_dataclass(plain):
        return guidance  # the user's own, which holds what it needs
    changes = {one.name: value(one.name, plain) for one in fields(plain) if one.init}
    if getattr(plain, "of", None) is not None:
        changes["of"] = _filled(cast(Any, plain).of, value)
    fresh = {name: one for name, one in changes.items() if one is not None}
    return cast(Guidance, replace(cast(Any, plain), **fresh))  # fields outside `init`, the memory, are made anew


def guided(
    forward: Forward,
    path: Path,
    guidance: Guidance,
    times: Tensor | None = None,
    variants: Variants | None = None,
    answers: tuple[str, ...] | None = None,
) -> Bound:
    """A `Denoise` for one run, which answers all branches of a guidance with one batched forward.

    times: the run's grid, which CFG++ must know. variants: where branches on a variant of the network are answered,
    each variant with a forward of its own. Raises ConfigError for a variant if there are none. answers: what the
    forward can be asked for, where it does not say so itself.
    """
    running = started(guidance, times)

    def fn(x_t: Tensor, t: float | Tensor, **asked: Any) -> Tensor:
        now, t = t, float(t.detach()) if isinstance(t, Tensor) else t
        branches = running.branches(path, t)
        said: dict[int, Tensor] = {}
        for variant in dict.fromkeys(branch.variant for branch in branches):
            which = [i for i, branch in enumerate(branches) if branch.variant == variant]
            parts = _answered(varied(forward, variants, variant), x_t, now, [branches[i].cond for i in which], asked)
            said |= dict(zip(which, parts, strict=True))
        return combined(running, path, x_t, t, [said[i] for i in range(len(branches))])

    known: tuple[str, ...] = getattr(forward, "answers", ("x0",)) if answers is None else answers
    return Bound(path, fn, known)


def combined(guidance: Guidance, path: Path, x_t: Tensor, t: float, answers: Sequence[Tensor]) -> Tensor:
    """The answer that a guidance makes of all: x0 is guided; the channels of a learned variance are the first's."""
    if answers[0].shape == x_t.shape:
        return guidance.combine(path, x_t, t, answers)
    channels = x_t.shape[1]
    guided_ = guidance.combine(path, x_t, t, [one[:, :channels] for one in answers])
    return torch.cat([guided_, answers[0][:, channels:]], 1)


def varied(forward: Forward, variants: Variants | None, variant: str | None) -> Forward:
    """What answers for a variant of the network: `forward` for none. ConfigError where there are no variants."""
    if variant is None:
        return forward
    if variants is None:
        raise ConfigError("this model has no variants", where="guidance", seen=variant)
    return variants(variant)


def _answered(
    forward: Forward, x_t: Tensor, t: float | Tensor, conds: Sequence[Cond], asked: Mapping[str, Any]
) -> Sequence[Tensor]:
    """What is said under each condition, from one batch. Gradients reach a time that is a tensor."""
    cond = conds[0] if len(conds) == 1 else joined(conds)
    rows = x_t if len(conds) == 1 else torch.cat([x_t] * len(conds))
    if "until" in asked:
        asked = {**asked, "until": times_like(asked["until"], x_t).repeat(len(conds))}
    return forward(rows, times_like(t, rows), cond, **asked).chunk(len(conds))


def scales(path: Path, t: float) -> tuple[float, float]:
    """(alpha, sigma) at a time, as floats."""
    time = torch.tensor(t, dtype=torch.float64)
    with torch.no_grad():
        return float(path.alpha(time)), float(path.sigma(time))


def within(interval: Interval, path: Path, t: float) -> bool:
    """Whether the noise level sigma / alpha at t lies in (low, high]. Pure noise does only if there is no end."""
    return bool(all_within(interval, path, torch.tensor(t, dtype=torch.float64)))


def all_within(interval: Interval, path: Path, t: Tensor) -> Tensor:
    """The same of each of the times (B,): booleans (B,)."""
    low, high = interval
    with torch.no_grad():
        alpha, sigma = path.alpha(t), path.sigma(t)
    above = low * alpha < sigma
    return above if high is None or high == math.inf else above & (alpha > 0) & (sigma <= high * alpha)


def log_snr_interval(low: float, high: float) -> Interval:
    """The interval of noise levels of one of log_snr, [low, high): the noise falls as log_snr rises."""
    return math.exp(-high / 2), math.exp(-low / 2)


def check_interval(interval: Interval) -> None:
    """ConfigError for an interval that runs from a higher to a lower noise level."""
    low, high = interval
    if not 0 <= low < (math.inf if high is None else high):
        raise ConfigError(
            "a guidance interval runs from a lower to a higher noise level",
            where="guidance.interval",
            seen=f"({low:g}, {high if high is None else format(high, 'g')})",
        )


def check_share(value: float, where: str, what: str) -> None:
    """ConfigError for a number outside 0..1."""
    if not 0 <= value <= 1:
        raise ConfigError(f"{what} lies between 0 and 1", where=f"guidance.{where}", seen=f"{value:g}")


def dot(a: Tensor, b: Tensor) -> Tensor:
    """The inner product of each sample (B, ...), in float64 where the device knows it, shaped (B, 1, ...)."""
    wide = torch.float32 if a.device.type == "mps" else torch.float64
    product = (a.to(wide) * b.to(wide)).flatten(1).sum(1)
    return product.reshape(-1, *(1,) * (a.ndim - 1))

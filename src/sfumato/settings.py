"""Settings: how to sample. What a model recommends, laid over by what is asked for, and checked whole."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

from sfumato.catalogue import KINDS
from sfumato.denoiser import Cond
from sfumato.errors import ConfigError
from sfumato.guidance import CFG, Guidance, Unguided
from sfumato.registry import check

Interval = tuple[float, float | None]  # noise levels sigma / alpha, (low, high]; no high is no end


@dataclass(frozen=True)
class Settings:
    """How to sample. sampler, grid: names or slots. guidance: 1 is off. interval: noise levels (low, high]."""

    sampler: str | Mapping[str, Any] = "dpmpp_2m"
    grid: str | Mapping[str, Any] = "linear"
    steps: int = 20
    guidance: float = 1.0
    interval: Interval | None = None
    rescale: float = 0.0

    def __post_init__(self) -> None:
        if not (is_whole(self.steps) and self.steps >= 1):
            raise ConfigError(
                "sampling takes a whole number of steps, at least one",
                where="steps",
                seen=repr(self.steps),
                fix="steps=20",
            )
        if not (is_number(self.guidance) and 0 <= self.guidance < float("inf")):
            raise ConfigError(
                "a guidance scale is a number from 0; 1 is off",
                where="guidance",
                seen=repr(self.guidance),
                fix="guidance=3",
            )
        if not (is_number(self.rescale) and 0 <= self.rescale <= 1):
            raise ConfigError(
                "guidance rescale lies between 0 and 1", where="rescale", seen=repr(self.rescale), fix="rescale=0.7"
            )
        if self.interval is not None:
            self._check_interval(self.interval)
        problems = [*check(self.sampler, "Sampler", KINDS, "sampler"), *check(self.grid, "Grid", KINDS, "grid")]
        if problems:
            what = "; ".join(f"{one.where} {one.what}" for one in problems)
            first = problems[0]
            raise ConfigError(what, where=first.where, seen=first.seen, fix=first.fix)

    def guide(self, cond: Cond, null: Callable[[], Cond]) -> Guidance:
        """The guidance for a condition."""
        if self.guidance == 1 or not cond:
            return Unguided(cond)
        low, high = self.interval or (0.0, None)
        return CFG(cond, null(), float(self.guidance), (low, float("inf") if high is None else high), self.rescale)

    def plain(self) -> dict[str, Any]:
        """As plain data; an endless interval has no number for its end."""
        low, high = self.interval or (0.0, None)
        unending = high is None or high == float("inf")
        return {
            "sampler": self.sampler,
            "grid": self.grid,
            "steps": int(self.steps),
            "guidance": float(self.guidance),
            "interval": None if self.interval is None else [float(low), None if unending else float(high or 0)],
            "rescale": float(self.rescale),
        }

    @staticmethod
    def _check_interval(interval: Any) -> None:
        pair = list(interval) if isinstance(interval, Sequence) and not isinstance(interval, str) else []
        ends = [float("inf") if i == 1 and end is None else end for i, end in enumerate(pair)]
        if len(ends) != 2 or not all(is_number(end) for end in ends) or not 0 <= ends[0] < ends[1]:
            what = "a guidance interval runs from a lower to a higher noise level"
            raise ConfigError(what, where="interval", seen=repr(interval), fix="interval=(0.2, 5)")


def is_whole(value: object) -> bool:
    """Whether a value is an integer, of Python or of another library."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def is_number(value: object) -> bool:
    """Whether a value is a real number, of Python or of another library."""
    return isinstance(value, Real) and not isinstance(value, bool)

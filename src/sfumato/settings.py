"""Settings: how to sample. What a model recommends, laid over by what is asked for, and checked whole."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

from sfumato.catalogue import KINDS, build
from sfumato.denoiser import Cond
from sfumato.errors import ConfigError
from sfumato.guidance import CFG, Guidance, Unguided, given
from sfumato.registry import check, options_of, target_of
from sfumato.starts import check_strength

Interval = tuple[float, float | None]  # noise levels sigma / alpha, (low, high]; no high is no end


@dataclass(frozen=True)
class Settings:
    """How to sample. sampler, grid: names or slots. guidance: a scale, of which 1 is off, or a slot of any guidance.

    interval: noise levels (low, high]; with rescale, for a scale: a slot has its own. strength: of a picture to start
    from, the share of the steps that is made where none is asked for, above 0 up to 1; None leaves it to
    `sfumato.starts.begin`.
    """

    sampler: str | Mapping[str, Any] = "exp_abm"
    grid: str | Mapping[str, Any] = "fitted"
    steps: int = 20
    guidance: float | str | Mapping[str, Any] = 1.0
    interval: Interval | None = None
    rescale: float = 0.0
    strength: float | None = None

    def __post_init__(self) -> None:
        if not (is_whole(self.steps) and self.steps >= 1):
            raise ConfigError(
                "sampling takes a whole number of steps, at least one",
                where="steps",
                seen=repr(self.steps),
                fix="steps=20",
            )
        slot = isinstance(self.guidance, (str, Mapping))
        if not slot and not (is_number(self.guidance) and 0 <= float(self.guidance) < float("inf")):  # type: ignore[arg-type]
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
        if self.strength is not None:
            check_strength(self.strength)
        problems = [*check(self.sampler, "Sampler", KINDS, "sampler"), *check(self.grid, "Grid", KINDS, "grid")]
        if slot:
            problems += check(self.guidance, "Guidance", KINDS, "guidance")
        if problems:
            what = "; ".join(f"{one.where} {one.what}" for one in problems)
            first = problems[0]
            raise ConfigError(what, where=first.where, seen=first.seen, fix=first.fix)

    @property
    def scale(self) -> float:
        """The guidance scale; of a slot, its `scale` if it has one."""
        given = self.guidance.get("scale", 3.0) if isinstance(self.guidance, Mapping) else self.guidance
        return 3.0 if isinstance(given, str) else float(given)

    @property
    def steers(self) -> bool:
        """Whether there is anything to steer away from: where the network itself is told the scale, there is not."""
        kind = self.guidance.get("kind") if isinstance(self.guidance, Mapping) else self.guidance
        return kind not in (1, "unguided", "distilled")

    @property
    def unfilled(self) -> Guidance:
        """The guidance, without its conditions."""
        if self.guidance == 1:
            return Unguided()
        if isinstance(self.guidance, (str, Mapping)):
            guidance: Guidance = build(self.guidance, "Guidance")
            return guidance
        return CFG(scale=float(self.guidance), interval=self.interval or (0.0, None), rescale=self.rescale)

    def guide(self, cond: Cond, null: Callable[[], Cond], read: Callable[[Any], Cond] | None = None) -> Guidance:
        """The guidance for a condition. null: makes its absence; read: makes the condition of a further prompt."""
        return given(self.unfilled, cond, null, read) if cond else Unguided()

    def plain(self) -> dict[str, Any]:
        """As plain data, but for the strength, which is of a picture to start from and not of every drawing; an endless
        interval has no number for its end.
        """
        low, high = self.interval or (0.0, None)
        unending = high is None or high == float("inf")
        return {
            "sampler": self.sampler,
            "grid": self.grid,
            "steps": int(self.steps),
            "guidance": self.guidance if isinstance(self.guidance, (str, Mapping)) else float(self.guidance),
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


def fitted_grid(slot: str | Mapping[str, Any], height: int, width: int, patch: int = 1) -> dict[str, Any]:
    """The slot of a grid, told the size of what is diffused where it depends on that and it was not said.

    As its number of pixels, or of the tokens of `patch` by `patch` of them.
    """
    told = {"kind": slot} if isinstance(slot, str) else dict(slot)
    target = target_of(str(told.get("kind")), KINDS["Grid"])
    options = (options_of(target) or {}) if target is not None else {}
    known = {"pixels": height * width, "tokens": height * width // patch**2}
    return told | {name: size for name, size in known.items() if name in options and told.get(name) is None}


def fitted_guidance(asked: Any, own: Any) -> Any:
    """What a guidance that was asked for means to a model that recommends `own`.

    A number is the scale of the model's own kind, if that has one (FLUX.1-dev is told it); 1 is off, whatever the kind.
    """
    own_scale = isinstance(own, Mapping) and "scale" in own
    return {**own, "scale": float(asked)} if own_scale and is_number(asked) and asked != 1 else asked


def is_whole(value: object) -> bool:
    """Whether a value is an integer, of Python or of another library."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def is_number(value: object) -> bool:
    """Whether a value is a real number, of Python or of another library."""
    return isinstance(value, Real) and not isinstance(value, bool)

"""Guards against two ways in which runs are lost: gradients that are not finite, and losses far out of line.

A loss is judged by its distance from the median of the last ones, in units of their median absolute deviation: both
stay put however wild a few of them are, so one spike does not hide the next.
"""

from collections import deque
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any

from sfumato.config import GuardSection
from sfumato.errors import DataError

MEMORY, LEAST = 200, 40


@dataclass
class Guard:
    """What has been seen, as plain data that travels in checkpoints."""

    section: GuardSection
    losses: deque[float] = field(default_factory=lambda: deque(maxlen=MEMORY))
    skipped: int = 0
    in_a_row: int = 0
    spikes: int = 0
    rollbacks: int = 0

    def nonfinite(self, step: int, what: str) -> None:
        """Counts a step whose gradients cannot be used; DataError when too many come in a row."""
        self.skipped += 1
        self.in_a_row += 1
        if self.in_a_row >= self.section.nonfinite_limit:
            raise DataError(
                f"{self.in_a_row} steps in a row had gradients that are not finite",
                where=f"step {step}",
                seen=what,
                fix="a smaller optim.lr, precision=bf16 or fp32, or optim.clip=1.0; the last checkpoint is intact",
            )

    def score(self, loss: float) -> float:
        """How many deviations a loss lies above the usual; 0 until enough have been seen."""
        if len(self.losses) < LEAST:
            return 0.0
        middle = median(self.losses)
        spread = 1.4826 * median(abs(one - middle) for one in self.losses)
        return (loss - middle) / max(spread, 1e-3 * abs(middle), 1e-12)

    def spiked(self, loss: float) -> bool:
        """Whether a loss is a spike; if it is not, it becomes part of what is usual."""
        if self.section.spikes != "off" and self.score(loss) > self.section.threshold:
            self.spikes += 1
            return True
        self.losses.append(loss)
        return False

    def passed(self) -> None:
        """A step was made."""
        self.in_a_row = 0

    def state(self) -> dict[str, Any]:
        """Everything but the section."""
        kept = {name: value for name, value in asdict(self).items() if name not in ("section", "losses")}
        return kept | {"losses": list(self.losses)}

    def restore(self, state: dict[str, Any]) -> None:
        """The inverse of `state`."""
        for name, value in state.items():
            setattr(self, name, deque(value, maxlen=MEMORY) if name == "losses" else value)

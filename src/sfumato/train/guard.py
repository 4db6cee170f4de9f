"""Guards against two ways in which runs are lost: gradients that are not finite, and losses far out of line.

A loss is judged by its distance from the median of the last ones, in units of their median absolute deviation: both
stay put however wild a few of them are, so one spike does not hide the next. A step that is not made changes neither
weights nor averages nor the learning rate; when too many in a row are not made, the run stops. Where an objective's
loss begins to mean something else, nothing is usual yet.
"""

from collections import deque
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from sfumato.config import GuardSection
from sfumato.errors import DataError

MEMORY, LEAST = 200, 40


@dataclass
class Guard:
    """What has been seen, as plain data that travels in checkpoints.

    losses: the last ones of this phase of the objective, without spikes that were not trained on. skipped: steps that
    were not made, in_a_row of them the latest. spikes: all that were seen.
    """

    section: GuardSection
    losses: deque[float] = field(default_factory=lambda: deque(maxlen=MEMORY))
    skipped: int = 0
    in_a_row: int = 0
    spikes: int = 0
    rollbacks: int = 0
    phase: int = 0

    def entered(self, phase: int) -> None:
        """A phase of the objective, see `sfumato.objectives.denoising.Phased`: in another one losses begin anew."""
        if phase != self.phase:
            self.losses.clear()
        self.phase = phase

    def missed(self, step: int, why: str) -> None:
        """Counts a step that is not made; DataError when too many come in a row."""
        self.skipped += 1
        self.in_a_row += 1
        if self.in_a_row >= self.section.nonfinite_limit:
            raise DataError(
                f"{self.in_a_row} steps in a row could not be made",
                where=f"step {step}",
                seen=why,
                fix="a smaller optim.lr, precision=bf16 or fp32, or optim.clip=1.0; the last checkpoint is intact",
            )

    def made(self) -> None:
        """A step was made."""
        self.in_a_row = 0

    def score(self, loss: float) -> float:
        """How many deviations a loss lies above the usual; 0 until enough have been seen."""
        if len(self.losses) < LEAST:
            return 0.0
        last = np.array(self.losses)
        middle = float(np.median(last))
        spread = 1.4826 * float(np.median(np.abs(last - middle)))  # of a normal law, the standard deviation
        return (loss - middle) / max(spread, 1e-3 * abs(middle), 1e-12)

    def spike(self, loss: float) -> float | None:
        """How far a loss lies above the usual if that makes it a spike.

        What is trained on becomes part of the usual, so a level that lasts is no spike in the end.
        """
        action, score = self.section.spikes, self.score(loss)
        spiked = action != "off" and score > self.section.threshold
        self.spikes += int(spiked)
        if not spiked or action == "warn":
            self.losses.append(loss)
        return score if spiked else None

    def state(self) -> dict[str, Any]:
        """Everything but the section."""
        return {name: getattr(self, name) for name in _COUNTS} | {"losses": list(self.losses)}

    def restore(self, state: dict[str, Any]) -> None:
        """The inverse of `state`."""
        for name in _COUNTS:
            setattr(self, name, int(state.get(name, 0)))  # a checkpoint of an older version knows no phase
        self.losses = deque(state["losses"], maxlen=MEMORY)


_COUNTS = ("skipped", "in_a_row", "spikes", "rollbacks", "phase")

"""What the tests of the command line share."""

import json
from collections.abc import Callable
from typing import Any, NamedTuple

# Over the recipe `tiny`: a run of a second, without pictures or validation on the way.
QUICK = (
    "device=cpu",
    "steps=2",
    "batch=4",
    "model.net={kind: dit, patch: 16, dim: 16, depth: 1, heads: 1}",
    "model.conditioner={kind: prompts, dim: 16, depth: 1, heads: 1}",
    "validate={every: 0, holdout: 0}",
    "samples.every=0",
    "checkpoint={every: 1, keep: 2}",
)


class Outcome(NamedTuple):
    """How a command ended: its exit code, its results on stdout, its talk on stderr."""

    code: int
    out: str
    err: str

    @property
    def data(self) -> Any:
        """The results as JSON."""
        return json.loads(self.out)


Command = Callable[..., Outcome]


def told(outcome: Outcome, code: int, *parts: str) -> None:
    """An error in the house's form, with this exit code and these words in it; no traceback, nothing on stdout."""
    assert outcome.code == code, outcome
    assert outcome.err.count("✗ ") + outcome.err.count("■ ") == 1, outcome.err
    assert "Traceback" not in outcome.err and outcome.out == ""
    for part in parts:
        assert part in outcome.err, (part, outcome.err)

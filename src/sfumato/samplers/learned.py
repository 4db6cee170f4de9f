"""The general linear method of one call a step, with numbers that `sfumato.tuning` found for a model.

Every deterministic sampler of one call a step forms the next state from the current one and the answers so far,
x_s = keep * x_t + sum_k weight_k * x0_k (newest first): only the numbers differ. With keep = sigma_s / sigma_t and one
weight it is DDIM; here they are free (S4S: Frankel et al. 2025), those of the last step included.
"""

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor

from sfumato.errors import ConfigError
from sfumato.paths import Path
from sfumato.samplers.core import Running, Table
from sfumato.samplers.plan import Row, Update, ddim_row, multistep


def learned(path: Path, x: Tensor, times: Tensor, *, rows: Sequence[Sequence[float]] = ()) -> Running:
    """rows: for each step keep, then the weights, newest answer first. None at all: DDIM."""
    table = Table.of(path, times)
    given = [Row(row[0], tuple(row[1:])) for row in rows] or [ddim_row(table, i, i + 1) for i in table.steps]
    if len(given) != len(table.steps):
        raise ConfigError(
            "this learned sampler is for another number of steps",
            where="steps",
            seen=f"{len(table.steps)} steps, numbers for {len(given)}",
            fix=f"steps={len(given)}",
        )
    return (yield from multistep(x, [Update(table.t[i], 0.0, row) for i, row in enumerate(given)]))


def rows_of(running: Running, steps: int) -> list[list[float]]:
    """The numbers of any linear sampler of one call a step, started on a vector of zeros and a one, (steps + 1,).

    The k-th answer is the k-th unit vector, so each state tells what it is made of.
    """
    states: list[Tensor] = []
    asked = next(running)
    try:
        for k in range(1, steps + 1):
            states.append(asked.x)  # type: ignore[union-attr]
            answer = asked.x.new_zeros(steps + 1)  # type: ignore[union-attr]
            answer[k] = 1.0
            asked = running.send(answer)
    except StopIteration as end:
        states.append(end.value)
    rows = []
    for i, (here, there) in enumerate(pairwise(states)):
        keep = float(there[0] / here[0])
        weights = there - keep * here
        rows.append([keep, *(float(weights[k]) for k in range(i + 1, 0, -1))])
    return rows

"""When a student counts: at equal calls of the network it is better than its teacher by more than chance explains.

The difference of both scores has a 95% interval (`sfumato.metrics.intervals.difference`, which takes them for
independent; they are of the same prompts and noises, so it is rather too wide). The student counts where that interval
lies above zero, on the prompts of combinations that training showed and also on those of held-out combinations. A call
count at which either was not judged, of the student or of the teacher, has no verdict.
"""

from collections.abc import Mapping
from typing import Any

from sfumato.metrics.intervals import difference

Row = Mapping[str, Any]


def calls_of(row: Row) -> list[str]:
    """The numbers of calls at which a student was judged, ascending."""
    return sorted((key for key in row if key.isdigit()), key=int)


def above(row: Row, teacher: Row, calls: str) -> dict[str, list[float]]:
    """How far a student is above its teacher at as many calls, with the 95% interval of that, as [difference, low,
    high]: "overall", and "held out"; each where both were judged.
    """
    equal, found = teacher.get("equal", {}).get(calls), dict[str, list[float]]()
    if equal is None or f"{calls} interval" not in row or "metric" in row:  # which is not the teacher's
        return found
    pairs = {"overall": ((row[calls], *row[f"{calls} interval"]), _ends(equal))}
    if f"{calls} held out" in row and "held out" in equal:
        pairs["held out"] = (_ends(row[f"{calls} held out"]), _ends(equal["held out"]))
    for name, (mine, its) in pairs.items():
        low, high = difference(mine, its)
        found[name] = [round(mine[0] - its[0], 4), round(low, 4), round(high, 4)]
    return found


def verdicts(found: dict[str, Any]) -> None:
    """Writes into every student's row how far it is above the teacher, and whether it counts, by calls."""
    for row in found["students"].values():
        by_calls = {calls: above(row, found.get("teacher", {}), calls) for calls in calls_of(row)}
        whole = {calls: one for calls, one in by_calls.items() if len(one) == 2}
        row["above"] = {calls: one for calls, one in by_calls.items() if one}
        row["counts"] = {calls: all(low > 0 for _, low, _ in one.values()) for calls, one in whole.items()}


def _ends(score: Row) -> tuple[float, float, float]:
    return score["overall"], score["low"], score["high"]

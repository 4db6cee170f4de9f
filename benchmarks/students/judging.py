"""Scores of a teacher and of its students at so many calls of the network, a guided step being two.

A student draws as it recommends. Any other model draws by the best way that is found for it: samplers on two grids, and
samplers tuned for so many steps, guided and not, compared by their scores on prompts of another seed than those that
they are then judged on. Prompts and noises are the same for all. The held-out combinations are asked for last, so those
that are not held out, and their noises, are the same whether or not held-out ones follow.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sfumato import Pipeline, load
from sfumato.metrics.scenes import evaluate
from sfumato.train.timing import timing
from sfumato.tuning.model import examples, tune_model
from students.telling import told

WHOLE = 50  # steps of a teacher that is not hurried
EQUAL = (1, 2, 4, 8)  # calls at which the teacher is judged at least
SEARCH, JUDGE = 11, 12  # seeds of the prompts and the noise, which no recipe's seed makes
SAMPLERS = ("ipndm", "dpmpp_2m", "unipc", "ddim")
TUNED = 48  # conditions that a sampler is tuned on
SCORE = ("overall", "low", "high")

Way = dict[str, Any]  # settings of `Pipeline.sample`


@dataclass(frozen=True)
class Judging:
    """How to judge. per_task, held_out: prompts of each of six tasks, and of combinations held out of training.
    calls: of the network. seconds: for each sampler that is tuned to a model; 0 tunes none.
    """

    per_task: int = 100
    held_out: int = 100
    calls: tuple[int, ...] = (1, 2, 4)
    seconds: float = 120.0

    def facts(self) -> dict[str, Any]:
        """What is kept of it beside scores."""
        return {"per_task": self.per_task, "held_out_per_task": self.held_out}


def judged(pipeline: Pipeline, per_task: int, held_out: int, seed: int, **settings: Any) -> dict[str, Any]:
    """The overall score with its interval, that of held-out combinations where the model is asked in words, and what
    else than prompts followed was counted, as "metric".
    """
    found = evaluate(pipeline, per_task=per_task, held_out=held_out, seed=seed, **settings).as_dict()
    row = {name: found[name] for name in SCORE}
    if found["held_out"]["overall"] is not None:
        row["held out"] = {name: found["held_out"][name] for name in SCORE}
    conditioner = pipeline.model.conditioner
    if conditioner is None or "caption" not in conditioner.fields:
        row["metric"] = "whole" if conditioner is None else "kind"
    return row


def candidates(pipeline: Pipeline, run: Path, calls: int, seconds: float) -> list[Way]:
    """Ways for a model to draw in so many calls. run: of the model, whose conditions samplers are tuned on."""
    settings, found = pipeline.settings(), list[Way]()
    ways: list[tuple[Any, int]] = [(1.0, calls)]
    if settings.steers and calls > 1:
        ways.append((settings.guidance, calls // 2))
    for guidance, steps in ways:
        how = {"steps": steps, "guidance": guidance}
        found += [
            {"sampler": sampler, "grid": grid, **how} for sampler in SAMPLERS for grid in ("logistic", settings.grid)
        ]
        if steps in pipeline.tuned:  # by `sfumato tune-sampler`
            found.append({**pipeline.tuned[steps], **how})
        if steps > 1 and seconds:
            whole = pipeline if pipeline.precision == "fp32" else load(run, pipeline.device)  # gradients need that
            raw = whole.model.known(examples(run, TUNED))
            scale = 1.0 if guidance == 1.0 else None  # its own
            slots = tune_model(whole, raw, steps, guidance=scale, iterations=400, seconds=seconds).settings()
            found.append({"sampler": slots["sampler"], "grid": slots["grid"], **how})
    return found


def is_tuned(way: Way) -> bool:
    """Whether a way draws by a sampler that was tuned to the model."""
    return isinstance(way["sampler"], Mapping) and way["sampler"].get("kind") == "learned"


def named(way: Way) -> str:
    """What a way is called among others for as many calls."""
    sampler = "tuned" if is_tuned(way) else f"{way['sampler']}, {way['grid'] if way['grid'] == 'logistic' else 'own'}"
    return f"{sampler}, {way['steps']} steps" + ("" if way["guidance"] == 1.0 else " guided")


def best_of(pipeline: Pipeline, run: Path, calls: int, how: Judging) -> dict[str, Any]:
    """The score of a model by the best way that is found for so many calls; which it is and how many it is the best of,
    how many of them tuned; and the best scores on the prompts of the search, tuned and not.
    """
    ways = candidates(pipeline, run, calls, how.seconds)
    scores = [judged(pipeline, max(4, how.per_task // 5), 0, SEARCH, **way)["overall"] for way in ways]
    best = ways[scores.index(max(scores))]
    search = dict[str, float]()
    for way, score in zip(ways, scores, strict=True):
        kind = "tuned" if is_tuned(way) else "not tuned"
        search[kind] = max(score, search.get(kind, score))
    found = judged(pipeline, how.per_task, how.held_out, JUDGE, **best)
    facts = {"way": best, "won": named(best), "tried": len(ways), "tuned": sum(map(is_tuned, ways)), "search": search}
    return found | facts


def of_teacher(pipeline: Pipeline, run: Path, how: Judging) -> dict[str, Any]:
    """The teacher at 50 steps as it recommends, and the best of it at few calls."""
    whole = judged(pipeline, how.per_task, how.held_out, JUDGE, steps=WHOLE)
    told(f"teacher at {WHOLE} steps: {whole}")
    equal = {}
    for calls in sorted({*EQUAL, *how.calls}):
        equal[str(calls)] = best_of(pipeline, run, calls, how)
        told(f"teacher at {calls} calls: {equal[str(calls)]}")
    row = {"steps": WHOLE, "score": whole.pop("overall"), **whole, "equal": equal}
    return row | how.facts() | {"tuning_seconds": how.seconds}


def of_student(pipeline: Pipeline, run: Path, how: Judging) -> dict[str, Any]:
    """A student at each number of calls, as it recommends, and what its teaching took; any model that is no student, or
    that recommends guidance, whose steps are two calls, by the best way that is found for it.
    """
    facts, row = pipeline.model.facts, dict[str, Any]()
    searched = facts.get("method") is None or pipeline.settings().steers
    for calls in how.calls:
        found = (
            best_of(pipeline, run, calls, how)
            if searched
            else judged(pipeline, how.per_task, how.held_out, JUDGE, steps=calls)
        )
        row[str(calls)] = found["overall"]
        row[f"{calls} interval"] = [found["low"], found["high"]]
        row |= {f"{calls} {name}": found[name] for name in ("held out", "way", "won") if name in found}
        row |= {"metric": found["metric"]} if "metric" in found else {}
    row |= {} if searched else {"recommended": pipeline.settings().steps}
    row |= {**how.facts(), "method": facts.get("method"), "images": facts.get("images")}
    return row | {name: facts[name] for name in ("teacher", "start") if name in facts} | taken(run)


def taken(run: Path) -> dict[str, Any]:
    """Seconds, and the machine or the machines, of a run's training; null where the run does not know."""
    parts = timing(run)
    machines = [{name: one[name] for name in ("machine", "threads", "precision")} for one in parts]
    known = [one for i, one in enumerate(machines) if one not in machines[:i]]
    seconds = round(sum(one["seconds"] for one in parts), 1) if parts else None
    return {"seconds": seconds, "trained_on": known[0] if len(known) == 1 else known or None}

"""What is wrong with a raw configuration beyond its schema: slots against the catalogue, and parts against each other.

Everything is looked for at once, so that one reading of the errors is enough. Each problem says where it is, what was
seen, and a fix. Nothing that is named is imported: its options are read from its source (see `sfumato.signatures`).
"""

from collections.abc import Iterator
from typing import Any

from sfumato.catalogue import KINDS, METHODS, OBJECTIVES
from sfumato.config import CACHE, objective_of, source_of
from sfumato.errors import ConfigError
from sfumato.names import spelled_out
from sfumato.registry import Problem, check

# Where the slots are, and of what kind: what is checked against the catalogue.
SLOTS = {
    "data": "Data",
    "model.path": "Path",
    "model.prediction": "Prediction",
    "model.time_input": "TimeInput",
    "model.scale_input": "ScaleInput",
    "model.net": "Net",
    "model.codec": "Codec",
    "model.conditioner": "Conditioner",
    "objective": "Objective",
    "teacher_guidance": "Guidance",
    "objective.times": "Density",
    "objective.weight": "Weight",
    "objective.space": "Prediction",
    "objective.coupling": "Coupling",
    "objective.distance": "Distance",
    "objective.discriminator": "Discriminator",
    "objective.grid": "Grid",
    "objective.solver": "Sampler",
    "objective.fake_times": "Density",
    "objective.heads": "Heads",
    "objective.scored": "Density",
    "sampling.sampler": "Sampler",
    "sampling.grid": "Grid",
    "pairs.sampler": "Sampler",
    "pairs.grid": "Grid",
    "sampling.guidance": "Guidance",
}
NAMED_OTHERWISE = ("sampling.sampler", "sampling.grid", "pairs.sampler", "pairs.grid")
ALONE = "autoencoder"  # the objective that trains the codec, and no network


def slot_problems(raw: dict[str, Any]) -> Iterator[Problem]:
    """What is wrong with the slots of a raw configuration."""
    yield from _misplaced(raw)
    for where, kind_of in SLOTS.items():
        slot = dig(raw, where)
        if where in ("teacher_guidance", "sampling.guidance") and isinstance(slot, (int, float)):
            continue
        if where == "data" and isinstance(slot, dict):
            said, slot = slot.get(CACHE), source_of(slot)
            if not (said is None or isinstance(said, (str, bool))) or said == "":
                yield Problem("data.cache", "is a folder, true or false", repr(said), "data.cache=true")
        if slot is not None and where in NAMED_OTHERWISE:  # these have other names, too
            try:
                name = where.rpartition(".")[2]
                slot = spelled_out({name: slot})[name]
            except ConfigError as error:
                yield Problem(where, error.what.removeprefix(f"{name} "), str(error.seen), str(error.fix))
                continue
        if slot is not None and not (
            where.count(".") and where.startswith("objective")
        ):  # nested ones are checked by theirs
            yield from check(slot, kind_of, KINDS, where)
    optim = raw.get("optim", {})
    if isinstance(optim, dict):
        options = optim.get("options", {})
        slot = {"kind": optim.get("kind", "adamw")} | (options if isinstance(options, dict) else {})
        for problem in check(slot, "Optimizer", KINDS, "optim"):
            inside = problem.where.removeprefix("optim.")
            yield problem._replace(where=f"optim.options.{inside}" if problem.where != "optim" else "optim.kind")


def start_problems(raw: dict[str, Any]) -> Iterator[Problem]:
    """What is wrong with where a run is to start from, and with whom it learns from."""
    yield from _teacher_problems(raw)
    yield from _critic_problems(raw)
    if raw.get("model") is None and raw.get("start") is None and raw.get("teacher") is None:
        yield Problem("model", "is missing", "", "start=MODEL trains a model further")
    if raw.get("lora") is not None and raw.get("start") is None and raw.get("teacher") is None:
        yield Problem("lora", "changes a model, and none is named", "", "start=MODEL")
    if raw.get("control") is not None and raw.get("start") is None:
        yield Problem("control", "is of a model, and none is named", "", "start=MODEL")
    if raw.get("control") is not None and raw.get("lora") is not None:
        yield Problem("control", "is trained alone", "lora", "lora=null")
    if raw.get("reparameterise") is not None:
        for key in ("start", "model"):
            if raw.get(key) is None:
                yield Problem(key, "is needed, where one network is made over into another", "", "reparameterise=null")
        for key in ("teacher", "lora", "control"):
            if raw.get(key) is not None:
                yield Problem("reparameterise", f"is a run of its own, without {key}", "", f"{key}=null")


def _teacher_problems(raw: dict[str, Any]) -> Iterator[Problem]:
    """A method without its teacher, a teacher without a method, and what cannot be trained by one."""
    kind, teacher = objective_of(raw), raw.get("teacher")
    method = METHODS.get(kind)
    if raw.get("pairs") is not None and kind in OBJECTIVES and not (method and method.pairs):
        fix = "an objective of: " + ", ".join(name for name, one in METHODS.items() if one.pairs)
        yield Problem("pairs", f"are nothing that the objective {kind} learns from", str(raw["pairs"]), fix)
    if method is None:
        if teacher is not None and kind in OBJECTIVES:
            fix = "an objective of: " + ", ".join(METHODS)
            yield Problem("objective", "has nothing to learn from a teacher", kind, fix)
        return
    if method.teacher == "needed" and teacher is None:
        yield Problem("teacher", f"is needed by the objective {kind}", "", "teacher=runs/quickstart")
    if method.teacher == "none" and teacher is not None:
        yield Problem("teacher", f"has nothing to say in the objective {kind}", str(teacher), f"start={teacher}")
    if raw.get("control") is not None:
        yield Problem("control", f"is not trained by the objective {kind}", "", "objective=denoising")


def _critic_problems(raw: dict[str, Any]) -> Iterator[Problem]:
    """A rate of learning for a critic, where there is none."""
    rate, kind = dig(raw, "optim.critic_lr"), objective_of(raw)
    if rate is None or kind not in OBJECTIVES or ((method := METHODS.get(kind)) and method.critic):
        return
    if kind != ALONE or dig(raw, "objective.discriminator") is None:
        what = f"is of a critic, and the objective {kind} has none"
        yield Problem("optim.critic_lr", what, str(rate), "optim.critic_lr=null")


def _misplaced(raw: dict[str, Any]) -> Iterator[Problem]:
    """A network where an autoencoder is trained, or none where something else is."""
    model = raw.get("model")
    if not isinstance(model, dict) or "net" not in model:
        return
    kind, alone = objective_of(raw), model["net"] is None
    if kind == ALONE and not alone:
        yield Problem("model.net", "is not trained by the objective autoencoder", str(model["net"]), "model.net=null")
    elif alone and kind in OBJECTIVES and kind != ALONE:
        fix = "model.net=dit, or objective=autoencoder"
        yield Problem("model.net", f"is needed by the objective {kind}", "null", fix)


def dig(raw: Any, dotted: str) -> Any:
    """The value at a dotted key, or None."""
    for part in dotted.split("."):
        raw = raw.get(part) if isinstance(raw, dict) else None
    return raw

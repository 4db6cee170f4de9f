"""What cannot be taught: combinations of a method, a student and a teacher that are refused before anything is written.

What a method asks is in its line of `sfumato.catalogue.METHODS`; what of it depends on its options, the objective says
itself (`sfumato.objectives.teaching.Suits`). A mismatch would else be met at the first step or, worse, be no error and
numbers that are not finite. What a schema can tell is refused earlier, with the other faults of a configuration.
"""

from functools import cache, partial

import torch
from torch import nn

from sfumato.catalogue import build
from sfumato.conditioners import silent
from sfumato.config import Config
from sfumato.denoiser import VARIANCE, Denoiser
from sfumato.errors import ConfigError
from sfumato.forwards import weaker
from sfumato.model import Model
from sfumato.names import spelled_out
from sfumato.objectives.teaching import Suits, Teacher, Tells, check_said
from sfumato.settings import fitted_grid
from sfumato.train.start import Start
from sfumato.train.teaching import guidance_of

PROBED = (32, 32)  # a size: where a grid begins does not hang on it


def check_possible(config: Config, start: Start | None, teacher: Model | None) -> None:
    """ConfigError, with the reason and a way out, for a method that its student or teacher cannot take.

    config: completed by the model to start from, which is `start`. teacher: read. Nothing is said of a configuration
    that has no method.
    """
    line, section = config.method, config.model
    if line is None or section is None:
        return
    objective = build(config.objective, "Objective")
    told = tuple(objective.told) if isinstance(objective, Tells) else line.told
    if told and config.lora is not None:
        seen, what = ", ".join(told), "a low-rank change has no layers for a number that is told"
        raise ConfigError(what, where="lora", seen=seen, fix="lora=null, or an objective that tells nothing")
    if start is not None and VARIANCE in start.spec["model"].get("answers", ()):
        what, seen = "a student learns no variance, and the network that it begins with says one", VARIANCE
        fix = "a model that answers x0 alone, or a model section of the student's own"
        raise ConfigError(what, where=config.start_key, seen=seen, fix=fix)
    if teacher is not None:
        _check_teacher(config, teacher)
    if isinstance(objective, Suits):
        objective.suits(_speaking(config), None if teacher is None else teacher.denoiser)


def _check_teacher(config: Config, teacher: Model) -> None:
    """A teacher says means of what its student sees, under a guidance that can be asked for one sample at a time."""
    section = config.model
    assert section is not None
    if "x0" not in teacher.answers:
        seen = f"a model that answers {', '.join(teacher.answers)}"
        what, fix = "a teacher is asked for E[x0 | x_t]", "the model that this one was distilled from"
        raise ConfigError(what, where="teacher", seen=seen, fix=fix)
    own, other = str(section.codec["kind"]), str(teacher.spec["model"]["codec"]["kind"])
    if (own == "pixels") != (other == "pixels"):
        what, seen = "a teacher sees pictures as its student does", f"{other}, and a student of {own}"
        raise ConfigError(what, where="model.codec", seen=seen, fix="no model section: it starts as its teacher")
    if config.pairs is not None:
        grid = fitted_grid(spelled_out({"grid": config.pairs.grid})["grid"], *PROBED)
        path = teacher.denoiser.path
        begins = build(grid, "Grid")(path, config.pairs.steps)[0]
        check_said(teacher.denoiser, path, begins, "pairs.grid", "teacher")
    elif teacher.conditioner is not None:  # pairs are made along a grid, like samples, by any guidance
        cond, guidance = teacher.cond([silent({}, teacher.conditioner.kept)]), guidance_of(config, teacher)
        variants = cache(partial(weaker, teacher.denoiser, device=torch.device("cpu")))
        Teacher(teacher.denoiser, cond, lambda: cond, guidance, variants=variants).check()


def _speaking(config: Config) -> Denoiser:
    """How the student speaks, without its network."""
    section = config.model
    assert section is not None
    return Denoiser(nn.Identity(), build(section.path, "Path"), build(section.prediction, "Prediction"))

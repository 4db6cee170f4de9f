"""Students: models that learn from another, by an objective of `METHODS`.

A student is the model that will be kept, with those who take part in its training around it: a teacher, which is read
anew where a run goes on; a slow copy of its network and a critic, which are in checkpoints and not in the model. Where
it starts from a model, its network is told what the method needs to tell it by new layers that say nothing at first.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from sfumato.catalogue import KINDS, build
from sfumato.catalogue import Method as Line
from sfumato.conditioners import Raw, silent
from sfumato.config import Config
from sfumato.denoiser import Cond, Denoiser
from sfumato.errors import CheckpointError, ConfigError
from sfumato.forwards import weaker
from sfumato.guidance import Guidance, Variants
from sfumato.io.models import model_folder, read_model
from sfumato.model import Model, build_model
from sfumato.objectives.teaching import Follows, Judges, Lesson, Teacher, Tells
from sfumato.registry import options_of, target_of
from sfumato.settings import Settings
from sfumato.train.keys import key
from sfumato.train.start import Start, way_to

BOUNDARY = 0.03  # the noise level below which a student that predicts x0 is given x itself
SLOW, CRITIC = "slow", "critic"  # the parts beside a student's own
EMBEDDED = 256  # the width at which published latent consistency models embed the guidance


class Student(Model):
    """A model with those who take part in its training. Weights are also under `slow.` and `critic.`, where it has
    such; they are not kept.

    teacher: not one of its modules: it neither learns nor is saved. guidance: how the teacher is guided. stored: where
    conditions are kept that need not be read again, for a teacher who reads the same.
    """

    def __init__(self, model: Model, steps: int) -> None:
        super().__init__(model.denoiser, model.conditioner, model.codec, model.spec)
        self.facts, self.steps = model.facts, steps
        self.slow: Denoiser | None = None
        self.critic: nn.Module | None = None
        self.follow: Follows | None = None
        self.stored: Callable[[Sequence[Raw]], Cond] | None = None
        self._teacher: tuple[Model, Guidance] | None = None
        self._weaker: Variants | None = None  # what the teacher's guidance may steer away from, each made once
        self._read: tuple[Sequence[Raw], Cond] | None = None  # the last conditions, where a teacher reads the same
        self._own = (_told_scales(self.denoiser),)  # in a tuple, it is no part of its own

    def learner(self, step: int | None, raw: Sequence[Raw]) -> Lesson:
        kept = () if self.conditioner is None else self.conditioner.kept
        none = [silent(one, kept) for one in raw]
        slow = None if self.slow is None else _told_scales(self.slow)
        null = partial(self._cond, self, none)
        return Lesson(self._own[0], self.bound(raw), slow, self.critic, step, self.steps, null)

    @torch.no_grad()
    def learned(self, step: int, steps: int) -> None:
        if self.follow is None or self.slow is None:
            return
        kept = self.follow.follow(step, steps)
        if kept < 1:
            both = zip(self.slow.net.parameters(), self.net.parameters(), strict=True)
            pairs = [(slow, own) for slow, own in both if slow is not own]
            torch._foreach_lerp_([slow for slow, _ in pairs], [own for _, own in pairs], 1 - kept)

    def moving(self) -> dict[str, Tensor]:
        own = {name: p for name, p in self.trained().items() if self.slow is not None and name.startswith("net.")}
        follows = {} if self.slow is None else dict(self.slow.net.named_parameters())
        beside = {f"{SLOW}.{name}": p for name, p in follows.items() if f"net.{name}" in own}
        return super().moving() | {name: p.detach() for name, p in beside.items()}

    def is_kept(self, name: str) -> bool:
        return not name.startswith((f"{SLOW}.", f"{CRITIC}."))

    def clipped(self) -> list[list[nn.Parameter]]:
        """The student and its critic each for itself: the gradients of one say nothing of the other's."""
        named = self.trained()
        parts = [[p for name, p in named.items() if self.is_kept(name) == kept] for kept in (True, False)]
        return [part for part in parts if part]

    def compiled(self) -> list[nn.Module]:
        beside = [None if self.slow is None else self.slow.net, self._teacher and self._teacher[0].net]
        return [self.net, *(one for one in beside if one is not None)]

    def parts(self) -> dict[str, nn.Module]:
        beside = {SLOW: None if self.slow is None else self.slow.net, CRITIC: self.critic}
        return super().parts() | {name: one for name, one in beside.items() if one is not None}

    def taught_by(self, teacher: Model, guidance: Guidance) -> None:
        """Gives it a teacher. Where both read alike, they read once."""
        own = self.conditioner
        if own is not None and teacher.conditioner is not None and _alike(self, teacher):
            teacher.conditioner = own
        self._teacher = (teacher, guidance)
        device = next((p.device for p in teacher.net.parameters()), torch.device("cpu"))
        self._weaker = cache(partial(weaker, teacher.denoiser, device=device))

    @property
    def teacher(self) -> tuple[Model, Guidance] | None:
        """Who teaches it, and how that one is guided."""
        return self._teacher

    def cond(self, raw: Sequence[Raw]) -> Cond:
        if self.stored is not None:
            return self.stored(raw)
        if self._read is None or self._read[0] is not raw:
            shared = self._teacher is not None and self._teacher[0].conditioner is self.conditioner
            if not shared:
                return super().cond(raw)
            self._read = (raw, super().cond(raw))
        return self._read[1]

    def bound(self, raw: Sequence[Raw]) -> Teacher | None:
        """The teacher with the conditions of a batch filled in."""
        if self._teacher is None:
            return None
        teacher, guidance = self._teacher
        kept = () if teacher.conditioner is None else teacher.conditioner.kept
        reads = self if teacher.conditioner is self.conditioner else teacher
        null = partial(self._cond, reads, [silent(one, kept) for one in raw])
        return Teacher(teacher.denoiser, self._cond(reads, raw), null, guidance, self.denoiser.path, self._weaker)

    @staticmethod
    @torch.no_grad()
    def _cond(model: Model, raw: Sequence[Raw]) -> Cond:
        return model.cond(raw)


def as_student(config: Config, begun: Start | None) -> tuple[Config, Start | None]:
    """The configuration of a student, and what it starts from, with what its method asks of the network: what it
    answers, the numbers that it is told, and what its answer is at the data. New layers are drawn by the run's seed.
    Both are what they were where there is no method.
    """
    if config.method is None:
        return config, begun
    line, method = _method(config), build(config.objective, "Objective")
    told = tuple(method.told) if isinstance(method, Tells) else ()
    assert config.model is not None  # its own, or that of its start
    section = config.model.model_dump(mode="json")
    found = {**section, "net": _telling(section["net"], told), "answers": list(line.answers)}
    if line.boundary and section["prediction"]["kind"] == "x0":
        # nearly what it was, and x itself at the data; the level is written out, for a model must not hang on a default
        found["prediction"] = {"kind": "bounded", "level": BOUNDARY}
    changed = type(config.model).model_validate(found)
    config = config.model_copy(update={"model": changed})
    if begun is None:
        return config, None
    spec = {**begun.spec, "model": changed.model_dump(mode="json")}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(key(config.seed, "told"))
        fresh = build_model(spec, files=begun.files).weights() if told else {}
    return config, Start(spec, {**fresh, **begun.weights}, begun.files, begun.where)


def _telling(net: Mapping[str, Any], told: Sequence[str]) -> dict[str, Any]:
    """The slot of a network that is told these numbers. A U-Net of Stable Diffusion has an embedding of the guidance of
    its own, which others read too.
    """
    target = target_of(str(net["kind"]), KINDS["Net"])
    embeds = target is not None and "guidance_dim" in (options_of(target) or {})
    if embeds and "guidance" in told and "guidance" not in net.get("told", ()):
        net = {**net, "guidance_dim": net.get("guidance_dim") or EMBEDDED}
        told = [one for one in told if one != "guidance"]
    all_told = list(dict.fromkeys([*net.get("told", ()), *told]))
    return {**net, "told": all_told} if all_told else dict(net)


class _ByWeight(nn.Module):
    """A network that is told scales, around one that is told the weight scale - 1, as latent consistency models are."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor, t: Tensor, *, guidance: Tensor | None = None, **cond: Tensor) -> Tensor:
        if guidance is not None:
            cond["guidance"] = guidance - 1
        said: Tensor = self.net(x, t, **cond)
        return said


def _told_scales(denoiser: Denoiser) -> Denoiser:
    """A denoiser whose network is told scales of guidance, whatever it takes for them."""
    if not getattr(getattr(denoiser.net, "config", None), "guidance_dim", 0):
        return denoiser
    parts = (denoiser.path, denoiser.prediction, denoiser.time_input, denoiser.scale_input, denoiser.answers)
    return Denoiser(_ByWeight(denoiser.net), *parts)


def student_of(
    model: Any, config: Config, objective: Any, device: torch.device, teacher: Model | None = None
) -> Student:
    """A model, ready to learn by the configured method: with its teacher, which is read unless it was already, its slow
    copy and its critic.
    """
    line = _method(config)
    if not isinstance(model, Model):
        raise ConfigError("this objective trains a network", where="model.net", seen="null", fix="model.net=dit")
    student = Student(model, config.steps)
    if config.teacher is not None:
        teacher = (teacher or read_teacher(config.teacher)).to(device)
        if student.conditioner is not None and config.start is not None:
            student.conditioner.requires_grad_(False)  # what it was taught to read stays
        student.taught_by(teacher, guidance_of(config, teacher))
    if line.slow == "needed" or (line.slow and config.lora is None):
        assert isinstance(objective, Follows)
        student.slow, student.follow = copied(student.denoiser), objective
    if line.critic:
        assert isinstance(objective, Judges)
        torch.manual_seed(key(config.seed, CRITIC))
        judged = line.critic == "teacher" and teacher is not None
        student.critic = objective.critic(teacher.denoiser if judged and teacher else student.denoiser)
    return student


def copied(denoiser: Denoiser) -> Denoiser:
    """A frozen copy of what of a denoiser learns; what stands still is the same tensors in both."""
    shared = {id(p): p for p in denoiser.parameters() if not p.requires_grad}
    return copy.deepcopy(denoiser, shared).requires_grad_(False)


def read_teacher(path: str) -> Model:
    """A frozen model to learn from: of a run, a model directory, a folder of diffusers or a file."""
    folder = model_folder(path)
    if not folder.exists():
        raise CheckpointError("there is no teacher to learn from", where="teacher", seen=path, fix=way_to(path))
    return read_model(folder).eval().requires_grad_(False)


def guidance_of(config: Config, teacher: Model) -> Guidance:
    """How a teacher is guided: as configured, or as it recommends. Its conditions are not filled in."""
    said = config.teacher_guidance
    if said is not None:
        return Settings(guidance=said).unfilled
    own = teacher.spec["sampling"]
    recommended = {name: own[name] for name in ("guidance", "interval", "rescale") if own.get(name) is not None}
    return Settings(**recommended).unfilled


def _method(config: Config) -> Line:
    line = config.method
    assert line is not None
    return line


def _alike(student: Model, teacher: Model) -> bool:
    """Whether two models read what they are told in the same way, with the same weights that stand still."""
    own, other = student.conditioner, teacher.conditioner
    assert own is not None and other is not None
    if student.spec["model"]["conditioner"] != teacher.spec["model"]["conditioner"] or own.files() != other.files():
        return False
    mine, theirs = own.state_dict(), other.state_dict()
    frozen = not any(p.requires_grad for p in own.parameters())
    return frozen and mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)

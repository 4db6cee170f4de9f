"""Students in the training loop: what is kept, what goes on, and what cannot be."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import bytes_of, kept, rows_of, stopped
from torch import Generator, Tensor, nn

from sfumato import load
from sfumato.adapters.parts import parts_of
from sfumato.adapters.reading import read_adapter
from sfumato.catalogue import METHODS, OBJECTIVES, Method
from sfumato.config import Config
from sfumato.denoiser import Cond, Denoiser
from sfumato.errors import CheckpointError, ConfigError
from sfumato.guidance import APG, CFG, Distilled, Unguided
from sfumato.io.directory import load_model
from sfumato.objectives import Loss
from sfumato.objectives.latent_consistency import LatentConsistency
from sfumato.objectives.teaching import Lesson
from sfumato.overlay import as_yaml, load_config, resolved
from sfumato.paths import Cosine, noised
from sfumato.train import checkpoint, train
from sfumato.train.run import Run
from sfumato.train.teaching import Student

LCM = "objective={kind: latent_consistency, points: 8, keep: 0.5}"
ROUNDS = "objective={kind: progressive, first: 4, last: 1}"
GUIDED = "objective={kind: guidance}"
TOLD = "objective={kind: guidance, scales: [1, 4]}"
SAMPLED = "sampling={sampler: lcm, grid: linear, steps: 2, guidance: 1}"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a few steps, to be a teacher."""
    from tests.train.conftest import small

    folder = tmp_path_factory.mktemp("base") / "run"
    train(small("steps=3", "checkpoint.every=3", "optim={lr: 0.02, warmup: 0}"), run=folder)
    return folder


def taught(base: Path, *overrides: str) -> Config:
    """A student's configuration, with no model section of its own."""
    from tests.train.conftest import SMALL

    raw = dict(resolved(load_config(str(SMALL)).config), name="student", model=None, steps=3)
    del raw["sampling"]
    raw |= {"teacher": str(base), "objective": {"kind": "guidance"}, "condition_dropout": 0.0}
    file = base.parent / "student.yaml"
    file.write_text(as_yaml(raw))
    return load_config(str(file), overrides).config


# from a teacher to a student that can be used


@pytest.mark.parametrize("objective", [LCM, ROUNDS, GUIDED, TOLD], ids=["lcm", "rounds", "guided", "told"])
def test_a_student_is_a_model_that_draws(base: Path, tmp_path: Path, objective: str) -> None:
    told = "scales" in objective
    guidance = "{kind: distilled, scale: 2}" if told else "1"
    sampler = "lcm" if objective == LCM else "ddim"
    sampling = f"sampling={{sampler: {sampler}, grid: linear, steps: 2, guidance: {guidance}}}"
    train(taught(base, objective, sampling), run=tmp_path / "run")
    teacher, student = load_model(base / "model"), load_model(tmp_path / "run/model")
    assert student.answers == (("endpoint",) if objective == LCM else ("x0",))
    assert student.facts["teacher"] == str(base)
    new = student.weights().keys() - teacher.weights().keys()
    assert all("numbers" in name for name in new) and bool(new) == told
    moved = [name for name, value in teacher.weights().items() if not torch.equal(value, student.weights()[name])]
    assert moved and all(name.startswith("net.") for name in moved)  # what it reads with stands still
    assert len(rows_of(tmp_path / "run")) == 3
    pictures = load(tmp_path / "run", "cpu").sample("a red square", seeds=3).images
    assert pictures.shape == (1, 32, 32, 3)
    if told:
        other = load(tmp_path / "run", "cpu").sample("a red square", seeds=3, guidance=4.0)
        assert other.settings[0]["guidance"] == {"kind": "distilled", "scale": 4.0}


def test_what_is_told_says_nothing_at_first(base: Path, tmp_path: Path) -> None:
    """So a student begins with what its teacher says, whatever the scale."""
    train(taught(base, TOLD, "steps=1", "optim={lr: 1.0e-12, warmup: 0}"), run=tmp_path / "run")
    teacher, student = load_model(base / "model").eval(), load_model(tmp_path / "run/model").eval()
    x, t, raw = torch.randn(3, 3, 32, 32), torch.tensor([0.2, 0.5, 0.9]), [{"caption": "a red square"}] * 3
    with torch.no_grad():
        cond = student.cond(raw)
        said = student(x, t, {**cond, "guidance": torch.tensor([1.0, 2.0, 7.0])})
        torch.testing.assert_close(said, teacher(x, t, teacher.cond(raw)), rtol=1e-4, atol=1e-5)


def test_a_student_may_have_a_path_and_a_network_of_its_own(base: Path, tmp_path: Path) -> None:
    from tests.train.conftest import small

    config = small(f"teacher={base}", LCM, "model.path=cosine", "model.net.dim=24", "steps=2", SAMPLED)
    assert config.start is None
    train(config, run=tmp_path / "run")
    student = load_model(tmp_path / "run/model")
    assert student.spec["model"]["net"]["dim"] == 24 and student.denoiser.path == Cosine()
    assert student.answers == ("endpoint",)


def test_a_student_may_start_from_another_model(base: Path, tmp_path: Path) -> None:
    train(taught(base, GUIDED, "steps=1"), run=tmp_path / "other")
    config = taught(base, LCM, f"start={tmp_path / 'other'}", "steps=1", "optim={lr: 1.0e-12, warmup: 0}", SAMPLED)
    train(config, run=tmp_path / "run")
    found, other = load_model(tmp_path / "run/model"), load_model(tmp_path / "other/model")
    for name, value in other.weights().items():
        torch.testing.assert_close(found.weights()[name], value, rtol=0, atol=1e-6)
    assert found.facts["start"] == str(tmp_path / "other") and found.facts["teacher"] == str(base)


# the slow copy, the critic, and runs that go on


@dataclass(frozen=True)
class Opposed:
    """A method for tests, with all that one may ask for: a critic that learns to tell the student's answers apart."""

    told: Sequence[str] = ()

    def follow(self, step: int, steps: int) -> float:
        return 0.75

    def critic(self, denoiser: Denoiser) -> nn.Module:
        return nn.Linear(3, 1)

    def __call__(self, lesson: Lesson, x0: Tensor, cond: Cond | None = None, rng: Generator | None = None) -> Loss:
        assert lesson.critic is not None and lesson.slow is not None
        t = 0.1 + 0.8 * torch.rand(len(x0), generator=rng)
        x_t = noised(lesson.path, x0, torch.randn(x0.shape, generator=rng), t)
        said: Tensor = lesson.student(x_t, t, cond)
        with torch.no_grad():
            target = 0.5 * lesson.taught(x_t, t) + 0.5 * lesson.slow(x_t, t, cond)
        each = (said - target).square().flatten(1).mean(1)
        judged = lesson.critic(said.detach().mean((2, 3))) - lesson.critic(target.mean((2, 3)))
        return Loss(each.mean() + nn.functional.softplus(judged).mean(), each.detach(), t)


@pytest.fixture
def opposed(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setitem(OBJECTIVES, "opposed", f"{__name__}:Opposed")
    monkeypatch.setitem(METHODS, "opposed", Method("for tests", slow="needed", critic="teacher"))  # type: ignore[index]
    return "objective={kind: opposed}"


@pytest.mark.parametrize("objective", [LCM, ROUNDS, TOLD, "opposed"])
def test_a_resumed_run_is_the_same_to_the_last_bit(base: Path, tmp_path: Path, objective: str, opposed: str) -> None:
    """Slow copy and critic included; also where a round ends between."""
    said = opposed if objective == "opposed" else objective
    config = taught(base, said, "steps=6", "checkpoint.every=6", "ema=[{decay: 0.9}, {decay: 0.5, warmup: false}]")
    train(config, run=tmp_path / "whole")
    stopped(config, tmp_path / "parts", 3)
    again = config if objective == TOLD else load_config(str(tmp_path / "parts/config.yaml")).config
    train(again, run=tmp_path / "parts", resume=True)
    whole, parts = kept(tmp_path / "whole"), kept(tmp_path / "parts")
    names = {name for name in whole if "step-00000006" in name or name.startswith("model")}
    assert {"model/model.safetensors", "model-1/model.safetensors"} <= names
    assert [name for name in sorted(names) if whole[name] != parts.get(name)] == []
    _, state = checkpoint.newest(tmp_path / "whole/checkpoints", print)
    beside = {name.partition(".")[0] for name in state.tensors["model"]}
    assert beside >= {LCM: {"slow"}, ROUNDS: {"slow"}, TOLD: set(), "opposed": {"slow", "critic"}}[objective]
    assert all(name.startswith(("net.", "conditioner.")) for name in load_model(tmp_path / "whole/model").weights())


def test_the_critic_learns_beside_the_student_and_is_not_kept(base: Path, tmp_path: Path, opposed: str) -> None:
    states = []
    for steps in (1, 4):
        train(taught(base, opposed, f"steps={steps}", f"checkpoint.every={steps}"), run=tmp_path / f"run{steps}")
        states.append(checkpoint.newest(tmp_path / f"run{steps}/checkpoints", print)[1].tensors)
    assert not torch.equal(*(state["model"]["critic.weight"] for state in states))
    assert not any(name.startswith(("critic", "slow")) for name in states[1]["ema-0"])


def begun(config: Config, folder: Path) -> Run:
    """A student's run that has made its first steps."""
    train(config, run=folder)
    return Run(load_config(str(folder / "config.yaml")).config, folder, True)


def test_the_slow_copy_follows_by_the_methods_word(base: Path, tmp_path: Path) -> None:
    train(taught(base, LCM, "steps=1", "checkpoint.every=1", SAMPLED), run=tmp_path / "run")
    weights = checkpoint.newest(tmp_path / "run/checkpoints", print)[1].tensors["model"]
    teacher = load_model(base / "model").weights()
    moved = 0
    for name, value in weights.items():
        if name.startswith("slow."):
            own, before = weights[name.replace("slow.", "net.")], teacher[name.replace("slow.", "net.")]
            torch.testing.assert_close(value, (before + own) / 2, rtol=0, atol=1e-6)
            moved += int(not torch.equal(own, before))
    assert moved > 5


def test_at_the_end_of_a_round_the_copy_is_the_student(base: Path, tmp_path: Path) -> None:
    config = taught(base, ROUNDS, "steps=6", "checkpoint={every: 1, keep: 6}")  # rounds of 2 steps each
    train(config, run=tmp_path / "run")
    tensors = []
    for path in sorted(checkpoint.found(tmp_path / "run/checkpoints")):
        tensors.append(checkpoint.load(path).tensors["model"])
    teacher = load_model(base / "model").weights()
    name = next(one for one in tensors[0] if one.startswith("net.") and not torch.equal(tensors[0][one], teacher[one]))
    slow = name.replace("net.", "slow.", 1)
    assert torch.equal(tensors[0][slow], teacher[name])
    assert torch.equal(tensors[1][slow], tensors[1][name]) and torch.equal(tensors[2][slow], tensors[1][name])
    assert torch.equal(tensors[3][slow], tensors[3][name]) and torch.equal(tensors[5][slow], tensors[3][name])
    assert not torch.equal(tensors[5][name], tensors[3][name])


def test_a_method_counts_the_updates_that_were_made(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A round ends with a copy, whatever steps were skipped."""
    seen: list[int | None] = []
    plain = LatentConsistency.__call__

    def noting(self: LatentConsistency, lesson: Lesson, *rest: Any) -> Loss:
        seen.append(lesson.step)
        loss = plain(self, lesson, *rest)
        return loss._replace(value=loss.value * float("nan")) if len(seen) == 2 else loss

    monkeypatch.setattr(LatentConsistency, "__call__", noting)
    train(taught(base, LCM, "steps=4", SAMPLED), run=tmp_path / "run")
    assert seen == [0, 1, 1, 2]


# a low-rank student


def test_a_low_rank_student_is_an_adapter_of_its_teacher(base: Path, tmp_path: Path) -> None:
    config = taught(base, LCM, "lora={rank: 2, alpha: 8}", "optim={lr: 0.3, warmup: 0}", SAMPLED)
    train(config, run=tmp_path / "run")
    _, state = checkpoint.newest(tmp_path / "run/checkpoints", print)
    assert all(".lora_" in name and not name.startswith("slow") for name in state.tensors["model"])
    assert read_adapter(tmp_path / "run/lora.safetensors", parts_of(load_model(base / "model"))).ranks == [2]
    merged = load(tmp_path / "run", "cpu").sample("a red square", seeds=1).images
    pipeline = load(base, "cpu")
    few = {"sampler": {"kind": "lcm", "to": "x0"}, "grid": "linear", "steps": 2, "guidance": 1.0, "seeds": 1}
    plain = pipeline.sample("a red square", **few).images
    pipeline.load_lora(tmp_path / "run/lora.safetensors")
    beside = pipeline.sample("a red square", **few).images
    assert abs(beside.astype(int) - merged).max() <= 1 and abs(beside.astype(int) - plain).max() > 2


def test_a_low_rank_student_may_teach_the_next(base: Path, tmp_path: Path) -> None:
    """In each round but the first its frozen copy teaches it: of the factors, for all else is the same tensors."""
    config = taught(base, ROUNDS, "lora={rank: 2, alpha: 8}", "optim={lr: 0.3, warmup: 0}", "steps=6")
    config = config.model_copy(update={"checkpoint": config.checkpoint.model_copy(update={"every": 1, "keep": 6})})
    train(config, run=tmp_path / "whole")
    tensors = [
        checkpoint.load(one).tensors["model"] for one in sorted(checkpoint.found(tmp_path / "whole/checkpoints"))
    ]
    own = [name for name in tensors[0] if name.startswith("net.")]
    assert own and tensors[0].keys() == {*own, *(name.replace("net.", "slow.", 1) for name in own)}
    assert all(".lora_" in name for name in own)

    def follows(step: int, copied: int) -> bool:
        pairs = [(tensors[step - 1][name.replace("net.", "slow.", 1)], tensors[copied - 1][name]) for name in own]
        return all(torch.equal(slow, was) for slow, was in pairs)

    # rounds of two steps: a copy after the second and the fourth
    assert (
        not follows(1, 1) and follows(2, 2) and follows(3, 2) and follows(4, 4) and follows(5, 4) and not follows(5, 5)
    )
    stopped(config, tmp_path / "parts", 3)
    train(load_config(str(tmp_path / "parts/config.yaml")).config, run=tmp_path / "parts", resume=True)
    whole, parts = kept(tmp_path / "whole"), kept(tmp_path / "parts")
    names = [name for name in whole if "step-00000006" in name or name.startswith(("model", "lora"))]
    assert len(names) > 4 and [name for name in names if whole[name] != parts.get(name)] == []
    assert load_model(tmp_path / "whole/model").weights().keys() == load_model(base / "model").weights().keys()
    assert read_adapter(tmp_path / "whole/lora.safetensors", parts_of(load_model(base / "model"))).ranks == [2]


def test_what_stands_still_is_not_copied(base: Path, tmp_path: Path) -> None:
    run = begun(taught(base, ROUNDS, "lora.rank=2", "steps=4", "checkpoint.every=2"), tmp_path / "run")
    model = run.model
    run.close()
    assert isinstance(model, Student) and model.slow is not None
    both = list(zip(model.slow.net.named_parameters(), model.net.named_parameters(), strict=True))
    shared = {name: slow is own for (name, slow), (_, own) in both}
    assert all(same == (".lora_" not in name) for name, same in shared.items()) and not all(shared.values())


# what cannot be


def test_what_cannot_be_meant_is_named(base: Path, tmp_path: Path) -> None:
    from tests.train.conftest import small

    with pytest.raises(ConfigError, match=r"teacher is needed by the objective latent_consistency"):
        small(LCM)
    with pytest.raises(ConfigError, match="nothing to learn from a teacher"):
        small(f"teacher={base}")
    with pytest.raises(ConfigError, match="no layers for a number that is told"):
        train(taught(base, TOLD, "lora.rank=2"), run=tmp_path / "a")
    with pytest.raises(CheckpointError, match="no teacher to learn from"):
        train(small(f"teacher={tmp_path / 'nowhere'}", LCM), run=tmp_path / "b")
    train(taught(base, LCM, "steps=1", SAMPLED), run=tmp_path / "ends")
    with pytest.raises(ConfigError, match="needs a teacher"):
        _ = Lesson(load_model(base / "model").denoiser).taught
    with pytest.raises(ConfigError, match=r"a teacher is asked for E\[x0 \| x_t\]"):
        train(taught(tmp_path / "ends", GUIDED), run=tmp_path / "c")
    with pytest.raises(ConfigError, match=r"objective.grid|unknown grid|no such"):
        taught(base, "objective={kind: latent_consistency, grid: lienar}")


def test_a_teachers_guidance_is_its_own_unless_said(base: Path) -> None:
    from sfumato.train.teaching import guidance_of, read_teacher

    teacher = read_teacher(str(base))
    assert guidance_of(taught(base), teacher) == CFG(scale=3.0)
    assert guidance_of(taught(base, "teacher_guidance=1"), teacher) == Unguided()
    assert guidance_of(taught(base, "teacher_guidance={kind: apg, scale: 4}"), teacher) == APG(scale=4.0)
    assert guidance_of(taught(base, "teacher_guidance={kind: distilled}"), teacher) == Distilled()
    assert not any(p.requires_grad for p in teacher.parameters()) and not teacher.training
    assert isinstance(Student(teacher, 3).learner(None, [{"caption": "a red square"}]), Lesson)
    assert bytes_of(base / "model")

"""Runs of methods with critics: who moves when, what is kept, and that a stopped run goes on to the last bit."""

from pathlib import Path

import pytest
import torch
from runs import kept, rows_of, stopped

from sfumato import load
from sfumato.config import Config
from sfumato.errors import ConfigError
from sfumato.io.directory import load_model, read_weights
from sfumato.overlay import as_yaml, load_config, resolved
from sfumato.train import checkpoint, train
from sfumato.train.optim import learning_rate
from sfumato.train.run import Run
from sfumato.train.start import read_start, with_start
from sfumato.train.teaching import BOUNDARY, Student, as_student

MATCHING = (
    "objective={kind: distribution_matching, at: [1.0, 0.5], every: 3, warmup: 2, heads: {kind: features, width: 8}}"
)
ADVERSARIAL = "objective={kind: adversarial, at: [1.0, 0.5], warmup: 1, heads: {kind: features, width: 8}}"
METHODS = {"matching": MATCHING, "adversarial": ADVERSARIAL}
methods = pytest.mark.parametrize("method", METHODS)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.train.conftest import small

    folder = tmp_path_factory.mktemp("teacher") / "run"
    train(small("steps=6", "optim={lr: 0.02, warmup: 0}"), run=folder)
    return folder


def student(teacher: Path, method: str, *overrides: str) -> Config:
    from tests.train.conftest import SMALL

    raw = dict(resolved(load_config(str(SMALL)).config), name="student", model=None)
    raw["sampling"] = {"sampler": "consistency", "grid": "linear", "steps": 2, "guidance": 1.0}
    file = teacher.parent / "student.yaml"
    file.write_text(as_yaml(raw))
    more = ("steps=8", "checkpoint.every=4", "optim={lr: 0.01, warmup: 0}", "validate={every: 4, holdout: 8}")
    return load_config(str(file), (f"teacher={teacher}", METHODS[method], *more, *overrides)).config


def begun(teacher: Path, folder: Path, method: str, *overrides: str) -> Run:
    """A student's run that has not made a step."""
    config = student(teacher, method, *overrides)
    config, start = as_student(with_start(config, found := read_start(str(config.start))), found)
    folder.mkdir()
    return Run(config, folder, False, start)


@pytest.mark.parametrize("optim", ["muon", "adamw"])
def test_where_the_student_stands_still_it_does_so_to_the_last_bit(teacher: Path, tmp_path: Path, optim: str) -> None:
    run = begun(teacher, tmp_path / "run", "matching", f"optim.kind={optim}", "optim.options={weight_decay: 0.1}")
    try:
        for step in range(8):
            before = {name: value.clone() for name, value in run.weights.items()}
            run._advance()
            changed = {name for name, value in run.weights.items() if not torch.equal(value, before[name])}
            of_student = {name for name in run.averaged if name in changed}
            moves = step < 2 or (step - 2) % 3 == 0
            assert bool(of_student) == moves, step
            assert changed - of_student, step
    finally:
        run.close()


@pytest.mark.parametrize("optim", ["muon", "adamw"])
@methods
def test_a_critic_may_learn_at_a_rate_of_its_own(teacher: Path, tmp_path: Path, method: str, optim: str) -> None:
    """By the same schedule; and where its rate is the student's, nothing is another to the last bit."""
    schedule = f"optim={{kind: {optim}, lr: 0.01, warmup: 4, decay: linear, decay_fraction: 0.25}}"
    for folder, rate in (("plain", "null"), ("same", 0.01)):
        train(student(teacher, method, schedule, f"optim.critic_lr={rate}"), run=tmp_path / folder)
    names = {name for name in kept(tmp_path / "plain") if "config" not in name and "log" not in name}
    one, other = kept(tmp_path / "plain"), kept(tmp_path / "same")
    assert [name for name in names if name.endswith(".safetensors") and one[name] != other[name]] == []

    run = begun(teacher, tmp_path / "own", method, schedule, "optim.critic_lr=1e-9")
    groups = run.optimizer.param_groups
    names_of = {p: name for name, p in run.weights.items()}
    assert sorted(names_of[p] for group in groups for p in group["params"]) == sorted(run.weights)
    assert all(len({run.model.is_kept(names_of[p]) for p in group["params"]}) == 1 for group in groups)
    try:
        before = {name: value.detach().clone() for name, value in run.weights.items()}
        for step in range(8):
            run._advance()
            for group in groups:
                share = 1.0 if run.model.is_kept(names_of[group["params"][0]]) else 1e-7
                assert group["lr"] == pytest.approx(share * learning_rate(step, run.config))
        for name, value in run.weights.items():
            moved = float((value.detach() - before[name]).abs().max())
            assert (moved < 1e-6) == (not run.model.is_kept(name)), name
    finally:
        run.close()


def test_a_rate_of_a_critic_that_there_is_not_is_named(teacher: Path) -> None:
    with pytest.raises(ConfigError, match=r"optim\.critic_lr is of a critic, and the objective guidance has none"):
        student(teacher, "matching", "objective={kind: guidance}", "optim.critic_lr=0.1")


@pytest.mark.parametrize("lora", ["null", "{rank: 2}"])
@methods
def test_a_resumed_run_is_the_same_to_the_last_bit(teacher: Path, tmp_path: Path, method: str, lora: str) -> None:
    train(student(teacher, method, f"lora={lora}"), run=tmp_path / "whole")
    stopped(student(teacher, method, f"lora={lora}"), tmp_path / "parts", 4)
    train(load_config(str(tmp_path / "parts/config.yaml")).config, run=tmp_path / "parts", resume=True)
    one, other = kept(tmp_path / "whole"), kept(tmp_path / "parts")
    assert one.keys() == other.keys()
    assert [name for name in one if one[name] != other[name]] == []


@pytest.fixture(scope="module")
def other(teacher: Path) -> tuple[Path, Path]:
    """A teacher that predicts x0, and its student by consistency distillation, which has a boundary."""
    from tests.train.conftest import small

    short = ("steps=4", "optim={lr: 0.02, warmup: 0}")
    train(small(*short, "model.prediction=x0"), run=(of_x0 := teacher.parent / "of_x0"))
    config = student(of_x0, "matching", "objective={kind: consistency_distillation, points: 8}", *short)
    train(config, run=(ends := teacher.parent / "ends"))
    return of_x0, ends


@methods
def test_a_student_may_begin_as_another_student_without_a_warm_up(
    other: tuple[Path, Path], tmp_path: Path, method: str
) -> None:
    """Its boundary comes along. The teacher judges, and the critic is made of the teacher."""
    (of_x0, ends), more = other, ("objective.warmup=0", "optim={lr: 0.002, warmup: 0}")
    run = begun(of_x0, tmp_path / "begun", method, f"start={ends}", *more)
    run.close()
    taught, first = load_model(of_x0 / "model").weights(), load_model(ends / "model").weights()
    assert isinstance(run.model, Student) and run.model.teacher is not None
    for own, theirs in ((run.model, first), (run.model.teacher[0], taught)):
        assert all(torch.equal(value, theirs[name]) for name, value in own.weights().items() if name in theirs)
    if method == "matching":
        fake = {name: value for name, value in run.weights.items() if name.startswith("critic.denoiser.")}
        assert fake and all(
            torch.equal(value, taught[name.removeprefix("critic.denoiser.")]) for name, value in fake.items()
        )
    train(student(of_x0, method, f"start={ends}", *more), run=tmp_path / "run")
    model = load_model(tmp_path / "run/model")
    assert model.spec["model"]["prediction"] == {"kind": "bounded", "level": BOUNDARY}
    assert model.facts["start"] == str(ends) and model.facts["teacher"] == str(of_x0)
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        cond = model.cond([{"caption": "a red square"}] * 2)
        torch.testing.assert_close(model(x, 1e-4, cond), x, rtol=0, atol=1e-3)
    assert not all(torch.equal(first[name], value) for name, value in model.weights().items())
    assert "regression" not in set().union(*rows_of(tmp_path / "run"))
    for steps in (1, 2):
        assert load(tmp_path / "run", "cpu").sample("a red square", steps=steps).images.shape == (1, 32, 32, 3)


@methods
def test_the_critic_is_in_checkpoints_and_not_in_the_model(teacher: Path, tmp_path: Path, method: str) -> None:
    train(student(teacher, method), run=tmp_path / "run")
    model = load_model(tmp_path / "run/model")
    assert model.answers == ("endpoint",) and not any("critic" in name for name in model.weights())
    newest = checkpoint.found(tmp_path / "run/checkpoints")[0]
    assert any(name.startswith("critic.") for name in read_weights(newest / "model.safetensors"))
    before = read_weights(teacher / "model/model.safetensors")
    assert not all(torch.equal(before[name], value) for name, value in model.weights().items())
    rows = rows_of(tmp_path / "run")
    assert {"discriminator"} <= set().union(*rows) and any("validation" in row for row in rows)
    for steps in (1, 2):
        assert load(tmp_path / "run", "cpu").sample("a red square", steps=steps).images.shape == (1, 32, 32, 3)


@pytest.mark.parametrize("net", ["dit", "unet"])
def test_a_second_head_learns_along_and_is_not_kept(tmp_path: Path, net: str) -> None:
    from tests.train.conftest import small

    shape = {
        "dit": "{told: [until]}",
        "unet": "{kind: unet, patch: 4, channels: [8, 16], blocks: 1, attention: [0, 1], told: [until]}",
    }
    config = small(
        f"model.net={shape[net]}",
        "model.answers=[jump]",
        "model.time_input=time",
        "objective={kind: improved_meanflow, head: auxiliary}",
        "steps=4",
        "checkpoint.every=4",
        "optim={lr: 0.01, critic_lr: 0.02, warmup: 0}",
    )
    train(config, run=tmp_path / "whole")
    stopped(config, tmp_path / "parts", 2)
    train(load_config(str(tmp_path / "parts/config.yaml")).config, run=tmp_path / "parts", resume=True)
    one, other = kept(tmp_path / "whole"), kept(tmp_path / "parts")
    assert [name for name in one if one[name] != other.get(name)] == []
    newest = read_weights(checkpoint.found(tmp_path / "whole/checkpoints")[0] / "model.safetensors")
    last = "head" if net == "dit" else "exit"
    heads = {name.removeprefix("critic.layer."): value for name, value in newest.items() if name.startswith("critic.")}
    firsts = {
        name.removeprefix(f"net.{last}."): value for name, value in newest.items() if name.startswith(f"net.{last}.")
    }
    assert heads.keys() == firsts.keys() and not all(torch.equal(heads[name], firsts[name]) for name in heads)
    assert not any("critic" in name for name in load_model(tmp_path / "whole/model").weights())
    assert {"error", "head"} <= set(rows_of(tmp_path / "whole")[0])


def test_a_low_rank_change_is_a_student_too(teacher: Path, tmp_path: Path) -> None:
    """Its critic is the whole network all the same."""
    train(student(teacher, "matching", "lora={rank: 2}", "steps=4"), run=tmp_path / "run")
    newest = read_weights(checkpoint.found(tmp_path / "run/checkpoints")[0] / "model.safetensors")
    before, after = load_model(teacher / "model").weights(), load_model(tmp_path / "run/model").weights()
    changed = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert changed and all("attention" in name or "feed" in name for name in changed)
    own = {name.removeprefix("critic.denoiser.") for name in newest if name.startswith("critic.denoiser.net.")}
    assert own == {name for name in before if name.startswith("net.")}
    assert (tmp_path / "run/lora.safetensors").exists()

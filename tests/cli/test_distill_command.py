"""`sfumato distill`: every method as it is typed, what it says of what was kept, and of what it has not."""

import json
from pathlib import Path

import pytest
from commands import Command, told

from sfumato import load
from sfumato.cli import main
from sfumato.io.directory import load_model
from sfumato.overlay import load_config, recipes, unchecked


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (["lmc"], ["no such recipe or file", "lcm"]),
        (["quickstart"], ["makes no student", "sfumato train quickstart"]),
        (["quickstart", "teacher=runs/nothing"], ["nothing to learn from a teacher", "latent_consistency"]),
        (["lcm", "teacher=runs/nothing"], ["no model to start from", "teacher", "runs/nothing"]),
        (["lcm", "student=runs/nothing"], ["no model to start from", "start", "runs/nothing"]),
        (["lcm"], ["no model to start from", "runs/quickstart", "sfumato train quickstart, which makes it"]),
        (["dmd2-four-steps"], ["runs/dmd2-two-steps", "sfumato distill dmd2-two-steps teacher=runs/quickstart, which"]),
        (["lcm", "teacher=null"], ["teacher is needed by the objective latent_consistency"]),
        (["lcm", "teacher_guidance=foo"], ["teacher_guidance is not known", "foo"]),
    ],
)
def test_what_cannot_be_taught_is_told(
    asked: list[str],
    said: list[str],
    capsys: pytest.CaptureFixture[str],
    tmp_path: object,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(str(tmp_path))
    with pytest.raises(SystemExit) as left:
        main(["distill", *asked])
    talk = capsys.readouterr().err
    assert left.value.code and all(word in talk for word in said), talk


SHORT = ("steps=1", "batch=4", "device=cpu", "precision=fp32", "samples.every=0", "validate={every: 0, holdout: 0}")


def small_recipes() -> list[str]:
    """The recipes of a method that work on scenes."""
    found = ((one.name, load_config(one.name).config) for one in recipes())
    return [name for name, config in found if config.method is not None and config.data["kind"] == "scenes"]


@pytest.mark.parametrize("method", small_recipes())
def test_the_command_makes_a_student(method: str, tiny_run: Path, sfumato: Command, tmp_path: Path) -> None:
    """Of every method, as it is typed: `sfumato distill METHOD teacher=RUN`; one that has no teacher begins with it."""
    config, said = load_config(method).config, unchecked(method)
    assert config.method is not None
    alone = config.method.teacher == "none"
    more = [f"student={tiny_run}"] if said.get("start") and said.get("teacher") else []  # after another method
    more += ["pairs.count=8", "pairs.steps=2"] if config.pairs is not None else []
    more += ["objective.warmup=1"] if "warmup" in config.objective else []
    outcome = sfumato("distill", method, f"teacher={tiny_run}", *SHORT, *more, "--run", "run", "--json", "--judge", 0)
    assert outcome.code == 0, outcome.err
    assert outcome.data == {"run": "run", "model": "run/model"}
    assert ("has no teacher: it begins with" in outcome.err) == alone
    student, teacher = load_model(tmp_path / "run/model"), load_model(tiny_run / "model")
    assert student.spec["model"]["net"]["dim"] == teacher.spec["model"]["net"]["dim"]
    assert student.facts["start"] == str(tiny_run) and student.facts.get("teacher") == (
        None if alone else str(tiny_run)
    )
    assert load(tmp_path / "run", "cpu").settings().steps == config.sampling.steps


def test_it_says_what_was_kept(tiny_run: Path, sfumato: Command, tmp_path: Path) -> None:
    words = ("distill", "lcm", f"teacher={tiny_run}", *SHORT, "--judge", 1, "--run")
    outcome = sfumato(*words, "told")
    assert outcome.code == 0, outcome.err
    model, *lines = outcome.out.splitlines()
    assert model == "told/model" and len(lines) == 3 and "in 4 calls" in lines[0] and "in 1 call " in lines[1]
    assert "judging the student and its teacher on 1 prompts of each task" in outcome.err
    kept = json.loads((tmp_path / "told/eval/kept.json").read_text())
    assert kept["suite"] == "scenes" and kept["of"] == "its teacher" and kept["n"] == 6
    assert (kept["teacher"]["steps"], kept["teacher"]["calls"]) == (16, 32)  # guided, two calls a step
    assert [(way["steps"], way["calls"]) for way in kept["student"]] == [(4, 4), (1, 1), (2, 2)]
    asked = sfumato(*words, "asked", "--json")
    assert asked.data["kept"] == kept and asked.data["model"] == "asked/model"


def test_what_is_no_scenes_is_compared_by_its_pictures(
    tiny_run: Path, sfumato: Command, tmp_path: Path, pictures: Path
) -> None:
    data = f"data={{kind: folder, path: {pictures}, size: 32}}"
    outcome = sfumato("distill", "ect", f"teacher={tiny_run}", data, *SHORT, "--run", "run", "--judge", 2)
    assert outcome.code == 0, outcome.err
    assert "from the pictures of what it began with in 4 calls" in outcome.out.splitlines()[1]
    kept = json.loads((tmp_path / "run/eval/kept.json").read_text())
    assert kept["suite"] == "energy" and all(way["equal"] > 0 for way in kept["student"])


def test_one_model_to_begin_with(sfumato: Command) -> None:
    told(sfumato("distill", "ect", "teacher=runs/a", "student=runs/b"), 2, "begins with one model", "runs/a", "runs/b")

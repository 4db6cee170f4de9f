"""How students and their teacher are judged and taught: ways, calls, commands, speed."""

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from students import judging, speed, teaching
from students.judging import Judging, best_of, candidates, is_tuned, judged, of_student, of_teacher

from sfumato import Pipeline, load
from sfumato.metrics.scenes import evaluate
from sfumato.settings import Settings
from small_models import made


@pytest.fixture(scope="module")
def tiny(tiny_run: Path) -> Pipeline:
    return load(tiny_run, "cpu")


def test_held_out_prompts_change_nothing_of_the_others(tiny: Pipeline) -> None:
    """Prompts, noises and scores, by a sampler that draws noise, too; six tasks of three do not fill a batch."""
    how: dict[str, Any] = {"seed": 12, "steps": 2, "sampler": {"kind": "sde_dpmpp", "order": 2}}
    alone, both = (evaluate(tiny, per_task=3, held_out=n, **how).judged for n in (0, 2))
    assert len(alone) == 18 and len(both) == 30 and all(one.held_out for one in both[18:])
    for one, other in zip(alone, both[:18], strict=True):
        assert one.caption == other.caption and not other.held_out
        assert np.abs(one.image.astype(int) - other.image).max() <= 1
    row = judged(tiny, 3, 2, **how)
    assert {name: row[name] for name in judging.SCORE} == judged(tiny, 3, 0, **how)
    assert row["held out"].keys() == {"overall", "low", "high"} and "metric" not in row


def told_scores(scores: dict[str, float]) -> Any:
    """Stands for `evaluate`: the score of a sampler by its name, "tuned" of a learned one, of prompts of any seed."""
    asked = list[dict[str, Any]]()

    def fake(pipeline: Any, *, per_task: int, held_out: int, seed: int, **way: Any) -> Any:
        asked.append({"per_task": per_task, "held_out": held_out, "seed": seed, **way})
        sampler = way.get("sampler", "own")
        value = scores.get("tuned" if isinstance(sampler, dict) else sampler, 0.0)
        interval = {"overall": value, "low": value - 0.02, "high": value + 0.02}
        hidden = interval if held_out else {"overall": None}
        return SimpleNamespace(as_dict=lambda: {**interval, "held_out": hidden})

    fake.asked = asked  # type: ignore[attr-defined]
    return fake


def pipeline(guidance: Any = 1.75, method: str | None = None, tuned: dict[int, Any] | None = None) -> Any:
    """Stands for a pipeline that is asked in words, and recommends this guidance."""
    settings = Settings(sampler="ddim", grid={"kind": "logistic", "level": 1.5, "spread": 1.5}, guidance=guidance)
    facts = {"method": method, "images": 640, "teacher": "runs/quickstart"}
    model = SimpleNamespace(facts=facts, conditioner=SimpleNamespace(fields=("caption",)), known=lambda raw: raw)
    return SimpleNamespace(settings=lambda: settings, model=model, tuned=tuned or {}, precision="fp32")


@pytest.fixture
def tuning(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, Any]]:
    """Steps and guidance of every sampler that is tuned, which takes no time."""
    seen = list[tuple[int, Any]]()

    def fake(pipeline: Any, raw: Any, steps: int, *, guidance: Any, **options: Any) -> Any:
        seen.append((steps, guidance))
        slots = {"sampler": {"kind": "learned", "rows": []}, "grid": {"kind": "explicit", "times": []}, "steps": steps}
        return SimpleNamespace(settings=lambda: slots)

    monkeypatch.setattr(judging, "tune_model", fake)
    monkeypatch.setattr(judging, "examples", lambda run, n: [{}] * n)
    return seen


@pytest.mark.parametrize("calls", [1, 2, 4, 8])
def test_every_way_makes_as_many_calls(calls: int, tuning: list[tuple[int, Any]]) -> None:
    ways = candidates(pipeline(), Path("run"), calls, 60.0)
    assert {way["steps"] * (1 if way["guidance"] == 1.0 else 2) for way in ways} == {calls}
    assert tuning == [(steps, scale) for steps, scale in ((calls, 1.0), (calls // 2, None)) if steps > 1]
    assert sum(map(is_tuned, ways)) == len(tuning)
    assert not any(map(is_tuned, candidates(pipeline(), Path("run"), calls, 0.0))) and len(ways) >= 8


def test_what_needs_no_guidance_is_not_tried_at_half_the_steps(tuning: list[tuple[int, Any]]) -> None:
    assert {way["steps"] for way in candidates(pipeline(1.0), Path("run"), 8, 0.0)} == {8}


def test_a_model_in_half_precision_is_tuned_in_whole(tiny_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whose weights cannot be asked for gradients; the sampler is then one of the half model's ways."""
    monkeypatch.setattr(judging, "TUNED", 2)
    found = candidates(load(tiny_run, "cpu", precision="bf16"), tiny_run, 2, 0.01)
    assert [way["steps"] for way in found if is_tuned(way)] == [2]


def test_samplers_that_were_tuned_before_are_tried() -> None:
    slots = {"sampler": {"kind": "learned", "rows": []}, "grid": {"kind": "explicit", "times": []}}
    ways = [way for way in candidates(pipeline(tuned={4: slots}), Path("run"), 8, 0.0) if is_tuned(way)]
    assert ways == [{**slots, "steps": 4, "guidance": 1.75}]


def test_the_best_way_is_searched_for_on_other_prompts(
    tuning: list[tuple[int, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    for best, won in (("tuned", "tuned, 4 steps"), ("unipc", "unipc, logistic, 4 steps")):
        fake = told_scores({"tuned": 0.3, "unipc": 0.2, best: 0.5})
        monkeypatch.setattr(judging, "evaluate", fake)
        found = best_of(pipeline(), Path("run"), 4, Judging(50, 40, seconds=60.0))
        assert found["won"] == won and found["overall"] == 0.5 and found["held out"]["overall"] == 0.5
        assert (found["tried"], found["tuned"]) == (18, 2)
        assert found["search"] == {"tuned": max(0.3, 0.5 * (best == "tuned")), "not tuned": 0.2 if won < "u" else 0.5}
        *search, last = fake.asked
        assert {(one["seed"], one["per_task"], one["held_out"]) for one in search} == {(11, 10, 0)}
        assert (last["seed"], last["per_task"], last["held_out"], last["steps"]) == (12, 50, 40, 4)


def test_a_student_draws_as_it_recommends(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake = told_scores({"own": 0.6})
    monkeypatch.setattr(judging, "evaluate", fake)
    row = of_student(pipeline(1.0, "latent_consistency"), tmp_path, Judging(20, 30, (1, 8)))
    assert [one["steps"] for one in fake.asked] == [1, 8] and all("sampler" not in one for one in fake.asked)
    assert row["1"] == row["8"] == 0.6 and row["8 interval"] == pytest.approx([0.58, 0.62])
    assert row["8 held out"] == pytest.approx({"overall": 0.6, "low": 0.58, "high": 0.62})
    assert row["seconds"] is None and row["images"] == 640 and (row["per_task"], row["held_out_per_task"]) == (20, 30)


@pytest.mark.parametrize(("guidance", "method"), [(1.75, None), (1.75, "shortcut"), (1.0, None)])
def test_what_is_no_student_or_guided_is_judged_as_its_teacher(
    guidance: float, method: str | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(judging, "evaluate", told_scores({"ddim": 0.4}))
    row = of_student(pipeline(guidance, method), tmp_path, Judging(20, 20, (4,), seconds=0.0))
    assert row["4"] == 0.4 and row["4 won"] == "ddim, logistic, 4 steps" and row["4 way"]["sampler"] == "ddim"


def test_the_teacher_is_judged_for_real(tiny: Pipeline, tiny_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model of no skill, by samplers that are tuned to it for a blink."""
    monkeypatch.setattr(judging, "TUNED", 2)
    monkeypatch.setattr(judging, "SAMPLERS", ("ddim",))
    row = of_teacher(tiny, tiny_run, Judging(1, 1, (1, 3), seconds=0.01))
    assert [*row["equal"]] == ["1", "2", "3", "4", "8"] and row["steps"] == 50
    assert [one["tuned"] for one in row["equal"].values()] == [0, 1, 1, 2, 2]
    assert row["held out"]["low"] <= row["held out"]["overall"] <= row["held out"]["high"]
    assert all(one["way"]["steps"] <= int(calls) for calls, one in row["equal"].items())


def test_models_without_words_say_what_was_counted(tmp_path: Path) -> None:
    whole = Pipeline(made(conditioner=None), "cpu")
    whole.model.spec["size"] = [32, 32]
    row = of_student(whole, tmp_path, Judging(1, 1, (1,), seconds=0.0))
    assert row["metric"] == "whole" and "1 held out" not in row


def test_all_methods_are_those_of_few_steps_with_a_teacher_and_without() -> None:
    found = teaching.all_methods()
    assert {"ect", "ict", "consistency-training", "lcm", "lcm-lora", "dmd2", "rectified-flow"} <= {*found}
    assert not {"quickstart", "flow-matching", "ot-flow-matching", "dmd2-sdxl", "lcm-sd15-paper"} & {*found}
    assert teaching.run_of("flow-matching") == Path("runs/flow-matching")  # which can be named
    assert teaching.run_of("elsewhere/mine") == Path("elsewhere/mine")


@pytest.mark.parametrize(
    ("recipe", "said"),
    [
        ("lcm", ["distill", "lcm", "teacher=runs/mine"]),
        ("ect", ["train", "ect", "start=runs/mine"]),
        ("ict", ["train", "ict"]),
        ("consistency-training", ["train", "consistency-training"]),
        ("flow-matching", ["train", "flow-matching"]),
        ("dmd2-two-steps", ["distill", "dmd2-two-steps", "teacher=runs/mine"]),
        ("rectified-flow-distill", ["distill", "rectified-flow-distill"]),  # of rectified-flow, not of quickstart
    ],
)
def test_commands_that_teach(recipe: str, said: list[str]) -> None:
    found = teaching.command(recipe, Path("runs") / recipe, Path("runs/mine"), "cpu")
    unjudged = ["--judge", "0"] if said[0] == "distill" else []
    assert found == [sys.executable, "-m", "sfumato", *said, "device=cpu", "--run", f"runs/{recipe}", *unjudged]


def test_speeds_are_medians_of_turns_beside_the_teacher(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock that moves 10 ms for a picture's step, and ten times as slowly in every fourth turn and the first."""
    now, turns = [0.0], [0]

    def sample(self: Any, prompts: list[str], *, steps: int, batch: int, **_: Any) -> None:
        assert len(prompts) == batch
        turns[0] += batch == 1 and steps == 50
        now[0] += 0.01 * steps * batch * (10 if turns[0] % 4 == 1 else 1)

    one = type("One", (), {"sample": sample, "model": SimpleNamespace(conditioner=None)})()
    monkeypatch.setattr(speed.time, "perf_counter", lambda: now[0])
    facts = {"threads": 1, "machine": {"cpu": "any"}}
    teacher, rows = speed.speeds(one, {"lcm": one}, whole=50, calls=(1, 4), batch=8, turns=5, facts=facts)
    assert teacher == {**facts, "batch": 8, "turns": 5, "steps": 50, "ms": 500.0, "images_per_second": 2.0}
    assert rows["lcm"]["teacher"] == {"steps": 50, "ms": 500.0, "images_per_second": 2.0}
    assert rows["lcm"]["1"] == {
        **{"ms": 10.0, "images_per_second": 100.0, "times_teacher": 50.0, "times_teacher_in_batch": 50.0}
    }
    assert rows["lcm"]["4"]["times_teacher"] == 12.5 and rows["lcm"]["threads"] == 1

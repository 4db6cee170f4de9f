"""`sfumato eval`: scores as a table, as JSON and as a file, with sheets of hits and misses."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from commands import QUICK, Command, told
from PIL import Image as Pillow

from sfumato.data.scenes import TASKS
from sfumato.train.curves import COLOURS

FEW = ("--suite", "scenes", "--per-task", "2", "--held-out", "1", "--steps", "1", "--device", "cpu")


@pytest.fixture
def run(tiny_run: Path, tmp_path: Path) -> Path:
    """A copy of a finished run, to write into."""
    shutil.copytree(tiny_run, tmp_path / "runs" / "tiny")
    return Path("runs/tiny")


def test_scores_for_programs(sfumato: Command, run: Path) -> None:
    outcome = sfumato(
        "eval",
        run,
        *FEW,
        "--json",
        "--guidance",
        "2",
        "--sampler",
        "ddim",
        "--times",
        "karras",
        "--seed",
        "3",
        "--batch",
        "5",
    )
    assert outcome.code == 0, outcome.err
    scores = outcome.data
    assert scores["suite"] == "scenes" and 0 <= scores["low"] <= scores["overall"] <= scores["high"] <= 1
    assert list(scores["tasks"]) == list(scores["held_out"]["tasks"]) == list(TASKS)
    for part, n in ((scores["tasks"], 2), (scores["held_out"]["tasks"], 1)):
        assert all(one["n"] == n and one["low"] <= one["score"] <= one["high"] for one in part.values())
    assert scores["images"] == 18
    said = scores["settings"]
    assert (said["guidance"], said["sampler"], said["grid"], said["steps"], said["seed"]) == (
        2.0,
        "ddim",
        "karras",
        1,
        3,
    )
    assert json.loads((run / "eval" / "scenes.json").read_text()) == scores
    for task in TASKS:
        assert Pillow.open(run / "eval" / f"{task}.png").width > 128
    assert "scores in runs/tiny/eval/scenes.json" in outcome.err and "binding.png" in outcome.err


def test_the_table_has_every_task_and_overall(sfumato: Command, run: Path) -> None:
    outcome = sfumato("eval", run, *FEW, "--out", "judged")
    assert outcome.code == 0
    rows = {line.split()[0]: line.split()[1:] for line in outcome.out.splitlines() if line.strip()}
    scores = json.loads(Path("judged/scenes.json").read_text())
    for task in TASKS:
        one, hidden = scores["tasks"][task], scores["held_out"]["tasks"][task]
        assert rows[task] == [
            text for each in (one, hidden) for text in (f"{each['score']:.2f}", f"{each['low']:.2f}-{each['high']:.2f}")
        ]
    assert rows["overall"][0] == f"{scores['overall']:.2f}"
    assert rows["overall"][2] == f"{scores['held_out']['overall']:.2f}"


def test_a_model_that_reads_layouts_is_given_them_or_not(sfumato: Command) -> None:
    words = "{kind: prompts, dim: 16, depth: 1, heads: 1}"
    both = f"model.conditioner={{kind: joined, parts: [{words}, {{kind: image, field: layout}}]}}"
    outcome = sfumato("train", "tiny", *(one for one in QUICK if "conditioner" not in one), "data.layout=places", both)
    assert outcome.code == 0, outcome.err
    shown = sfumato("eval", "runs/tiny", *FEW)
    assert shown.code == 0 and "things in place" in shown.out
    hidden = sfumato("eval", "runs/tiny", *FEW, "--layout", "none", "--json").data
    assert "placed" not in hidden and "layout" not in hidden["settings"]
    told(sfumato("eval", "runs/tiny", *FEW, "--layout", "place"), 2, "no such layout", "places")


def test_without_held_out_combinations(sfumato: Command, run: Path) -> None:
    words = ("--per-task", "1", "--held-out", "0", "--steps", "1", "--device", "cpu")
    assert sfumato("eval", run, *words, "--json").data["held_out"] == {"overall": None, "tasks": {}}
    table = sfumato("eval", run / "model", *words)
    assert table.code == 0 and (run / "eval" / "scenes.json").is_file()


def test_a_model_of_other_words_is_not_judged(sfumato: Command, pictures: Path) -> None:
    assert sfumato("train", "tiny", *QUICK, "data.kind=folder", f"data.path={pictures}", "name=mine").code == 0
    told(sfumato("eval", "runs/mine", *FEW), 4, "does not know the words of scenes", "sfumato train quickstart")


def test_a_model_without_conditions_is_judged_by_what_it_draws(sfumato: Command) -> None:
    assert sfumato("train", "tiny", *QUICK, "model.conditioner=null", "name=free").code == 0
    outcome = sfumato("eval", "runs/free", *FEW)
    assert outcome.code == 0, outcome.err
    assert [line.split()[0] for line in outcome.out.splitlines() if line.strip()] == ["task", "whole", "overall"]
    assert sfumato("sample", "runs/free", "--steps", "1").code == 0
    told(sfumato("sample", "runs/free", "a cross"), 4, "takes no conditions")


FLOW = ("--pictures", "3", "--device", "cpu")


def test_likelihood(sfumato: Command, run: Path) -> None:
    outcome = sfumato("eval", run, "--suite", "likelihood", *FLOW, "--steps", "2", "--probes", "2", "--json")
    assert outcome.code == 0, outcome.err
    scores, bits = outcome.data, outcome.data["bits_per_dim"]
    assert (scores["calls"], scores["probes"], scores["held_out"], bits["n"]) == (8, 2, True, 3)
    assert bits["low"] < bits["mean"] < bits["high"]
    assert bits["high"] - bits["low"] == pytest.approx(3.92 * bits["error"], rel=1e-3, abs=2e-5)
    assert json.loads((run / "eval" / "likelihood.json").read_text()) == scores
    again = sfumato("eval", run / "model", "--suite", "likelihood", *FLOW, "--steps", "2", "--level", "0.1")
    assert again.code == 0 and "bits a dimension" in again.out and "of 3" in again.out
    assert json.loads((run / "eval" / "likelihood.json").read_text())["noise"] == 0.1


def test_straightness(sfumato: Command, run: Path) -> None:
    outcome = sfumato("eval", run, "--suite", "straightness", *FLOW, "--steps", "4", "--guidance", "2", "--json")
    assert outcome.code == 0, outcome.err
    scores = outcome.data
    assert (scores["straightness"]["n"], scores["guidance"]) == (3, 2.0)
    assert scores["straightness"]["mean"] > 0 and scores["relative"] > 0
    assert scores["curve"]["t"] == [1.0, 0.75, 0.5, 0.25] and len(scores["curve"]["error"]) == 4
    assert Pillow.open(run / "eval" / "straightness.png").width == 720
    assert "scores in runs/tiny/eval/straightness.json" in outcome.err


def test_exact_likelihood(sfumato: Command, pictures: Path) -> None:
    """The whole trace, which needs no probes: those of many are around it."""
    small = "model.net={kind: dit, size: 8, patch: 4, dim: 16, depth: 1, heads: 1}"
    words = (
        "data.kind=folder",
        f"data.path={pictures}",
        "data.size=8",
        small,
        "validate={every: 0, holdout: 4}",
        "optim={lr: 0.02, warmup: 0}",
    )
    assert sfumato("train", "tiny", *QUICK, *words, "name=small").code == 0
    judge = ("eval", "runs/small", "--suite", "likelihood", *FLOW, "--steps", "1", "--json", "--probes")
    exact, many = sfumato(*judge, "exact"), sfumato(*judge, "50")
    assert exact.code == 0, exact.err
    assert exact.data["probes"] == "exact" and many.data["probes"] == 50
    assert exact.data["bits_per_dim"]["mean"] == pytest.approx(many.data["bits_per_dim"]["mean"], abs=0.05)
    for said in ("0", "-1", "all", "1.5"):
        told(sfumato(*judge, said), 2, "number of random ones", f"seen   {said}", "--probes exact")


def test_straightness_beside_another(sfumato: Command, run: Path) -> None:
    """Both from the same noise for the same prompts: each as it is by itself, and both in one picture."""
    moved = "optim={lr: 0.02, warmup: 0}"
    assert sfumato("train", "tiny", *QUICK, moved, "name=other").code == 0
    straight = ("eval", run, "--suite", "straightness", *FLOW, "--steps", "4")
    alone, pair = sfumato(*straight, "--json").data, sfumato(*straight, "--against", "runs/other", "--json")
    assert pair.code == 0, pair.err
    beside = pair.data["against"]
    assert beside["run"] == "runs/other" and beside["straightness"]["n"] == 3
    assert {**pair.data, "seconds": 0, "against": 0} == {**alone, "seconds": 0, "against": 0}
    assert beside["straightness"]["mean"] > 0 and beside["curve"] != alone["curve"]
    assert json.loads((run / "eval" / "straightness.json").read_text()) == pair.data
    drawn = np.asarray(Pillow.open(run / "eval" / "straightness.png").convert("RGB")).astype(int)
    assert all(abs(drawn - colour).max(axis=2).min() < 40 for colour in COLOURS[:2])
    shutil.copytree("runs/other", "elsewhere/tiny")
    for where, names in (("runs/other", ["tiny", "other"]), ("elsewhere/tiny", ["runs/tiny", "elsewhere/tiny"])):
        lines = [line for line in sfumato(*straight, "--against", where).out.splitlines() if line]
        assert [line.split("  ")[0] for line in lines] == [f"straightness a dimension, {name}" for name in names]
    told(sfumato(*straight, "--against", "runs/nope"), 4, "no such run or model", "runs/nope")
    told(sfumato("eval", run, *FEW, "--against", "runs/other"), 2, "only straightness", "--suite straightness")


def test_flows_of_a_model_alone_and_under_guidance(sfumato: Command, run: Path) -> None:
    shutil.copytree(run / "model", "alone")
    told(sfumato("eval", "alone", "--suite", "likelihood", *FLOW), 4, "does not tell its data")
    told(sfumato("eval", run, "--suite", "likelihood", *FLOW, "--guidance", "2"), 2, "of the model itself")
    told(sfumato("eval", run, "--suite", "straightness", *FLOW, "--precision", "bf16"), 2, "works in fp32")


def test_a_run_that_held_nothing_out_says_so(sfumato: Command) -> None:
    assert sfumato("train", "tiny", *QUICK, "name=seen").code == 0
    outcome = sfumato("eval", "runs/seen", "--suite", "likelihood", *FLOW, "--steps", "1", "--json")
    assert outcome.code == 0 and outcome.data["held_out"] is False and "of those that it saw" in outcome.err


@pytest.mark.parametrize(
    ("words", "code", "parts"),
    [
        (["--suite", "fid"], 2, ["no such suite", "seen   fid", "likelihood, reconstruction, scenes, straightness"]),
        (["--steps", "0"], 2, ["steps", "seen   0"]),
        (["--sampler", "ddmi"], 2, ["sampler is not known"]),
        (["--out", "a_file/in"], 3, ["a_file"]),
    ],
    ids=str,
)
def test_what_cannot_be_judged(
    sfumato: Command, run: Path, tmp_path: Path, words: list[str], code: int, parts: list[str]
) -> None:
    (tmp_path / "a_file").touch()
    told(sfumato("eval", run, "--device", "cpu", *words), code, *parts)


def test_a_run_that_is_not_there(sfumato: Command, run: Path) -> None:
    told(sfumato("eval", "runs/nope"), 4, "no such run or model", "fix    runs/tiny")

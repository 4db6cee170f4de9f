"""Students of jumps in the training loop: they begin as their teacher, learn, are kept whole, and draw by jumps."""

from pathlib import Path

import numpy as np
import pytest
import torch

from sfumato import load
from sfumato.io.directory import load_model
from sfumato.overlay import as_yaml, load_config, resolved
from sfumato.train import train

METHODS = {
    "meanflow": "objective={kind: meanflow, still: 0.5}",
    "difference": "objective={kind: meanflow, still: 0.5, difference: 0.03}",
    "improved": "objective={kind: improved_meanflow, scales: [1, 4]}",
    "shortcut": "objective={kind: shortcut, finest: 8, bootstrap: 0.5, decay: 0.5}",
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a few steps, to be a teacher."""
    from tests.train.conftest import small

    folder = tmp_path_factory.mktemp("base") / "run"
    train(small("steps=3", "checkpoint.every=3", "optim={lr: 0.02, warmup: 0}"), run=folder)
    return folder


def student(base: Path, run: Path, *overrides: str) -> Path:
    """A run of a student of the base."""
    from tests.train.conftest import SMALL

    raw = dict(resolved(load_config(str(SMALL)).config), name="student", model=None, steps=2)
    raw |= {"teacher": str(base), "objective": {"kind": "meanflow"}, "condition_dropout": 0.0}
    raw["sampling"] = {"sampler": "jump", "grid": "linear", "steps": 2, "guidance": 1.0}
    file = base.parent / "student.yaml"
    file.write_text(as_yaml(raw))
    train(load_config(str(file), list(overrides)).config, run=run)
    return run


@pytest.mark.parametrize("name", METHODS)
def test_a_student_learns_to_jump_and_draws_by_jumps(base: Path, tmp_path: Path, name: str) -> None:
    pipeline = load(student(base, tmp_path / "run", METHODS[name]), "cpu")
    model, teacher = pipeline.model, load_model(base / "model")
    assert model.answers == ("x0", "jump", "endpoint")
    told = ("until", "guidance") if name == "improved" else ("until",)
    assert set(model.net.config.told) == set(told)  # type: ignore[union-attr]
    weights, before = model.weights(), teacher.weights()
    assert {key for key in weights if key not in before} == {key for key in weights if ".numbers." in key}
    assert any(not torch.equal(weights[key], before[key]) for key in before)
    assert pipeline.settings().sampler == {"kind": "jump"}
    drawn = pipeline.sample(["a red circle", "a blue square"], seeds=[1, 2])
    alone = pipeline.sample(["a blue square"], seeds=[2])
    assert np.abs(drawn.images[1].astype(int) - alone.images[0]).max() <= 1
    for sampler in ("ddim", "consistency", {"kind": "jump", "gamma": 0.5}):
        assert pipeline.sample("a red circle", sampler=sampler, steps=3).images.shape == drawn.images[:1].shape


def test_a_student_begins_as_its_teacher(base: Path, tmp_path: Path) -> None:
    """At a learning rate of almost nothing, its means are the teacher's, and so are its jumps of any length."""
    run = student(base, tmp_path / "run", METHODS["shortcut"], "optim={lr: 1.0e-12, warmup: 0}", "steps=1")
    mine, its = load_model(run / "model").eval(), load_model(base / "model").eval()
    cond = mine.cond([{"caption": "a red circle"}, {}])
    channels = its.codec.shape(*its.size)
    x, t = torch.randn(2, *channels), torch.tensor([0.3, 0.9])
    expected = its(x, t, its.cond([{"caption": "a red circle"}, {}]))
    for asked in ({}, {"to": "jump", "until": 0.1}, {"to": "endpoint"}):
        torch.testing.assert_close(mine(x, t, cond, **asked), expected, rtol=1e-5, atol=1e-5)


def test_a_masked_picture_is_redrawn_by_jumps(base: Path, tmp_path: Path) -> None:
    pipeline = load(student(base, tmp_path / "run"), "cpu")
    height, width = pipeline.model.size
    image, mask = np.full((height, width, 3), 200, np.uint8), np.zeros((height, width, 3), np.uint8)
    mask[:, width // 2 :] = 255
    drawn = pipeline.sample("a red circle", image=image, mask=mask, steps=2).images[0]
    assert np.array_equal(drawn[:, : width // 2], image[:, : width // 2])
    assert not np.array_equal(drawn[:, width // 2 :], image[:, width // 2 :])

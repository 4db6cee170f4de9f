"""Validation and pictures while a model trains: the same pictures, times and noise every time, and no harm done."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from sfumato.config import Config
from sfumato.data.loader import Batch
from sfumato.errors import DataError, Interrupted
from sfumato.objectives import Loss
from sfumato.train import train
from sfumato.train.preview import wanted
from sfumato.train.run import Run
from sfumato.train.validate import Validation

Start = Callable[..., Run]
HELD = "validate={every: 1, batches: 3, holdout: 10}"


def test_validation_depends_on_the_weights_and_on_nothing_else(start: Start) -> None:
    run = start(HELD, "model.net.dropout=0.5", "condition_dropout=0.9")
    assert run.validation is not None
    run._advance()
    with run._average_weights():
        first = run.validation(run.stepper)
        torch.rand(7)
        again = run.validation(run.stepper)
    assert again == first
    other = start(HELD, "model.net.dropout=0.5", "condition_dropout=0.9", "workers=0", folder="other")
    assert other.validation is not None
    for _ in range(3):
        other._advance()  # sees other pictures, draws other noise
    other.model.load_state_dict(run.model.state_dict())
    for mine, theirs in zip(other.averages[0].average, run.averages[0].average, strict=True):
        mine.copy_(theirs)
    with other._average_weights():
        assert other.validation(other.stepper) == first
    other.averages[0].state()["net.head.out.bias"].add_(0.1)
    with other._average_weights():
        assert other.validation(other.stepper) != first


def test_validation_is_of_the_average_and_leaves_the_weights(start: Start) -> None:
    run = start(HELD, "ema=[{decay: 0.99, warmup: false}, {decay: 0.5}]")
    before = run.averages[0].state()["net.head.out.bias"].clone()
    for _ in range(3):
        run._advance()
    weights = {name: p.detach().clone() for name, p in run.weights.items()}
    assert run.validation is not None and not torch.equal(weights["net.head.out.bias"], before)
    own = run.validation(run.stepper)
    with run._average_weights():
        assert not run.model.training
        assert all(torch.equal(p, run.averages[0].state()[name]) for name, p in run.weights.items())
        average = run.validation(run.stepper)
    assert average != own and run.model.training
    assert all(torch.equal(p, weights[name]) for name, p in run.weights.items())


def test_held_out_pictures_are_never_trained_on(start: Start) -> None:
    run = start(HELD, "data.count=40")
    assert run.validation is not None
    held = {int(one) for batch in run.validation.batches for one in batch.indices}
    assert len(held) == 10
    seen = {int(one) for _ in range(30) for one in next(run.loader).indices}
    assert len(seen) == 30 and not seen & held


class Told:
    """An objective that says what a picture's first pixel says: a loss, and a time."""

    def __call__(self, model: Any, x0: Tensor, cond: Any = None, rng: Any = None) -> Loss:
        level = ((x0[:, 0, 0, 0] + 1) * 127.5).round()
        return Loss(level.mean(), level, (level / 255).clamp(max=1))


def test_losses_are_averaged_over_pictures_and_binned_by_time(start: Start) -> None:
    def batch(*levels: int) -> Batch:
        images = np.stack([np.full((32, 32, 3), level, np.uint8) for level in levels])
        return Batch(images, [{} for _ in levels], np.arange(len(levels)), 0)

    run = start()
    run.stepper.objective = Told()  # type: ignore[assignment]
    loss, by_noise = Validation([batch(0, 10, 20), batch(255)])(run.stepper)
    assert loss == pytest.approx(285 / 4)  # not the mean of the batches' means
    assert by_noise == [(0.05, 10.0), (0.95, 255.0)]


def test_without_held_out_pictures_it_is_said(start: Start) -> None:
    run = start("validate.every=1", "validate.holdout=0")
    assert run.validation is None and "no validation: no pictures are held out" in (run.folder / "log.txt").read_text()


def test_looking_changes_nothing(small: Callable[..., Config], tmp_path: Path) -> None:
    """A run with pictures and validation at every step has the weights of one without."""
    looks = ("validate={every: 1, batches: 1, holdout: 8}", "samples={every: 1, count: 2, at_start: true}")
    train(small("steps=4", *looks), run=tmp_path / "with")
    train(small("steps=4", "validate={every: 0, holdout: 8}"), run=tmp_path / "without")
    one, other = ((tmp_path / name / "model/model.safetensors").read_bytes() for name in ("with", "without"))
    assert one == other
    losses = []
    for name in ("with", "without"):
        rows = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        losses.append([row["loss"] for row in rows if "loss" in row])
    assert losses[0] == losses[1]
    assert sorted(path.name for path in (tmp_path / "with/samples").iterdir()) == [
        f"{step:08d}.png" for step in range(5)
    ]


def test_sheets_show_the_same_prompts_from_the_same_noise(tiny_run: Path, start: Start) -> None:
    assert sorted(path.name for path in (tiny_run / "samples").iterdir()) == ["00000010.png", "00000020.png"]
    sheet = Image.open(tiny_run / "samples/00000020.png")
    assert min(sheet.size) > 128 and len(set(np.asarray(sheet).reshape(-1, 3)[:, 0].tolist())) > 20
    run = start("samples={every: 1, count: 2}", "sampling.steps=2")
    path = run.folder / "samples/00000000.png"
    run._look()
    first = path.read_bytes()
    torch.rand(5)
    run._look()
    assert path.read_bytes() == first
    run.averages[0].state()["net.head.out.bias"].add_(0.5)
    run._look()
    assert path.read_bytes() != first


def test_what_is_drawn_are_the_prompts_or_captions_of_held_out_pictures(
    start: Start, small: Callable[..., Config]
) -> None:
    run = start(HELD, "samples={every: 1, count: 4}")
    held = run.loader.held_out().tolist()
    assert run.shown == [{"caption": run.dataset[i].fields["caption"]} for i in held[:4]]
    assert [one["caption"] for one in wanted(run.model, run.dataset, run.config, [])] == [
        run.dataset[i].fields["caption"] for i in range(4)
    ]
    chosen = small("samples={every: 1, prompts: [a red circle, a blue square]}")
    assert wanted(run.model, run.dataset, chosen, held) == [{"caption": "a red circle"}, {"caption": "a blue square"}]


def test_a_prompt_that_cannot_be_read_is_refused_before_the_first_step(
    small: Callable[..., Config], tmp_path: Path
) -> None:
    with pytest.raises(DataError, match="a word this model has never seen") as caught:
        train(small("samples={every: 1, prompts: [a mauve dodecahedron]}"), run=tmp_path / "run")
    assert "mauve" in str(caught.value)
    train(small("steps=1"), run=tmp_path / "run")  # nothing stands in the way of a better one


def test_captions_that_cannot_be_read_whole_are_passed_over(start: Start) -> None:
    """A conditioner that reads three words: "a red circle" can be shown, "a red circle and a blue square" cannot."""
    run = start("samples={every: 1, count: 3}", "model.conditioner.length=3")
    assert len(run.shown) == 3 and all(len(str(one["caption"]).split()) <= 3 for one in run.shown)
    none = start("samples={every: 1, count: 3}", "model.conditioner.length=1", folder="none")
    assert none.shown == [] and "no pictures while it trains" in (none.folder / "log.txt").read_text()
    none._look()


def test_a_model_without_conditions_is_shown_too(start: Start) -> None:
    run = start("samples={every: 1, count: 3}", "sampling.steps=2", "model.conditioner=null")
    assert run.shown == [{}, {}, {}]
    run._look()
    assert (run.folder / "samples/00000000.png").exists()


def test_pictures_that_are_not_finite_do_not_end_a_run(
    small: Callable[..., Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sfumato.pipeline import Pipeline

    def broken(self: Pipeline, x: Tensor) -> Any:
        return pictures(self, x * float("nan"))

    pictures = Pipeline.pictures
    monkeypatch.setattr(Pipeline, "pictures", broken)
    with pytest.raises(Interrupted):
        train(small("samples={every: 1, count: 2}", "sampling.steps=2"), run=tmp_path / "run", stop_after=2)
    text = (tmp_path / "run/log.txt").read_text()
    assert "step 1: no pictures, the model's answers are not finite numbers" in text and "step 2: no pictures" in text

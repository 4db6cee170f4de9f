"""The guards: what is not finite, and what is far out of line, neither moves a weight nor goes unnoticed."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from sfumato.config import Config, GuardSection
from sfumato.errors import DataError, Interrupted
from sfumato.objectives import Adversarial, Autoencoding, Denoising, DistributionMatching, Loss
from sfumato.objectives.denoising import Phased
from sfumato.objectives.progressive import Progressive
from sfumato.train import checkpoint, guard, train
from sfumato.train.guard import LEAST, MEMORY, Guard
from sfumato.train.run import ROLLBACKS, Run
from sfumato.train.step import Stepper

Start = Callable[..., Run]


def noisy(seed: int, count: int) -> list[float]:
    """Losses as training has them: a level that falls, with a heavy-tailed noise of 10% around it."""
    rng = np.random.default_rng(seed)
    level = 0.1 + np.exp(-np.arange(count) / 300)
    return [float(loss) for loss in level * (1 + 0.1 * rng.standard_t(5, count))]


def watched(losses: list[float], **options: Any) -> tuple[Guard, list[int]]:
    """A guard after some losses, and the steps at which it cried."""
    made = Guard(GuardSection(**options))
    return made, [i for i, loss in enumerate(losses) if made.spike(loss) is not None]


def test_clean_runs_raise_no_alarm() -> None:
    assert [watched(noisy(seed, 500))[1] for seed in range(20)] == [[]] * 20


@pytest.mark.parametrize("length", [1, 20, 90])
@pytest.mark.parametrize("action", ["warn", "skip", "rollback"])
def test_spikes_are_seen_at_once_and_do_not_hide_each_other(length: int, action: str) -> None:
    losses = noisy(0, 600)
    struck = list(range(400, 400 + length))
    for i in struck:
        losses[i] *= 100
    made, seen = watched(losses, spikes=action)
    assert seen == struck and made.spikes == length


def test_a_level_that_lasts_becomes_usual_where_it_is_trained_on() -> None:
    _, seen = watched(noisy(0, 400) + [50.0] * 300, spikes="warn")
    assert seen[0] == 400 and MEMORY // 2 - 5 <= len(seen) <= MEMORY // 2 + 5
    _, seen = watched(noisy(0, 400) + [50.0] * 300, spikes="skip")
    assert len(seen) == 300  # nobody trains on them, and the limit of missed steps ends it


def test_too_few_losses_and_falls_are_no_spikes() -> None:
    assert watched([1.0] * (LEAST - 1) + [1e6])[1] == []
    assert watched([1.0] * LEAST + [1e6])[1] == [LEAST]
    assert watched([*noisy(0, 200), 1e-9, -5.0])[1] == []
    assert watched([1.0] * LEAST + [1e6], spikes="off")[1] == []


def test_the_score_counts_robust_deviations() -> None:
    """For a normal law 1.4826 MAD is one standard deviation; a constant loss is judged by a thousandth of itself."""
    made, _ = watched([2 + 0.1 * float(z) for z in np.random.default_rng(0).normal(size=MEMORY)])
    assert made.score(2.5) == pytest.approx(5, rel=0.2)
    constant, _ = watched([2.0] * LEAST)
    assert constant.score(2.02) == pytest.approx(10)


def test_a_guard_comes_back_from_plain_data() -> None:
    made, _ = watched([*noisy(3, 300), 1e9])
    made.missed(1, "")
    made.rollbacks = 2
    other = Guard(GuardSection())
    other.restore(json.loads(json.dumps(made.state())))
    assert other == made and other.losses.maxlen == MEMORY and other.spikes == 1


def test_in_another_phase_losses_begin_anew() -> None:
    """Also after a roll back into the one before."""
    made, seen = watched(noisy(0, 100))
    made.entered(0)
    assert made.score(50.0) > 12 and seen == []
    made.entered(1)
    assert [made.spike(loss * 50) for loss in noisy(1, 100)] == [None] * 100
    made.entered(1)
    assert made.score(1e4) > 12
    other = Guard(GuardSection())
    other.restore(made.state())
    other.entered(1)
    assert other == made and len(other.losses) == 100
    made.entered(0)
    assert [made.spike(loss * 1e4) for loss in noisy(2, 100)] == [None] * 100
    old = Guard(GuardSection())
    old.restore({name: value for name, value in other.state().items() if name != "phase"})  # of an older version
    assert old.losses == other.losses and old.phase == 0


def test_objectives_say_where_their_loss_begins_anew() -> None:
    matching, heads = DistributionMatching(warmup=3), Adversarial(lambda net: None, warmup=2)  # type: ignore[arg-type]
    coder = Autoencoding(discriminator=lambda images: images, start=4)
    phased: tuple[Phased, ...] = (matching, heads, coder, Autoencoding(start=4), Progressive(first=4, last=1))
    said = [[one.phase(step, 6) for step in range(6)] for one in phased]
    assert said == [[0, 0, 0, 1, 1, 1], [0, 0, 1, 1, 1, 1], [0, 0, 0, 0, 1, 1], [0] * 6, [0, 0, 1, 1, 2, 2]]
    assert [DistributionMatching().phase(step, 6) for step in range(2)] == [1, 1]
    assert not isinstance(Denoising(), Phased)


def test_too_many_missed_steps_in_a_row_end_the_run() -> None:
    made = Guard(GuardSection(nonfinite_limit=3))
    for _ in range(4):
        made.missed(1, "loss nan")
        made.missed(2, "loss nan")
        made.made()
    made.missed(1, "loss nan")
    made.missed(2, "loss nan")
    with pytest.raises(DataError, match="3 steps in a row") as caught:
        made.missed(77, "loss nan")
    assert caught.value.exit_code == 4 and "step 77" in str(caught.value) and made.skipped == 11


def snapshot(run: Run) -> dict[str, Tensor]:
    groups = run._state().tensors
    return {f"{group}/{name}": value.clone() for group, some in groups.items() for name, value in some.items()}


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def struck(monkeypatch: pytest.MonkeyPatch, factor: float, *steps: int) -> None:
    """At some steps the loss is multiplied, and with it every gradient."""
    loss_of = Stepper.loss

    def loss(self: Stepper, batch: Any, step: int, micro: int, updates: int | None = None) -> Loss:
        loss = loss_of(self, batch, step, micro, updates)
        return loss._replace(value=loss.value * factor) if step in steps and micro == 0 else loss

    monkeypatch.setattr(Stepper, "loss", loss)


@pytest.mark.parametrize("factor", [float("nan"), float("inf"), 1e39])
@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_a_step_that_is_not_finite_moves_nothing(
    start: Start, monkeypatch: pytest.MonkeyPatch, factor: float, kind: str
) -> None:
    some = (f"optim.kind={kind}", "optim.decay=none", "ema=[{}, {decay: 0.5}]", "accumulate=2", "batch=2")
    run = start(*some)
    struck(monkeypatch, factor, 2)
    for _ in range(2):
        run._advance()
    before, rate = snapshot(run), run.optimizer.param_groups[0]["lr"]
    run._advance()
    assert equal(snapshot(run), before) and run.optimizer.param_groups[0]["lr"] == rate
    assert (run.step, run.updates, run.images, run.guard.skipped, run.guard.in_a_row) == (3, 2, 12, 1, 1)
    run._advance()
    assert not equal(snapshot(run), before) and all(value.isfinite().all() for value in snapshot(run).values())
    assert (run.updates, run.guard.in_a_row) == (3, 0)
    log = (run.folder / "log.txt").read_text()
    assert "step 3 is skipped: not finite" in log
    told = log.split("; pictures ")[1].split("\n")[0].split()  # which they were, for those who look for the reason
    assert sorted(map(int, told)) == sorted(seen_at(run, 8, 12))


def seen_at(run: Run, first: int, last: int) -> list[int]:
    from sfumato.data.order import indices

    return [int(one) for one in indices(first, last - first, len(run.dataset), run.config.seed)]


def test_a_run_of_bad_steps_ends_and_keeps_its_checkpoint(
    small: Callable[..., Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    struck(monkeypatch, float("nan"), *range(4, 100))
    with pytest.raises(DataError, match="3 steps in a row"):
        train(small("guard.nonfinite_limit=3", "checkpoint.every=2"), run=tmp_path / "run")
    path, state = checkpoint.newest(tmp_path / "run/checkpoints", print)
    assert path.name == "step-00000006" and state.plain["updates"] == 4 and state.plain["guard"]["skipped"] == 2
    assert all(value.isfinite().all() for group in state.tensors.values() for value in group.values())
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4]


def test_weights_that_are_not_finite_are_never_saved(start: Start) -> None:
    run = start()
    run._advance()
    run._save()
    next(iter(run.weights.values())).data.view(-1)[3] = float("inf")
    with pytest.raises(DataError, match="not finite, and not saved"):
        run._save()
    assert [path.name for path in checkpoint.found(run.checkpoints)] == ["step-00000001"]


@pytest.fixture
def _early(monkeypatch: pytest.MonkeyPatch) -> None:
    """A detector that has seen enough after three losses."""
    monkeypatch.setattr(guard, "LEAST", 3)


@pytest.mark.usefixtures("_early")
def test_a_spike_can_be_warned_of(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    run = start("guard.spikes=warn")
    struck(monkeypatch, 1e4, 5)
    for _ in range(5):
        run._advance()
    before = snapshot(run)
    run._advance()
    assert not equal(snapshot(run), before) and (run.updates, run.guard.spikes, run.guard.skipped) == (6, 1, 0)
    assert "deviations above the last ones" in (run.folder / "log.txt").read_text()


@dataclass(frozen=True)
class Turns:
    """An objective for tests, a thousand times as large from its fifth step on."""

    told: bool = True

    def phase(self, step: int, steps: int) -> int:
        return int(self.told and step >= 5)


@pytest.mark.usefixtures("_early")
@pytest.mark.parametrize("told", [True, False])
def test_a_loss_that_says_where_it_begins_anew_is_no_spike_there(
    start: Start, monkeypatch: pytest.MonkeyPatch, told: bool
) -> None:
    run = start("guard.spikes=skip")
    monkeypatch.setattr(run.stepper, "objective", Turns(told))
    struck(monkeypatch, 1e4, *range(5, 12))
    monkeypatch.setattr(Turns, "__call__", lambda self, *rest, **more: Denoising()(*rest, **more), raising=False)
    for _ in range(8):
        run._advance()
    assert (run.guard.spikes == 0) == told and (run.updates == 8) == told and run.guard.phase == int(told)


@pytest.mark.usefixtures("_early")
def test_a_spike_can_be_skipped(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    run = start("guard.spikes=skip")
    struck(monkeypatch, 1e4, 5)
    for _ in range(5):
        run._advance()
    before = snapshot(run)
    run._advance()
    assert equal(snapshot(run), before) and (run.updates, run.guard.spikes, run.guard.skipped) == (5, 1, 1)
    run._advance()
    assert not equal(snapshot(run), before) and run.guard.in_a_row == 0


@pytest.mark.usefixtures("_early")
def test_a_spike_can_roll_the_run_back(
    small: Callable[..., Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights, averages, moments and rate as in the last checkpoint; the data goes on, and so does a resumed run."""
    config = small("guard.spikes=rollback", "checkpoint.every=4", "optim.decay=cosine")
    with pytest.raises(Interrupted):
        train(config, run=tmp_path / "run", stop_after=4)
    _, at_four = checkpoint.newest(tmp_path / "run/checkpoints", print)
    struck(monkeypatch, 1e4, 6)  # the seventh step
    run = Run(config, tmp_path / "run", True)
    for _ in range(3):
        run._advance()
    run.close()
    kept = {f"{group}/{name}": value for group, some in at_four.tensors.items() for name, value in some.items()}
    assert equal(snapshot(run), kept) and (run.step, run.updates, run.images) == (7, 4, 28)
    assert (run.guard.rollbacks, run.guard.spikes, run.guard.skipped) == (1, 1, 1)
    with pytest.raises(Interrupted):
        train(config, run=tmp_path / "run", resume=True, stop_after=5)
    with pytest.raises(Interrupted):
        train(config, run=tmp_path / "other", stop_after=9)
    first, second = (checkpoint.newest(tmp_path / name / "checkpoints", print)[1] for name in ("run", "other"))
    assert first.plain == second.plain and first.plain["updates"] == 6
    assert all(
        torch.equal(value, second.tensors[group][name])
        for group in first.tensors
        for name, value in first.tensors[group].items()
    )


@pytest.mark.usefixtures("_early")
def test_without_a_checkpoint_a_roll_back_is_a_skip(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    run = start("guard.spikes=rollback")
    struck(monkeypatch, 1e4, 5)
    for _ in range(5):
        run._advance()
    before = snapshot(run)
    run._advance()
    assert equal(snapshot(run), before) and run.guard.rollbacks == 0
    assert "no checkpoint yet" in (run.folder / "log.txt").read_text()


@pytest.mark.usefixtures("_early")
def test_rolling_back_without_end_ends(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    run = start("guard.spikes=rollback")
    struck(monkeypatch, 1e4, *range(4, 100, 2))  # every other step, so that none are missed in a row
    for _ in range(4):
        run._advance()
    run._save()
    with pytest.raises(DataError, match=f"still jumps after {ROLLBACKS} rollbacks"):
        for _ in range(20):
            run._advance()
    assert run.step == 4 + 2 * ROLLBACKS + 1


@pytest.mark.usefixtures("_early")
def test_a_loss_that_stays_high_ends_the_run_where_it_is_skipped(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    run = start("guard.spikes=skip", "guard.nonfinite_limit=4")
    struck(monkeypatch, 1e4, *range(5, 100))
    with pytest.raises(DataError, match="4 steps in a row"):
        for _ in range(20):
            run._advance()
    assert run.step == 9

"""Averages of the weights, against the formula worked out in float64."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from sfumato.config import EMASection
from sfumato.train.ema import EMA
from sfumato.train.run import Run
from sfumato.train.step import Outcome, Stepper


def walk(steps: int, dtype: torch.dtype = torch.float64) -> list[dict[str, Tensor]]:
    """Weights on a random walk, before the first update and after each."""
    rng = torch.Generator().manual_seed(0)
    at, seen = [torch.randn(3, 4, generator=rng), torch.randn(5, generator=rng)], []
    for _ in range(steps + 1):
        seen.append({"net.a": at[0].to(dtype), "net.b": at[1].to(dtype)})
        at = [one + 0.1 * torch.randn(one.shape, generator=rng) for one in at]
    return seen


@pytest.mark.parametrize(("decay", "warmup"), [(0.999, True), (0.9, True), (0.5, True), (0.999, False)])
def test_the_average_is_a_weighted_sum(decay: float, warmup: bool) -> None:
    """After n updates: the first weights with prod d_i, those of update i with (1 - d_i) prod of the later d."""
    seen, n = walk(60), 60
    average = EMA(seen[0], EMASection(decay=decay, warmup=warmup))
    for i in range(n):
        average.update(list(seen[i + 1].values()), i)
    d = torch.tensor([min(decay, (1 + i) / (10 + i)) if warmup else decay for i in range(n)], dtype=torch.float64)
    shares = [float((1 - d[i]) * d[i + 1 :].prod()) for i in range(n)]
    assert sum(shares) + float(d.prod()) == pytest.approx(1)
    for name, value in average.state().items():
        expected = float(d.prod()) * seen[0][name] + sum(share * seen[i + 1][name] for i, share in enumerate(shares))
        assert torch.allclose(value, expected, rtol=1e-12, atol=1e-12)


def test_the_warm_up_forgets_the_beginning() -> None:
    section = EMASection(decay=0.999)
    average = EMA(walk(0)[0], section)
    assert [average.decay(n) for n in (0, 1, 2)] == pytest.approx([1 / 10, 2 / 11, 3 / 12])
    # (1 + n) / (10 + n) reaches 0.999 at n = 8990, and stays below before
    assert average.decay(8989) < 0.999 and average.decay(8990) == pytest.approx(0.999) and average.decay(10**6) == 0.999
    assert EMA(walk(0)[0], EMASection(decay=0.999, warmup=False)).decay(0) == 0.999
    # What 100 updates leave of the first weights: prod (1 + n) / (10 + n) = 9! 100! / 109!, against 0.9 without.
    left = 1.0
    for n in range(100):
        left *= average.decay(n)
    assert left < 1e-12 and 0.999**100 > 0.9


def test_half_precision_weights_are_averaged_in_single() -> None:
    seen = walk(400, torch.bfloat16)
    average = EMA(seen[0], EMASection(decay=0.999, warmup=False))
    exact = seen[0]["net.a"].double()
    for i in range(400):
        average.update(list(seen[i + 1].values()), i)
        exact = exact + 0.001 * (seen[i + 1]["net.a"].double() - exact)
    assert average.state()["net.a"].dtype == torch.float32
    assert torch.allclose(average.state()["net.a"].double(), exact, atol=1e-5)  # bf16 would be off by 1e-2


def test_an_average_is_a_copy_and_comes_back() -> None:
    seen = walk(3, torch.float32)
    average = EMA(seen[0], EMASection())
    first = copy.deepcopy(average.state())
    seen[0]["net.a"].add_(1)
    assert torch.equal(average.state()["net.a"], first["net.a"])
    average.update(list(seen[1].values()), 0)
    other = EMA(seen[2], EMASection())
    other.restore(average.state())
    assert all(torch.equal(other.state()[name], value) for name, value in average.state().items())
    average.update(list(seen[2].values()), 1)
    assert not torch.equal(other.state()["net.a"], average.state()["net.a"])


def test_averages_stand_in_for_the_weights_and_give_way_whatever_happens() -> None:
    seen = walk(1, torch.float32)
    average = EMA(seen[0], EMASection())
    weights = [torch.nn.Parameter(one) for one in seen[1].values()]
    kept = [w.detach().clone() for w in weights]
    with pytest.raises(RuntimeError, match="a bug"), average.applied(weights):
        assert all(torch.equal(w, a) for w, a in zip(weights, average.average, strict=True))
        with torch.no_grad():
            weights[0].add_(1)  # what is done meanwhile is undone, and does not reach the average
        raise RuntimeError("a bug")
    assert all(torch.equal(w, old) for w, old in zip(weights, kept, strict=True))
    assert torch.equal(average.state()["net.a"], seen[0]["net.a"])


def test_a_run_averages_after_every_update_and_counts_updates_only(
    start: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four steps, of which the second is skipped: three updates, with the decays of numbers 0, 1 and 2."""
    run = start("ema=[{decay: 0.999}]")
    gradients = Stepper.gradients

    def struck(self: Stepper, batches: Any, step: int, updates: int) -> Outcome:
        outcome = gradients(self, batches, step, updates)
        return outcome._replace(loss=float("nan")) if step == 1 else outcome

    monkeypatch.setattr(Stepper, "gradients", struck)
    expected, seen = {name: p.detach().double() for name, p in run.weights.items()}, []
    for _ in range(4):
        run._advance()
        seen.append({name: p.detach().double() for name, p in run.weights.items()})
    for i, weights in enumerate([seen[0], seen[2], seen[3]]):
        d = (1 + i) / (10 + i)
        expected = {name: d * value + (1 - d) * weights[name] for name, value in expected.items()}
    for name, value in run.averages[0].state().items():
        assert torch.allclose(value.double(), expected[name], rtol=1e-5, atol=1e-6), name

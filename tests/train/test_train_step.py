"""One optimizer step: accumulation, clipping, precisions, recomputation, compilation, and addressed randomness."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from sfumato.config import Config
from sfumato.data.loader import Batch
from sfumato.data.scenes import Scenes
from sfumato.errors import ConfigError
from sfumato.objectives import Loss
from sfumato.train.keys import generator, key
from sfumato.train.run import Run
from sfumato.train.step import Stepper, encoded

Small = Callable[..., Config]
Start = Callable[..., Run]


TOY = """
import torch
from torch import nn

class Toy(nn.Module):
    def __init__(self, in_channels: int = 3):
        super().__init__()
        self.entry = nn.Conv2d(in_channels, in_channels, 3, padding=1)

    def forward(self, x, t):
        return torch.tanh(self.entry(x)) * (1 + t[:, None, None, None] / 1000)
"""


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A user's own network, without conditions: what to say of it on the command line."""
    (tmp_path / "toy_network.py").write_text(TOY)
    monkeypatch.syspath_prepend(str(tmp_path))
    return "model={net: 'toy_network:Toy', conditioner: null}"


class Plain:
    """An objective without chance: every picture at the time and with the noise that its own pixels give."""

    def __call__(self, model: Any, x0: Tensor, cond: Any = None, rng: Any = None) -> Loss:
        t = 0.2 + 0.6 * x0.flatten(1).mean(1).sigmoid()
        eps = torch.sin(37 * x0)
        x_t = (1 - t[:, None, None, None]) * x0 + t[:, None, None, None] * eps
        each = (model.predict(x_t, t, cond) - (eps - x0)).square().flatten(1).mean(1)
        return Loss(each.mean(), each.detach(), t)


def batches(count: int, each: int) -> list[Batch]:
    """The same pictures in so many batches."""
    made = []
    for i in range(count):
        places = list(range(i * each, (i + 1) * each))
        images, fields = Scenes(count=64, seed=3).batch(places)
        made.append(Batch(images, fields, np.array(places), 0))
    return made


def grads(stepper: Stepper) -> list[Tensor]:
    return [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in stepper.weights]


def stirred(run: Run) -> None:
    """Weights of a network that has learned something: fresh ones have gates at zero, and hide most gradients."""
    rng = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in run.weights.values():
            p.add_(0.1 * torch.randn(p.shape, generator=rng))


def relative(a: list[Tensor], b: list[Tensor]) -> float:
    difference = torch.stack([(x.double() - y.double()).norm() for x, y in zip(a, b, strict=True)]).norm()
    return float(difference / torch.stack([y.double().norm() for y in b]).norm())


def test_accumulated_gradients_are_those_of_the_large_batch(start: Start) -> None:
    run = start("optim.clip=null", "condition_dropout=0")
    stirred(run)
    run.stepper.objective = Plain()  # type: ignore[assignment]
    whole = run.stepper.gradients(batches(1, 12), 0)
    large = grads(run.stepper)
    run.stepper.skip()
    parts = run.stepper.gradients(batches(3, 4), 0)
    assert relative(grads(run.stepper), large) < 1e-5
    assert parts.loss == pytest.approx(whole.loss, rel=1e-5) and parts.norm == pytest.approx(whole.norm, rel=1e-5)
    assert parts.norm == pytest.approx(float(torch.stack([g.norm() for g in large]).norm()), rel=1e-5)


def test_gradients_are_clipped_to_a_norm_and_the_norm_before_is_told(start: Start) -> None:
    run = start("optim.clip=0.01")
    stirred(run)
    run.stepper.objective = Plain()  # type: ignore[assignment]
    outcome = run.stepper.gradients(batches(1, 4), 0)
    clipped = grads(run.stepper)
    assert float(torch.stack([g.norm() for g in clipped]).norm()) == pytest.approx(0.01, rel=1e-3)
    unclipped = start("optim.clip=null", folder="unclipped")
    stirred(unclipped)
    unclipped.stepper.objective = Plain()  # type: ignore[assignment]
    assert unclipped.stepper.gradients(batches(1, 4), 0) == outcome and outcome.norm > 0.1
    scale = 0.01 / outcome.norm
    assert relative([g / scale for g in clipped], grads(unclipped.stepper)) < 1e-4


@pytest.mark.parametrize(
    "net",
    [
        "model.net.dropout=0.3",
        "model.net={kind: unet, patch: 4, channels: [8, 16], blocks: 1, attention: [0, 1], dropout: 0.3}",
    ],
    ids=["dit", "unet"],
)
def test_recomputed_activations_give_the_same_gradients(start: Start, net: str) -> None:
    """To the last bit, dropout included; and much really runs twice: torch stops as soon as it has what it needs."""
    runs = [start(net), start(net, "checkpointing=true", folder="checkpointing")]
    results, calls = [], []
    for run in runs:
        stirred(run)
        counted: list[int] = []
        for module in run.model.net.modules():
            if type(module).__name__ in ("Block", "Stage"):
                for part in module.children():
                    part.register_forward_hook(lambda *_, counted=counted: counted.append(1))
        results.append((run.stepper.gradients(batches(1, 4), 5), grads(run.stepper)))
        calls.append(len(counted))
    (kept, first), (again, second) = results
    assert kept == again and all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert any(float(g.abs().sum()) > 0 for g in first)
    assert calls[1] >= 1.3 * calls[0] > 0


def test_a_network_that_cannot_recompute_is_refused(start: Start, toy: str) -> None:
    start(toy)
    with pytest.raises(ConfigError, match="no gradient checkpointing"):
        start(toy, "checkpointing=true", folder="other")


def test_a_step_draws_what_its_address_says(start: Start) -> None:
    """Not what was drawn before: neither the global generator nor other steps matter; seeds and micro-batches do."""
    run = start("model.net.dropout=0.3", "condition_dropout=0.5", "optim.clip=null")
    stirred(run)

    def told(step: int, *some: Batch) -> float:
        outcome = run.stepper.gradients(some, step)
        run.stepper.skip()
        return outcome.loss

    (batch,) = batches(1, 4)
    first = told(7, batch)
    torch.rand(3)
    told(2, batch)
    assert told(7, batch) == first
    assert told(8, batch) != first
    assert told(7, batch, batch) != first  # the second micro-batch has noise of its own
    other = start("seed=1", "model.net.dropout=0.3", "condition_dropout=0.5", "optim.clip=null", folder="other")
    other.model.load_state_dict(run.model.state_dict())
    assert other.stepper.gradients([batch], 7).loss != first


def test_noise_times_and_dropout_each_have_their_address(start: Start) -> None:
    (batch,) = batches(1, 4)
    noisy = start("model.net.dropout=0", "condition_dropout=0")
    stirred(noisy)
    losses = {float(noisy.stepper.loss(batch, step, micro).value.detach()) for step in (7, 8) for micro in (0, 1)}
    assert len(losses) == 4
    falling = start("model.net.dropout=0.3", "condition_dropout=0", folder="falling")
    stirred(falling)
    falling.stepper.objective = Plain()  # type: ignore[assignment]
    one = [falling.stepper.gradients([batch], step).loss for step in (7, 8, 7)]
    assert one[0] == one[2] != one[1]
    assert falling.stepper.gradients([batch, batch], 7).loss != pytest.approx(one[0], rel=1e-4)


def test_dropped_conditions_are_dropped_for_the_network(start: Start) -> None:
    run = start("condition_dropout=1")
    stirred(run)
    (batch,) = batches(1, 4)
    silent = Batch(batch.images, [{} for _ in batch.fields], batch.indices, 0)
    assert run.stepper.loss(batch, 0, 0).value.equal(run.stepper.loss(silent, 0, 0).value)
    speaking = start("condition_dropout=0", folder="speaking")
    stirred(speaking)
    assert not speaking.stepper.loss(batch, 0, 0).value.equal(speaking.stepper.loss(silent, 0, 0).value)


def test_pictures_are_seen_from_minus_one_to_one(start: Start) -> None:
    run = start()
    images = np.zeros((1, 32, 32, 3), np.uint8)
    images[0, 3, 5] = (255, 128, 0)
    x0 = encoded(run.model, images, torch.device("cpu"))
    assert x0.shape == (1, 3, 32, 32) and x0[0, :, 0, 0].tolist() == [-1, -1, -1]
    assert x0[0, :, 3, 5].tolist() == pytest.approx([1, 128 / 127.5 - 1, -1], abs=1e-6)


@pytest.mark.parametrize(("precision", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_half_precisions_are_of_the_products_only(start: Start, precision: str, dtype: torch.dtype) -> None:
    run = start(f"precision={precision}", "optim.clip=null")
    stirred(run)
    seen: set[torch.dtype] = set()
    for module in run.model.net.modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(lambda m, i, out: seen.add(out.dtype))
    half = run.stepper.gradients(batches(1, 8), 0)
    assert seen == {dtype}
    whole = start("optim.clip=null", folder="fp32")
    stirred(whole)
    exact = whole.stepper.gradients(batches(1, 8), 0)
    assert {p.dtype for p in run.weights.values()} == {g.dtype for g in grads(run.stepper)} == {torch.float32}
    assert half.loss != exact.loss and half.loss == pytest.approx(exact.loss, rel=0.02)
    # fp16 gradients were scaled by 2^16 for the backward pass, and must not be any more
    assert half.norm == pytest.approx(exact.norm, rel=0.05)
    assert relative(grads(run.stepper), grads(whole.stepper)) < 0.1


def snapshot(run: Run) -> list[Tensor]:
    state = [t for group in run.keeping.state({}).tensors.values() for t in group.values()]
    return [t.clone() for t in state]


def unchanged(run: Run, before: list[Tensor]) -> bool:
    after = snapshot(run)
    return len(after) == len(before) and all(torch.equal(a, b) for a, b in zip(after, before, strict=True))


def test_fp16_overflow_skips_the_step_and_halves_the_scale(start: Start) -> None:
    """Gradients that overflow at a scale of 2^60 move nothing: not weights, averages, moments or rate."""
    run = start("precision=fp16", "ema=[{decay: 0.9}, {decay: 0.99}]", "optim.decay=none")
    for _ in range(2):
        run._advance()
    before, updates, losses = snapshot(run), run.updates, list(run.pending)
    run.stepper.scaler.update(2.0**60)
    run._advance()
    assert unchanged(run, before) and (run.updates, run.step, run.guard.skipped) == (updates, 3, 1)
    assert run.pending == losses and run.stepper.scaler.get_scale() == 2.0**59
    assert all(p.grad is None for p in run.weights.values())
    run.stepper.scaler.update(2.0**16)
    run._advance()
    assert not unchanged(run, before) and (run.updates, run.guard.in_a_row) == (updates + 1, 0)
    # The rate is that of update number 2, as if the step had never been.
    assert run.optimizer.param_groups[0]["lr"] == pytest.approx(run.config.optim.lr * 3 / 4)


def test_a_spike_is_no_fault_of_the_scale(start: Start) -> None:
    run = start("precision=fp16")
    run.stepper.gradients(batches(1, 4), 0)
    before = run.stepper.scaler.get_scale()
    run.stepper.skip()
    assert run.stepper.scaler.get_scale() == before


@pytest.mark.timeout(900)  # a compiler on a busy machine
@pytest.mark.skipif(shutil.which("g++") is None and shutil.which("clang++") is None, reason="no C++ compiler")
def test_a_compiled_network_trains_alike(start: Start, toy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One graph, for training: validation with 3 pictures and sampling with 2 are not worth compiling for."""
    import torch._inductor.config as inductor
    from torch._dynamo.utils import counters

    monkeypatch.setattr(inductor, "compile_threads", 1)
    monkeypatch.setattr(inductor.cpp, "simdlen", 1)
    monkeypatch.setattr(inductor.aot_inductor, "debug_compile", True)  # the compiler shall not optimise: it takes long
    options = ("samples={every: 2, count: 2}", "sampling.steps=2", "validate={every: 2, batches: 1, holdout: 3}")
    compiled, eager = start(toy, "compile=true", *options), start(toy, *options, folder="eager")
    before = counters["stats"]["unique_graphs"]
    for run in (compiled, eager):
        for _ in range(2):
            run._advance()
            run._report()
    assert counters["stats"]["unique_graphs"] - before == 1
    assert [row.keys() for row in compiled.log.rows] == [row.keys() for row in eager.log.rows]
    for one, other in zip(compiled.log.rows, eager.log.rows, strict=True):
        assert [one[name] for name in one if name != "by_noise"] == pytest.approx(
            [other[name] for name in one if name != "by_noise"], rel=1e-3
        )
    assert compiled.model.weights().keys() == eager.model.weights().keys()


def test_addresses_do_not_collide() -> None:
    """Nor are their draws related. Steps and micro-batches are told apart: 1, 11 is not 11, 1."""
    places = [(step, micro) for step in range(30) for micro in range(12)]
    addresses = [(seed, purpose, *place) for seed in (0, 1) for purpose in ("noise", "condition") for place in places]
    keys = [key(*address) for address in addresses]
    assert len(set(keys)) == len(keys) and all(0 <= one < 2**63 for one in keys)
    draws = torch.stack([torch.rand(64, generator=generator(*address)) for address in addresses[:200]])
    assert abs(float(draws.mean()) - 0.5) < 5 / (12 * draws.numel()) ** 0.5
    correlation = torch.corrcoef(draws) - torch.eye(len(draws))
    assert float(correlation.abs().max()) < 0.65  # 5 deviations of 1 / sqrt(64)
    again = torch.rand(64, generator=generator(*addresses[3]))
    assert torch.equal(again, draws[3])

"""Optimizers: which weight goes where, the rate, and Muon against the singular value decomposition and AdamW."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR

from sfumato.config import Config
from sfumato.train.muon import QUINTIC, Muon, orthogonalised
from sfumato.train.optim import adamw, learning_rate, muon
from sfumato.train.run import Run

Start = Callable[..., Run]
UNET = "model.net={kind: unet, patch: 4, channels: [8, 16], blocks: 1, attention: [0, 1]}"


def names_of(run: Run, optimizer: Any) -> list[tuple[dict[str, Any], set[str]]]:
    by_weight = {p: name for name, p in run.weights.items()}
    return [(group, {by_weight[p] for p in group["params"]}) for group in optimizer.param_groups]


@pytest.mark.parametrize("net", ["seed=0", UNET], ids=["dit", "unet"])
@pytest.mark.parametrize("make", [adamw, muon])
def test_every_weight_is_in_one_group(start: Start, net: str, make: Callable[..., Any]) -> None:
    run = start(net)
    groups = names_of(run, make(run.model, 1e-3))
    assert sum(len(names) for _, names in groups) == len(run.weights)
    assert set().union(*(names for _, names in groups)) == run.weights.keys()
    frozen = next(iter(run.weights))
    run.weights[frozen].requires_grad_(False)
    assert set().union(*(names for _, names in names_of(run, make(run.model, 1e-3)))) == run.weights.keys() - {frozen}


def test_adamw_decays_matrices_only(start: Start) -> None:
    run = start()
    (decayed, inner), (spared, outer) = names_of(run, adamw(run.model, 1e-3, weight_decay=0.3))
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.3, 0)
    assert all(run.weights[name].ndim > 1 for name in inner)
    assert {"conditioner.table.weight", "conditioner.place", "net.patches.bias", "conditioner.norm.weight"} <= outer
    assert {"net.patches.weight", "net.head.out.weight", "net.blocks.0.feed.0.weight"} & inner


DIT_IN = ("net.blocks.0.attention.", "net.blocks.1.feed.", "conditioner.blocks.0.")
DIT_OUT = ("net.patches.", "net.head.", "net.context.", "net.label.", "net.blocks.0.modulation.")
UNET_IN = ("net.down.0.", "net.middle.0.", "net.up.0.", "conditioner.blocks.0.")
UNET_OUT = ("net.entry.", "net.exit.")
BOTH_OUT = ("net.time.", "net.pooled.", "conditioner.table.", "conditioner.place")


@pytest.mark.parametrize(
    ("net", "inner", "outer"), [("seed=0", DIT_IN, DIT_OUT), (UNET, UNET_IN, UNET_OUT)], ids=["dit", "unet"]
)
def test_muon_takes_the_matrices_inside(start: Start, net: str, inner: tuple[str, ...], outer: tuple[str, ...]) -> None:
    run = start(net)
    (first, matrices), (second, _) = names_of(run, muon(run.model, 1e-3, weight_decay=0.3))
    assert first["orthogonal"] and not second["orthogonal"]
    assert (first["weight_decay"], second["weight_decay"]) == (0.3, 0)
    assert all(run.weights[name].ndim >= 2 for name in matrices)
    assert all(any(name.startswith(one) for name in matrices) for one in inner)
    assert not any(name.startswith(outer + BOTH_OUT) for name in matrices)


def test_another_optimizer_drops_the_options_that_it_does_not_have() -> None:
    from sfumato.overlay import merged

    below = {"optim": {"kind": "muon", "lr": 1, "options": {"iterations": 3, "weight_decay": 0.5}}}
    kept = {"kind": "adamw", "lr": 1, "options": {"weight_decay": 0.5}}
    assert merged(below, {"optim": {"kind": "adamw"}}) == {"optim": kept}
    assert merged(below, {"optim": {"kind": "muon"}}) == below
    over = merged(below, {"optim": {"kind": "adamw", "options": {"eps": 1e-6}}})
    assert over["optim"]["options"] == {"weight_decay": 0.5, "eps": 1e-6}


def config(small: Callable[..., Config], **optim: Any) -> Config:
    """A run of 100 steps."""
    return small("steps=100", *(f"optim.{name}={value}" for name, value in optim.items()))


def rates(chosen: Config, count: int) -> list[float]:
    return [learning_rate(update, chosen) for update in range(count)]


def test_the_rate_rises_and_stays(small: Callable[..., Config]) -> None:
    chosen = config(small, lr=0.4, warmup=4, decay="none")
    assert rates(chosen, 6) == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.4, 0.4])
    assert rates(config(small, lr=0.4, warmup=0, decay="none"), 3) == [0.4, 0.4, 0.4]
    weights = [nn.Parameter(torch.zeros(1))]
    optimizer = AdamW(weights, 0.4)
    schedule, theirs = LinearLR(optimizer, 1 / 4, 1, 3), []
    for _ in range(6):
        theirs.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates(chosen, 6) == pytest.approx(theirs)


def test_the_rate_falls_over_the_last_part(small: Callable[..., Config]) -> None:
    linear = config(small, lr=1, warmup=0, decay="linear", decay_fraction=0.5)
    assert rates(linear, 101)[:51] == [1.0] * 51
    assert [learning_rate(update, linear) for update in (60, 75, 99, 100, 150)] == pytest.approx([0.8, 0.5, 0.02, 0, 0])
    assert rates(config(small, lr=1, warmup=0, decay="linear", decay_fraction=0), 100) == [1.0] * 100
    whole = config(small, lr=1, warmup=10, decay="linear")
    assert [learning_rate(update, whole) for update in (4, 50)] == pytest.approx([0.5 * 0.96, 0.5])


def test_the_cosine_is_the_usual_one(small: Callable[..., Config]) -> None:
    ours = config(small, lr=1, warmup=0, decay="cosine", decay_fraction=0.6)
    optimizer = AdamW([nn.Parameter(torch.zeros(1))], 1.0)
    schedule, theirs = CosineAnnealingLR(optimizer, 60), []
    for _ in range(60):
        theirs.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates(ours, 100) == pytest.approx([1.0] * 40 + theirs, abs=1e-9)


def test_the_rate_that_was_used_is_the_one_that_is_told(start: Start) -> None:
    run = start("optim.decay=linear", "log.every=1")
    for update in range(3):
        run._advance()
        run._report()
        rate = learning_rate(update, run.config)
        assert {group["lr"] for group in run.optimizer.param_groups} == {rate} and run.log.rows[-1]["lr"] == rate


def spectrum(rows: int, columns: int, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    rng = torch.Generator().manual_seed(rows)
    u = torch.linalg.qr(torch.randn(rows, rows, generator=rng, dtype=torch.float64))[0][:, : len(values)]
    v = torch.linalg.qr(torch.randn(columns, columns, generator=rng, dtype=torch.float64))[0][:, : len(values)]
    return u, values.double(), v


@pytest.fixture
def in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a CPU without bfloat16 arithmetic, wherever the test runs."""
    monkeypatch.setattr("sfumato.train.muon.BF16_ARITHMETIC", False)


@pytest.mark.parametrize("shape", [(6, 20), (20, 6)])
def test_in_bfloat16_it_is_the_same_to_its_rounding(shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    given = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0))
    found = []
    for able in (False, True):
        monkeypatch.setattr("sfumato.train.muon.BF16_ARITHMETIC", able)
        found.append(orthogonalised(given))
    exact, rounded = found
    assert rounded.dtype == torch.float32 and not torch.equal(rounded, exact)
    assert float((rounded - exact).norm() / exact.norm()) < 0.05


@pytest.mark.usefixtures("in_float32")
@pytest.mark.parametrize("shape", [(8, 8), (6, 20), (20, 6)])
def test_orthogonalising_keeps_singular_vectors_and_maps_singular_values(shape: tuple[int, int]) -> None:
    """The iteration acts on each singular value alone: five times the quintic, from s / |M|."""
    u, s, v = spectrum(*shape, torch.logspace(-2, 0, min(shape)))
    mapped = s / s.norm()
    for _ in range(5):
        a, b, c = QUINTIC
        mapped = a * mapped + b * mapped**3 + c * mapped**5
    found = orthogonalised((3.7 * u * s @ v.T)[None])[0]
    assert found.dtype == torch.float64 and torch.allclose(found, u * mapped @ v.T, atol=1e-4)
    big = s / s.norm() > 0.01
    assert float(mapped[big].min()) > 0.65 and float(mapped.max()) < 1.25


def test_orthogonalised_is_near_the_polar_factor() -> None:
    rng = torch.Generator().manual_seed(0)
    some = torch.randn(3, 24, 16, generator=rng)
    found = orthogonalised(some)
    assert found.shape == some.shape and found.dtype == some.dtype
    for one, original in zip(found, some, strict=True):
        u, _, v = torch.linalg.svd(original, full_matrices=False)
        assert float((one - u @ v).norm() / (u @ v).norm()) < 0.3
        assert float((one * (u @ v)).sum() / (one.norm() * (u @ v).norm())) > 0.97
    alone = torch.cat([orthogonalised(one[None]) for one in some])
    assert torch.allclose(found, alone, atol=1e-4)  # a batch is no more than its matrices


@pytest.mark.usefixtures("in_float32")
def test_muons_first_step_has_the_size_of_adamws() -> None:
    """From rest the step is lr 0.2 sqrt(max(rows, columns)) U V^T: a root mean square of 0.2 lr if all rows count."""
    rng = torch.Generator().manual_seed(0)
    for shape in ((16, 64), (64, 16), (32, 4, 3, 3)):
        weight = nn.Parameter(torch.zeros(shape))
        optimizer = Muon([{"params": [weight], "orthogonal": True}], 0.01)
        weight.grad = torch.randn(shape, generator=rng)
        kept = weight.grad.clone()
        optimizer.step()
        expected = -0.01 * 0.2 * max(kept.flatten(1).shape) ** 0.5 * orthogonalised(kept.flatten(1)[None])[0]
        assert torch.allclose(weight.detach().flatten(1), expected, atol=2e-5)
        assert float(weight.detach().square().mean().sqrt()) == pytest.approx(0.2 * 0.01, rel=0.2)


def test_muons_momentum_looks_ahead_and_decay_is_decoupled() -> None:
    """Gradients with orthonormal rows stay so under all sums used here, so each step is a number times their span."""
    q = torch.linalg.qr(torch.randn(8, 8, generator=torch.Generator().manual_seed(1)))[0]
    first, second = q[:2], q[2:4]
    weight = nn.Parameter(torch.ones(2, 8))
    optimizer = Muon([{"params": [weight], "orthogonal": True, "weight_decay": 0.5}], 0.1, momentum=0.9)
    expected, buffer = torch.ones(2, 8), torch.zeros(2, 8)
    for gradient in (first, second):
        weight.grad = gradient.clone()
        optimizer.step()
        buffer = 0.9 * buffer + 0.1 * gradient
        ahead = 0.1 * gradient + 0.9 * buffer
        expected = expected * (1 - 0.1 * 0.5) - 0.1 * 0.2 * 8**0.5 * orthogonalised(ahead[None])[0]
    assert torch.allclose(weight.detach(), expected, atol=1e-5)
    assert torch.allclose(optimizer.state[weight]["momentum"], buffer, atol=1e-6)


def test_the_other_half_is_adamw() -> None:
    rng = torch.Generator().manual_seed(0)
    ours, theirs = nn.Parameter(torch.ones(5, 3)), nn.Parameter(torch.ones(5, 3))
    late, late_theirs = nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(4))
    options: dict[str, Any] = {"lr": 0.01, "betas": (0.9, 0.95), "weight_decay": 0.1}
    first, second = Muon([ours, late], **options), AdamW([theirs, late_theirs], **options)
    for i in range(20):
        ours.grad = torch.randn(5, 3, generator=rng)
        theirs.grad = ours.grad.clone()
        if i >= 7:  # a weight that was not used at first has a bias correction of its own
            late.grad = torch.randn(4, generator=rng)
            late_theirs.grad = late.grad.clone()
        first.step()
        second.step()
    assert torch.allclose(ours, theirs, rtol=1e-6) and torch.allclose(late, late_theirs, rtol=1e-6)


def test_weights_without_gradients_do_not_move_and_a_closure_is_called() -> None:
    still, moved = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2, 2))
    optimizer = Muon([{"params": [still, moved], "orthogonal": True, "weight_decay": 0.1}], 0.1)

    def closure() -> Tensor:
        loss = moved.square().sum()
        loss.backward()
        return loss

    assert float(optimizer.step(closure).detach()) == 4
    assert torch.equal(still, torch.ones(2, 2)) and not torch.equal(moved, torch.ones(2, 2))


def final_loss(make: Callable[[list[nn.Parameter]], Any], seed: int) -> float:
    """0.5 |L (W - W*) R|^2 after 150 steps to rate zero, L and R of condition 10 and in no basis of the weights."""
    rng = torch.Generator().manual_seed(seed)
    draw = lambda: torch.randn(16, 16, generator=rng, dtype=torch.float64)
    basis = lambda: torch.linalg.qr(draw())[0]
    values = torch.logspace(0, -1, 16, dtype=torch.float64)
    target, left, right = draw(), basis() * values @ basis(), basis() * values @ basis()
    weight = nn.Parameter(torch.zeros(16, 16, dtype=torch.float64))
    optimizer = make([weight])
    first = optimizer.param_groups[0]["lr"]
    for step in range(150):
        optimizer.param_groups[0]["lr"] = first * (1 - step / 150)
        optimizer.zero_grad()
        loss = (left @ (weight - target) @ right).square().sum() / 2
        loss.backward()
        optimizer.step()
    return float((left @ (weight.detach() - target) @ right).square().sum() / 2)


def test_muon_learns_an_ill_conditioned_matrix_better_than_adamw() -> None:
    """Each with its best rate: directions of small gradient are what AdamW, in a rotated basis, is slow in."""
    for seed in range(2):
        ours = [final_loss(lambda w, lr=lr: Muon([{"params": w, "orthogonal": True}], lr), seed) for lr in (0.3, 1, 3)]
        theirs = [
            final_loss(lambda w, lr=lr: AdamW(w, lr, (0.9, 0.95), weight_decay=0), seed) for lr in (0.1, 0.3, 1, 3)
        ]
        assert min(ours) < min(theirs) / 3 < 0.01

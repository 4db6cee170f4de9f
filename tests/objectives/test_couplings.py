"""Couplings: the pairing is the best one, the plan is the entropic one, and what training then finds is known."""

from itertools import permutations

import pytest
import torch
from torch import Generator, Tensor, nn

from oracles import SHAPES
from sfumato.denoiser import Denoiser
from sfumato.errors import ConfigError
from sfumato.objectives import Denoising
from sfumato.objectives.couplings import (
    Independent,
    OptimalTransport,
    SchroedingerBridge,
    assigned,
    sinkhorn,
    squared_distances,
)
from sfumato.paths import Cosine, Linear, noised
from sfumato.predictions import VELOCITY
from sfumato.times import Uniform

pytest.importorskip("scipy")
T = torch.full((64,), 0.5, dtype=torch.float64)


def rng(seed: int = 0) -> Generator:
    return Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=rng(seed), dtype=torch.float64)


def quantiles(n: int, mean: float = 0.0, std: float = 1.0) -> Tensor:
    """n even draws of a normal: its quantiles, (n, 1)."""
    u = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    return (mean + std * torch.special.ndtri(u))[:, None]


# optimal transport


def test_in_one_dimension_the_best_pairing_is_sorted() -> None:
    x0, eps = normal(64, 1), normal(64, 1, seed=1)
    paired = OptimalTransport()(Linear(), x0, eps, T, rng())
    assert torch.equal(paired.x0, x0)
    order = x0[:, 0].argsort()
    assert torch.equal(paired.eps[order], eps.sort(0).values)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_no_other_pairing_costs_less(shape: tuple[int, ...]) -> None:
    x0, eps = normal(*shape), normal(*shape, seed=1)
    place = assigned(x0, eps)
    costs = {p: float((x0 - eps[list(p)]).square().sum()) for p in permutations(range(shape[0]))}
    assert tuple(place.tolist()) == min(costs, key=lambda p: costs[p])


def test_large_batches_are_paired_in_chunks() -> None:
    x0, eps = normal(10, 1), normal(10, 1, seed=1)
    paired = OptimalTransport(chunk=4)(Linear(), x0, eps, T[:10]).eps
    for part, given, order in zip(paired.split(4), eps.split(4), x0.split(4), strict=True):
        assert torch.equal(part[order[:, 0].argsort()], given.sort(0).values)


def test_pairing_does_not_depend_on_autocast() -> None:
    x0, eps = normal(32, 200).float(), normal(32, 200, seed=1).float()
    with torch.autocast("cpu", torch.bfloat16):
        inside = squared_distances(x0, eps)
    assert torch.equal(inside, squared_distances(x0, eps)) and inside.dtype == torch.float64
    torch.testing.assert_close(inside.float(), torch.cdist(x0, eps).square(), rtol=1e-4, atol=1e-3)


def test_data_that_is_not_finite_is_paired_too() -> None:
    """The guard of the run skips such a step; the pairing must not end it."""
    x0 = normal(8, 3)
    x0[3, 1] = torch.nan
    for coupling in (OptimalTransport(), SchroedingerBridge()):
        paired = coupling(Linear(), x0, normal(8, 3, seed=1), T[:8], rng())
        assert bool(paired.eps[:3].isfinite().all())


def test_between_two_gaussians_nothing_is_left_to_chance() -> None:
    """Optimal transport is the affine map, lines never cross, and the loss of its velocity vanishes as batches grow."""
    mean, std = 0.7, 0.5

    class Monotone(nn.Module):
        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            t = t[:, None]
            x0 = (x + t * mean / std) / ((1 - t) + t / std)
            return (x0 - mean) / std - x0

    model, x0 = Denoiser(Monotone(), Linear(), VELOCITY), mean + std * normal(512, 1)
    losses = [float(Denoising(coupling=c)(model, x0, rng=rng(3)).value) for c in (OptimalTransport(512), Independent())]
    assert losses[0] < 0.01 and losses[1] > 0.3
    few = float(Denoising(coupling=OptimalTransport(16))(model, x0, rng=rng(3)).value)
    assert losses[0] < few < losses[1]


# the Schroedinger bridge


@pytest.mark.parametrize("regularisation", [1.0, 4.0, 20.0])
def test_the_plan_is_the_entropic_one(regularisation: float) -> None:
    """It has the marginals, and log plan + cost / regularisation is the sum of a row's and a column's number."""
    cost = squared_distances(normal(24, 3), normal(24, 3, seed=1))
    plan = sinkhorn(cost, regularisation, 20_000, 1e-10)
    torch.testing.assert_close(plan.sum(1), torch.full((24,), 1 / 24, dtype=torch.float64), rtol=1e-12, atol=0)
    torch.testing.assert_close(plan.sum(0), torch.full((24,), 1 / 24, dtype=torch.float64), rtol=1e-8, atol=0)
    left = torch.log(plan) + cost / regularisation
    crossed = left - left[:1] - left[:, :1] + left[0, 0]
    assert float(crossed[plan > 1e-200].abs().max()) < 1e-6


def test_the_plan_between_gaussians_has_the_known_covariance() -> None:
    """(sqrt(4 S^2 + sigma^4) - sigma^2) / 2 (Janati et al. 2020, eq. 5)."""
    x0, eps = quantiles(400, 0.7, 0.5), quantiles(400)
    for sigma in (0.3, 1.0, 2.0):
        plan = sinkhorn(squared_distances(x0, eps), 2 * sigma**2)
        found = float((plan * (x0 - 0.7) * eps.T).sum())
        known = ((4 * 0.25 + sigma**4) ** 0.5 - sigma**2) / 2
        assert found == pytest.approx(known, rel=0.02)  # 400 quantiles have a little less variance


def test_a_narrow_bridge_is_optimal_transport_and_a_wide_one_none() -> None:
    x0, eps = normal(32, 2), normal(32, 2, seed=1)
    cost = squared_distances(x0, eps)
    assert torch.equal(sinkhorn(cost, 2e-3, 20_000).argmax(1), assigned(x0, eps))
    torch.testing.assert_close(
        sinkhorn(cost, 1e7), torch.full((32, 32), 1 / 1024, dtype=torch.float64), rtol=1e-4, atol=0
    )


def test_noise_is_drawn_from_the_plan() -> None:
    x0, eps = normal(6, 1), normal(6, 1, seed=1)
    bridge, draws, counts = SchroedingerBridge(0.8), rng(2), torch.zeros(6, 6, dtype=torch.float64)
    rounds = 1000
    for _ in range(rounds):
        counts[torch.arange(6), bridge._drawn(x0, eps, draws)] += 1
    plan = sinkhorn(squared_distances(x0, eps), 2 * 0.64)
    assert float((counts / rounds - 6 * plan).abs().max()) < 5 * (0.25 / rounds) ** 0.5


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_bridge_has_its_noise_and_its_velocity(shape: tuple[int, ...]) -> None:
    """x_t = (1 - t) x0 + t eps + sigma sqrt(t (1 - t)) z, and its velocity (Tong et al. 2023, eq. 10)."""
    sigma, x0, eps = 0.7, normal(*shape), normal(*shape, seed=1)
    t = torch.linspace(0.05, 0.95, shape[0], dtype=torch.float64)
    pair = SchroedingerBridge(sigma)(Linear(), x0, eps, t, rng(5))
    same = rng(5)
    place = SchroedingerBridge(sigma)._drawn(x0, eps, same)
    z, eps = torch.randn(x0.shape, generator=same, dtype=torch.float64), eps[place]
    time = t.reshape(-1, *(1,) * (x0.ndim - 1))
    x_t = noised(Linear(), *pair, t)
    mean = (1 - time) * x0 + time * eps
    torch.testing.assert_close(x_t, mean + sigma * (time * (1 - time)).sqrt() * z)
    velocity = (1 - 2 * time) / (2 * time * (1 - time)) * (x_t - mean) + eps - x0
    torch.testing.assert_close(VELOCITY.target(Linear(), *pair, t), velocity)


def test_the_ends_of_a_bridge_are_finite() -> None:
    for end in (0.0, 1.0):
        pair = SchroedingerBridge()(Linear(), normal(8, 2), normal(8, 2, seed=1), torch.full((8,), end), rng())
        assert bool(VELOCITY.target(Linear(), *pair, torch.full((8,), end)).isfinite().all())


def test_a_bridge_between_gaussians_has_the_velocity_of_its_marginals() -> None:
    """x_t is normal at every time, so E[velocity | x_t] is linear: fitted to draws it is (m', V' / 2 V) of the
    bridge's own moments.
    """
    mean, std, sigma, t = 0.7, 0.5, 0.6, 0.3
    x0, eps = quantiles(400, mean, std), quantiles(400)
    time, draws = torch.full((400,), t, dtype=torch.float64), rng(1)
    bridge = SchroedingerBridge(sigma, chunk=400)
    pairs = [bridge(Linear(), x0, eps, time, draws) for _ in range(30)]
    x = torch.cat([noised(Linear(), *pair, time) for pair in pairs])[:, 0]
    u = torch.cat([VELOCITY.target(Linear(), *pair, time) for pair in pairs])[:, 0]
    c = ((4 * std**2 + sigma**4) ** 0.5 - sigma**2) / 2
    variance = (1 - t) ** 2 * std**2 + t**2 + 2 * t * (1 - t) * c + sigma**2 * t * (1 - t)
    rate = -2 * (1 - t) * std**2 + 2 * t + (1 - 2 * t) * (2 * c + sigma**2)
    assert float(x.var()) == pytest.approx(variance, rel=0.03)
    slope = float(((x - x.mean()) * (u - u.mean())).mean() / x.var())
    spread = float((u - slope * x).std() / x.std() / len(x) ** 0.5)  # the standard error of the slope
    assert slope == pytest.approx(rate / (2 * variance), abs=5 * spread)
    assert float(u.mean()) == pytest.approx(-mean, abs=0.05)


def test_what_a_bridge_cannot_be() -> None:
    with pytest.raises(ConfigError, match="linear path"):
        SchroedingerBridge()(Cosine(), normal(4, 2), normal(4, 2), T[:4])
    for wrong in ({"sigma": 0.0}, {"iterations": 0}, {"tolerance": 0.0}, {"chunk": 1}):
        with pytest.raises(ConfigError):
            SchroedingerBridge(**wrong)
    with pytest.raises(ConfigError, match="two rows"):
        OptimalTransport(chunk=1)


# in the objective


def test_data_and_conditions_stay_together() -> None:
    seen: list[tuple[Tensor, Tensor]] = []

    class Net(nn.Module):
        def forward(self, x: Tensor, t: Tensor, *, label: Tensor) -> Tensor:
            seen.append((x, label))
            return x

    x0, label = 100 * torch.arange(8.0)[:, None].expand(8, 4), torch.arange(8)
    for coupling in (OptimalTransport(), SchroedingerBridge(0.1)):
        Denoising(Uniform(0.01, 0.1), coupling=coupling)(
            Denoiser(Net(), Linear(), VELOCITY), x0, {"label": label}, rng()
        )
        x, told = seen.pop()
        assert torch.equal((x.mean(1) / 95).round().long(), told)


def test_chance_comes_from_the_generator_that_is_given() -> None:
    class Zero(nn.Module):
        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return 0 * x

    objective, model, x0 = Denoising(coupling=SchroedingerBridge()), Denoiser(Zero(), Linear(), VELOCITY), normal(16, 3)
    first, torch_state = objective(model, x0, rng=rng(4)), torch.get_rng_state()
    again = objective(model, x0, rng=rng(4))
    assert torch.equal(first.value, again.value) and torch.equal(torch.get_rng_state(), torch_state)
    assert not torch.equal(objective(model, x0, rng=rng(5)).value, first.value)


def test_who_pairs_is_told_what_it_costs() -> None:
    assert Denoising().notes(True) == ()
    (one,) = Denoising(coupling=OptimalTransport()).notes(False)
    both = Denoising(coupling=SchroedingerBridge()).notes(True)
    assert "ODE" in one and len(both) == 2 and "conditions" in both[1]

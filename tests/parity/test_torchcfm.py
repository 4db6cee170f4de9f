"""torchcfm's couplings: the same plans, and the same states and velocities, with its time the other way.

It is installed from `requirements/peers.txt`, with POT, which it solves plans with.
"""

import pytest
import torch
from torch import Generator, Tensor

from sfumato.objectives.couplings import SchroedingerBridge, assigned, sinkhorn, squared_distances
from sfumato.paths import Cosine, Linear, OptimalTransport, Path, noised
from sfumato.predictions import VELOCITY

cfm = pytest.importorskip("torchcfm.conditional_flow_matching")
N = 40


def normal(seed: int) -> Tensor:
    return torch.randn(N, 3, 2, generator=Generator().manual_seed(seed), dtype=torch.float64)


def test_plans() -> None:
    x0, eps = normal(0), normal(1)
    exact = torch.from_numpy(cfm.OTPlanSampler("exact").get_map(x0, eps))
    assert torch.equal(exact.argmax(1), assigned(x0, eps))
    for sigma in (0.7, 2.0):
        theirs = torch.from_numpy(cfm.OTPlanSampler("sinkhorn", reg=2 * sigma**2).get_map(x0, eps))
        ours = sinkhorn(squared_distances(x0, eps), 2 * sigma**2, tolerance=1e-10)
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize(
    ("path", "theirs"),
    [
        (Linear(), cfm.ConditionalFlowMatcher(0.0)),
        (OptimalTransport(0.01), cfm.TargetConditionalFlowMatcher(0.01)),
        (Cosine(), cfm.VariancePreservingConditionalFlowMatcher(0.0)),
    ],
    ids=["linear", "optimal_transport", "cosine"],
)
def test_states_and_velocities(path: Path, theirs: object) -> None:
    x0, eps, s = normal(0), normal(1), torch.linspace(0.05, 0.95, N, dtype=torch.float64)
    t = 1 - s
    x = noised(path, x0, eps, t)
    velocity = theirs.compute_conditional_flow(eps, x0, s, x)  # type: ignore[attr-defined]
    torch.testing.assert_close(theirs.compute_mu_t(eps, x0, s), x - _left(path, eps, t), rtol=1e-9, atol=1e-9)  # type: ignore[attr-defined]
    torch.testing.assert_close(VELOCITY.target(path, x0, eps, t), -velocity, rtol=1e-9, atol=1e-9)


def _left(path: Path, eps: Tensor, t: Tensor) -> Tensor:
    """The noise that torchcfm adds to its mean: all of it on Lipman's path, none on the others."""
    return path.sigma(t)[:, None, None] * eps if isinstance(path, OptimalTransport) else torch.zeros_like(eps)


def test_the_bridge() -> None:
    sigma, s, x0 = 0.8, torch.linspace(0.05, 0.95, N, dtype=torch.float64), normal(0)
    pair, draws = SchroedingerBridge(sigma)(Linear(), x0, normal(1), 1 - s, Generator().manual_seed(2)), Generator()
    eps = normal(1)[SchroedingerBridge(sigma)._drawn(x0, normal(1), draws.manual_seed(2))]
    theirs = cfm.SchrodingerBridgeConditionalFlowMatcher(sigma)
    z, x = torch.randn(x0.shape, generator=draws, dtype=torch.float64), noised(Linear(), *pair, 1 - s)
    torch.testing.assert_close(theirs.sample_xt(eps, x0, s, z), x)
    velocity = theirs.compute_conditional_flow(eps, x0, s, x)
    torch.testing.assert_close(VELOCITY.target(Linear(), *pair, 1 - s), -velocity, rtol=1e-5, atol=1e-5)

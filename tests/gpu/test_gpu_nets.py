"""Networks on a device: the CPU's numbers in double precision, near them in bfloat16, and forward-mode derivatives."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "nets"))

from tiny import CONFIGS, conditions, inputs, made, normal

from sfumato.derivatives import along_direction


def there(cond: dict[str, torch.Tensor], device: torch.device, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    return {key: value.to(device, dtype if value.is_floating_point() else value.dtype) for key, value in cond.items()}


@pytest.mark.parametrize("kind", CONFIGS)
def test_numbers_are_those_of_the_cpu(kind: str, gpu: torch.device) -> None:
    net, (x, t), cond = made(kind), inputs(), conditions(CONFIGS[kind])
    with torch.no_grad():
        expected = net(x, t, **cond)
        found = net.to(gpu)(x.to(gpu), t.to(gpu), **there(cond, gpu, torch.float64))
    torch.testing.assert_close(found.cpu(), expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("kind", CONFIGS)
def test_bfloat16_is_near(kind: str, gpu: torch.device) -> None:
    net, (x, t), cond = made(kind), inputs(), conditions(CONFIGS[kind])
    with torch.no_grad():
        expected = net(x, t, **cond)
        net = net.float().to(gpu)
        with torch.autocast("cuda", torch.bfloat16):
            found = net(x.to(gpu).float(), t.to(gpu).float(), **there(cond, gpu, torch.float32))
    assert float((found.double().cpu() - expected).norm() / expected.norm()) < 0.05


@pytest.mark.parametrize("kind", CONFIGS)
def test_tangents_are_float32_under_bfloat16(kind: str, gpu: torch.device) -> None:
    """The derivative of a float32 network under autocast is that of the CPU in double precision, and has gradients."""
    net, (x, t), cond = made(kind), inputs(), conditions(CONFIGS[kind])
    dx, dt = normal(*x.shape, seed=7), torch.full_like(t, 3.0)
    value, slope = along_direction(lambda x, t: net(x, t, **cond), (x, t), (dx, dt))
    net = net.float().to(gpu)
    moved = there(cond, gpu, torch.float32)
    with torch.autocast("cuda", torch.bfloat16):
        at, along = [one.to(gpu).float() for one in (x, t)], [one.to(gpu).float() for one in (dx, dt)]
        near, found = along_direction(lambda x, t: net(x, t, **moved), at, along)
    assert near.dtype == found.dtype == torch.float32
    for got, right in ((near, value), (found, slope)):
        assert (
            float((got.detach().double().cpu() - right.detach()).norm() / right.detach().norm()) < 1e-2
        )  # TF32 at the worst, never bfloat16
    found.square().sum().backward()
    assert all(bool(p.grad.isfinite().all()) for p in net.parameters() if p.grad is not None)

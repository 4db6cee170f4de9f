"""Forward-mode derivatives through every network: equal to a central difference, in x and in the time."""

import pytest
import test_pixel_unet
import test_stable_unet
import torch
from tiny import CONFIGS, conditions, inputs, made, normal
from torch import Tensor, nn

from sfumato.derivatives import along_direction


def checked(net: nn.Module, x: Tensor, t: Tensor, cond: dict[str, Tensor]) -> None:
    """In double precision, along a direction of unit steps in x and of many in t, as nets are told thousandths."""
    dx, dt = normal(*x.shape, seed=7), torch.full_like(t, 3.0)
    value, slope = along_direction(lambda x, t: net(x, t, **cond), (x, t), (dx, dt))
    with torch.no_grad():
        torch.testing.assert_close(value.detach(), net(x, t, **cond), rtol=1e-9, atol=1e-10)
        h = 1e-5
        numeric = (net(x + h * dx, t + h * dt, **cond) - net(x - h * dx, t - h * dt, **cond)) / (2 * h)
    size = float(numeric.abs().max())
    assert size > 1e-3
    torch.testing.assert_close(slope.detach(), numeric, rtol=1e-5, atol=1e-6 * size)
    slope.square().sum().backward()  # and gradients flow through it, for who wants them
    assert all(bool(p.grad.isfinite().all()) for p in net.parameters() if p.grad is not None)


@pytest.mark.parametrize("kind", CONFIGS)
def test_the_derivative_is_a_central_difference(kind: str) -> None:
    net = made(kind)
    x, t = inputs()
    checked(net, x, t, conditions(CONFIGS[kind]))


def test_of_stable_diffusions_network() -> None:
    checked(test_stable_unet.made(), *test_stable_unet.told())


def test_of_the_network_of_consistency_models() -> None:
    x, t, label = test_pixel_unet.told()
    checked(test_pixel_unet.made(), x, t, {"label": label})


def test_pictures_may_lie_in_memory_as_they_like() -> None:
    net = made("unet")
    x, t = inputs()
    dx, dt = normal(*x.shape, seed=7), torch.ones_like(t)
    cond = conditions(CONFIGS["unet"])

    def slope(*at: Tensor) -> Tensor:
        return along_direction(lambda x, t: net(x, t, **cond), at, (dx, dt))[1]

    torch.testing.assert_close(slope(x.to(memory_format=torch.channels_last), t), slope(x, t))

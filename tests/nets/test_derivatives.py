"""Forward-mode derivatives through every network: equal to a central difference, in x and in the time."""

import pytest
import test_pixel_unet
import test_stable_unet
import torch
from tiny import CONFIGS, conditions, inputs, made, normal
from torch import Tensor, nn

from sfumato.derivatives import across, along_direction


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

    def slope(x: Tensor, dx: Tensor) -> Tensor:
        return along_direction(lambda x, t: net(x, t, **cond), (x, t), (dx, dt))[1]

    as_shown, as_made = slope(x, dx), {"memory_format": torch.channels_last}
    torch.testing.assert_close(slope(x.to(**as_made), dx), as_shown)
    torch.testing.assert_close(slope(x, dx.to(**as_made)), as_shown)


def test_a_difference_is_the_derivative_and_both_of_its_ends_drop_the_same() -> None:
    x, t = normal(3, 4, seed=1), torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    velocity, far = normal(3, 4, seed=2), torch.full((3,), 1e-4, dtype=torch.float64)
    found = across(lambda x, t: x.sin() * t[:, None], x, t, velocity, far, far)
    torch.testing.assert_close(found, x.cos() * velocity * t[:, None] + x.sin(), rtol=1e-6, atol=1e-7)
    uneven = across(lambda x, t: x * t[:, None], x, t, torch.zeros_like(x), 0 * far, far)
    torch.testing.assert_close(uneven, x)

    def dropped(x: Tensor, t: Tensor) -> Tensor:
        return torch.nn.functional.dropout(torch.ones_like(x), 0.5)

    torch.manual_seed(0)
    assert not across(dropped, x, t, velocity, far, far).any()
    after = dropped(x, t)
    torch.manual_seed(0)
    assert torch.equal(after, dropped(x, t))  # and whoever is asked next drops it, too

"""Forward-mode derivatives through networks, for objectives that look at how an answer changes along a path.

MeanFlow, sCM and their kin need d/ds f(x + s dx, t + s dt): one pass that carries a tangent beside each value, at about
twice the cost of a plain one. Fused attention kernels have no such derivative, and half precision has too few digits
for one: so while a derivative is taken, `sfumato.nets.layers.attended` writes attention out, nothing is recomputed for
a backward pass, and everything is computed in float32 at least.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from sfumato.devices import same_chance
from sfumato.paths import along

_taken = 0  # how many derivatives are being taken


def is_taken() -> bool:
    """Whether a derivative is being taken: only operations that have a forward-mode derivative may be used then."""
    return _taken > 0


@contextmanager
def taking() -> Iterator[None]:
    """While a derivative is taken."""
    global _taken
    _taken += 1
    try:
        yield
    finally:
        _taken -= 1


def widened(cond: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
    """Conditions for a network that is asked where autocast is off: in float32 what was computed in half precision."""
    half = (torch.float16, torch.bfloat16)
    return {name: value.float() if value.dtype in half else value for name, value in (cond or {}).items()}


def along_direction(
    fn: Callable[..., Tensor], at: Sequence[Tensor], direction: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    """fn(*at), and its derivative along a direction: the sum over the arguments of (d fn / d argument) times its own.

    at, direction: as many tensors, of equal shapes. Both answers have the shape of fn's, in float32 at least, and carry
    gradients to the weights where those are recorded: detach what shall have none. Autocast is off inside: what fn
    takes from elsewhere must not be in half precision, see `widened`.
    """
    wide = [one.to(torch.promote_types(one.dtype, torch.float32)).contiguous() for one in at]
    ways = [one.to(two.dtype).contiguous() for one, two in zip(direction, wide, strict=True)]
    with torch.autocast(wide[0].device.type, enabled=False), taking():
        both = torch.func.jvp(fn, tuple(wide), tuple(ways))
    return both[0], both[1]


def across(
    fn: Callable[[Tensor, Tensor], Tensor], x_t: Tensor, t: Tensor, velocity: Tensor, down: Tensor, up: Tensor
) -> Tensor:
    """How fn(x_t, t) changes by time, as a difference between times t - down and t + up (B,): like fn's answer.

    For networks whose answers have ripples in time, see `MeanFlow`. velocity: of x_t (B, ...), by time. Autocast is off
    inside, as in `along_direction`. What the network drops at random it drops for both, and once more after this.
    """

    def asked(by: Tensor) -> Tensor:
        with same_chance(x_t.device), torch.autocast(x_t.device.type, enabled=False):
            return fn(x_t + along(by, x_t) * velocity, t + by)

    return (asked(up) - asked(-down)) / along((up + down).clamp(min=1e-6), x_t)

"""What tests of adapters share: random factors for the layers of a part, and a small Stable Diffusion."""

from collections.abc import Iterable

import torch

from sfumato.adapters.factors import Factors
from sfumato.adapters.parts import Part
from sfumato.adapters.reading import Adapter


def random_adapter(
    parts: Iterable[Part], *, dora: bool = False, ranks: tuple[int, ...] = (2, 3), alphas: tuple[float, ...] = (2, 5)
) -> Adapter:
    """A change of every layer of some parts, of several ranks and alphas, strong enough to be seen."""
    rng = torch.Generator().manual_seed(11)
    changes = {}
    for part in parts:
        for i, (name, shape) in enumerate(part.shapes.items()):
            rank = ranks[i % len(ranks)]
            down, up = torch.randn(rank, *shape[1:], generator=rng), torch.randn(shape[0], rank, generator=rng)
            length = 0.5 + torch.rand(shape[0], generator=rng) if dora else None
            changes[f"{part.home}.{name}"] = Factors(0.3 * down, 0.3 * up, alphas[i % len(alphas)], length)
    return Adapter(changes)


def same(one: Adapter, other: Adapter) -> None:
    """The same layers, with the same changes and lengths."""
    assert one.changes.keys() == other.changes.keys()
    for name, factors in one.changes.items():
        there = other.changes[name]
        torch.testing.assert_close(there.product(), factors.product(), rtol=1e-5, atol=1e-6)
        assert (there.magnitude is None) == (factors.magnitude is None)
        if factors.magnitude is not None and there.magnitude is not None:
            torch.testing.assert_close(there.magnitude, factors.magnitude)

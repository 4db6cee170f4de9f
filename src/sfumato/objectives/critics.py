"""What methods with a critic share: heads that judge by a network's features, and a critic that stands still."""

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.func import functional_call

from sfumato.denoiser import Cond, Denoiser
from sfumato.errors import ConfigError


class Listening(Protocol):
    """Heads on the features of one network, a module."""

    def listening(self, net: nn.Module) -> AbstractContextManager[dict[str, Tensor]]:
        """What the network says inside, while it runs."""
        ...

    def __call__(self, heard: dict[str, Tensor], t: Tensor, pooled: Tensor | None = None, /) -> Tensor:
        """Logits (B, N), high where pictures look real."""
        ...


class Heads(Protocol):
    """Makes them for a network, see `HEADS` of the catalogue."""

    def __call__(self, net: nn.Module, /) -> Listening: ...


def unmoved(module: nn.Module, *given: Any) -> Any:
    """What a module answers, its weights constants: gradients go to what it is given and stop there."""
    frozen = {name: p.detach() for name, p in module.named_parameters()}
    return functional_call(module, frozen, given)


def rows_of(cond: Cond | None, rows: Tensor) -> dict[str, Tensor]:
    """The conditions of some samples of a batch."""
    return {name: value[rows.to(value.device)] for name, value in (cond or {}).items()}


def ended(student: Denoiser, x: Tensor, t: Tensor, cond: Cond | None) -> Tensor:
    """Where the student says that the flow through x (B, ...) at t (B,) ends."""
    end: Tensor = student(x, t, cond)
    return end


def check_times(at: tuple[float, ...]) -> None:
    """ConfigError for times of steps that do not fall, or leave (0, 1]."""
    if not at or list(at) != sorted(set(at), reverse=True) or not 0 < at[-1] <= at[0] <= 1:
        fix = "[1.0, 0.75, 0.5, 0.25]"
        raise ConfigError("a student's times fall from 1", where="objective.at", seen=str(list(at)), fix=fix)


def check_not_negative(objective: object, *names: str) -> None:
    """ConfigError for numbers below zero."""
    for name in names:
        if not getattr(objective, name) >= 0:
            where, seen = f"objective.{name}", str(getattr(objective, name))
            raise ConfigError(f"{name} is not negative", where=where, seen=seen, fix=f"{where}=0")


def check_counts(objective: object, *names: str) -> None:
    """ConfigError for numbers below one."""
    for name in names:
        if getattr(objective, name) < 1:
            where, seen = f"objective.{name}", str(getattr(objective, name))
            raise ConfigError(f"{name} is at least 1", where=where, seen=seen, fix=f"{where}=1")


def detached(parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Terms of a loss, to be told of."""
    return {name: part.detach() for name, part in parts.items()}


def valued(number: Tensor, minimised: Tensor) -> Tensor:
    """A loss whose number is the one and whose gradient is the other's."""
    return number.detach() + (minimised - minimised.detach())


def wide(x: Tensor) -> Tensor:
    """In float32 at least."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def drawn_which(n: int, choices: int, rng: torch.Generator | None) -> Tensor:
    """One of some choices for each of n samples, (n,), as evenly as n allows, in random order."""
    order = torch.randperm(n, generator=rng)
    offset = int(torch.randint(choices, (1,), generator=rng))
    return (order + offset) % choices

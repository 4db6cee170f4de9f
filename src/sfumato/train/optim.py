"""Optimizers and the learning rate. The rate is a function of the number of updates made, and of nothing else."""

import math
from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.optim import AdamW, Optimizer

from sfumato.catalogue import build
from sfumato.config import Config
from sfumato.model import Trainable
from sfumato.train.muon import Muon

OUTSIDE = (  # of Muon: what is no matrix between two hidden layers, and what acts on one summary a picture
    *("patches", "head", "entry", "exit", "table", "place", "label", "time", "context", "pooled"),
    *("modulation", "shared", "local", "nearby"),
)

MULTIPLE = "multiple"  # of a group, what its rate is of the schedule's


def adamw(
    model: nn.Module,
    lr: float,
    *,
    betas: tuple[float, float] = (0.9, 0.99),
    eps: float = 1e-8,
    weight_decay: float = 0.01,
) -> Optimizer:
    """Adam with decoupled weight decay (Loshchilov & Hutter 2019), which spares biases, norms and embeddings."""
    decayed: list[nn.Parameter] = []
    spared: list[nn.Parameter] = []
    for name, p in _trained(model).items():
        (decayed if p.ndim > 1 and not _is_table(name) else spared).append(p)
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": spared, "weight_decay": 0.0}]
    return AdamW([group for group in groups if group["params"]], lr, betas, eps, foreach=True)


def muon(
    model: nn.Module,
    lr: float,
    *,
    momentum: float = 0.95,
    betas: tuple[float, float] = (0.9, 0.95),
    weight_decay: float = 0.01,
    iterations: int = 5,
) -> Optimizer:
    """Muon for the matrices and kernels inside the network, AdamW for embeddings, biases, and the first and
    last layers.
    """
    inner: list[nn.Parameter] = []
    outer: list[nn.Parameter] = []
    for name, p in _trained(model).items():
        outside = p.ndim < 2 or any(part in OUTSIDE for part in name.split("."))
        (outer if outside else inner).append(p)
    groups = [
        {"params": inner, "orthogonal": True, "weight_decay": weight_decay},
        {"params": outer, "orthogonal": False, "weight_decay": 0.0},
    ]
    return Muon(
        [group for group in groups if group["params"]], lr, momentum=momentum, betas=betas, iterations=iterations
    )


def build_optimizer(model: Trainable, config: Config) -> Optimizer:
    """The optimizer that a configuration asks for. A critic with a rate of its own is in groups of its own."""
    slot: Mapping[str, Any] = {"kind": config.optim.kind, **config.optim.options}
    optimizer: Optimizer = build(slot, "Optimizer")(model, config.optim.lr)
    if config.optim.critic_lr is not None:
        critic = {p for name, p in model.trained().items() if not model.is_kept(name)}
        _set_apart(optimizer, critic, config.optim.critic_lr / config.optim.lr)
    return optimizer


def set_rate(optimizer: Optimizer, rate: float) -> None:
    """Gives every group the rate of the schedule; a critic's, its multiple of it."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get(MULTIPLE, 1.0)


def _set_apart(optimizer: Optimizer, critic: set[nn.Parameter], multiple: float) -> None:
    """Moves some weights out of their groups into others, alike but for the rate."""
    groups = list(optimizer.param_groups)
    optimizer.param_groups.clear()
    for group in groups:
        alike = {name: value for name, value in group.items() if name != "params"}
        kept = [p for p in group["params"] if p not in critic]
        moved = [p for p in group["params"] if p in critic]
        if kept:
            optimizer.add_param_group({**alike, "params": kept})
        if moved:
            optimizer.add_param_group({**alike, "params": moved, MULTIPLE: multiple})


def learning_rate(update: int, config: Config) -> float:
    """The rate of update number `update` (from 0): a linear rise, a plateau, and the decay over the last part
    of `steps`, or of each of their cycles.
    """
    optim, number = config.optim, min(config.optim.cycles - 1, update * config.optim.cycles // config.steps)
    begin, end = (-(-k * config.steps // optim.cycles) for k in (number, number + 1))
    update, total = update - begin, end - begin
    rate = optim.lr * min(1.0, (update + 1) / max(1, optim.warmup))
    start = total * (1 - optim.decay_fraction)
    if optim.decay == "none" or update < start:
        return rate
    done = min(1.0, (update - start) / max(1.0, total - start))
    return rate * ((1 - done) if optim.decay == "linear" else (1 + math.cos(math.pi * done)) / 2)


def _trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def _is_table(name: str) -> bool:
    return any(part in ("table", "place", "label") for part in name.split("."))

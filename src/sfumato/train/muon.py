"""Muon: momentum, orthogonalised (Jordan et al. 2024), for the matrices inside a network; AdamW for everything else.

A matrix' averaged gradient U S V^T is replaced by U V^T, so every direction of the update has the same length, and
rare directions learn as fast as common ones. The singular values are brought to about 1 by a few steps of a quintic
Newton-Schulz iteration. Updates are scaled by 0.2 sqrt(max(rows, columns)), the size that AdamW's have (Liu et al.
2025, "Moonlight"), so one learning rate serves both halves. Matrices of one shape are orthogonalised together.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from sfumato.nets.layers import BF16_ARITHMETIC

QUINTIC = (3.4445, -4.7750, 2.0315)  # steepest at zero: singular values of 0.01 arrive at 0.7 to 1.2 in five steps


def orthogonalised(matrices: Tensor, steps: int = 5) -> Tensor:
    """U V^T of each matrix of a batch (N, rows, columns), to about 20%, by Newton-Schulz iterations.

    In bfloat16, but in float32 on a CPU that has no bfloat16 arithmetic, and crawls through it.
    """
    a, b, c = QUINTIC
    x = matrices.to(torch.bfloat16 if matrices.device.type != "cpu" or BF16_ARITHMETIC else torch.float32)
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).to(matrices.dtype)


class Muon(Optimizer):
    """Both halves in one optimizer; a group whose `orthogonal` is True takes Muon's step, the others AdamW's.

    momentum: of Muon, with Nesterov's look ahead. betas, eps: of AdamW. weight_decay: decoupled, in both.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        *,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        iterations: int = 5,
    ) -> None:
        defaults = {"lr": lr, "momentum": momentum, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults | {"iterations": iterations, "orthogonal": False})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            live = [p for p in group["params"] if p.grad is not None]
            if live:
                (self._muon if group["orthogonal"] else self._adamw)(live, group)
        return loss

    def _muon(self, params: list[Tensor], group: dict[str, Any]) -> None:
        grads = [p.grad for p in params if p.grad is not None]
        buffers = [self._slot(p, "momentum") for p in params]
        torch._foreach_lerp_(buffers, grads, 1 - group["momentum"])
        ahead = torch._foreach_lerp(grads, buffers, group["momentum"])
        if group["weight_decay"]:
            torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
        for same in _by_shape(params):
            updates = orthogonalised(torch.stack([ahead[i].flatten(1) for i in same]), group["iterations"])
            size = 0.2 * max(updates.shape[1:]) ** 0.5
            torch._foreach_add_(
                [params[i] for i in same],
                [update.view_as(params[i]) for i, update in zip(same, updates, strict=True)],
                alpha=-group["lr"] * size,
            )

    def _adamw(self, params: list[Tensor], group: dict[str, Any]) -> None:
        grads = [p.grad for p in params if p.grad is not None]
        first, second = ([self._slot(p, name) for p in params] for name in ("first", "second"))
        steps = [self._count(p) for p in params]
        torch._foreach_add_(steps, 1)
        beta1, beta2 = group["betas"]
        if group["weight_decay"]:
            torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_lerp_(first, grads, 1 - beta1)
        torch._foreach_mul_(second, beta2)
        torch._foreach_addcmul_(second, grads, grads, 1 - beta2)
        counts = [float(n) for n in steps]
        scale = torch._foreach_sqrt(second)
        torch._foreach_div_(scale, [(1 - beta2**n) ** 0.5 for n in counts])
        torch._foreach_add_(scale, group["eps"])
        torch._foreach_addcdiv_(params, first, scale, [-group["lr"] / (1 - beta1**n) for n in counts])

    def _slot(self, p: Tensor, name: str) -> Tensor:
        state = self.state[p]
        if name not in state:
            state[name] = torch.zeros_like(p)
        kept: Tensor = state[name]
        return kept

    def _count(self, p: Tensor) -> Tensor:
        state = self.state[p]
        if "step" not in state:
            state["step"] = torch.zeros((), dtype=torch.float32)  # on the CPU: reading it waits for nothing
        kept: Tensor = state["step"]
        return kept


def _by_shape(params: list[Tensor]) -> list[list[int]]:
    shapes: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for i, p in enumerate(params):
        shapes[tuple(p.flatten(1).shape)].append(i)
    return list(shapes.values())

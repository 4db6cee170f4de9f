"""Samplers over rows that each have times of their own: what distillation needs of a solver.

A sampler walks one grid with a whole batch. A student's batch has another pair of times in every row, so rows of equal
times walk together, and all walks ask at once: one call of the model a round, whatever the times. So the step of a
teacher is the step of the sampler, and there is no second solver.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from sfumato.devices import moved
from sfumato.errors import ConfigError
from sfumato.paths import Path
from sfumato.samplers.core import Ask, SamplerFn


def walked(
    sampler: SamplerFn, path: Path, x: Tensor, times: Tensor, denoise: Callable[[Tensor, Tensor], Tensor]
) -> Tensor:
    """Where a sampler takes each row of x (B, ...) along its own times, (B, n + 1), falling: (B, ...).

    denoise: E[x0 | x_t] of the whole batch at times (B,), called once a round; a row whose walk has ended is asked
    again where it was last, and its answer is not used. ConfigError for a sampler that draws noise.
    """
    kinds, which = torch.unique(times.to("cpu", torch.float64), dim=0, return_inverse=True)
    rows = [(which == k).nonzero().flatten().to(x.device) for k in range(len(kinds))]
    running = [sampler(path, x[row], kind) for row, kind in zip(rows, kinds, strict=True)]
    asks: dict[int, Ask] = {}
    state, now, done = x.clone(), kinds[which, 0], torch.empty_like(x)

    def go_on(k: int, answer: Tensor | None) -> None:
        try:
            asked = next(running[k]) if answer is None else running[k].send(answer)
        except StopIteration as end:
            asks.pop(k, None)
            done[rows[k]] = end.value
            return
        if not isinstance(asked, Ask):
            what, fix = "a teacher's step is made by a sampler that draws no noise", "ddim"
            raise ConfigError(what, where="objective", seen=getattr(sampler, "__name__", str(sampler)), fix=fix)
        asks[k] = asked

    for k in range(len(kinds)):
        go_on(k, None)
    while asks:
        for k, ask in asks.items():
            state = state.index_copy(0, rows[k], ask.x)
            now = torch.where(which == k, ask.t, now)
        answers = denoise(state, moved(now, x.device, torch.promote_types(x.dtype, torch.float32)))
        for k in list(asks):
            go_on(k, answers[rows[k]].to(x.dtype))
    return done

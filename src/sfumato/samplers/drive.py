"""Driving samplers: one over a denoiser, step by step; or many at once with one batched forward a round."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sfumato.denoiser import Denoise, joined
from sfumato.errors import ConfigError
from sfumato.guidance import Branch, Forward, Guidance
from sfumato.paths import Path
from sfumato.samplers.core import Ask, Running, Step


def sample(running: Running, denoise: Denoise) -> Iterator[Step]:
    """Drive one sampler over one denoiser. Yields a `Step` for each answer and a last one, whose x is the result.

    Stop iterating to stop sampling. Gradients flow if the caller lets them: wrap the loop in `torch.no_grad()` else.
    """
    try:
        ask = next(running)
        while True:
            x0 = denoise(_answerable(ask, denoise).x, ask.t)
            yield Step(ask.t, ask.x, x0)
            ask = running.send(x0)
    except StopIteration as end:
        yield Step(0.0, end.value, end.value)


def drive(running: Running, denoise: Denoise) -> Tensor:
    """Drive one sampler to its end and return the result."""
    last: Step | None = None
    for last in sample(running, denoise):
        pass
    assert last is not None  # `sample` always yields the result
    return last.x


@dataclass(frozen=True)
class Job:
    """A running sampler on a path, and the guidance that answers it. Its rows are one request's pictures."""

    running: Running
    path: Path
    guidance: Guidance


def drive_many(jobs: Sequence[Job], forward: Forward) -> list[Tensor]:
    """Run several samplers together: whatever they ask, whatever their step, method or length, one forward a round.

    forward(x (R, ...), t (R,), cond) -> x0 answers all rows of equal shape at once. Returns the jobs' results in order,
    equal to their solo runs.
    """
    results: dict[int, Tensor] = {}
    asks: dict[int, Ask] = {}
    for i, job in enumerate(jobs):
        _advance(i, job, None, asks, results)
    while asks:
        waiting, answers = list(asks.items()), _answers(jobs, asks, forward)
        for i, ask in waiting:
            x0 = jobs[i].guidance.combine(jobs[i].path, ask.x, ask.t, answers[i])
            _advance(i, jobs[i], x0, asks, results)
    return [results[i] for i in range(len(jobs))]


def _advance(i: int, job: Job, x0: Tensor | None, asks: dict[int, Ask], results: dict[int, Tensor]) -> None:
    """Send an answer to job i and note its next question, or its result."""
    try:
        asks[i] = _answerable(next(job.running) if x0 is None else job.running.send(x0), None)
    except StopIteration as end:
        asks.pop(i, None)
        results[i] = end.value


def _answers(jobs: Sequence[Job], asks: dict[int, Ask], forward: Forward) -> dict[int, list[Tensor]]:
    """The answers to every branch of every question, evaluated in one batch for each shape of state and condition."""
    groups: dict[tuple[object, ...], list[tuple[int, Ask, Branch]]] = {}
    for i, ask in asks.items():
        for branch in jobs[i].guidance.branches(jobs[i].path, ask.t):
            kind = (ask.x.shape[1:], ask.x.dtype, tuple(sorted(branch.cond)), branch.variant)
            groups.setdefault(kind, []).append((i, ask, branch))
    answers: dict[int, list[Tensor]] = {i: [] for i in asks}
    for rows in groups.values():
        x = torch.cat([ask.x for _, ask, _ in rows])
        dtype = torch.promote_types(x.dtype, torch.float32)
        t = torch.tensor([ask.t for _, ask, _ in rows for _ in range(len(ask.x))], dtype=dtype).to(
            x.device, non_blocking=True
        )
        x0 = forward(x, t, joined([branch.cond for _, _, branch in rows]))
        for (i, _, _), part in zip(rows, torch.split(x0, [len(ask.x) for _, ask, _ in rows]), strict=True):
            answers[i].append(part)
    return answers


def _answerable(ask: Ask, denoise: Denoise | None) -> Ask:
    answers: tuple[str, ...] = getattr(denoise, "answers", ("x0",))
    if ask.to is not None and ask.to not in answers:
        raise ConfigError(
            f"this sampler needs a model that answers {ask.to!r}",
            where="sampler",
            seen=f"a model that answers {', '.join(answers)}",
        )
    return ask

"""Driving samplers: one over a denoiser, step by step; or many at once with one batched forward a round."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from sfumato.denoiser import JUMP, VARIANCE, Denoise, joined
from sfumato.devices import moved
from sfumato.errors import ConfigError
from sfumato.guidance import Branch, Forward, Guidance, Variants, combined, started, varied
from sfumato.paths import Path
from sfumato.samplers.core import Ask, Draw, Noise, Running, Step


def sample(running: Running, denoise: Denoise, noise: Noise = torch.randn_like) -> Iterator[Step]:
    """Drive one sampler over one denoiser. Yields a `Step` for each answer and a last one, whose x is the result.

    noise: where its chance comes from, see `SeededNoise`. Stop iterating to stop sampling. Gradients flow if the caller
    lets them: wrap the loop in `torch.no_grad()` else.
    """
    answer: Tensor | None = None
    drawn: Draw | None = None
    while True:
        try:
            asked = next(running) if answer is None else running.send(answer)
        except StopIteration as end:
            yield Step(0.0, end.value, end.value, drawn)
            return
        if isinstance(asked, Draw):
            answer, drawn = drawn_from(asked, noise), asked
            continue
        answer = denoise(asked.x, asked.t, **_asking(asked, denoise))
        yield Step(asked.t, asked.x, _x0(asked, answer), drawn)
        drawn = None


def drive(running: Running, denoise: Denoise, noise: Noise = torch.randn_like) -> Tensor:
    """Drive one sampler to its end and return the result."""
    last: Step | None = None
    for last in sample(running, denoise, noise):
        pass
    assert last is not None  # `sample` always yields the result
    return last.x


def drawn_from(draw: Draw, noise: Noise) -> Tensor:
    """A state from where a sampler wants it to come: (B, ...)."""
    eps = noise(draw.mean)
    if isinstance(draw.std, Tensor):
        return torch.addcmul(draw.mean, eps, draw.std)
    return torch.add(draw.mean, eps, alpha=draw.std)


@dataclass(frozen=True)
class Job:
    """A running sampler on a path, the guidance that answers it, and its noise. Its rows are one request's pictures."""

    running: Running
    path: Path
    guidance: Guidance
    noise: Noise = torch.randn_like


def drive_many(jobs: Sequence[Job], forward: Forward, variants: Variants | None = None) -> list[Tensor]:
    """Run several samplers together: whatever they ask, whatever their step, method or length, one forward a round.

    forward(x (R, ...), t (R,), cond) -> x0 answers all rows of equal shape at once; like a `Denoiser`, it may have
    `answers` and take `to` and `until` (R,). variants: as of `guided`. Returns the jobs' results in order, equal to
    their solo runs.
    """
    together, results = Together(forward, variants), dict[int, Tensor]()
    for job in jobs:
        together.add(job)
    while len(results) < len(jobs):
        results |= together.round()
    return [results[i] for i in range(len(jobs))]


class Together:
    """Samplers that run together, one forward a round; others may join between two rounds. See `drive_many`.

    answers: what the forward can be asked for, where it does not say so itself.
    """

    def __init__(
        self, forward: Forward, variants: Variants | None = None, answers: tuple[str, ...] | None = None
    ) -> None:
        self._forward, self._variants, self._known = forward, variants, answers
        self._jobs: dict[int, Job] = {}
        self._asks: dict[int, Ask] = {}
        self._ended: dict[int, Tensor] = {}
        self._added = 0

    def __len__(self) -> int:
        """How many are not at their end."""
        return len(self._jobs)

    def add(self, job: Job) -> int:
        """Begins a job, in the next round; its number, from 0."""
        number, self._added = self._added, self._added + 1
        self._jobs[number] = replace(job, guidance=started(job.guidance))
        self._advance(number, None)
        return number

    def round(self) -> dict[int, Tensor]:
        """One forward for whatever is asked, and the results of those that it ended, by number."""
        if self._asks:
            wanted = {i: self._jobs[i].guidance.branches(self._jobs[i].path, ask.t) for i, ask in self._asks.items()}
            answers = _answers(self._asks, wanted, self._forward, self._variants, self._known)
            for i, ask in list(self._asks.items()):
                job = self._jobs[i]
                self._advance(i, combined(job.guidance, job.path, ask.x, ask.t, answers[i]))
        ended, self._ended = self._ended, {}
        return ended

    def _advance(self, number: int, answer: Tensor | None) -> None:
        """Send a job an answer, draw what it wants drawn, and note its next question, or its result."""
        job = self._jobs[number]
        while True:
            try:
                asked = next(job.running) if answer is None else job.running.send(answer)
            except StopIteration as end:
                self._asks.pop(number, None)
                del self._jobs[number]
                self._ended[number] = end.value
                return
            if isinstance(asked, Ask):
                self._asks[number] = asked
                return
            answer = drawn_from(asked, job.noise)


def _answers(
    asks: Mapping[int, Ask],
    wanted: Mapping[int, Sequence[Branch]],
    forward: Forward,
    variants: Variants | None,
    known: tuple[str, ...] | None,
) -> dict[int, list[Tensor]]:
    """The answers to every branch of every question, in order: one batch for each shape of state and condition, each
    variant of the network and each kind of answer.
    """
    groups: dict[tuple[object, ...], list[tuple[int, int]]] = {}
    for i, ask in asks.items():
        for k, branch in enumerate(wanted[i]):
            alike = (branch.variant, ask.to, ask.until is None)
            kind = (ask.x.shape[1:], ask.x.dtype, tuple(sorted(branch.cond)), *alike)
            groups.setdefault(kind, []).append((i, k))
    answers: dict[tuple[int, int], Tensor] = {}
    for rows in groups.values():
        some = [asks[i] for i, _ in rows]
        x = torch.cat([ask.x for ask in some])
        i, k = rows[0]
        model = varied(forward, variants, wanted[i][k].variant)
        cond = joined([wanted[i][k].cond for i, k in rows])
        asking = _asking(some[0], model, known)
        if "until" in asking:
            asking["until"] = _row_by_row(x, [(float(ask.until or 0), len(ask.x)) for ask in some])
        said = model(x, _row_by_row(x, [(ask.t, len(ask.x)) for ask in some]), cond, **asking)
        answers |= zip(rows, torch.split(said, [len(ask.x) for ask in some]), strict=True)
    return {i: [answers[i, k] for k in range(len(branches))] for i, branches in wanted.items()}


def _row_by_row(x: Tensor, times: Sequence[tuple[float, int]]) -> Tensor:
    """Times, each of so many rows, beside x: (B,)."""
    each = [t for t, rows in times for _ in range(rows)]
    dtype = torch.promote_types(x.dtype, torch.float32)
    return moved(torch.tensor(each, dtype=dtype), x.device)


def _x0(ask: Ask, answer: Tensor) -> Tensor:
    """What the model takes the data to be: an answer without the channels of a learned variance."""
    return answer[:, : ask.x.shape[1]] if ask.to == VARIANCE else answer


def _asking(ask: Ask, model: object, known: tuple[str, ...] | None = None) -> dict[str, Any]:
    """How to ask a model: plainly for the first of its answers, by name for another. ConfigError if it has no such."""
    answers: tuple[str, ...] = getattr(model, "answers", ("x0",)) if known is None else known
    if ask.to not in answers:
        what, fix = _NEEDS.get(ask.to, (f"this sampler needs a model that answers {ask.to!r}", None))
        raise ConfigError(what, where="sampler", seen=f"a model that answers {', '.join(answers)}", fix=fix)
    asking: dict[str, Any] = {} if ask.to == answers[0] else {"to": ask.to}
    return asking if ask.until is None else asking | {"until": ask.until}


_NEEDS = {  # why, and what else one can do
    "x0": (
        "this sampler needs the posterior mean E[x0 | x_t], and this model has learned something else",
        "sampler=consistency or sampler=lcm, for a model that answers where the flow ends",
    ),
    VARIANCE: (
        "this sampler needs a network that gives a variance beside its prediction",
        "sampler.variance=small or sampler.variance=large",
    ),
    "endpoint": (
        "this sampler needs a consistency model, which answers where the flow ends, not with a mean",
        "another sampler, or sampler.to=x0 to take the average for the end",
    ),
    JUMP: (
        "this sampler needs a model that knows how far a jump goes, as MeanFlow and shortcut models do",
        "sampler=ddim, whose steps are short jumps, or sampler=consistency where a model answers where the flow ends",
    ),
}

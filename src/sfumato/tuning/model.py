"""Tuning for a trained model: the conditions it will be asked for, noise for each, and its guidance."""

from collections.abc import Sequence
from pathlib import Path

import torch

from sfumato.conditioners import Raw
from sfumato.data.order import indices
from sfumato.metrics.flow import bound
from sfumato.overlay import run_data
from sfumato.pipeline import Pipeline
from sfumato.tuning.learn import Progress, Tuned, tune
from sfumato.tuning.teacher import Problem


def problems(
    pipeline: Pipeline, raw: Sequence[Raw], *, batch: int, guidance: float | None = None, seed: int = 0
) -> list[Problem]:
    """Noise for each condition, in batches, with the guidance that the model recommends or another scale."""
    found = []
    shape = pipeline.model.codec.shape(*pipeline.model.size)
    path, rng = pipeline.model.denoiser.path, torch.Generator().manual_seed(seed)
    top = float(path.sigma(torch.ones((), dtype=torch.float64)))
    for start in range(0, len(raw), batch):
        part = raw[start : start + batch]
        noise = torch.randn(len(part), *shape, generator=rng).to(pipeline.device) * top
        found.append(Problem(noise, bound(pipeline, part, guidance)))
    return found


def tune_model(
    pipeline: Pipeline,
    raw: Sequence[Raw],
    n: int,
    *,
    batch: int = 16,
    guidance: float | None = None,
    iterations: int = 100,
    teacher_steps: int = 60,
    seed: int = 0,
    seconds: float | None = None,
    progress: Progress | None = None,
) -> Tuned:
    """A sampler of n calls for a model: three quarters of the conditions to tune on, the others to choose by.

    seconds: as of `tune`.
    """
    found = problems(pipeline, raw, batch=batch, guidance=guidance, seed=seed)
    cut = max(1, len(found) * 3 // 4)
    return tune(
        found[:cut],
        found[cut:] or problems(pipeline, raw[:batch], batch=batch, guidance=guidance, seed=seed + 1),
        n,
        iterations=iterations,
        teacher_steps=teacher_steps,
        seconds=seconds,
        progress=progress,
    )


def examples(run: Path, n: int) -> list[Raw]:
    """The fields of up to n pictures of a run's data, from everywhere in it; nothing said where there is no run."""
    dataset = run_data(run)
    if dataset is None:
        return [{}]
    some = indices(0, min(n, len(dataset)), len(dataset), 0)
    return list(dataset.batch(some.tolist())[1])

"""Tuning for a model on disk: the conditions it will be asked for, noise, and the small file that results."""

import json
from collections.abc import Sequence
from pathlib import Path

import torch

from sfumato import files
from sfumato.conditioners import Raw
from sfumato.guidance import guided
from sfumato.pipeline import Pipeline
from sfumato.tuning.learn import Progress, Tuned, tune
from sfumato.tuning.teacher import Problem

FORMAT = {"format": "sfumato-sampler", "version": 1}


def problems(
    pipeline: Pipeline, raw: Sequence[Raw], *, batch: int, guidance: float | None = None, seed: int = 0
) -> list[Problem]:
    """Noise for each condition, in batches, with the guidance that the model recommends or another scale."""
    settings, found = pipeline.settings(guidance=guidance), []
    shape = pipeline.model.codec.shape(*pipeline.model.size)
    path, rng = pipeline.model.denoiser.path, torch.Generator().manual_seed(seed)
    top = float(path.sigma(torch.ones((), dtype=torch.float64)))
    for start in range(0, len(raw), batch):
        part = raw[start : start + batch]
        with torch.no_grad():
            cond = pipeline.model.cond(part)
            null = pipeline.model.cond([{}] * len(part))
        guide = settings.guide(cond, lambda null=null: null)  # type: ignore[misc]
        noise = torch.randn(len(part), *shape, generator=rng).to(pipeline.device) * top
        found.append(Problem(noise, guided(pipeline.model, path, guide)))
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
    progress: Progress | None = None,
) -> Tuned:
    """A sampler of n calls for a model: three quarters of the conditions to tune on, the others to choose by."""
    found = problems(pipeline, raw, batch=batch, guidance=guidance, seed=seed)
    cut = max(1, len(found) * 3 // 4)
    return tune(
        found[:cut],
        found[cut:] or problems(pipeline, raw[:batch], batch=batch, guidance=guidance, seed=seed + 1),
        n,
        iterations=iterations,
        teacher_steps=teacher_steps,
        progress=progress,
    )


def save_tuned(folder: Path, tuned: Tuned, guidance: float) -> Path:
    """Writes `samplers/N.json` into a model directory, where `Pipeline` finds it; the path."""
    place = Path(folder) / "samplers"
    place.mkdir(exist_ok=True)
    facts = {"guidance": guidance, "error": tuned.error, "before": tuned.before}
    path = place / f"{tuned.steps}.json"
    files.write_atomic(path, json.dumps({**FORMAT, **tuned.settings(), **facts}, indent=1) + "\n")
    return path

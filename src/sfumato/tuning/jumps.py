"""Where a model of few jumps should draw noise anew: times found one after the other, by what is then drawn.

The draws of consistency models end on no one trajectory, so there is no exact solution to come near. What is compared
are distributions, picture by picture: the energy score of two draws of a prompt against a picture of that prompt, E|x -
y| - E|x - x'| / 2, is least in the mean where both are drawn alike (Gneiting & Raftery 2007). Each further time is put
where the score is best, by a search that narrows an interval of log noise levels, as Song et al. 2023 (section 3) do
with FID.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sfumato.catalogue import SAMPLERS, build
from sfumato.conditioners import Raw
from sfumato.data.order import indices
from sfumato.data.picture import Image
from sfumato.errors import ConfigError
from sfumato.metrics.energy import energy_score, numbers
from sfumato.overlay import run_config, run_data
from sfumato.paths import Path as NoisePath
from sfumato.paths import log_snr
from sfumato.pipeline import Pipeline, load
from sfumato.tuning.learn import Progress

GOLDEN = (math.sqrt(5) - 1) / 2
LOWEST, HIGHEST = math.log(0.02), math.log(80.0)  # of the log noise levels that are looked at
ROUNDS = 8  # of narrowing: to 3% of the interval


@dataclass(frozen=True)
class Chosen:
    """What was found. error: the energy score on noise that was not searched with; before: that of the model's own
    grid. sampler: the model's own slot.
    """

    sampler: Mapping[str, Any]
    times: list[float]
    error: float
    before: float

    @property
    def steps(self) -> int:
        return len(self.times) - 1

    def settings(self) -> dict[str, Any]:
        """The slots of a sampler and a grid that do what was found."""
        return {"sampler": self.sampler, "grid": {"kind": "explicit", "times": self.times}, "steps": self.steps}


def jumps(pipeline: Pipeline) -> bool:
    """Whether a model is sampled by jumps, and not by a solver of the flow."""
    line = SAMPLERS.get(str(_slot(pipeline.settings().sampler)["kind"]))
    return line is not None and line.asks in ("endpoint", "jump")


def best_levels(
    score: Callable[[Sequence[float]], float],
    n: int,
    *,
    lowest: float = LOWEST,
    highest: float = HIGHEST,
    rounds: int = ROUNDS,
    tell: Callable[[], None] | None = None,
) -> list[float]:
    """n - 1 falling log noise levels, at which noise is drawn anew after the first jump, with the least score.

    score: of some such levels. One after the other, each below the last, by golden sections of the interval that is
    left: `rounds` + 2 scores a level. The score is taken to have one valley there, as it nearly has.
    """
    found: list[float] = []
    for _ in range(n - 1):
        low, high = lowest, found[-1] if found else highest
        known: dict[float, float] = {}

        def of(level: float, known: dict[float, float] = known) -> float:
            if level not in known:
                known[level] = score([*found, level])
                if tell is not None:
                    tell()
            return known[level]

        a, b = high - GOLDEN * (high - low), low + GOLDEN * (high - low)
        of(a), of(b)
        for _ in range(rounds):
            if of(a) < of(b):
                high, b = b, a
                a = high - GOLDEN * (high - low)
                of(a)
            else:
                low, a = a, b
                b = low + GOLDEN * (high - low)
                of(b)
        found.append(min(known, key=lambda level: known[level]))
    return found


def choose_times(
    pipeline: Pipeline,
    prompts: Sequence[Raw],
    truth: Image,
    n: int,
    *,
    batch: int = 16,
    seed: int = 0,
    rounds: int = ROUNDS,
    progress: Progress | None = None,
) -> Chosen:
    """The times of n jumps of a model at which what it draws of prompts is nearest to pictures of them (N, H, W, 3).

    The first jump starts where the model's own grid does. The same noise serves all scores; where what is found is no
    better on other noise than the model's own grid, that is kept.
    """
    settings = pipeline.settings(steps=n)
    path = pipeline.model.denoiser.path
    own: list[float] = build(settings.grid, "Grid")(path, n).tolist()
    pictures = numbers(truth)

    def score(times: Sequence[float], seed: int = seed) -> float:
        grid = {"kind": "explicit", "times": list(times)}
        drawn = []
        for k in range(2):
            seeds = [2 * (seed * len(prompts) + i) + k for i in range(len(prompts))]
            said = pipeline.sample(
                prompts, seeds=seeds, steps=len(times) - 1, sampler=settings.sampler, grid=grid, batch=batch
            )
            drawn.append(numbers(said.images))
        return energy_score(drawn, pictures)

    def times_of(levels: Sequence[float]) -> list[float]:
        inner = [float(path.time(torch.tensor(-2 * level, dtype=torch.float64))) for level in levels]
        return [own[0], *inner, 0.0]

    done, whole = 0, (n - 1) * (rounds + 2)

    def tell() -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done, whole)

    top = min(HIGHEST, _log_level(path, own[0]) - 1e-3)
    found = times_of(best_levels(lambda levels: score(times_of(levels)), n, highest=top, rounds=rounds, tell=tell))
    before, after = score(own, seed + 1), score(found, seed + 1)
    best = found if after < before else own
    return Chosen(_slot(settings.sampler), best, min(before, after), before)


def references(run: Path, prompts: Sequence[Raw] | None, n: int, teacher: Path | None) -> tuple[list[Raw], Image]:
    """n prompts, those given or of a run's data, and a picture of each: the teacher's, as it recommends; else the data.

    teacher: that of the run, unless said and where it is still there. ConfigError where there is nothing to look at.
    """
    said = (run_config(run) or {}).get("teacher")
    if teacher is None and said is not None and Path(said).exists():
        teacher = Path(said)
    dataset = None if prompts is not None and teacher is not None else run_data(run)
    some: list[int] = [] if dataset is None else indices(0, min(n, len(dataset)), len(dataset), 0).tolist()
    if dataset is not None and prompts is None:
        images, fields = dataset.batch(some)
        if teacher is None:
            return list(fields), images
        prompts = list(fields)
    if teacher is None or prompts is None:
        what = "there is nothing to compare with what is drawn"
        raise ConfigError(what, where="--teacher", seen="no teacher, and no data of a run", fix="--teacher RUN")
    pipeline, few = load(teacher), [prompts[i % len(prompts)] for i in range(n)]
    drawn = pipeline.sample(pipeline.model.known(few), seeds=10_000)
    return few, drawn.images


def _slot(sampler: str | Mapping[str, Any]) -> Mapping[str, Any]:
    return {"kind": sampler} if isinstance(sampler, str) else sampler


def _log_level(path: NoisePath, t: float) -> float:
    return -float(log_snr(path, torch.tensor(t, dtype=torch.float64))) / 2

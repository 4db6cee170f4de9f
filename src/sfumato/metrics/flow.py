"""What the flow of a model is worth: the likelihood of pictures that training never saw, and how straight it is.

Bits a dimension are those of pictures with even noise in the cell of each of their 256 levels, an upper bound of what a
code of the pictures would take (see `sfumato.likelihood`). Straightness says how few steps may do (see
`sfumato.straightness`). Both are means over samples, with the standard error of such a mean and a 95% interval.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from sfumato.catalogue import build
from sfumato.codecs import Pixels
from sfumato.conditioners import Raw, silent
from sfumato.data.loader import Loader
from sfumato.data.order import indices
from sfumato.data.picture import Image
from sfumato.denoiser import Bound
from sfumato.errors import ConfigError, DataError
from sfumato.guidance import guided
from sfumato.likelihood import LEVEL, Adaptive, Fixed, bits_per_dim, bits_through_noise, dequantised, log_likelihood
from sfumato.metrics.intervals import told_mean
from sfumato.overlay import load_config
from sfumato.pipeline import Pipeline
from sfumato.straightness import straightness

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Examples:
    """Pictures (N, H, W, 3) uint8 of a run's data with their fields, whether training never saw them, and the kind of
    the data.
    """

    images: Image
    fields: Sequence[Raw]
    held_out: bool
    kind: str = ""


def examples(run: Path, n: int) -> Examples:
    """Up to n pictures that a run held out; of a run that held none out, pictures that it saw.

    run: its folder, or its `model/`. DataError where there is no configuration that tells the data.
    """
    found = next((one for one in (run / "config.yaml", run / "../config.yaml") if one.is_file()), None)
    if found is None:
        fix = "the folder of the run, with config.yaml"
        raise DataError("a model alone does not tell its data", where=str(run), seen="no config.yaml", fix=fix)
    config = load_config(str(found)).config
    dataset = build(config.source, "Data")
    loader = Loader(dataset, 1, config.seed, workers=0, holdout=config.validate_.holdout)
    held = loader.held_out().tolist()[:n]
    places = held or indices(0, min(n, len(dataset)), len(dataset), config.seed).tolist()
    images, fields = dataset.batch(places)
    return Examples(images, list(fields), bool(held), str(config.data["kind"]))


def bound(pipeline: Pipeline, raw: Sequence[Raw], guidance: float | None = None) -> Bound:
    """What samplers ask, for just these conditions. guidance: a scale; as the model recommends unless said."""
    model = pipeline.model
    with torch.no_grad():
        cond = model.cond(raw)
        kept = () if model.conditioner is None else model.conditioner.kept
        null = model.cond([silent(one, kept) for one in raw])
    guide = pipeline.settings(guidance=guidance).guide(cond, lambda: null)
    return guided(model, model.denoiser.path, guide, variants=pipeline.forwards.variant)


def judge_likelihood(
    pipeline: Pipeline,
    found: Examples,
    *,
    probes: int | Literal["exact"] = 1,
    steps: int | None = None,
    level: float | None = None,
    seed: int = 0,
    batch: int = 100,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Bits a dimension of pictures under their own conditions, without guidance, as plain data.

    probes: of the trace, for each picture; "exact" takes as many backward passes a call as a picture has numbers.
    steps: of a fixed grid; a method within tolerances of 1e-4 unless said. level: the noise sigma / alpha that pictures
    are told by, see `bits_through_noise`; by even noise unless said.
    ConfigError for a model of latents, in which the density is another one than of pictures.
    """
    codec, started, rng = pipeline.model.codec, time.perf_counter(), torch.Generator().manual_seed(seed)
    if not isinstance(codec, Pixels):
        seen, fix = type(codec).__name__, "sfumato.likelihood.log_likelihood, of latents"
        raise ConfigError("bits a dimension are of models of pixels", where="likelihood", seen=seen, fix=fix)
    solver = Adaptive(1e-4, 1e-4) if steps is None else Fixed(steps)
    cell, each, calls = codec.scale / 127.5, list[Tensor](), list[int]()
    for start in range(0, len(found.images), batch):
        part = slice(start, start + batch)
        x0 = codec.encode(torch.from_numpy(found.images[part]).permute(0, 3, 1, 2).float() / 127.5 - 1)
        noisy = dequantised(x0, rng, cell) if level is None else x0 + level * torch.randn(x0.shape, generator=rng)
        said = log_likelihood(
            bound(pipeline, found.fields[part], 1.0),
            noisy.to(pipeline.device),
            probes=probes,
            solver=solver,
            level=level or LEVEL,
            rng=rng,
        )
        bits = bits_per_dim(said.log_p, x0[0].numel(), cell)
        each.append(bits if level is None else _through(said.log_p, x0, noisy, level, codec.scale))
        calls.append(said.calls)
        if progress is not None:
            progress(min(start + batch, len(found.images)), len(found.images))
    by = "even" if level is None else level
    facts = {
        "probes": probes,
        "solver": str(solver),
        "noise": by,
        "calls": max(calls),
        "held_out": found.held_out,
        "seed": seed,
    }
    return {"suite": "likelihood", "bits_per_dim": told_mean(torch.cat(each).tolist()), **facts, **_spent(started)}


def _through(log_p: Tensor, x0: Tensor, noisy: Tensor, level: float, scale: float) -> Tensor:
    """`bits_through_noise` of scaled pictures, in the units of pictures."""
    log_p = log_p + x0[0].numel() * math.log(scale)
    return bits_through_noise(log_p, x0 / scale, noisy / scale, level / scale)


def judge_straightness(
    pipeline: Pipeline,
    raw: Sequence[Raw],
    *,
    steps: int = 100,
    guidance: float = 1.0,
    seed: int = 0,
    batch: int = 100,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Straightness a dimension, of one trajectory for each condition, and the curve over t, as plain data.

    relative: as a share of the mean square of z1 - z0 over the same trajectories.
    """
    model, started = pipeline.model, time.perf_counter()
    rng, shape = torch.Generator().manual_seed(seed), model.codec.shape(*model.size)
    each, lengths, curve, t = list[Tensor](), list[Tensor](), torch.zeros(steps, dtype=torch.float64), torch.zeros(0)
    for start in range(0, len(raw), batch):
        part = raw[start : start + batch]
        noise = torch.randn(len(part), *shape, generator=rng).to(pipeline.device)
        one = straightness(bound(pipeline, part, guidance), noise, steps)
        each.append(one.each)
        lengths.append((noise - one.x0).flatten(1).square().mean(1).double().cpu())
        curve, t = curve + one.curve * len(part) / len(raw), one.t
        if progress is not None:
            progress(min(start + batch, len(raw)), len(raw))
    whole = torch.cat(each)
    shape_of = {"t": [round(v, 4) for v in t.tolist()], "error": [round(v, 6) for v in curve.tolist()]}
    facts = {"relative": round(float(whole.mean() / torch.cat(lengths).mean()), 5), "guidance": guidance, "seed": seed}
    return {
        "suite": "straightness",
        "straightness": told_mean(whole.tolist()),
        **facts,
        "curve": shape_of,
        **_spent(started),
    }


def _spent(started: float) -> dict[str, float]:
    return {"seconds": round(time.perf_counter() - started, 1)}

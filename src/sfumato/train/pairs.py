"""The pairs that a student learns from: noise, and where its teacher's flow takes it.

They are made once, before training, shard by shard into a store that is named by all that they depend on: the teacher's
weights, its guidance, the solver, the seed, the data that conditions come from. Who is stopped goes on with the first
shard that is missing, and makes what would have been made. Pairs are of the teacher's own path, from its pure noise.
"""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sfumato import files
from sfumato.catalogue import build
from sfumato.config import Config, PairsSection
from sfumato.data.pairs import Paired, PairStore
from sfumato.data.picture import Dataset
from sfumato.errors import ConfigError, DataError, Interrupted
from sfumato.guidance import given, guided, models_of
from sfumato.io.models import model_folder, read_model
from sfumato.names import spelled_out
from sfumato.paths import spread
from sfumato.samplers import drive
from sfumato.settings import fitted_grid
from sfumato.train.cache import digest, identity
from sfumato.train.keys import generator
from sfumato.train.step import PRECISIONS
from sfumato.train.teaching import Student

FOLDER = "pairs"  # of a run, unless the configuration names another


def pairs_for(
    config: Config,
    student: Student,
    dataset: Dataset,
    folder: Path,
    device: torch.device,
    say: Callable[[str], None],
    stopping: Callable[[], bool],
) -> tuple[PairStore, Paired]:
    """The pairs of a run, whole: those that are missing are made. folder: of the run.

    Raises Interrupted after the shard at which it was told to stop, ConfigError for a solver that draws noise,
    DataError if the teacher's answers are not finite or the disk has no room.
    """
    said = pairs_of(config)
    place = folder / FOLDER if said.folder is None else Path(said.folder).expanduser()
    paired = Paired(dataset, said.count, config.seed)
    store = PairStore(place, _about(config, student, dataset), len(paired), student.codec.shape(*dataset.shape))
    with files.lock(store.folder, "making pairs"):
        files.sweep(store.folder)
        missing = store.missing(thorough=True)
        needed = store.size * len(missing) / store.shards
        if needed > (free := files.free_space(store.folder)):
            seen = f"{needed / 2**20:,.0f} MiB needed, {free / 2**20:,.0f} MiB free"
            raise DataError("the disk has no room for the pairs", where=str(store.folder), seen=seen)
        if missing:
            say(f"making {len(paired):,} pairs of noise and picture in {store.folder}")
        for shard in missing:
            store.write(shard, _made(config, student, paired, store.indices(shard), device))
            say(f"pairs {store.indices(shard)[-1] + 1:,} of {len(paired):,}")
            if stopping() and store.missing():
                where = f"{store.shards - len(store.missing())} of {store.shards} parts"
                raise Interrupted("stopped, and the pairs so far are kept", where=where, fix="the same command again")
    return store, paired


def pairs_of(config: Config) -> PairsSection:
    """What a configuration says of its pairs."""
    assert config.pairs is not None  # which the configuration of such a method always has
    return config.pairs


def _about(config: Config, student: Student, dataset: Dataset) -> dict[str, Any]:
    """Everything that pairs depend on, but how many they are."""
    assert student.teacher is not None  # which its method needs
    teacher, guidance = student.teacher
    said = pairs_of(config)
    weaker = [read_model(model_folder(name)) for name in models_of(guidance)]
    also = {"weaker": [[digest(one.net), one.spec["model"]] for one in weaker]} if weaker else {}
    return also | {
        "teacher": {name: digest(part) for name, part in sorted(teacher.parts().items())},
        "files": {name: hashlib.sha256(data).hexdigest() for name, data in sorted(teacher.files().items())},
        "model": teacher.spec["model"],
        "guidance": repr(guidance),
        "solver": [said.sampler, said.grid, said.steps],
        "batch": said.batch,
        "precision": config.precision,
        "seed": config.seed,
        "data": identity(dataset),
        "size": list(dataset.shape),
    }


@torch.no_grad()
def _made(config: Config, student: Student, paired: Paired, numbers: range, device: torch.device) -> Any:
    """The data and the noise of some pairs: (n, 2, C, h, w)."""
    parts = []
    at_once = pairs_of(config).batch
    for start in range(0, len(numbers), at_once):
        some = numbers[start : start + at_once]
        shape = student.codec.shape(*paired.shape)
        noise = torch.stack([torch.randn(shape, generator=generator(config.seed, "pair", k)) for k in some])
        x0 = flow_end(config, student, paired.fields(some), noise.to(device)).float().cpu()
        if not bool(x0.isfinite().all()):
            fix = "precision=fp32, or less teacher_guidance"
            raise DataError(
                "the teacher's answers are not finite numbers", where="pairs", seen=f"from {some[0]}", fix=fix
            )
        parts.append(torch.stack([x0, noise], 1).numpy())
    return np.concatenate(parts)


def flow_end(config: Config, student: Student, raw: Any, noise: Tensor) -> Tensor:
    """Where the teacher's flow takes noise (B, ...), under its guidance and the conditions of the pairs."""
    teacher = student.bound(raw)
    assert teacher is not None  # which its method needs
    path, wanted = teacher.denoiser.path, pairs_of(config)
    said = spelled_out({"sampler": wanted.sampler, "grid": wanted.grid})
    times = build(fitted_grid(said["grid"], *noise.shape[2:]), "Grid")(path, wanted.steps)
    guide = given(teacher.guidance, teacher.cond, teacher.null)
    dtype = PRECISIONS[config.precision]
    with torch.autocast(noise.device.type, dtype, enabled=dtype is not torch.float32):
        denoise = guided(teacher.denoiser, path, guide, times, teacher.variants)
        return drive(
            build(said["sampler"], "Sampler")(path, noise * spread(path, times[0]), times), denoise, _no_chance
        )


def _no_chance(like: Tensor) -> Tensor:
    fix = "pairs.sampler=dpmpp_2m, or another that draws no noise"
    raise ConfigError("pairs are the ends of a flow, and this sampler draws noise", where="pairs.sampler", fix=fix)

"""Filling and using caches: what a frozen autoencoder makes of the pictures, and a frozen text encoder of the captions.

Both depend on nothing that training changes, so they are computed once, by `sfumato data cache`, and every run that
would compute the same reads them instead. The name of a store is the digest of weights, description, data and size;
see `sfumato.data.cache`.
"""

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sfumato import codecs, files
from sfumato.adapters.training import begin
from sfumato.catalogue import build
from sfumato.conditioners import Conditioner, Raw, silent
from sfumato.config import Config
from sfumato.data.cache import LatentStore, StateStore
from sfumato.data.picture import Dataset, fields_of
from sfumato.denoiser import Cond, joined
from sfumato.errors import ConfigError, DataError
from sfumato.io.pretrained import codec_from, fill_codec
from sfumato.model import Model, Trainable, pick_device
from sfumato.overlay import resolved
from sfumato.train.control import under_control
from sfumato.train.pixels import pixels
from sfumato.train.start import model_of, read_start, with_start

VARIABLE, USUAL = "SFUMATO_CACHE", "~/.cache/sfumato"  # where caches lie when data.cache=true
AT_ONCE = 256  # conditions of a shard, about

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Cache:
    """The stores of a run: of latents, of states, or both. fields: what of raw conditions the states depend on; kept:
    those that stay when a condition is dropped.
    """

    latents: LatentStore | None
    states: StateStore | None
    fields: tuple[str, ...] = ()
    kept: tuple[str, ...] = ()

    def check(self, dataset: Dataset) -> None:
        """DataError, naming the command, unless everything that training will ask for is there."""
        faults = []
        if self.latents is not None and (missing := self.latents.missing()):
            faults.append(f"{len(missing)} of {self.latents.shards} shards of latents")
        if self.states is not None and (lacking := self.states.missing(self.asked(dataset))):
            faults.append(f"{len(lacking)} conditions, {dict(lacking[0])} for one")
        if faults:
            where = self.latents or self.states
            assert where is not None
            raise DataError(
                "the cache is not whole, or of other data or another autoencoder",
                where=str(where.folder),
                seen="missing: " + "; ".join(faults),
                fix="sfumato data cache CONFIG, with the same changes; or data.cache=null",
            )

    def asked(self, dataset: Dataset) -> Iterator[Raw]:
        """Every condition that training can ask for, the null conditions included; some more than once."""
        yield {}
        for start in range(0, len(dataset), 4096):
            for one in fields_of(dataset, range(start, min(start + 4096, len(dataset)))):
                known = {name: one[name] for name in self.fields if name in one}
                yield known
                if self.kept:
                    yield silent(known, self.kept)

    def cond(self, raw: Sequence[Raw], device: torch.device) -> Cond:
        """What the network is told for some raw conditions, from the store."""
        assert self.states is not None
        found = []
        for one in raw:
            known = {name: one[name] for name in self.fields if name in one}
            tensors = {name: torch.from_numpy(value)[None] for name, value in self.states.read(known).items()}
            found.append(tensors)
        return {name: value.to(device, non_blocking=True) for name, value in joined(found).items()}


def cache_folder(config: Config) -> Path | None:
    """Where a configuration has its caches; None where it has none."""
    said = config.cache
    if said is None or said is False:
        return None
    chosen = os.environ.get(VARIABLE) or USUAL if said is True else str(said)
    return Path(chosen).expanduser()


def cache_of(
    folder: Path,
    dataset: Dataset,
    codec: tuple[Mapping[str, Any], object],
    conditioner: tuple[Mapping[str, Any] | None, Conditioner | None],
) -> Cache:
    """The stores that fit a codec and a conditioner, each with its slot. ConfigError where nothing can be kept."""
    slot, coder = codec
    latents, states = None, None
    if isinstance(coder, (codecs.Latents, codecs.TinyLatents)):
        about = {
            "codec": {name: value for name, value in slot.items() if name not in ("weights", "sampled")},
            "weights": digest(coder),
            "data": identity(dataset),
            "size": list(dataset.shape),
        }
        latents = LatentStore(folder, about, len(dataset), coder.shape(*dataset.shape))
    described, teller = conditioner
    if teller is not None and not teller.pictures and _is_frozen(teller):
        assert described is not None
        files_ = {name: hashlib.sha256(data).hexdigest() for name, data in sorted(teller.files().items())}
        states = StateStore(folder, {"conditioner": _without(described), "weights": digest(teller), "files": files_})
    if latents is None and states is None:
        seen = f"codec {slot.get('kind')}, conditioner {None if described is None else described.get('kind')}"
        raise ConfigError(
            "there is nothing to keep: neither latents nor a frozen text encoder",
            where="data.cache",
            seen=seen,
            fix="data.cache=null",
        )
    fields = tuple(teller.fields) if teller is not None else ()
    return Cache(latents, states, fields, tuple(teller.kept) if teller is not None else ())


def cache_for(config: Config, model: Trainable, dataset: Dataset) -> Cache | None:
    """The stores that a configuration says to use, for a model that is about to be trained. They must be whole."""
    folder = cache_folder(config)
    if folder is None:
        return None
    if not isinstance(model, Model):
        raise ConfigError("an autoencoder is trained on pictures", where="data.cache", fix="data.cache=null")
    section = model.spec["model"]
    conditioner = (section["conditioner"], model.conditioner)
    cache = cache_of(folder, dataset, (_as_slot(section["codec"]), model.codec), conditioner)
    cache.check(dataset)
    return cache


@dataclass(frozen=True)
class Filled:
    """What was done: pictures and conditions that are kept, how many of them were made now, and bytes."""

    folder: str
    pictures: int
    pictures_made: int
    conditions: int
    conditions_made: int
    bytes: int


def fill(config: Config, folder: Path, progress: Callable[[str], Any]) -> Filled:
    """Makes what is missing of the stores of a configuration; what is damaged is made anew.

    progress: gives for a name a context manager of a function that is told (done, of how many).
    """
    device, dataset = pick_device(config.device), build(config.source, "Data")
    slot, codec, described, conditioner = _ends(config, dataset)
    cache = cache_of(folder, dataset, (_as_slot(slot), codec), (described, conditioner))
    pictures = conditions = 0
    with files.lock(folder, "filling a cache"):
        if cache.latents is not None:
            files.sweep(cache.latents.folder)
            with progress("latents") as tell:
                pictures = _fill_latents(cache.latents, codec.to(device), dataset, config.batch, device, tell)
        if cache.states is not None:
            files.sweep(cache.states.folder)
            with progress("conditions") as tell:
                conditions = _fill_states(cache, conditioner.to(device), dataset, tell)
    held = [one.folder for one in (cache.latents, cache.states) if one is not None]
    size = sum(path.stat().st_size for place in held for path in place.rglob("*") if path.is_file())
    kept = (cache.latents.rows if cache.latents else 0), (len(cache.states) if cache.states else 0)
    return Filled(str(folder), kept[0], pictures, kept[1], conditions, size)


def _ends(config: Config, dataset: Dataset) -> tuple[Any, Any, Any, Any]:
    """What stands at the ends of the network of a run: the codec's slot and itself, the conditioner's and itself."""
    if config.start is not None:
        start = read_start(config.start, config.start_key)
        start = start if config.control is None else under_control(start, config.control, config.seed)
        section = resolved(with_start(config, start))
        model = model_of(start, {name: section[name] for name in ("model", "sampling")} | {"size": list(dataset.shape)})
        if config.lora is not None:
            begin(model, config.lora)
        return section["model"]["codec"], model.codec, section["model"]["conditioner"], model.conditioner
    section = resolved(config)["model"]
    if section["net"] is None:
        raise ConfigError("an autoencoder is trained on pictures", where="model.net", seen="null", fix="another recipe")
    slot, weights = codec_from(section["codec"])
    codec = build(slot, "Codec")
    fill_codec(codec, weights)
    conditioner = build(section["conditioner"], "Conditioner")
    if conditioner is not None:
        conditioner.prepare(dataset)
        conditioner.of_size(dataset.shape)
    return slot, codec, section["conditioner"], conditioner


@torch.no_grad()
def _fill_latents(
    store: LatentStore,
    codec: codecs.Latents | codecs.TinyLatents,
    dataset: Dataset,
    batch: int,
    device: torch.device,
    tell: Progress,
) -> int:
    """How many pictures were encoded."""
    missing = store.missing(thorough=True)
    needed = store.size * len(missing) / max(1, store.shards)
    if needed > (free := files.free_space(store.folder)):
        seen = f"{needed / 2**20:,.0f} MiB needed, {free / 2**20:,.0f} MiB free"
        raise DataError("the disk has no room for the latents", where=str(store.folder), seen=seen)
    done, total = 0, sum(len(store.indices(shard)) for shard in missing)
    for shard in missing:
        parts, index = [], store.indices(shard)
        for start in range(0, len(index), batch):
            images = dataset.batch(list(index[start : start + batch]))[0]
            parts.append(torch.stack(codec.moments(pixels(images, device)), 1).float().cpu().numpy())
            done += len(images)
            tell(done, total)
        store.write(shard, np.concatenate(parts))
    return total


@torch.no_grad()
def _fill_states(cache: Cache, conditioner: Conditioner, dataset: Dataset, tell: Progress) -> int:
    """How many conditions were computed. One at a time: what a batch is padded to must not count."""
    assert cache.states is not None
    cache.states.refresh(thorough=True)
    missing = cache.states.missing(cache.asked(dataset))
    for start in range(0, len(missing), AT_ONCE):
        some = missing[start : start + AT_ONCE]
        told = []
        for i, one in enumerate(some):
            cond: Mapping[str, Tensor] = conditioner([one])
            told.append({name: value[0].cpu().numpy() for name, value in cond.items()})
            tell(start + i + 1, len(missing))
        cache.states.write(some, told)
    return len(missing)


def digest(module: nn.Module) -> str:
    """The SHA-256 of all weights and buffers of a module, by name."""
    whole = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        whole.update(f"{name} {value.dtype} {list(value.shape)}".encode())
        whole.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return whole.hexdigest()


def identity(dataset: Dataset) -> str:
    """The digest of what a data source says that its pictures are. ConfigError for one that does not say."""
    told = getattr(dataset, "identity", None)
    if told is None:
        fix = "a method identity() that gives a text, another one where the pictures are others"
        seen = type(dataset).__name__
        raise ConfigError("this data source does not say which pictures it has", where="data.cache", seen=seen, fix=fix)
    return hashlib.sha256(str(told()).encode()).hexdigest()


def _is_frozen(module: nn.Module) -> bool:
    """Whether a module has weights, and none of them learns."""
    learns = [p.requires_grad for p in module.parameters()]
    return bool(learns) and not any(learns)


def _without(slot: Any) -> Any:
    """A slot without the places of files, whose content counts."""
    if isinstance(slot, Mapping):
        return {name: _without(value) for name, value in slot.items() if name != "weights"}
    return [_without(one) for one in slot] if isinstance(slot, Iterable) and not isinstance(slot, str) else slot


def _as_slot(slot: Any) -> Mapping[str, Any]:
    return slot if isinstance(slot, Mapping) else {"kind": slot}

"""What is computed once for every picture and kept: latents, and the states of texts. Only files; who fills them is
`sfumato.train.cache`.

A store is a folder named by the digest of everything that its content depends on, so what has changed has another
name, and nothing in a store is ever stale. It is filled shard by shard; a shard appears whole, with a manifest, or not
at all, so whoever is stopped goes on with the first that is missing.
"""

import hashlib
import json
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from sfumato import files
from sfumato.errors import CheckpointError, DataError

VERSION = 1  # of what stores hold; another makes all names new
ABOUT = "about.json"
SHARD_BYTES = 64 * 2**20  # of the latents of a shard, about
MOST_ROWS = 1024  # of a shard, so that little is lost when it is not finished

Floats = NDArray[np.float32]


def digest_of(said: Any) -> str:
    """The SHA-256 of plain data, in hexadecimal."""
    return hashlib.sha256(json.dumps(said, sort_keys=True, ensure_ascii=False, default=str).encode()).hexdigest()


class LatentStore:
    """The latents of a data set: mean and standard deviation of each picture's distribution, by its index.

    folder: of all stores. about: everything that the latents depend on, plain data; its digest is the name.
    rows: how many pictures. shape: (C, h, w) of a latent.
    """

    kind: ClassVar[str] = "latents"
    again: ClassVar[str] = "sfumato data cache, once more"
    most: ClassVar[int | None] = None  # rows of a shard, if fewer than of others

    def __init__(self, folder: Path, about: Mapping[str, Any], rows: int, shape: tuple[int, int, int]) -> None:
        self.about = {"version": VERSION, **about, "rows": rows, "shape": list(shape)}
        self.folder = folder / self.kind / digest_of(self.about)[:32]
        self.rows, self.shape = rows, shape
        each = 2 * 4 * int(np.prod(shape))
        self.shard = min(self.most or MOST_ROWS, max(1, SHARD_BYTES // each))
        self._open: dict[int, Floats] = {}
        self._guard = threading.Lock()

    @property
    def shards(self) -> int:
        """How many there are when it is whole."""
        return -(-self.rows // self.shard)

    @property
    def size(self) -> int:
        """Bytes when it is whole."""
        return self.rows * 2 * 4 * int(np.prod(self.shape))

    def indices(self, shard: int) -> range:
        """The pictures of a shard."""
        return range(shard * self.shard, min((shard + 1) * self.shard, self.rows))

    def missing(self, *, thorough: bool = False) -> list[int]:
        """The shards that are not there. thorough: those that were altered, too, which takes reading them all."""
        return [i for i in range(self.shards) if not _sound(self._place(i), thorough)]

    def write(self, shard: int, moments: Floats) -> None:
        """Keeps the moments (rows of the shard, 2, C, h, w) of a shard. MachineError when the disk is full."""
        expected = (len(self.indices(shard)), 2, *self.shape)
        if moments.shape != expected:
            raise ValueError(f"{moments.shape} is not {expected}")
        _describe(self.folder, self.about)
        files.publish(self._place(shard), lambda place: np.save(place / "moments.npy", moments), replace=True)

    def read(self, indices: Iterable[int]) -> Floats:
        """The moments (B, 2, C, h, w) of some pictures. CheckpointError for a shard that is missing or truncated."""
        places = [divmod(int(index), self.shard) for index in indices]
        return np.stack([self._shard(shard)[row] for shard, row in places])

    def _shard(self, i: int) -> Floats:
        with self._guard:
            if i not in self._open:
                path = self._place(i) / "moments.npy"
                try:
                    found = np.load(path, mmap_mode="r")
                except (OSError, ValueError) as error:
                    seen = str(error)
                    raise CheckpointError("a cache lost a shard", where=str(path), seen=seen, fix=self.again) from None
                self._open[i] = found
            return self._open[i]

    def _place(self, shard: int) -> Path:
        return self.folder / f"{shard:06d}"


class StateStore:
    """What a frozen conditioner makes of raw conditions, by their content.

    folder: of all stores. about: everything that the states depend on but the conditions themselves. New conditions
    are added in new shards, so changed captions cost only themselves. A condition has tensors by name, of any shapes.
    """

    def __init__(self, folder: Path, about: Mapping[str, Any]) -> None:
        self.about = {"version": VERSION, **about}
        self.folder = folder / "states" / digest_of(self.about)[:32]
        self._where: dict[str, tuple[Path, int]] = {}
        self._open: dict[Path, Any] = {}
        self.refresh()

    def refresh(self, *, thorough: bool = False) -> None:
        """Looks at what is there."""
        self._where.clear()
        self._open.clear()
        there = sorted(one.parent for one in self.folder.glob(f"*/{files.MANIFEST}"))
        for place in there:
            if place.name[0] != "." and _sound(place, thorough):
                keys = json.loads((place / "keys.json").read_text(encoding="utf-8"))
                self._where |= {key: (place / "states.safetensors", row) for row, key in enumerate(keys)}

    def missing(self, raw: Iterable[Mapping[str, object]]) -> list[Mapping[str, object]]:
        """Those of some conditions that are not there, each once."""
        wanted = {key_of(one): one for one in raw}
        return [one for key, one in wanted.items() if key not in self._where]

    def write(self, raw: Sequence[Mapping[str, object]], states: Sequence[Mapping[str, NDArray[Any]]]) -> None:
        """Adds a shard of conditions with their states, whose tensors have no batch axis."""
        from safetensors.numpy import save_file

        keys = [key_of(one) for one in raw]
        flat = {f"{row}.{name}": np.array(value) for row, one in enumerate(states) for name, value in one.items()}

        def fill(place: Path) -> None:
            save_file(flat, place / "states.safetensors")
            (place / "keys.json").write_text(json.dumps(keys), encoding="utf-8")

        _describe(self.folder, self.about)
        place = self.folder / digest_of(keys)[:32]
        files.publish(place, fill, replace=True)
        self._where |= {key: (place / "states.safetensors", row) for row, key in enumerate(keys)}

    def read(self, raw: Mapping[str, object]) -> dict[str, NDArray[Any]]:
        """The states of a condition. DataError for one that is not there."""
        found = self._where.get(key_of(raw))
        if found is None:
            fix = "sfumato data cache, once more"
            raise DataError("a condition is not in the cache", where=str(self.folder), seen=str(dict(raw)), fix=fix)
        path, row = found
        if path not in self._open:
            self._open[path] = _opened(path)
        opened, names = self._open[path]
        return {name: opened.get_tensor(f"{row}.{name}") for name in names[row]}

    def __len__(self) -> int:
        return len(self._where)


def key_of(raw: Mapping[str, object]) -> str:
    """What a raw condition is found by: the digest of its content."""
    return digest_of({name: value for name, value in raw.items() if value is not None})[:32]


def _opened(path: Path) -> tuple[Any, dict[int, list[str]]]:
    """A file of states, mapped, and the names in each of its rows."""
    from safetensors import SafetensorError, safe_open

    try:
        opened = safe_open(path, framework="numpy")  # type: ignore[no-untyped-call]
    except (SafetensorError, OSError) as error:
        raise CheckpointError("a cache cannot be read", where=str(path), seen=str(error)) from None
    names: dict[int, list[str]] = {}
    for key in opened.keys():  # noqa: SIM118
        row, _, name = key.partition(".")
        names.setdefault(int(row), []).append(name)
    return opened, names


def _sound(place: Path, thorough: bool) -> bool:
    """Whether a shard is there, with files of the sizes that its manifest lists, and the digests if thorough."""
    try:
        if thorough:
            files.verify(place)
        listed = files.manifest(place)
        return all((place / name).stat().st_size == entry["size"] for name, entry in listed.items())
    except (CheckpointError, OSError):
        return False


def _describe(folder: Path, about: Mapping[str, Any]) -> None:
    """What a store depends on, for people."""
    if not (folder / ABOUT).is_file():
        with files.explained(folder):
            folder.mkdir(parents=True, exist_ok=True)
        files.write_atomic(folder / ABOUT, json.dumps(about, indent=1, default=str) + "\n")


def stores(folder: Path) -> Iterator[tuple[Path, dict[str, Any], int]]:
    """Every store below a folder: where it is, what it depends on, and its bytes."""
    for about in sorted(folder.glob(f"*/*/{ABOUT}")):
        size = sum(path.stat().st_size for path in about.parent.rglob("*") if path.is_file())
        yield about.parent, json.loads(about.read_text(encoding="utf-8")), size

"""Stores of what is computed once: named by what they depend on, written whole or not at all, resumed."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image as Pillow

from sfumato.data import cache as module
from sfumato.data.cache import LatentStore, StateStore, key_of, stores
from sfumato.data.folder import Folder
from sfumato.data.picture import fields_of
from sfumato.data.scenes import Scenes
from sfumato.errors import CheckpointError, DataError

SHAPE = (2, 3, 3)


def moments(store: LatentStore, shard: int) -> Any:
    rows = np.array(store.indices(shard), np.float32)
    return rows[:, None, None, None, None] + np.zeros((len(rows), 2, *SHAPE), np.float32)


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> LatentStore:
    monkeypatch.setattr(module, "MOST_ROWS", 4)
    return LatentStore(tmp_path, {"codec": "one"}, 10, SHAPE)


def test_shards_are_filled_and_read_by_index(store: LatentStore) -> None:
    assert store.shards == 3 and store.missing() == [0, 1, 2] and len(store.indices(2)) == 2
    for shard in (0, 2):
        store.write(shard, moments(store, shard))
    assert store.missing() == store.missing(thorough=True) == [1]
    store.write(1, moments(store, 1))
    found = store.read([9, 0, 5, 5])
    assert found.shape == (4, 2, *SHAPE) and found.dtype == np.float32
    assert found[:, 0, 0, 0, 0].tolist() == [9, 0, 5, 5]
    with pytest.raises(ValueError, match="is not"):
        store.write(2, moments(store, 0))


@pytest.mark.parametrize(
    ("about", "rows", "shape"),
    [({"codec": "other"}, 10, SHAPE), ({"codec": "one"}, 11, SHAPE), ({"codec": "one"}, 10, (2, 3, 4))],
)
def test_what_it_depends_on_is_its_name(store: LatentStore, about: Any, rows: int, shape: Any) -> None:
    root = store.folder.parent.parent
    assert LatentStore(root, about, rows, shape).folder != store.folder
    assert LatentStore(root, {"codec": "one"}, 10, SHAPE).folder == store.folder


def test_damaged_and_unfinished_shards_are_missing(store: LatentStore, monkeypatch: pytest.MonkeyPatch) -> None:
    for shard in range(3):
        store.write(shard, moments(store, shard))
    place = store.folder / "000001" / "moments.npy"
    data = bytearray(place.read_bytes())
    data[-1] ^= 1
    place.write_bytes(data)
    assert store.missing() == [] and store.missing(thorough=True) == [1]
    place.write_bytes(data[:-8])
    assert store.missing() == [1]
    store.write(1, moments(store, 1))  # takes the place of what was damaged
    (store.folder / "000002" / "MANIFEST.json").unlink()
    assert store.missing() == [2]

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(Exception, match="disk is full"):
        patch.setattr(os, "fsync", full)
        store.write(2, moments(store, 2))
    assert store.missing() == [2] and not list(store.folder.glob(".0*"))


def test_a_shard_that_is_lost_while_it_is_read_is_named(store: LatentStore) -> None:
    store.write(0, moments(store, 0))
    with pytest.raises(CheckpointError, match=r"lost a shard[\s\S]*000001"):
        store.read([1, 5])


def test_states_are_found_by_content_and_added_to(tmp_path: Path) -> None:
    store = StateStore(tmp_path, {"encoder": 1})
    red, blue = {"caption": "red"}, {"caption": "blue", "label": None}
    assert store.missing([red, {}, red, blue]) == [red, {}, blue]

    def state(n: int) -> dict[str, Any]:
        return {"context": np.full((n, 4), n, np.float32), "context_mask": np.ones(n, np.bool_)}

    store.write([red, {}], [state(1), state(2)])
    assert store.missing([red, blue, {}]) == [blue] and len(store) == 2
    store.write([blue], [state(3)])
    again = StateStore(tmp_path, {"encoder": 1})
    assert again.missing([red, blue, {}]) == [] and key_of(blue) == key_of({"caption": "blue"})
    found = again.read({"caption": "blue"})
    assert found["context"].tolist() == [[3.0] * 4] * 3 and found["context_mask"].all()
    assert again.read({})["context"].shape == (2, 4)
    with pytest.raises(DataError, match=r"not in the cache[\s\S]*green"):
        again.read({"caption": "green"})
    assert StateStore(tmp_path, {"encoder": 2}).missing([red]) == [red]
    assert sorted(about["encoder"] for _, about, _ in stores(tmp_path)) == [1]


def test_a_damaged_shard_of_states_is_computed_anew(tmp_path: Path) -> None:
    store = StateStore(tmp_path, {})
    store.write([{"caption": "red"}], [{"context": np.zeros((1, 2), np.float32)}])
    (file,) = tmp_path.rglob("states.safetensors")
    file.write_bytes(file.read_bytes()[:-3])
    store.refresh()
    assert store.missing([{"caption": "red"}]) == [{"caption": "red"}]


def test_the_identity_of_scenes() -> None:
    same = Scenes(size=32, seed=1, count=9).identity()
    assert Scenes(size=32, seed=1, count=9).identity() == same
    for other in (Scenes(32, 2, 9), Scenes(48, 1, 9), Scenes(32, 1, 8), Scenes(32, 1, 9, tasks={"two": 1.0})):
        assert other.identity() != same


def test_the_identity_of_a_folder(tmp_path: Path) -> None:
    for i in range(2):
        Pillow.new("RGB", (16, 16), (i, 0, 0)).save(tmp_path / f"{i}.png")
        (tmp_path / f"{i}.txt").write_text("red")
    same = Folder(str(tmp_path), 16).identity()
    (tmp_path / "0.txt").write_text("blue")
    assert Folder(str(tmp_path), 16).identity() == same  # a caption is no picture
    assert Folder(str(tmp_path), 32).identity() != same != Folder(str(tmp_path), 16, mirror=True).identity()
    os.utime(tmp_path / "0.png", (1, 1))
    assert Folder(str(tmp_path), 16).identity() != same


def test_fields_are_those_of_the_pictures(tmp_path: Path) -> None:
    Pillow.new("RGB", (16, 16)).save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("black")
    for data in (Scenes(32, 1, 9), Folder(str(tmp_path), 16, mirror=True)):
        every = list(range(len(data)))
        assert list(fields_of(data, every)) == data.batch(every)[1]

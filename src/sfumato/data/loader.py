"""Batches of pictures, fetched ahead in the background, from any position of an endless shuffled stream."""

import threading
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from sfumato.data.cache import LatentStore
from sfumato.data.order import indices, permuted
from sfumato.data.pairs import PairStore
from sfumato.data.picture import Dataset, Fields, Image, fields_of


class Batch(NamedTuple):
    """images (B, H, W, 3) uint8, the fields of each, their indices, and the position after them.

    moments: what a cache has in place of pictures, which are None then: mean and standard deviation of their latents,
    (B, 2, C, h, w) float32. pairs: where data are pairs, data and noise likewise.
    """

    images: Image | None
    fields: list[Fields]
    indices: NDArray[np.int64]
    position: int
    moments: NDArray[np.float32] | None = None
    pairs: NDArray[np.float32] | None = None


class Loader:
    """An endless iterator of batches. What it gives depends on (dataset, batch, seed, position) and on nothing else.

    position: samples already seen; resuming is starting there. workers: threads that fetch ahead, 0 for none.
    holdout: samples kept out, the same ones for every position and epoch, see `held_out`; of data that has not twice as
    many, a tenth. latents, pairs: a store that is read in place of the pictures.
    """

    def __init__(
        self,
        dataset: Dataset,
        batch: int,
        seed: int,
        *,
        position: int = 0,
        workers: int = 1,
        holdout: int = 0,
        latents: LatentStore | None = None,
        pairs: PairStore | None = None,
    ) -> None:
        self.dataset, self.batch, self.seed, self.latents, self.pairs = dataset, batch, seed, latents, pairs
        self.holdout = holdout if 2 * holdout <= len(dataset) else len(dataset) // 10
        self.n = len(dataset) - self.holdout
        self._next, self._wanted = position, position
        self._ready: dict[int, Batch | BaseException] = {}
        self._room = threading.Semaphore(2 * workers)
        self._changed, self._closed = threading.Condition(), False
        self._threads = [threading.Thread(target=self._work, daemon=True) for _ in range(workers)]
        for thread in self._threads:
            thread.start()

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        position = self._next
        self._next += self.batch
        if not self._threads:
            return self._fetched(position)
        with self._changed:
            self._changed.wait_for(lambda: position in self._ready or self._closed)
            found = self._ready.pop(position, None)
        self._room.release()
        if found is None:
            raise StopIteration
        if isinstance(found, BaseException):
            raise found
        return found

    def close(self) -> None:
        """Stops the background threads; the iterator ends."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        for _ in self._threads:
            self._room.release()
        for thread in self._threads:
            thread.join(timeout=10)

    def held_out(self) -> NDArray[np.int64]:
        """The indices that are never given: the last places of one fixed permutation."""
        return permuted(np.arange(self.n, self.n + self.holdout), len(self.dataset), self.seed, -1)

    def places(self, numbers: NDArray[np.int64]) -> NDArray[np.int64]:
        """The indices of pictures that are numbered from 0 to `n`, those that are held out passed over."""
        return permuted(numbers, len(self.dataset), self.seed, -1) if self.holdout else numbers

    def _work(self) -> None:
        while True:
            self._room.acquire()
            with self._changed:
                if self._closed:
                    return
                position, self._wanted = self._wanted, self._wanted + self.batch
            try:
                found: Batch | BaseException = self._fetched(position)
            except BaseException as error:  # handed to whoever waits for this batch
                found = error
            with self._changed:
                self._ready[position] = found
                self._changed.notify_all()

    def _fetched(self, position: int) -> Batch:
        index = self.places(indices(position, self.batch, self.n, self.seed))
        return self.fetched(index, position + self.batch)

    def fetched(self, index: NDArray[np.int64], position: int = 0) -> Batch:
        """The batch of some indices: pictures, or their latents or pairs where these are kept."""
        if self.pairs is not None:
            fields = list(fields_of(self.dataset, index.tolist()))
            return Batch(None, fields, index, position, pairs=self.pairs.read(index))
        if self.latents is not None:
            fields = list(fields_of(self.dataset, index.tolist()))
            return Batch(None, fields, index, position, self.latents.read(index))
        images, fields = self.dataset.batch(index.tolist())
        return Batch(images, fields, index, position)

"""The loader: the same batches from any position, by any number of threads, and never what is held out."""

import threading
from collections.abc import Iterator, Sequence
from itertools import islice

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sfumato.data.loader import Loader
from sfumato.data.picture import Fields, Image, Picture
from sfumato.errors import DataError


class Numbers:
    """Pictures that show their own index; `broken` ones cannot be read. Counts what is fetched."""

    shape = (2, 3)

    def __init__(self, n: int, broken: frozenset[int] = frozenset()) -> None:
        self.n, self.broken, self.fetched = n, broken, 0

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, index: int) -> Picture:
        return Picture(np.full((2, 3, 3), index % 256, np.uint8), {"number": index})

    def batch(self, indices: Sequence[int]) -> tuple[Image, list[Fields]]:
        self.fetched += 1
        if wrong := self.broken.intersection(indices):
            raise DataError("a picture cannot be read", where=str(min(wrong)))
        pictures = [self[i] for i in indices]
        return np.stack([p.image for p in pictures]), [p.fields for p in pictures]

    def captions(self) -> Iterator[str]:
        return iter(())


def given_out(loader: Loader, batches: int) -> list[int]:
    try:
        return [int(index) for batch in islice(loader, batches) for index in batch.indices]
    finally:
        loader.close()


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 60), st.integers(1, 9), st.integers(0, 30), st.integers(0, 40), st.sampled_from([0, 1, 3]))
def test_resuming_is_starting_at_a_position(n: int, batch: int, passed: int, holdout: int, workers: int) -> None:
    whole = given_out(Loader(Numbers(n), batch, 7, workers=0, holdout=holdout), passed + 6)
    rest = given_out(Loader(Numbers(n), batch, 7, position=passed * batch, workers=workers, holdout=holdout), 6)
    assert rest == whole[passed * batch :]


@pytest.mark.parametrize("workers", [0, 1, 4])
def test_a_batch_is_whole(workers: int) -> None:
    loader = Loader(Numbers(300), 5, 1, position=10, workers=workers)
    for number, batch in enumerate(islice(loader, 30)):
        assert batch.images.shape == (5, 2, 3, 3)
        assert batch.images[:, 0, 0, 0].tolist() == [index % 256 for index in batch.indices]
        assert [fields["number"] for fields in batch.fields] == batch.indices.tolist()
        assert batch.position == 10 + 5 * (number + 1)
    loader.close()


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 60), st.integers(0, 70), st.integers(0, 2**40))
def test_what_is_held_out_is_never_given(n: int, holdout: int, seed: int) -> None:
    loader = Loader(Numbers(n), 1, seed, workers=0, holdout=holdout)
    held = loader.held_out().tolist()
    assert len(held) == loader.holdout
    for epoch in range(2):
        shown = given_out(Loader(Numbers(n), 1, seed, position=epoch * loader.n, workers=0, holdout=holdout), loader.n)
        assert sorted(shown + held) == list(range(n))


@pytest.mark.parametrize(
    ("n", "asked", "held"), [(20, 10, 10), (20, 11, 2), (20, 512, 2), (9, 64, 0), (1, 1, 0), (1, 0, 0)]
)
def test_of_little_data_little_is_held_out(n: int, asked: int, held: int) -> None:
    loader = Loader(Numbers(n), 4, 0, workers=0, holdout=asked)
    assert (loader.holdout, loader.n) == (held, n - held)
    assert len(next(loader).indices) == 4  # more than there is: some come twice


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_a_picture_that_cannot_be_read_surfaces_where_its_batch_would(workers: int) -> None:
    order = given_out(Loader(Numbers(40), 4, 2, workers=0), 10)
    loader = Loader(Numbers(40, frozenset({order[13]})), 4, 2, workers=workers)
    assert [int(i) for batch in islice(loader, 3) for i in batch.indices] == order[:12]
    with pytest.raises(DataError) as caught:
        next(loader)
    assert caught.value.where == str(order[13])
    assert next(loader).indices.tolist() == order[16:20]  # the others are as they would be
    loader.close()


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_threads_fetch_only_so_far_ahead_and_end(workers: int) -> None:
    data, before = Numbers(1000), threading.active_count()
    loader = Loader(data, 1, 0, workers=workers)
    for _ in range(7):
        next(loader)
    loader.close()
    assert threading.active_count() == before
    assert 7 <= data.fetched <= 7 + 2 * workers
    with pytest.raises(StopIteration):
        for _ in range(2 * workers + 1):
            next(loader)


def test_who_waits_for_a_batch_is_let_go_when_the_loader_closes() -> None:
    asked = threading.Event()
    gate = threading.Event()

    class Stuck(Numbers):
        def batch(self, indices: Sequence[int]) -> tuple[Image, list[Fields]]:
            asked.set()
            gate.wait(30)
            return super().batch(indices)

    loader = Loader(Stuck(10), 1, 0, workers=1)
    outcome: list[object] = []
    waiting = threading.Thread(target=lambda: outcome.append(next(loader, "ended")))
    waiting.start()
    asked.wait(30)
    closing = threading.Thread(target=loader.close)
    closing.start()
    waiting.join(30)
    gate.set()
    closing.join(30)
    assert outcome == ["ended"]

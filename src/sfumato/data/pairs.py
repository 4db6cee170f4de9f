"""Pairs of noise and of where a flow takes it: what reflow learns from. Only files; `sfumato.train.pairs` makes them.

Pair k has the fields (the caption, say) of a data set's picture, the k-th in the order of its first epochs, and nothing
of the picture itself. Its noise is a pure function of (seed, k). Both ends are kept: what made them may not be there
again, and the same pairs must be.
"""

from collections.abc import Iterator, Sequence
from typing import ClassVar

from sfumato.data.cache import LatentStore
from sfumato.data.order import indices
from sfumato.data.picture import Dataset, Fields, Image, Picture, fields_of


class PairStore(LatentStore):
    """As `LatentStore`, by the number of a pair: its data and its noise (2, C, h, w), as a network sees them."""

    kind: ClassVar[str] = "pairs"
    again: ClassVar[str] = "the command that made them, once more"
    most: ClassVar[int | None] = 256  # takes a teacher long enough


class Paired:
    """The data set of the pairs: `count` samples, which have the fields of pictures of another. Pictures are its, too,
    and not those of the pairs.
    """

    def __init__(self, dataset: Dataset, count: int, seed: int) -> None:
        self.dataset, self.count, self.seed = dataset, count, seed

    @property
    def shape(self) -> tuple[int, int]:
        return self.dataset.shape

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int, /) -> Picture:
        return self.dataset[self._places([index])[0]]

    def batch(self, indices: Sequence[int]) -> tuple[Image, list[Fields]]:
        return self.dataset.batch(self._places(indices))

    def fields(self, indices: Sequence[int]) -> Sequence[Fields]:
        """The fields of some pairs."""
        return fields_of(self.dataset, self._places(indices))

    def captions(self) -> Iterator[str]:
        return self.dataset.captions()

    def _places(self, numbers: Sequence[int]) -> list[int]:
        n = len(self.dataset)
        return [int(indices(number, 1, n, self.seed)[0]) for number in numbers]

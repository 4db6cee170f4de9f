"""What a data source gives: pictures, and the fields that conditioners read."""

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

Image = NDArray[np.uint8]  # (H, W, 3), or (B, H, W, 3) for a batch
Fields = Mapping[str, object]


class Picture(NamedTuple):
    """One sample: image (H, W, 3) uint8, and fields such as {"caption": "a red circle"} or {"label": 3}."""

    image: Image
    fields: Fields


class Dataset(Protocol):
    """Random access to pictures of one size, each a pure function of its index.

    Two methods more are of use to caches: `identity()`, a text that is another one where the pictures are others, and
    `fields(indices)`, the fields without the pictures.
    """

    @property
    def shape(self) -> tuple[int, int]:
        """Height and width."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Picture: ...

    def batch(self, indices: Sequence[int]) -> tuple[Image, list[Fields]]:
        """Images (B, H, W, 3) and their fields."""
        ...

    def captions(self) -> Iterator[str]:
        """Captions enough to learn every word from."""
        ...


def fields_of(dataset: Dataset, indices: Sequence[int]) -> Sequence[Fields]:
    """The fields of some pictures; without looking at the pictures, of a source that has a method `fields`."""
    told = getattr(dataset, "fields", None)
    found: Sequence[Fields] = dataset.batch(indices)[1] if told is None else told(indices)
    return found

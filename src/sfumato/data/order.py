"""The order in which training sees pictures: a pure function of (seed, epoch), with random access.

Each epoch is another permutation of all samples, computed where it is asked for: a keyed Feistel network mixes the
bits of a position, and positions that leave the range are mixed again until they return ("cycle walking"). It needs
no memory and no state, so a run resumes at sample 10^9 as fast as at 0, and any number of workers agree.
"""

from hashlib import blake2b

import numpy as np
from numpy.typing import NDArray

ROUNDS = 6


def permuted(places: NDArray[np.int64], n: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """Where the permutation of range(n) for this seed and epoch sends each of some places."""
    half = max(1, (max(n - 1, 1).bit_length() + 1) // 2)
    mask = np.uint64((1 << half) - 1)
    keys = _keys(seed, epoch)
    result = _mixed(places.astype(np.uint64), half, mask, keys)
    outside = result >= n
    while outside.any():
        result[outside] = _mixed(result[outside], half, mask, keys)
        outside = result >= n
    return result.astype(np.int64)


def indices(position: int, count: int, n: int, seed: int) -> NDArray[np.int64]:
    """The samples at [position, position + count) of the endless stream of epochs over n samples."""
    places = np.arange(position, position + count, dtype=np.int64)
    epochs, within = np.divmod(places, n)
    result = np.empty(count, np.int64)
    for epoch in np.unique(epochs):
        here = epochs == epoch
        result[here] = permuted(within[here], n, seed, int(epoch))
    return result


def _mixed(x: NDArray[np.uint64], half: int, mask: np.uint64, keys: NDArray[np.uint64]) -> NDArray[np.uint64]:
    shift = np.uint64(half)
    left, right = x >> shift, x & mask
    for key in keys:
        left, right = right, left ^ (_hashed(right ^ key) & mask)
    return (left << shift) | right


def _hashed(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finaliser of splitmix64: every bit depends on every bit."""
    with np.errstate(over="ignore"):
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _keys(seed: int, epoch: int) -> NDArray[np.uint64]:
    data = blake2b(f"order {seed} {epoch}".encode(), digest_size=8 * ROUNDS).digest()
    return np.frombuffer(data, np.uint64)

"""Randomness by address: every draw of a run is a pure function of (seed, purpose, step, ...), so there is no
generator whose state must be saved, and resuming, skipping or re-doing a step draws what it drew, or would have drawn.
"""

from hashlib import blake2b

from torch import Generator


def key(seed: int, *address: str | int) -> int:
    """A number in [0, 2^63) for a purpose and its indices: different addresses, independent numbers."""
    data = "/".join(map(str, (seed, *address))).encode()
    return int.from_bytes(blake2b(data, digest_size=8).digest(), "little") >> 1


def generator(seed: int, *address: str | int) -> Generator:
    """A generator on the CPU, started from the key of an address."""
    return Generator().manual_seed(key(seed, *address))

"""
An endless stream of numbers in a new random order each epoch, a pure function of (seed, place): so
a run goes on from one integer. How that works may be skipped.

    Order(5, seed=0).take(3, 4)      # the last two of the first epoch, the first two of the next
"""
import hashlib
from functools import lru_cache

import numpy as np

BLOCK = 1024  # places in the order that are computed at once


def hash64(*values: int | str) -> int:
    """A 64-bit hash of small things, to make a seed or a name for one out of several."""
    return int.from_bytes(hashlib.blake2b(repr(values).encode(), digest_size=8).digest(), "little")


def draw_split(raw: bytes, val_fraction: float) -> str:
    """"val" or "train", by a hash: the same text is always on the same side."""
    draw = int.from_bytes(hashlib.blake2b(raw, digest_size=8).digest(), "little") / 2**64
    return "val" if draw < val_fraction else "train"


class Order:
    """An endless stream of range(n), in a new order each epoch: a pure function of (seed, place).
    Raises ValueError when there is nothing to draw from."""

    def __init__(self, n: int, seed: int, name: str = "the data"):
        if not n:
            raise ValueError(f"{name}: no example to train on")
        self.n, self.seed = n, seed
        self.block = lru_cache(maxsize=2)(self._block)

    def take(self, start: int, size: int) -> list[int]:
        """Places start … start + size - 1 of the stream."""
        places = (divmod(i, self.n) for i in range(start, start + size))
        return [self.block(epoch, i // BLOCK)[i % BLOCK] for epoch, i in places]

    def _block(self, epoch: int, block: int) -> list[int]:
        """The next BLOCK places of an epoch: numpy costs as much for one as for hundreds."""
        index = np.arange(block * BLOCK, min((block + 1) * BLOCK, self.n))
        return permuted(index, self.n, hash64(self.seed, epoch)).tolist()


def permuted(index: np.ndarray, n: int, key: int) -> np.ndarray:
    """Where a pseudo-random permutation of range(n), chosen by `key`, takes each index, in constant
    memory: a Feistel network on just enough bits. It is one to one, because each round changes one
    half of the bits by a function of the other; what lands outside range(n) goes round again."""
    bits = max(2, (n - 1).bit_length())
    low = np.uint64(bits // 2)
    low_mask, high_mask = np.uint64((1 << bits // 2) - 1), np.uint64((1 << bits - bits // 2) - 1)

    def noise(half: np.ndarray, r: int) -> np.ndarray:
        x = (half + np.uint64(hash64(key, r))) * np.uint64(0x9E3779B97F4A7C15)
        x ^= x >> np.uint64(29)
        return x * np.uint64(0xBF58476D1CE4E5B9) >> np.uint64(32)

    def network(x: np.ndarray) -> np.ndarray:
        a, b = x & low_mask, x >> low
        for r in (0, 2):
            a = a ^ noise(b, r) & low_mask
            b = b ^ noise(a, r + 1) & high_mask
        return b << low | a

    x = network(index.astype(np.uint64))
    while (outside := x >= n).any():
        x[outside] = network(x[outside])
    return x.astype(np.int64)

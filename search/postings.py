"""
Which chunks hold a term, and how often: the inverted index behind BM25, as sorted arrays.

    segment = make_segment(first, [terms("RAG 检索"), terms("检索增强")])
    segment.find(term_key("检索"))                      # where its postings lie in segment.chunks

An index is a few such segments, one behind the other. A new one is as long as what was added; two
of similar length become one, so there are about log2(n) of them and each posting is written as
often (a log-structured merge, as in Lucene).
"""
import hashlib
from collections import Counter
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np

ARRAYS = ("lengths", "keys", "starts", "chunks", "counts")  # of a Segment, in this order


@lru_cache(1 << 18)
def term_key(term: str) -> int:
    """A term as a 64-bit number: no dictionary to keep, and no two of a billion terms collide but
    with a chance of 3 %."""
    return int.from_bytes(hashlib.blake2b(term.encode(), digest_size=8).digest(), "little")


class Posting(NamedTuple):
    term: str
    idf: float
    chunks: np.ndarray  # living chunks that hold the term, ascending
    counts: np.ndarray  # how often each does


@dataclass
class Segment:
    """Postings of the chunks first … first + len(lengths) - 1."""
    first: int
    lengths: np.ndarray  # (chunks,) int32: terms in each
    keys: np.ndarray  # (terms,) uint64, ascending
    starts: np.ndarray  # (terms + 1,) int64: where the postings of each begin
    chunks: np.ndarray  # (postings,) int32, ascending within a term
    counts: np.ndarray  # (postings,) uint16: how often the term is in the chunk

    def find(self, key: int) -> slice | None:
        i = int(np.searchsorted(self.keys, np.uint64(key)))
        if i == len(self.keys) or self.keys[i] != key:
            return None
        return slice(int(self.starts[i]), int(self.starts[i + 1]))


def make_segment(first: int, texts: list[list[str]]) -> Segment:
    """From the terms of each chunk."""
    counted = [Counter(map(term_key, words)) for words in texts]
    sizes = [len(c) for c in counted]
    keys = np.fromiter((k for c in counted for k in c), np.uint64, sum(sizes))
    counts = np.fromiter((min(n, 65535) for c in counted for n in c.values()), np.uint16,
                         sum(sizes))
    chunks = np.repeat(np.arange(first, first + len(texts), dtype=np.int32), sizes)
    lengths = np.array([len(words) for words in texts], np.int32)
    return _sorted(first, lengths, keys, chunks, counts)


def merge_segments(a: Segment, b: Segment) -> Segment:
    """Of neighbours: the one behind the other."""
    keys = np.concatenate([np.repeat(s.keys, np.diff(s.starts)) for s in (a, b)])
    return _sorted(a.first, np.concatenate((a.lengths, b.lengths)), keys,
                   np.concatenate((a.chunks, b.chunks)), np.concatenate((a.counts, b.counts)))


def _sorted(first: int, lengths: np.ndarray, keys: np.ndarray, chunks: np.ndarray,
            counts: np.ndarray) -> Segment:
    order = np.argsort(keys, kind="stable")  # chunks are ascending and stay so within a key
    keys = keys[order]
    new = np.flatnonzero(np.append(True, keys[1:] != keys[:-1])) if len(keys) else np.zeros(0, int)
    return Segment(first, lengths, keys[new], np.append(new, len(keys)).astype(np.int64),
                   chunks[order], counts[order])

"""
The tokens that `slow_bpe` of tokenizer.py finds, thousands of times faster, which two tokens each
is made of, and how other programs write them; how may be skipped.
"""
import heapq
from collections import Counter
from collections.abc import Callable

import numpy as np


# how Qwen2 cuts text into pieces: words with one sign before them, single digits, signs, line ends,
# white space. llama.cpp knows it by name, so models with such a tokenizer open there.
QWEN2 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
         r"|\s*[\r\n]+|\s+(?!\S)|\s+")


def cuts_character(token: bytes) -> bool:
    """Whether it has a part of one character beside anything of another, as 是 and the first byte
    of what follows. A part alone cuts nothing: a longer token may make it whole."""
    begins = any(not 128 <= byte < 192 for byte in token[1:])  # 128 to 191 continue a character
    return begins and token.decode(errors="ignore").encode() != token


def train_bpe(counts: Counter[bytes], n_tokens: int,
              report: Callable[[int], None] = lambda n: None) -> list[bytes]:
    """The `n_tokens` byte strings, 256 single bytes first, that BPE finds in the counted pieces;
    fewer if no pair occurs twice any more. Of equally frequent pairs the oldest tokens win. No pair
    is joined that cuts a character.

    All pieces stand in one array of token ids, a doubly linked list from which a merge unlinks the
    right half of the pair; `places` knows where each pair starts. So a merge touches only its own
    occurrences, all of them at once with numpy. A pair gets all its places at once, when the
    younger of its tokens is made; from then on its count only falls, so an entry of the heap is
    right or too high, and is put back when it turns out too high. No pair ever spells a token that
    exists: where that token's bytes stand apart, its own merges have joined them before.
    """
    pieces = list(counts)
    ids = np.frombuffer(b"\0" + b"\0".join(pieces) + b"\0", np.uint8).astype(np.int64)
    ends = np.cumsum([0] + [len(p) + 1 for p in pieces])  # where the separators are
    weight = np.repeat(np.array([0] + [counts[p] for p in pieces]), np.diff(ends, prepend=-1))
    ids[ends] = SEPARATOR = -1
    GONE = -2
    right = np.arange(1, len(ids) + 1, dtype=np.int32)
    left = np.arange(-1, len(ids) - 1, dtype=np.int32)
    right[-1] = len(ids) - 1  # the last separator is its own neighbour

    tokens = [bytes([i]) for i in range(256)]
    pair_count: dict[int, int] = {}
    places: dict[int, np.ndarray] = {}
    heap: list[tuple[int, int]] = []
    V = n_tokens  # the pair (a, b) is written a * V + b

    def add(at: np.ndarray) -> None:
        """Take the new pairs that start at the sorted places `at` into count, places and heap."""
        keys = ids[at] * V + ids[right[at]]
        order = np.argsort(keys, kind="stable")
        keys, at = keys[order], at[order]
        starts = np.flatnonzero(np.diff(keys, prepend=-1))
        sums = np.add.reduceat(weight[at], starts) if len(at) else starts
        often = sums >= 2  # the others never will be
        lengths = np.diff(np.append(starts, len(at)))
        for key, n, start, length in zip(*(a[often].tolist()
                                           for a in (keys[starts], sums, starts, lengths))):
            pair_count[key], places[key] = n, at[start:start + length].copy()
            heapq.heappush(heap, (-n, key))

    def merge(key: int, new: int) -> None:
        """Replace the pair `key` by the token `new` wherever it stands, leftmost first."""
        a, b = divmod(key, V)
        at = places.pop(key)
        del pair_count[key]
        at = at[(ids[at] == a) & (ids[right[at]] == b)]
        if a == b:  # in a run, a a a: each second pair overlaps the one before
            run = np.flatnonzero(np.append(True, right[at[:-1]] != at[1:]))
            start = np.repeat(run, np.diff(np.append(run, len(at))))
            at = at[(np.arange(len(at)) - start) % 2 == 0]
        gone = right[at]
        before, after = left[at], right[gone]
        lost = np.concatenate((ids[before] * V + a, b * V + ids[after]))
        ids[at], ids[gone] = new, GONE
        # where two merged pairs touch, the pair between them is lost once, not twice
        real = np.concatenate((ids[before] >= 0, ids[after] != SEPARATOR))
        keys, index = np.unique(lost[real], return_inverse=True)
        falls = np.bincount(index, np.concatenate((weight[at], weight[at]))[real])
        for lost_key, n in zip(keys.tolist(), falls.tolist()):
            if lost_key in pair_count:
                pair_count[lost_key] -= int(n)
        right[at], left[after] = after, at
        fresh = np.unique(np.concatenate((left[at], at)))
        add(fresh[(ids[fresh] >= 0) & (ids[right[fresh]] >= 0)])

    add(np.flatnonzero((ids[:-1] >= 0) & (ids[1:] >= 0)))
    while heap and len(tokens) < n_tokens:
        n, key = heapq.heappop(heap)
        joint = tokens[key // V] + tokens[key % V]
        if cuts_character(joint):
            del pair_count[key], places[key]
        elif -n == pair_count[key]:
            tokens.append(joint)
            merge(key, len(tokens) - 1)
            report(len(tokens))
        elif pair_count[key] >= 2:
            heapq.heappush(heap, (-pair_count[key], key))
        else:
            del pair_count[key], places[key]
    return tokens


def merges_of(ranks: dict[bytes, int]) -> dict[bytes, tuple[bytes, ...]]:
    """The parts of each longer token that joining all older ones leaves: two, if merges make it."""
    found = {}
    for token, rank in ranks.items():
        parts = tuple(token[i:i + 1] for i in range(len(token)))
        while len(parts) > 2:
            older = [ranks.get(a + b, rank) for a, b in zip(parts, parts[1:])]
            i = older.index(min(older))
            if older[i] >= rank:
                break
            parts = (*parts[:i], parts[i] + parts[i + 1], *parts[i + 2:])
        if len(token) > 1:
            found[token] = parts
    return found


# GPT-2 writes bytes as letters: as itself what can be seen, as a letter from 256 on the rest. A
# space is Ġ, the 33rd of them.
HIDDEN = [*range(33), *range(127, 161), 173]
LETTER = {b: chr(256 + HIDDEN.index(b) if b in HIDDEN else b) for b in range(256)}
BYTE = {letter: b for b, letter in LETTER.items()}


def spell(token: bytes) -> str:
    return "".join(map(LETTER.__getitem__, token))


def unspell(token: str) -> bytes:
    try:
        return bytes(map(BYTE.__getitem__, token))
    except KeyError:
        raise ValueError(f"its token {token!r:.40} is not written in bytes: not a byte-level BPE") \
            from None

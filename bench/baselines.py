"""
What a language model must beat: counting bytes, and a general-purpose compressor.

    python -m bench.baselines --data_dir=out/toyworld/data

Both read the training text of a language and are then scored like a model, in bits per byte of
UTF-8 text over all of its validation text. A document is its bytes and one symbol for its end,
which costs bits and has no bytes of its own.

The n-gram is interpolated Kneser-Ney with the three discounts of Chen & Goodman (1999), over 257
symbols. With h the last k symbols, h' all of them but the oldest, and c(hx) how often x follows h:

    P_k(x | h) = (max(c(hx) - D(c(hx)), 0) + m(h) P_{k-1}(x | h')) / sum_x c(hx),    P_{-1} = 1/257
    m(h) = sum over the x seen after h of D(c(hx));    P_k = P_{k-1} after an h never seen
    D(0) = 0,  D(i) = i - (i + 1) Y n_{i+1} / n_i for i = 1, 2, 3,  D(c > 3) = D(3),
    Y = n_1 / (n_1 + 2 n_2),  n_i: how many hx of this length have c(hx) = i

Below the longest length c(hx) counts how many different symbols come before hx. Every D is at least
0.1, and 0.5 where one of n_1 … n_4 is 0. m(h) is what the discounts took away, so each P_k sums to
1. The score of the compressor, xz -9e, is what the validation text adds to its training text.
"""
import lzma
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np

from bench.race import figure
from configurator import FilePath, configure
from data import TokenFile, open_data
from plumbing import terminal
from tokenizer import Tokenizer

END = 256  # the symbol after the last byte of a document
BASE = 257  # a context and the symbol after it are one number, its digits to this base
ORDER = 5  # bytes the n-gram looks back; with 7, a gram would not fit in 64 bits
CHUNK = 1 << 22  # symbols scored at once: bounds memory


@dataclass(frozen=True)
class Config:
    data_dir: FilePath = "out/toyworld/data"  # folder written by data.py


def symbols(tok: Tokenizer, file: TokenFile) -> np.ndarray:
    """The text of a token file, (n,) uint16: its bytes, and END where a document ends.
    Raises ValueError if these are not the bytes that the header of the file counts."""
    names = [tok.decode_single_token_bytes(i) for i in range(tok.n_vocab)]
    letters = [np.frombuffer(name, np.uint8).astype(np.uint16) for name in names]
    letters[tok.endoftext] = np.array([END], np.uint16)
    text = np.concatenate([letters[i] for i in file.ids.tolist()] or [np.zeros(0, np.uint16)])
    if (n := np.count_nonzero(text < END)) != file.n_bytes:
        raise ValueError(f"{file.path}: its tokens spell {n:,} bytes, its header says "
                         f"{file.n_bytes:,}")
    return text


class Level(NamedTuple):
    """Counts for contexts of one length k."""
    grams: np.ndarray  # sorted numbers of k + 1 symbols: context, then the next symbol
    counts: np.ndarray  # c(hx)
    contexts: np.ndarray  # sorted numbers of k symbols
    totals: np.ndarray  # sum over x of c(hx)
    mass: np.ndarray  # m(h)
    discount: np.ndarray  # D(0) … D(3)


def pack(text: np.ndarray, order: int) -> np.ndarray:
    """Each symbol with the `order` before it as one number, oldest first; before the text are ENDs.
    pack([7, 8], 1) is [END * BASE + 7, 7 * BASE + 8]."""
    padded = np.concatenate((np.full(order, END, np.uint16), text))
    grams = np.zeros(len(text), np.int64)
    for i in range(order + 1):
        grams = grams * BASE + padded[i:i + len(text)]
    return grams


def discounts(counts: np.ndarray) -> np.ndarray:
    """D(0) … D(3) of one length, (4,)."""
    n = np.array([np.count_nonzero(counts == i) for i in range(5)])
    if n[1:].min() == 0:
        return np.array([0, 0.5, 0.5, 0.5])
    i, y = np.arange(1, 4), n[1] / (n[1] + 2 * n[2])
    return np.append(0, (i - (i + 1) * y * n[2:] / n[1:4]).clip(min=0.1))


def fit(text: np.ndarray, order: int) -> list[Level]:
    """The levels of an n-gram that looks back `order` symbols, shortest context first."""
    grams, counts = np.unique(pack(text, order), return_counts=True)
    levels = []
    for k in range(order, -1, -1):
        context = grams // BASE
        starts = np.flatnonzero(np.diff(context, prepend=-1))
        d = discounts(counts)
        levels.append(Level(grams, counts, context[starts], np.add.reduceat(counts, starts),
                            np.add.reduceat(d[counts.clip(max=3)], starts), d))
        # each different gram, its oldest symbol dropped, counts once for what is left
        grams, counts = np.unique(grams % BASE**k, return_counts=True)
    return levels[::-1]


def probability(levels: list[Level], grams: np.ndarray) -> np.ndarray:
    """P(last symbol | the ones before it) of packed grams of the longest length, (n,)."""
    def find(values: np.ndarray, wanted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Where each wanted number stands in the sorted `values`, and whether it does."""
        at = np.searchsorted(values, wanted).clip(max=len(values) - 1)
        return at, values[at] == wanted

    p = np.full(len(grams), 1 / BASE)
    for k, level in enumerate(levels):
        gram = grams % BASE**(k + 1)
        h, known = find(level.contexts, gram // BASE)
        hx, seen = find(level.grams, gram)
        c = np.where(seen, level.counts[hx], 0)
        kept = c - level.discount[c.clip(max=3)]
        p = np.where(known, (kept + level.mass[h] * p) / level.totals[h], p)
    return p


def ngram_bits(train: np.ndarray, val: np.ndarray, order: int) -> float:
    """Bits to write `val`, knowing the counts of `train`."""
    levels, grams = fit(train, order), pack(val, order)
    return float(sum(-np.log2(probability(levels, grams[i:i + CHUNK])).sum()
                     for i in range(0, len(grams), CHUNK)))


def xz_bits(train: np.ndarray, val: np.ndarray) -> float:
    """Bits that `val` adds to the compressed `train`. A document ends with a zero byte."""
    before, after = (np.where(t == END, 0, t).astype(np.uint8).tobytes() for t in (train, val))
    with ThreadPoolExecutor(2) as pool:
        small, large = pool.map(partial(lzma.compress, preset=9 | lzma.PRESET_EXTREME),
                                (before, before + after))
    return 8.0 * (len(large) - len(small))


def main() -> None:
    """Two figures for each language. Raises ValueError for unusable data."""
    cfg = configure(Config)
    tok, splits = open_data(cfg.data_dir)
    train_files = {f.lang: f for f in splits["train"]}
    for file in splits["val"]:
        if file.lang not in train_files:
            raise ValueError(f"{cfg.data_dir}: no training text in the language {file.lang}")
        train, val = symbols(tok, train_files[file.lang]), symbols(tok, file)
        for name, bits in ((f"n-gram of {ORDER} bytes", ngram_bits(train, val, ORDER)),
                           ("xz -9", xz_bits(train, val))):
            figure(file.lang, name, bits / file.n_bytes, "bits/byte", bytes=file.n_bytes,
                   documents=file.n_docs, learnt_bytes=train_files[file.lang].n_bytes)


if __name__ == "__main__":
    terminal.run(main)

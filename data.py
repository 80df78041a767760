"""
Text -> token files, and token files -> batches.

    python data.py --input=PATHS --tokenizer=FILE --out_dir=DIR [--workers=N]

Each language and split becomes one file, DIR/train_zh.bin and so on: a 256-byte header, then the
token ids of all documents, each closed by <|endoftext|>. A document belongs to the validation split
by a hash of its text, so copies of it never are on both sides. Several processes share the work,
and how many does not change the result. A run that was stopped goes on where it was.

Pre-training reads windows of a fixed length straight from the mapped files; fine-tuning reads
chats that were packed into windows. Which windows make up a batch is a pure function of (seed,
index): a run resumes from one integer, on any number of ranks.
"""
import hashlib
import os
from bisect import bisect_left, bisect_right, insort
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import islice
from time import time
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from configurator import FilePath, Natural, configure
from plumbing.corpus import find_files, parse, read_batches
from plumbing.examples import Rows, cached_tokenizer, window_batch
from plumbing.jobs import Progress, parallel
from plumbing.jsonl import BadLine, BadLines, Batch
from plumbing.order import Order, draw_split, hash64
from plumbing.runtime import print0
from plumbing.terminal import fail, run
from plumbing.tokenfiles import IGNORE, TokenFile, TokenFolder, check_ids, id_type, open_data
from tokenizer import SPECIALS, load_tokenizer

ENDOFTEXT = SPECIALS[0]


@dataclass(frozen=True)
class Config:
    input: str = "out/toyworld/pt.jsonl"  # text: files or folders, comma-separated
    tokenizer: FilePath = "out/toyworld/tokenizer.txt"  # file written by tokenizer.py
    out_dir: FilePath = "out/toyworld/data"  # folder for the token files
    val_fraction: float = 0.02  # share of the documents that goes to validation
    on_bad_line: Literal["stop", "skip"] = "stop"  # at a line that is not as it should be
    workers: Natural = 0  # processes; 0: one per core


# --------------------------------------------------------------------- token files -> batches

class Windows:
    """Windows of `length` tokens, and the token after each, over all training files.

    Within an epoch every window comes once, in an order that is new each epoch; so is the offset
    at which the windows start, so that no token is always first in its window.
    """

    def __init__(self, files: list[TokenFile], length: int, seed: int):
        self.files, self.length, self.seed = files, length, seed
        self.ids = [np.asarray(f.ids) for f in files]  # the same memory, without memmap's own cost
        # one window's worth is left over for the offset, or none in a file with one window only
        counts = [max(len(ids) // length - 1, int(len(ids) > length)) for ids in self.ids]
        self.firsts = np.cumsum([0] + counts).tolist()  # number of each file's first window
        self.n = self.firsts[-1]
        for file, n in zip(files, counts):
            if not n:
                print0(f"{file.path} is shorter than a window of {length} tokens: not learnt from")
        if not self.n:
            folder = os.path.dirname(files[0].path) if files else "the data"
            raise ValueError(f"{folder}: the training split is shorter than one window of {length} "
                             "tokens")
        self.order = Order(self.n, seed)
        self.offsets = lru_cache(maxsize=2)(self._offsets)

    def batch(self, start: int, size: int) -> tuple[Tensor, Tensor]:
        """Samples start … start + size - 1 of the endless stream as inputs and targets, both
        (size, length) int64. Raises ValueError for an id outside the vocabulary."""
        rows = np.empty((size, self.length + 1), np.int64)
        for i, window in enumerate(self.order.take(start, size)):
            epoch = (start + i) // self.n
            source = bisect_right(self.firsts, window) - 1
            at = self.offsets(epoch)[source] + (window - self.firsts[source]) * self.length
            rows[i] = self.ids[source][at:at + self.length + 1]
        if rows.max(initial=0) >= min(f.vocab_size for f in self.files):
            for file in self.files:
                check_ids(file, file.ids)
        both = torch.from_numpy(rows)
        return both[:, :-1], both[:, 1:]

    def _offsets(self, epoch: int) -> list[int]:
        """Where the first window of each file starts, as far in as the file has room for."""
        draw = hash64(self.seed, epoch, 1)
        return [draw % min(self.length, max(len(ids) - self.length, 1)) for ids in self.ids]


def prefetch(make: Callable, places: Iterable[tuple]) -> Iterator:
    """make(*place) of each place in turn, the next one made by a thread while the caller is busy:
    a slow disk then costs time only where it takes longer than the work."""
    with ThreadPoolExecutor(1) as thread:
        coming: deque = deque()
        for place in places:
            coming.append(thread.submit(make, *place))
            if len(coming) > 1:
                yield coming.popleft().result()
        while coming:
            yield coming.popleft().result()


def passages(file: TokenFile, length: int, batch_size: int, max_tokens: int | None = None,
             ) -> Iterator[tuple[Tensor, Tensor]]:
    """The whole file in order (or evenly spaced windows of about `max_tokens`) for evaluation:
    every token but the first is a target once. The end of the last row is filled with IGNORE.
    Raises ValueError for an id outside the vocabulary."""
    n = -(-max(len(file.ids) - 1, 0) // length)
    every = max(1, n * length // max_tokens) if max_tokens else 1
    starts = np.arange(0, n, every) * length
    for i in range(0, len(starts), batch_size):
        rows = np.full((len(starts[i:i + batch_size]), length + 1), IGNORE, np.int64)
        for row, at in zip(rows, starts[i:i + batch_size]):
            part = file.ids[at:at + length + 1]
            check_ids(file, part)
            row[:len(part)] = part
        both = torch.from_numpy(rows)
        yield both[:, :-1].clamp(min=0), both[:, 1:]


# --------------------------------------------------------------------- rows -> packed

def pack(lengths: list[int], size: int) -> list[list[int]]:
    """Put rows into windows of `size` tokens with little waste: take the longest first and place it
    in the fullest window that still has room (best fit decreasing). The numbers of the rows in each
    window: pack([5, 3, 2], 5) -> [[0], [1, 2]]."""
    bins: list[list[int]] = []
    waiting: dict[int, list[int]] = {}  # bins by the room that is left in them
    rooms: list[int] = []  # its keys in order
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        at = bisect_left(rooms, lengths[i])
        if at < len(rooms):
            room = rooms[at]
            number = waiting[room].pop()
            if not waiting[room]:
                del waiting[room], rooms[at]
        else:
            room, number = size, len(bins)
            bins.append([])
        bins[number].append(i)
        if room := room - lengths[i]:
            if room not in waiting:
                insort(rooms, room)
            waiting.setdefault(room, []).append(number)
    return bins


class Packed:
    """Rows of chats packed whole into windows of `length` tokens."""

    def __init__(self, rows: Rows, length: int, seed: int):
        self.rows, self.length = rows, length
        self.bins = pack(rows.lengths().tolist(), length)
        self.order = Order(len(self.bins), seed, rows.name)

    def batch(self, start: int, size: int) -> tuple[Tensor, Tensor, Tensor]:
        """Windows start … start + size - 1 of the endless stream: see `window_batch`."""
        return self.make([self.bins[i] for i in self.order.take(start, size)])

    def make(self, bins: list[list[int]]) -> tuple[Tensor, Tensor, Tensor]:
        return window_batch([[self.rows.example(i)[0] for i in one] for one in bins], self.length)


# --------------------------------------------------------------------- text -> token files

def encode_batch(batch: Batch, tokenizer: str, val_fraction: float,
                 ) -> tuple[dict, list[BadLine], int, int, float]:
    """A worker's share: {(split, lang): (ids, bytes of text, documents)}, the bad lines, how many
    documents hold the letters <|endoftext|>, and how much was read."""
    tok = cached_tokenizer(tokenizer)
    parts: dict[tuple[str, str], list] = {}
    bad, n_literal = [], 0
    for item in parse(batch):
        if isinstance(item, BadLine):
            bad.append(item)
            continue
        raw = item.text.encode()
        n_literal += ENDOFTEXT in item.text
        part = parts.setdefault((draw_split(raw, val_fraction), item.lang), [[], 0, 0])
        part[0].append(np.array(tok.encode_ordinary(item.text) + [tok.endoftext], id_type(tok)))
        part[1] += len(raw)
        part[2] += 1
    return ({key: (np.concatenate(ids).tobytes(), n_bytes, n)
             for key, (ids, n_bytes, n) in sorted(parts.items())}, bad, n_literal, batch.n_bytes,
            batch.share)


def describe(files: list[str]) -> str:
    """A hash of the names, sizes and times of the input files."""
    stats = [(os.path.basename(f), os.stat(f).st_size, os.stat(f).st_mtime_ns) for f in files]
    return hashlib.sha256(repr(stats).encode()).hexdigest()


def prepare(cfg: Config, progress: Progress) -> None:
    """Write the token files of a folder. Raises ValueError or OSError for what a user can mend."""
    files, tok = find_files(cfg.input), load_tokenizer(cfg.tokenizer)
    job = {"inputs": describe(files), "tokenizer": tok.sha256,
           "settings": [cfg.val_fraction]}
    out = TokenFolder(cfg.out_dir, job)
    if out.finished:
        open_data(cfg.out_dir)  # raises ValueError if it has been damaged since
        print(f"{cfg.out_dir} is up to date")
        return
    work = partial(encode_batch, tokenizer=cfg.tokenizer, val_fraction=cfg.val_fraction)
    todo = islice(read_batches(files), out.state["batches"], None)
    bad_lines = BadLines(cfg.on_bad_line, progress, out.state["bad"])
    start, first_share, n_read, literal = time(), out.state["share"], 0, 0
    for parts, bad, n_literal, n_bytes, share in parallel(work, todo, cfg.workers):
        bad_lines.add(bad)
        for (split, lang), part in parts.items():
            out.add(split, lang, *part)
        out.end_batch(share, bad_lines.kinds)
        n_read, literal = n_read + n_bytes, literal + n_literal
        seconds = max(time() - start, 1e-9)
        left = (1 - share) / max(share - first_share, 1e-9) * seconds
        progress.show(f"{share:6.1%} | {n_read / 1e6:,.0f} MB | "
                      f"{n_read / seconds / 1e6:.1f} MB/s | eta {left:,.0f} s")
    progress.end()
    print(f"read {n_read / 1e6:,.1f} MB in {time() - start:.1f} s")
    if literal:
        print(f"documents that hold the letters {ENDOFTEXT}: {literal:,}. They are learnt as "
              "letters; for documents that end there, write each as a line of a .jsonl file")
    bad_lines.finish(sum(file.n_docs for file in out.files.values()))
    if describe(files) != job["inputs"]:
        raise ValueError(f"{cfg.input}: changed while it was read; give the command again")
    for split in ("train", "val"):
        if not any(name.startswith(split) for name in out.files):
            raise ValueError(f"{cfg.input}: no document fell into the {split} split: give more "
                             f"text or another --val_fraction than {cfg.val_fraction}")
    out.finish(tok, cfg.input)


def main() -> None:
    cfg = configure(Config)
    if not 0 < cfg.val_fraction < 1:
        fail(f"--val_fraction={cfg.val_fraction} must lie between 0 and 1")
    progress = Progress()
    try:
        prepare(cfg, progress)
        return
    except BrokenPipeError:
        raise  # nobody reads what is printed: no fault of the disk
    except ValueError as error:
        message = str(error)
    except OSError as error:
        reason = f"{error.filename or cfg.out_dir}: {error.strerror}" if error.errno else f"{error}"
        message = f"{reason}; what is done is kept, the same command goes on from there"
    except KeyboardInterrupt:
        message = "stopped; the same command goes on from there"
    progress.end()
    fail(message)


if __name__ == "__main__":
    run(main)

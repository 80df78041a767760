"""
Text -> token files, and token files -> batches.

    python data.py --input=PATHS --tokenizer=FILE --out_dir=DIR [--workers=N]

Each language and split becomes one file, DIR/train_zh.bin and so on: a 256-byte header, then the
token ids of all documents, each closed by <|endoftext|>. A hash of the text decides whether a
document is for training or validation, so two copies never end up on both sides. Several processes
share the work; their number does not change the result. meta.json is written last: a folder without
it is unfinished.

Pre-training reads windows of a fixed length straight from the mapped files; fine-tuning reads
chats that were packed into windows. The windows of a batch depend only on (seed, index), so a run
resumes from one integer, on any number of processes.
"""
from plumbing.terminal import fail, only_talk, run, stop_imports
stop_imports(__name__)  # Ctrl-C during the imports below, which take seconds

import os
from bisect import bisect_left, bisect_right, insort
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from configurator import FilePath, Natural, configure
from plumbing.corpus import Document, find_files, parse
from plumbing.examples import Rows, cached_tokenizer, window_batch
from plumbing.jobs import Progress
from plumbing.order import Order, draw_split, hash64
from plumbing.runtime import print0
from plumbing.tokenfiles import (HEADER_BYTES, IGNORE, Folder, Made, TokenFile, check_ids, id_type,
                                 open_data, pack_header)
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


# ---------------------------------------------------------------------------- pre-training

class Windows:
    """Windows of `length` tokens, and the token after each, over all training files.

    Of a file 0 1 2 … 9, windows of 3 tokens are 0 1 2 with the targets 1 2 3, and 3 4 5 with the
    targets 4 5 6; at an offset of 2 they are 2 3 4 and 5 6 7. Within an epoch every window comes
    once. The order is new each epoch, and so is the offset: no token is always first in its window.
    """

    def __init__(self, files: list[TokenFile], length: int, seed: int):
        self.files, self.length, self.seed = files, length, seed
        self.ids = [np.asarray(f.ids) for f in files]  # the same memory, without memmap's own cost
        # one window less than there is room for, which leaves some for the offset, but at least one
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
        """Windows start … start + size - 1 of an endless stream of epochs as inputs and targets,
        both (size, length) int64. Raises ValueError for an id outside the vocabulary."""
        rows = np.empty((size, self.length + 1), np.int64)
        for i, window in enumerate(self.order.take(start, size)):
            epoch = (start + i) // self.n
            source = bisect_right(self.firsts, window) - 1  # the file that it is in
            at = self.offsets(epoch)[source] + (window - self.firsts[source]) * self.length
            rows[i] = self.ids[source][at:at + self.length + 1]
        if rows.max(initial=0) >= min(f.vocab_size for f in self.files):
            for file in self.files:  # which of them is it?
                check_ids(file, file.ids)
        both = torch.from_numpy(rows)
        return both[:, :-1], both[:, 1:]

    def _offsets(self, epoch: int) -> list[int]:
        """Where the first window of each file starts, as far in as the file has room for."""
        draw = hash64(self.seed, epoch, 1)
        return [draw % min(self.length, max(len(ids) - self.length, 1)) for ids in self.ids]


def prefetch(make: Callable, calls: Iterable[tuple]) -> Iterator:
    """make(*arguments) for each of `calls`. A thread makes the next one while the caller is busy:
    a slow disk then costs time only where it takes longer than the work."""
    with ThreadPoolExecutor(1) as thread:
        coming: deque = deque()
        for arguments in calls:
            coming.append(thread.submit(make, *arguments))
            if len(coming) > 1:
                yield coming.popleft().result()
        while coming:
            yield coming.popleft().result()


def passages(file: TokenFile, length: int, batch_size: int, max_tokens: int | None = None,
             ) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches for evaluation: the whole file in order, so that every token but the first is a
    target once, or evenly spaced windows with about `max_tokens`. The end of the last row is filled
    with IGNORE. Raises ValueError for an id outside the vocabulary."""
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
        yield both[:, :-1].clamp(min=0), both[:, 1:]  # IGNORE is no id: any other will do


# ---------------------------------------------------------------------------- fine-tuning

def pack(lengths: list[int], size: int) -> list[list[int]]:
    """Put rows into windows of `size` tokens with little waste: take the longest first and place it
    in the fullest window that still has room (best fit decreasing). The numbers of the rows in each
    window: pack([5, 3, 2], 5) -> [[0], [1, 2]]."""
    bins: list[list[int]] = []
    by_room: dict[int, list[int]] = {}  # numbers of bins by the room that is left in them
    rooms: list[int] = []  # its keys in order
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        at = bisect_left(rooms, lengths[i])
        if at < len(rooms):
            room = rooms[at]
            number = by_room[room].pop()
            if not by_room[room]:
                del by_room[room], rooms[at]
        else:
            room, number = size, len(bins)
            bins.append([])
        bins[number].append(i)
        room -= lengths[i]
        if room:
            if room not in by_room:
                insort(rooms, room)
            by_room.setdefault(room, []).append(number)
    return bins


class Packed:
    """Chats, each a row of token ids, packed whole into windows of `length` tokens."""

    def __init__(self, rows: Rows, length: int, seed: int):
        self.rows, self.length = rows, length
        self.bins = pack(rows.lengths().tolist(), length)
        self.order = Order(len(self.bins), seed, rows.name)

    def batch(self, start: int, size: int) -> tuple[Tensor, Tensor, Tensor]:
        """Windows start … start + size - 1 of the endless stream: see `window_batch`."""
        return self.make([self.bins[i] for i in self.order.take(start, size)])

    def make(self, bins: list[list[int]]) -> tuple[Tensor, Tensor, Tensor]:
        return window_batch([[self.rows.example(i)[0] for i in one] for one in bins], self.length)


# ---------------------------------------------------------------------------- writing the files

def encode(documents: list[Document], tokenizer: str, val_fraction: float) -> Made:
    """The token ids for each file, and how many documents and bytes of text they stand for."""
    tok = cached_tokenizer(tokenizer)
    ids: dict[str, list[np.ndarray]] = {}
    counts = Counter()
    for document in documents:
        raw = document.text.encode()
        name = f"{draw_split(raw, val_fraction)}_{document.lang}.bin"
        ids.setdefault(name, []).append(
            np.array(tok.encode_ordinary(document.text) + [tok.endoftext], id_type(tok)))
        counts.update({f"{name} documents": 1, f"{name} bytes": len(raw),
                       ENDOFTEXT: int(ENDOFTEXT in document.text)})  # as text: see `prepare`
    return {name: np.concatenate(parts).tobytes() for name, parts in ids.items()}, counts


def prepare(cfg: Config, progress: Progress) -> None:
    """Write the token files of a folder. Raises ValueError or OSError for a user's mistake."""
    tok = load_tokenizer(cfg.tokenizer)
    out = Folder(cfg.out_dir, find_files(cfg.input), tok, cfg.val_fraction)
    if out.finished:
        open_data(cfg.out_dir)  # raises ValueError if it has been damaged since
        print(f"{cfg.out_dir} is up to date")
        return
    if out.meta:
        raise ValueError(f"{cfg.out_dir} holds data made from other input or settings: delete it, "
                         "or give another --out_dir")
    there = [*Path(cfg.out_dir).glob("*.bin")]
    if there and not Path(cfg.out_dir, "tokenizer.txt").exists():
        raise ValueError(f"{cfg.out_dir} holds {there[0].name}, made by something else: give "
                         "another --out_dir")
    _, counts = out.fill(
        parse, partial(encode, tokenizer=cfg.tokenizer, val_fraction=cfg.val_fraction),
        cfg.workers, cfg.on_bad_line, progress, HEADER_BYTES)
    if n := counts[ENDOFTEXT]:
        print(f"documents that hold the letters {ENDOFTEXT}: {n:,}. They are learnt as letters; "
              "for documents that end there, write each as a line of a .jsonl file")
    for split in ("train", "val"):
        if not any(name.startswith(split) for name in out.files):
            raise ValueError(f"{cfg.input}: no document fell into the {split} split: give more "
                             f"text or another --val_fraction than {cfg.val_fraction}")

    def header(name: str, size: int, sha: bytes) -> bytes:
        width = id_type(tok).itemsize
        n, n_docs, n_bytes = size // width, counts[f"{name} documents"], counts[f"{name} bytes"]
        print(f"{name:<16} {n_docs:>10,} documents {n:>14,} tokens {n_bytes:>16,} bytes "
              f"{n_bytes / n:6.2f} bytes/token")
        return pack_header(width, n, tok.n_vocab, n_bytes, n_docs, tok.sha256, sha,
                           name[:-4].partition("_")[2])
    out.finish(HEADER_BYTES, header)


def main() -> None:
    only_talk()
    cfg = configure(Config)
    if not 0 < cfg.val_fraction < 1:
        fail(f"--val_fraction={cfg.val_fraction} must lie between 0 and 1")
    try:
        prepare(cfg, Progress())
    except KeyboardInterrupt:
        fail("stopped; the same command starts again")
    except OSError as error:
        reason = f"{error.filename or cfg.out_dir}: {error.strerror}" if error.errno else f"{error}"
        fail(f"{reason}; mend that, and give the same command again")


if __name__ == "__main__":
    run(main)

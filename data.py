"""
Text -> token files, and token files -> batches.

    python data.py --input=PATHS --tokenizer=FILE --out_dir=DIR [--workers=N]

Each language and split becomes one file, DIR/train_zh.bin and so on: a 256-byte header, then the
token ids of all documents, each closed by <|endoftext|>. A document belongs to the validation split
by a hash of its text, so copies of it never stand on both sides. The work is spread over processes,
does not depend on how many, takes constant memory, and goes on where it was stopped.

Training reads windows of a fixed length straight from the mapped files. Which windows make up a
batch is a pure function of (seed, index): a run resumes from one integer, on any number of ranks.
"""
import hashlib
import json
import os
import struct
import time
import zlib
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, lru_cache, partial
from itertools import islice
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from configurator import configure, fail
from plumbing.corpus import (BadLine, BadLines, Batch, Progress, find_files, parallel, parse, read_batches,
                    write_text)
from tokenizer import Tokenizer, load_tokenizer

IGNORE = -100  # target of a position that is not scored
HEADER = struct.Struct("<8sIIQQQQ32s32s16s")  # fields as in pack_header, zero-padded to 252
HEADER_BYTES = 256  # the last 4 are a crc32 of the others
JOURNAL = "progress.json"  # says how far an unfinished folder is
JOURNAL_SECONDS = 5.0  # of work that a crash may cost
BLOCK = 1024  # windows whose places in the order are computed at once


@dataclass(frozen=True)
class Config:
    input: str = "out/toyworld/pt.jsonl"  # text: files or folders, comma-separated
    tokenizer: str = "out/toyworld/tokenizer.txt"  # file written by tokenizer.py
    out_dir: str = "out/toyworld/data"  # folder for the token files
    val_fraction: float = 0.02  # share of the documents that goes to validation
    text_field: str = "text"  # field of a JSONL line, or parquet column, that holds the text
    on_bad_line: Literal["stop", "skip"] = "stop"  # at a line that is not as it should be
    max_bad_fraction: float = 0.01  # with skip: more bad lines than this are an error
    max_line_mb: int = 16  # a longer line is a bad one
    workers: int = 0  # processes; 0: one per core


# ---------------------------------------------------------------------------- token files

@dataclass
class TokenFile:
    """A mapped token file: `ids` is (count,) uint16 or uint32, read from disk as it is used."""
    path: str
    ids: np.ndarray
    vocab_size: int
    n_bytes: int  # of UTF-8 text behind the ids
    n_docs: int
    tokenizer: str  # sha256 of the tokenizer that made it
    sha256: str  # of the ids
    lang: str


def pack_header(width: int, count: int, vocab_size: int, n_bytes: int, n_docs: int,
                tokenizer: str, payload: bytes, lang: str) -> bytes:
    """Magic, version, bytes per id, count of ids, vocabulary, text bytes, documents, sha256 of the
    tokenizer and of the payload, language."""
    head = HEADER.pack(b"KHAOSZ\0\0", 1, width, count, vocab_size, n_bytes, n_docs,
                       bytes.fromhex(tokenizer), payload, lang.encode())
    head = head.ljust(HEADER_BYTES - 4, b"\0")
    return head + struct.pack("<I", zlib.crc32(head))


def open_token_file(path: str, verify: Literal["auto", "full", "fast"] = "auto") -> TokenFile:
    """Map a token file. The header and the size are always checked, the sha256 of the contents
    with `full`, or with `auto` up to 1 GB. Raises ValueError naming the file."""
    try:
        size = os.path.getsize(path)
        with open(path, "rb") as f:
            head = f.read(HEADER_BYTES)
            magic, version, width, count, vocab_size, n_bytes, n_docs, tok, payload, lang = (
                HEADER.unpack_from(head.ljust(HEADER_BYTES, b"\0")))
            if magic != b"KHAOSZ\0\0" or struct.unpack("<I", head[-4:])[0] != zlib.crc32(head[:-4]):
                raise ValueError(f"{path}: not a token file, or its header is damaged")
            if version != 1 or width not in (2, 4):
                raise ValueError(f"{path}: written by a newer version of data.py")
            if size != HEADER_BYTES + count * width:
                raise ValueError(f"{path}: damaged: {size:,} bytes, its header says "
                                 f"{HEADER_BYTES + count * width:,}")
            if verify == "full" or verify == "auto" and size <= 1 << 30:
                if hashlib.file_digest(f, "sha256").digest() != payload:
                    raise ValueError(f"{path}: damaged: its contents do not match their sha256")
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from None
    dtype = np.dtype(f"<u{width}")
    ids = np.memmap(path, dtype, "r", HEADER_BYTES, (count,)) if count else np.zeros(0, dtype)
    return TokenFile(path, ids, vocab_size, n_bytes, n_docs, tok.hex(), payload.hex(),
                     lang.rstrip(b"\0").decode())


def read_json(path: str) -> dict | None:
    """What meta.json or progress.json says, None without it. Raises ValueError if damaged."""
    try:
        with open(path, encoding="utf-8") as f:
            found = json.load(f)
        found["job"]
        return found
    except OSError:
        return None
    except (ValueError, TypeError, KeyError):
        raise ValueError(f"{path}: not from data.py, or damaged; delete its folder") from None


def open_data(data_dir: str, verify: Literal["auto", "full", "fast"] = "auto",
              ) -> tuple[Tokenizer, dict[str, list[TokenFile]]]:
    """The tokenizer of a prepared folder and its files by split, languages in alphabetical order.
    Raises ValueError when something is missing, damaged or does not belong together."""
    meta = read_json(os.path.join(data_dir, "meta.json"))
    if not meta:
        raise ValueError(f"{data_dir}: no prepared data here; make it with python data.py "
                         f"--input=PATHS --tokenizer=FILE --out_dir={data_dir}")
    tok = load_tokenizer(os.path.join(data_dir, "tokenizer.txt"))
    splits: dict[str, list[TokenFile]] = {"train": [], "val": []}
    for name in sorted(meta["files"]):
        file = open_token_file(os.path.join(data_dir, name), verify)
        if file.tokenizer != tok.sha256 or file.vocab_size != tok.n_vocab:
            raise ValueError(f"{file.path}: made with another tokenizer than {tok.name}")
        splits[name.partition("_")[0]].append(file)
    return tok, splits


# ---------------------------------------------------------------------------- batches

def shuffled(index: np.ndarray, n: int, key: int) -> np.ndarray:
    """Where a pseudo-random permutation of range(n), chosen by `key`, takes each index. Constant
    memory: a Feistel network on just enough bits; what lands outside range(n) goes round again."""
    bits = max(2, (n - 1).bit_length())
    low = np.uint64(bits // 2)
    low_mask, high_mask = np.uint64((1 << bits // 2) - 1), np.uint64((1 << bits - bits // 2) - 1)
    rounds = [np.uint64(hash64(key, r)) for r in range(4)]

    def network(x: np.ndarray) -> np.ndarray:
        a, b = x & low_mask, x >> low
        for r, k in enumerate(rounds):
            half = b if r % 2 == 0 else a
            noise = (half + k) * np.uint64(0x9E3779B97F4A7C15)
            noise ^= noise >> np.uint64(29)
            noise *= np.uint64(0xBF58476D1CE4E5B9)
            noise >>= np.uint64(32)
            if r % 2 == 0:
                a = a ^ noise & low_mask
            else:
                b = b ^ noise & high_mask
        return b << low | a

    x = network(index.astype(np.uint64))
    while (outside := x >= n).any():
        x[outside] = network(x[outside])
    return x.astype(np.int64)


def hash64(*values: int | str) -> int:
    """A 64-bit hash of small things, to make a seed or a name for one out of several."""
    return int.from_bytes(hashlib.blake2b(repr(values).encode(), digest_size=8).digest(), "little")


class Order:
    """An endless stream of range(n), in a new order each epoch: a pure function of (seed, place).
    Raises ValueError when there is nothing to draw from."""

    def __init__(self, n: int, seed: int, name: str = "the data"):
        if not n:
            raise ValueError(f"{name}: no example to train on")
        self.n, self.seed = n, seed
        self.block = lru_cache(maxsize=2)(self.block)

    def take(self, start: int, size: int) -> list[int]:
        """Places start … start + size - 1 of the stream."""
        places = (divmod(i, self.n) for i in range(start, start + size))
        return [self.block(epoch, i // BLOCK)[i % BLOCK] for epoch, i in places]

    def block(self, epoch: int, block: int) -> list[int]:
        """The next BLOCK places of an epoch: numpy costs as much for one as for hundreds."""
        index = np.arange(block * BLOCK, min((block + 1) * BLOCK, self.n))
        return shuffled(index, self.n, hash64(self.seed, epoch)).tolist()


class Windows:
    """Windows of `length` tokens, and the token behind each, over all training files.

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
        if not self.n:
            folder = os.path.dirname(files[0].path) if files else "the data"
            raise ValueError(f"{folder}: the training split is shorter than one window of {length} "
                             "tokens")
        self.order = Order(self.n, seed)
        self.offsets = lru_cache(maxsize=2)(self.offsets)

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

    def offsets(self, epoch: int) -> list[int]:
        """Where the first window of each file starts, as far in as the file has room for."""
        draw = hash64(self.seed, epoch, 1)
        return [draw % min(self.length, max(len(ids) - self.length, 1)) for ids in self.ids]


def prefetch(make: Callable, places: Iterable[tuple]) -> Iterator:
    """make(*place) of each place in turn, the next one made by a thread while the caller is busy:
    a slow disk then costs time only where it takes longer than the work."""
    with ThreadPoolExecutor(1) as thread:
        coming = deque()
        for place in places:
            coming.append(thread.submit(make, *place))
            if len(coming) > 1:
                yield coming.popleft().result()
        while coming:
            yield coming.popleft().result()


def check_ids(file: TokenFile, ids: np.ndarray) -> None:
    """Raises ValueError for an id outside the vocabulary, which would read past the embedding."""
    if ids.max(initial=0) >= file.vocab_size:
        raise ValueError(f"{file.path}: holds the id {ids.max()}, outside its vocabulary of "
                         f"{file.vocab_size}")


def passages(file: TokenFile, length: int, batch_size: int, max_tokens: int | None = None,
             ) -> Iterator[tuple[Tensor, Tensor]]:
    """The whole file in order (or evenly spread windows of about `max_tokens`) for evaluation:
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


# ---------------------------------------------------------------------------- preparing

cached_tokenizer = cache(load_tokenizer)  # once per worker


def id_type(tok: Tokenizer) -> np.dtype:
    return np.dtype("<u2" if tok.n_vocab <= 1 << 16 else "<u4")


def draw_split(raw: bytes, val_fraction: float) -> str:
    """"val" or "train", by a hash: the same text is always on the same side."""
    draw = int.from_bytes(hashlib.blake2b(raw, digest_size=8).digest(), "little") / 2**64
    return "val" if draw < val_fraction else "train"


def encode_batch(batch: Batch, tokenizer: str, text_field: str, val_fraction: float):
    """A worker's share: {(split, lang): (id bytes, text bytes, documents)}, the bad lines, and how
    much was read."""
    tok = cached_tokenizer(tokenizer)
    parts: dict[tuple[str, str], list] = {}
    bad = []
    for item in parse(batch, text_field):
        if isinstance(item, BadLine):
            bad.append(item)
            continue
        raw = item.text.encode()
        part = parts.setdefault((draw_split(raw, val_fraction), item.lang), [[], 0, 0])
        part[0].append(np.array(tok.encode_ordinary(item.text) + [tok.endoftext], id_type(tok)))
        part[1] += len(raw)
        part[2] += 1
    return ({key: (np.concatenate(ids).tobytes(), n_bytes, n)
             for key, (ids, n_bytes, n) in parts.items()}, bad, batch.n_bytes, batch.share)


class Writer:
    """One token file being written: PATH.part until all files are whole."""

    def __init__(self, path: str, done: list | None = None):
        """With `done`, what sync() said in an earlier run, goes on from there. Raises ValueError if
        the file is no longer what it was then."""
        self.path, self.part, self.sha = path, f"{path}.part", hashlib.sha256()
        self.size, self.n_bytes, self.n_docs, sha = done or [HEADER_BYTES, 0, 0, ""]
        if done and not os.path.exists(self.part) and os.path.exists(path):
            os.replace(path, self.part)  # the earlier run was stopped at its very end
        self.file = open(self.part, "r+b" if done and os.path.exists(self.part) else "w+b")
        self.file.truncate(self.size)
        self.file.seek(HEADER_BYTES)
        while block := self.file.read(1 << 22):
            self.sha.update(block)
        if done and self.sha.hexdigest() != sha:
            raise ValueError(f"{self.part}: not as the stopped run left it; delete its folder")

    def add(self, ids: bytes, n_bytes: int, n_docs: int) -> None:
        self.file.write(ids)
        self.sha.update(ids)
        self.size += len(ids)
        self.n_bytes += n_bytes
        self.n_docs += n_docs

    def sync(self) -> list:
        self.file.flush()
        os.fsync(self.file.fileno())
        return [self.size, self.n_bytes, self.n_docs, self.sha.hexdigest()]

    def finish(self, tok: Tokenizer, lang: str) -> int:
        """Write the header; the number of ids."""
        width = id_type(tok).itemsize
        count = (self.size - HEADER_BYTES) // width
        self.file.seek(0)
        self.file.write(pack_header(width, count, tok.n_vocab, self.n_bytes, self.n_docs,
                                    tok.sha256, self.sha.digest(), lang))
        self.sync()
        return count


def describe(files: list[str]) -> str:
    """A hash that tells whether the input is still the same."""
    stats = [(os.path.basename(f), os.stat(f).st_size, os.stat(f).st_mtime_ns) for f in files]
    return hashlib.sha256(repr(stats).encode()).hexdigest()


def begin(cfg: Config, job: dict) -> dict | None:
    """Where to go on: at the start, or where an earlier run of the same job was stopped. None if
    the folder holds the result already. Raises ValueError if it holds something else."""
    os.makedirs(cfg.out_dir, exist_ok=True)
    journal = os.path.join(cfg.out_dir, JOURNAL)
    if meta := read_json(os.path.join(cfg.out_dir, "meta.json")):
        if meta["job"] != job:
            raise ValueError(f"{cfg.out_dir} holds data made from other input or settings: delete "
                             "it, or give another --out_dir")
        open_data(cfg.out_dir, "fast")
        with suppress(FileNotFoundError):
            os.unlink(journal)  # left by a run that was killed after its last step but one
        return None
    state = read_json(journal)
    if state and state["job"] == job:
        print(f"going on at {state['share']:.1%}, where an earlier run was stopped")
        return state
    names = os.listdir(cfg.out_dir)
    if state:
        print("input or settings have changed since an earlier run was stopped: starting again")
    elif foreign := [name for name in names if name.endswith(".bin")]:
        raise ValueError(f"{cfg.out_dir} holds {foreign[0]}, made by something else: give another "
                         "--out_dir")
    for name in names:
        if name.endswith(".bin.part"):
            os.unlink(os.path.join(cfg.out_dir, name))
    state = {"job": job, "batches": 0, "share": 0.0, "bad": {}, "files": {}}
    write_text(journal, json.dumps(state))  # from here on the folder is known as ours
    return state


def encode(cfg: Config, files: list[str], state: dict, writers: dict[str, Writer],
           progress: Progress) -> None:
    """Bring the writers from `state` to the end of the input."""
    bad_lines = BadLines(cfg.on_bad_line, progress)
    bad_lines.kinds.update(state["bad"])
    work = partial(encode_batch, tokenizer=cfg.tokenizer, text_field=cfg.text_field,
                   val_fraction=cfg.val_fraction)
    todo = islice(read_batches(files, cfg.text_field, cfg.max_line_mb), state["batches"], None)
    start = saved = time.time()
    first_share, n_read = state["share"], 0
    for parts, bad, n_bytes, share in parallel(work, todo, cfg.workers):
        bad_lines.add(bad)
        for (split, lang), part in sorted(parts.items()):
            name = f"{split}_{lang}.bin"
            if name not in writers:
                writers[name] = Writer(os.path.join(cfg.out_dir, name))
            writers[name].add(*part)
        state["batches"] += 1
        state["share"] = share
        now = time.time()
        if now - saved >= JOURNAL_SECONDS:
            state["files"] = {name: w.sync() for name, w in writers.items()}
            state["bad"] = bad_lines.kinds
            write_text(os.path.join(cfg.out_dir, JOURNAL), json.dumps(state))
            saved = now
        n_read += n_bytes
        left = (1 - share) / max(share - first_share, 1e-9) * (now - start)
        progress.show(f"{share:6.1%} | {n_read / 1e6:,.0f} MB | "
                      f"{n_read / max(now - start, 1e-9) / 1e6:.1f} MB/s | eta {left:,.0f} s")
    progress.end()
    print(f"read {n_read / 1e6:,.1f} MB in {time.time() - start:.1f} s")
    bad_lines.finish(sum(w.n_docs for w in writers.values()), cfg.max_bad_fraction)


def finish(cfg: Config, job: dict, tok: Tokenizer, writers: dict[str, Writer]) -> None:
    """Headers, then names, then meta.json: a folder without it is unfinished, so never half right.
    Raises ValueError for an empty split."""
    for split in ("train", "val"):
        if not any(name.startswith(split) for name in writers):
            raise ValueError(f"{cfg.input}: no document fell into the {split} split: give more "
                             f"text or another --val_fraction than {cfg.val_fraction}")
    write_text(os.path.join(cfg.out_dir, "tokenizer.txt"), tok.text)
    for name, w in sorted(writers.items()):
        n = w.finish(tok, name[:-4].partition("_")[2])
        print(f"{name:<16} {w.n_docs:>10,} documents {n:>14,} tokens {w.n_bytes:>16,} bytes "
              f"{w.n_bytes / n:6.2f} bytes/token")
    for w in writers.values():
        os.replace(w.part, w.path)
    write_text(os.path.join(cfg.out_dir, "meta.json"),
               json.dumps({"input": cfg.input, "files": sorted(writers), "job": job}, indent=1))
    os.unlink(os.path.join(cfg.out_dir, JOURNAL))


def prepare(cfg: Config, progress: Progress) -> None:
    """Write the token files of a folder. Raises ValueError or OSError for what a user can mend."""
    files, tok = find_files(cfg.input), load_tokenizer(cfg.tokenizer)
    job = {"inputs": describe(files), "tokenizer": tok.sha256,
           "settings": [cfg.val_fraction, cfg.text_field, cfg.max_line_mb]}
    state = begin(cfg, job)
    if not state:
        print(f"{cfg.out_dir} is up to date")
        return
    writers: dict[str, Writer] = {}
    try:
        for name, done in state["files"].items():
            writers[name] = Writer(os.path.join(cfg.out_dir, name), done)
        encode(cfg, files, state, writers, progress)
        if describe(files) != job["inputs"]:
            raise ValueError(f"{cfg.input}: changed while it was read; give the command again")
        finish(cfg, job, tok, writers)
    finally:
        for w in writers.values():
            w.file.close()


def main() -> None:
    cfg = configure(Config)
    if not 0 < cfg.val_fraction < 1:
        fail(f"--val_fraction={cfg.val_fraction} must lie between 0 and 1")
    if cfg.max_line_mb < 1 or cfg.workers < 0:
        fail("--max_line_mb must be at least 1 and --workers at least 0")
    progress = Progress()
    try:
        prepare(cfg, progress)
        return
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
    main()

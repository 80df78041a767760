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
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, partial
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from configurator import configure, fail
from corpus import BadLine, BadLines, Batch, find_files, parallel, parse, read_batches, write_text
from tokenizer import Tokenizer, load_tokenizer

IGNORE = -100  # target of a position that is not scored
HEADER = struct.Struct("<8sIIQQQQ32s32s16s")  # as listed in TokenFile.header, zero-padded to 252
HEADER_BYTES = 256  # the last 4 are a crc32 of the others


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
    lang: str


def pack_header(width: int, count: int, vocab_size: int, n_bytes: int, n_docs: int,
                tokenizer: str, payload: bytes, lang: str) -> bytes:
    """Magic, version, bytes per id, ids, vocabulary, text bytes, documents, two sha256, language."""
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
    return TokenFile(path, ids, vocab_size, n_bytes, n_docs, tok.hex(), lang.rstrip(b"\0").decode())


def open_data(data_dir: str, verify: Literal["auto", "full", "fast"] = "auto",
              ) -> tuple[Tokenizer, dict[str, list[TokenFile]]]:
    """The tokenizer of a prepared folder and its files by split, languages in alphabetical order.
    Raises ValueError when something is missing, damaged or does not belong together."""
    try:
        with open(os.path.join(data_dir, "meta.json"), encoding="utf-8") as f:
            names = json.load(f)["files"]
    except (OSError, ValueError, KeyError):
        raise ValueError(f"{data_dir}: no prepared data here; make it with python data.py "
                         f"--input=PATHS --tokenizer=FILE --out_dir={data_dir}") from None
    tok = load_tokenizer(os.path.join(data_dir, "tokenizer.txt"))
    splits: dict[str, list[TokenFile]] = {"train": [], "val": []}
    for name in sorted(names):
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
    rounds = [np.uint64(mix(key, r)) for r in range(4)]

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


def mix(*values: int) -> int:
    """A 64-bit hash of small integers, to make a seed for one thing out of several."""
    return int.from_bytes(hashlib.blake2b(repr(values).encode(), digest_size=8).digest(), "little")


class Windows:
    """Windows of `length` tokens, and the token behind each, over all training files.

    Within an epoch every window comes once, in an order that is new each epoch; so is the offset
    at which the windows start, so that no token is always first in its window.
    """

    def __init__(self, files: list[TokenFile], length: int, seed: int):
        self.files, self.length, self.seed = files, length, seed
        # one window's worth is left over for the offset, or none in a file with one window only
        counts = [max(len(f.ids) // length - 1, int(len(f.ids) > length)) for f in files]
        self.ends = np.cumsum(counts)
        self.n = int(self.ends[-1]) if files else 0
        if not self.n:
            raise ValueError(f"{os.path.dirname(files[0].path) if files else 'the data'}: the training "
                             f"split is shorter than one window of {length} tokens")

    def batch(self, start: int, size: int) -> tuple[Tensor, Tensor]:
        """Samples start … start + size - 1 of the endless stream: inputs and targets, (size, length)
        int64. Raises ValueError for an id outside the vocabulary."""
        epoch, index = np.divmod(np.arange(start, start + size), self.n)
        rows = np.empty((size, self.length + 1), np.int64)
        for e in np.unique(epoch):
            here = np.flatnonzero(epoch == e)
            where = shuffled(index[here], self.n, mix(self.seed, int(e)))
            source = np.searchsorted(self.ends, where, side="right")
            for i, file in enumerate(self.files):
                mine = source == i
                if mine.any():
                    first = self.ends[i - 1] if i else 0
                    rows[here[mine]] = self.view(file, int(e))[where[mine] - first]
        if rows.max() >= min(f.vocab_size for f in self.files):
            bad = next(f for f in self.files if f.ids.max(initial=0) >= f.vocab_size)
            raise ValueError(f"{bad.path}: holds an id outside its vocabulary of {bad.vocab_size}")
        both = torch.from_numpy(rows)
        return both[:, :-1], both[:, 1:]

    def view(self, file: TokenFile, epoch: int) -> np.ndarray:
        """All windows of a file in an epoch, (n, length + 1), without copying anything."""
        step = file.ids.itemsize
        room = len(file.ids) - self.length - 1  # the offset is free as far as the file allows
        offset = mix(self.seed, epoch, 1) % min(self.length, room + 1)
        n = (len(file.ids) - offset - 1) // self.length
        return np.ndarray((n, self.length + 1), file.ids.dtype, file.ids, offset * step,
                          (self.length * step, step))


def passages(file: TokenFile, length: int, batch_size: int, max_tokens: int | None = None,
             ) -> Iterator[tuple[Tensor, Tensor]]:
    """The whole file in order (or evenly spread windows of about `max_tokens`) for evaluation:
    every token but the first is a target once. The end of the last row is filled with IGNORE."""
    n = -(-max(len(file.ids) - 1, 0) // length)
    every = max(1, n * length // max_tokens) if max_tokens else 1
    starts = np.arange(0, n, every) * length
    for i in range(0, len(starts), batch_size):
        rows = np.full((len(starts[i:i + batch_size]), length + 1), IGNORE, np.int64)
        for row, at in zip(rows, starts[i:i + batch_size]):
            part = file.ids[at:at + length + 1]
            row[:len(part)] = part
        both = torch.from_numpy(rows)
        yield both[:, :-1].clamp(min=0), both[:, 1:]


# ---------------------------------------------------------------------------- preparing

cached_tokenizer = cache(load_tokenizer)  # once per worker


def encode_batch(batch: Batch, tokenizer: str, text_field: str, val_fraction: float):
    """A worker's share: {(split, lang): [id bytes, text bytes, documents]} and the bad lines."""
    tok = cached_tokenizer(tokenizer)
    dtype = np.dtype("<u2" if tok.n_vocab <= 1 << 16 else "<u4")
    end = dtype.type(tok.endoftext).tobytes()
    parts: dict[tuple[str, str], list] = {}
    bad = []
    for item in parse(batch, text_field):
        if isinstance(item, BadLine):
            bad.append(item)
            continue
        raw = item.text.encode()
        draw = int.from_bytes(hashlib.blake2b(raw, digest_size=8).digest(), "little") / 2**64
        part = parts.setdefault(("val" if draw < val_fraction else "train", item.lang), [[], 0, 0])
        part[0] += tok.encode_to_numpy(item.text, disallowed_special=()).astype(dtype).tobytes(), end
        part[1] += len(raw)
        part[2] += 1
    return {k: (b"".join(ids), n_bytes, n) for k, (ids, n_bytes, n) in parts.items()}, bad, batch.n_bytes


class Writer:
    """One token file being written: NAME.part until it is whole."""

    def __init__(self, path: str, counts: list[int] | None = None):
        """With `counts` = [size, text bytes, documents], goes on behind the first `size` bytes."""
        self.path, self.sha = path, hashlib.sha256()
        self.size, self.n_bytes, self.n_docs = counts or [HEADER_BYTES, 0, 0]
        self.file = open(f"{path}.part", "r+b" if counts else "w+b")
        self.file.truncate(self.size)
        self.file.seek(HEADER_BYTES)
        while block := self.file.read(1 << 22):
            self.sha.update(block)
        self.file.seek(self.size)

    def add(self, ids: bytes, n_bytes: int, n_docs: int) -> None:
        self.file.write(ids)
        self.sha.update(ids)
        self.size, self.n_bytes, self.n_docs = self.size + len(ids), self.n_bytes + n_bytes, self.n_docs + n_docs

    def sync(self) -> list[int]:
        self.file.flush()
        os.fsync(self.file.fileno())
        return [self.size, self.n_bytes, self.n_docs]

    def finish(self, tok: Tokenizer, lang: str) -> None:
        width = 2 if tok.n_vocab <= 1 << 16 else 4
        self.file.seek(0)
        self.file.write(pack_header(width, (self.size - HEADER_BYTES) // width, tok.n_vocab, self.n_bytes,
                                    self.n_docs, tok.sha256, self.sha.digest(), lang))
        self.sync()
        self.file.close()
        os.replace(f"{self.path}.part", self.path)


def prepare(cfg: Config) -> None:
    """Write the token files of a folder. Raises ValueError with one line for what a user can mend."""
    files, tok = find_files(cfg.input), load_tokenizer(cfg.tokenizer)
    os.makedirs(cfg.out_dir, exist_ok=True)
    meta_path, journal_path = (os.path.join(cfg.out_dir, n) for n in ("meta.json", "progress.json"))
    job = {"inputs": [[f, os.path.getsize(f), os.stat(f).st_mtime_ns] for f in files],
           "tokenizer": tok.sha256, "settings": [cfg.val_fraction, cfg.text_field, cfg.on_bad_line,
                                                 cfg.max_bad_fraction, cfg.max_line_mb]}
    if os.path.exists(meta_path):
        with open(meta_path, encoding="utf-8") as f:
            if json.load(f)["job"] == job:
                print(f"{cfg.out_dir} is up to date")
                return
        raise ValueError(f"{cfg.out_dir} holds data made from other input or settings: delete it, or "
                         "give another --out_dir")
    state = {"job": job, "batches": 0, "read": 0, "bad": {}, "files": {}}
    if os.path.exists(journal_path):
        with open(journal_path, encoding="utf-8") as f:
            found = json.load(f)
        if found["job"] == job:
            state = found
            print(f"going on behind batch {state['batches']:,} of an earlier run")
    writers = {name: Writer(os.path.join(cfg.out_dir, name), counts) for name, counts in state["files"].items()}
    bad_lines = BadLines(cfg.on_bad_line)
    bad_lines.kinds.update(state["bad"])

    work = partial(encode_batch, tokenizer=cfg.tokenizer, text_field=cfg.text_field,
                   val_fraction=cfg.val_fraction)
    todo = (b for i, b in enumerate(read_batches(files, cfg.text_field, cfg.max_line_mb))
            if i >= state["batches"])
    total = sum(map(os.path.getsize, files))
    zipped = any(f.endswith((".gz", ".parquet")) for f in files)  # then the total is not known
    start = saved = time.time()
    done = 0
    for parts, bad, n_bytes in parallel(work, todo, cfg.workers):
        bad_lines.add(bad)
        for (split, lang), part in sorted(parts.items()):
            name = f"{split}_{lang}.bin"
            if name not in writers:
                writers[name] = Writer(os.path.join(cfg.out_dir, name))
            writers[name].add(*part)
        state["batches"] += 1
        state["read"] += n_bytes
        done += n_bytes
        now = time.time()
        if now - saved > 5:  # seconds of work that a crash may cost
            state["files"] = {name: w.sync() for name, w in writers.items()}
            state["bad"] = bad_lines.kinds
            write_text(journal_path, json.dumps(state))
            saved = now
        rate = done / (now - start + 1e-9)
        eta = "" if zipped else f" of {total / 1e6:,.0f} | eta {(total - state['read']) / rate:,.0f} s"
        print(f"\r{state['read'] / 1e6:,.0f} MB{eta} | {rate / 1e6:.1f} MB/s   ", end="", flush=True)
    print()
    bad_lines.finish(sum(w.n_docs for w in writers.values()), cfg.max_bad_fraction)
    splits = {name.partition("_")[0] for name in writers}
    for split in {"train", "val"} - splits:
        raise ValueError(f"{cfg.input}: no document fell into the {split} split: give more text or "
                         f"another --val_fraction than {cfg.val_fraction}")
    write_text(os.path.join(cfg.out_dir, "tokenizer.txt"), tok.text)
    for name, w in sorted(writers.items()):
        w.finish(tok, name[:-4].partition("_")[2])
        ids = (w.size - HEADER_BYTES) // (2 if tok.n_vocab <= 1 << 16 else 4)
        print(f"{name:<16} {w.n_docs:>10,} documents {ids:>14,} tokens {w.n_bytes:>16,} bytes "
              f"{w.n_bytes / ids:6.2f} bytes/token")
    write_text(meta_path, json.dumps({"files": sorted(writers), "job": job}, indent=1))
    if os.path.exists(journal_path):
        os.unlink(journal_path)


def main() -> None:
    cfg = configure(Config)
    if not 0 < cfg.val_fraction < 1:
        fail(f"--val_fraction={cfg.val_fraction} must lie between 0 and 1")
    if cfg.input == Config.input and not os.path.exists(cfg.input):
        fail(f"{cfg.input}: not there; make the embedded default with python toyworld.py, or give --input")
    try:
        prepare(cfg)
    except ValueError as error:
        fail(f"\n{error}".lstrip() if cfg.workers == 1 else f"{error}")
    except OSError as error:
        fail(f"{cfg.out_dir}: {error.strerror}; what is done is kept, the same command goes on from there")


if __name__ == "__main__":
    main()

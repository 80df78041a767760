"""
Token files: a 256-byte header, then the token ids of many documents, each closed by <|endoftext|>;
`open_data` maps those of a folder, and how they are checked and made may be skipped.

A `Folder` is made out of text by several processes; data.py and plumbing/examples.py say what a
worker makes of a batch. Last comes meta.json, which says what the files are made of. A folder
without it is unfinished: a run that was stopped, by a signal or a crash, starts again.
"""
import hashlib
import json
import os
import struct
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from plumbing.corpus import Batch, made_by_workers, read_batches
from plumbing.files import write_text
from plumbing.jobs import Progress
from tokenizer import Tokenizer, load_tokenizer

IGNORE = -100  # target of a position that is not scored
HEADER = struct.Struct("<8sIIQQQQ32s32s16s")  # fields as in pack_header, zero-padded to 252
HEADER_BYTES = 256  # the last 4 are a crc32 of the others
# what a worker makes of documents or records: bytes to add to each file, and how often what was met
Made = tuple[dict[str, bytes], Counter[str]]
HASHED_BYTES = 1 << 30  # contents up to so many are hashed when a file is opened: 1 s


@dataclass
class TokenFile:
    """A mapped token file: `ids` is (count,) uint16 or uint32, read from disk as it is used."""
    path: str
    ids: np.ndarray
    vocab_size: int
    n_bytes: int  # of the UTF-8 text that the ids stand for
    n_docs: int
    tokenizer: str  # sha256 of the tokenizer that made it
    sha256: str  # of the ids
    lang: str


def id_type(tok: Tokenizer) -> np.dtype:
    return np.dtype("<u2" if tok.n_vocab <= 1 << 16 else "<u4")


def pack_header(width: int, count: int, vocab_size: int, n_bytes: int, n_docs: int,
                tokenizer: str, payload: bytes, lang: str) -> bytes:
    """Magic, version, bytes per id, count of ids, vocabulary, text bytes, documents, sha256 of the
    tokenizer and of the payload, language."""
    head = HEADER.pack(b"KHAOSZ\0\0", 1, width, count, vocab_size, n_bytes, n_docs,
                       bytes.fromhex(tokenizer), payload, lang.encode())
    head = head.ljust(HEADER_BYTES - 4, b"\0")
    return head + struct.pack("<I", zlib.crc32(head))


def mapped(path: str, dtype: np.dtype, start: int = 0) -> np.ndarray:
    """The numbers in a file from byte `start` on, read from disk as they are used."""
    empty = os.path.getsize(path) <= start  # which cannot be mapped
    return np.zeros(0, dtype) if empty else np.memmap(path, dtype, "r", start)


def open_token_file(path: str) -> TokenFile:
    """Map a token file after a check of its header and size, and of its contents up to
    HASHED_BYTES. Raises ValueError naming the file."""
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
            if size <= HASHED_BYTES and hashlib.file_digest(f, "sha256").digest() != payload:
                raise ValueError(f"{path}: damaged: its contents do not match their sha256")
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from None
    ids = mapped(path, np.dtype(f"<u{width}"), HEADER_BYTES)
    return TokenFile(path, ids, vocab_size, n_bytes, n_docs, tok.hex(), payload.hex(),
                     lang.rstrip(b"\0").decode())


def check_ids(file: TokenFile, ids: np.ndarray) -> None:
    """Raises ValueError for an id outside the vocabulary, which would read past the embedding."""
    if ids.max(initial=0) >= file.vocab_size:
        raise ValueError(f"{file.path}: holds the id {ids.max()}, outside its vocabulary of "
                         f"{file.vocab_size}")


def read_meta(folder: str) -> dict | None:
    """What the meta.json of a folder says; None without it. Raises ValueError if damaged."""
    path = os.path.join(folder, "meta.json")
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
        found["job"]
        return found
    except OSError:
        return None
    except (ValueError, TypeError, KeyError):
        raise ValueError(f"{path}: not from data.py, or damaged; delete its folder") from None


def open_data(data_dir: str) -> tuple[Tokenizer, dict[str, list[TokenFile]]]:
    """The tokenizer of a prepared folder and its files by split, languages in alphabetical order.
    Raises ValueError when something is missing, damaged or does not belong together."""
    meta = read_meta(data_dir)
    if not meta:
        raise ValueError(f"{data_dir}: no prepared data here; make it with python data.py "
                         f"--input=PATHS --tokenizer=FILE --out_dir={data_dir}")
    tok = load_tokenizer(os.path.join(data_dir, "tokenizer.txt"))
    splits: dict[str, list[TokenFile]] = {"train": [], "val": []}
    for name in sorted(meta["files"]):
        file = open_token_file(os.path.join(data_dir, name))
        if file.tokenizer != tok.sha256 or file.vocab_size != tok.n_vocab:
            raise ValueError(f"{file.path}: made with another tokenizer than {tok.name}")
        splits[name.partition("_")[0]].append(file)
    return tok, splits


def describe(files: list[str]) -> str:
    """A hash of the names, sizes and times of files."""
    stats = [(os.path.basename(f), os.stat(f).st_size, os.stat(f).st_mtime_ns) for f in files]
    return hashlib.sha256(repr(stats).encode()).hexdigest()


class Folder:
    """A folder of files to be made of `inputs`, or made of just these already (`finished`)."""

    def __init__(self, path: str, inputs: list[str], tok: Tokenizer, *settings: float | str):
        self.path, self.inputs, self.tok = path, inputs, tok
        self.job = {"inputs": describe(inputs), "tokenizer": tok.sha256, "settings": [*settings]}
        self.meta = read_meta(path) or {}
        self.finished = self.meta.get("job") == self.job
        self.files: dict[str, BinaryIO] = {}

    def fill(self, read: Callable[[Batch], Iterator], make: Callable[[list], Made], workers: int,
             on_bad_line: str, progress: Progress, start: int = 0) -> tuple[int, Counter[str]]:
        """Add what is made of what is read from each batch, after `start` bytes that are left free.
        How many good items there were, and what was met in them. Raises ValueError or OSError."""
        os.makedirs(self.path, exist_ok=True)
        Path(self.path, "meta.json").unlink(missing_ok=True)
        write_text(os.path.join(self.path, "tokenizer.txt"), self.tok.text)
        n, counts = 0, Counter()
        for n_good, (parts, met) in made_by_workers(read_batches(self.inputs), read, make, workers,
                                                    on_bad_line, progress):
            n, counts = n + n_good, counts + met
            for name, raw in parts.items():
                if name not in self.files:
                    path = Path(self.path, name)
                    path.unlink(missing_ok=True)  # another run may have the old file mapped
                    self.files[name] = open(path, "w+b")
                    self.files[name].seek(start)
                self.files[name].write(raw)
        if describe(self.inputs) != self.job["inputs"]:
            raise ValueError(f"{', '.join(self.inputs)}: changed while it was read; give the "
                             "command again")
        return n, counts

    def finish(self, start: int = 0,
               header: Callable[[str, int, bytes], bytes] = lambda *file: b"") -> None:
        """Write the header of each file, which may depend on name, size and sha256 of what is in
        it; when all are safely on the disk, meta.json."""
        hashes = {}
        for name, f in sorted(self.files.items()):
            size = f.tell() - start
            f.seek(start)
            sha = hashlib.file_digest(f, "sha256")  # type: ignore[arg-type]
            f.seek(0)
            f.write(header(name, size, sha.digest()))
            f.flush()
            os.fsync(f.fileno())
            f.close()
            hashes[name] = sha.hexdigest()
        self.meta = {"job": self.job, "files": hashes}
        write_text(os.path.join(self.path, "meta.json"), json.dumps(self.meta, indent=1))

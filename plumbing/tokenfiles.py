"""
Token files: a 256-byte header, then the token ids of many documents, each closed by <|endoftext|>;
`open_data` maps those of a folder, and how they are checked and written may be skipped.

`TokenFolder` writes them so that a run that is stopped anywhere, by a signal or a crash, goes on:
the files have the name PATH.part until all of them are whole, and a journal says how far they are.
"""
import hashlib
import json
import os
import struct
import time
import zlib
from dataclasses import dataclass

import numpy as np

from plumbing.files import write_text
from tokenizer import Tokenizer, load_tokenizer

IGNORE = -100  # target of a position that is not scored
HEADER = struct.Struct("<8sIIQQQQ32s32s16s")  # fields as in pack_header, zero-padded to 252
HEADER_BYTES = 256  # the last 4 are a crc32 of the others
HASHED_BYTES = 1 << 30  # contents up to so many are hashed when a file is opened: 1 s
JOURNAL_SECONDS = 5.0  # of work that a crash may cost


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
    dtype = np.dtype(f"<u{width}")
    ids = np.memmap(path, dtype, "r", HEADER_BYTES, (count,)) if count else np.zeros(0, dtype)
    return TokenFile(path, ids, vocab_size, n_bytes, n_docs, tok.hex(), payload.hex(),
                     lang.rstrip(b"\0").decode())


def check_ids(file: TokenFile, ids: np.ndarray) -> None:
    """Raises ValueError for an id outside the vocabulary, which would read past the embedding."""
    if ids.max(initial=0) >= file.vocab_size:
        raise ValueError(f"{file.path}: holds the id {ids.max()}, outside its vocabulary of "
                         f"{file.vocab_size}")


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


def open_data(data_dir: str) -> tuple[Tokenizer, dict[str, list[TokenFile]]]:
    """The tokenizer of a prepared folder and its files by split, languages in alphabetical order.
    Raises ValueError when something is missing, damaged or does not belong together."""
    meta = read_json(os.path.join(data_dir, "meta.json"))
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


# ---------------------------------------------------------------------------- writing

class PartFile:
    """One token file while it is written."""

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
        self.file.close()
        return count


class TokenFolder:
    """The token files of a folder while they are written. `state` says how far they are: `batches`
    and `share` of the input, and the `bad` lines in it. `finished`: there is nothing left to do."""

    def __init__(self, folder: str, job: dict):
        """Goes on where an earlier run of the same job was stopped. Raises ValueError if the folder
        holds something else."""
        self.folder, self.job, self.saved = folder, job, time.time()
        self.files: dict[str, PartFile] = {}
        self.journal = os.path.join(folder, "progress.json")
        os.makedirs(folder, exist_ok=True)
        meta, state = read_json(os.path.join(folder, "meta.json")), read_json(self.journal)
        self.finished = bool(meta)
        if meta:
            if meta["job"] != job:
                raise ValueError(f"{folder} holds data made from other input or settings: delete "
                                 "it, or give another --out_dir")
            if state:  # left by a run that was killed after its last step but one
                os.unlink(self.journal)
            return
        names = os.listdir(folder)
        if state and state["job"] == job:
            print(f"going on at {state['share']:.1%}, where an earlier run was stopped")
        else:
            if state:
                print("input or settings have changed since an earlier run was stopped: starting "
                      "again")
            elif foreign := [name for name in names if name.endswith(".bin")]:
                raise ValueError(f"{folder} holds {foreign[0]}, made by something else: give "
                                 "another --out_dir")
            for name in names:
                if name.endswith(".bin.part"):
                    os.unlink(os.path.join(folder, name))
            state = {"job": job, "batches": 0, "share": 0.0, "bad": {}, "files": {}}
            write_text(self.journal, json.dumps(state))  # now the folder is known as ours
        self.state = state
        for name, done in state["files"].items():
            self.files[name] = PartFile(os.path.join(folder, name), done)

    def add(self, split: str, lang: str, *part) -> None:
        """Append ids, and how many bytes of text and documents they stand for."""
        name = f"{split}_{lang}.bin"
        if name not in self.files:
            self.files[name] = PartFile(os.path.join(self.folder, name))
        self.files[name].add(*part)

    def end_batch(self, share: float, bad: dict[str, int]) -> None:
        """All parts of a batch are in; a few seconds after the last time, make that durable."""
        self.state["batches"] += 1
        self.state["share"] = share
        if time.time() - self.saved >= JOURNAL_SECONDS:
            self.state["files"] = {name: file.sync() for name, file in self.files.items()}
            self.state["bad"] = bad
            write_text(self.journal, json.dumps(self.state))
            self.saved = time.time()

    def finish(self, tok: Tokenizer, source: str) -> None:
        """Headers, then names, then meta.json: a folder without it is unfinished, so never half
        right."""
        write_text(os.path.join(self.folder, "tokenizer.txt"), tok.text)
        for name, file in sorted(self.files.items()):
            n = file.finish(tok, name[:-4].partition("_")[2])
            print(f"{name:<16} {file.n_docs:>10,} documents {n:>14,} tokens {file.n_bytes:>16,} "
                  f"bytes {file.n_bytes / n:6.2f} bytes/token")
        for file in self.files.values():
            os.replace(file.part, file.path)
        write_text(os.path.join(self.folder, "meta.json"), json.dumps(
            {"input": source, "files": sorted(self.files), "job": self.job}, indent=1))
        os.unlink(self.journal)

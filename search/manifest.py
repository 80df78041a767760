"""
The files of an index, and the postings in them: which chunks hold a term, and how often.

    manifest.json         its own sha256, how many bytes of each file are valid, with their CRC-32,
                          and what index.py adds
    NAME-G.suffix         files that only grow at their end; G counts how often all were made anew
    terms-G-FIRST-N.npz   postings of N chunks, a segment: written once

A commit appends, flushes and then replaces manifest.json. A crash at any moment leaves the old
index or the new one: bytes after the valid ones do not count, and are cut off later.

    segment = make_segment(first, [terms("RAG 检索"), terms("检索增强")])
    segment.find("检索")                        # where its postings lie in segment.chunks

What is added becomes a segment. Two neighbours of similar length become one, so each posting is
written about log2(n) times (a log-structured merge, as in Lucene).
"""
import hashlib
import io
import json
import os
import re
import zlib
from collections import Counter
from contextlib import AbstractContextManager, suppress
from copy import deepcopy
from functools import lru_cache
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np

from plumbing.files import locked, write_text
from plumbing.tokenfiles import mapped

FORMAT = 3
AGAIN = "remove the folder and index the documents again"
OURS = re.compile(r"(chunks-\d+\.jsonl|starts-\d+\.u64|vectors-\d+\.f32|terms-\d+-\d+-\d+\.npz"
                  r"|manifest\.json\.tmp)")  # removed if not named; other files are a user's
EMPTY: dict = {"format": FORMAT, "generation": 0, "chunks": 0, "files": {}, "documents": {},
               "dead": [], "segments": [], "embed": None, "folders": [], "refused": [],
               "stamps": {}}


@lru_cache(1 << 18)
def term_key(term: str) -> int:
    """A term as a 64-bit number, so that no dictionary need be kept. Among a billion terms the
    chance that two share a number is 3 %."""
    return int.from_bytes(hashlib.blake2b(term.encode(), digest_size=8).digest(), "little")


class Segment(NamedTuple):
    """Postings of the chunks first … first + len(lengths) - 1."""
    first: int
    lengths: np.ndarray  # (chunks,) int32: terms in each
    keys: np.ndarray  # (terms,) uint64, ascending
    starts: np.ndarray  # (terms + 1,) int64: where the postings of each begin
    chunks: np.ndarray  # (postings,) int32, ascending within a term
    counts: np.ndarray  # (postings,) uint16: how often the term is in the chunk

    def find(self, term: str) -> slice:
        """Where the postings of a term lie in `chunks` and `counts`."""
        key = np.uint64(term_key(term))
        begin, end = (np.searchsorted(self.keys, key, side) for side in ("left", "right"))
        return slice(int(self.starts[begin]), int(self.starts[end]))


def make_segment(first: int, texts: list[list[str]]) -> Segment:
    """From the terms of each chunk."""
    counted = [Counter(map(term_key, words)) for words in texts]
    keys = np.fromiter((k for c in counted for k in c), np.uint64)
    counts = np.fromiter((min(n, 65535) for c in counted for n in c.values()), np.uint16)
    chunks = np.repeat(np.arange(first, first + len(texts), dtype=np.int32), [*map(len, counted)])
    lengths = np.array([len(words) for words in texts], np.int32)
    return _sorted(first, lengths, keys, chunks, counts)


def merge_segments(a: Segment, b: Segment) -> Segment:
    """Two neighbours as one segment."""
    keys = np.concatenate([np.repeat(s.keys, np.diff(s.starts)) for s in (a, b)])
    return _sorted(a.first, np.concatenate((a.lengths, b.lengths)), keys,
                   np.concatenate((a.chunks, b.chunks)), np.concatenate((a.counts, b.counts)))


def _sorted(first: int, lengths: np.ndarray, keys: np.ndarray, chunks: np.ndarray,
            counts: np.ndarray) -> Segment:
    order = np.argsort(keys, kind="stable")  # chunks are ascending and stay so within a key
    keys, new = np.unique(keys[order], return_index=True)
    return Segment(first, lengths, keys, np.append(new, len(order)), chunks[order], counts[order])


def read_manifest(path: Path, raw: bytes) -> dict:
    """Raises ValueError for one that is damaged, of another format, or of another program."""
    if raw.lstrip()[:1] == b"{":
        raise ValueError(f"{path}: of another program: give another folder as --index")
    try:
        digest, manifest = json.loads(raw)
        if digest != sha256_of(manifest):
            raise ValueError("does not match its checksum")
        known = manifest["format"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{path}: damaged: {error}; {AGAIN}") from None
    if known != FORMAT:
        raise ValueError(f"{path}: format {known}, this program reads {FORMAT}; {AGAIN}")
    return manifest


def sha256_of(manifest: dict) -> str:
    return hashlib.sha256(json.dumps(manifest, ensure_ascii=False).encode()).hexdigest()


class Files(AbstractContextManager):
    """A folder, its manifest and its segments. One process writes at a time, any number read, each
    what was valid when it opened. Raises ValueError for damage, by the name of the file."""

    def __init__(self, folder: str, writable: bool):
        self.folder = Path(folder)
        self.lock: IO | None = None
        self.manifest: dict = deepcopy(EMPTY)
        self.segments: list[Segment] = []
        if writable:
            try:
                self.lock = locked(self.folder, "process")
            except FileExistsError:
                raise ValueError(f"{self.folder} is a file, and must be a folder") from None
        try:
            self._open(writable)
        except BaseException:
            self.close()
            raise

    def __exit__(self, *error) -> None:
        if self.lock:
            self.lock.close()
        self.lock = None

    close = __exit__

    def _path(self, name: str, suffix: str) -> Path:
        return self.folder / f"{name}-{self.manifest['generation']}{suffix}"

    def _open(self, writable: bool) -> None:
        path, raw = self.folder / "manifest.json", None
        while path.exists() and path.read_bytes() != raw:
            raw = path.read_bytes()
            try:
                self.manifest, self.segments = deepcopy(EMPTY) | read_manifest(path, raw), []
                self._check_files()
                for name in self.manifest["segments"]:
                    with np.load(self.folder / name) as arrays:
                        self.segments.append(Segment(**arrays))
                break
            except ValueError:
                if path.read_bytes() == raw:  # else a commit has just replaced files: again
                    raise
        if raw is None and not writable:
            raise ValueError(f"{self.folder}: no index here; make one with: "
                             f"python rag.py add FOLDER --index={self.folder}")
        if writable:
            self._sweep(self.manifest)

    def _check_files(self) -> None:
        for name, (size, crc) in self.manifest["files"].items():
            path = self.folder / name
            there = path.stat().st_size if path.exists() else -1
            if there < size:
                raise ValueError(f"{path}: {there:,} bytes where the manifest says {size:,}; "
                                 f"{AGAIN}")
            if zlib.crc32(mapped(str(path), np.dtype("u1"))[:size].data) != crc:
                raise ValueError(f"{path}: damaged: does not match its checksum; {AGAIN}")

    def _sweep(self, manifest: dict) -> None:
        """Remove what the manifest does not name: the traces of a commit that did not happen, and
        what the last one replaced."""
        for path in self.folder.iterdir():
            size, _ = manifest["files"].get(path.name, (None, 0))
            if size is not None and path.stat().st_size > size:
                os.truncate(path, size)
            elif size is None and OURS.fullmatch(path.name):
                with suppress(PermissionError):  # of Windows, while a reader has it open
                    path.unlink()

    def _roll_back(self) -> None:
        """Give back the room of a commit that did not happen."""
        path = self.folder / "manifest.json"
        self._sweep(read_manifest(path, path.read_bytes()) if path.exists() else EMPTY)

    def _append(self, path: Path, data: bytes) -> None:
        """Add bytes at the valid end of a file."""
        end, crc = self.manifest["files"].get(path.name, (0, 0))
        with open(path, "r+b" if path.exists() else "w+b") as f:
            f.seek(end)
            f.write(data)
            f.truncate()  # what a commit that did not happen has left
            f.flush()
            os.fsync(f.fileno())
        self.manifest["files"][path.name] = [end + len(data), zlib.crc32(data, crc)]

    def _add_segment(self, segment: Segment) -> None:
        """After the others. Neighbours of similar size become one, so that there are few."""
        names = self.manifest["segments"]
        while self.segments and len(self.segments[-1].chunks) < 2 * len(segment.chunks):
            segment = merge_segments(self.segments.pop(), segment)
            del self.manifest["files"][names.pop()]
        packed = io.BytesIO()
        np.savez(packed, **segment._asdict())
        path = self._path("terms", f"-{segment.first}-{len(segment.lengths)}.npz")
        self._append(path, packed.getvalue())
        self.segments.append(segment)
        names.append(path.name)

    def _replace_manifest(self) -> None:
        write_text(self.folder / "manifest.json", json.dumps(
            [sha256_of(self.manifest), self.manifest], ensure_ascii=False))
        self._sweep(self.manifest)

"""
Files of an index that are whole or as they were before: what lies in a folder counts only as far
as its manifest says.

    manifest.json         what is valid, beside its own sha256: of each file how many bytes, with
                          their CRC-32; of each segment its sha256; and what the owner adds
    NAME-G.suffix         files that are only appended to; G grows when all are written anew
    terms-G-FIRST.npz     segments, each written once

A commit appends, flushes and then replaces manifest.json: a crash at any moment leaves the old
state or the new one, and what lies behind the end that the manifest names is cut off.
"""
import hashlib
import json
import os
import re
import zlib
from contextlib import suppress
from copy import deepcopy
from pathlib import Path

import numpy as np

from search.postings import ARRAYS, Segment

AGAIN = "remove the folder and index the documents again"
SUFFIX = {"chunks": ".jsonl", "starts": ".u64", "vectors": ".f32"}
OURS = re.compile(r"(chunks-\d+\.jsonl|starts-\d+\.u64|vectors-\d+\.f32|terms-\d+-\d+-\d+\.npz"
                  r"|manifest\.json\.tmp)")  # removed if not named; other files are a user's
EMPTY: dict = {"format": 2, "generation": 0, "chunks": 0, "files": {}, "documents": {}, "dead": [],
               "segments": [], "embed": None}


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
    if known != 2:
        raise ValueError(f"{path}: format {known}, this program reads 2; {AGAIN}")
    return manifest


def sha256_of(manifest: dict) -> str:
    return hashlib.sha256(json.dumps(manifest, ensure_ascii=False).encode()).hexdigest()


def crc32_of(path: Path, size: int) -> int:
    """CRC-32 of the first `size` bytes: unlike a sha256 it goes on where bytes are appended."""
    crc = 0
    with open(path, "rb") as f:
        for at in range(0, size, 1 << 20):
            crc = zlib.crc32(f.read(min(1 << 20, size - at)), crc)
    return crc


class Files:
    """A folder, its manifest and its segments. One process writes at a time, any number read; a
    reader has what was valid when it opened. Raises ValueError for a folder without a manifest, and
    for damage, by the name of the file."""

    def __init__(self, folder: str, writable: bool):
        self.folder, self.lock = Path(folder), None
        self.manifest: dict = deepcopy(EMPTY)
        self.segments: list[Segment] = []
        if writable:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock()
        try:
            self._open(writable)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        if self.lock:
            self.lock.close()
        self.lock = None

    def _lock(self) -> None:
        self.lock = open(self.folder / ".lock", "w")
        with suppress(ImportError):  # not on Windows: there, do not write from two processes
            import fcntl
            try:
                fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                self.close()
                raise ValueError(f"{self.folder}: another process is writing to it") from None

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}-{self.manifest['generation']}{SUFFIX[name]}"

    def _open(self, writable: bool) -> None:
        path, raw = self.folder / "manifest.json", None
        while path.exists() and path.read_bytes() != raw:
            raw = path.read_bytes()
            try:
                self.manifest = read_manifest(path, raw)
                self._check_files()
                self.segments = [self._read_segment(*s) for s in self.manifest["segments"]]
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
            path = self._path(name)
            there = path.stat().st_size if path.exists() else -1
            if there < size:
                raise ValueError(f"{path}: {there:,} bytes where the manifest says {size:,}; "
                                 f"{AGAIN}")
            if crc32_of(path, size) != crc:
                raise ValueError(f"{path}: damaged; {AGAIN}")

    def _sweep(self, manifest: dict) -> None:
        """Cut off and remove what the manifest does not name: left by a commit that did not
        happen, or replaced by the one that did."""
        ends = {f"{name}-{manifest['generation']}{SUFFIX[name]}": size
                for name, (size, _) in manifest["files"].items()}
        segments = {name for name, _ in manifest["segments"]}
        for path in self.folder.iterdir():
            if path.name in ends:
                if path.stat().st_size > ends[path.name]:
                    os.truncate(path, ends[path.name])
            elif OURS.fullmatch(path.name) and path.name not in segments:
                path.unlink()

    def _roll_back(self) -> None:
        """Give back the room of a commit that did not happen."""
        path = self.folder / "manifest.json"
        self._sweep(read_manifest(path, path.read_bytes()) if path.exists() else EMPTY)

    def _read_segment(self, name: str, sha: str) -> Segment:
        path = self.folder / name
        try:
            with open(path, "rb") as f:
                if hashlib.file_digest(f, "sha256").hexdigest() != sha:
                    raise ValueError("does not match its checksum")
            with np.load(path, allow_pickle=False) as arrays:
                return Segment(int(arrays["first"]), *(arrays[key] for key in ARRAYS))
        except (OSError, ValueError, KeyError) as error:
            raise ValueError(f"{path}: {error}; {AGAIN}") from None

    def _append(self, name: str, data: bytes) -> None:
        """Add bytes behind the valid end of a file, safely on the disk."""
        path, (end, crc) = self._path(name), self.manifest["files"].get(name, (0, 0))
        with open(path, "r+b" if path.exists() else "w+b") as f:
            f.truncate(end)
            f.seek(end)
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
        self.manifest["files"][name] = [end + len(data), zlib.crc32(data, crc)]

    def _write_segment(self, segment: Segment) -> list[str]:
        """[name, sha256]; the name is new, so no valid file is touched."""
        number = 0
        while (path := self.folder / (f"terms-{self.manifest['generation']}-{segment.first}"
                                      f"-{number}.npz")).exists():
            number += 1
        with open(path, "w+b") as f:
            np.savez(f, first=segment.first, **{key: getattr(segment, key) for key in ARRAYS})
            f.flush()
            os.fsync(f.fileno())
            f.seek(0)
            return [path.name, hashlib.file_digest(f, "sha256").hexdigest()]

    def _replace_manifest(self) -> None:
        temporary = self.folder / "manifest.json.tmp"
        with open(temporary, "wb") as f:
            f.write(json.dumps([sha256_of(self.manifest), self.manifest],
                               ensure_ascii=False).encode())
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, self.folder / "manifest.json")
        if os.name == "posix":  # elsewhere a folder cannot be opened
            fd = os.open(self.folder, os.O_RDONLY)
            os.fsync(fd)
            os.close(fd)
        self._sweep(self.manifest)

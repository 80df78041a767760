"""
Makes a folder of files out of text, with several processes; data.py and plumbing/examples.py say
what a worker makes of a batch of lines, and the rest may be skipped.

Last comes meta.json, which says what the files are made of. A folder without it is unfinished: a
run that was stopped anywhere, by a signal or a crash, is given again and starts again.
"""
import hashlib
import json
import os
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import numpy as np

from plumbing.corpus import read_batches
from plumbing.files import write_text
from plumbing.jobs import Progress, parallel
from plumbing.jsonl import BadLine, BadLines, Batch
from tokenizer import Tokenizer

# What a worker makes of a batch: bytes to add to each file, how often what was met (every document
# or record as "good"), the bad lines, and the share of all input that is read by then.
Made = tuple[dict[str, bytes], Counter[str], list[BadLine], float]


def read_meta(folder: str) -> dict | None:
    """What the meta.json of a folder says; None without it. Raises ValueError if damaged."""
    path = os.path.join(folder, "meta.json")
    try:
        with open(path, encoding="utf-8") as f:
            found = json.load(f)
        found["job"], found["files"]
        return found
    except OSError:
        return None
    except (ValueError, TypeError, KeyError):
        raise ValueError(f"{path}: not from data.py, or damaged; delete its folder") from None


def mapped(path: str, dtype: np.dtype, start: int = 0) -> np.ndarray:
    """The numbers in a file from byte `start` on, read from disk as they are used."""
    empty = os.path.getsize(path) <= start  # which cannot be mapped
    return np.zeros(0, dtype) if empty else np.memmap(path, dtype, "r", start)


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

    def fill(self, work: Callable[[Batch], Made], workers: int, on_bad_line: str,
             progress: Progress, start: int = 0) -> Counter[str]:
        """Add what `work` makes of each batch, after `start` bytes that are left free; what was met
        in all of them. Raises ValueError or OSError for what a user can mend."""
        os.makedirs(self.path, exist_ok=True)
        Path(self.path, "meta.json").unlink(missing_ok=True)
        write_text(os.path.join(self.path, "tokenizer.txt"), self.tok.text)
        counts, bad_lines, begun = Counter(), BadLines(on_bad_line, progress), time.time()
        try:
            for parts, met, bad, share in parallel(work, read_batches(self.inputs), workers):
                bad_lines.add(bad)
                counts += met
                for name, raw in parts.items():
                    if name not in self.files:
                        path = Path(self.path, name)
                        path.unlink(missing_ok=True)  # another run may have the old file mapped
                        self.files[name] = open(path, "w+b")
                        self.files[name].seek(start)
                    self.files[name].write(raw)
                left = (1 - share) / max(share, 1e-9) * (time.time() - begun)
                progress.show(f"{share:6.1%} | {counts['good']:,} read | eta {left:,.0f} s")
        finally:
            progress.end()
        bad_lines.finish(counts["good"])
        if describe(self.inputs) != self.job["inputs"]:
            raise ValueError(f"{', '.join(self.inputs)}: changed while it was read; give the "
                             "command again")
        return counts

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

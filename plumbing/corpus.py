"""
Text files as documents: .txt and .jsonl (also .gz) and .parquet, single files or folders; how they
are read may be skipped.

    for batch in read_batches(find_files("notes,web.jsonl.gz")):     # a few MB each, in order
        for item in parse(batch):                                    # Document or BadLine

Reading is sequential and parsing is not, so that workers can share the work while the order of
documents, and with it everything built from them, stays the same for any number of workers.
A JSONL line is an object with a string field "text" and, if known, "lang" ("en", "zh", …);
without it the language is zh or en by its share of Han letters. A .txt file is cut at line ends
into documents of 8 to 16 kB.
"""
import gzip
import os
import re
import sys
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import count
from random import Random
from typing import Any

from plumbing import jsonl
from plumbing.chats import said_in
from plumbing.files import Found, find, split_paths
from plumbing.jsonl import BadLine, Batch, LineError
from plumbing.terminal import printable

SUFFIXES = (".txt", ".txt.gz", ".jsonl", ".jsonl.gz", ".parquet")
BATCH_BYTES = 4 << 20  # raw bytes handed to a worker at once
TXT_BYTES = 8 << 10  # a .txt file is cut at the first line end after so many bytes
LANG = re.compile(r"[a-z]{2,3}(-[a-z0-9]{2,8})?")
HAN = re.compile("[\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]")


@dataclass
class Document:
    text: str
    lang: str


# ---------------------------------------------------------------------------- reading

def find_files(paths: str) -> list[str]:
    """The text files of a comma-separated list of files and folders, in a fixed order; what is
    passed over in a folder is named on stderr. Raises ValueError for a path without any."""
    found: list[Found] = []
    kinds = ", ".join(SUFFIXES)
    for path in split_paths(paths):
        if path.startswith("out/toyworld/") and not os.path.exists(path):
            raise ValueError(f"{path}: no such file or folder; make it with: python -m demo.world")
        inside = find(path, lambda name: "" if kind_of(name) else f"not one of {kinds}")
        if all(one.why for one in inside):
            why = f"no {kinds} file in this folder" if os.path.isdir(path) else inside[0].why
            why += f"; {jsonl.TO_LINES}" if path.endswith(".json") else ""
            raise ValueError(f"{printable(path)}: {why}")
        found += inside
    if not found:
        raise ValueError(f"{paths!r} names no file or folder")
    once: dict[str, str] = {}
    for one in found:
        if one.why:
            print(one, file=sys.stderr)
        else:
            once.setdefault(os.path.realpath(one.path), one.path)
    return list(once.values())


def kind_of(path: str) -> str:
    """Of the SUFFIXES, without .gz, the one that a file has; "" for another file."""
    suffix = next((s for s in SUFFIXES if path.lower().endswith(s)), "")
    return suffix.removesuffix(".gz")


def read_batches(files: list[str]) -> Iterator[Batch]:
    """The files' raw contents in batches of about BATCH_BYTES, in constant memory.
    Raises ValueError naming the file when one cannot be read to its end."""
    sizes = [os.path.getsize(path) for path in files]
    before, total = 0, max(sum(sizes), 1)
    for path, size in zip(files, sizes):
        read = _read_parquet if kind_of(path) == ".parquet" else _read_text
        try:
            for batch, position in read(path):  # in the file, so compressed bytes of a .gz
                batch.share = (before + position) / total
                yield batch
        except (OSError, EOFError, zlib.error) as error:
            reason = getattr(error, "strerror", None) or error
            raise ValueError(f"{path}: cannot be read to its end: {reason}") from None
        before += size


def sampled(batches: Iterator[Batch], every: int) -> Iterator[Batch]:
    """About one line in `every`, drawn at random, and the first of each file: so every file and
    every language has its share."""
    draw, path = Random(0), ""
    for batch in batches:
        batch.items = [item for i, item in enumerate(batch.items)
                       if draw.random() * every < 1 or i == 0 and batch.path != path]
        path = batch.path
        yield batch


def _read_text(path: str) -> Iterator[tuple[Batch, int]]:
    with open(path, "rb") as raw:
        f = gzip.open(raw) if path.lower().endswith(".gz") else raw
        batch = Batch(path, [])
        for number, item, size in _pieces(f) if kind_of(path) == ".txt" else _lines(f):
            batch.items.append((number, item))
            batch.n_bytes += size
            if batch.n_bytes >= BATCH_BYTES:
                yield batch, raw.tell()
                batch = Batch(path, [])
        if batch.items:
            yield batch, raw.tell()


def _lines(f: Any) -> Iterator[tuple[int, bytes | None, int]]:
    """Each line with its number and size; None for one longer than MAX_LINE."""
    for number in count(1):
        raw = f.readline(jsonl.MAX_LINE + 1)
        if not raw:
            return
        size = len(raw)
        if size <= jsonl.MAX_LINE:
            yield number, raw, size
            continue
        while not raw.endswith(b"\n") and (raw := f.readline(1 << 20)):
            size += len(raw)
        yield number, None, size


def _pieces(f: Any) -> Iterator[tuple[int, bytes, int]]:
    """Pieces of a .txt file with the line each starts at and its size: up to the first line end
    between 1 and 2 TXT_BYTES, or 2 TXT_BYTES of whole characters where none is."""
    line, rest = 1, f.read(1 << 20).removeprefix(jsonl.BOM)
    while rest:
        block, at = f.read(1 << 20), 0
        while len(rest) - at > (2 * TXT_BYTES if block else 0):
            end = rest.find(b"\n", at + TXT_BYTES - 1, at + 2 * TXT_BYTES) + 1
            if not end and (end := min(at + 2 * TXT_BYTES, len(rest))) < len(rest):
                end -= next((n for n in range(4) if rest[end - n] & 0xC0 != 0x80), 0)
            yield line, rest[at:end], end - at
            line, at = line + rest.count(b"\n", at, end), end
        rest = rest[at:] + block


def _read_parquet(path: str) -> Iterator[tuple[Batch, int]]:
    try:
        import pyarrow.parquet
    except ImportError:
        raise ValueError(f"{path}: parquet files need the extra: pip install pyarrow") from None
    try:
        table, row, size = pyarrow.parquet.ParquetFile(path), 1, os.path.getsize(path)
        types = {field.name: field.type for field in table.schema_arrow}
        if "text" not in types:
            raise ValueError(f"{path}: no column 'text', there are {', '.join(types)}")
        names = ["text"] + ["lang"] * ("lang" in types)
        for name in names:
            if types[name] not in (pyarrow.string(), pyarrow.large_string()):
                raise ValueError(f"{path}: column '{name}' must be of strings, is {types[name]}")
        for part in table.iter_batches(1024, columns=names, use_threads=False):  # workers do that
            texts = part.column("text").cast(pyarrow.large_binary()).to_pylist()
            langs = part.column("lang").to_pylist() if len(names) > 1 else [None] * len(texts)
            batch = Batch(path, list(enumerate(zip(texts, langs), row)), part.nbytes)
            row += len(texts)
            yield batch, size * (row - 1) // table.metadata.num_rows
    except pyarrow.ArrowException as error:
        raise ValueError(f"{path}: not a readable parquet file: {error}") from None


# ---------------------------------------------------------------------------- parsing

def parse(batch: Batch, chats: bool = False) -> Iterator[Document | BadLine]:
    """The documents of a batch, and a BadLine for everything that is none. Empty lines are no
    documents. With `chats`, a line may hold a chat or a pair instead of a text."""
    if kind_of(batch.path) == ".jsonl":
        yield from jsonl.parse_records(batch, partial(read_document, chats=chats))
        return
    parquet = kind_of(batch.path) == ".parquet"
    for number, item in batch.items:
        raw, lang = item if parquet else (item, None)
        try:
            text = "" if raw is None else jsonl.decode(raw)
            if parquet or text.strip():
                yield read_document({"text": text, "lang": lang})
        except LineError as error:
            where, what, detail, *below = error.args
            number += 0 if parquet else sum(below)  # of a parquet file it is the row
            column = where if isinstance(where, int) else 1
            yield BadLine(f"{batch.path}:{number}:{column}", what, detail)


def read_document(record: dict, chats: bool = False) -> Document:
    """The text of a record and its language. Raises LineError."""
    text, lang = record.get("text"), record.get("lang")
    if text is None and (not chats or (text := said_in(record)) is None):
        raise LineError("text", "field missing", "'text'" + " or a chat" * chats)
    if not isinstance(text, str):
        raise LineError("text", "field of a wrong type",
                         f"'text' must be a string, is {type(text).__name__}")
    if not jsonl.check_text(text, "text").strip():
        raise LineError("text", "empty text", "")
    if lang is not None and not (isinstance(lang, str) and LANG.fullmatch(lang)):
        raise LineError("lang", "unknown language", f"{lang!r:.40}, wanted like 'en'")
    return Document(text, lang or language(text))


def language(text: str) -> str:
    """zh if at least 30 % of the first 4,000 letters are Han, else en."""
    head = text[:4000]
    letters = sum(map(str.isalpha, head))
    return "zh" if len(HAN.findall(head)) >= 0.3 * max(letters, 1) else "en"

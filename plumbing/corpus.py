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
from random import Random
from typing import Any

from plumbing import jsonl
from plumbing.chats import said_in
from plumbing.files import Found, find, split_paths
from plumbing.jsonl import SUFFIXES, BadLine, Batch, LineError, kind_of, parse_records
from plumbing.terminal import printable

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


def read_batches(files: list[str]) -> Iterator[Batch]:
    """The files' raw contents in batches of about BATCH_BYTES, in constant memory.
    Raises ValueError naming the file when one cannot be read to its end."""
    sizes = [os.path.getsize(path) for path in files]
    before, total = 0, max(sum(sizes), 1)
    for path, size in zip(files, sizes):
        read = _read_parquet if kind_of(path) == ".parquet" else _read_text
        try:
            for items, position in read(path):  # in the file, so compressed bytes of a .gz
                yield Batch(path, items, (before + position) / total)
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


def _read_text(path: str) -> Iterator[tuple[list, int]]:
    with open(path, "rb") as raw:
        f = gzip.open(raw) if path.lower().endswith(".gz") else raw
        items: list[tuple[int, bytes | None]] = []
        size = 0
        for item in _pieces(f) if kind_of(path) == ".txt" else _lines(f):
            items.append(item)
            size += len(item[1] or b"") + 1
            if size >= BATCH_BYTES:
                yield items, raw.tell()
                items, size = [], 0
        if items:
            yield items, raw.tell()


def _lines(f: Any) -> Iterator[tuple[int, bytes | None]]:
    """Each line with its number; None for one longer than MAX_LINE."""
    for number, raw in enumerate(iter(partial(f.readline, jsonl.MAX_LINE + 1), b""), 1):
        too_long = len(raw) > jsonl.MAX_LINE
        while too_long and raw and not raw.endswith(b"\n"):
            raw = f.readline(1 << 20)
        yield number, None if too_long else raw.removeprefix(jsonl.BOM).rstrip(b"\r\n")


def _pieces(f: Any) -> Iterator[tuple[int, bytes]]:
    """Pieces of a .txt file with the line each starts at: up to the first line end between 1 and 2
    TXT_BYTES, or 2 TXT_BYTES of whole characters where none is."""
    line, rest = 1, f.read(1 << 20).removeprefix(jsonl.BOM)
    while rest:
        block, at = f.read(1 << 20), 0
        while len(rest) - at > (2 * TXT_BYTES if block else 0):
            end = rest.find(b"\n", at + TXT_BYTES - 1, at + 2 * TXT_BYTES) + 1
            if not end and (end := min(at + 2 * TXT_BYTES, len(rest))) < len(rest):
                end -= next((n for n in range(4) if rest[end - n] & 0xC0 != 0x80), 0)
            yield line, rest[at:end]
            line, at = line + rest.count(b"\n", at, end), end
        rest = rest[at:] + block


def _read_parquet(path: str) -> Iterator[tuple[list, int]]:
    try:
        import pyarrow.parquet
    except ImportError:
        raise ValueError(f"{path}: parquet files need the extra: pip install pyarrow") from None
    try:
        table, n, size = pyarrow.parquet.ParquetFile(path), 0, os.path.getsize(path)
        types = {field.name: field.type for field in table.schema_arrow}
        if "text" not in types:
            raise ValueError(f"{path}: no column 'text', there are {', '.join(types)}")
        names = ["text"] + ["lang"] * ("lang" in types)
        for name in names:
            if types[name] not in (pyarrow.string(), pyarrow.large_string()):
                raise ValueError(f"{path}: column '{name}' must be of strings, is {types[name]}")
        types["text"] = pyarrow.large_binary()  # which may not be UTF-8
        schema = pyarrow.schema([(name, types[name]) for name in names])
        for part in table.iter_batches(1024, columns=names, use_threads=False):  # workers do that
            rows = part.select(names).cast(schema).to_pylist()
            n += len(rows)
            yield list(enumerate(rows, n + 1 - len(rows))), size * n // table.metadata.num_rows
    except pyarrow.ArrowException as error:
        raise ValueError(f"{path}: not a readable parquet file: {error}") from None


# ---------------------------------------------------------------------------- parsing

def parse(batch: Batch, chats: bool = False) -> Iterator[Document | BadLine]:
    """The documents of a batch, and a BadLine for everything that is none. Empty lines are no
    documents. With `chats`, a line may hold a chat or a pair instead of a text."""
    return parse_records(batch, partial(read_document, chats=chats), SUFFIXES)


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

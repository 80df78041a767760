"""
Text files as documents, or as records of chats: .txt and .jsonl (also .gz) and .parquet, single
files or folders; how they are read may be skipped.

    for batch in read_batches(find_files("notes,web.jsonl.gz")):     # a few MB each, in order
        for item in parse(batch):                                    # Document or BadLine

Reading is sequential and parsing is not, so that workers can share the work while the order of
documents, and with it everything built from them, stays the same for any number of workers.
A JSONL line is an object with a string field "text" and, if known, "lang" ("en", "zh", …);
without it the language is zh or en by its share of Han letters. A .txt file is cut at line ends
into documents of 8 to 16 kB. Nothing is repaired or guessed: a BadLine says what is wrong as
file:line:column, from 1, columns in characters. A field that is null counts as missing.
"""
import gzip
import json
import os
import re
import sys
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from random import Random
from typing import Any, NamedTuple, NoReturn

from plumbing.files import find, split_paths
from plumbing.jobs import Progress, parallel
from plumbing.terminal import printable

SUFFIXES = (".txt", ".txt.gz", ".jsonl", ".jsonl.gz", ".parquet")
BATCH_BYTES = 4 << 20  # raw bytes handed to a worker at once
TXT_BYTES = 8 << 10  # a .txt file is cut at the first line end after so many bytes
MAX_LINE = 16 << 20  # bytes; a longer line is a bad one
MAX_BAD = 0.01  # of the lines; more bad ones are no accident
BOM = b"\xef\xbb\xbf"
LANG = re.compile(r"[a-z]{2,3}(-[a-z0-9]{2,8})?")
HAN = re.compile("[\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]")
KEY = re.compile(r'[\s,]*("(?:[^"\\]|\\.)*")\s*:\s*')  # of an object, up to its value
TO_LINES = ("make lines of a list: python -c 'import json, sys; [print(json.dumps(x)) for x in "
            "json.load(sys.stdin)]' < LIST.json > LINES.jsonl")


class Batch(NamedTuple):
    path: str
    items: list[tuple[int, Any]]  # (line, its bytes); of a parquet file (row, record)
    share: float  # of all input that is read by the end of this batch


class Document(NamedTuple):
    text: str
    lang: str


class BadLine(NamedTuple):
    where: str  # file:line:column
    what: str  # what is wrong, the same words for the same kind of damage
    detail: str = ""

    def __str__(self) -> str:
        return printable(": ".join(filter(None, (self.where, self.what, self.detail))))


class LineError(Exception):
    """LineError(where, what, detail): a line is not as it should be, where the value of a field
    stands (or the object, if it has no such field), or at a column."""


# ---------------------------------------------------------------------------- files in batches

def kind_of(path: str) -> str:
    """Of the SUFFIXES, without .gz, the one that a file has; "" for another file."""
    suffix = next((s for s in SUFFIXES if path.lower().endswith(s)), "")
    return suffix.removesuffix(".gz")


def find_files(paths: str) -> list[str]:
    """The text files of a comma-separated list of files and folders, in a fixed order; what is
    passed over in a folder is named on stderr. Raises ValueError for a path without any."""
    found: dict[str, str] = {}  # by what the path is in truth: each file once
    kinds = ", ".join(SUFFIXES)
    for path in split_paths(paths):
        if path.startswith("out/toyworld/") and not os.path.exists(path):
            raise ValueError(f"{path}: no such file or folder; make it with: python -m demo.world")
        inside = find(path, lambda name: "" if kind_of(name) else f"not one of {kinds}")
        if all(one.why for one in inside):
            why = f"no {kinds} file in this folder" if os.path.isdir(path) else inside[0].why
            why += f"; {TO_LINES}" if path.endswith(".json") else ""
            raise ValueError(f"{printable(path)}: {why}")
        for one in inside:
            if one.why:
                print(one, file=sys.stderr)
            else:
                found.setdefault(os.path.realpath(one.path), one.path)
    if not found:
        raise ValueError(f"{paths!r} names no file or folder")
    return list(found.values())


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
    """About one line in `every`, at random, and the first of each file: each has its share."""
    draw, path = Random(0), ""
    for batch in batches:
        yield batch._replace(items=[
            item for i, item in enumerate(batch.items)
            if draw.random() * every < 1 or i == 0 and batch.path != path])
        path = batch.path


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
    for number, raw in enumerate(iter(partial(f.readline, MAX_LINE + 1), b""), 1):
        too_long = len(raw) > MAX_LINE
        while too_long and raw and not raw.endswith(b"\n"):
            raw = f.readline(1 << 20)
        yield number, None if too_long else raw.removeprefix(BOM).rstrip(b"\r\n")


def _pieces(f: Any) -> Iterator[tuple[int, bytes]]:
    """Pieces of a .txt file with the line each starts at: up to the first line end between 1 and 2
    TXT_BYTES, or 2 TXT_BYTES of whole characters where none is."""
    line, rest = 1, f.read(1 << 20).removeprefix(BOM)
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
        names = [name for name in ("text", "lang") if name in types]
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


# ---------------------------------------------------------------------------- records

def parse(batch: Batch, said_in: Callable[[dict], str | None] | None = None,
          ) -> Iterator[Document | BadLine]:
    """The documents of a batch, and a BadLine for everything that is none. Empty lines are no
    documents. `said_in` finds the text of a chat, which has no field "text"."""
    return parse_records(batch, partial(read_document, said_in=said_in), SUFFIXES)


def read_document(record: dict, said_in: Callable[[dict], str | None] | None) -> Document:
    """The text of a record and its language. Raises LineError."""
    text, lang = record.get("text"), record.get("lang")
    if text is None and (not said_in or (text := said_in(record)) is None):
        raise LineError("text", "field missing", "'text'" + " or a chat" * bool(said_in))
    if not isinstance(text, str):
        raise LineError("text", "field of a wrong type",
                         f"'text' must be a string, is {type(text).__name__}")
    if not check_text(text, "text").strip():
        raise LineError("text", "empty text", "")
    if lang is not None and not (isinstance(lang, str) and LANG.fullmatch(lang)):
        raise LineError("lang", "unknown language", f"{lang!r:.40}, wanted like 'en'")
    return Document(text, lang or language(text))


def language(text: str) -> str:
    """zh if at least 30 % of the first 4,000 letters are Han, else en."""
    head = text[:4000]
    letters = sum(map(str.isalpha, head))
    return "zh" if len(HAN.findall(head)) >= 0.3 * max(letters, 1) else "en"


def good_records(files: list[str], read: Callable[[dict], Any]) -> Iterator[Any]:
    """What `read` makes of the records of .jsonl files. Raises ValueError at the first bad one."""
    for batch in read_batches(files):
        for item in parse_records(batch, read):
            if isinstance(item, BadLine):
                raise ValueError(f"{item}")
            yield item


def parse_records(batch: Batch, read: Callable[[dict], Any], kinds: tuple[str, ...] = (".jsonl",),
                  ) -> Iterator[Any | BadLine]:
    """What `read` makes of each record of a batch, from a file of these kinds; a BadLine for what
    is no record, and for one of which `read` raises LineError. Empty lines are nothing."""
    if (kind := kind_of(batch.path)) not in kinds:
        raise ValueError(f"{batch.path}: not a .jsonl or .jsonl.gz file")
    for number, item in batch.items:
        line, row = "", item if kind == ".parquet" else {"text": item}
        try:
            if item is None:
                raise LineError(1, "line too long", f"more than {MAX_LINE >> 20} MB")
            record = row | {"text": decode(row["text"] or b"")}
            if kind != ".parquet" and not record["text"].strip():
                continue
            if kind == ".jsonl":
                line = record["text"]
                record = parse_object(line)
            yield read({name: value for name, value in record.items() if value is not None})
        except LineError as error:
            where, what, detail, *below = error.args
            column = where if isinstance(where, int) else column_of(line, where)
            number += sum(below) if kind == ".txt" else 0
            yield BadLine(f"{batch.path}:{number}:{column}", what, detail)


def decode(raw: bytes) -> str:
    """UTF-8 as text. Raises LineError, with the number of line ends before the damage. English in
    UTF-16 is UTF-8 too, with a NUL after each letter."""
    try:
        text, at = raw.decode(), raw.find(b"\0")
        if at < 0:
            return text
        what, detail = "a NUL byte", "binary, or UTF-16 without the mark that says so"
    except UnicodeDecodeError as error:
        at, what, detail = error.start, "not UTF-8", f"byte 0x{raw[error.start]:02x}"
    good = raw[:at].decode()
    raise LineError(len(good) - good.rfind("\n"), what, detail, good.count("\n")) from None


def parse_object(line: str) -> dict:
    """Raises LineError, also for what json would let pass."""
    try:
        record = _decoder.decode(line)
    except json.JSONDecodeError as error:
        a_list = f"; {TO_LINES}" if line.lstrip().startswith("[") else ""
        raise LineError(error.colno, "not JSON", error.msg + a_list) from None
    except RecursionError:
        raise LineError("", "nested too deeply", "") from None
    except ValueError:  # of int()
        raise LineError("", "number too long", "more than 4,300 digits") from None
    if not isinstance(record, dict):
        raise LineError("", "not an object", TO_LINES if isinstance(record, list) else
                        f"but {type(record).__name__}")
    return record


def column_of(line: str, field: str) -> int:
    """Where the value of a field of an object stands; the object, if it has no such field."""
    at = line.find("{") + 1
    while field and (key := KEY.match(line, at)):
        if json.loads(key[1]) == field:
            return key.end() + 1
        _, at = _decoder.raw_decode(line, key.end())
    return len(line) - len(line.lstrip()) + 1


def check_text(text: str, field: str) -> str:
    """Raises LineError for half a character (JSON can say \\ud800), which has no UTF-8."""
    try:
        text.encode()
        return text
    except UnicodeEncodeError as error:
        raise LineError(field, "lone surrogate", ascii(text[error.start])) from None


def _constant(name: str) -> NoReturn:
    raise LineError("", "NaN or Infinity", f"{name} is no JSON")


def _object(pairs: list) -> dict:
    if len(record := dict(pairs)) < len(pairs):  # json would keep the last value and say nothing
        twice, _ = Counter(key for key, _ in pairs).most_common(1)[0]
        raise LineError("", "key given twice", f"{twice!r:.40}")
    return record


_decoder = json.JSONDecoder(object_pairs_hook=_object, parse_constant=_constant)


# ---------------------------------------------------------------------------- by several processes

def made_by_workers(batches: Iterator[Batch], read: Callable[[Batch], Iterator],
                    make: Callable[[list], Any], workers: int, on_bad_line: str,
                    progress: Progress) -> Iterator[tuple[int, Any]]:
    """How many good items `read` finds in each batch, and what `make` makes of them. Raises
    ValueError at the first bad line, or with "skip" if too many were bad to be chance."""
    n, kinds, begun = 0, Counter(), time.time()
    try:
        for good, bad, made, share in parallel(partial(work, read=read, make=make), batches,
                                               workers):
            for one in bad:
                if on_bad_line == "stop":
                    raise ValueError(f"{one} (--on_bad_line=skip passes over such lines)")
                if kinds.total() < 5:
                    progress.end()
                    print(f"skipped {one}")
                kinds[one.what] += 1
            n += good
            yield good, made
            left = (1 - share) / max(share, 1e-9) * (time.time() - begun)
            progress.show(f"{share:6.1%} | {n:,} read | eta {left:,.0f} s")
    finally:
        progress.end()
    if n_bad := kinds.total():
        found = ", ".join(f"{kind} {count:,}" for kind, count in kinds.most_common())
        print(f"bad lines skipped: {n_bad:,} ({found})")
    if n_bad > MAX_BAD * (n_bad + n):
        raise ValueError(f"{n_bad:,} of {n_bad + n:,} lines are bad, more than {MAX_BAD:.0%}: "
                         "mend them, or take them out of the file")


def work(batch: Batch, read: Callable[[Batch], Iterator], make: Callable[[list], Any],
         ) -> tuple[int, list[BadLine], Any, float]:
    """A worker's share of `made_by_workers`."""
    items = list(read(batch))
    good = [item for item in items if not isinstance(item, BadLine)]
    return len(good), [one for one in items if isinstance(one, BadLine)], make(good), batch.share

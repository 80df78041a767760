"""
Text files as documents: .txt and .jsonl (also .gz) and .parquet, single files or folders.

    for batch in read_batches(find_files("notes,web.jsonl.gz")):     # a few MB each, in order
        for item in parse(batch):                                    # Document or BadLine

Reading is sequential and parsing is not, so that workers can share the work while the order of
documents, and with it everything built from them, stays the same for any number of workers.
A JSONL line is an object with a string field "text" and, if known, "lang" ("en", "zh", …);
without it the language is zh or en by its share of Han letters. A .txt file is cut at line ends
into documents of 8 to 16 kB. Nothing is repaired or guessed: what is wrong with a line is said as
file:line:column, both from 1, the column in characters.
"""
import gzip
import json
import os
import re
import signal
import sys
import time
import zlib
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import parent_process
from threading import Thread
from typing import Any, TextIO

SUFFIXES = (".txt", ".txt.gz", ".jsonl", ".jsonl.gz", ".parquet")
BATCH_BYTES = 4 << 20  # raw bytes handed to a worker at once
TXT_BYTES = 8 << 10  # a .txt file is cut at the first line end behind so many bytes
MAX_DEPTH = 100  # of brackets in a JSONL line; json itself gives up at a depth that varies
BOM = b"\xef\xbb\xbf"
LANG = re.compile(r"[a-z]{2,3}(-[a-z0-9]{2,8})?")
HAN = re.compile("[\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]")


@dataclass
class Document:
    text: str
    lang: str


@dataclass
class BadLine:
    where: str  # file:line:column
    what: str  # what is wrong, the same words for the same kind of damage
    detail: str = ""


@dataclass
class Batch:
    path: str
    first: int  # line (JSONL) or row (parquet) of items[0]; the numbers run on from it
    items: list  # JSONL lines; (line, bytes) pieces of a .txt file; (bytes, lang) parquet rows
    n_bytes: int  # of text, with the JSON around it
    share: float = 0.0  # of all input that is read by the end of this batch


# ---------------------------------------------------------------------------- reading

def find_files(paths: str) -> list[str]:
    """Files behind a comma-separated list of files and folders, in a fixed order.
    Raises ValueError for a path that is not there or holds nothing readable."""
    found: list[str] = []

    def refuse(error: OSError) -> None:
        raise ValueError(f"{error.filename}: {error.strerror}")

    for path in filter(None, (p.strip() for p in paths.split(","))):
        if os.path.isdir(path):
            inside = sorted(os.path.join(folder, name)
                            for folder, _, names in os.walk(path, onerror=refuse) for name in names)
            usable = [name for name in inside if name.endswith(SUFFIXES)]
            if not usable:
                raise ValueError(f"{path}: no {', '.join(SUFFIXES)} file in this folder")
            if len(usable) < len(inside):
                print(f"{path}: {len(usable):,} files, {len(inside) - len(usable):,} others passed "
                      f"over, which are not {', '.join(SUFFIXES)}")
            found += usable
        elif not os.path.exists(path):
            made = path.startswith("out/toyworld/")
            raise ValueError(f"{path}: no such file or folder"
                             + ("; make it with: python -m demo.world" if made else ""))
        elif not path.endswith(SUFFIXES):
            raise ValueError(f"{path}: not one of {', '.join(SUFFIXES)}")
        else:
            found.append(path)
    if not found:
        raise ValueError("--input names no file")
    once: dict[str, str] = {}
    for path in found:
        once.setdefault(os.path.realpath(path), path)
    return list(once.values())


def read_batches(files: list[str], text_field: str = "text",
                 max_line_mb: int = 16) -> Iterator[Batch]:
    """The files' raw contents in batches of about BATCH_BYTES, in constant memory.
    Raises ValueError naming the file when one cannot be read to its end."""
    sizes = [os.path.getsize(path) for path in files]
    before, total = 0, max(sum(sizes), 1)
    for path, size in zip(files, sizes):
        try:
            batches = (_read_parquet(path, text_field) if path.endswith(".parquet") else
                       _read_text(path, max_line_mb << 20))
            for batch, position in batches:  # in the file, so compressed bytes of a .gz
                batch.share = (before + position) / total
                yield batch
        except (OSError, EOFError, zlib.error) as error:
            reason = getattr(error, "strerror", None) or error
            raise ValueError(f"{path}: cannot be read to its end: {reason}") from None
        before += size


def _read_text(path: str, max_line: int) -> Iterator[tuple[Batch, int]]:
    with open(path, "rb") as raw:
        f = gzip.open(raw) if path.endswith(".gz") else raw
        txt = path.endswith((".txt", ".txt.gz"))
        batch = Batch(path, 1, [], 0)
        for number, (item, size) in enumerate(_pieces(f) if txt else _lines(f, max_line), 1):
            batch.items.append(item)
            batch.n_bytes += size
            if batch.n_bytes >= BATCH_BYTES:
                yield batch, raw.tell()
                batch = Batch(path, number + 1, [], 0)
        if batch.items:
            yield batch, raw.tell()


def _lines(f, limit: int) -> Iterator[tuple[bytes | None, int]]:
    """Each line with its size; None for one longer than `limit`, which is passed over."""
    while raw := f.readline(limit + 1):
        size = len(raw)
        if size <= limit:
            yield raw, size
            continue
        while not raw.endswith(b"\n") and (raw := f.readline(1 << 20)):
            size += len(raw)
        yield None, size


def _pieces(f) -> Iterator[tuple[tuple[int, bytes], int]]:
    """Pieces of a .txt file with the line each starts at: up to the first line end between 1 and
    2 TXT_BYTES, or 2 TXT_BYTES of whole characters where none is."""
    line, rest = 1, f.read(1 << 20).removeprefix(BOM)
    while rest:
        block, at = f.read(1 << 20), 0
        while len(rest) - at > (2 * TXT_BYTES if block else 0):
            end = rest.find(b"\n", at + TXT_BYTES - 1, at + 2 * TXT_BYTES) + 1
            if not end and (end := min(at + 2 * TXT_BYTES, len(rest))) < len(rest):
                end -= next((n for n in range(4) if rest[end - n] & 0xC0 != 0x80), 0)
            yield (line, rest[at:end]), end - at
            line, at = line + rest.count(b"\n", at, end), end
        rest = rest[at:] + block


def _read_parquet(path: str, text_field: str) -> Iterator[tuple[Batch, int]]:
    try:
        import pyarrow.parquet
    except ImportError:
        raise ValueError(f"{path}: parquet files need the extra: pip install pyarrow") from None
    try:
        table, row, size = pyarrow.parquet.ParquetFile(path), 1, os.path.getsize(path)
        types = {field.name: field.type for field in table.schema_arrow}
        if text_field not in types:
            raise ValueError(f"{path}: no column '{text_field}', there are {', '.join(types)}")
        names = [text_field] + ["lang"] * ("lang" in types)
        for name in names:
            if types[name] not in (pyarrow.string(), pyarrow.large_string()):
                raise ValueError(f"{path}: column '{name}' must be of strings, is {types[name]}")
        for part in table.iter_batches(1024, columns=names, use_threads=False):  # workers do that
            texts = part.column(text_field).cast(pyarrow.large_binary()).to_pylist()
            langs = part.column("lang").to_pylist() if len(names) > 1 else [None] * len(texts)
            batch = Batch(path, row, list(zip(texts, langs)), part.nbytes)
            row += len(texts)
            yield batch, size * (row - 1) // table.metadata.num_rows
    except pyarrow.ArrowException as error:
        raise ValueError(f"{path}: not a readable parquet file: {error}") from None


# ---------------------------------------------------------------------------- parsing

class _Bad(Exception):
    """(column, what, detail) of what is wrong, and how many lines further on if any."""


def parse(batch: Batch, text_field: str = "text",
          chats: bool = False) -> Iterator[Document | BadLine]:
    """The documents of a batch, and a BadLine for everything that is none. Empty lines are no
    documents. With `chats`, a line may hold messages or a preference pair instead of a text."""
    for number, item in enumerate(batch.items, batch.first):
        lang: object = None
        try:
            if batch.path.endswith(".parquet"):
                raw, lang = item
                text = None if raw is None else _decode(raw)
                _check(text, lang, text_field)
            elif isinstance(item, tuple):
                number, raw = item
                text = _decode(raw)
                if not text.strip():
                    continue
            elif item is None:
                raise _Bad(1, "line too long", "see --max_line_mb")
            elif not item.removeprefix(BOM).strip():
                continue
            else:
                text, lang = _parse_line(item, text_field, chats)
            yield Document(text, lang or language(text))
        except _Bad as bad:
            column, what, detail, *below = bad.args
            if not batch.path.endswith(".parquet"):  # there the number is that of the row
                number += sum(below)
            yield BadLine(f"{batch.path}:{number}:{column}", what, detail)


def _decode(raw: bytes) -> str:
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        good = raw[:error.start].decode()
        raise _Bad(len(good) - good.rfind("\n"), "not UTF-8", f"byte 0x{raw[error.start]:02x}",
                   good.count("\n")) from None


def _constant(name: str) -> None:
    raise ValueError("NaN and Infinity are accepted by json, but not part of JSON")


def _object(pairs: list) -> dict:
    if len(record := dict(pairs)) < len(pairs):
        raise ValueError("json would keep the last value of a key given twice and say nothing")
    return record


_decoder = json.JSONDecoder(object_pairs_hook=_object, parse_constant=_constant)


class FieldError(Exception):
    """FieldError(field, what, detail): a field of a record is not as it should be."""


def parse_records(batch: Batch, read: Callable[[dict], Any]) -> Iterator[Any | BadLine]:
    """What `read` makes of each object of a batch of JSONL lines; a BadLine for everything else,
    and for a record of which `read` raises FieldError."""
    if not batch.path.endswith((".jsonl", ".jsonl.gz")):
        raise ValueError(f"{batch.path}: not a .jsonl or .jsonl.gz file")
    for number, raw in enumerate(batch.items, batch.first):
        try:
            if raw is None:
                raise _Bad(1, "line too long", "more than 16 MB")
            if not raw.removeprefix(BOM).strip():
                continue
            record, line = _parse_object(raw)
            try:
                yield read(record)
            except FieldError as error:
                field, what, detail = error.args
                raise _Bad(_column(line, field), what, detail) from None
        except _Bad as bad:
            column, what, detail, *_ = bad.args
            yield BadLine(f"{batch.path}:{number}:{column}", what, detail)


def _parse_line(raw: bytes, text_field: str, chats: bool) -> tuple[str, str | None]:
    """(text, lang) of a JSONL line, lang None where it says none. Raises _Bad."""
    record, line = _parse_object(raw)
    text, lang = record.get(text_field), record.get("lang")
    if text_field not in record:
        if not chats or (text := _chat_text(record)) is None:
            start = len(line) - len(line.lstrip()) + 1
            raise _Bad(start, "field missing", f"'{text_field}'" + " or a chat" * chats)
    _check(text, lang, text_field, line)
    return text, lang


def _parse_object(raw: bytes) -> tuple[dict, str]:
    """The JSON object of a line, and the line. Raises _Bad."""
    line = _decode(raw.removeprefix(BOM).rstrip(b"\r\n"))
    try:
        record = _decoder.decode(line)
    except json.JSONDecodeError as error:
        raise _Bad(error.colno, "not JSON", error.msg) from None
    except (ValueError, RecursionError) as error:
        _inspect(line)
        raise _Bad(1, "not JSON", str(error)) from None
    if line.count("[") + line.count("{") > MAX_DEPTH:  # perhaps in strings only
        _inspect(line)
    if not isinstance(record, dict):
        start = len(line) - len(line.lstrip()) + 1
        raise _Bad(start, "not an object", f"but {type(record).__name__}")
    return record, line


def _check(text: object, lang: object, text_field: str, line: str = "") -> None:
    """Raises _Bad for what cannot be a text and its language."""
    if not isinstance(text, str):
        raise _Bad(_column(line, text_field), "field of a wrong type",
                   f"'{text_field}' must be a string, is {type(text).__name__}")
    if not text.strip():
        raise _Bad(_column(line, text_field), "empty text", "")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        # of the escapes in the text: pairs, the first alone, and all others
        escapes = re.compile(r"\\(?:u[dD][89abAB]..\\u[dD][c-fC-F]..|(u[dD][89a-fA-F]..)|.)")
        at = next((m.start() for m in escapes.finditer(line, _column(line, text_field)) if m[1]), 0)
        raise _Bad(at + 1, "lone surrogate", ascii(text[error.start])) from None
    if lang is not None and not (isinstance(lang, str) and LANG.fullmatch(lang)):
        raise _Bad(_column(line, "lang"), "unknown language", f"{lang!r:.40}, wanted like 'en'")


def _chat_text(record: dict) -> str | None:
    """All that is said in a chat or preference record, one message a line; None if neither."""
    messages = record.get("messages", record.get("prompt"))
    if not isinstance(messages, list) or not all(isinstance(m, dict) for m in messages):
        return None
    said = [m.get("content") for m in messages]
    said += [record[k] for k in ("chosen", "rejected") if k in record]
    return "\n".join(said) if all(isinstance(s, str) for s in said) else None


def _tokens(line: str) -> Iterator[tuple[int, str, int]]:
    """(column, token, depth) of each string, number, word and mark in a line of JSON, which may be
    damaged. json says where a line breaks, but not where a value stands: this is for the rest."""
    depth = 0
    for m in re.finditer(r'"(?:[^"\\]++|\\.)*+"|[^\s"{}\[\],:]++|[{}\[\],:]', line):
        depth += m[0] in "{["
        yield m.start() + 1, m[0], depth
        depth -= m[0] in "}]"


def _inspect(line: str) -> None:
    """Raises _Bad at the first thing that json lets pass, or refuses without saying where."""
    keys: dict[int, set] = {}  # of the object at each depth
    before = column_before = None
    for column, token, depth in _tokens(line):
        if depth > MAX_DEPTH:
            raise _Bad(column, "nested too deeply", f"more than {MAX_DEPTH} brackets")
        if token.startswith(("NaN", "Infinity", "-Infinity")):
            raise _Bad(column, "NaN or Infinity", "")
        if re.fullmatch(r"-?\d{4301,}", token):  # int() refuses
            raise _Bad(column, "number too long", f"{len(token):,} characters")
        if token == "{":
            keys[depth] = set()
        elif token == ":":
            if (key := json.loads(before)) in keys[depth]:
                raise _Bad(column_before, "key given twice", f"{key!r:.40}")
            keys[depth].add(key)
        before, column_before = token, column


def _column(line: str, field: str) -> int:
    """Where the value of an object's field stands; 1 if it has no such field."""
    before, found = "", False
    for column, token, depth in _tokens(line):
        if found:
            return column
        found = token == ":" and depth == 1 and json.loads(before) == field
        before = token
    return 1


def language(text: str) -> str:
    """zh if at least 30 % of the first 4,000 letters are Han, else en."""
    head = text[:4000]
    letters = sum(map(str.isalpha, head))
    return "zh" if len(HAN.findall(head)) >= 0.3 * max(letters, 1) else "en"


# ---------------------------------------------------------------------------- plumbing

class Progress:
    """One line that says how far it is: rewritten on a terminal, a new one every 5 s elsewhere."""

    def __init__(self, to: TextIO | None = None) -> None:
        self.to, self.shown, self.open = to or sys.stdout, time.monotonic(), False

    def show(self, text: str) -> None:
        terminal = self.to.isatty()
        if time.monotonic() - self.shown >= (0.1 if terminal else 5):
            print(f"\r\033[K{text}" if terminal else text, end="" if terminal else "\n",
                  flush=True, file=self.to)
            self.shown, self.open = time.monotonic(), terminal

    def end(self) -> None:
        """What is printed next, a result or an error, starts on a line of its own."""
        if self.open:
            print(flush=True, file=self.to)
        self.open = False


class BadLines:
    """Counts what is wrong with the input: stops at the first bad line, or skips and reports."""

    def __init__(self, policy: str, progress: Progress):
        self.policy, self.progress, self.kinds = policy, progress, Counter()

    def add(self, bad: list[BadLine]) -> None:
        """Raises ValueError at the first bad line unless they are to be skipped."""
        for b in bad:
            line = f"{b.where}: {b.what}" + (f": {b.detail}" if b.detail else "")
            if self.policy == "stop":
                raise ValueError(f"{line} (--on_bad_line=skip passes over such lines)")
            if self.kinds.total() < 5:
                self.progress.end()
                print(f"skipped {line}")
            self.kinds[b.what] += 1

    def finish(self, n_good: int, max_fraction: float) -> None:
        """Print the totals. Raises ValueError if too many were bad to be chance."""
        n = self.kinds.total()
        if n:
            kinds = ", ".join(f"{kind} {count:,}" for kind, count in self.kinds.most_common())
            print(f"bad lines skipped: {n:,} ({kinds})")
        if n > max_fraction * (n + n_good):
            raise ValueError(f"{n:,} of {n + n_good:,} lines are bad, more than {max_fraction:.1%} "
                             "(--max_bad_fraction)")


def parallel(work: Callable[[Any], Any], batches: Iterable, workers: int) -> Iterator:
    """map(work, batches) in order on `workers` processes (0: one per core), with no more than two
    batches per process in memory. Raises ValueError when a process dies."""
    workers = workers or os.cpu_count() or 1
    if workers == 1:
        yield from map(work, batches)
        return
    pool = ProcessPoolExecutor(workers, initializer=_start_worker)
    waiting: deque = deque()
    try:
        for batch in batches:
            waiting.append(pool.submit(work, batch))
            if len(waiting) == 2 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool:
        raise ValueError("a worker process was killed, perhaps for want of memory; the same "
                         "command with fewer --workers needs less") from None
    finally:
        pool.shutdown(cancel_futures=True)


def _start_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends its workers

    def follow() -> None:  # a worker would wait for ever for the next batch of a killed parent
        parent_process().join()
        os._exit(1)

    Thread(target=follow, daemon=True).start()


def write_text(path: str, text: str) -> None:
    """Write a small file whole or not at all: a crash leaves the old one or the new one.
    Raises OSError with path and reason."""
    try:
        with open(f"{path}.tmp", "w", encoding="utf-8") as f:
            f.write(text)
            f.flush()
            os.fsync(f.fileno())
        os.replace(f"{path}.tmp", path)
    except OSError as error:
        if os.path.exists(f"{path}.tmp"):
            os.unlink(f"{path}.tmp")
        raise OSError(f"{path} was not written: {error.strerror}") from None

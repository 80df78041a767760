"""
Text files as documents: .txt, .jsonl and .parquet (each also .gz but the last), files or folders.

    for batch in read_batches(find_files("notes,web.jsonl.gz")):     # a few MB each, in order
        for item in parse(batch):                                    # Document or BadLine

Reading is sequential and parsing is not, so that workers can share the work while the order of
documents, and with it everything built from them, stays the same for any number of workers.
A JSONL line is an object with a string field "text" and, if known, "lang" ("en", "zh", …);
without it the language is zh or en by its share of Han letters. A .txt file is one document,
a long one is cut at line ends into pieces of about 8 kB. Nothing is repaired or guessed: what is
wrong with a line is said as file:line:column.
"""
import gzip
import json
import os
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from multiprocessing import Pool
from threading import Semaphore
from typing import Any

SUFFIXES = (".txt", ".txt.gz", ".jsonl", ".jsonl.gz", ".parquet")
BATCH_BYTES = 4 << 20  # raw bytes handed to a worker at once
TXT_BYTES = 8 << 10  # a longer .txt file becomes several documents
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
    first: int  # line (JSONL) or row (parquet) of items[0]; the line numbers run on from it
    items: list  # raw lines; (line, bytes) pieces of a .txt file; (text, lang) rows of a parquet file
    n_bytes: int  # of input, for progress


def find_files(paths: str) -> list[str]:
    """Files behind a comma-separated list of files and folders, in a fixed order.
    Raises ValueError for a path that is not there or holds nothing readable."""
    found: list[str] = []
    for path in filter(None, (p.strip() for p in paths.split(","))):
        if os.path.isdir(path):
            inside = sorted(os.path.join(folder, name) for folder, _, names in os.walk(path)
                            for name in names if name.endswith(SUFFIXES))
            if not inside:
                raise ValueError(f"{path}: no {', '.join(SUFFIXES)} file in this folder")
            found += inside
        elif not os.path.exists(path):
            raise ValueError(f"{path}: no such file or folder")
        elif not path.endswith(SUFFIXES):
            raise ValueError(f"{path}: not one of {', '.join(SUFFIXES)}")
        else:
            found.append(path)
    return list(dict.fromkeys(found))


def read_batches(files: list[str], text_field: str = "text", max_line_mb: int = 16) -> Iterator[Batch]:
    """The files' raw contents in batches of about BATCH_BYTES, in constant memory.
    Raises ValueError naming the file when one cannot be read to its end."""
    for path in files:
        try:
            if path.endswith(".parquet"):
                yield from _read_parquet(path, text_field)
                continue
            with (gzip.open if path.endswith(".gz") else open)(path, "rb") as f:
                lines = _read_pieces(f) if ".txt" in path[-7:] else _read_lines(f, max_line_mb << 20)
                batch = Batch(path, 1, [], 0)
                for number, (raw, size) in enumerate(lines, 1):
                    batch.items.append(raw)
                    batch.n_bytes += size
                    if batch.n_bytes >= BATCH_BYTES:
                        yield batch
                        batch = Batch(path, number + 1, [], 0)
                if batch.items:
                    yield batch
        except (OSError, EOFError, zlib.error) as error:
            raise ValueError(f"{path}: cannot be read to its end: {error}") from None


def _read_lines(f, limit: int) -> Iterator[tuple[bytes | None, int]]:
    """Each line with its size; None for one longer than `limit`, which is passed over."""
    while raw := f.readline(limit + 1):
        size = len(raw)
        if size <= limit:
            yield raw, size
            continue
        while not raw.endswith(b"\n") and (raw := f.readline(1 << 20)):
            size += len(raw)
        yield None, size


def _read_pieces(f) -> Iterator[tuple[tuple[int, bytes], int]]:
    """Pieces of a .txt file with the line each starts at, cut behind a line end where one comes."""
    line, rest = 1, b""
    while block := f.read(1 << 20):
        rest += block
        while len(rest) > TXT_BYTES:
            end = rest.find(b"\n", TXT_BYTES - 1) + 1
            if not end and len(rest) < 1 << 20:
                break  # no line end in sight yet
            end = end or _character_start(rest, TXT_BYTES)
            yield (line, rest[:end]), end
            line, rest = line + rest.count(b"\n", 0, end), rest[end:]
    if rest:
        yield (line, rest), len(rest)


def _character_start(raw: bytes, at: int) -> int:
    """The last position up to `at` where a UTF-8 character starts."""
    while at > 1 and raw[at] & 0xC0 == 0x80:
        at -= 1
    return at


def _read_parquet(path: str, text_field: str) -> Iterator[Batch]:
    try:
        import pyarrow.parquet
    except ImportError:
        raise ValueError(f"{path}: parquet files need the extra: pip install pyarrow") from None
    try:
        table, row = pyarrow.parquet.ParquetFile(path), 1
        names = table.schema_arrow.names
        if text_field not in names:
            raise ValueError(f"{path}: no column '{text_field}', there are {', '.join(names)}")
        columns = [text_field] + ["lang"] * ("lang" in names)
        for part in table.iter_batches(batch_size=1024, columns=columns):
            texts = part.column(0).to_pylist()
            langs = part.column(1).to_pylist() if len(columns) > 1 else [None] * len(texts)
            yield Batch(path, row, list(zip(texts, langs)), part.nbytes)
            row += len(texts)
    except pyarrow.ArrowException as error:
        raise ValueError(f"{path}: not a readable parquet file: {error}") from None


def parse(batch: Batch, text_field: str = "text", chats: bool = False) -> Iterator[Document | BadLine]:
    """The documents of a batch, and a BadLine for everything that is none. Empty lines are no
    documents. With `chats`, a line may hold messages or a preference pair instead of a text."""
    for number, item in enumerate(batch.items, batch.first):
        lang: object = None
        if batch.path.endswith(".parquet"):
            (text, lang), raw = item, ""
            bad = _check(text, lang, text_field, raw)
        elif isinstance(item, tuple):  # a piece of a .txt file
            number, raw = item
            text, bad = _decode(raw)
            if bad:
                number, column = number + raw[:bad[0]].count(b"\n"), bad[0] - raw.rfind(b"\n", 0, bad[0])
                bad = (column, *bad[1:])
            elif not text.strip():
                continue
        elif item is None:
            text, bad = None, (1, "line too long", "see --max_line_mb")
        elif not item.strip():
            continue
        else:
            text, lang, bad = _parse_line(item, text_field, chats)
        if bad:
            yield BadLine(f"{batch.path}:{number}:{bad[0]}", *bad[1:])
        else:
            yield Document(text, lang or language(text))


def _decode(raw: bytes) -> tuple[str, tuple | None]:
    try:
        return raw.decode("utf-8-sig"), None
    except UnicodeDecodeError as error:
        return "", (error.start, "not UTF-8", f"byte 0x{raw[error.start]:02x}")


class _Constant(ValueError):
    """NaN or Infinity, which json accepts and JSON does not have."""


class _TwiceKey(ValueError):
    """A key that stands twice in one object, where json keeps the last and says nothing."""


def _object(pairs: list) -> dict:
    record = dict(pairs)
    if len(record) < len(pairs):
        keys = [key for key, _ in pairs]
        raise _TwiceKey(next(key for i, key in enumerate(keys) if key in keys[:i]))
    return record


def _constant(name: str):
    raise _Constant(name)


_decoder = json.JSONDecoder(object_pairs_hook=_object, parse_constant=_constant)


def _parse_line(raw: bytes, text_field: str, chats: bool) -> tuple[str, object, tuple | None]:
    """(text, lang, None), or ("", None, (column, what, detail)); columns count characters from 1."""
    line, bad = _decode(raw.rstrip(b"\r\n"))
    if bad:
        return "", None, (len(raw[:bad[0]].decode("utf-8-sig")) + 1, *bad[1:])
    try:
        record = _decoder.decode(line)
    except json.JSONDecodeError as error:
        return "", None, (error.colno, "not JSON", error.msg)
    except RecursionError:
        return "", None, (_column(line, r"[\[{]"), "nested too deeply", "")
    except _Constant as error:
        return "", None, (_column(line, rf"(?<=[:,\[\s]){error}"), "a number JSON does not have", str(error))
    except _TwiceKey as error:
        key = json.dumps(str(error), ensure_ascii=False)
        last = [m.start() for m in re.finditer(re.escape(key) + r"\s*:", line)]
        return "", None, (last[-1] + 1 if last else 1, "a key given twice", str(error))
    except ValueError:  # int() refuses more than 4,300 digits
        return "", None, (_column(line, r"\d{4301}"), "a number too long", "")
    if not isinstance(record, dict):
        return "", None, (1, "not an object", f"but {type(record).__name__}")
    if chats and text_field not in record:
        text = _chat_text(record)
    elif text_field not in record:
        return "", None, (1, "field missing", f"'{text_field}'")
    else:
        text = record[text_field]
    return text, record.get("lang"), _check(text, record.get("lang"), text_field, line)


def _check(text, lang, text_field: str, line: str) -> tuple | None:
    """What is wrong with a text and its language, as (column, what, detail), or None."""
    column = _column(line, re.escape(f'"{text_field}"') + r"\s*:")
    if not isinstance(text, str):
        return column, "field of a wrong type", f"'{text_field}' must be a string, is {type(text).__name__}"
    if not text.strip():
        return column, "empty text", ""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return _column(line, r"\\u[dD][89a-fA-F]"), "lone surrogate", repr(text[error.start])
    if lang is not None and not (isinstance(lang, str) and LANG.fullmatch(lang)):
        return _column(line, r'"lang"\s*:'), "unknown language", f"{lang!r}, wanted like 'en' or 'zh'"
    return None


def _chat_text(record: dict) -> str | None:
    """All that is said in a chat or preference record, one message a line; None if it is neither."""
    messages = record.get("messages", record.get("prompt"))
    if not isinstance(messages, list) or not all(isinstance(m, dict) for m in messages):
        return None
    said = [m.get("content") for m in messages] + [record[k] for k in ("chosen", "rejected") if k in record]
    return "\n".join(said) if all(isinstance(s, str) for s in said) else None


def _column(line: str, pattern: str) -> int:
    match = re.search(pattern, line)
    return match.start() + 1 if match else 1


def language(text: str) -> str:
    """zh if at least 30 % of the first 4,000 letters are Han, else en."""
    head = text[:4000]
    letters = sum(map(str.isalpha, head))
    return "zh" if len(HAN.findall(head)) >= 0.3 * max(letters, 1) else "en"


class BadLines:
    """Counts what is wrong with the input: stops at the first bad line, or skips and reports."""

    def __init__(self, policy: str):
        self.policy, self.kinds = policy, Counter()

    def add(self, bad: list[BadLine]) -> None:
        """Raises ValueError at the first bad line unless they are to be skipped."""
        for b in bad:
            line = f"{b.where}: {b.what}" + (f": {b.detail}" if b.detail else "")
            if self.policy == "stop":
                raise ValueError(f"{line} (--on_bad_line=skip passes over such lines)")
            if self.kinds.total() < 5:
                print(f"skipped {line}")
            self.kinds[b.what] += 1

    def finish(self, n_good: int, max_fraction: float = 0.01) -> None:
        """Print the totals. Raises ValueError if too many were bad to be chance."""
        n = self.kinds.total()
        if n:
            print(f"skipped {n:,} bad lines: " + ", ".join(f"{k} {v:,}" for k, v in self.kinds.items()))
        if n > max_fraction * (n + n_good):
            raise ValueError(f"{n:,} of {n + n_good:,} lines are bad, more than {max_fraction:.1%} "
                             "(--max_bad_fraction)")


def parallel(work: Callable[[Any], Any], batches: Iterable, workers: int) -> Iterator:
    """map(work, batches) in order on `workers` processes (0: one per core), with no more than two
    batches per process in memory."""
    workers = workers or os.cpu_count() or 1
    if workers == 1:
        yield from map(work, batches)
        return
    room, done = Semaphore(2 * workers), False

    def admit() -> Iterator:
        for batch in batches:
            room.acquire()
            if done:
                return
            yield batch

    with Pool(workers) as pool:
        try:
            for result in pool.imap(work, admit()):
                room.release()
                yield result
        finally:  # the pool's feeder may wait in admit(), and closing the pool waits for the feeder
            done = True
            room.release()


def write_text(path: str, text: str) -> None:
    """Write a small file whole or not at all: a crash leaves the old one or the new one."""
    try:
        with open(f"{path}.tmp", "w", encoding="utf-8") as f:
            f.write(text)
            f.flush()
            os.fsync(f.fileno())
        os.replace(f"{path}.tmp", path)
    except OSError as error:
        if os.path.exists(f"{path}.tmp"):
            os.unlink(f"{path}.tmp")
        raise ValueError(f"{path} was not written: {error.strerror}") from None

"""
Lines of JSON, read strictly: each gives a record, or a BadLine that says what is wrong with it as
file:line:column; the rest may be skipped.

Nothing is repaired or guessed. Line and column count from 1, columns in characters. A field that is
null counts as missing.
"""
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from plumbing.jobs import Progress
from plumbing.terminal import printable

BOM = b"\xef\xbb\xbf"
SUFFIXES = (".txt", ".txt.gz", ".jsonl", ".jsonl.gz", ".parquet")
MAX_LINE = 16 << 20  # bytes; a longer line is a bad one
MAX_DEPTH = 100  # of brackets in a line; json itself gives up at a depth that varies
MAX_BAD = 0.01  # of the lines; more bad ones are no accident
TO_LINES = ("make lines of a list: python -c 'import json, sys; [print(json.dumps(x)) for x in "
            "json.load(sys.stdin)]' < LIST.json > LINES.jsonl")


@dataclass
class Batch:
    path: str
    items: list[tuple[int, Any]]  # (line, its bytes); of a parquet file (row, record)
    share: float  # of all input that is read by the end of this batch


@dataclass
class BadLine:
    where: str  # file:line:column
    what: str  # what is wrong, the same words for the same kind of damage
    detail: str = ""

    def __str__(self) -> str:
        return printable(": ".join(filter(None, (self.where, self.what, self.detail))))


class LineError(Exception):
    """LineError(where, what, detail): a line is not as it should be, where the value of a field
    stands (or the object, if it has no such field), or at a column."""


class BadLines:
    """Counts what is wrong with the input: stops at the first bad line, or skips and reports."""

    def __init__(self, policy: str, progress: Progress):
        self.policy, self.progress = policy, progress
        self.kinds: Counter[str] = Counter()

    def add(self, bad: list[BadLine]) -> None:
        """Raises ValueError at the first bad line unless they are to be skipped."""
        for one in bad:
            if self.policy == "stop":
                raise ValueError(f"{one} (--on_bad_line=skip passes over such lines)")
            if self.kinds.total() < 5:
                self.progress.end()
                print(f"skipped {one}")
            self.kinds[one.what] += 1

    def finish(self, n_good: int) -> None:
        """Print the totals. Raises ValueError if too many were bad to be chance."""
        if n := self.kinds.total():
            kinds = ", ".join(f"{kind} {count:,}" for kind, count in self.kinds.most_common())
            print(f"bad lines skipped: {n:,} ({kinds})")
        if n > MAX_BAD * (n + n_good):
            raise ValueError(f"{n:,} of {n + n_good:,} lines are bad, more than {MAX_BAD:.0%}: "
                             "mend them, or take them out of the file")


def kind_of(path: str) -> str:
    """Of the SUFFIXES, without .gz, the one that a file has; "" for another file."""
    suffix = next((s for s in SUFFIXES if path.lower().endswith(s)), "")
    return suffix.removesuffix(".gz")


def parse_records(batch: Batch, read: Callable[[dict], Any], kinds: tuple[str, ...] = (".jsonl",),
                  ) -> Iterator[Any | BadLine]:
    """What `read` makes of each record of a batch, from a file of these kinds; a BadLine for what
    is no record, and for one of which `read` raises LineError. Empty lines are nothing."""
    if (kind := kind_of(batch.path)) not in kinds:
        raise ValueError(f"{batch.path}: not a .jsonl or .jsonl.gz file")
    for number, item in batch.items:
        line = ""
        try:
            if item is None:
                raise LineError(1, "line too long", f"more than {MAX_LINE >> 20} MB")
            text = decode((item["text"] or b"") if kind == ".parquet" else item)
            if kind == ".parquet":
                record = item | {"text": text}
            elif not text.strip():
                continue
            elif kind == ".txt":
                record = {"text": text}
            else:
                line = text
                record = parse_object(line)
            yield read({name: value for name, value in record.items() if value is not None})
        except LineError as error:
            where, what, detail, *below = error.args
            start = len(line) - len(line.lstrip()) + 1
            column = where if isinstance(where, int) else columns_of(line).get(where, start)
            number += sum(below) if kind == ".txt" else 0
            yield BadLine(f"{batch.path}:{number}:{column}", what, detail)


def decode(raw: bytes) -> str:
    """UTF-8 as text. Raises LineError, with the number of line ends before the damage."""
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        good = raw[:error.start].decode()
        raise LineError(len(good) - good.rfind("\n"), "not UTF-8",
                        f"byte 0x{raw[error.start]:02x}", good.count("\n")) from None


def parse_object(line: str) -> dict:
    """Raises LineError."""
    try:
        record = _decoder.decode(line)
    except json.JSONDecodeError as error:
        a_list = f"; {TO_LINES}" if line.lstrip().startswith("[") else ""
        raise LineError(error.colno, "not JSON", error.msg + a_list) from None
    except (ValueError, RecursionError) as error:
        columns_of(line)
        raise LineError(1, "not JSON", str(error)) from None
    if line.count("[") + line.count("{") > MAX_DEPTH:  # perhaps in strings only
        columns_of(line)
    if not isinstance(record, dict):
        raise LineError("", "not an object", TO_LINES if isinstance(record, list) else
                        f"but {type(record).__name__}")
    return record


def check_text(text: str, field: str) -> str:
    """Raises LineError for half a character (JSON can say \\ud800), which has no UTF-8."""
    try:
        text.encode()
        return text
    except UnicodeEncodeError as error:
        raise LineError(field, "lone surrogate", ascii(text[error.start])) from None


def _constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


def _object(pairs: list) -> dict:
    if len(record := dict(pairs)) < len(pairs):
        raise ValueError("json would keep the last value of a key given twice and say nothing")
    return record


_decoder = json.JSONDecoder(object_pairs_hook=_object, parse_constant=_constant)
# a string, a number, a word or a mark
TOKEN = re.compile(r'"(?:[^"\\]++|\\.)*+"|[^\s"{}\[\],:]++|[{}\[\],:]')


def columns_of(line: str) -> dict[str, int]:
    """The column of the value of each field of an object: json says where a line breaks, but not
    where a value stands. Raises LineError at the first thing that json lets pass, or refuses
    without saying where."""
    found: dict[str, int] = {}
    keys: list[set[str]] = [set()]  # of the object at each depth
    key, before, column_before = "", "", 0
    for match in TOKEN.finditer(line):
        column, token = match.start() + 1, match[0]
        if before == ":" and len(keys) == 2:
            found[key] = column
        if token in "{[":
            keys.append(set())
        if len(keys) > MAX_DEPTH + 1:
            raise LineError(column, "nested too deeply", f"more than {MAX_DEPTH} brackets")
        if token.startswith(("NaN", "Infinity", "-Infinity")):
            raise LineError(column, "NaN or Infinity", "")
        if re.fullmatch(r"-?\d{4301,}", token):  # int() refuses
            raise LineError(column, "number too long", f"{len(token):,} characters")
        if token == ":":
            if (key := json.loads(before)) in keys[-1]:
                raise LineError(column_before, "key given twice", f"{key!r:.40}")
            keys[-1].add(key)
        if token in "}]":
            keys.pop()
        before, column_before = token, column
    return found

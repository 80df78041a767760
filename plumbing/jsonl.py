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
from typing import Any, NoReturn

from plumbing.jobs import Progress
from plumbing.terminal import printable

BOM = b"\xef\xbb\xbf"
SUFFIXES = (".txt", ".txt.gz", ".jsonl", ".jsonl.gz", ".parquet")
MAX_LINE = 16 << 20  # bytes; a longer line is a bad one
MAX_BAD = 0.01  # of the lines; more bad ones are no accident
KEY = re.compile(r'[\s,]*("(?:[^"\\]|\\.)*")\s*:\s*')  # of an object, up to its value
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
            column = where if isinstance(where, int) else column_of(line, where)
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

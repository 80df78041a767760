"""
Markdown and plain text into chunks for retrieval, in English and Chinese.

    chunks = split(text, "notes.md", count=lambda s: len(tok.encode_ordinary(s)))
    chunks = split(text, count=count, vectors=tfidf)   # by topic, too

The blocks under one heading (blocks.py) are packed into chunks of at most max_tokens. A block that
is too big is cut between rows, items, sentences, clauses or words, in this order; with `vectors` a
chunk also ends where the topic does. Three promises hold for any text: clean(text)[chunk.start:
chunk.end] == chunk.text; the chunks together hold each character that is not white space exactly
once; no chunk exceeds max_tokens. A heading stays with the text below it, and a section without
text lends its heading to the next one.
"""
import hashlib
import re
import unicodedata
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, NamedTuple

import numpy as np

from search.blocks import ITEM, Part, sections
from search.topics import semantic_cuts, sentences

CRUMB_TOKENS = 48  # of a breadcrumb, or a quarter of max_tokens if that is less
FILE = re.compile(
    r"(?s)(?:.*[/\\])?(.*)\.(?:md|markdown|txt|rst|py|jsonl?|pdf|docx|html?|epub)", re.I)
MIN_TOKENS = 16  # below it a breadcrumb, a table's header and one character may not fit together
Budget = Annotated[int, f"at least {MIN_TOKENS}", lambda n: n >= MIN_TOKENS]


@dataclass(frozen=True)
class Chunk:
    """A piece of a document; start and end are code points of clean(document)."""
    id: str  # from doc, crumb, prefix and text: the same content has the same id
    doc: str
    start: int
    end: int
    line: int  # of start, from 1
    crumb: str  # headings above, "Title > H2 > H3"; the document's name where it has none
    prefix: str  # header and delimiter row of a table that an earlier chunk began, else ""
    text: str

    @property
    def full(self) -> str:
        """What is indexed, shown to a model, and counted against max_tokens."""
        return "\n".join(filter(None, (self.crumb, self.prefix, self.text)))


def clean(text: str) -> tuple[str, int]:
    """Text without byte order mark, with \\n as the only line end, and with U+FFFD for what no
    text file should hold: NUL and lone surrogates. Also how many of those there were."""
    text = text.lstrip("\ufeff").replace("\r\n", "\n").replace("\r", "\n")
    return re.subn("[\0\ud800-\udfff]", "\ufffd", text)


def after(pattern: str) -> Callable[[str, int, int], list[int]]:
    """A way to cut text[start:end]: the positions after the matches."""
    find = re.compile(pattern).finditer
    return lambda text, start, end: [m.end() for m in find(text, start, end) if m.end() < end]


def at_sentences(text: str, start: int, end: int) -> list[int]:
    return [start + first for first, _ in sentences(text[start:end])[1:]]


at_lines = after("\n")
FINER = (at_lines, after(r"(?:[，、；;|]|,(?!\d))\s*"), after(r"\s+"))  # clauses, words
WAYS = {"paragraph": (at_sentences, *FINER), "code": (after(r"\n\s*\n"), *FINER),
        "item": (after(rf"\n(?={ITEM.pattern})"), at_sentences, *FINER),
        "table": (lambda *span: at_lines(*span)[2:], *FINER)}  # a row stays with the header's lines


def at_characters(text: str, start: int, end: int, width: int) -> list[int]:
    """Cuts about `width` apart, or in the middle of what is shorter; not between a character and
    what combines with it, unless that is more than 30 characters long."""
    step = min(width, (end - start + 1) // 2)
    cuts = set()
    for cut in range(start + step, end, step):
        whole = (p for p in range(cut, max(cut - 30, start), -1) if not (
            "\u200d" in text[p - 1:p + 1] or "\U0001f3fb" <= text[p] <= "\U0001f3ff"  # of emoji
            or unicodedata.category(text[p])[0] == "M"))
        cuts.add(next(whole, cut))
    return sorted(cuts)


class Atom(NamedTuple):
    """What packing does not cut."""
    start: int
    end: int
    size: int  # tokens
    prefix: str  # a table's header, for a chunk that starts here to repeat


def split(text: str, doc: str = "", max_tokens: int = 256, *, count: Callable[[str], int],
          vectors: Callable[[list[str]], np.ndarray] | None = None) -> list[Chunk]:
    """The chunks of a document, in order. `count` says how many tokens a string has. `vectors`
    turns n strings into n unit rows, and then chunks end where the topic does. The breadcrumb gets
    at most a quarter of max_tokens; a table's header is repeated if both take at most half. Raises
    ValueError for a max_tokens below 16."""
    if max_tokens < MIN_TOKENS:
        raise ValueError(f"max_tokens {max_tokens} must be at least {MIN_TOKENS}")
    splitter = _Splitter(clean(text)[0], doc, max_tokens, count, vectors)
    return [chunk for names, parts in sections(splitter.text, doc)
            for chunk in splitter.section(names, parts)]


@dataclass
class _Splitter:
    text: str
    doc: str
    max_tokens: int
    count: Callable[[str], int]
    vectors: Any

    def __post_init__(self) -> None:
        self.lines = [0, *at_lines(self.text, 0, len(self.text))]  # where they start

    def section(self, names: list[str], parts: list[Part]) -> Iterator[Chunk]:
        name = FILE.sub(r"\1", self.doc) if FILE.fullmatch(self.doc) else self.doc
        crumb = self.crumb(names or [" ".join(clean(name)[0].split())])
        atoms = [atom for part in parts for atom in self.atoms(part, crumb)]
        for group in self.by_topic(atoms, self.room(crumb)) if self.vectors else [atoms]:
            yield from self.pack(group, crumb)

    def crumb(self, names: list[str]) -> str:
        """As many of the nearest headings as fit; of one that is too long, its beginning."""
        limit = min(CRUMB_TOKENS, self.max_tokens // 4)
        for i in range(len(names)):
            if self.count(crumb := " > ".join(names[i:])) <= limit:
                return crumb
        while crumb and (size := self.count(crumb)) > limit:
            crumb = crumb[:min(len(crumb) - 1, len(crumb) * limit // size)]
        return crumb.rstrip()

    def room(self, crumb: str, prefix: str = "") -> int:
        """Tokens left for the text, less one since counts do not add up exactly."""
        return self.max_tokens - 1 - self.count("".join(s + "\n" for s in (crumb, prefix) if s))

    def atoms(self, part: Part, crumb: str) -> Iterator[Atom]:
        """A block as one atom or, if it is too big or topics are sought, as several."""
        prefix, rows = self.header(part, crumb) if part.kind == "table" else ("", 0)
        room = self.room(crumb, prefix)
        apart = self.vectors and part.kind == "paragraph"
        cuts = at_sentences(self.text, part.body, part.end) if apart else []
        for start, end in zip([part.start, *cuts], [*cuts, part.end]):
            for a, b, size in self.pieces(start, part.body, end, WAYS[part.kind], room):
                yield Atom(a, b, size, prefix if a >= rows else "")

    def header(self, part: Part, crumb: str) -> tuple[str, int]:
        """The two lines a table's later chunks repeat, "" if too long; where the rows start."""
        rows = self.text.find("\n", self.text.find("\n", part.body) + 1) + 1 or part.end
        prefix = self.text[part.body:rows].rstrip()
        return prefix if self.room(crumb, prefix) >= self.max_tokens // 2 - 1 else "", rows

    def pieces(self, start: int, body: int, end: int, ways: Sequence[Callable],
               room: int) -> Iterator[tuple[int, int, int]]:
        """Start, end and tokens of what becomes of a span that is cut until it fits. The headings
        before `body` stay with the first piece if they can."""
        size = self.count(self.text[start:end])
        if size <= room or end - start == 1:
            yield start, end, size
            return
        for i, way in enumerate(ways):
            if cuts := way(self.text, max(start, body), end):
                ways = ways[i + 1:]
                break
        else:
            if start < body:  # the headings alone overfill a chunk
                yield from self.pieces(start, start, body, FINER, room)
                start, cuts = body, []
            else:
                cuts = at_characters(self.text, start, end, 4 * room)
            ways = ()
        for a, b in zip([start, *cuts], [*cuts, end]):
            yield from self.pieces(a, body, b, ways, room)

    def by_topic(self, atoms: list[Atom], room: int) -> list[list[Atom]]:
        rows = self.vectors([self.text[a.start:a.end].strip() for a in atoms])
        cuts = semantic_cuts(rows, [a.size for a in atoms], room)
        return [atoms[a:b] for a, b in zip([0, *cuts], [*cuts, len(atoms)])]

    def pack(self, atoms: list[Atom], crumb: str) -> Iterator[Chunk]:
        """Take atoms while they fit. The sum of their counts proposes and the count of the whole
        decides, since a BPE may need more tokens for the whole than for its parts."""
        todo = atoms[::-1]
        while todo:
            first = todo[-1]
            room = self.room(crumb, first.prefix)
            taken: list[Atom] = []
            while todo and (not taken or todo[-1].size <= room):
                room -= todo[-1].size
                taken.append(todo.pop())
            while taken:
                chunk = self.chunk(first.start, taken[-1].end, crumb, first.prefix)
                if self.count(chunk.full) <= self.max_tokens:
                    break
                todo.append(taken.pop())
            if not taken:  # the next atom fits by itself, but not together with its breadcrumb
                start, end, size, prefix = todo.pop()
                if end - start == 1:
                    raise ValueError(f"max_tokens {self.max_tokens} is too small for the single "
                                     f"character {self.text[start:end]!r}")
                parts = self.pieces(start, start, end, (), size - 1)
                todo += [Atom(*part, prefix) for part in parts][::-1]
            elif chunk.text:
                yield chunk

    def chunk(self, start: int, end: int, crumb: str, prefix: str) -> Chunk:
        """The span without blank lines before it and without white space after it."""
        part = self.text[start:end]
        start += part.rfind("\n", 0, len(part) - len(part.lstrip())) + 1
        part = self.text[start:end].rstrip()
        key = "\0".join((self.doc, crumb, prefix, part)).encode("utf-8", "surrogatepass")
        return Chunk(hashlib.sha1(key).hexdigest()[:16], self.doc, start, start + len(part),
                     bisect_right(self.lines, start), crumb, prefix, part)

"""
Markdown and plain text into chunks for retrieval, in English and Chinese.

    chunks = split(text, "notes.md", count=lambda s: len(tok.encode_ordinary(s)))
    chunks = split(text, count=count, vectors=lambda units: tfidf(units, terms))   # by topic, too

Structure first (see blocks.py): the blocks under one heading are packed into chunks of at most
max_tokens; one that is too big is cut where it hurts least: between rows, items, sentences,
clauses, words; by topic, a chunk also ends where topics.py finds the next. Three promises hold for
any text: clean(text)[chunk.start:chunk.end] == chunk.text; the chunks together hold each
character that is not white space exactly once (with overlap=0); no chunk exceeds max_tokens.

A heading stays with the text below it; a section without text lends its heading to the next one.
So a chunk of headings alone exists only at the end of a document, or if they overfill a chunk.
"""
import hashlib
import re
import unicodedata
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from search.blocks import ITEM, Part, sections
from search.topics import semantic_cuts, sentences, terms, tfidf  # noqa: F401  (the last two: see above)

CRUMB_TOKENS = 48  # of a breadcrumb, or a quarter of max_tokens if that is less
FILE = re.compile(r"(?s)(?:.*[/\\])?(.*)\.(?:md|markdown|txt|rst|py|jsonl?)", re.I)
MIN_TOKENS = 16  # below it a breadcrumb, a table's header and one character may not fit together


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


# ---------------------------------------------------------------------------- places to cut

def _behind(pattern: str) -> Callable[[str, int, int], list[int]]:
    """A way to cut text[start:end]: the positions behind the matches."""
    find = re.compile(pattern).finditer
    return lambda text, start, end: [m.end() for m in find(text, start, end) if m.end() < end]


at_lines = _behind("\n")
at_blank_lines = _behind(r"\n\s*\n")
at_clauses = _behind(r"(?:[，、；;|]|,(?!\d))\s*")
at_spaces = _behind(r"\s+")


def at_sentences(text: str, start: int, end: int) -> list[int]:
    return [start + first for first, _ in sentences(text[start:end])[1:]]


def at_items(text: str, start: int, end: int) -> list[int]:
    return [cut for cut in at_lines(text, start, end) if ITEM.match(text, cut, end)]


def at_rows(text: str, start: int, end: int) -> list[int]:
    """The first row stays with the header's two lines."""
    return at_lines(text, start, end)[2:]


FINER = (at_lines, at_clauses, at_spaces)
WAYS = {"paragraph": (at_sentences, *FINER), "item": (at_items, at_sentences, *FINER),
        "code": (at_blank_lines, *FINER), "table": (at_rows, *FINER)}


def at_characters(text: str, start: int, end: int, width: int) -> list[int]:
    """Cuts about `width` apart, or in the middle of what is shorter; not between a character and
    what combines with it, unless that is more than 30 characters long."""
    step = min(width, (end - start + 1) // 2)
    cuts = []
    for cut in range(start + step, end, step):
        whole = (p for p in range(cut, max(cut - 30, start), -1) if not _combines(text, p))
        cuts.append(next(whole, cut))
    return sorted(set(cuts))


def _combines(text: str, i: int) -> bool:
    """Is this an accent, a variation selector, a skin colour, or next to a zero-width joiner?"""
    return unicodedata.category(text[i])[0] == "M" or "\u200d" in text[i - 1:i + 1] \
        or "\U0001f3fb" <= text[i] <= "\U0001f3ff"


PAIRS = ("“”", "「」", "『』", "（）", "()", "《》")  # what a cut between the two would tear apart
LOOK_BACK = 16  # atoms; so many places are compared, to stay linear


def hurt(text: str, start: int, cut: int) -> int:
    """How much a cut inside a block hurts the text from `start`: least behind a sentence or blank
    line, more behind a semicolon, most within a sentence; and more inside a quotation."""
    before = text[start:cut].rstrip()
    blank, last = text.count("\n", start + len(before), cut) > 1, before[-1:]
    degree = 1 if blank or last in "。！？….!?”」』）)\"" else 2 if last in "；;" else 4
    return degree + 2 * any(before.count(a) > before.count(b) for a, b in PAIRS)


# ---------------------------------------------------------------------------- chunks

class Atom(NamedTuple):
    """What packing does not cut."""
    start: int
    end: int
    size: int  # tokens
    prefix: str  # the header, for a chunk that starts here to repeat
    first: bool = False  # of its block


def split(text: str, doc: str = "", max_tokens: int = 256, overlap: int = 0, *,
          count: Callable[[str], int],
          vectors: Callable[[list[str]], np.ndarray] | None = None) -> list[Chunk]:
    """The chunks of a document, in order. `count` says how many tokens a string has; `overlap` is
    how many tokens of whole sentences a chunk may repeat from the one before it, under the same
    heading; `vectors` turns n strings into n unit rows, and then chunks end where the topic does.
    The breadcrumb gets at most a quarter of max_tokens; a table's header is repeated if both take
    at most half. Raises ValueError for a max_tokens below 16 or an overlap above half of it."""
    if max_tokens < MIN_TOKENS:
        raise ValueError(f"max_tokens {max_tokens} must be at least {MIN_TOKENS}")
    if not 0 <= overlap <= max_tokens // 2:
        raise ValueError(f"overlap {overlap} must be between 0 and half of max_tokens {max_tokens}")
    splitter = _Splitter(clean(text)[0], doc, max_tokens, overlap, count, vectors)
    return [chunk for names, parts in sections(splitter.text)
            for chunk in splitter.section(names, parts)]


@dataclass
class _Splitter:
    text: str
    doc: str
    max_tokens: int
    overlap: int
    count: Callable[[str], int]
    vectors: Callable[[list[str]], np.ndarray] | None

    def __post_init__(self):
        self.lines = [0, *at_lines(self.text, 0, len(self.text))]  # where they start

    def section(self, names: list[str], parts: list[Part]) -> Iterator[Chunk]:
        name = FILE.sub(r"\1", self.doc) if FILE.fullmatch(self.doc) else self.doc
        crumb = self.crumb(names or [" ".join(clean(name)[0].split())])
        atoms = [atom for part in parts for atom in self.atoms(part, crumb)]
        prose = [p for p in parts if self.overlap and p.kind in ("paragraph", "item")]
        spans = [(p.body + a, p.body + b) for p in prose
                 for a, b in sentences(self.text[p.body:p.end])]
        for group in self.by_topic(atoms, self.room(crumb)) if self.vectors else [atoms]:
            yield from self.pack(group, crumb, spans)

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
                yield Atom(a, b, size, prefix if a >= rows else "", a == part.start)

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

    def pack(self, atoms: list[Atom], crumb: str, spans: list[tuple[int, int]]) -> Iterator[Chunk]:
        """The next atom, too, if it fits, less what is better left to the next chunk. The sum of
        the counts proposes, the count of the whole disposes, since a BPE may need more tokens for
        it than for its parts."""
        todo, before = atoms[::-1], None
        left = sum(atom.size for atom in atoms)
        while todo:
            first = todo[-1]
            start = first.start if before is None else self.repeat(spans, before, first.start)
            room = self.room(crumb, first.prefix) - self.count(self.text[start:first.start])
            taken, space = [], room
            while todo and (not taken or todo[-1].size <= space):
                space -= todo[-1].size
                taken.append(todo.pop())
            for _ in range(self.better_left(taken, todo, left, room) if todo else 0):
                todo.append(taken.pop())
            while taken:
                chunk = self.chunk(start, taken[-1].end, crumb, first.prefix)
                if self.count(chunk.full) <= self.max_tokens:
                    break
                if start < first.start:
                    start = first.start
                else:
                    todo.append(taken.pop())
            if not taken:
                todo += self.halves(todo.pop())[::-1]
            else:
                left -= sum(atom.size for atom in taken)
                if chunk.text:
                    yield chunk
                    before = start

    def better_left(self, taken: list[Atom], todo: list[Atom], left: int, room: int) -> int:
        """How many of the atoms taken for a chunk to leave to the next one, for the cut that hurts
        least, of those the last: none beyond half the chunk, and none that would take a chunk
        more. `left` is the size of all that is not in a chunk yet."""
        size = kept = sum(atom.size for atom in taken)
        begin, best, least = taken[0].start, 0, 9
        for n, after in enumerate([todo[-1], *taken[:-LOOK_BACK:-1]]):
            kept -= taken[-n].size if n else 0
            if n == len(taken) or 2 * kept < size or (
                    -(-(left - kept) // room) > -(-(left - size) // room)):
                break
            degree = 0 if after.first else hurt(self.text, begin, after.start)
            if degree < least:
                best, least = n, degree
        return best

    def repeat(self, spans: list[tuple[int, int]], before: int, first: int) -> int:
        """Where whole sentences begin that end at `first`, have at most `overlap` tokens, and are
        not all of the chunk that starts at `before`."""
        start, size, i = first, 0, bisect_left(spans, (first,)) - 1
        while i >= 0 and spans[i][0] > before:
            a, b = spans[i]
            size += self.count(self.text[a:start])
            if b > start or self.text[b:start].strip() or size > self.overlap:
                break
            start, i = a, i - 1
        return start

    def halves(self, atom: Atom) -> list[Atom]:
        """Of an atom that fits by itself and not below its breadcrumb."""
        cuts = at_characters(self.text, atom.start, atom.end, atom.end - atom.start)
        if not cuts:
            raise ValueError(f"max_tokens {self.max_tokens} is too small for the single character "
                             f"{self.text[atom.start:atom.end]!r}")
        return [Atom(a, b, self.count(self.text[a:b]), atom.prefix)
                for a, b in zip([atom.start, *cuts], [*cuts, atom.end])]

    def chunk(self, start: int, end: int, crumb: str, prefix: str) -> Chunk:
        """The span without blank lines before it and without white space behind it."""
        part = self.text[start:end]
        start += part.rfind("\n", 0, len(part) - len(part.lstrip())) + 1
        part = self.text[start:end].rstrip()
        key = "\0".join((self.doc, crumb, prefix, part)).encode("utf-8", "surrogatepass")
        return Chunk(hashlib.sha1(key).hexdigest()[:16], self.doc, start, start + len(part),
                     bisect_right(self.lines, start), crumb, prefix, part)

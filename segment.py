"""
Markdown and plain text into chunks for retrieval, in English and Chinese.

    chunks = split(text, "notes.md", count=lambda s: len(tok.encode_ordinary(s)))
    chunks = split(text, count=count, vectors=lambda units: tfidf(units, terms))   # by topic, too

Structure first: one scan over the lines finds blocks (headings, paragraphs, list items, fenced code,
tables). Those under one heading are packed into chunks of at most max_tokens; a block that is too
big is cut where it hurts least: between rows, items, sentences, clauses, words. Three promises hold
for any text: clean(text)[chunk.start:chunk.end] == chunk.text; the chunks together hold each
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
from os.path import basename, splitext
from typing import NamedTuple

import numpy as np

from topics import semantic_cuts, sentences, terms, tfidf  # noqa: F401  (the last two: see above)

CRUMB_TOKENS = 48  # of a breadcrumb, or a quarter of max_tokens if that is less
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


# ---------------------------------------------------------------------------- blocks

class Block(NamedTuple):
    kind: str  # heading, paragraph, item (of a list), code or table
    start: int  # of its first line; it ends where the next one starts
    level: int = 0  # of a heading, 1 the highest
    title: str = ""


ATX = re.compile(r" {0,3}(#{1,6})(?:[ \t]|$)")
ANCHOR = re.compile(r"\s*(?:\[\[[^]]*\]\]|\{#[^}]*\})$|(?:^|\s)#+$")  # title [[name]], title ##
NUMERAL = "[〇零一二两三四五六七八九十百千0-9]+"
CHINESE = re.compile(f"第{NUMERAL}([部篇章回节条])|[一二三四五六七八九十]+(、)|（[一二三四五六七八九十]+(）)")
LEVELS = {"部": 2, "篇": 2, "章": 3, "回": 3, "节": 4, "条": 5, "、": 6, "）": 7}
ITEM = re.compile(r"[ \t]*(?:(?:[-*+]|\d{1,3}[.)])(?:[ \t]|$)|\d{1,3}、)")
FENCE = re.compile(r"(`{3,})[^`]*$|(~{3,})")


def blocks(text: str) -> list[Block]:
    """One scan over the lines. Nothing in a fence is interpreted; an item holds the lines that are
    indented below it; a rule (---) belongs to the block before it."""
    found: list[Block] = []
    fence, margin = _front_matter(text, found), 0  # what closes the fence; least indent inside
    kind, item_indent, blank = "", 0, False  # the block that this line may continue
    last = start = 0  # of the line before, and of this one
    for line in text.split("\n"):
        bare = line.strip()
        indent = len(line) - len(line.lstrip(" \t"))
        in_item = kind == "item" and indent > 0
        if fence and bare and indent < margin:
            fence = ""  # the list item around it has ended
        if fence:
            if start > 0 and len(bare) >= len(fence) and not bare.strip(fence[0]):
                fence = ""
        elif not bare:
            kind = "item" if kind == "item" else ""
        elif mark := FENCE.match(bare):
            fence, margin = mark[1] or mark[2], int(in_item or indent > 3)
            if not in_item:
                found.append(Block("code", start))
                kind = ""
        elif heading := None if in_item else _heading(line, start):
            found.append(heading)
            kind = ""
        elif kind == "paragraph" and last == found[-1].start and _is_underline(bare):
            found[-1] = Block("heading", last, 1 + (bare[0] == "-"), text[last:start].strip()[:200])
            kind = ""
        elif _is_rule(bare) and found and not in_item:
            kind = ""
        elif kind == "paragraph" and _is_delimiter(bare) and "|" in text[last:start]:
            if last == found[-1].start:
                found.pop()  # the paragraph is the table's header
            found.append(Block("table", last))
            kind = "table"
        elif ITEM.match(line) and not (in_item and indent > item_indent):
            found.append(Block("item", start))
            kind, item_indent = "item", indent
        elif not (kind == "paragraph" or kind == "table" and "|" in line
                  or kind == "item" and (in_item or not blank)):
            found.append(Block("paragraph", start))
            kind = "paragraph"
        blank, last, start = not bare, start, start + len(line) + 1
    return found


def _front_matter(text: str, found: list[Block]) -> str:
    """What closes the `key: value` lines that a document may begin with; "" if it does not."""
    end = text.find("\n---\n", 3, 10_000)
    if end < 0 or not re.match(r"---\n[\w-]+:", text):
        return ""
    title = re.search(r"^title:[ \t]*(.*)", text[:end], re.M)
    found.append(Block("code", 0, 1, title[1].strip(" \t\"'")[:200] if title else ""))
    return "---"


def _heading(line: str, start: int) -> Block | None:
    """The line as a heading, of Markdown or numbered as in Chinese documents (第一章, 一、)."""
    if mark := ATX.match(line):
        title = line[mark.end():].strip()[:200]
        return Block("heading", start, len(mark[1]), ANCHOR.sub("", title))
    bare = line.strip()
    if len(bare) <= 30 and bare[-1] not in "。；，" and (mark := CHINESE.match(bare)):
        return Block("heading", start, LEVELS[mark[mark.lastindex]], bare)
    return None


def _is_underline(bare: str) -> bool:
    """Does this line make the line of text above it a heading?"""
    return len(bare) > 1 and bare[0] in "=-" and not bare.strip(bare[0])


def _is_rule(bare: str) -> bool:
    return len(bare) > 2 and bare[0] in "-*_" and not bare.strip(bare[0] + " ")


def _is_delimiter(bare: str) -> bool:
    """Is this the second line of a table, |---|:-:|?"""
    return "|" in bare and "-" in bare and not bare.strip("|:- \t")


# ---------------------------------------------------------------------------- sections

class Part(NamedTuple):
    """A block with the headings above it."""
    kind: str
    start: int  # of the headings
    body: int  # where they end
    end: int


def sections(text: str) -> list[tuple[list[str], list[Part]]]:
    """Path of headings, and parts, of each run of blocks that no heading interrupts."""
    found, result = blocks(text), []
    path: list[Block] = []
    above = None  # where the headings start that have no text below them yet
    for block, end in zip(found, [b.start for b in found[1:]] + [len(text)]):
        if block.level:
            while path and path[-1].level >= block.level:
                path.pop()
            path.append(block)
        if block.kind == "heading":
            above = block.start if above is None else above
            continue
        if block.level or above is not None or not result:
            result.append(([b.title for b in path if b.title], []))
        result[-1][1].append(Part(block.kind, block.start if above is None else above,
                                  block.start, end))
        above = None
    if above is not None:  # nothing comes below them
        result = result or [([b.title for b in path if b.title], [])]
        result[-1][1].append(Part("paragraph", above, above, len(text)))
    return [(names, _led(text, parts)) for names, parts in result]


def _led(text: str, parts: list[Part]) -> list[Part]:
    """Parts, with those that only lead to the next one ("Do this:", "**Step 1**") as its heading."""
    led: list[Part] = []
    for part in parts:
        if led and led[-1].kind == "paragraph":
            before = text[led[-1].body:led[-1].end].strip()
            if len(before) <= 100 and (before[-1] in ":：" or before[:2] == before[-2:] == "**"):
                part = part._replace(start=led.pop().start)
        led.append(part)
    return led


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


# ---------------------------------------------------------------------------- chunks

class Atom(NamedTuple):
    """What packing does not cut."""
    start: int
    end: int
    size: int  # tokens
    prefix: str  # the header, for a chunk that starts here to repeat


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
        crumb = self.crumb(names or [" ".join(clean(splitext(basename(self.doc))[0])[0].split())])
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

    def pack(self, atoms: list[Atom], crumb: str, spans: list[tuple[int, int]]) -> Iterator[Chunk]:
        """Greedily: the next atom, too, if it fits. The sum of the counts proposes, the count of
        the whole disposes, since a BPE may need more tokens for it than for its parts."""
        todo, before = atoms[::-1], None
        while todo:
            first = todo[-1]
            start = first.start if before is None else self.repeat(spans, before, first.start)
            space = self.room(crumb, first.prefix) - self.count(self.text[start:first.start])
            taken: list[Atom] = []
            while todo and (not taken or todo[-1].size <= space):
                space -= todo[-1].size
                taken.append(todo.pop())
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
            elif chunk.text:
                yield chunk
                before = start

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

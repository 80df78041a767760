"""
Markdown and plain text into blocks (headings, paragraphs, list items, fenced code, tables), and
blocks into sections with the path of headings above them, in English and Chinese.

One scan over the lines; no expression looks further than its own line, so time is linear in the
size of any text. The rules are CommonMark's where they matter for cutting a text, and front matter,
tables, headings like 第一章 and 一、. In .rst any sign underlines a heading; .py is all code.
"""
import re
from typing import NamedTuple


class Block(NamedTuple):
    kind: str  # heading, paragraph, item (of a list), code or table
    start: int  # of its first line; it ends where the next one starts
    level: int = 0  # of a heading, 1 the highest
    title: str = ""


ATX = re.compile(r" {0,3}(#{1,6})(?:[ \t]|$)")
ANCHOR = re.compile(r"\s*(?:\[\[[^]]*\]\]|\{#[^}]*\})$|(?:^|\s)#+$")  # title [[name]], title ##
NUMERAL = "[〇零一二两三四五六七八九十百千0-9]+"
CHINESE = re.compile(f"第{NUMERAL}([部篇章回节条])|[一二三四五六七八九十]+(、)"
                     "|（[一二三四五六七八九十]+(）)")
LEVELS = {"部": 2, "篇": 2, "章": 3, "回": 3, "节": 4, "条": 5, "、": 6, "）": 7}
ITEM = re.compile(r"[ \t]*(?:(?:[-*+]|\d{1,3}[.)])(?:[ \t]|$)|\d{1,3}、)")
FENCE = re.compile(r"(`{3,})[^`]*$|(~{3,})")
SIGNS = re.compile(r"([!-/:-@[-`{-~])\1+")
RULE = re.compile(r"([-*_])(?: *\1){2} *(?:\1| )*")  # --- or * * *
DELIMITER = re.compile(r"(?=[^|]*\|)(?=[^-]*-)[|:\- \t]+")  # the second line of a table, |---|:-:|


def blocks(text: str, name: str = "") -> list[Block]:
    """Blocks of a document of that name. Nothing in a fence is interpreted; an item holds the lines
    that are indented below it; a rule (---) belongs to the block before it."""
    if name.lower().endswith(".py"):
        return [Block("code", 0)] if text.strip() else []
    rst, levels = name.lower().endswith(".rst"), {}  # of its headings, by what they look like
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
        elif kind == "paragraph" and SIGNS.fullmatch(bare) and (level := _level(
                bare, text[max(found[-1].start, last - len(bare) - 2):last],
                text[last:start].strip(), levels if rst else None)):
            found[-1] = Block("heading", found[-1].start, level, text[last:start].strip()[:200])
            kind = ""
        elif mark := None if rst else FENCE.match(bare):
            fence, margin = mark[1] or mark[2], int(in_item or indent > 3)
            if not in_item:
                found.append(Block("code", start))
                kind = ""
        elif heading := None if in_item else _heading(line, start, rst):
            found.append(heading)
            kind = ""
        elif RULE.fullmatch(bare) and not in_item:
            found += [] if found else [Block("paragraph", start)]
            kind = ""
        elif kind == "paragraph" and DELIMITER.fullmatch(bare) and "|" in text[last:start]:
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


def _heading(line: str, start: int, rst: bool) -> Block | None:
    """The line as a heading: of Markdown, or numbered as in Chinese documents (第一章, 一、)."""
    if not rst and (mark := ATX.match(line)):
        title = line[mark.end():].strip()[:200]
        return Block("heading", start, len(mark[1]), ANCHOR.sub("", title))
    bare = line.strip()
    if len(bare) <= 30 and bare[-1] not in "。；，" and (mark := CHINESE.match(bare)):
        return Block("heading", start, LEVELS[mark[mark.lastindex or 0]], bare)
    return None


def _level(under: str, above: str, title: str, levels: dict | None) -> int:
    """Of the heading that the signs under a title make of it; 0 if none. In Markdown they are ===
    or ---. In .rst, with `levels`, they may be any, and stand above the title, too: what the first
    heading looks like is level 1, and each new look one level deeper."""
    if levels is None:
        return 0 if above or under[0] not in "=-" else 1 + (under[0] == "-")
    if above.strip() not in ("", under) or len(under) < min(4, len(title)) \
            or not title.strip(under[0]):
        return 0
    return levels.setdefault((under[0], above != ""), len(levels) + 1)


class Part(NamedTuple):
    """A block with the headings above it."""
    kind: str
    start: int  # of the headings
    body: int  # where they end
    end: int


def sections(text: str, name: str = "") -> list[tuple[list[str], list[Part]]]:
    """Path of headings, and parts, of each run of blocks that no heading interrupts."""
    found, result = blocks(text, name), []
    path: list[Block] = []
    above = None  # where the headings start that have no text below them yet
    for block, end in zip(found, [b.start for b in found[1:]] + [len(text)]):
        if block.level:
            path = [*(b for b in path if b.level < block.level), block]
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
    """Parts, those that only lead to the next ("Do this:", "**Step 1**") joined to it."""
    led: list[Part] = []
    for part in parts:
        if led and led[-1].kind == "paragraph":
            before = text[led[-1].body:led[-1].end].strip()
            if len(before) <= 100 and (before[-1] in ":：" or before[:2] == before[-2:] == "**"):
                part = part._replace(start=led.pop().start)
        led.append(part)
    return led

"""
How a source and its place are shown, and the check of the numbers, like [1], of an answer.
"""
import re
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from pathlib import Path

from search.index import Hit
from search.readers import PLACES
from search.topics import INVISIBLE, sentences
from tokenizer import StreamDecoder, Tokenizer

CITATION = re.compile(r"\[(\d{1,9})\]")


def shown(text: str) -> str:
    """Text of a document as a model or a terminal may see it: without invisible characters, and
    without brackets at the start of a line that would look like the number of a source."""
    text = re.sub("[\x0b\x0c\x1c-\x1e\x85\u2028\u2029]", "\n", INVISIBLE.sub("", text))
    return re.sub(r"(?m)^((?:[^\S\n]|[>*#-])*)\[[^\S\n]*(\d+)[^\S\n]*\]", r"\1(\2)", text)


def location(hit: Hit) -> str:
    """path:line  headings, or paper.pdf:p7  headings"""
    path, here = Path(hit.chunk.doc), Path.cwd()
    near = path.relative_to(here) if path.is_relative_to(here) else path
    place = PLACES.get(path.suffix.lower(), ":{}").format(hit.chunk.line)
    return shown(f"{near}{place}  {hit.chunk.crumb}").replace("\n", " ").rstrip()


def best_sentence(hit: Hit) -> str:
    """Of a source, the sentence that holds most of the question, rather no heading or question."""
    text = hit.chunk.text
    parts = [text[start:end] for start, end in sentences(text)] or [text]
    parts = [part for part in parts if part[0] != "#" and part[-1] not in "?？"] or parts
    best = shown(hit.best(parts)).strip()
    return best[:600] + "…" * (len(best) > 600)


def split_answer(reply: str) -> tuple[str, list[int]]:
    """"17 [2]." -> ("17", [2]): what a short answer says, and what it cites."""
    return CITATION.sub("", reply).strip(" .。"), [int(n) for n in CITATION.findall(reply)]


def texts_of(tokens: Iterable[list[int | None]], tok: Tokenizer) -> Iterator[str]:
    """What each token of one text adds to it."""
    decoder = StreamDecoder(tok)
    for (token,) in tokens:
        if token is not None and token not in tok.stop:
            yield decoder.push(token)
    yield decoder.flush()


def checked(pieces: Iterable[str], n_sources: int, on_text: Callable[[str], None]
            ) -> tuple[str, list[int]]:
    """(text, invalid citations). A citation is held back until it is known to name a source."""
    invalid, text, pending = [], "", ""
    for piece in chain(pieces, [None]):
        pending += piece or ""
        half = re.search(r"\[\d{0,9}$", pending) if piece is not None else None
        done = pending[:half.start()] if half else pending
        pending = pending[len(done):]
        invalid += [n for n in map(int, CITATION.findall(done)) if not 1 <= n <= n_sources]
        done = CITATION.sub(lambda m: m[0] if 1 <= int(m[1]) <= n_sources else "", done)
        text += done
        on_text(done)
    return text, invalid

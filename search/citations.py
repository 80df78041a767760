"""
Checks the numbers of sources that a model writes into an answer, like [1], while it grows; how may
be skipped.
"""
import re
from collections.abc import Callable, Iterable
from itertools import chain

from tokenizer import StreamDecoder, Tokenizer

CITATION = re.compile(r"\[(\d{1,9})\]")


def checked(tokens: Iterable[list[int | None]], tok: Tokenizer, n_sources: int,
            on_text: Callable[[str], None]) -> tuple[str, list[int]]:
    """(text, invalid citations). A citation is held back until it is known to name a source."""
    decoder, invalid, text, pending = StreamDecoder(tok), [], "", ""
    for (token,) in chain(tokens, [(None,)]):
        if token not in tok.stop:
            pending += decoder.flush() if token is None else decoder.push(token)
        half = re.search(r"\[\d{0,9}$", pending) if token is not None else None
        done = pending[:half.start()] if half else pending
        pending = pending[len(done):]
        invalid += [n for n in map(int, CITATION.findall(done)) if not 1 <= n <= n_sources]
        done = CITATION.sub(lambda m: m[0] if 1 <= int(m[1]) <= n_sources else "", done)
        text += done
        on_text(done)
    return text, invalid

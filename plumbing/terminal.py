"""
What a terminal is shown: a user's mistake ends in one line. The rest may be skipped.
"""
import sys
from typing import NoReturn


def printable(text: object) -> str:
    """Text from outside as a terminal may see it: on one line, control characters spelled out.
    printable("a\\x1b[2J") -> "a\\\\x1b[2J"."""
    return "".join(c if c.isprintable() else " " if c.isspace() else ascii(c)[1:-1]
                   for c in str(text))


def fail(message: str, code: int = 2) -> NoReturn:
    """End a script the way every mistake of a user ends it: one line on stderr, exit code 2."""
    print(printable(message), file=sys.stderr)
    raise SystemExit(code)

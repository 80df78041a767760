"""
What a terminal is shown: a mistake ends in one line, and `run(main)` starts a script so that
nothing it prints can end it. The rest may be skipped.
"""
import os
import re
import sys
from collections.abc import Callable
from io import TextIOWrapper
from typing import NoReturn

# Control characters but tab and line end, and marks that turn the direction of the text.
COMMANDS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def run(main: Callable[[], None]) -> None:
    """Start a script. A character that the terminal cannot show becomes "?"; a stream that was
    closed swallows what is printed; when whoever reads the output has had enough (`… | head`),
    the script ends quietly."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        stream = getattr(sys, name)
        if stream is None:  # closed before we started
            setattr(sys, name, open(os.devnull, mode))
        elif isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="replace")
    try:
        try:
            main()
        finally:
            sys.stdout.flush()
    except BrokenPipeError:  # what is still in the buffers must go somewhere when Python ends
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.dup2(nowhere, sys.stderr.fileno())


def printable(text: object) -> str:
    """Text from outside as a terminal may see it: on one line, control characters spelled out.
    printable("a\\x1b[2J") -> "a\\\\x1b[2J"."""
    return "".join(c if c.isprintable() else " " if c.isspace() else ascii(c)[1:-1]
                   for c in str(text))


def without_commands(text: str) -> str:
    """Text of many lines, such as a model writes, without what a terminal would obey.
    without_commands("a\\x1b[2J\\nb") -> "a[2J\\nb"."""
    return COMMANDS.sub("", text)


def fail(message: str, code: int = 2) -> NoReturn:
    """End a script the way every mistake of a user ends it: one line on stderr, exit code 2."""
    print(printable(message), file=sys.stderr)
    raise SystemExit(code)

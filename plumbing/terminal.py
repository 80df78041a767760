"""
How a script meets its terminal: starts, is stopped, ends a mistake in one line. Skip the rest.

    from plumbing.terminal import run, stop_imports
    stop_imports(__name__)      # before `import torch`, which takes seconds
    run(main)                   # nothing that main prints can end the script
"""
import errno
import json
import os
import re
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from io import TextIOWrapper
from types import FrameType
from typing import Any, NoReturn, TextIO

# Control characters but tab and line end, and marks that turn the direction of the text.
COMMANDS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def end_quietly(name: str = "__main__", trains: bool = True) -> None:
    """From now on SIGTERM and SIGINT end the process, if `name` says that it runs as a script, with
    exit code 0 and one line instead of a traceback: nothing is lost before the first step. When the
    loop begins, `runtime.StopSignals` takes over: then a signal saves a checkpoint first.
    In a script that `trains`, a thread that waits gives way after 2,000 turns, not GNU's 300,000:
    alone a step of the demo takes a sixth longer, beside a busy neighbour a tenth of the time.
    OpenMP reads that when torch is imported. What a user has set is kept."""
    if name == "__main__":
        if trains and "OMP_WAIT_POLICY" not in os.environ:
            os.environ.setdefault("GOMP_SPINCOUNT", "2000")
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, _leave)


def _leave(number: int, frame: FrameType | None) -> None:
    with suppress(OSError):  # whoever reads stderr may be gone
        os.write(2, f"stopped by {signal.Signals(number).name} before the first step: nothing is "
                    "lost, the same command starts again\n".encode())
    os._exit(0)  # not sys.exit: an import or a callback could swallow it, and the run would go on


def stop_imports(name: str) -> None:
    """Ctrl-C during the imports that follow ends the process, if `name` says that it runs as a
    script, in one line. When `run` starts, it is a KeyboardInterrupt again."""
    if name == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _stop)


def _stop(number: int, frame: FrameType | None) -> None:
    with suppress(OSError):
        os.write(2, b"stopped\n")
    os._exit(130)  # an exception could be swallowed, or turned into another, by what is imported


def run(main: Callable[[], None]) -> None:
    """Start a script. A user's mistake, a ValueError or a file that cannot be opened, ends it in
    one line. A character that the terminal cannot show becomes "?"; a stream that was closed
    swallows what is printed; a reader who has had enough (`… | head`) ends the script quietly."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        stream = getattr(sys, name)
        if stream is None:  # closed before we started
            setattr(sys, name, open(os.devnull, mode))
        elif isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="replace")
    if signal.getsignal(signal.SIGINT) is _stop:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        try:
            main()
        finally:
            sys.stdout.flush()
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except ValueError as error:
        fail(f"{error}")
    except OSError as error:
        if error.filename or not error.errno:  # write_text's says all in its text
            fail(f"{error.filename}: {error.strerror}" if error.filename else f"{error}")
        if error.errno not in (errno.EPIPE, errno.ENOSPC):
            raise  # not of what is printed
        nowhere = os.open(os.devnull, os.O_WRONLY)  # for what is still in the buffers
        os.dup2(nowhere, sys.stdout.fileno())
        if error.errno == errno.ENOSPC:
            fail(f"the output cannot be written: {error.strerror}", 3)
        os.dup2(nowhere, sys.stderr.fileno())
        if isinstance(error.__context__, SystemExit):  # a mistake keeps its exit code
            raise error.__context__ from None


def printable(text: object) -> str:
    """Text from outside as a terminal may see it: on one line, control characters spelled out.
    printable("a\\x1b[2J") -> "a\\\\x1b[2J"."""
    return "".join(c if c.isprintable() else " " if c.isspace() else ascii(c)[1:-1]
                   for c in str(text))


def show(text: str) -> None:
    """Print what a model wrote, as it is; to a terminal without what the terminal would obey:
    "a\\x1b[2J\\nb" is shown as "a[2J\\nb"."""
    print(COMMANDS.sub("", text) if sys.stdout.isatty() else text, end="", flush=True)


def show_json(record: dict) -> None:
    """Print a line of JSON: every character as it is, or as \\uXXXX where stdout is not in a UTF
    (a Chinese Windows redirects it in GBK), so that none is lost."""
    utf = "utf" in (sys.stdout.encoding or "").lower()
    print(json.dumps(record, ensure_ascii=not utf))


def say(text: object) -> None:
    """Talk goes to stderr, on one line: stdout is for the result."""
    _talk(printable(text) + "\n")


def murmur(text: str) -> None:
    """Print on stderr what a model thinks before it answers, as it is written."""
    _talk(COMMANDS.sub("", text))


def _talk(text: str) -> None:
    print(text, file=Talk(sys.stderr), end="", flush=True)


class Talk:
    """A stream that nobody need read: when its reader is gone, the script goes on in silence."""

    def __init__(self, to: TextIO, gone: type[OSError] = OSError):
        self.to, self.gone = to, gone

    def __getattr__(self, name: str) -> Any:
        return getattr(self.to, name)

    def write(self, text: str) -> None:
        self._try(partial(self.to.write, text))

    def flush(self) -> None:
        self._try(self.to.flush)

    def _try(self, job: Callable[[], Any]) -> None:
        try:
            job()
        except self.gone:
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.to.fileno())


def only_talk() -> None:
    """From now on stdout is talk too: the result of the script is a file."""
    if not isinstance(sys.stdout, Talk):  # a stream in a stream in a stream … cannot be written to
        sys.stdout = Talk(sys.stdout, BrokenPipeError)  # but a full disk is said


def ask() -> str:
    """The next line that the user types; "> " asks for it, on stderr."""
    _talk("\n> ")
    return input()


def fail(message: str, code: int = 2) -> NoReturn:
    """End a script the way every mistake of a user ends it: one line on stderr, exit code 2."""
    say(message)
    raise SystemExit(code)

"""
Which files a list of paths stands for, and small files written whole; the rest may be skipped.

    for path in split_paths("notes, 2024.txt,web/"):
        find(path, refuse)     # -> [Found(path, why), …], in a fixed order

Folders are searched with all their folders. Hidden things, what macOS leaves in archives, what is
no file (a socket, a pipe), links out of the folder and what our own scripts wrote into it are
passed over, and `Found.why` says so, for each of them. Links inside the folder are followed.
"""
import errno
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, NamedTuple

from plumbing.terminal import printable

# in a folder with token files, rows of chats, checkpoints or a search index
OURS = re.compile(r"(train|val)(_.*\.bin(\.part)?|\.words)|step\d+-[0-9a-f]+\.pt|starts-.*\.u64")
CLUTTER = {"__MACOSX": "left by macOS in an archive", "__pycache__": "made by Python"}


class Found(NamedTuple):
    path: str  # as it was typed, and as it was found from there
    why: str = ""  # why it is passed over; "" if it is not

    def __str__(self) -> str:
        return f"skipped {printable(self.path)}: {self.why}"


def split_paths(paths: str) -> list[str]:
    """The paths of a comma-separated list, ~ expanded. "a,b" is one path if it exists as such."""
    parts, found = paths.split(","), []
    while parts:
        names = [os.path.expanduser(",".join(parts[:n]).strip()) for n in range(len(parts), 0, -1)]
        path = next(filter(os.path.exists, names), names[-1])
        del parts[:len(parts) - names.index(path)]
        found.append(path)
    return [path for path in found if path]


def find(path: str, refuse: Callable[[str], str]) -> list[Found]:
    """The file, or everything in the folder, in a fixed order. `refuse` says why a file is of no
    use, or "". Raises ValueError for a path that is not there."""
    if not os.path.exists(path):
        raise ValueError(f"{printable(path)}: no such file or folder")
    if os.path.isdir(path):
        return sorted(search(path, refuse))
    return [Found(path, refuse(path) if os.path.isfile(path) else "not a file")]


def search(root: str, refuse: Callable[[str], str]) -> list[Found]:
    """Everything in a folder, in no order."""
    found: list[Found] = []
    home, waiting, entered = os.path.realpath(root), [root], set()
    while waiting:
        folder = waiting.pop()
        real = os.path.realpath(folder)
        if real in entered:  # a link led there before
            continue
        entered.add(real)
        try:
            entries = list(os.scandir(folder))
        except OSError as error:
            found.append(Found(folder, error.strerror or "cannot be read"))
            continue
        if folder != root and any(OURS.fullmatch(entry.name) for entry in entries):
            found.append(Found(folder, "made by a script of this project"))
            continue
        for entry in entries:
            path = entry.path
            why = unwanted(entry, home)
            if not why and os.path.isdir(path):
                waiting.append(path)
            else:
                found.append(Found(path, why or refuse(path) or own_file(path)))
    return found


def unwanted(entry: os.DirEntry, home: str) -> str:
    """Why something in the folder `home` is no text of its owner's, or ""."""
    name, path = entry.name, entry.path
    if name in CLUTTER or name.startswith("."):
        return CLUTTER.get(name, "hidden")
    if name != name.encode(errors="replace").decode():
        return "its name is not UTF-8"
    if entry.is_symlink() and not Path(os.path.realpath(path)).is_relative_to(home):
        return "a link out of the folder"
    there = entry.is_file(follow_symlinks=False) or os.path.isfile(path) or os.path.isdir(path)
    return "" if there else "not a file"


def own_file(path: str) -> str:
    """Why a text file is one of ours and no text of its owner's, or ""."""
    try:
        with open(path, "rb") as f:
            head = f.read(20)
    except OSError as error:
        return error.strerror or "cannot be read"
    log = os.path.basename(path) == "log.jsonl" and head.startswith(b'{"step"')
    ours = log or head.startswith(b'{"khaosz_tokenizer"')
    return "made by a script of this project" if ours else ""


def read_text(path: str) -> str:
    """The text of a UTF-8 file; - is standard input. Raises ValueError naming it."""
    try:
        with open(0 if path == "-" else path, encoding="utf-8-sig") as f:
            return f.read()
    except (OSError, UnicodeDecodeError) as error:
        name = "standard input" if path == "-" else path
        raise ValueError(f"{name}: {getattr(error, 'strerror', None) or error}") from None


def write_text(path: str | Path, text: str) -> None:
    """Write a small file whole or not at all, also in a crash. Raises OSError with the reason."""
    try:
        with whole(path) as temporary, open(temporary, "w", encoding="utf-8", newline="\n") as f:
            f.write(text)
            f.flush()
            os.fsync(f.fileno())
    except OSError as error:
        raise OSError(f"{path} was not written: {error.strerror}") from None


@contextmanager
def whole(path: str | Path) -> Iterator[Path]:
    """A name to write a large file under. It takes its place at the end, or goes with an error."""
    temporary = Path(f"{path}.tmp")
    try:
        yield temporary
        put_in_place(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def locked(folder: str | Path, who: str) -> IO:
    """Make a folder, and lock it until the file that is returned is closed or this process ends.
    Raises ValueError if another `who` holds it: both would write there. (Not on Windows.)"""
    os.makedirs(folder, exist_ok=True)
    held = open(Path(folder, ".lock"), "w")
    with suppress(ImportError):
        import fcntl
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            raise ValueError(f"{folder}: another {who} is writing to it") from None
    return held


def check_place(path: str) -> None:
    """Make the folder of a file to be written. Raises ValueError, before any work is done that
    would be lost, if no file can be written there, or one of somebody else would be replaced."""
    try:
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        if os.path.isdir(path) or os.path.exists(path) and not os.path.isfile(path):
            raise ValueError(f"{path}: there is something that is no file")
        if os.path.exists(path) and os.path.getsize(path) and not own_file(path):
            raise ValueError(f"{path}: this project has not written that file: give another place")
        open(f"{path}.tmp", "a").close()
        os.unlink(f"{path}.tmp")
    except OSError as error:
        raise ValueError(f"{error.filename}: {error.strerror}") from None


def put_in_place(temporary: str | Path, path: str | Path) -> None:
    """Give a file that is whole its name, so that a crash leaves the old file or the new one."""
    if os.path.exists(path) and not os.path.isfile(path):  # /dev/null would become a file
        raise OSError(errno.EEXIST, "there is something that is no file", str(path))
    os.replace(temporary, path)
    if os.name == "posix":  # elsewhere a folder cannot be opened
        folder = os.open(Path(path).parent, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)

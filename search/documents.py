"""
Files and folders to search: what is read, what passed over, how an index keeps in step with them.

    with Index("out/rag", writable=True) as index:
        print(update(index, ["notes/", "manual.md"], cut))     # {"new": 12, "changed": 1, …}
        remove(index, ["manual.md"])

A line of a .jsonl file is a document of its own, its "text" under its "title". What is not read is
named. readers.py makes text of a file's bytes, segment.py chunks of a text.
"""
import hashlib
import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

from plumbing.corpus import LineError, parse_object
from plumbing.files import Found, find
from plumbing.jobs import Progress
from plumbing.terminal import printable
from search.index import Index
from search.readers import READERS, decode, parts
from search.segment import Chunk, clean

SUFFIXES = (".md", ".markdown", ".txt", ".rst", ".py", ".json", ".jsonl", *READERS)
FATES = ("new", "changed", "unchanged", "gone", "unreadable", "read as GB18030",
         "characters replaced", "chunks embedded")  # what is told of an update
COMMIT_CHUNKS = 5000  # an interrupted run loses no more than so many
PIECE = re.compile(r"[^\W\u3400-\u9fff\uf900-\ufaff_]{1,16}|([^\w\s])\1{0,15}|\S")  # 40 kB are many
Cut = Callable[[str, str], list[Chunk]]  # segment.split with its settings: text, name -> chunks


def count_pieces(text: str) -> int:
    """Words, Han characters and signs (==== is one): the length of a text without a tokenizer."""
    return sum(1 for _ in PIECE.finditer(text))


def find_documents(paths: list[str], max_file_mb: int = 50,
                   index: str = "") -> tuple[list[Path], list[str]]:
    """(files by their real paths, a line for whatever is passed over). Raises ValueError for a path
    that is not there or is the folder of the index."""
    real_folder = lru_cache(os.path.realpath)  # a folder holds many files

    def real(path: str) -> str:
        folder, name = os.path.split(path)
        return os.path.realpath(path) if os.path.islink(path) else os.path.join(
            real_folder(folder), name)

    def refuse(path: str) -> str:
        if real(path) != real(path).encode(errors="replace").decode():
            return "its name is not UTF-8"
        if not path.lower().endswith(SUFFIXES):
            return "convert to text first"
        try:
            large = os.path.getsize(path) > max_file_mb << 20
        except OSError as error:  # gone since the folder was listed
            return error.strerror or "cannot be read"
        return f"more than --max_file_mb={max_file_mb}" if large else ""

    found: list[Found] = []
    for path in map(os.path.expanduser, paths):
        if index and os.path.realpath(path) == os.path.realpath(index):
            raise ValueError(f"{path}: the index is in this folder; give another as --index")
        found += find(path, refuse)
    files = dict.fromkeys(Path(real(one.path)) for one in found if not one.why)
    return list(files), [str(one) for one in found if one.why]


def read_document(path: Path, raw: bytes, cut: Cut) -> tuple[list[Chunk], Counter[str]]:
    """(the chunks of a file, how often what had to be mended or guessed). A chunk of a .jsonl file
    counts its places within the "text", and its line is that of the file; one of a PDF or a book
    counts within its page, whose number is the line. Raises ValueError."""
    chunks, met = [], Counter()

    def cleaned(text: str) -> str:
        text, replaced = clean(text)
        met["characters replaced"] += replaced
        return text

    if path.suffix.lower() in READERS:
        for number, text in parts(str(path), raw):
            chunks += [replace(c, line=number) for c in cut(cleaned(text), str(path))]
        return chunks, met
    text, codec = decode(raw)
    text, met["read as GB18030"] = cleaned(text), int(codec == "gb18030")  # which no mark says
    if path.suffix.lower() != ".jsonl":
        return cut(text, str(path)), met
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = parse_object(line)
        except LineError as error:
            raise ValueError(f"line {number}: {': '.join(filter(None, error.args[1:3]))}") from None
        body, title = row.get("text"), row.get("title") or str(path)
        if not isinstance(body, str):
            raise ValueError(f'line {number}: not an object with a "text"')
        if not isinstance(title, str):
            raise ValueError(f'line {number}: "title" must be a string')
        chunks += [replace(c, doc=str(path), line=number) for c in cut(cleaned(body), title)]
    return chunks, met


def chunks_of(paths: list[str], cut: Cut, max_file_mb: int = 50) -> Iterator[Chunk]:
    """The chunks of all files. What is passed over is said on stderr, in a line each."""
    files, skipped = find_documents(paths, max_file_mb)
    print("".join(f"{line}\n" for line in skipped), end="", file=sys.stderr)
    for path in files:
        try:
            chunks, met = read_document(path, path.read_bytes(), cut)
            if met["read as GB18030"]:
                print(f"{printable(path)}: read as GB18030", file=sys.stderr)
            yield from chunks
        except (OSError, ValueError) as error:
            print(Found(str(path), getattr(error, "strerror", None) or str(error)),
                  file=sys.stderr)


def update(index: Index, paths: list[str], cut: Cut, how: str = "", max_file_mb: int = 50
           ) -> dict[str, int]:
    """Make an index what its documents are now: files at the paths are taken in, those that came in
    earlier, from anywhere, are read again if they have changed and forgotten if they are gone. What
    is unchanged costs no more than reading it. `how` names the settings of `cut`: with others, all
    files count as changed. Returns the number of files by what became of them. Raises ValueError
    for a path that is not there; OSError when the index cannot be written: it stays as it was."""
    files, gone, skipped = find_again(index, paths, max_file_mb)
    print("".join(f"{line}\n" for line in skipped), end="")
    counts, progress = Counter(dict.fromkeys(FATES, 0) | {"gone": len(gone)}), Progress(sys.stderr)
    refused = set(filter(os.path.exists, index.manifest["refused"]))
    stamps = dict(index.manifest["stamps"])
    folders = [os.path.realpath(path) for path in map(os.path.expanduser, paths)]
    folders = list(filter(os.path.isdir, folders + index.manifest["folders"]))
    index.note(folders, refused, stamps)
    for name in gone:
        print(f"forgotten: {printable(name)}")
        index.remove(name)
    try:
        for i, path in enumerate(files):
            progress.show(f"{i:,}/{len(files):,} files, {len(index):,} chunks")
            name, before = str(path), index.manifest["documents"].get(str(path))
            try:
                stamps[name] = path.stat().st_mtime_ns
                raw = path.read_bytes()
                sha = hashlib.sha256(how.encode() + b"\0" + raw).hexdigest()
                if before and before[0] == sha:
                    counts["unchanged"] += 1
                    continue
                chunks, met = read_document(path, raw, cut)
                if raw and not chunks:
                    raise ValueError("no text in it")
            except (OSError, ValueError) as error:
                progress.end()
                print(Found(name, getattr(error, "strerror", None) or str(error)))
                index.remove(name)
                refused.add(name)
                stamps.setdefault(name, 0)  # it may be well another time: see `unread`
                counts["unreadable"] += 1
                continue
            counts.update(met)
            counts["changed" if before else "new"] += 1
            refused.discard(name)
            index.put(name, sha, chunks)
            if len(index.new) >= COMMIT_CHUNKS:
                counts["chunks embedded"] += index.commit()
    except KeyboardInterrupt:
        progress.end()
        print("stopped: what was read is kept, and the same command goes on", file=sys.stderr)
    progress.end()
    index.note(folders, refused, stamps)
    counts["chunks embedded"] += index.commit()
    return counts


def find_again(index: Index, paths: list[str],
               max_file_mb: int) -> tuple[list[Path], list[str], list[str]]:
    """(the files at the paths, and those that came in earlier or could not be read, from anywhere;
    the names of those that are gone; a line for whatever is passed over)"""
    earlier = [name for name, (sha, *_) in index.manifest["documents"].items() if sha]
    paths = [path for path in paths if os.path.exists(os.path.expanduser(path))
             or not within(path, earlier)]  # else it is gone, and to be forgotten
    files, skipped = find_documents(paths, max_file_mb, str(index.folder))
    others = {*earlier, *unread(index)}.difference(map(str, files))
    more, passed = find_documents(sorted(filter(os.path.isfile, others)), max_file_mb)
    return files + more, sorted(set(earlier).difference(map(str, files + more))), skipped + passed


def remove(index: Index, paths: list[str]) -> int:
    """Forget the documents at these paths and in these folders, whether they are still there or
    not. Returns how many. Raises ValueError for a path at which the index has none."""
    gone = 0
    for path in paths:
        there = {*within(path, [*index.manifest["documents"], *unread(index)])}
        folders = within(path, index.manifest["folders"])
        if not there and not folders:
            raise ValueError(f"{path}: the index has nothing of it; see python rag.py info")
        for name in there:
            index.remove(name)
        gone += len(there)
        index.note({*index.manifest["folders"]}.difference(folders),
                   there.union(index.manifest["refused"]),
                   {name: at for name, at in index.manifest["stamps"].items() if name not in there})
    index.compact()  # no text of theirs stays on the disk
    return gone


def within(path: str, documents: Iterable[str]) -> list[str]:
    """Those that are this file or in this folder, whether it is still there or not."""
    place = os.path.realpath(os.path.expanduser(path))
    return [name for name in documents if Path(name).is_relative_to(place)]


def forget_gone(index: Index, max_file_mb: int = 50) -> tuple[int, int, int]:
    """How many documents are gone since the index was written, how many files changed, readable or
    not, and how many came into the folders that were added. No search finds the documents that are
    gone, until the index is opened again."""
    known, stamps, gone, changed = index.manifest["documents"], index.manifest["stamps"], 0, 0
    for name in [*(name for name, row in known.items() if row[0]), *unread(index)]:
        try:
            now = os.stat(name).st_mtime_ns
            changed += now != stamps.get(name, now)
        except (FileNotFoundError, NotADirectoryError):
            gone += name in known
            index.remove(name)
        except OSError:  # it cannot be told
            pass
    return gone, changed, len(newcomers(index, max_file_mb))


def unread(index: Index) -> list[str]:
    """Files that could not be read. What was removed on purpose bears no time, and is none."""
    return [name for name in index.manifest["refused"] if name in index.manifest["stamps"]]


def newcomers(index: Index, max_file_mb: int = 50) -> list[str]:
    """Files that came into the folders that were added. What was removed on purpose is none."""
    there, _ = find_documents(list(filter(os.path.isdir, index.manifest["folders"])), max_file_mb)
    known = {*index.manifest["documents"], *index.manifest["refused"]}
    return [str(path) for path in there if str(path) not in known]

"""
Files and folders as documents to search: what is read, what is passed over, and how an index is
kept in step with them.

    with Index("out/rag", writable=True) as index:
        print(update(index, ["notes/", "manual.md"], cut))     # {"new": 12, "changed": 1, …}
        remove(index, ["manual.md"])

A line of a .jsonl file is a document of its own, its "text" under its "title". UTF-8 is read,
UTF-16 and UTF-32 with their mark, and GB18030 that can only be Chinese; what is not read is named.
"""
import codecs
import hashlib
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

from plumbing.corpus import LineError, parse_object
from plumbing.files import Found, find
from plumbing.jobs import Progress
from plumbing.terminal import printable
from search.index import Index
from search.readers import READERS, parts
from search.segment import Chunk, clean

SUFFIXES = (".md", ".markdown", ".txt", ".rst", ".py", ".json", ".jsonl", *READERS)
COMMIT_CHUNKS = 5000  # an interrupted run loses no more than so many
PIECE = re.compile(r"[^\W\u3400-\u9fff\uf900-\ufaff_]{1,16}|([^\w\s])\1{0,15}|\S")  # 40 kB are many
MARKS = {codecs.BOM_UTF32_LE: "utf-32", codecs.BOM_UTF32_BE: "utf-32", codecs.BOM_UTF8: "utf-8",
         codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}  # 32 LE begins as 16 LE does
FREQUENT = frozenset(  # the 200 characters that make up half of any Chinese text
    "的一是不了在人有我他这个们中来上大为和国地到以说时要就出会可也你对生能而子那得于着下自之年过发后作里用道行"
    "所然家种事成方多经么去法学如都同现当没动面起看定天分还进好小部其些主样理心她本前开但因只从想实日军者意无力"
    "它与长把机十民第公此已工使情明性知全三又关点正业外将两高间由问很最重并物手应战向头文体政美相见被利什二等产"
    "或新己制身果加西斯月话合回特代内信表化老给世位次度门任常先海通教儿原东声提立及比员")
OTHER = re.compile("[\0-\x08\x0e-\x1f\x7f-\x9f\u3040-\u30ff\ue000-\uf8ff]")  # not in Chinese text
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


def encoding_of(raw: bytes) -> str:
    """The name of the codec that reads a file. Raises ValueError, with the place of the first byte
    that does not fit, for what is no text or is in an encoding that cannot be told."""
    for mark, name in MARKS.items():
        if raw.startswith(mark):
            try:
                raw.decode(name)
                return name
            except UnicodeDecodeError as error:
                raise ValueError(f"not {name.upper()} at byte {error.start}, as its first bytes "
                                 "say") from None
    if b"\0" in raw[:8192]:
        raise ValueError("binary, or UTF-16 or UTF-32 without the mark that says so")
    try:
        if b"\x1b$" in raw:
            raise ValueError("ISO-2022, it seems: convert it to UTF-8 first")
        raw.decode()
        return "utf-8"
    except UnicodeDecodeError as error:
        if sum(byte >= 0xc0 for byte in raw[max(0, error.start - 10_000):error.start]) >= 10:
            raise ValueError(f"damaged UTF-8 at byte {error.start}") from None
        if is_chinese(raw):
            return "gb18030"
        raise ValueError(f"not UTF-8 at byte {error.start}, nor plainly GB18030: convert it first, "
                         "with iconv -f ENCODING -t UTF-8") from None


def is_chinese(raw: bytes) -> bool:
    """Is this GB18030? Nearly any bytes are valid GB18030. But in Big5 or in French that is misread
    so, the most frequent characters of Chinese are rare. Korean looks like it and has a test."""
    try:
        text = raw.decode("gb18030")
    except UnicodeDecodeError:
        return False
    letters = re.sub("[\0-\x7f、。《》（），！？：；“”‘’]+", "", text)
    korean = re.findall("[\uac00-\ud7a3]", raw.decode("euc_kr", "replace"))
    frequent = sum(letter in FREQUENT for letter in letters)
    plain = frequent >= 1 + 0.15 * len(letters) and len(korean) < 0.9 * len(letters)
    return plain and not OTHER.search(text)


def decode(raw: bytes) -> str:
    return raw.decode(encoding_of(raw))


def is_guessed(path: Path, raw: bytes) -> bool:
    """Whether a file is read as GB18030, which no mark says."""
    return path.suffix.lower() not in READERS and encoding_of(raw) == "gb18030"


def read_document(path: Path, raw: bytes, cut: Cut) -> tuple[list[Chunk], int]:
    """(the chunks of a file, how many characters had to be replaced). A chunk of a .jsonl file
    counts its places within the "text", and its line is that of the file; one of a PDF or a book
    counts within its page, whose number is the line. Raises ValueError."""
    chunks: list[Chunk] = []
    if path.suffix.lower() in READERS:
        pages = [(number, *clean(text)) for number, text in parts(str(path), raw)]
        for number, text, _ in pages:
            chunks += [replace(chunk, line=number) for chunk in cut(text, str(path))]
        return chunks, sum(replaced for *_, replaced in pages)
    text, replaced = clean(decode(raw))
    if path.suffix.lower() != ".jsonl":
        return cut(text, str(path)), replaced
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = parse_object(line)
        except LineError as error:
            raise ValueError(f"line {number}: {': '.join(filter(None, error.args[1:3]))}") from None
        if not isinstance(row.get("text"), str):
            raise ValueError(f'line {number}: not an object with a "text"')
        body, more = clean(row["text"])
        replaced += more
        title = row.get("title") or str(path)
        if not isinstance(title, str):
            raise ValueError(f'line {number}: "title" must be a string')
        chunks += [replace(c, doc=str(path), line=number) for c in cut(body, title)]
    return chunks, replaced


def chunks_of(paths: list[str], cut: Cut, max_file_mb: int = 50) -> Iterator[Chunk]:
    """The chunks of all files. What is passed over is said on stderr, in a line each."""
    files, skipped = find_documents(paths, max_file_mb)
    print("".join(f"{line}\n" for line in skipped), end="", file=sys.stderr)
    for path in files:
        try:
            if is_guessed(path, raw := path.read_bytes()):
                print(f"{printable(path)}: read as GB18030", file=sys.stderr)
            yield from read_document(path, raw, cut)[0]
        except (OSError, ValueError) as error:
            print(Found(str(path), "", getattr(error, "strerror", None) or str(error)),
                  file=sys.stderr)


def update(index: Index, paths: list[str], cut: Cut, how: str = "", max_file_mb: int = 50
           ) -> dict[str, int]:
    """Make an index what its documents are now: files at the paths are taken in, those that came in
    earlier, from anywhere, are read again if they have changed and forgotten if they are gone. What
    is unchanged costs no more than reading it. `how` names the settings of `cut`: with others, all
    files count as changed. Returns the number of files by what became of them. Raises ValueError
    for a path that is not there; OSError when the index cannot be written: it stays as it was."""
    known, progress = index.manifest["documents"], Progress(sys.stderr)
    stamps = dict(index.manifest["stamps"])
    folders = [os.path.realpath(path) for path in map(os.path.expanduser, paths)]
    folders = list(filter(os.path.isdir, folders + index.manifest["folders"]))
    earlier = [name for name, row in known.items() if row[0]]  # those that were read from a file
    paths = [path for path in paths if os.path.exists(os.path.expanduser(path))
             or not within(path, earlier)]  # a path that is gone is known: it is forgotten
    files, skipped = find_documents(paths, max_file_mb, str(index.folder))
    gone = set(earlier).difference(map(str, files))
    more, passed = find_documents(sorted(filter(os.path.isfile, gone)), max_file_mb)
    files += more
    print("".join(f"{line}\n" for line in (*skipped, *passed)), end="")
    counts = dict.fromkeys(("new", "changed", "unchanged", "gone", "unreadable", "read as GB18030",
                            "characters replaced", "chunks embedded"), 0)
    refused = set(filter(os.path.exists, index.manifest["refused"])).difference(map(str, files))
    index.note(folders, refused, stamps)
    for name in sorted(gone.difference(map(str, more))):
        print(f"forgotten: {printable(name)}")
        index.remove(name)
        counts["gone"] += 1
    try:
        for i, path in enumerate(files):
            progress.show(f"{i:,}/{len(files):,} files, {len(index):,} chunks")
            name, before = str(path), known.get(str(path))
            try:
                stamps[name] = path.stat().st_mtime_ns
                raw = path.read_bytes()
                sha = hashlib.sha256(how.encode() + b"\0" + raw).hexdigest()
                if before and before[0] == sha:
                    counts["unchanged"] += 1
                    continue
                chunks, replaced = read_document(path, raw, cut)
            except (OSError, ValueError) as error:
                progress.end()
                print(Found(name, "", getattr(error, "strerror", None) or str(error)))
                index.remove(name)
                refused.add(name)
                counts["unreadable"] += 1
                continue
            counts["characters replaced"] += replaced
            counts["read as GB18030"] += is_guessed(path, raw)
            counts["changed" if before else "new"] += 1
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


def remove(index: Index, paths: list[str]) -> int:
    """Forget the documents at these paths and in these folders, whether they are still there or
    not. Returns how many. Raises ValueError for a path at which the index has none."""
    before = len(index.manifest["documents"])
    for path in paths:
        there = within(path, index.manifest["documents"])
        folders = within(path, index.manifest["folders"])
        if not there and not folders:
            raise ValueError(f"{path}: the index has nothing of it; see python rag.py info")
        for name in there:
            index.remove(name)
        index.note({*index.manifest["folders"]}.difference(folders),
                   index.manifest["refused"] + there, index.manifest["stamps"])
    index.commit()
    return before - len(index.manifest["documents"])


def within(path: str, documents: Iterable[str]) -> list[str]:
    """Those that are this file or in this folder, whether it is still there or not."""
    place = os.path.realpath(os.path.expanduser(path))
    return [name for name in documents if Path(name).is_relative_to(place)]


def forget_gone(index: Index, max_file_mb: int = 50) -> tuple[int, int, int]:
    """How many documents are gone and how many changed since the index was written, and how many
    files came into the folders that were added. No search finds the documents that are gone, until
    the index is opened again."""
    stamps, gone, changed = index.manifest["stamps"], [], 0
    for name in (name for name, row in index.manifest["documents"].items() if row[0]):
        try:
            now = os.stat(name).st_mtime_ns
            changed += now != stamps.get(name, now)
        except (FileNotFoundError, NotADirectoryError):
            gone.append(name)
        except OSError:  # it cannot be told
            pass
    for name in gone:
        index.remove(name)
    return len(gone), changed, len(newcomers(index, max_file_mb))


def newcomers(index: Index, max_file_mb: int = 50) -> list[str]:
    """Files that came into the folders that were added. What was removed on purpose is none."""
    there, _ = find_documents(list(filter(os.path.isdir, index.manifest["folders"])), max_file_mb)
    known = {*index.manifest["documents"], *index.manifest["refused"]}
    return [str(path) for path in there if str(path) not in known]

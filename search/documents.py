"""
Files and folders as documents to search: what is read, what is passed over, and how an index is
kept in step with them.

    with Index("out/rag", writable=True) as index:
        print(update(index, ["notes/", "manual.md"], cut))     # {"new": 12, "changed": 1, …}

UTF-8, UTF-16 with its mark, and GB18030 are read. A line of a .jsonl file is a document of its own,
its "text" under its "title". Links are not followed out of a folder, hidden folders not entered.
"""
import hashlib
import json
import os
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from plumbing.jobs import Progress
from search.index import Index
from search.segment import Chunk, clean

SUFFIXES = (".md", ".markdown", ".txt", ".rst", ".py", ".json", ".jsonl")
COMMIT_CHUNKS = 5000  # an interrupted run loses no more than so many
PIECE = re.compile(r"[^\W\u3400-\u9fff\uf900-\ufaff_]+|\S")
Cut = Callable[[str, str], list[Chunk]]  # segment.split with its settings: text, name -> chunks


def count_pieces(text: str) -> int:
    """Words, Han characters and signs: the length of a text where there is no tokenizer."""
    return sum(1 for _ in PIECE.finditer(text))


def as_utf8(text: str) -> str:
    """With ? for what a file name can hold and UTF-8 cannot."""
    return text.encode(errors="replace").decode()


def find_documents(paths: list[str], max_file_mb: int = 50,
                   but: str = "") -> tuple[list[tuple[Path, str]], list[str]]:
    """[(file, the folder it was found through, or "")], and a line for whatever is passed over. The
    folder `but` is not entered. Raises ValueError for a path that is not there or is `but`."""
    found: dict[Path, str] = {}
    skipped: list[str] = []

    def take(path: Path, root: str) -> None:
        try:
            accept(path, root, Path(os.path.realpath(path)))
        except OSError as error:  # gone since the folder was listed
            refuse(error)

    def accept(path: Path, root: str, real: Path) -> None:
        if str(path) != as_utf8(str(path)):
            skipped.append(f"skipped {path}: its name is not UTF-8")
        elif root and not real.is_relative_to(root):
            skipped.append(f"skipped {path}: a link out of the folder")
        elif path.suffix.lower() not in SUFFIXES:
            skipped.append(f"skipped {path}: convert to text first"
                           + (" (for instance with pdftotext)" if path.suffix == ".pdf" else ""))
        elif not real.is_file():
            skipped.append(f"skipped {path}: not a file")
        elif real.stat().st_size > max_file_mb << 20:
            skipped.append(f"skipped {path}: more than --max_file_mb={max_file_mb}")
        else:
            found.setdefault(real, root)

    def pass_over(path: Path) -> str:
        if but and path == Path(but).resolve():
            return "the index"
        if any(path.glob("starts-*.u64")):  # its chunks would be found beside what they are from
            return "another index"
        return "a link to a folder" if path.is_symlink() else (
            "hidden" if path.name.startswith(".") else "")

    def refuse(error: OSError) -> None:
        skipped.append(f"skipped {error.filename}: {error.strerror}")

    for name in paths:
        if not os.path.exists(name):
            raise ValueError(f"{name}: no such file or folder")
        if os.path.isfile(name):
            take(Path(name), "")
            continue
        root = str(Path(name).resolve())
        if but and root == str(Path(but).resolve()):
            raise ValueError(f"{name}: the index is in this folder; give another as --index")
        for folder, folders, names in os.walk(root, onerror=refuse):
            why = {inside: pass_over(Path(folder, inside)) for inside in sorted(folders)}
            skipped += [f"skipped {Path(folder, inside)}: {reason}"
                        for inside, reason in why.items() if reason]
            folders[:] = [inside for inside, reason in why.items() if not reason]
            for inside in sorted(names):
                take(Path(folder, inside), root)
    return list(found.items()), skipped


def decode(raw: bytes) -> str:
    """Raises ValueError with the place of a byte that fits no encoding. Damaged UTF-8 can be valid
    GB18030, of no meaning: so that is not tried where ten good characters stand before."""
    if raw.startswith((b"\xff\xfe", b"\xfe\xff")):
        try:
            return raw.decode("utf-16")
        except UnicodeDecodeError as error:
            raise ValueError(f"not UTF-16 at byte {error.start}, as its first two say") from None
    if b"\0" in raw[:8192]:
        raise ValueError("binary")
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        if sum(byte >= 0xc0 for byte in raw[max(0, error.start - 10_000):error.start]) >= 10:
            raise ValueError(f"damaged UTF-8 at byte {error.start}") from None
        try:
            return raw.decode("gb18030")
        except UnicodeDecodeError:
            raise ValueError(f"neither UTF-8 nor GB18030 at byte {error.start}") from None


def read_document(path: Path, raw: bytes, cut: Cut) -> tuple[list[Chunk], int]:
    """(the chunks of a file, how many characters had to be replaced). A chunk of a .jsonl file
    counts its places within the "text", and its line is that of the file. Raises ValueError."""
    text, replaced = clean(decode(raw))
    if path.suffix.lower() != ".jsonl":
        return cut(text, str(path)), replaced
    chunks: list[Chunk] = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"line {number}: {error}") from None
        if not isinstance(row, dict) or not isinstance(row.get("text"), str):
            raise ValueError(f'line {number}: not an object with a "text"')
        body, more = clean(row["text"])
        replaced += more
        title = row.get("title")
        named = title if isinstance(title, str) and title else str(path)
        chunks += [replace(c, doc=str(path), line=number) for c in cut(body, named)]
    return chunks, replaced


def update(index: Index, paths: list[str], cut: Cut, how: str = "", max_file_mb: int = 50
           ) -> dict[str, int]:
    """Bring an index up to date with files and folders: new and changed files are read, files gone
    from a folder are forgotten, the others cost no more than reading them. `how` names the settings
    of `cut`: with others, every file counts as changed. Returns the number of files by what became
    of them. Raises ValueError for a path that is not there; OSError when the index cannot be
    written, which is then as it was at the last commit."""
    files, skipped = find_documents(paths, max_file_mb, str(index.folder))
    print(as_utf8("".join(f"{line}\n" for line in skipped)), end="")
    counts = dict.fromkeys(("new", "changed", "unchanged", "gone", "unreadable", "embedded",
                            "replaced"), 0)
    known, progress = index.manifest["documents"], Progress()
    roots = {str(Path(name).resolve()) for name in paths if os.path.isdir(name)}
    here = {str(path) for path, _ in files}
    for document in [name for name, row in known.items() if name not in here and row[3] in roots]:
        index.remove(document)
        counts["gone"] += 1
    try:
        for i, (path, root) in enumerate(files):
            progress.show(f"{i:,}/{len(files):,} files, {len(index):,} chunks")
            try:
                raw = path.read_bytes()
                sha = hashlib.sha256(how.encode() + b"\0" + raw).hexdigest()
                if str(path) in known and known[str(path)][0] == sha:
                    counts["unchanged"] += 1
                    continue
                chunks, replaced = read_document(path, raw, cut)
            except (OSError, ValueError) as error:
                progress.end()
                print(f"skipped {path}: {getattr(error, 'strerror', None) or error}")
                counts["unreadable"] += 1
                continue
            counts["replaced"] += replaced
            counts["changed" if str(path) in known else "new"] += 1
            index.put(str(path), sha, chunks, root)
            if index.waiting() >= COMMIT_CHUNKS:
                counts["embedded"] += index.commit()
    except KeyboardInterrupt:
        progress.end()
        print("stopped: what was read is kept, and the same command goes on", file=sys.stderr)
    progress.end()
    counts["embedded"] += index.commit()
    if len(index.manifest["dead"]) > 0.3 * index.manifest["chunks"]:
        index.compact()
    return counts

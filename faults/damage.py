"""
Rows of the scoreboard (`python -m faults`) about files: processes killed at any moment, damage on the
disk, and disks that are full. Each function says in its docstring what it does and with which
deliberate break it was seen to fail.
"""
import contextlib
import io
import resource
import shutil
import signal
import subprocess
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from random import Random

import numpy as np

from plumbing import checkpoint
from plumbing import corpus
import data
from search import embed
from plumbing import examples, jobs as work, tokenfiles
from demo import world
from search.documents import count_pieces, update
from faults.lab import (STAGES, Lab, Result, Run, crash_everywhere, damaged, die_after_save, newest,
                    same_bits, same_run, side_by_side, spoil)
from search.index import Index
from search.segment import split
from tokenizer import load_tokenizer


def kill_storm(lab: Lab, kills: int = 300) -> Result:
    """SIGKILL at random moments from the first instruction of main() on, each life resuming where
    the last one was shot, until the run ends; then the next of the five stages. After each kill
    every checkpoint is read back; at the end losses, weights and moments are compared bit by bit
    with a run that nothing disturbed. Seen to fail when checkpoint.save wrote in place, and when
    the optimizer was not restored."""
    def storm(stage: str) -> list[int]:
        """Kills, runs, corrupt checkpoints, runs that differ."""
        r, done, runs, corrupt, differ = Random(stage), 0, 0, 0, 0
        expected, seconds = lab.whole(stage, max_steps=12)
        while done < kills / len(STAGES):
            out, patience = lab.new("storm"), 0.4 * seconds
            while True:
                run = lab.start(stage, out, resume=True, max_steps=12)
                if run.ends(r.uniform(0.002, patience)):
                    break
                run.send(signal.SIGKILL)
                run.wait()
                done += 1
                patience *= 1.02  # a run must end some time, even on a busy machine
                corrupt += len(damaged(out))
            differ += run.code != 0 or not same_run(out, expected)
            runs += 1
            shutil.rmtree(out)
        return [done, runs, corrupt, differ]

    found = side_by_side([partial(storm, stage) for stage in STAGES])
    done, runs, corrupt, differ = map(sum, zip(*found))
    return (f"{done:,} kills in {runs:,} runs: {corrupt} corrupt checkpoints, {differ} runs that "
            "differ by a bit", not corrupt and not differ)


def crash_at_every_call(lab: Lab, every: int = 1) -> Result:
    """A child dies at its k-th call that touches the disk, for every k, once between two calls and
    once in the middle of a write: while a checkpoint is saved (the older one is there), while
    data.py makes token shards, while examples.py makes the rows of a chat file, and while notes are
    brought up to date in a search index with vectors. Whatever makes files can be tried so: give
    `crash_everywhere` the operation. Seen to fail when checkpoint.save wrote under the final name,
    when write_text did, when examples.prepare left what a killed run
    had begun, and when the index was written over instead of behind its valid end."""
    out = lab.new("crash")
    state = newest(lab.folder / "base")
    state["model"] = dict(list(state["model"].items())[:3])  # fewer tensors, fewer calls to try
    old, new, next_one = ({"format": 1, "step": step, "kind": "pt", "model": state["model"],
                           "optimizer": [], "tokenizer": state["tokenizer"]} for step in (1, 2, 3))

    def old_or_new() -> bool:
        found = newest(out)
        right = same_bits(found, new if found["step"] == 2 else old) and not damaged(out)
        checkpoint.save(str(out), 3, next_one)  # which sweeps up what the dead left
        return right and newest(out)["step"] == 3 and not list(out.glob(".tmp-*"))

    def only_old() -> None:
        shutil.rmtree(out, ignore_errors=True)
        checkpoint.save(str(out), 1, old)

    jobs = {"checkpoint": (lambda: checkpoint.save(str(out), 2, new, keep=1), old_or_new, only_old)}

    text = lab.folder / "few.jsonl"
    text.write_text("".join((lab.folder / "pt.jsonl").read_text().splitlines(True)[:40]))
    cfg = data.Config(str(text), f"{lab.folder}/tok.txt", str(lab.new("shards")), 0.2, workers=1)

    def prepare() -> None:
        # a journal after each small batch
        corpus.BATCH_BYTES, tokenfiles.JOURNAL_SECONDS = 5_000, 0
        with contextlib.redirect_stdout(io.StringIO()):
            data.prepare(cfg, work.Progress())

    def contents(folder: str) -> dict[str, bytes]:
        return {p.name: p.read_bytes() for p in sorted(Path(folder).rglob("*")) if p.is_file()}

    def again(make, folder: str, expected: dict) -> bool:
        """A second try ends with the same bytes, and nothing else lies about."""
        if (Path(folder) / "meta.json").exists() and not (
                expected.items() <= contents(folder).items()):
            return False  # it says it is whole, and is not
        make()
        return contents(folder) == expected

    sizes = corpus.BATCH_BYTES, tokenfiles.JOURNAL_SECONDS
    prepare()
    jobs["shards"] = (prepare, partial(again, prepare, cfg.out_dir, contents(cfg.out_dir)),
                      lambda: shutil.rmtree(cfg.out_dir, ignore_errors=True))
    corpus.BATCH_BYTES, tokenfiles.JOURNAL_SECONDS = sizes

    rows = lab.new("rows")
    tok = load_tokenizer(cfg.tokenizer)

    def load_rows() -> None:
        with contextlib.redirect_stdout(io.StringIO()):
            examples.load_examples(f"{lab.folder}/sft.jsonl", "chat", tok, 256, f"{rows}/data", 0.2)

    def clear() -> None:
        shutil.rmtree(rows, ignore_errors=True)

    notes, index, next_index = lab.new("notes"), lab.new("index"), lab.new("index")
    write_notes(notes, 0, 4)
    index_notes(index, notes)
    old_index = lab.new("index")
    shutil.copytree(index, old_index)
    write_notes(notes, 2, 6)  # two files are gone, two changed and two new
    shutil.copytree(index, next_index)
    index_notes(next_index, notes)
    both = [found_in(old_index), found_in(next_index)]

    def old_or_new_index() -> bool:
        right = found_in(index) in both
        index_notes(index, notes)
        return right and found_in(index) == both[1] and len(list(index.iterdir())) == len(
            list(next_index.iterdir()))

    def only_old_index() -> None:
        shutil.rmtree(index)
        shutil.copytree(old_index, index)

    jobs["index"] = partial(index_notes, index, notes), old_or_new_index, only_old_index
    load_rows()
    jobs["rows"] = load_rows, partial(again, load_rows, str(rows), contents(str(rows))), clear
    results = side_by_side([partial(crash_everywhere, *job, every) for job in jobs.values()])
    text = ", ".join(f"{name} {n:,}" for name, (n, _) in zip(jobs, results))
    bad = sum(b for _, b in results)
    return f"crashes: {text}; {bad} bad states", not bad


def damaged_files(lab: Lab, n: int = 1500) -> Result:
    """A flipped bit, a cut end or a zeroed page in a checkpoint of each stage, in a token shard, in
    the rows of examples and in each file of a search index: the file must be named and not used (of
    two checkpoints the other one is). Seen to fail when `damage` trusted the zip archive's own end,
    when open_token_file looked at the size only, when load_examples did not compare the sha256, and
    when the index did not compare the CRC-32."""
    files = {}
    for stage in STAGES:
        files[stage] = checkpoint.list_checkpoints(lab.whole(stage, max_steps=2)[0])[0]
    folder = lab.new("damaged")
    shutil.copytree(lab.folder / "data", folder)
    tok = load_tokenizer(f"{lab.folder}/tok.txt")
    rows = lab.new("rows")
    with contextlib.redirect_stdout(io.StringIO()):
        examples.load_examples(f"{lab.folder}/sft.jsonl", "chat", tok, 256, str(rows), 0.2)
    files |= {"shard": folder / "train_en.bin", "words": rows / "train.words",
              "rows": rows / "train.rows"}
    notes, index = lab.new("notes"), lab.new("index")
    write_notes(notes, 0, 40)
    index_notes(index, notes)
    files |= {f"index: {path.name}": path for path in sorted(index.glob("[!.]*"))}

    def notices(name: str, path: Path) -> bool:
        said = io.StringIO()
        checkpoint._known_good.clear()  # as a new process
        with contextlib.redirect_stdout(said):
            try:
                if name in STAGES:
                    return checkpoint.load(path.parent)[1] != path and path.name in said.getvalue()
                if path.parent == index:
                    found_in(index)
                elif name == "shard":
                    data.open_data(str(folder))
                else:
                    examples.load_examples(f"{lab.folder}/sft.jsonl", "chat", tok, 256, str(rows),
                                           0.2)
            except ValueError as error:
                return str(path) in str(error)
        return False

    r, found, kinds = Random(1), 0, {}
    for i in range(n):
        name, path = list(files.items())[i % len(files)]
        raw = path.read_bytes()
        kind, bad = spoil(raw, r)
        path.write_bytes(bad)
        kinds[kind] = kinds.get(kind, 0) + 1
        found += notices(name, path)
        path.write_bytes(raw)
    unharmed = not any(notices(name, path) for name, path in files.items())
    text = ", ".join(f"{count:,} {kind}" for kind, count in sorted(kinds.items()))
    return f"{found:,} of {n:,} ({text})", found == n and unharmed


def disk_full(lab: Lab, shares: tuple[float, ...] = (0.1, 0.5, 0.99),
              stages: tuple[str, ...] = STAGES) -> Result:
    """Each stage goes on from a checkpoint with a limit on the size of files (RLIMIT_FSIZE) that
    the next checkpoint passes after some share of it; and, where we may mount one, on a tmpfs with
    room for less than another checkpoint. The script must end with exit code 3 and say why, the old
    checkpoint must be what it was, no temporary file may be left, and with room again the run goes
    on. So too `rag.py add` and a search index. Seen to fail when save left its temporary file, and
    when it passed on torch's own error."""
    mount = can_mount(lab.folder)

    def fill(stage: str) -> list[int]:
        """Cases, and those that went wrong."""
        cases = bad = 0
        whole, _ = lab.whole(stage, max_steps=4)
        start = lab.new("full")
        lab.start(stage, start, die_after_save(2), max_steps=4).wait()
        size = checkpoint.list_checkpoints(start)[0].stat().st_size
        for share in shares:
            out = lab.new("full")
            shutil.copytree(start, out)

            def limit() -> None:
                most = int(share * size)
                resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
            bad += not refuses(lab, stage, out, start, whole, "File too large", limit)
            cases += 1
        if mount:
            with tmpfs(lab.new("tmpfs"), folder_size(start) + size // 3) as room:
                out = room / "out"
                shutil.copytree(start, out)
                bad += not refuses(lab, stage, out, start, None, "No space left on device")
                cases += 1
        return [cases, bad]

    def fill_index() -> list[int]:
        """The same for an index that grows from 4 to 40 notes."""
        notes, start, whole = lab.new("notes"), lab.new("index"), lab.new("index")
        write_notes(notes, 0, 4)
        index_notes(start, notes)
        before = found_in(start)
        write_notes(notes, 0, 40)
        shutil.copytree(start, whole)
        index_notes(whole, notes)
        size, bad = max(path.stat().st_size for path in whole.iterdir()), 0
        for share in shares:
            index = lab.new("index")
            shutil.copytree(start, index)
            files = {path.name: path.read_bytes() for path in index.iterdir()}

            def limit() -> None:
                resource.setrlimit(resource.RLIMIT_FSIZE, (int(share * size),) * 2)
            run = Run("rag", ["add", str(notes), f"--index={index}", "--embed=own:hash",
                              "--chunk_tokens=32"], lab.new("said"), partial(with_hashes, limit))
            good = run.wait() == 3 and "File too large" in run.text
            good &= {path.name: path.read_bytes() for path in index.iterdir()} == files
            good &= found_in(index) == before
            index_notes(index, notes)
            bad += not good or found_in(index) != found_in(whole)
        return [len(shares), bad]

    cases, bad = map(sum, zip(*side_by_side([*(partial(fill, stage) for stage in stages),
                                             fill_index])))
    return (f"{cases - bad} of {cases} full disks: old checkpoint intact, exit code 3, reason "
            "said, no temporary file" + "; no tmpfs: no right to mount one" * (not mount), not bad)


def by_hash(texts: list[str], kind: str) -> np.ndarray:
    """(n, 8) vectors that depend on the texts alone."""
    return np.array([np.random.default_rng(zlib.crc32(t.encode())).normal(size=8) for t in texts])


def with_hashes(then: Callable[[], None]) -> None:
    embed.load = lambda name, device: by_hash
    then()


def write_notes(folder: Path, first: int, last: int) -> None:
    """Notes number first … last, which depend on both; others are removed."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for i in range(first, last):
        r = Random(f"{i} {last}")
        facts = [world.pt_document(r, "train", 2, 3, 0.3)["text"] for _ in range(6)]
        (folder / f"{i}.md").write_text("\n\n".join(facts), encoding="utf-8")


def index_notes(folder: Path, notes: Path) -> None:
    """What rag.py add does, with vectors."""
    cut = partial(split, max_tokens=32, count=count_pieces)
    with Index(str(folder), True, by_hash, "own:hash") as made, (
            contextlib.redirect_stdout(io.StringIO())):
        update(made, [str(notes)], cut)


def found_in(folder: Path) -> list:
    """What a search finds and in which order. A cosine's last bits depend on where its row stands
    in the product, so scores are rounded."""
    with Index(str(folder), False, by_hash, "own:hash") as made:
        return [[(hit.chunk, hit.coverage, round(hit.score, 4)) for hit in made.search(q, 50)]
                for q in ("The pet of Kimu is cat.", "琪宁的宠物是猫。")]


def refuses(lab: Lab, stage: str, out: Path, start: Path, whole: Path | None, reason: str,
            limit=lambda: None) -> bool:
    """Whether a run that meets a full disk ends as it should, and goes on once there is room."""
    run = lab.start(stage, out, limit, resume=True, max_steps=4)
    good = run.wait() == 3 and reason in run.text and "Traceback" not in run.text
    good &= same_bits(newest(out), newest(start)) and not damaged(out)
    good &= not [p for p in out.rglob("*") if "tmp" in p.name]
    if whole:
        good &= lab.start(stage, out, resume=True, max_steps=4).wait() == 0 and same_run(out, whole)
    return good


def folder_size(folder: Path) -> int:
    return sum(-(-p.stat().st_size // 4096) * 4096 for p in folder.rglob("*"))


def can_mount(folder: Path) -> bool:
    """Whether we have the right to mount a tmpfs."""
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        with tmpfs(folder / "tmpfs", 1 << 16):
            return True
    return False


@contextlib.contextmanager
def tmpfs(at: Path, size: int):
    at.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", at], check=True,
                   capture_output=True)
    try:
        yield at
    finally:
        subprocess.run(["umount", at], check=True)



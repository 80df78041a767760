"""
Rows of `python -m faults` about what people mistype and what strangers send. The damaged lines and
the hostile model files themselves are among the tests (test_corpus.py, hostile_files.py).
"""
import contextlib
import importlib
import io
import json
import re
import sys
import time
from collections import Counter
from dataclasses import fields
from functools import partial
from importlib.util import find_spec
from operator import eq
from pathlib import Path
from random import Random

from configurator import configure
from faults.lab import ROOT, Lab, Result, Run, newest
from plumbing import checkpoint, corpus, examples, jsonl, runtime
from tokenizer import (CHAR_PATTERN, PATTERN, SPECIALS, Tokenizer, dump, load_tokenizer, render,
                       train_char)

sys.path.insert(0, str(ROOT / "tests"))


def bad_lines(lab: Lab, n: int = 10_000) -> Result:
    """A file of 10,000 lines with the kinds of damage that tests/test_corpus.py collects. Each must
    be reported with file, line and column, no good line may be lost, and data.py must stop at each
    with that message. Seen to fail when columns were counted in bytes, and when NaN passed."""
    from test_corpus import DAMAGE, GOOD
    r, path = Random(0), lab.folder / "bad.jsonl"
    lines = [json.dumps(r.choice(GOOD)).encode() for _ in range(n)]
    wanted, stops = [], 0
    limit, jsonl.MAX_LINE = jsonl.MAX_LINE, 1 << 20
    for kind, (line, what) in enumerate(DAMAGE):
        at, (before, after) = (2 * kind + 1) * n // (2 * len(DAMAGE)), line.split(b"@")
        lines[at], column = before + after, len(before.decode()) + 1
        wanted.append((f"{path}:{at + 1}:{column}", what))
        path.write_bytes(b'{"text": "fine"}\n' + lines[at] + b"\n")
        run = lab.run("data", [f"--input={path}", f"--tokenizer={lab.folder}/tok.txt",
                               "--workers=1", f"--out_dir={lab.new()}"])
        stops += run.wait() == 2 and f"{path}:2:{column}: {what}" in run.text
    path.write_bytes(b"\n".join(lines))
    items = [item for batch in corpus.read_batches([str(path)])
             for item in corpus.parse(batch)]
    found = [(item.where, item.what) for item in items if isinstance(item, jsonl.BadLine)]
    jsonl.MAX_LINE = limit
    right, lost = sum(map(eq, found, wanted)), n - len(wanted) - (len(items) - len(found))
    return (f"{right} of {len(wanted)} kinds located by line and column, {stops} by data.py; "
            f"{lost} good lines lost",
            right == stops == len(wanted) == len(found) and len(wanted) >= 12 and not lost)


def scripts() -> list[str]:
    """Modules that have settings: the scripts in the root, and those in the rooms; serve.py only
    where its extra is installed."""
    return [".".join(path.relative_to(ROOT).with_suffix("").parts)
            for path in sorted([*ROOT.glob("*.py"), *ROOT.glob("[!.]*/*.py")])
            if path.parent.name not in ("config", "tests")
            and (path.stem != "serve" or find_spec("uvicorn"))
            and re.search(r"^class Config\b", path.read_text(encoding="utf-8"), re.M)]


def typos(lab: Lab, every: int = 1) -> Result:
    """Every setting of every script with one character left out or two neighbours swapped: refused
    with exit code 2, and the suggested setting is the one that was meant. Seen to fail when the
    command line ignored unknown settings."""
    tried = refused = right = 0
    for name in scripts():
        cls = importlib.import_module(name).Config
        keys = [field.name for field in fields(cls)]
        for key in keys:
            slips = {key[:i] + key[i + 1:] for i in range(len(key))}
            slips |= {key[:i] + key[i + 1] + key[i] + key[i + 2:] for i in range(len(key) - 1)}
            for slip in sorted(slips - set(keys))[::every]:
                tried += 1
                with contextlib.redirect_stderr(io.StringIO()) as said:
                    try:
                        configure(cls, [f"--{slip}=1"], show=False)
                    except SystemExit as end:
                        refused += end.code == 2
                right += f"did you mean '{key}'?" in said.getvalue()
    return (f"{refused:,} of {tried:,} refused, {right / tried:.1%} with the right suggestion",
            refused == tried and right >= 0.98 * tried)


def hostile_files(lab: Lab) -> Result:
    """generate.py --checkpoint=FILE with each of the files: one line and exit code 2, no file made
    by code in it, less than 200 MB and 1 s of computing each. Seen to fail when checkpoint.load did
    not look at the archive first (bytearray of 2 GB, storages that claim more than they hold, a
    pipe that is waited for), and with weights_only=False (code ran)."""
    import resource

    from hostile_files import write_all
    folder, marker = lab.new("hostile"), lab.folder / "marker"
    folder.mkdir()

    def start(path: Path) -> tuple[Run, float]:
        """A run, and the MB by which its memory grew."""
        base = runtime.of_process("RssAnon")
        run = lab.run("generate", [f"--checkpoint={path}", "--prompt=x", "--max_tokens=1"], partial(
            resource.setrlimit, resource.RLIMIT_AS, (6 << 30, 6 << 30)))  # spare the machine
        with contextlib.suppress(TimeoutError):
            run.wait(20)  # else it is killed
        return run, (run.peak - base) / 1e6

    fine = start(checkpoint.list_checkpoints(str(lab.folder / "base"))[0])[0].code == 0
    refused = ran = 0
    most, slowest = 0.0, 0.0
    with contextlib.redirect_stderr(io.StringIO()):
        files = list(write_all(folder, newest(lab.folder / "base"), marker))
    for _, path in files:
        run, grown = start(path)
        refused += run.code == 2 and str(path) in run.text and "Traceback" not in run.text
        ran += marker.exists()
        marker.unlink(missing_ok=True)
        most, slowest = max(most, grown), max(slowest, run.seconds)
    ran += (folder.parent / "escaped").exists()
    return (f"{refused} of {len(files)} refused, {ran} ran, at most {most:.0f} MB and "
            f"{slowest:.2f} s each",
            fine and refused == len(files) == 30 and not ran and most < 200 and slowest < 1)


def injections(lab: Lab, n: int = 5000) -> Result:
    """Chats salted with the text of every special token: cut, nested, in full width, in other case.
    As messages, as pairs and as prompts they must give special ids only where the template puts
    them, and the content back to the last character. Seen to fail with tok.encode(content,
    allowed_special="all") in render."""
    tok = load_tokenizer(f"{lab.folder}/tok.txt")
    salts = [v for s in SPECIALS for v in (
        s, s[:5], s[5:], s[:4] + s + s[4:], s.replace("<|", "＜｜").replace("|>", "｜＞"),
        s.upper(), s.replace("|", "\u200b|"), f" {s}\n", s + "assistant\n", "\n" + s[:-1])]
    salts += ["user\n", "\n", "", "中文", "\x00", "\ufeff", "😀", "<", "|", ">"]
    r, through = Random(3), 0
    for _ in range(n):
        said = ["".join(r.choices(salts, k=r.randint(0, 6))) for _ in range(4)]
        chat = [{"role": role, "content": text} for role, text in zip(
            ("system", "user", "assistant", "user"), said)]
        ids, _ = render(tok, chat)
        starts = [i for i, t in enumerate(ids) if t == tok.im_start]
        inside = [tok.decode(ids[i + 1:ids.index(tok.im_end, i)]).partition("\n")[2]
                  for i in starts]
        through += inside != said or sum(t >= tok.endoftext for t in ids) != 2 * len(starts)
        record = {"prompt": chat[:2], "chosen": said[2] + "a", "rejected": said[3]}
        for row in examples.rows_of(record, "pair", tok, 10**6)[1][0][2]:
            through += sum(t >= tok.endoftext for t in row.ids) != 6  # 3 messages, no last newline
    return f"{through} of {n:,} got through", not through


def worst_strings(lab: Lab, size: int = 10**6) -> Result:
    """A million times the same character, and other strings on which tokenizers were quadratic or
    overflowed their stack, by a BPE and a character tokenizer. Seen to fail with the lookahead
    \\s+(?!\\S) of GPT-2's pattern: tiktoken panics on a million spaces."""
    plain = Tokenizer(dump([bytes([i]) for i in range(256)] + [b"a" * n for n in (2, 4, 8)]
                           + [b"  ", "中".encode(), "中中".encode()], PATTERN))
    chars = Tokenizer(dump(train_char(Counter({"中a^ \n".encode(): 1})), CHAR_PATTERN))
    texts = [c * (size // len(c.encode())) for c in
             ("a", "^", " ", "中", "\n", " \n", "aA", "'s", "1", "\u0301", "😀", "\x00")]
    texts += [" " * size + "a", "".join(Random(4).choices("abcdefgh", k=size))]
    slowest, same = 0.0, True
    for tok in (plain, chars):
        for text in texts:
            start = time.process_time()
            ids = tok.encode_ordinary(text)
            slowest = max(slowest, (time.process_time() - start) * 10**6 / len(text.encode()))
            same &= tok.decode(ids) == text
    return f"{2 * len(texts)} strings, the slowest {slowest:.2f} s per MB", same and slowest < 2

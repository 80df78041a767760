"""
What people mistype and strangers send: rows of `python -m faults`, and thirty model files that nobody
should open.

    for name, path in write_all(folder, good, marker): …     # good: the state of a real checkpoint

Each tries to run code (then the file `marker` appears), to fill the memory, to hang, to leave its
folder, or to describe a model that it does not hold.
"""
import contextlib
import importlib
import io
import json
import os
import pickle
import resource
import struct
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from random import Random

import torch

from plumbing import checkpoint
from plumbing import corpus
from plumbing import examples, jsonl
from configurator import configure
from faults.lab import ROOT, Lab, Result, Run, newest
from tokenizer import (CHAR_PATTERN, PATTERN, SPECIALS, Tokenizer, _digest, dump, load_tokenizer,
                       render, train_char)


class Call:
    """Pickled, it makes the reader call `function(*arguments)`."""

    def __init__(self, function, *arguments):
        self.do = function, arguments

    def __reduce__(self):
        return self.do


class Build:
    """Pickled, it makes the reader call Call's victim from __setstate__'s side: a BUILD."""

    def __init__(self, function, *arguments):
        self.do = function, arguments

    def __reduce__(self):
        return dict, (), {"x": Call(*self.do[0:1], *self.do[1])}


def archive(path: Path, parts: list[tuple[str, bytes]], compression: int = zipfile.ZIP_STORED):
    """A zip file with these parts, twice the same name allowed."""
    with zipfile.ZipFile(path, "w", compression) as z:
        for name, content in parts:
            z.writestr(zipfile.ZipInfo(name), content, compression)


def parts_of(state) -> list[tuple[str, bytes]]:
    """What torch.save puts into its archive."""
    whole = io.BytesIO()
    torch.save(state, whole)
    with zipfile.ZipFile(whole) as z:
        return [(name, z.read(name)) for name in z.namelist()]


def with_pickle(path: Path, raw: bytes, good: dict) -> None:
    """The good archive with another data.pkl."""
    archive(path, [(name, raw if name.endswith("data.pkl") else content)
                   for name, content in parts_of(good)])


def changed(good: dict, **config) -> dict:
    state = dict(good)
    state["model_config"] = {**good["model_config"], **config}
    return state


def tokenizer_with(good: dict, pattern: str | None = None, lines: str | None = None) -> dict:
    """The good state with a tokenizer whose sha256 is right and whose contents are not."""
    first, _, ranks = good["tokenizer"].partition("\n")
    head = json.loads(first)
    head["pattern"] = pattern or head["pattern"]
    ranks = lines if lines is not None else ranks
    head["sha256"] = _digest(head, ranks)
    return {**good, "tokenizer": json.dumps(head) + "\n" + ranks}


def write_all(folder: Path, good: dict, marker: Path) -> Iterator[tuple[str, Path]]:
    """(what it tries, path) of each of the thirty files."""
    touch = open, str(marker), "w"
    shell = f"cos\nsystem\n(S'touch {marker}'\ntR.".encode()
    first = next(iter(good["model"]))

    def saved(state) -> Callable[[Path], None]:
        return lambda path: torch.save(state, path)

    def with_raw(raw: bytes) -> Callable[[Path], None]:
        return lambda path: with_pickle(path, raw, good)

    def with_model(**tensors) -> Callable[[Path], None]:
        return saved({**good, "model": {**good["model"], **tensors}})

    def overlong(path: Path) -> None:  # says its first storage holds 2^40 numbers
        parts = parts_of(good)
        numel = good["model"][first].untyped_storage().nbytes() // 4
        i = next(i for i, (name, _) in enumerate(parts) if name.endswith("data.pkl"))
        name, raw = parts[i]
        for old in (b"K" + bytes([numel & 255]), b"M" + struct.pack("<H", numel & 0xffff)):
            raw = raw.replace(old + b"t", b"\x8a\x06" + struct.pack("<q", 1 << 40)[:6] + b"t", 1)
        parts[i] = name, raw
        archive(path, parts)

    def swapped(path: Path) -> None:  # two parts of one name: which is checked, which is used?
        parts = parts_of(good)
        evil = parts_of({**good, "x": Call(*touch)})
        archive(path, parts + [part for part in evil if part[0].endswith("data.pkl")])

    def escaping(path: Path) -> None:
        archive(path, parts_of(good) + [("archive/../../escaped", b"x")])

    def bomb(path: Path) -> None:
        archive(path, parts_of(good) + [("archive/data/999", bytes(400 << 20))],
                zipfile.ZIP_DEFLATED)

    def huge_header(path: Path) -> None:  # as of a safetensors file: length, then JSON
        path.write_bytes(struct.pack("<Q", 1 << 63) + b'{"w": {}}')

    def legacy(path: Path) -> None:  # the format of torch before 1.6: pickles behind one another
        torch.save({**good, "x": Call(*touch)}, path, _use_new_zipfile_serialization=False)

    def plain(path: Path) -> None:
        path.write_bytes(pickle.dumps({"format": 1, "x": Call(*touch)}))

    def torchscript(path: Path) -> None:
        archive(path, parts_of(good) + [("archive/code/__torch__.py", b"import os"),
                                        ("archive/constants.pkl", b"\x80\x02).")])

    tries: list[tuple[str, Callable[[Path], None]]] = [
        ("code: reduce", saved({**good, "x": Call(*touch)})),
        ("code: reduce in a tensor's place", with_model(**{first: Call(*touch)})),
        ("code: build", saved({**good, "x": Build(*touch)})),
        ("code: os.system", with_raw(b"\x80\x02" + shell)),
        ("code: exec", with_raw(f"cbuiltins\nexec\n(Vopen('{marker}', 'w')\ntR.".encode())),
        ("code: inst", with_raw(f"(S'touch {marker}'\nios\nsystem\n.".encode())),
        ("code: obj", with_raw(f"(cos\nsystem\nS'touch {marker}'\no.".encode())),
        ("code: stack global", with_raw(
            pickle.dumps(Call(os.system, f"touch {marker}"), protocol=4))),
        ("code: extension registry", with_raw(b"\x80\x02\x82\x01.")),
        ("code: torch.hub", with_raw(b"\x80\x02ctorch.hub\nload\n(S'x'\nS'y'\ntR.")),
        ("code: legacy format", legacy), ("code: plain pickle", plain),
        ("code: torchscript", torchscript), ("code: second part of the same name", swapped),
        ("memory: 2 GB bytearray", with_raw(
            b"\x80\x02c__builtin__\nbytearray\n(J" + struct.pack("<i", 2_000_000_000) + b"tR.")),
        ("memory: zip bomb", bomb), ("memory: storage of 2^40", overlong),
        ("memory: tensor of 2^40, stride 0", with_model(
            **{first: torch.zeros(1).as_strided((1 << 20, 1 << 20), (0, 0))})),
        ("memory: 10^9 layers", saved(changed(good, n_layer=10**9))),
        ("memory: width 10^7", saved(changed(good, n_embd=10**7))),
        ("memory: meta tensors", with_model(**{first: torch.empty(1 << 40, device="meta")})),
        ("memory: header of 2^63", huge_header),
        ("memory: a million nested lists", with_raw(b"\x80\x02" + b"]" * 10**6 + b"a" * 10**6
                                                    + b".")),
        ("path: part outside the archive", escaping),
        ("path: link to /dev/zero", lambda path: path.symlink_to("/dev/zero")),
        ("path: a pipe", lambda path: os.mkfifo(path)),
        ("shape: another width", with_model(**{first: torch.zeros(3, 3)})),
        ("shape: text in place of tensors", with_model(**{first: "text"})),
        ("tokenizer: pattern that explodes", saved(tokenizer_with(
            good, pattern="((a{1000}){1000}){1000}"))),
        ("tokenizer: ranks beyond the vocabulary", saved(tokenizer_with(
            good, lines=good["tokenizer"].partition("\n")[2] + "/////w== 4000000000\n"))),
    ]
    for i, (name, write) in enumerate(tries):
        path = folder / f"hostile{i:02d}.pt"
        write(path)
        yield name, path


# ---------------------------------------------------------------------------- what people write

def bad_lines(lab: Lab, n: int = 10_000) -> Result:
    """A file of 10,000 lines with the kinds of damage that tests/test_corpus.py collects: each must
    be reported with file, line and column, and no good line may be lost; data.py must stop at each
    with that message. Seen to fail when columns were counted in bytes, and when NaN was let
    pass."""
    sys.path.insert(0, str(ROOT / "tests"))
    from test_corpus import DAMAGE, GOOD
    r, lines, wanted = Random(0), [], []
    path = lab.folder / "bad.jsonl"
    for i in range(n):
        kind = i * len(DAMAGE) // n
        if i == (2 * kind + 1) * n // (2 * len(DAMAGE)):
            before, after = DAMAGE[kind][0].split(b"@")
            lines.append(before + after)
            wanted.append((f"{path}:{i + 1}:{len(before.decode()) + 1}", DAMAGE[kind][1]))
        else:
            lines.append(json.dumps(r.choice(GOOD)).encode())
    path.write_bytes(b"\n".join(lines))
    limit, jsonl.MAX_LINE = jsonl.MAX_LINE, 1 << 20
    items = [item for batch in corpus.read_batches([str(path)])
             for item in corpus.parse(batch)]
    found = [(b.where, b.what) for b in items if isinstance(b, jsonl.BadLine)]
    right = sum(a == b for a, b in zip(found, wanted))
    kept = len(items) - len(found)
    stops = 0
    for (where, what), line in zip(wanted, [raw for raw in lines if raw not in
                                            {json.dumps(g).encode() for g in GOOD}]):
        path.write_bytes(b'{"text": "fine"}\n' + line + b"\n")
        run = Run("data", [f"--input={path}", f"--tokenizer={lab.folder}/tok.txt", "--workers=1",
                           f"--out_dir={lab.new()}"], lab.folder / "said")
        column = where.rpartition(":")[2]
        stops += run.wait() == 2 and f"{path}:2:{column}: {what}" in run.text
    jsonl.MAX_LINE = limit
    return (f"{right} of {len(wanted)} kinds located by line and column, {stops} by data.py; "
            f"{n - len(wanted) - kept} good lines lost",
            right == stops == len(wanted) == len(found) and len(wanted) >= 12
            and kept == n - len(wanted))


def typos(lab: Lab, every: int = 1) -> Result:
    """Every setting of every script with one character left out or two neighbours swapped: refused
    with exit code 2, and the setting that was meant is the one suggested. Seen to fail when the
    command line ignored unknown settings."""
    tried = refused = right = 0
    for path in sorted(ROOT.glob("*.py")):
        if "\nclass Config:" not in path.read_text():
            continue
        cls = importlib.import_module(path.stem).Config
        keys = [field.name for field in fields(cls)]
        for key in keys:
            slips = {key[:i] + key[i + 1:] for i in range(len(key))}
            slips |= {key[:i] + key[i + 1] + key[i] + key[i + 2:] for i in range(len(key) - 1)}
            for slip in sorted(slips - set(keys))[::every]:
                said = io.StringIO()
                tried += 1
                with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
                    try:
                        configure(cls, [f"--{slip}=1"])
                    except SystemExit as end:
                        refused += end.code == 2
                right += f"did you mean '{key}'?" in said.getvalue()
    return (f"{refused:,} of {tried:,} refused, {right / tried:.1%} with the right suggestion",
            refused == tried and right >= 0.98 * tried)


# ---------------------------------------------------------------------------- what strangers write

def hostile_files(lab: Lab) -> Result:
    """generate.py --checkpoint=FILE with each of the files of hostile.py: one line and exit code 2,
    no file made by code in it, less than 200 MB and 1 s more. Seen to fail when checkpoint.load did
    not look at the archive first (bytearray of 2 GB, storages that claim more than they hold, a
    pipe that is waited for), and with weights_only=False (code ran)."""
    folder, marker = lab.new("hostile"), lab.folder / "marker"
    folder.mkdir()
    good = newest(lab.folder / "base")
    total = refused = ran = 0
    most, slowest = 0.0, 0.0

    def start(path: Path) -> tuple[int, str, float, float]:
        note = lab.new("memory")

        def measure() -> None:
            leave, base = os._exit, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            resource.setrlimit(resource.RLIMIT_AS, (6 << 30, 6 << 30))  # spare the machine

            def leaving(code: int) -> None:
                grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - base
                note.write_text(str(grown / 1024))
                leave(code)
            os._exit = leaving
        begin = time.perf_counter()
        run = Run("generate", [f"--checkpoint={path}", "--prompt=x", "--max_tokens=1"],
                  lab.folder / "said", measure)
        with contextlib.suppress(TimeoutError):
            run.wait(20)  # else it is killed
        grown = float(note.read_text()) if note.exists() else 0.0
        return run.code, run.text, grown, time.perf_counter() - begin

    fine = start(checkpoint.list_checkpoints(lab.folder / "base")[0])[0] == 0
    with contextlib.redirect_stderr(io.StringIO()):
        files = list(write_all(folder, good, marker))
    for name, path in files:
        code, text, grown, took = start(path)
        line = [row for row in text.splitlines() if str(path) in row]
        refused += code == 2 and bool(line) and "Traceback" not in text
        ran += marker.exists()
        marker.unlink(missing_ok=True)
        total, most, slowest = total + 1, max(most, grown), max(slowest, took)
    ran += (folder.parent / "escaped").exists()
    return (f"{refused} of {total} refused, {ran} ran, at most {most:.0f} MB and {slowest:.2f} s "
            "each", fine and refused == total == 30 and not ran and most < 200 and slowest < 1)


def injections(lab: Lab, n: int = 5000) -> Result:
    """Chats salted with the text of every special token, cut, nested, in full width and other case:
    as messages, as pairs and as prompts they must give special ids only where the template puts
    them, and the content back to the last character. Seen to fail with tok.encode(content,
    allowed_special="all") in render."""
    tok = load_tokenizer(f"{lab.folder}/tok.txt")
    salts = [v for s in SPECIALS for v in (
        s, s[:5], s[5:], s[:4] + s + s[4:], s.replace("<|", "＜｜").replace("|>", "｜＞"), s.upper(),
        s.replace("|", "\u200b|"), " " + s + "\n", s + "assistant\n", "\n" + s[:-1])]
    salts += ["user\n", "\n", "", "中文", "\x00", "\ufeff", "😀", "<", "|", ">"]
    r, through = Random(3), 0
    for _ in range(n):
        said = ["".join(r.choices(salts, k=r.randint(0, 6))) for _ in range(4)]
        chat = [{"role": role, "content": text} for role, text in zip(
            ("system", "user", "assistant", "user"), said)]
        ids, _ = render(tok, chat)
        inside, at = [], 0
        for start in [i for i, t in enumerate(ids) if t == tok.im_start]:
            end = ids.index(tok.im_end, start)
            inside.append(tok.decode(ids[start + 1:end]).partition("\n")[2])
            at += 2
        through += inside != said or sum(t >= tok.endoftext for t in ids) != at
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
    chars = Tokenizer(dump(train_char({"中a^ \n".encode(): 1}), CHAR_PATTERN))
    texts = [c * (size // len(c.encode())) for c in
             ("a", "^", " ", "中", "\n", " \n", "aA", "'s", "1", "\u0301", "😀", "\x00")]
    texts += [" " * size + "a", "".join(Random(4).choices("abcdefgh", k=size))]
    slowest = 0.0
    same = True
    for tok in (plain, chars):
        for text in texts:
            start = time.process_time()
            ids = tok.encode_ordinary(text)
            slowest = max(slowest, (time.process_time() - start) * 10**6 / len(text.encode()))
            same &= tok.decode(ids) == text
    return f"{2 * len(texts)} strings, the slowest {slowest:.2f} s per MB", same and slowest < 2

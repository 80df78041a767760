"""Token files and batches: exact, the same however they came about, and refused when damaged."""
import gzip
import hashlib
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import sys
import time
from collections import Counter
from functools import partial

import numpy as np
import pytest

import corpus
import data
from data import (IGNORE, Windows, begin, encode_batch, mix, open_data, open_token_file,
                  pack_header, passages, shuffled)
from tokenizer import CHAR_PATTERN, PATTERN, count_pieces, dump, train_bpe

TEXTS = [f"{'一只猫坐在垫子上。' * (i % 7)} the cat {i} sat <|endoftext|>\n" * (i % 5 + 1)
         for i in range(700)]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A tokenizer, a folder with every kind of text file, and what data.py makes of it."""
    base = tmp_path_factory.mktemp("made")
    (base / "in").mkdir()
    (base / "tok.txt").write_text(dump(train_bpe(count_pieces(TEXTS), 350), PATTERN))
    lines = [json.dumps({"text": t} | ({"lang": "zh"} if i % 9 == 0 else {})) + "\n"
             for i, t in enumerate(TEXTS)]
    (base / "in/a.jsonl").write_text("".join(lines[:300]))
    packed = gzip.compress("".join(lines[300:] + lines[:50]).encode())  # 50 of them once more
    (base / "in/b.jsonl.gz").write_bytes(packed)
    (base / "in/c.txt").write_text("多行文本 with words\r\n" * 2000)
    assert run(base, workers=1) == (0, "")
    return base


@pytest.fixture
def folder(made, tmp_path):
    """A copy of `made` for a test to spoil, without the result."""
    return shutil.copytree(made, tmp_path / "w", ignore=shutil.ignore_patterns("out"))


def run(base, *args, workers=2, during=lambda pid: None, **patch):
    """Exit code and stderr of data.py with small batches and a journal after each, in a process
    of its own, in which names of data.py are patched. `during(pid)` is called meanwhile."""
    def child():
        os.setsid()
        for fd, name in ((1, "stdout"), (2, "stderr")):
            os.dup2(os.open(base / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), fd)
        sys.stdout, sys.stderr = os.fdopen(1, "w", 1), os.fdopen(2, "w", 1)
        corpus.BATCH_BYTES, data.JOURNAL_SECONDS, os.fsync = 20_000, 0, lambda fd: None
        vars(data).update(patch)
        sys.argv = ["data.py", f"--input={base}/in", f"--tokenizer={base}/tok.txt",
                    f"--out_dir={base}/out", "--val_fraction=0.1", f"--workers={workers}", *args]
        data.main()
    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    during(process.pid)
    process.join(60)
    assert process.exitcode is not None, "data.py hangs"
    return process.exitcode, (base / "stderr").read_text() if (base / "stderr").exists() else ""


def same(folder, made):
    """Whether both hold the same token files, and nothing else but meta.json."""
    a, b = ({p.name: p.read_bytes() for p in (f / "out").iterdir() if p.name != "meta.json"}
            for f in (folder, made))
    return a == b


def test_documents_come_back_exactly(made):
    tok, splits = open_data(str(made / "out"))
    found = Counter()
    for split, files in splits.items():
        assert [f.lang for f in files] == ["en", "zh"]
        for f in files:
            ends = np.flatnonzero(f.ids == tok.endoftext) + 1
            texts = [tok.decode(ids[:-1].tolist()) for ids in np.split(f.ids, ends[:-1])]
            assert f.n_docs == len(ends) and ends[-1] == len(f.ids) and f.ids.dtype == np.uint16
            assert f.n_bytes == sum(len(text.encode()) for text in texts)
            found.update((text, split) for text in texts)
    assert sorted(t for t, _ in found.elements() if "cat" in t) == sorted(TEXTS + TEXTS[:50])
    assert sum(t.count("多行文本 with words\r\n") for t, _ in found.elements()) == 2000
    assert len({t for t, _ in found}) == len(found)  # copies are on the same side
    assert 0.07 < sum(n for (_, s), n in found.items() if s == "val") / found.total() < 0.13


def test_any_number_of_workers_writes_the_same_bytes(made, folder):
    for workers in (2, 3):
        shutil.rmtree(folder / "out", ignore_errors=True)
        assert run(folder, workers=workers) == (0, "") and same(folder, made)
    assert run(folder) == (0, "") and "is up to date" in (folder / "stdout").read_text()


def small_disk(*args):
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
    return begin(*args)


def odd_batch(batch, odd, **settings):
    if odd == "slow":
        time.sleep(0.1)
    elif odd == "touch":
        os.utime(batch.path)
    elif batch.path.endswith(".txt"):
        os.kill(os.getpid(), signal.SIGKILL)
    return encode_batch(batch, **settings)


SLOW, TOUCH, DEADLY = ({"encode_batch": partial(odd_batch, odd=o)} for o in ("slow", "touch", ""))


@pytest.mark.parametrize("code, line, kill, patch", [
    (2, "w/out: File too large; what is done is kept", None, {"begin": small_disk}),
    (2, "a worker process was killed", None, DEADLY),
    (2, "stopped; the same command", os.killpg, SLOW), (-9, "", os.kill, SLOW)], ids=range(4))
def test_a_run_that_is_stopped_says_why_and_goes_on(made, folder, code, line, kill, patch):
    """A full disk, a killed worker (multiprocessing.Pool would wait for it for ever), Ctrl-C (which
    a terminal sends to the workers too), and a killed run, whose workers must not live on."""
    def during(pid):
        group.append(pid)
        while kill and not (folder / "out/train_en.bin.part").exists():
            time.sleep(0.001)
        if kill:
            kill(pid, signal.SIGINT if code == 2 else signal.SIGKILL)
    group = []
    found, error = run(folder, during=during, **patch)
    assert found == code and line in error and error.count("\n") == (code == 2), error
    with pytest.raises(ProcessLookupError):  # nobody is left
        for _ in range(100):
            os.killpg(group[0], 0)
            time.sleep(0.1)
    assert not list((folder / "out").glob("*.bin"))
    assert run(folder) == (0, "") and same(folder, made)


def test_a_run_killed_at_any_write_goes_on_to_the_same_bytes(made, folder):
    def run_of(n):
        """A run that is killed instead of its write number n; also how many there were."""
        def armed(*args):
            left = iter(range(n))
            for name in ("replace", "fsync", "unlink"):
                def step(*paths, real=getattr(os, name)):
                    (folder / "writes").open("a").write(".")
                    for _ in left:
                        return real(*paths)
                    os._exit(9)  # what is buffered is lost, as with SIGKILL
                setattr(os, name, step)
            return begin(*args)
        shutil.rmtree(folder / "out", ignore_errors=True)
        (folder / "writes").write_text("")
        code, _ = run(folder, workers=1, begin=armed, JOURNAL_SECONDS=9 * (n % 2))
        return code, len((folder / "writes").read_text())
    (code, often), (code_2, seldom) = run_of(1000), run_of(1001)  # journals after each batch or not
    assert code == code_2 == 0 and often > seldom > 14
    for n in [*range(1, often - 15, 7), *range(often - 15 + often % 2, often, 2), *range(seldom)]:
        if n % 2 == 0 or n < seldom:
            assert run_of(n)[0] == 9
            assert run(folder, workers=1) == (0, "") and same(folder, made)


def test_bad_lines_stop_or_are_skipped_and_no_good_one_is_lost(made, folder):
    lines = (folder / "in/a.jsonl").read_text().splitlines(keepends=True)
    (folder / "in/a.jsonl").write_text("".join(lines[:200] + ['{"text": 1}\n'] + lines[200:]))
    assert f"{folder}/in/a.jsonl:201:10: field of a wrong type: 'text' must" in run(folder)[1]
    assert run(folder, "--on_bad_line=skip", "--max_bad_fraction=0")[1].startswith("1 of ")
    assert run(folder, "--on_bad_line=skip") == (0, "") and same(folder, made)
    out = (folder / "stdout").read_text()
    assert "going on at" in out and "bad lines skipped: 1 (field of a wrong type 1)" in out


def cut(path):
    path.write_bytes(path.read_bytes()[:-1])


def flip(path):
    path.write_bytes((raw := path.read_bytes())[:-9] + bytes([raw[-9] ^ 1]) + raw[-8:])


@pytest.mark.parametrize("spoil, args, line", [
    (lambda f: os.utime(f / "in/c.txt"), [], "out holds data made from other input or settings"),
    (lambda f: 0, ["--val_fraction=0.2"], "out holds data made from other input or settings"),
    (lambda f: cut(f / "out/train_en.bin"), [], "out/train_en.bin: damaged: "),
    (lambda f: os.unlink(f / "out/val_en.bin"), [], "out/val_en.bin: No such file"),
    (lambda f: cut(f / "out/meta.json"), [], "out/meta.json: not from data.py, or damaged"),
    (lambda f: (f / "in/x.bin").touch(), ["--out_dir={}/in"], "in holds x.bin, made by something"),
    (lambda f: flip(f / "tok.txt"), [], "tok.txt: damaged"),
    (lambda f: cut(f / "in/b.jsonl.gz"), ["--out_dir={}/o"], "b.jsonl.gz: cannot be read to its"),
    (lambda f: (f / "in/a.jsonl").write_text('{"messages": []}'), ["--out_dir={}/o"],
     "in/a.jsonl:1:1: field missing: 'text'"),
    (lambda f: 0, ["--out_dir={}/o", "--val_fraction=1e-9"], "into the val split"),
    (lambda f: 0, ["--out_dir={}/o", "--val_fraction=0.999999999"], "into the train split"),
    (lambda f: 0, ["--val_fraction=1"], "--val_fraction=1.0 must lie between 0 and 1"),
    (lambda f: 0, ["--tokenizer=none.txt"], "none.txt: No such file or directory; make one with"),
    (lambda f: 0, ["--input=out/toyworld/pt.jsonl"], "make it with: python toyworld.py"),
    (lambda f: 0, ["--out_dir={}/tok.txt"], "tok.txt: File exists")], ids=range(15))
def test_a_mistake_is_one_line(made, folder, spoil, args, line):
    shutil.copytree(made / "out", folder / "out")
    assert run(folder) == (0, "")  # nothing is wrong yet
    spoil(folder)
    code, error = run(folder, *(arg.format(folder) for arg in args))
    assert code == 2 and line in error and error.count("\n") == 1, error


def test_what_changes_or_breaks_between_two_runs_is_noticed(made, folder):
    code, error = run(folder, **TOUCH)
    assert code == 2 and error.endswith("in: changed while it was read; give the command again\n")
    assert run(folder) == (0, "") and same(folder, made)
    assert "have changed since" in (folder / "stdout").read_text()
    for damage in (flip, cut, os.unlink):
        shutil.rmtree(folder / "out")
        assert run(folder, **DEADLY)[0] == 2
        damage(folder / "out/train_en.bin.part")
        assert "train_en.bin.part: not as the stopped run left it" in run(folder)[1]


@pytest.mark.parametrize("n_vocab, width", [(65536, 2), (65537, 4)])
def test_more_than_65536_tokens_take_four_bytes(folder, n_vocab, width):
    tokens = [bytes([i]) for i in range(256)] + [b"%c%c" % divmod(i, 256) for i in range(65536)]
    (folder / "tok.txt").write_text(dump(tokens[:n_vocab - 4], CHAR_PATTERN))
    assert run(folder, workers=1) == (0, "")
    file = open_token_file(str(folder / "out/train_zh.bin"))
    assert file.ids.itemsize == width and file.ids.max() == n_vocab - 4  # <|endoftext|>


def write(path, ids, vocab_size=100, lang="en"):
    raw = np.asarray(ids, "<u2").tobytes()
    path.write_bytes(pack_header(2, len(ids), vocab_size, 7, 3, "00" * 32,
                                 hashlib.sha256(raw).digest(), lang) + raw)
    return open_token_file(str(path), "fast")


def test_any_damage_to_a_token_file_is_refused_by_name(made, tmp_path):
    path = tmp_path / "x.bin"
    file = write(path, range(90), lang="zh-hant")
    assert (file.vocab_size, file.n_bytes, file.n_docs, file.lang) == (100, 7, 3, "zh-hant")
    assert file.ids.tolist() == list(range(90)) and path.stat().st_size == 256 + 2 * 90
    good = path.read_bytes()
    bad = [good[:n] for n in range(0, len(good), 5)] + [good + b"\0\0", b"x" * len(good)]
    for raw in bad + [good[:i] + bytes([good[i] ^ 4]) + good[i + 1:] for i in range(len(good))]:
        path.write_bytes(raw)
        with pytest.raises(ValueError, match="x.bin: "):
            open_token_file(str(path))
    open_token_file(str(path), "fast")  # as it says: header and size, and it is the last id
    shutil.copytree(made / "out", tmp_path / "out")
    write(tmp_path / "out/val_en.bin", range(90))
    with pytest.raises(ValueError, match="val_en.bin: made with another tokenizer"):
        open_data(str(tmp_path / "out"))


@pytest.mark.parametrize("n", [1, 2, 3, 5, 64, 100, 1000, 1024, 65537])
def test_an_epoch_is_a_permutation_and_any_is_about_as_likely(n):
    orders = [shuffled(np.arange(n), n, mix(1, epoch)) for epoch in range(4)]
    assert all(sorted(order.tolist()) == list(range(n)) for order in orders)
    assert shuffled(np.array([n - 1]), n, mix(1, 0)) == orders[0][-1]  # each by itself
    assert n < 64 or max((a == b).mean() for a in orders for b in orders if a is not b) < 0.1
    if n <= 100:  # chi² of where each window comes, over its degrees of freedom: 1 by chance
        counts = np.zeros((n, n))
        for key in range(20 * n):
            counts[np.arange(n), shuffled(np.arange(n), n, mix(key))] += 1
        chi2 = ((counts - 20) ** 2 / 20).sum() / max(1, n - 1) ** 2
        assert chi2 < (1.15 if n >= 64 else 4)  # of few windows some come 20 % too often
    if n > 60_000:  # what follows what tells nothing
        steps = np.histogram(np.diff(orders[0]) % n, 64)[0]
        assert ((steps - n / 64) ** 2 / (n / 64)).sum() / 63 < 2


@pytest.mark.parametrize("length", [1, 7, 16])
def test_windows_stay_in_their_file_and_cover_it(tmp_path, length):
    for size in (length + 1, 2 * length, 2 * length + 1, 3 * length - 1, 5 * length + 3):
        windows = Windows([write(tmp_path / "a.bin", np.arange(size)),
                           write(tmp_path / "b.bin", np.arange(length)),  # too short for a window
                           write(tmp_path / "c.bin", np.arange(1000, 1001 + length), 2000)],
                          length, seed=3)
        assert windows.n == max(size // length - 1, 1) + 1
        offsets = set()
        for epoch in range(200):
            x, y = windows.batch(epoch * windows.n, windows.n)
            *firsts, last = sorted(x[:, 0].tolist())
            assert last == 1000 and firsts == list(range(firsts[0], size - length, length))[
                :windows.n - 1]  # each window once
            assert ((x - x[:, :1]).numpy() == np.arange(length)).all() and (y == x + 1).all()
            offsets.add(firsts[0])
        assert len(offsets) == min(length, size - length)  # all that there is room for


def test_a_batch_depends_on_seed_and_index_only(made):
    files = open_data(str(made / "out"))[1]["train"]
    windows, again = Windows(files, 32, seed=1), Windows(files, 32, seed=1)
    assert all(np.shares_memory(ids, f.ids) for ids, f in zip(windows.ids, files))  # no copy
    for start in (0, windows.n - 5, 3 * windows.n - 1, 1020):  # also across epochs and blocks
        x, y = windows.batch(start, 8)
        parts = [again.batch(start + 3, 5), again.batch(start, 3)]  # two ranks, in any order
        assert (x[3:] == parts[0][0]).all() and (y[:3] == parts[1][1]).all()
    for other in (Windows(files, 32, seed=2).batch(0, 8), windows.batch(windows.n, 8)):
        assert not (other[0] == windows.batch(0, 8)[0]).all()


def test_bad_ids_and_too_short_files_are_refused_by_name(tmp_path):
    good, bad = write(tmp_path / "a.bin", [0] * 99), write(tmp_path / "b.bin", [100] * 99)
    for use in (lambda: Windows([good, bad], 7, 0).batch(0, 99), lambda: [*passages(bad, 7, 2)]):
        with pytest.raises(ValueError, match="b.bin: holds the id 100, outside its vocabulary"):
            use()
    with pytest.raises(ValueError, match=f"{tmp_path}: the training split is shorter than one"):
        Windows([good], 99, 0)


@pytest.mark.parametrize("size", [0, 1, 2, 15, 16, 17, 100])
def test_passages_score_every_token_but_the_first_once(tmp_path, size):
    file, n = write(tmp_path / "a.bin", np.arange(size) % 50 + 1), max(size - 1, 0)
    batches = list(passages(file, 5, batch_size=2))
    assert all(x.shape == y.shape == (len(x), 5) and len(x) <= 2 for x, y in batches)
    inputs, targets = ([t for xy in batches for t in xy[i].flatten().tolist()] for i in (0, 1))
    assert targets == file.ids[1:].tolist() + [IGNORE] * (-n % 5)
    assert inputs[:n] == file.ids[:n].tolist() and min(inputs, default=0) >= 0
    assert sum(len(x) for x, _ in passages(file, 5, 2, max_tokens=25)) == min(-(-n // 5), 5)

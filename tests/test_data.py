"""Text to token files: exact, the same however often it was stopped, and every mistake one line."""
import gzip
import json
import multiprocessing
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest

import data
from data import encode, open_data
from plumbing import corpus, terminal, tokenfiles
from plumbing.tokenfiles import Folder, open_token_file
from tokenizer import CHAR_PATTERN, HAN_PATTERN, count_pieces, dump, train_bpe

ROOT = Path(data.__file__).parent
TEXTS = [f"{'一只猫坐在垫子上。' * (i % 7)} the cat {i} sat <|endoftext|>\n" * (i % 5 + 1)
         for i in range(700)]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A tokenizer, a folder with every kind of text file, and what data.py makes of it."""
    base = tmp_path_factory.mktemp("made")
    (base / "in").mkdir()
    (base / "tok.txt").write_text(dump(train_bpe(count_pieces(TEXTS), 350), HAN_PATTERN))
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
    """Exit code and stderr of data.py with small batches, in a process of its own, in which names
    of data.py or plumbing/tokenfiles.py are patched. `during(pid)` is called meanwhile."""
    def child():
        os.setsid()
        sys.stdout, sys.stderr = (open(base / name, "w", 1) for name in ("stdout", "stderr"))
        corpus.BATCH_BYTES, os.fsync = 20_000, lambda fd: None
        for name, value in patch.items():
            setattr(data if hasattr(data, name) else tokenfiles, name, value)
        sys.argv = ["data.py", f"--input={base}/in", f"--tokenizer={base}/tok.txt",
                    f"--out_dir={base}/out", "--val_fraction=0.1", f"--workers={workers}", *args]
        terminal.run(data.main)
    process = multiprocessing.get_context("fork").Process(target=child)
    (base / "stderr").write_text("")
    process.start()
    during(process.pid)
    process.join(100)
    assert process.exitcode is not None, "data.py hangs"
    return process.exitcode, (base / "stderr").read_text()


def result(base):
    return {p.name: p.read_bytes() for p in (base / "out").iterdir() if p.name != "meta.json"}


def test_documents_come_back_exactly(made):
    tok, splits = open_data(str(made / "out"))
    found = []
    for split, files in splits.items():
        assert [f.lang for f in files] == ["en", "zh"]
        for f in files:
            ends = np.flatnonzero(f.ids == tok.endoftext) + 1
            texts = [tok.decode(ids[:-1].tolist()) for ids in np.split(f.ids, ends[:-1])]
            assert f.n_docs == len(ends) and ends[-1] == len(f.ids) and f.ids.dtype == np.uint16
            assert f.n_bytes == sum(len(text.encode()) for text in texts)
            found += [(text, split) for text in texts]
    assert sorted(text for text, _ in found if "cat" in text) == sorted(TEXTS + TEXTS[:50])
    assert sum(text.count("多行文本 with words\r\n") for text, _ in found) == 2000
    assert len({text for text, _ in found}) == len(set(found))  # copies are on the same side
    assert 0.07 < sum(split == "val" for _, split in found) / len(found) < 0.13


def test_any_number_of_workers_writes_the_same_bytes(made, folder):
    for workers in (2, 3):
        shutil.rmtree(folder / "out", ignore_errors=True)
        assert run(folder, workers=workers) == (0, "") and result(folder) == result(made)
    assert run(folder) == (0, "") and "is up to date" in (folder / "stdout").read_text()


def small_disk(*args):
    resource.setrlimit(resource.RLIMIT_FSIZE, (9_000, 9_000))
    return Folder(*args)


def slow_reader(*args):  # so that workers are waiting
    for batch in corpus.read_batches(*args):
        time.sleep(0.05)
        yield batch


def touching(documents, **settings):
    os.utime(Path(settings["tokenizer"]).parent / "in/c.txt")
    return encode(documents, **settings)


def deadly(documents, **settings):
    if any("多行文本" in document.text for document in documents):  # of c.txt
        os.kill(os.getpid(), signal.SIGKILL)
    return encode(documents, **settings)


@pytest.mark.parametrize("code, line, kill, patch", [
    (2, "w/out: File too large; mend that, and give the", None, {"Folder": small_disk}),
    (2, "a worker process was killed", None, {"encode": deadly}),
    (2, "stopped; the same command", os.killpg, {"read_batches": slow_reader}),
    (-9, "", os.kill, {"read_batches": slow_reader})], ids=range(4))
def test_a_run_that_is_stopped_says_why_and_starts_again(made, folder, code, line, kill, patch):
    """A full disk, a killed worker (multiprocessing.Pool would wait for it for ever), Ctrl-C (which
    a terminal sends to the workers too), and a killed run, whose workers must not live on."""
    def during(pid):
        group.append(pid)
        while kill and not (folder / "out/train_en.bin").exists():
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
    with pytest.raises(ValueError, match="no prepared data here"):
        open_data(str(folder / "out"))
    assert run(folder) == (0, "") and result(folder) == result(made)


def killed(folder, n):
    """A run that is killed instead of write number n; its exit code, and how many there were."""
    def armed(*args):
        def step(real, *paths):
            (folder / "writes").open("a").write(".")
            return real(*paths) if next(left, None) else os._exit(9)  # loses what is buffered
        left = iter([True] * n)
        for name in ("replace", "fsync", "unlink"):
            setattr(os, name, partial(step, getattr(os, name)))
        return Folder(*args)
    shutil.rmtree(folder / "out", ignore_errors=True)
    (folder / "writes").write_text("")
    code, _ = run(folder, workers=1, Folder=armed)
    return code, len((folder / "writes").read_text())


def test_a_run_killed_at_any_write_ends_with_the_same_bytes_when_given_again(made, folder):
    code, often = killed(folder, 1000)
    assert code == 0 and often > 10
    for n in range(often):
        assert killed(folder, n)[0] == 9
        assert run(folder, workers=1) == (0, "") and result(folder) == result(made)


def test_bad_lines_stop_or_are_skipped_and_no_good_one_is_lost(made, folder):
    lines = (folder / "in/a.jsonl").read_text().splitlines(keepends=True)
    (folder / "in/a.jsonl").write_text("".join(lines[:200] + ['{"text": 1}\n'] + lines[200:]))
    assert f"{folder}/in/a.jsonl:201:10: field of a wrong type: 'text' must" in run(folder)[1]
    assert run(folder, "--on_bad_line=skip") == (0, "") and result(folder) == result(made)
    out = (folder / "stdout").read_text()
    assert "bad lines skipped: 1 (field of a wrong type 1)" in out


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
    (lambda f: (f / "o").mkdir() or (f / "o/x.bin").touch(), ["--out_dir={}/o"],
     "o holds x.bin, made by something"),
    (lambda f: flip(f / "tok.txt"), [], "tok.txt: damaged"),
    (lambda f: cut(f / "in/b.jsonl.gz"), ["--out_dir={}/o"], "b.jsonl.gz: cannot be read to its"),
    (lambda f: (f / "in/a.jsonl").write_text('{"messages": []}'), ["--out_dir={}/o"],
     "in/a.jsonl:1:1: field missing: 'text'"),
    (lambda f: 0, ["--out_dir={}/o", "--val_fraction=1e-9"], "into the val split"),
    (lambda f: 0, ["--out_dir={}/o", "--val_fraction=0.999999999"], "into the train split"),
    (lambda f: 0, ["--tokenizer=none.txt"], "none.txt: No such file or directory; make one with"),
    (lambda f: 0, ["--input=out/toyworld/pt.jsonl"], "make it with: python -m demo.world"),
    (lambda f: 0, ["--out_dir={}/tok.txt"], "tok.txt: File exists")], ids=range(14))
def test_a_mistake_is_one_line(made, folder, spoil, args, line):
    shutil.copytree(made / "out", folder / "out")
    assert run(folder) == (0, "")  # nothing is wrong yet
    spoil(folder)
    code, error = run(folder, *(arg.format(folder) for arg in args))
    assert code == 2 and line in error and error.count("\n") == 1, error


def test_an_input_that_changes_while_it_is_read_is_noticed(made, folder):
    code, error = run(folder, encode=touching)
    assert code == 2 and error.endswith(": changed while it was read; give the command again\n")
    assert run(folder) == (0, "") and result(folder) == result(made)


def test_letters_that_look_like_the_end_of_a_document_are_counted(folder):
    """Files like those of TinyStories have <|endoftext|> between stories. A text cannot write a
    special token, see SECURITY.md, so the stories ran together, and no word was said."""
    (folder / "in/c.txt").write_text("A story.\n<|endoftext|>\nAnother.\n" * 9)
    assert run(folder, workers=1) == (0, "")
    n = sum("<|endoftext|>" in text for text in TEXTS + TEXTS[:50]) + 1
    assert f"that hold the letters <|endoftext|>: {n}. They are learnt as letters" in (
        folder / "stdout").read_text()


def test_it_works_without_fork_and_the_modules_that_windows_lacks(made, folder):
    """There a worker is a new Python, which imports what it needs."""
    code = ("import multiprocessing, os, sys\n"
            "sys.modules.update(resource=None, fcntl=None); del os.fork\n"
            "multiprocessing.set_start_method('spawn')\n"
            "import data\ndata.main()\n")
    done = subprocess.run([sys.executable, "-c", code, f"--input={folder}/in", "--workers=2",
                           f"--tokenizer={folder}/tok.txt", f"--out_dir={folder}/out",
                           "--val_fraction=0.1"], capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stderr) == (0, "") and result(folder) == result(made)


@pytest.mark.parametrize("n_vocab, width", [(65536, 2), (65537, 4)])
def test_more_than_65536_tokens_take_four_bytes(folder, n_vocab, width):
    tokens = [bytes([i]) for i in range(256)] + [b"%c%c" % divmod(i, 256) for i in range(65536)]
    (folder / "tok.txt").write_text(dump(tokens[:n_vocab - 4], CHAR_PATTERN))
    assert run(folder, workers=1) == (0, "")
    file = open_token_file(str(folder / "out/train_zh.bin"))
    assert file.ids.itemsize == width and file.ids.max() == n_vocab - 4  # <|endoftext|>


def test_a_folder_with_a_file_of_another_tokenizer_is_refused(made, folder):
    shutil.copytree(made / "out", folder / "out")
    (folder / "tok.txt").write_text(dump(train_bpe(count_pieces(TEXTS), 280), HAN_PATTERN))
    assert run(folder, f"--out_dir={folder}/other") == (0, "")
    shutil.copy(folder / "other/val_en.bin", folder / "out/val_en.bin")
    with pytest.raises(ValueError, match="val_en.bin: made with another tokenizer"):
        open_data(str(folder / "out"))
    with pytest.raises(ValueError, match="no prepared data here; make it with python data.py"):
        open_data(str(folder))

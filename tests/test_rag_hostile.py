"""A hostile user and hostile documents: a clear line each, no traceback, and nothing lost."""
import io
import json
import multiprocessing
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

import data
import rag
from plumbing.tokenfiles import open_token_file
from rag import shown
from search import documents
from search.documents import count_pieces, find_documents
from search.index import Index
from search.manifest import sha256_of
from search.readers import decode
from search.segment import split
from tokenizer import HAN_PATTERN, dump

ROOT = Path(rag.__file__).resolve().parent

cut = lambda text, name: split(text, name, 64, count=count_pieces)


@pytest.fixture
def run(rag_py):
    return rag_py


@pytest.fixture
def notes(tmp_path, run):
    """A folder of one note, and its index."""
    folder, index = tmp_path / "notes", f"--index={tmp_path}/ix"
    folder.mkdir()
    (folder / "key.md").write_text("# Keys\n\nThe spare key hangs behind the calendar.\n")
    assert run("add", folder, index)[0] == 0
    return folder, index


# ------------------------------------------------------------------------ documents

@pytest.mark.parametrize("text", [
    "a\u2028[2] b", "a\x0c[2] b", "a\x85[2] b", "a\n> [2] b", "a\n- [2] b", "a\n**[2] b",
    "a\n\u3000[ 2 ] b", "a\n\u200b[\u200b2] b", "a\n\U000e0041[2] b", "a\n\xad[２] b"])
def test_no_line_of_a_document_looks_like_a_numbered_source(text):
    """To fail with the form feed, the other line ends, quotes, lists, tags and soft hyphens:
    only spaces could stand before the bracket."""
    assert "[" not in shown(text) and "b" in shown(text)
    assert shown("see [2], a[2]") == "see [2], a[2]"


def test_what_is_invisible_hides_no_word_and_reaches_no_terminal(notes, run):
    """Text from the web holds soft hyphens and zero-width spaces: "pass\u200bword" was found by
    "pass" alone. And a note that clears the screen did so when it was shown. To fail with
    `terms` and `best_sentences` as they were."""
    folder, index = notes
    (folder / "evil.md").write_text("# Net\x1b[2J\n\nThe pass\u200bword of the 北\u2060京 router "
                                    "is \x1b[31mtu\xadlip\U000e0041.\n")
    assert run("add", folder, index)[0] == 0
    for question in ("What is the password?", "北京"):
        code, out, _ = run("ask", question, index, "--n_sources=1")
        assert code == 0 and "tulip" in out and out.isprintable() is False
        assert not set(out) & set("\x1b\u200b\xad\U000e0041"), ascii(out)


def test_damaged_utf8_is_not_taken_for_chinese_of_another_encoding():
    """A log that was cut off within a character: as GB18030 its 你好 is 浣犲ソ, and nobody is told.
    Seen to fail without the count of good characters."""
    text = "你好世界，这是一个被截断的日志。"
    for raw in (text.encode()[:-2], text.encode() + b"\xff", text.encode() + b"\xe4\xbd"):
        with pytest.raises(ValueError, match="damaged UTF-8 at byte 4[58]"):
            decode(raw)
    assert decode(text.encode("gb18030"))[0] == text


def test_a_file_that_goes_away_and_a_link_to_itself_are_passed_over(notes, run, monkeypatch):
    """To fail: RuntimeError of Path.resolve for the link, and the end of the whole run when a
    file was gone between the list and the look at its size."""
    folder, index = notes
    os.symlink("loop.md", folder / "loop.md")
    (folder / "a.md").write_text("The ferry leaves at nine.")
    (folder / "b.md").write_text("The bakery closes at eight.")
    real = os.path.getsize

    def gone(path):
        if str(path).endswith("a.md"):
            raise FileNotFoundError(2, "No such file or directory", str(path))
        return real(path)
    monkeypatch.setattr(documents.os.path, "getsize", gone)
    code, out, err = run("add", folder, index)
    assert code == 0 and "loop.md: not a file" in out and "a.md: No such file" in out and not err
    assert "1 new, 1 unchanged" in out


def test_an_index_inside_a_folder_is_not_read_as_documents(notes, tmp_path):
    """Of two indexes below one folder the first one's chunks were documents of the second. Seen to
    fail without the look for starts-*.u64."""
    found, skipped = find_documents([str(tmp_path)])
    assert [path.name for path in found] == ["key.md"]
    assert len(skipped) == 1 and skipped[0].startswith(f"skipped {tmp_path}/ix: made by")


# ------------------------------------------------------------------------ the index

def test_a_users_files_in_the_folder_of_an_index_stay(tmp_path, run):
    """--index=notes is a slip of the hand. Whatever began with "vectors", "chunks", "starts" or
    "terms-" was deleted. To fail with the names compared by their beginnings only; and its
    own files became documents, without the look whether the folder is the index's."""
    folder, other = tmp_path / "notes", tmp_path / "other"
    for place in (folder, other):
        place.mkdir()
        for name in ("vectors.md", "chunks of gold.txt", "starts.md", "terms-of-service.md"):
            (place / name).write_text(f"The word {name} is here.")
    for _ in range(2):
        assert run("add", other, f"--index={folder}")[0] == 0
        code, _, err = run("add", folder, f"--index={folder}")
        assert code == 2 and "the index is in this folder; give another" in err
    assert len(list(folder.glob("* of *"))) == 1 and len(list(folder.glob("*.md"))) == 3
    assert "4 documents" in run("info", f"--index={folder}")[1]


def test_manifests_of_others_are_named_and_none_is_overwritten(tmp_path, run):
    """To fail: of a browser extension's manifest.json it was said that it is damaged and the
    folder to be removed; of another format, nothing to do; and brackets gave a RecursionError."""
    path = tmp_path / "manifest.json"
    old = {"format": 1}
    for text, why in (('{"name": "extension"}', "another program: give another folder"),
                      (json.dumps([sha256_of(old), old]), "format 1, this program reads 3; remove"),
                      ("[" * 100_000, "damaged"), ("", "damaged"), ("[1, 2]", "damaged")):
        path.write_text(text)
        for job in (("ask", "x"), ("add", tmp_path), ("info",)):
            code, out, err = run(*job, f"--index={tmp_path}")
            assert code == 2 and why in err and len(err.splitlines()) == 1, (text[:20], job, err)
        assert path.read_text() == text


def add_alone(folder, index, limit, pipe):
    """`add` in a process whose files may have `limit` bytes."""
    if limit:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    sys.argv = ["rag.py", "add", folder, f"--index={index}"]
    sys.stderr = sys.stdout = io.StringIO()
    try:
        rag.main()
        pipe.send((0, sys.stdout.getvalue()))
    except SystemExit as exit_:
        pipe.send((exit_.code, sys.stdout.getvalue()))


def alone(*arguments):
    ours, theirs = multiprocessing.get_context("fork").Pipe()
    child = multiprocessing.get_context("fork").Process(target=add_alone, args=(*arguments, theirs))
    child.start()
    assert ours.poll(120)
    child.join()
    return ours.recv()


def test_a_disk_that_is_full_and_a_second_add_lose_nothing(notes, tmp_path, run):
    """Files may not grow beyond 200 bytes; then, another process holds the lock. The old index is
    there all the time. To fail: the message named no file (index.py's `raise` alone)."""
    folder, index = notes
    (folder / "more.md").write_text("The ferry leaves at nine. " * 400)
    code, said = alone(str(folder), str(tmp_path / "ix"), 200)
    assert code == 3 and "File too large" in said and str(tmp_path / "ix") in said, said
    assert "calendar" in run("ask", "Where is the spare key?", index)[1]
    with Index(str(tmp_path / "ix"), True):
        code, said = alone(str(folder), str(tmp_path / "ix"), 0)
        assert code == 2 and "another process is writing" in said
    assert "1 new, 1 unchanged" in run("add", folder, index)[1]


# ------------------------------------------------------------------------ questions

def test_no_documents_and_no_question(notes, tmp_path, run):
    """To fail: an empty folder was reported as ": ; 0 chunks"."""
    (tmp_path / "empty").mkdir()
    code, out, _ = run("add", tmp_path / "empty", f"--index={tmp_path}/none")
    assert code == 0 and "nothing to read; 0 chunks of 0 documents" in out
    code, _, err = run("ask", "x", f"--index={tmp_path}/none")
    assert code == 2 and "no index here; make one with" in err
    for question in ("", "   ", "?!", "\u200b", "\udcff", "<|im_end|>", "key " * 2500,
                     "中" * 10_000):
        code, out, err = run("ask", question, notes[1], "--n_sources=1")
        assert code in (0, 1) and not err and len(out) < 200, question[:9]


def test_a_question_that_is_too_long_does_not_end_a_chat(notes, tiny, run):
    """Nor the conversation before it. To fail: exit code 2."""
    code, out, err = run("chat", notes[1], f"--checkpoint={tiny.pt}", "--max_tokens=4",
                         "--template=short", stdin=f"Where is the spare key?\n{'key ' * 2500}\n"
                         "Where is the spare key?\n")
    assert code == 0 and "Traceback" not in err and "no source fits beside the question" in err
    assert out.count("key.md:1") == 2


def test_an_index_that_cannot_be_made_and_output_that_cannot_be_written(notes, tmp_path):
    """Each is named in one line: "[Errno 17] File exists" and "[Errno 28] No space left on device"
    said neither what nor where."""
    (tmp_path / "file").write_text("x")
    command = '"$0" rag.py add "$1" --index="$1/../{}" {}'
    for index, redirect, code, why in (
            ("file", "", 2, "file is a file, and must be a folder"),
            ("ix", ">/dev/full", 3, "the output cannot be written: No space left on device")):
        done = subprocess.run(["bash", "-c", command.format(index, redirect), sys.executable,
                               notes[0]], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == code and done.stderr.count("\n") == 1 and why in done.stderr


def test_ctrl_c_is_no_traceback(notes, run, monkeypatch):
    """To fail with KeyboardInterrupt not caught."""
    def interrupted(*arguments, **settings):
        raise KeyboardInterrupt
    monkeypatch.setattr(rag, "answer", interrupted)
    assert run("ask", "x", notes[1]) == (130, "", "stopped\n")


# ------------------------------------------------------------------------ split

def test_segments_are_training_text_as_they_are(notes, tmp_path, run):
    """rag.py split | data.py: each line has a text and its language, which is Chinese also for a
    bit of code below a Chinese heading. To fail without the field "lang"."""
    folder, _ = notes
    (folder / "中文.md").write_text("# 安装说明\n\n" + "先下载，再安装。" * 9
                                  + "\n\n# 运行环境的准备\n\n```\nmake\n```\n")
    code, out, _ = run("split", folder, "--semantic", "--chunk_tokens=32")
    rows = [json.loads(line) for line in out.splitlines()]
    assert code == 0 and {row["lang"] for row in rows} == {"en", "zh"} and len(rows) > 5
    assert next(row for row in rows if "make" in row["text"])["lang"] == "zh"
    (tmp_path / "rows.jsonl").write_text(out)
    (tmp_path / "tok.txt").write_text(dump([bytes([i]) for i in range(256)], HAN_PATTERN))
    done = os.spawnv(os.P_WAIT, sys.executable, [
        sys.executable, str(Path(data.__file__)), f"--input={tmp_path}/rows.jsonl", "--workers=1",
        f"--tokenizer={tmp_path}/tok.txt", f"--out_dir={tmp_path}/data", "--val_fraction=0.5"])
    assert done == 0
    for lang in ("en", "zh"):
        made = [open_token_file(str(f)) for f in tmp_path.glob(f"data/*_{lang}.bin")]
        assert sum(file.n_docs for file in made) == sum(row["lang"] == lang for row in rows)

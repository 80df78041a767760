"""An index is what its documents are now, whatever was done to them and however they came in."""
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import rag
from search.documents import count_pieces, forget_gone, remove, update
from search.index import Index
from search.segment import split

ROOT = Path(__file__).resolve().parent.parent
cut = lambda text, name: split(text, name, 64, count=count_pieces)
WORDS = "alarm bins code Friday hangs key lamp Monday pump spare 钥匙 水泵 星期 密码".split()


@pytest.fixture
def run(rag_py, tmp_path):
    """rag.py with an index in tmp_path."""
    return lambda *arguments: rag_py(*arguments, f"--index={tmp_path}/ix")


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def test_a_file_added_by_its_name_and_then_deleted_is_forgotten_with_its_folder(tmp_path, run):
    """Its row said that it came through no folder, so no folder ever forgot it: the alarm code of a
    note that was deleted for its sake was still told."""
    write(tmp_path / "notes/a.md", "The alarm code of the workshop is 4417.")
    write(tmp_path / "notes/b.md", "The bins are emptied on Tuesday.")
    run("add", tmp_path / "notes/a.md")
    assert "1 new, 1 unchanged" in run("add", tmp_path / "notes")[1]
    (tmp_path / "notes/a.md").unlink()
    code, out, _ = run("add", tmp_path / "notes")
    assert f"forgotten: {tmp_path}/notes/a.md\n" in out and "1 unchanged, 1 gone" in out
    assert run("ask", "What is the alarm code?")[:2] == (1, rag.REFUSAL["en"] + "\n")


def test_a_folder_that_was_renamed_is_not_there_twice(tmp_path, run):
    """The old "Tuesday" ranked above the new "Friday", and nothing could remove it: adding the old
    name again only said that there is no such folder."""
    write(tmp_path / "notes/b.md", "The bins are emptied on Tuesday.")
    run("add", tmp_path / "notes")
    os.rename(tmp_path / "notes", tmp_path / "new")
    write(tmp_path / "new/b.md", "The bins are emptied on Friday.")
    assert "1 new, 1 gone" in run("add", tmp_path / "new")[1]
    out = run("ask", "When are the bins emptied?")[1]
    assert "Friday" in out and "Tuesday" not in out
    shutil.rmtree(tmp_path / "new")
    assert "1 gone; 0 chunks of 0 documents" in run("add", tmp_path / "new")[1]
    assert run("add", tmp_path / "new")[0] == 2  # now it is nothing that the index knows


def test_asking_finds_nothing_that_is_gone_and_says_what_has_changed(tmp_path, run):
    """Without an `add` in between. To fail: the answer came from a file that was not there."""
    write(tmp_path / "notes/a.md", "The alarm code of the workshop is 4417.")
    write(tmp_path / "notes/b.md", "The bins are emptied on Tuesday.")
    run("add", tmp_path / "notes")
    assert run("ask", "When are the bins emptied?")[2] == ""
    (tmp_path / "notes/a.md").unlink()
    later = os.stat(tmp_path / "ix/manifest.json").st_mtime + 9
    os.utime(tmp_path / "notes/b.md", (later, later))
    code, out, err = run("ask", "What is the alarm code?")
    assert (code, out) == (1, rag.REFUSAL["en"] + "\n") and len(err.splitlines()) == 1
    assert "gone since they were indexed: 1, changed: 1" in err
    os.utime(tmp_path / "notes/b.md")  # touched, and the same: said until the next `add`
    run("add", tmp_path / "notes")
    assert run("ask", "When are the bins emptied?")[2] == ""


def test_add_without_a_path_takes_up_what_has_changed(tmp_path, run):
    """What `ask` says has changed, is gone or is new, wherever it was added from."""
    for name in ("one/a.md", "one/gone.md", "two/b.md"):
        write(tmp_path / name, "The bins are emptied on Tuesday.")
    run("add", tmp_path / "one", tmp_path / "two/b.md")
    (tmp_path / "one/gone.md").unlink()
    write(tmp_path / "one/new.md", "The pump is blue.")
    write(tmp_path / "two/b.md", "The bins are emptied on Friday.")
    os.utime(tmp_path / "two/b.md", (1e9, 1e9))
    assert "python rag.py add takes that up" in run("ask", "Which pump?")[2]
    assert "1 new, 1 changed, 1 unchanged, 1 gone" in run("add")[1]
    assert run("ask", "Which pump?")[1:] == (
        f"The pump is blue. [1]\n  [1]* {tmp_path}/one/new.md:1  new\n", "")


def test_no_clock_tells_what_has_changed(tmp_path, run):
    """A file from a camera whose clock is ahead counted as changed after every `add`, for ever. And
    when the clock was put back, an edit that came after the `add` seemed older than the index, and
    the answer was the old one without a word."""
    write(tmp_path / "notes/a.md", "The bins are emptied on Tuesday.")
    os.utime(tmp_path / "notes/a.md", (4e9, 4e9))
    run("add", tmp_path / "notes")
    assert run("ask", "When are the bins emptied?")[2] == ""
    write(tmp_path / "notes/a.md", "The bins are emptied on Friday.")
    os.utime(tmp_path / "notes/a.md", (1e9, 1e9))
    assert "changed: 1" in run("ask", "When are the bins emptied?")[2]
    run("add", tmp_path / "notes")
    assert run("ask", "When are the bins emptied?")[1:] == (
        f"The bins are emptied on Friday. [1]\n  [1]* {tmp_path}/notes/a.md:1  a\n", "")


def test_asking_says_how_many_files_came_into_the_folders(tmp_path, run):
    """Only `add` found a new note, and the answer came from the older ones without a word. What
    was refused, or removed on purpose, is not new; neither is what lies beside a file that was
    added by its name. A moved file keeps its time, so times cannot tell."""
    for name in ("notes/deep/a.md", "notes/removed.md", "single/b.md"):
        write(tmp_path / name, f"The word of {name} is lamp.")
    (tmp_path / "notes/binary.md").write_bytes(b"\0\1")
    run("add", tmp_path / "notes", tmp_path / "single/b.md")
    run("remove", tmp_path / "notes/removed.md")
    write(tmp_path / "single/c.md", "Nobody asked for this one.")
    assert run("ask", "Which word?")[2] == ""
    write(tmp_path / "moved.md", "The bins are emptied on Friday.")
    os.utime(tmp_path / "moved.md", (0, 0))
    os.rename(tmp_path / "moved.md", tmp_path / "notes/deep/moved.md")
    err = run("ask", "Which word?")[2]
    assert len(err.splitlines()) == 1 and "new files in their folders: 1; python rag.py add" in err
    assert "1 new" in run("add", tmp_path / "notes/deep")[1]
    assert run("ask", "When are the bins emptied?")[2] == ""
    run("remove", tmp_path / "notes")
    write(tmp_path / "notes/late.md", "The folder is forgotten.")
    assert run("ask", "Which word?")[2] == ""


def test_a_document_that_can_no_longer_be_read_is_no_document(tmp_path, run):
    """What was known of it stayed: the file said one thing, or nothing, and the answer another."""
    write(tmp_path / "a.md", "The alarm code of the workshop is 4417.")
    run("add", tmp_path / "a.md")
    (tmp_path / "a.md").write_bytes(b"\0\1\2")
    code, out, _ = run("add", tmp_path / "a.md")
    assert "a.md: binary" in out and "1 unreadable; 0 chunks of 0 documents" in out
    (tmp_path / "a.md").unlink()
    write(tmp_path / "a.md/b.md", "The lamp is red.")  # a folder now, which nobody has added
    write(tmp_path / "c.md", "The pump is blue.")
    run("add", tmp_path / "c.md")
    assert "1 documents" in run("info")[1]


def test_remove_forgets_files_and_folders_there_or_not(tmp_path, run):
    for name in ("notes/a.md", "notes/deep/b.md", "more/c.md"):
        write(tmp_path / name, f"The word of {name} is lamp.")
    assert "3 new" in run("add", tmp_path / "notes", tmp_path / "more")[1]
    shutil.rmtree(tmp_path / "more")
    assert "2 forgotten; 1 chunks of 1 documents" in run(
        "remove", tmp_path / "notes/deep", tmp_path / "more")[1]
    code, _, err = run("remove", tmp_path / "more")
    assert code == 2 and "the index has nothing of it" in err
    assert "1 new, 1 unchanged" in run("add", tmp_path / "notes")[1]  # asked for again


@pytest.mark.parametrize("added", ["notes", "notes/b.md"])
def test_a_file_that_could_not_be_read_is_tried_again(tmp_path, run, monkeypatch, added):
    """Once refused, `add` without a path passed over it for ever, mended or not. What was removed
    on purpose stays away, readable or not."""
    write(tmp_path / "notes/a.md", "The bins are emptied on Tuesday.")
    (tmp_path / "notes/b.md").write_bytes(b"The spare key hangs in the k\xfftchen.")
    run("add", tmp_path / "notes/a.md", tmp_path / added)
    assert run("ask", "When are the bins emptied?")[2] == ""
    write(tmp_path / "notes/b.md", "The spare key hangs in the kitchen.")
    os.utime(tmp_path / "notes/b.md", (1e9, 1e9))
    assert "changed: 1" in run("ask", "When are the bins emptied?")[2]
    assert "1 new, 1 unchanged" in run("add")[1]
    assert "kitchen. [1]" in run("ask", "Where is the spare key?")[1]
    write(tmp_path / "notes/c.md", "The lamp is red.")
    real = Path.stat
    with monkeypatch.context() as patch:  # it is away for a moment
        patch.setattr(Path, "stat", lambda path, **how: real(
            path / "no folder" if path.name == "c.md" else path, **how))
        assert "2 unchanged, 1 unreadable" in run("add", tmp_path / "notes/c.md")[1]
    assert "1 new, 2 unchanged" in run("add")[1]
    (tmp_path / "notes/b.md").write_bytes(b"\0")
    run("add")
    assert "1 forgotten" in run("remove", tmp_path / "notes/b.md")[1]
    write(tmp_path / "notes/b.md", "Nobody shall read this.")
    assert run("ask", "When are the bins emptied?")[2] == ""
    assert "2 unchanged; 2 chunks of 2 documents" in run("add")[1]


def test_a_file_is_read_once_its_parser_is_there(tmp_path, run, monkeypatch):
    """The file is as it was, so that no time of it tells."""
    pytest.importorskip("markdownify", reason="the extra `documents`")
    write(tmp_path / "notes/a.md", "The bins are emptied on Tuesday.")
    write(tmp_path / "notes/b.html", "<p>The spare key hangs in the kitchen.")
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "markdownify", None)
        assert "b.html: needs pip install" in run("add", tmp_path / "notes")[1]
    assert "1 new, 1 unchanged" in run("add")[1]


@pytest.mark.parametrize("others", [0, 9])
def test_nothing_of_a_removed_note_stays_on_the_disk(tmp_path, run, others):
    """Its text was still in the index: an empty one was not written anew, and one with others not
    before 30 % of its chunks were dead."""
    write(tmp_path / "notes/a.md", "The alarm code of the workshop is 4417.")
    for n in range(others):
        write(tmp_path / f"notes/other{n}.md", f"Shelf {n} holds paint.")
    run("add", tmp_path / "notes")
    files = lambda: (tmp_path / "ix").iterdir()
    held = lambda: [path.name for path in files() if b"4417" in path.read_bytes()]
    assert held() == ["chunks-0.jsonl"]
    run("remove", tmp_path / "notes/a.md")
    assert held() == [] and f"{others} chunks of {others} documents" in run("info")[1]
    said = run("add", tmp_path / "notes")[1]
    assert "1 new" in said and f"{others + 1} chunks of {others + 1} documents" in said


def everything(index):
    """Documents, and what three questions find, whatever the numbers of the chunks."""
    return set(index.manifest["documents"]), [
        [(hit.chunk, hit.score, hit.coverage) for hit in index.search(question, 30)]
        for question in ("Where does the spare key hang?", "Friday Monday 星期", "密码 lamp pump")]


def change(r, folder):
    """Write, edit, rename or delete a file or a folder. Returns what was done."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    folders = sorted(path for path in folder.rglob("*") if path.is_dir())
    act = r.choice(["write", "write", "edit", "rename", "delete", "move folder", "delete folder"])
    if act == "write" or not files:
        write(folder / r.choice("abc") / f"{r.randint(0, 5)}.md", " ".join(r.choices(WORDS, k=9)))
    elif act == "edit":
        write(r.choice(files), " ".join(r.choices(WORDS, k=9)))
    elif act == "rename":
        os.replace(r.choice(files), r.choice(folders) / f"{r.randint(0, 5)}.md")
    elif act == "delete":
        r.choice(files).unlink()
    elif act == "move folder":
        shutil.move(r.choice(folders), folder / f"moved{r.randint(0, 10_000)}")
    else:
        shutil.rmtree(r.choice(folders))
    return act


@pytest.mark.parametrize("seed", range(12))
def test_no_history_of_changes_tells_it_from_a_rebuild(tmp_path, seed, capsys):
    """Random files are written, edited, renamed and deleted, folders moved and deleted. Now and
    then a file or folder is added, or removed from the index. After each, the index is to the last
    bit what one made anew of the same documents is, and a reader finds nothing that is gone."""
    r, folder, known = random.Random(seed), tmp_path / "docs", set()
    folder.mkdir()
    with Index(str(tmp_path / "ix"), True) as index:
        for step in range(25):
            for _ in range(r.randint(1, 4)):
                change(r, folder)
            there = {path for path in folder.rglob("*.md")}
            known &= there
            place = r.choice(sorted(path for path in folder.rglob("*")) or [folder])
            inside = {path for path in there if path.is_relative_to(place)}
            if r.random() < 0.2 and known & inside:
                update(index, [], cut)
                remove(index, [str(place)])
                known -= inside
            else:
                update(index, [str(place)], cut)
                known |= inside
            with Index(str(tmp_path / f"anew{step}"), True) as anew:
                update(anew, sorted(map(str, known)), cut)
                assert everything(index) == everything(anew), (seed, step)
    for _ in range(5):
        change(r, folder)
    reader = Index(str(tmp_path / "ix"))
    forget_gone(reader)
    assert set(map(Path, reader.manifest["documents"])) == {p for p in known if p.exists()}
    assert all(Path(hit.chunk.doc).exists() for hit in reader.search("key lamp Monday 星期", 30))


def test_the_command_ends_as_it_should_where_there_is_no_index(tmp_path):
    """And makes no folder for one."""
    done = subprocess.run([sys.executable, "rag.py", "remove", "x", f"--index={tmp_path}/ix"],
                          cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "no index here" in done.stderr and not done.stdout
    assert not (tmp_path / "ix").exists()

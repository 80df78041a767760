"""Which files a path stands for: what its owner wrote there, and every other thing by name."""
import os
import socket
from pathlib import Path

import pytest

from plumbing.corpus import find_files
from plumbing.files import check_place, find, split_paths, write_text


def made(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"text of {name}")
    return folder


def seen(folder: Path) -> tuple[list[str], dict[str, str]]:
    """The files of a folder, and why the rest is passed over."""
    found = find(str(folder), lambda path: "" if path.endswith(".txt") else "no text")
    return ([os.path.relpath(one.path, folder) for one in found if not one.why],
            {os.path.relpath(one.path, folder): one.why for one in found if one.why})


def test_hidden_copies_and_what_macos_leaves_are_not_learnt(tmp_path):
    """A notebook's .ipynb_checkpoints, .git and the __MACOSX/._x.txt of an archive, full of NUL
    bytes, were learnt without a word; rag.py had rules of its own."""
    made(tmp_path, "b.txt", "sub/a.txt", "a.pdf", ".ipynb_checkpoints/b.txt", ".git/c.txt",
         "__MACOSX/._b.txt", "sub/._a.txt", "sub/__pycache__/d.txt")
    assert seen(tmp_path) == (["b.txt", "sub/a.txt"], {
        "a.pdf": "no text", ".ipynb_checkpoints": "hidden", ".git": "hidden",
        "__MACOSX": "left by macOS in an archive", "sub/._a.txt": "hidden",
        "sub/__pycache__": "made by Python"})
    assert seen(made(tmp_path / ".mine", "x.txt"))[0] == ["x.txt"]  # a folder that was named itself


@pytest.mark.skipif(os.name == "nt", reason="no pipes and sockets in folders")
def test_a_pipe_or_socket_does_not_stop_the_search(tmp_path, monkeypatch):
    """Opening a FIFO waited for ever."""
    made(tmp_path, "a.txt")
    os.mkfifo(tmp_path / "p.txt")
    monkeypatch.chdir(tmp_path)  # the name of a socket must be short
    with socket.socket(socket.AF_UNIX) as s:
        s.bind("s.txt")
        assert seen(tmp_path) == (["a.txt"], {"p.txt": "not a file", "s.txt": "not a file"})
    with pytest.raises(ValueError, match="p.txt: not a file"):
        find_files(f"{tmp_path}/p.txt")


def test_links_are_followed_inside_the_folder_and_named_outside_it(tmp_path):
    """Also in a circle, and to nothing."""
    made(tmp_path, "in/a.txt", "in/.store/b.txt", "out/c.txt")
    for link, to in (("a2.txt", "a.txt"), ("b", ".store"), ("up", "."), ("c.txt", "../out/c.txt"),
                     ("out", "../out"), ("gone.txt", "nowhere")):
        (tmp_path / "in" / link).symlink_to(to)
    files, why = seen(tmp_path / "in")
    assert files == ["a.txt", "a2.txt", "b/b.txt"]
    assert why == {".store": "hidden", "gone.txt": "not a file",
                   "c.txt": "a link out of the folder", "out": "a link out of the folder"}
    found = find_files(str(tmp_path / "in"))
    assert [os.path.relpath(f, tmp_path / "in") for f in found] == ["a.txt", "b/b.txt"]  # each once
    (tmp_path / "link").symlink_to(tmp_path / "out")  # a link that was named itself
    assert [Path(f).name for f in find_files(f"{tmp_path}/link")] == ["c.txt"]


def test_what_our_scripts_wrote_is_not_learnt(tmp_path):
    """`--input=. --out_dir=out` learnt its own tokenizer, of base64, as text the second time."""
    made(tmp_path, "a.txt", "data/tokenizer.txt", "data/train_zh.bin", "part/tokenizer.txt",
         "part/val_en.bin.part", "run/data/x.txt", "run/step00000004-0123456789abcdef.pt",
         "rows/train.words", "index/starts-1.u64", "index/y.txt", "mine/train.txt")
    (tmp_path / "tok.txt").write_text('{"khaosz_tokenizer": 1}\n')
    files, why = seen(tmp_path)
    assert files == ["a.txt", "mine/train.txt"]
    assert why == dict.fromkeys(["data", "index", "part", "rows", "run", "tok.txt"],
                                "made by a script of this project")
    (tmp_path / "log.jsonl").write_text('{"step": 0, "loss": 1.0}\n')
    assert find_files(f"{tmp_path}/mine,{tmp_path}") == [
        f"{tmp_path}/mine/train.txt", f"{tmp_path}/a.txt"]


def test_a_comma_in_a_name_is_no_comma_between_names(tmp_path, monkeypatch):
    """--input="notes, 2024.txt" said: notes: no such file or folder."""
    made(tmp_path, "notes, 2024.txt", "a.txt", "x,y/b.txt", "~user.txt")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert split_paths("notes, 2024.txt") == ["notes, 2024.txt"]
    assert split_paths(" a.txt,notes, 2024.txt ,x,y, ") == ["a.txt", "notes, 2024.txt", "x,y"]
    assert split_paths("a.txt,~/a.txt") == ["a.txt", f"{tmp_path}/a.txt"]
    assert split_paths("no,where") == ["no", "where"]
    assert find_files("x,y,notes, 2024.txt") == ["x,y/b.txt", "notes, 2024.txt"]


def test_a_name_cannot_command_the_terminal(tmp_path, capsys):
    """A file name with ESC bytes, out of an archive, coloured all that came after it."""
    made(tmp_path, "a.txt", "x\033[31mred.pdf", "\u202etxt.exe", "two\nlines.pdf")
    (tmp_path / os.fsdecode(b"\xff.txt")).touch()
    find_files(str(tmp_path))
    error = capsys.readouterr().err
    assert error.isascii() and error.count("\n") == 4 and "\033" not in error
    assert r"x\x1b[31mred.pdf: not one of" in error and r"\udcff.txt: its name is not" in error
    with pytest.raises(ValueError, match=r"x\\x1b\[31mred.pdf: not one of"):
        find_files(f"{tmp_path}/x\033[31mred.pdf")


def test_a_small_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "x"
    write_text(str(path), "old\n")

    def full(fd):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="x was not written: No space left on device"):
        write_text(str(path), "new")
    assert path.read_bytes() == b"old\n" and os.listdir(tmp_path) == ["x"]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs mkfifo")
def test_what_is_no_file_is_not_replaced_by_one(tmp_path):
    """`tokenizer.py --out=/dev/null`, typed by root to see the figures only, made /dev/null a file
    of 3 kB, and broke the machine for everybody. A pipe stands for it here."""
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="pipe was not written: there is something that is no file"):
        write_text(tmp_path / "pipe", "text")
    assert (tmp_path / "pipe").is_fifo() and os.listdir(tmp_path) == ["pipe"]
    with pytest.raises(ValueError, match="pipe: there is something that is no file"):
        check_place(str(tmp_path / "pipe"))


def test_a_place_is_checked_before_the_work(tmp_path):
    """A tokenizer was trained for minutes and then could not be written: --out was a folder, or lay
    below a file. One that named the training text by mistake replaced it."""
    (tmp_path / "notes.txt").write_text("my notes")
    (tmp_path / "old.txt").write_text('{"khaosz_tokenizer": 1}')
    for place, why in ((tmp_path, "something that is no file"), ("/dev/fd/x", "No such file"),
                       (tmp_path / "notes.txt/t", "notes.txt: (File exists|Not a directory)"),
                       (tmp_path / ("x" * 300), "File name too long"),
                       (tmp_path / "notes.txt", "has not written that file")):
        with pytest.raises(ValueError, match=why):
            check_place(str(place))
    for place in ("old.txt", "new.txt", "folder/new.txt"):
        check_place(str(tmp_path / place))
    assert sorted(os.listdir(tmp_path)) == ["folder", "notes.txt", "old.txt"]

"""Folders of documents and an index that is kept in step with them."""
import json
import os
import time

import pytest
from notes import NOTES

from search.documents import count_pieces, find_documents, read_document, update
from search.index import Index
from search.readers import decode
from search.segment import split

cut = lambda text, name: split(text, name, 64, count=count_pieces)


@pytest.fixture
def folder(tmp_path):
    for name, text in NOTES.items():
        (tmp_path / "notes" / name[0]).mkdir(parents=True, exist_ok=True)
        (tmp_path / "notes" / name[0] / name).write_text(text, encoding="utf-8")
    return tmp_path / "notes"


def counts(index, folder, **settings):
    found = update(index, [str(folder)], cut, **settings)
    return {key: n for key, n in found.items() if n}


def test_only_what_changed_is_read_again(folder, tmp_path):
    with Index(str(tmp_path / "ix"), True) as index:
        assert counts(index, folder) == {"new": 12}
        assert counts(index, folder) == {"unchanged": 12}
        bike = folder / "b" / "bike.md"
        bike.write_text("# Bicycle\n\nIt was sold.\n")
        (folder / "c" / "cat.md").unlink()
        (folder / "new.txt").write_text("The hedgehog sleeps under the shed.")
        assert counts(index, folder) == {"new": 1, "changed": 1, "unchanged": 10, "gone": 1}
        assert index.search("spare key calendar", 1) == []
        assert index.search("hedgehog", 1)[0].chunk.doc == str(folder / "new.txt")
        assert index.search("bicycle sold", 1)[0].chunk.line == 1
        assert counts(index, folder, how="other settings") == {"changed": 12}


def test_documents_of_other_folders_stay(folder, tmp_path):
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "x.md").write_text("The lighthouse blinks twice.")
    with Index(str(tmp_path / "ix"), True) as index:
        update(index, [str(folder)], cut)
        update(index, [str(tmp_path / "more")], cut)
        update(index, [str(folder / "b" / "bike.md")], cut)  # a single file: nothing is gone
        assert len(index.manifest["documents"]) == 13


def test_re_adding_a_hundred_files_is_quick(tmp_path):
    (tmp_path / "many").mkdir()
    for i in range(100):
        (tmp_path / "many" / f"{i}.md").write_text(f"# Note {i}\n\nText number {i}. " * 20)
    with Index(str(tmp_path / "ix"), True) as index:
        update(index, [str(tmp_path / "many")], cut)
        best = 9.0
        for _ in range(5):
            start = time.perf_counter()
            assert update(index, [str(tmp_path / "many")], cut)["unchanged"] == 100
            best = min(best, time.perf_counter() - start)
    assert best < 0.05, best


def test_what_is_passed_over_is_said_in_a_line_each(folder, tmp_path, capsys):
    (folder / "a.odt").write_bytes(b"%PDF")
    (folder / ".git").mkdir()
    (folder / "big.txt").write_bytes(b"x" * (2 << 20))
    outside = tmp_path / "secret.md"
    outside.write_text("secret")
    os.symlink(outside, folder / "link.md")
    os.symlink(tmp_path, folder / "away")
    (folder / os.fsdecode(b"bad\xff.md")).write_text("not UTF-8, but for its content")
    found, skipped = find_documents([str(folder)], 1)
    for what in ("a.odt: convert to text first", ".git: hidden",
                 "big.txt: more than --max_file_mb=1", "link.md: a link out of the folder",
                 "away: a link out of the folder", "bad\\udcff.md: its name is not UTF-8"):
        assert sum(line.endswith(what) for line in skipped) == 1, (what, skipped)
    assert len(skipped) == 6 and "secret.md" not in str(found)
    with pytest.raises(ValueError, match="nowhere: no such file"):
        find_documents(["nowhere"])
    with Index(str(tmp_path / "ix"), True) as index:  # seen to fail: the manifest cannot be written
        update(index, [str(folder)], cut)
    assert "bad\\udcff.md: its name is not UTF-8" in capsys.readouterr().out


def test_encodings():
    text = "中文 and text\n"
    for encoding in ("utf-8", "utf-8-sig", "utf-16", "gb18030"):
        assert decode(text.encode(encoding))[0].removeprefix("\ufeff") == text
    with pytest.raises(ValueError, match="binary"):
        decode(b"\x7fELF\0\0")
    with pytest.raises(ValueError, match="byte 3"):
        decode(b"abc\xff\xff\xff")


def test_a_file_that_cannot_be_read_is_skipped_by_name(folder, tmp_path, capsys):
    (folder / "noise.txt").write_bytes(b"\0\1\2")
    with Index(str(tmp_path / "ix"), True) as index:
        assert counts(index, folder) == {"new": 12, "unreadable": 1}
    assert "noise.txt: binary" in capsys.readouterr().out


def test_a_line_of_jsonl_is_a_document_of_its_own(tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = [{"title": "One", "text": "The first one.\0"}, {"text": "第二个。"}]
    raw = "\n".join(json.dumps(row) for row in rows).encode()
    chunks, met = read_document(path, raw, cut)
    assert [(c.line, c.crumb, c.text) for c in chunks] == [
        (1, "One", "The first one.\ufffd"), (2, "rows", "第二个。")]
    assert met == {"characters replaced": 1, "read as GB18030": 0}
    for bad in (b'{"text": 3}', b"[1]", b"{", b"[" * 100_000):
        with pytest.raises(ValueError, match="line 2"):
            read_document(path, b'{"text": "x"}\n' + bad, cut)


def test_an_interrupted_run_keeps_what_was_read(folder, tmp_path, monkeypatch, capsys):
    seen = []

    def slow(text, name):
        seen.append(name)
        if len(seen) == 5:
            raise KeyboardInterrupt
        return cut(text, name)

    with Index(str(tmp_path / "ix"), True) as index:
        assert update(index, [str(folder)], slow)["new"] == 4
    assert "goes on" in capsys.readouterr().err
    with Index(str(tmp_path / "ix"), True) as index:
        assert counts(index, folder) == {"new": 8, "unchanged": 4}


def test_ctrl_c_while_a_commit_embeds_harms_nothing(folder, tmp_path, monkeypatch, capsys):
    """Embedding takes minutes, so Ctrl-C comes there; what was read is written afterwards, once.
    To fail: its chunks were there twice, and each search, for ever, was an IndexError."""
    monkeypatch.setattr("search.documents.COMMIT_CHUNKS", 3)
    calls = []

    def embed(texts, kind):
        calls.append(kind)
        if len(calls) == 3:  # after the probe and a first commit
            raise KeyboardInterrupt
        return [[float(len(text)), 1.0, 0.5] for text in texts]

    with Index(str(tmp_path / "ix"), True, embed) as index:
        stopped = update(index, [str(folder)], cut)["new"]
        assert len(calls) == 4 and 3 < stopped < 12 and "goes on" in capsys.readouterr().err
    with Index(str(tmp_path / "ix"), True, embed) as index:
        assert counts(index, folder)["new"] == 12 - stopped
    with Index(str(tmp_path / "anew"), True) as anew:
        update(anew, [str(folder)], cut)
    found = [Index(str(tmp_path / name)) for name in ("ix", "anew")]
    for question in ("Where is the spare key?", "备用电池放在哪里？"):
        one, two = ([(hit.chunk, hit.score) for hit in index.search(question)] for index in found)
        assert one == two and one


def test_a_file_that_gives_no_text_is_named(folder, tmp_path, capsys):
    """It counted as taken in, with 0 chunks. An empty file has nothing to miss."""
    (folder / "blank.md").write_text(" \n\n")
    (folder / "empty.md").write_text("")
    with Index(str(tmp_path / "ix"), True) as index:
        assert counts(index, folder) == {"new": 13, "unreadable": 1}
        assert "blank.md: no text in it\n" in capsys.readouterr().out
        (folder / "b" / "bike.md").write_text("\n")  # it had text: that is not found any more
        assert counts(index, folder) == {"unchanged": 12, "unreadable": 2}
        assert index.search("spare key calendar", 1) == []


def test_pieces():
    assert count_pieces("Two words, 三个字！x_1") == 2 + 1 + 3 + 1 + 1 + 1 + 1
    assert count_pieces("====") == 1 and count_pieces("=-=") == 3 and count_pieces("=" * 40) == 3

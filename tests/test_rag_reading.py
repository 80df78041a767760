"""What is read as what: encodings, headings, long words, names of languages and versions."""
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

import rag
from search.documents import chunks_of, count_pieces, find_documents, update
from search.index import Index
from search.readers import decode
from search.segment import split
from search.topics import terms

ROOT = Path(__file__).resolve().parent.parent
CHINESE = "备用钥匙放在厨房的抽屉里，电池放在灰色的小包里。每年三月给水泵上油，然后关上窗户。"
OTHERS = {
    "cp1252": "The pump doesn\u2019t start when it\u2019s cold. The owner\u2019s fuse lies here.",
    "latin-1": "Le café de la gare ouvre à six heures et le musée à neuf heures.",
    "big5": "備用鑰匙放在廚房的抽屜裡，電池放在灰色的小包裡。",
    "shift_jis": "予備の鍵は台所の引き出しにあります。電池は灰色の袋に入っています。",
    "euc_jp": "予備の鍵は台所の引き出しにあります。電池は灰色の袋に入っています。",
    "iso2022_jp": "予備の鍵は台所の引き出しにあります。",
    "euc_kr": "예비 열쇠는 부엌 서랍에 있습니다. 건전지는 회색 가방에 있습니다.",
    "koi8-r": "Запасной ключ лежит на кухне в ящике стола, а батарейки в серой сумке.",
    "cp1251": "Запасной ключ лежит на кухне в ящике стола, а батарейки в серой сумке.",
    "utf-16-le": CHINESE, "utf-16-be": "The spare key hangs in the kitchen.",
    "utf-32-le": CHINESE, "utf-32-be": "The spare key hangs in the kitchen."}


@pytest.mark.parametrize("encoding", OTHERS)
def test_an_encoding_that_cannot_be_told_is_refused_by_the_name_of_the_file(tmp_path, encoding,
                                                                            capsys):
    """Nearly any bytes are valid GB18030: the apostrophes of an English letter, and all of a
    Taiwanese one, were indexed as characters of no meaning, "2 new". Each of several lengths."""
    for n in (len(OTHERS[encoding]), 20, 9):
        raw = OTHERS[encoding][:n].encode(encoding)
        if b"\0" not in raw and b"\x1b" not in raw and raw.isascii():
            continue  # which is UTF-8 as well
        with pytest.raises(ValueError, match="UTF-8|UTF-16|ISO-2022"):
            decode(raw)
    (tmp_path / "letter.txt").write_bytes(OTHERS[encoding].encode(encoding))
    with Index(str(tmp_path / "ix"), True) as index:
        update(index, [str(tmp_path)], lambda text, name: split(text, name, count=len))
        assert len(index) == 0
    assert f"skipped {tmp_path}/letter.txt: " in capsys.readouterr().out


def test_gb18030_that_is_plainly_chinese_is_read_and_so_is_what_bears_its_mark(tmp_path, capsys):
    traditional = "他說這個問題我們不能在這裡說，因為大家都要上學，他的書在家裡。"
    for text in (CHINESE, CHINESE[:14], "第三章 " + CHINESE + " see page 12", traditional):
        assert decode(text.encode("gb18030"))[0] == text
    for encoding in ("utf-32", "utf-16", "utf-8-sig"):
        for text in (CHINESE, "Only English.", "混合 mixed"):
            assert decode(text.encode(encoding))[0].removeprefix("\ufeff") == text
    (tmp_path / "old.txt").write_bytes(CHINESE.encode("gb18030"))
    with Index(str(tmp_path / "ix"), True) as index:  # and that it was is said
        counts = update(index, [str(tmp_path)], lambda text, name: split(text, name, count=len))
        assert counts["read as GB18030"] == counts["new"] == 1
    capsys.readouterr()
    list(chunks_of([str(tmp_path / "old.txt")], lambda text, name: split(text, name, count=len)))
    assert capsys.readouterr().err == f"{tmp_path}/old.txt: read as GB18030\n"  # so does `split`
    with pytest.raises(ValueError, match="not UTF-32 at byte 8, as its first bytes say"):
        decode("ab".encode("utf-32")[:-1])


# ------------------------------------------------------------------------ headings

BOAT = """Boat manual
===========

Starting the engine
~~~~~~~~~~~~~~~~~~~

Open the fuel valve.

Anchoring
~~~~~~~~~

The anchor weighs 12 kg.

Sails
^^^^^

The storm sail is orange.

****
Crew
****

Two people, and a dog.
"""


def test_any_sign_underlines_a_heading_of_rst():
    """~~~~ opened a fence of Markdown, so that all headings below it were lost and the sections ran
    together as code. Levels go by the order in which the signs come, as in docutils."""
    crumbs = [chunk.crumb for chunk in split(BOAT, "boat.rst", 96, count=count_pieces)]
    assert crumbs == ["Boat manual > Starting the engine", "Boat manual > Anchoring",
                      "Boat manual > Anchoring > Sails",
                      "Boat manual > Anchoring > Sails > Crew"]
    assert {chunk.crumb for chunk in split(BOAT, "boat.md", 96, count=count_pieces)} != set(crumbs)
    plain = "A line of text that is long\n~~~\n\n# no heading\n\n----\n\nMore."
    assert [chunk.crumb for chunk in split(plain, "x.rst", 96, count=count_pieces)] == ["x"]


def test_a_comment_of_python_is_no_heading_and_code_is_cut_at_blank_lines():
    """The breadcrumb of a function was the comment above another: "TODO: remove > def f"."""
    code = ("# TODO: remove\nimport os\n\n\ndef f(x):\n    # twice\n    return 2 * x\n\n\n"
            "def g(x):\n    return x\n")
    chunks = split(code, "tools/code.py", 24, count=count_pieces)
    assert {chunk.crumb for chunk in chunks} == {"code"} and len(chunks) > 1
    assert all(chunk.text.startswith(("# TODO", "def ")) for chunk in chunks)


# ------------------------------------------------------------------------ words

def test_a_word_of_40_kb_is_cut_and_neither_fills_the_answer_nor_a_prompt(tmp_path, tiny, capsys,
                                                                        monkeypatch):
    """A hexadecimal dump counted as one token: its chunk was 40 kB, was printed whole, and left no
    room for any source in a prompt."""
    (tmp_path / "log.md").write_text(f"Log of the sensor: {'0a9b8c7d' * 5000} end. The sensor was "
                                     "replaced in May.")
    for arguments in (["add", str(tmp_path / "log.md")], ["ask", "Log of the sensor?"],
                      ["ask", "When was the sensor replaced?", f"--checkpoint={tiny.pt}",
                       "--max_tokens=4"]):
        monkeypatch.setattr(sys, "argv", ["rag.py", *arguments, f"--index={tmp_path}/ix"])
        try:
            rag.main()
        except SystemExit as exit_:
            assert exit_.code == 0
        assert len(capsys.readouterr().out) < 3000
    with Index(str(tmp_path / "ix")) as index:
        assert len(index) > 5 and max(len(index.chunk(i).text) for i in range(len(index))) < 5000
        best, = index.search("When was the sensor replaced?", 1)
        assert rag.best_sentence(best) == "The sensor was replaced in May."


@pytest.mark.parametrize("one, other", [
    ("C++", "C#"), ("C", "C++"), ("F#", "F"), (".NET", "net"), ("v1.2.10", "v10.1.2"),
    ("2.10", "10.2")])
def test_names_that_differ_by_a_sign_are_told_apart(tmp_path, one, other):
    """All that is no letter or digit was dropped: C++ and C# were both "c", and version 1.2.10 was
    found in a note about 10.1.2."""
    for before, after in (("", ""), ("用", "写"), ("(", ")"), ("in ", ".")):
        assert set(terms(before + one + after)) != set(terms(before + other + after))
    with Index(str(tmp_path), True) as index:
        for name, what in (("a", one), ("b", other)):
            text = f"The service in {what} is kept by {name * 3}."
            index.put(name, "", split(text, "", count=len))
        index.commit()
        for name, what in (("a", one), ("b", other)):
            best, = index.search(f"Who keeps the service in {what}?", 1)
            assert f"by {name * 3}" in best.chunk.text


def test_a_version_is_found_by_its_beginning_and_digits_take_linear_time():
    assert terms("Version v1.2.10, C++ und .NET") == [
        "version", "1", "1.2", "1.2.10", "c++", "und", ".net", "net"]
    start = time.process_time()
    assert len(terms("1." * 200_000)) < 500_000 and time.process_time() - start < 2


def test_words_that_ask_in_chinese_do_not_count_as_asked_for(tmp_path):
    """No note holds a word of "请告诉我…". Without this, four in ten questions of the toy world
    were refused, although their note was found first."""
    with Index(str(tmp_path), True) as index:
        index.put("a", "", split("晴洛的颜色是红色。", "", count=len))
        index.put("b", "", split("水泵每年三月上油，花费五十元。", "", count=len))
        index.commit()
        for question in ("请告诉我晴洛的颜色。", "晴洛的颜色是什么？", "水泵什么时候上油？",
                         "水泵上油花费多少？"):
            assert index.search(question, 1)[0].coverage > 0.5, question


# ------------------------------------------------------------------------ files and what is printed

def test_one_walker_for_documents_too(tmp_path):
    """Copies that an editor keeps, what macOS leaves in archives, pipes, and links out of the
    folder are named and not read. A link inside it is one document, not two, and a comma is part of
    a name."""
    good = tmp_path / "notes"
    for name in ("a, 2024.md", ".git/x.md", ".ipynb_checkpoints/a.md", "__MACOSX/._a.md", "b/c.md"):
        (good / name).parent.mkdir(parents=True, exist_ok=True)
        (good / name).write_text(f"The text of {name}.")
    os.mkfifo(good / "pipe.md")
    os.symlink(good / "b", good / "again")
    os.symlink("/etc", good / "out")
    found, skipped = find_documents([str(good)])
    assert [path.name for path in found] == ["a, 2024.md", "c.md"]
    for name in (".git", ".ipynb_checkpoints", "__MACOSX", "pipe.md", "out"):
        assert sum(line.startswith(f"skipped {good}/{name}: ") for line in skipped) == 1, skipped
    assert find_documents([str(good / "a, 2024.md")])[0] == [good / "a, 2024.md"]


def test_a_tilde_in_quotes_is_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.md").write_text("The lamp is red.")
    assert find_documents(["~/a.md"])[0] == [tmp_path / "a.md"]


def test_no_name_commands_the_terminal_and_results_are_json_and_nothing_else(tmp_path):
    """ESC [ 31 m in the name of a file turned the terminal red in the lines of `add`, `split` and
    `info`; with results in a file, what is passed over must not be in it."""
    evil = tmp_path / "n" / "x\x1b[31mred"
    evil.mkdir(parents=True)
    (evil / "a.md").write_text("The lamp is red.")
    (evil / "b.odt").write_text("x")
    (evil / "c.md").write_bytes(b"\0")
    def run(*arguments):
        done = subprocess.run([sys.executable, "rag.py", *map(str, arguments)], cwd=ROOT,
                              capture_output=True)
        assert b"\x1b" not in done.stdout + done.stderr, done
        return done.stdout.decode()
    at = f"--index={tmp_path}/ix"
    assert "b.odt: convert" in run("add", tmp_path / "n", at)
    assert "a.md:1" in run("ask", "What colour is the lamp?", at) and "a.md" in run("info", at)
    assert [json.loads(line)["text"] for line in run("split", tmp_path / "n").splitlines()] == [
        "The lamp is red."]
    run("remove", evil / "nothing", at)
    (evil / "a.md").unlink()
    assert "forgotten: " in run("add", tmp_path / "n", at)


def test_a_terminal_without_a_character_gets_another(tmp_path):
    """In GBK, as a Chinese Windows redirects, an emoji in a note ended `ask` with a traceback."""
    (tmp_path / "a.md").write_text("The lamp is red \U0001f6a8 \ufffd.", encoding="utf-8")
    for job in (["add", tmp_path / "a.md"], ["ask", "What colour is the lamp?"], ["info"]):
        done = subprocess.run([sys.executable, "rag.py", *map(str, job), f"--index={tmp_path}/ix"],
                              cwd=ROOT, capture_output=True,
                              env=os.environ | {"PYTHONIOENCODING": "gbk"})
        assert done.returncode == 0 and not done.stderr, done


@pytest.mark.parametrize("line, why", [
    ('{"text": "The lamp is red.", "text": "The lamp is blue."}', "key given twice: 'text'"),
    ('{"text": "The lamp is red.", "n": NaN}', "NaN or Infinity"),
    ('{"text": "The lamp is red.", "n": ' + "9" * 5000 + "}", "number too long"),
    ('{"text": ["The lamp is red."]}', 'not an object with a "text"'),
    ('{"text": "The lamp is red.", "title": ["Lamps"]}', '"title" must be a string')])
def test_lines_of_json_are_read_as_strictly_as_for_training(line, why, tmp_path, capsys):
    """Of a key that is given twice, the index knew the last value and answered "blue"; data.py
    refuses the same line."""
    (tmp_path / "a.jsonl").write_text('{"text": "The key hangs.", "title": null}\n' + line)
    with Index(str(tmp_path / "ix"), True) as index:
        counts = update(index, [f"{tmp_path}/a.jsonl"],
                        lambda text, name: split(text, name, count=len))
    assert counts["unreadable"] == 1 and f"a.jsonl: line 2: {why}" in capsys.readouterr().out

"""Reading text: nothing lost, nothing repaired, and damage named as file:line:column."""
import gzip
import json
import os
import random
import re
import subprocess
import sys

import pytest

from plumbing import corpus
from plumbing.chats import said_in
from plumbing.corpus import (BadLine, Batch, Document, find_files, language, made_by_workers, parse,
                             parse_records, read_batches, sampled)
from plumbing.jobs import Progress

GOOD = [{"text": "一只猫 sat.\nTwo [lines] {\"text\": 1}", "lang": "zh", "meta": {"text": 5}},
        {"id": -1.5e3, "text": "NaN Infinity \U0001f600 " + "7" * 5000}, {"text": "[" * 500}]

# A line with @ where it is damaged, and what is to be said of it.
DAMAGE = [
    (b'{"text": "\xe4\xb8\xad\xe6\x96\x87@\xff"}', "not UTF-8"),
    (b'{"text": "\xe4\xb8\xad" @"id": 1}', "not JSON"),
    (b'  @["text"]', "not an object"),
    (b'@{"id": 1, "data": {"text": "x"}}', "field missing"),
    (b'{"meta": {"text": "x"}, "a": "\\"text\\": 1", "text": @[1]}', "field of a wrong type"),
    (b'{"\\u0074ext": @" \\n\xe3\x80\x80"}', "empty text"),
    (b'@{"text": "' + b"x" * (1 << 20) + b'"}', "line too long"),
    (b'@{"text": "[[", "a": ' + b"[" * 99_999 + b"]" * 99_999 + b"}", "nested too deeply"),
    (b'@{"text": "' + b"8" * 5000 + b'", "n": -' + b"9" * 4301 + b"}", "number too long"),
    (b' @{"text": "\xe4\xb8\xad", "o": {"k": 1}, "p": {"k": 1, "\\u006b": 2}, "k": 3}',
     "key given twice"),
    (b'@{"text": "NaN", "n": [1, -Infinity, NaN]}', "NaN or Infinity"),
    (b'{"a": "\\ud800", "text": @"\\\\ud800 \\ud83d\\ude00 \\udfff"}', "lone surrogate"),
    (b'{"l": {"lang": 1}, "text": "x", "lang": @"English"}', "unknown language"),
]


def items(path, *said):
    return [item for batch in read_batches([str(path)]) for item in parse(batch, *said)]


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz"])
@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
def test_all_damage_is_found_and_no_good_line_is_lost(tmp_path, monkeypatch, suffix, end):
    """By line and column. Seen to fail when columns were counted in bytes, and when NaN passed."""
    monkeypatch.setattr(corpus, "MAX_LINE", 1 << 20)
    monkeypatch.setattr(corpus, "BATCH_BYTES", 5000)  # line numbers run on over many batches
    r, lines, bad = random.Random(0), [], []
    for i in range(2000):
        if i % 150 == 77 and (kind := i // 150) < len(DAMAGE):
            before, after = DAMAGE[kind][0].split(b"@")
            raw, column = before + after, len(before.decode()) + 1  # in characters, not bytes
            bad.append((f"{tmp_path}/x{suffix}:{i + 1}:{column}", DAMAGE[kind][1]))
        else:
            raw = json.dumps(r.choice(GOOD), ensure_ascii=i % 2 == 0).encode()
        lines.append(raw)
    assert len(bad) == len(DAMAGE) == 13
    path = tmp_path / f"x{suffix}"
    with (gzip.open if suffix.endswith("gz") else open)(path, "wb") as f:
        f.write(b"\xef\xbb\xbf" + end.join(lines))  # a BOM, and no line end at the end
    found = items(path)
    assert [(b.where, b.what) for b in found if isinstance(b, BadLine)] == bad
    texts = [d.text for d in found if isinstance(d, Document)]
    damaged = {raw.replace(b"@", b"") for raw, _ in DAMAGE}
    assert texts == [json.loads(raw)["text"] for raw in lines if raw not in damaged]


def test_damaged_lines_of_chats_and_pairs_are_placed_too(tmp_path):
    """All damage that is none of a field. Seen to fail, with a TypeError, for what is not UTF-8."""
    kinds = ("not UTF-8", "not JSON", "not an object", "nested too deeply", "number too long",
             "key given twice", "NaN or Infinity")
    for line, what in DAMAGE:
        if what in kinds:
            before, after = line.split(b"@")
            (tmp_path / "x.jsonl").write_bytes(b'{"a": 1}\n' + before + after + b'\n{"a": 2}\n')
            (batch,) = read_batches([str(tmp_path / "x.jsonl")])
            good, bad, last = parse_records(batch, lambda record: record["a"])
            column = len(before.decode()) + 1
            assert (bad.where, bad.what) == (f"{tmp_path}/x.jsonl:2:{column}", what)
            assert (good, last) == (1, 2)


@pytest.mark.parametrize("text, where", [
    ('[{"text": "x"},\n{"text": "y"}]', "1:16"), ('[\n  {"text": "x"}]', "1:2"),
    ('[{"text": "x"}]', "1:1")])
def test_a_list_in_place_of_lines_is_refused_with_the_command_that_makes_lines(
        tmp_path, text, where):
    """Most public chats come as one JSON list: "Expecting value" did not help."""
    path = tmp_path / "x.jsonl"
    path.write_text(text)
    assert str(items(path)[0]).startswith(f"{path}:{where}: not ")
    command = re.search(r"make lines of a list: (.*) < LIST", str(items(path)[0]))[1]
    made = subprocess.run(command, shell=True, input=text, capture_output=True, text=True,
                          env=os.environ | {"PATH": os.path.dirname(sys.executable)})
    path.write_text(made.stdout)
    assert {d.text for d in items(path)} <= {"x", "y"} and made.stdout


def test_empty_lines_are_nothing_and_unclosed_nesting_does_not_end_python(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'\n\r\n  \n{"text": "x"}\n\n{"text": ' + b"[" * 500_000)
    good, bad = items(path)
    assert good == Document("x", "en") and bad.what in ("nested too deeply", "not JSON")


def test_chats_are_text_for_the_tokenizer_only(tmp_path):
    """The replies of a ranking, too: the tokenizer read its prompt only, the reward model all."""
    path, turn = tmp_path / "x.jsonl", {"role": "user", "content": "你好"}
    rows = [{"messages": [turn, turn], "lang": "zh"},
            {"prompt": [turn], "chosen": "a", "rejected": "b"}, {"messages": "x"},
            {"prompt": [turn], "ranking": ["好", "坏", "x"]}]
    path.write_text("\n".join(map(json.dumps, rows)))
    *good, bad, ranking = items(path, said_in)
    assert [d.text for d in good] == ["你好\n你好", "你好\na\nb"]
    assert ranking == Document("你好\n好\n坏\nx", "zh")
    assert (bad.where, bad.what) == (f"{path}:3:14", "field of a wrong type")
    assert [b.what for b in items(path)] == ["field missing"] * 4


def test_a_field_that_is_null_is_missing(tmp_path):
    """Tables turned into JSON lines have null where a row has no value: it was of a wrong type."""
    path = tmp_path / "x.jsonl"
    rows = [{"text": "a", "lang": None}, {"text": None, "lang": "en"},
            {"text": None, "messages": [{"role": "user", "content": "b"}], "prompt": None}]
    path.write_text("\n".join(map(json.dumps, rows)))
    good, bad, also_bad = items(path)
    assert good == Document("a", "en")
    assert (bad.where, bad.what, also_bad.what) == (f"{path}:2:10", *["field missing"] * 2)
    assert [d.text for d in items(path, said_in) if isinstance(d, Document)] == ["a", "b"]


def test_a_sample_has_its_share_of_every_file_and_language(tmp_path, monkeypatch):
    """Of every batch but one in `every` nothing was read: a small Chinese file after a large
    English one had no part in the vocabulary."""
    monkeypatch.setattr(corpus, "BATCH_BYTES", 2_000)
    lines = [json.dumps({"text": ["english text", "中文"][i % 2] * 5}) for i in range(4000)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    for name in ("b.txt", "c.txt"):
        (tmp_path / name).write_text("few words")
    files = find_files(str(tmp_path))
    found = [(batch.path, d.lang) for batch in sampled(read_batches(files), 10)
             for d in parse(batch)]
    for lang in ("en", "zh"):
        assert 150 < found.count((files[0], lang)) < 250
    assert {path for path, _ in found} == set(files)
    assert sum(len(batch.items) for batch in sampled(read_batches(files), 1)) == 4002


def test_bad_lines_stop_or_are_counted(capsys):
    bad = [BadLine(f"f:{i}:1", "not JSON", "why") for i in range(7)]
    bad += [BadLine("f:9:1", "empty text")]

    def made(n_good: int, on_bad_line: str) -> list:
        return list(made_by_workers(iter([Batch("f", [], 1.0)]), lambda batch: [
            *bad, *range(n_good)], len, 1, on_bad_line, Progress()))
    with pytest.raises(ValueError, match="^f:0:1: not JSON: why .--on_bad_line=skip"):
        made(792, "stop")
    assert made(792, "skip") == [(792, 792)]  # 8 of 800 is not more than 1 %
    out = capsys.readouterr().out
    assert out.count("skipped f:") == 5 and "bad lines skipped: 8 (not JSON 7, empty text 1)" in out
    with pytest.raises(ValueError, match="8 of 799 lines are bad, more than 1%: mend"):
        made(791, "skip")


@pytest.mark.parametrize("text", [
    "", "short", "line\r\n" * 5000, "没有行末" * 30_000, "x" * 100 + "\n" + "中" * 50_000 + "\n\ny",
    "".join(random.Random(1).choices("ab中😀\n\ufeff", k=60_000))], ids=range(6))
@pytest.mark.parametrize("suffix", [".txt", ".txt.gz"])
def test_a_txt_file_becomes_pieces_that_join_to_the_whole(tmp_path, text, suffix):
    with (gzip.open if suffix.endswith("gz") else open)(tmp_path / f"x{suffix}", "wb") as f:
        f.write(b"\xef\xbb\xbf" + text.encode())
    texts = [d.text for d in items(tmp_path / f"x{suffix}")]
    assert "".join(texts) == text
    sizes = [len(t.encode()) for t in texts]
    assert all(8192 <= n <= 16384 for n in sizes[:-1]) and sizes[-1:] <= [16384]
    assert all(t.endswith("\n") for t, n in zip(texts, sizes) if n < 16384 - 3 and t != texts[-1])


def test_a_bad_byte_in_a_txt_file_is_placed(tmp_path):
    path = tmp_path / "x.txt"
    path.write_bytes("一行\n".encode() * 5000 + b"\xe4\xb8\xad\xff\n" + b"ok\n" * 9000)
    [bad] = [b for b in items(path) if isinstance(b, BadLine)]
    assert (bad.where, bad.what, bad.detail) == (f"{path}:5001:2", "not UTF-8", "byte 0xff")


def test_folders_are_searched_and_what_is_passed_over_is_said(tmp_path, capsys):
    for name in ("b.txt", "sub/a.jsonl", "sub/c.csv", "README.md", "d.jsonl.gz", "e.parquet"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    os.symlink(tmp_path / "b.txt", tmp_path / "same.txt")
    found = find_files(f" {tmp_path}/sub/a.jsonl, {tmp_path},")
    assert [os.path.relpath(f, tmp_path) for f in found] == [
        "sub/a.jsonl", "b.txt", "d.jsonl.gz", "e.parquet"]  # each once, in the order given
    error = capsys.readouterr().err
    assert all(f"skipped {tmp_path}/{name}: not one of .txt" in error
               for name in ("README.md", "sub/c.csv"))


@pytest.mark.parametrize("paths, message", [
    ("nowhere", "nowhere: no such file or folder$"), ("x.csv", "x.csv: not one of .txt, "),
    ("empty", "empty: no .txt, .txt.gz, .* file in this folder"),
    (",", "',' names no file or folder"),
    ("x.json", "x.json: not one of .*; make lines of a list: python -c 'import json"),
    ("out/toyworld/pt.jsonl", "make it with: python -m demo.world")])
def test_what_cannot_be_read_is_named(tmp_path, monkeypatch, paths, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    for name in ("x.csv", "x.json"):
        (tmp_path / name).touch()
    with pytest.raises(ValueError, match=message):
        find_files(paths)


@pytest.mark.parametrize("damage", ["cut", "flip", "plain"])
def test_a_damaged_gz_file_is_named(tmp_path, damage):
    path, r = tmp_path / "x.jsonl.gz", random.Random(2)
    packed = gzip.compress(b"".join(b'{"text": "%d"}\n' % r.getrandbits(99) for _ in range(3000)))
    flipped = packed[:5000] + bytes([packed[5000] ^ 255]) + packed[5001:]
    path.write_bytes({"cut": packed[:-50], "flip": flipped, "plain": b'{"text": "x"}'}[damage])
    with pytest.raises(ValueError, match="x.jsonl.gz: cannot be read to its end: .+"):
        items(path)


def test_parquet(tmp_path):
    pa = pytest.importorskip("pyarrow", reason="needs the extra: pip install pyarrow")
    import pyarrow.parquet as pq
    path = str(tmp_path / "x.parquet")
    texts = pa.array([b"one", "二\n".encode(), None, b"a\n\xff", b" "] + [b"t"] * 3000, pa.binary())
    langs = pa.array(["en", None, "en", "en", "en"] + ["de"] * 3000)
    pq.write_table(pa.table({"text": texts.cast(pa.string(), safe=False), "lang": langs}), path)
    found = items(path)
    assert found[:2] == [Document("one", "en"), Document("二\n", "zh")] and len(found) == 3005
    assert [(b.where, b.what) for b in found if isinstance(b, BadLine)] == [
        (f"{path}:3:1", "empty text"), (f"{path}:4:1", "not UTF-8"),
        (f"{path}:5:1", "empty text")]
    assert [batch.items[0][0] for batch in read_batches([path])] == [1, 1025, 2049]
    pq.write_table(pa.table({"body": ["x"]}), path)
    with pytest.raises(ValueError, match="no column 'text', there are body"):
        items(path)
    pq.write_table(pa.table({"text": [1, 2]}), path)
    with pytest.raises(ValueError, match="column 'text' must be of strings, is int64"):
        items(path)
    (tmp_path / "x.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(ValueError, match="x.parquet: not a readable parquet file"):
        items(path)


def test_without_pyarrow_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    (tmp_path / "x.parquet").touch()
    with pytest.raises(ValueError, match="x.parquet: parquet files need the extra: pip install"):
        items(tmp_path / "x.parquet")


def test_the_share_read_grows_to_one(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "BATCH_BYTES", 10_000)
    row = b"".join(b'{"text": "%d"}\n' % random.getrandbits(200) for _ in range(3000))
    (tmp_path / "a.jsonl").write_bytes(row)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(row))
    batches = list(read_batches(find_files(str(tmp_path))))
    shares = [b.share for b in batches]
    assert shares == sorted(shares) and shares[-1] == 1 and len(set(shares)) > 20


def test_language_goes_by_the_share_of_han():
    texts = ("Hello 世界", "你好啊 world", "123", "e" * 4000 + "中" * 9000)
    assert [language(text) for text in texts] == ["en", "zh", "en", "en"]


def test_english_in_utf16_is_not_learnt_as_letters_and_nul_bytes(tmp_path):
    """PowerShell and some editors write it without a mark. It is UTF-8 too, with a NUL after each
    letter, and was learnt so without a word; rag.py refused it."""
    text = "The lamp is red.\n" * 3
    (tmp_path / "a.txt").write_bytes(b"Good.\n" + text.encode("utf-16-le"))
    assert [str(item) for item in items(tmp_path / "a.txt")] == [
        f"{tmp_path}/a.txt:2:2: a NUL byte: binary, or UTF-16 without the mark that says so"]

"""Chunks: nothing lost, nothing too big, nothing cut that need not be, whatever the text."""
import random
import time
from pathlib import Path

import numpy as np
import pytest

from search.segment import Chunk, clean, split
from search.topics import sentences, tfidf
from tokenizer import HAN_PATTERN, Tokenizer, count_pieces, dump, train_bpe

DOCS = Path(__file__).resolve().parents[2] / "shared" / "data" / "docs"
EN = ["The cat sat on the mat, and it slept.", "Dr. Wu paid 3.50 for it!", "Why (if at all)?",
      "A chunk holds whole sentences, e.g. this one.", "\"No,\" she said, \"not now.\""]
ZH = ["他说：“好。”", "检索先找资料，再回答问题。", "为什么要切分文本？",
      "版本是3.5，价格是２元；", "真好！！"]
TOK = Tokenizer(dump(train_bpe(count_pieces([" ".join(EN + ZH) * 20]), 500), HAN_PATTERN))
BYTES = Tokenizer(dump([bytes([i]) for i in range(256)], HAN_PATTERN))


def bpe(text):
    return len(TOK.encode_ordinary(text))


COUNTS = {"bpe": bpe, "bytes": lambda text: len(BYTES.encode_ordinary(text)),
          "more than its parts": lambda text: len(text) + len(text) // 5}


def document(r):
    """A random document, and of each block: kind, text, path of headings."""
    path, made = [], []
    for _ in range(r.randint(1, 12)):
        kind = r.choices(["heading", "prose", "list", "code", "table", "rule"],
                         [4, 6, 3, 2, 2, 1])[0]
        if kind == "heading":
            style, name = r.choice("aaasc"), f"{r.choice(['Title', '标题'])} {r.randint(1, 99)}"
            level = {"a": r.randint(1, 6), "s": r.randint(1, 2), "c": 3}[style]
            name = f"第{r.choice('一二三十')}章 {name}" if style == "c" else name
            path = [(n, at) for n, at in path if at < level] + [(name, level)]
            text = {"a": f"{'#' * level} {name}", "c": name,
                    "s": f"{name}\n{'=====' if level == 1 else '-----'}"}[style]
        elif kind == "prose":
            some = [r.choice(EN + ZH) for _ in range(r.randint(1, 25))]
            text = "".join(s + r.choice(["", " ", "\n"] if s in ZH else [" ", "\n"]) for s in some)
        elif kind == "list":
            text = "\n".join("   " * r.randint(0, 2) * (i > 0) + r.choice(["- ", "1. "])
                             + r.choice(EN + ZH) for i in range(r.randint(1, 9)))
        elif kind == "code":
            fence = r.choice(["```", "~~~~", "````"])
            lines = ["# a comment", "def f(x):", "    return x  ", "", "| a | b |", "- no item",
                     "第一章", "---"]
            text = "\n".join([fence, *r.choices(lines, k=r.randint(1, 30)), fence])
        elif kind == "table":
            rows = [f"| {r.choice(EN + ZH)} | {i} |" for i in range(r.randint(1, 12))]
            text = "\n".join(["| 名 name | n |", "|:---|---|", *rows])
        else:
            text = "***"
        made.append((kind, text.strip(), " > ".join(n for n, _ in path)))
    return "\n\n".join(text for _, text, _ in made), made


def check(text, chunks, max_tokens, count):
    """The three promises."""
    text = clean(text)[0]
    assert all(text[c.start:c.end] == c.text != "" for c in chunks)
    assert max((count(c.full) for c in chunks), default=0) <= max_tokens
    assert all(a.end <= b.start for a, b in zip(chunks, chunks[1:]))
    assert "".join("".join(c.text.split()) for c in chunks) == "".join(text.split())


def test_three_promises_for_2000_documents():
    """Losslessness, exact slices, the ceiling; for each budget and each way of counting."""
    for seed in range(2000):
        r = random.Random(seed)
        text, _ = document(r)
        count = COUNTS[r.choice(list(COUNTS))]
        max_tokens = r.choice([16, 17, 32, 64, 128, 256, 512, r.randint(16, 512)])
        if seed % 4 == 0:  # damaged anywhere
            i = r.randrange(len(text))
            text = text[:i] + r.choice(["```\n", "\r\n", "\0", "\ud83d", "|", "\n\n---\n", "\u200b",
                                        "e\u0301" * 30, "x" * 900, "#", "  "]) + text[i + 2:]
        check(text, split(text, "notes.md", max_tokens, count=count), max_tokens, count)


def test_blocks_survive_and_know_their_headings():
    """In 400 documents: what fits is whole in one chunk, code to the byte; the breadcrumb is that
    of the text, so that no comment in a fence was taken for a heading; each piece of a table has
    its header; a heading is followed by text, except at the end."""
    for seed in range(400):
        text, made = document(random.Random(seed))
        chunks, at = split(text, "a/notes.md", 192, count=bpe), len(text) + 2
        below = None  # where the first block below begins that is neither heading nor rule
        for kind, block, path in reversed(made):
            at -= len(block) + 2
            end = at + len(block)
            inside = [c for c in chunks if c.start < end and at < c.end]
            if kind not in ("heading", "rule"):
                crumb = inside[0].crumb
                assert {c.crumb for c in inside} == {crumb}
                assert crumb == (path or "notes") or path.endswith(" > " + crumb) and bpe(path) > 48
                below = at
            elif kind == "heading" and below:
                assert inside[-1].end > below
            if kind == "code" and bpe(block) < 120:
                assert any(block in c.text for c in inside)
            for a, b in sentences(block) if kind == "prose" else []:
                assert any(c.start <= at + a and at + b <= c.end for c in inside), block[a:b]
            if kind == "table":
                assert all("| 名 name | n |\n|:---|---|" in c.full for c in inside)


def test_one_document_by_hand():
    text = ("\ufeff---\ntitle: \"Guide\"\n---\r\n\r\n## 安装\r\n```sh\n# not a heading\n```\n"
            "## Empty\n### Run it\nDo this.\n\nAfter\n=====\n第二条 范围\n最后。\n# End\n")
    found = [(c.line, c.crumb, c.text) for c in split(text, "x/guide.md", count=bpe)]
    assert found == [
        (1, "Guide", "---\ntitle: \"Guide\"\n---"),
        (5, "Guide > 安装", "## 安装\n```sh\n# not a heading\n```"),
        (9, "Guide > Empty > Run it", "## Empty\n### Run it\nDo this."),
        (13, "After > 第二条 范围", "After\n=====\n第二条 范围\n最后。\n# End")]
    [chunk] = split("Only text.", "x/我的 notes.md", count=bpe)
    assert chunk.full == "我的 notes\nOnly text." and len(chunk.id) == 16
    assert chunk == Chunk(chunk.id, "x/我的 notes.md", 0, 10, 1, "我的 notes", "", "Only text.")
    assert split(" \n\n\t", "x", count=bpe) == [] == split("", count=bpe)
    assert [c.text for c in split("# 1\n\n## 2", count=bpe)] == ["# 1\n\n## 2"]


def test_what_is_too_big_is_cut_where_it_hurts_least():
    def cut(text, n=32):
        return [c.text for c in split(text, "", n, count=len)]  # a character is a token

    assert cut("One is first. Two is second. Three.") == ["One is first. Two is second.", "Three."]
    assert cut("一句很长很长很长很长很长的话，它有三个分句，每个都不短，还有第四个。", 24) == [
        "一句很长很长很长很长很长的话，它有三个分句，", "每个都不短，还有第四个。"]
    assert cut("alpha beta gamma delta epsilon zeta") == ["alpha beta gamma delta epsilon", "zeta"]
    assert cut("```\na = 1\nb = 2\n\nc = 3\nd = 4\ne = 5\n```") == [
        "```\na = 1\nb = 2", "c = 3\nd = 4\ne = 5\n```"]
    assert cut("- one\n  - two of it\n- three\n- four is here") == [
        "- one\n  - two of it\n- three", "- four is here"]
    assert cut("- start\n  - A one. A two.\n  - B one. B two.", 41) == [
        "- start\n  - A one. A two.", "  - B one. B two."]
    table = split("|k|v|\n|-|-|\n" + "".join(f"|{i}|row|\n" for i in range(9)), "", 40, count=len)
    assert {c.prefix for c in table[1:]} == {"|k|v|\n|-|-|"} and table[0].prefix == ""
    for text in ("e\u0301" * 99, "👨\u200d👩\u200d👧" * 20, "👍🏽" * 40):
        parts = cut(text, 24)
        assert len(parts) > 3
        assert not any(p[0] in "\u0301\u200d🏽" or p[-1] == "\u200d" for p in parts)


def test_a_title_is_not_a_path():
    """The breadcrumb of a row without headings is its title, and that of a file its name. They
    were "St", "DC" and "Version 3", since all went through splitext(basename(…))."""
    for name, crumb in (("St. Louis", "St. Louis"), ("AC/DC", "AC/DC"),
                        ("Version 3.5", "Version 3.5"),
                        ("a/v1.5 notes.md", "v1.5 notes"), ("a\\b.TXT", "b"), (".md", "")):
        assert split("Text.", name, count=len)[0].crumb == crumb


def test_a_heading_is_not_left_alone_even_if_a_sentence_must_be_cut_for_it():
    text = "# Title\n\nSome words that fill it all up. Next."
    assert [c.text for c in split(text, "", 40, count=len)] == [
        "# Title\n\nSome words that fill it", "all up. Next."]


def test_introductions_stay_with_what_they_introduce():
    text = "A first paragraph of some words.\n\nDo this:\n\n- one step\n\n**第二步**\n\n再做这个。"
    assert [c.text for c in split(text, "", 40, count=len)] == [
        "A first paragraph of some words.", "Do this:\n\n- one step\n\n**第二步**\n\n再做这个。"]


def test_breadcrumb_and_header_leave_room_for_text():
    deep = "".join(f"{'#' * i} {'very long heading ' * 4}{i}\n" for i in range(1, 7)) + "text"
    for n in (16, 64, 512):
        last = split(deep, "", n, count=bpe)[-1]
        assert last.text.endswith("text") and bpe(last.crumb) <= min(48, n // 4)
        assert n < 64 or last.crumb.startswith("very long") or last.crumb.endswith("6")
    wide = "|" + "header|" * 30 + "\n|" + "-|" * 30 + "\n" + ("|" + "x|" * 30 + "\n") * 5
    assert {c.prefix for c in split(wide, "", 64, count=bpe)} == {""}  # more than half


@pytest.mark.parametrize("name, text", {
    "one line": "x" * 100_000, "one line of Han": "中" * 100_000,
    "row": "|a|\n|-|\n|" + "b|" * 50_000,
    "unclosed fence": "```\n" + "# c\n" * 9000, "headings": "# a\n" * 10_000,
    "no title": "#\n" * 9000,
    "nested": "".join("  " * i + "- item\n" for i in range(400)), "zero width": "\u200b" * 50_000,
    "combining": "e" + "\u0301" * 50_000,
    "spaces": "a" + " " * 100_000 + "b", "lines": "\n" * 99_999,
    "surrogates": "\ud83d" * 9000 + "\0", "quotes": '。"' * 50_000,
    "ascii quotes": 'a."' * 50_000,
    "fences": "```\n" * 20_000, "ticks": "`" * 100_000 + "x", "stops": "." * 100_000 + "x",
    "closers": "。" + ")\"" * 50_000, "leads": "a:\n\n" * 9000, "rules": "a\n---\n" * 9000}.items())
def test_hostile_text_keeps_the_promises_in_linear_time(name, text):
    for max_tokens in (16, 256):
        start = time.process_time()
        chunks = split(text, name, max_tokens, count=bpe)
        assert time.process_time() - start < (2 if max_tokens == 16 else 1)
        check(text, chunks, max_tokens, bpe)


def test_clean_repairs_and_counts():
    assert clean("\ufeffa\r\nb\rc\0\ud800d\ufeff") == ("a\nb\nc\ufffd\ufffdd\ufeff", 2)
    assert clean("😀\u200b\u2028\x0b") == ("😀\u200b\u2028\x0b", 0)


def test_twice_the_text_takes_twice_the_time(capsys):
    """Also says how fast: 1 MB/s at least, counting included."""
    text = "\n\n".join(document(random.Random(seed))[0] for seed in range(1100))
    while len(text.encode()) < 1_000_000:
        text += "\n\n" + text
    half = text[:len(text) // 2]
    fastest = dict.fromkeys((half, text), 9e9)
    for _ in range(3):
        for one in fastest:
            start = time.process_time()
            split(one, "x.md", count=bpe)
            fastest[one] = min(fastest[one], time.process_time() - start)
    megabytes = len(text.encode()) / 1e6
    with capsys.disabled():
        print(f" {megabytes:.1f} MB at {megabytes / fastest[text]:.1f} MB/s, "
              f"T(2n)/T(n) {fastest[text] / fastest[half]:.2f} ", end="")
    assert fastest[text] / fastest[half] <= 2.3 and megabytes / fastest[text] >= 1


def test_topics_keep_the_promises_and_move_the_cuts():
    def vectors(units):
        assert all(unit == unit.strip() for unit in units)
        return tfidf(units)

    for seed in range(60):
        text, _ = document(random.Random(seed))
        check(text, split(text, "", 128, count=bpe, vectors=vectors), 128, bpe)
    cats = "The cat sleeps. A cat eats fish. The cat sees a fish. This cat likes fish. "
    bonds = "银行提高利率。债券利率上升。银行的债券下跌。利率影响银行。"
    assert [c.text for c in split(cats + bonds, count=bpe, vectors=vectors)] == [
        cats.strip(), bonds]
    one_hot = np.eye(2)[[0] * 4 + [1] * 4]
    assert len(split(cats + bonds, count=bpe, vectors=lambda units: one_hot[:len(units)])) == 2


def test_a_setting_that_cannot_work_is_refused():
    with pytest.raises(ValueError, match="max_tokens 15 must be at least 16"):
        split("text", "", 15, count=bpe)
    with pytest.raises(ValueError, match="too small for the single character '中'"):
        split("中", "", 16, count=lambda text: 99 * len(text))


@pytest.mark.skipif(not DOCS.is_dir(), reason="needs ../shared/data/docs")
def test_real_documents_in_both_languages():
    for path in sorted(DOCS.glob("*/*.md")):
        text = path.read_text(encoding="utf-8")
        for max_tokens in (64, 256):
            chunks = split(text, path.name, max_tokens, count=bpe)
            check(text, chunks, max_tokens, bpe)
            assert all(c.crumb and not c.crumb.startswith("#") for c in chunks)

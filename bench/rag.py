"""
How well are passages found and questions answered? One JSON line per language and source.

    python rag.py eval --corpus=rag_corpus.jsonl --queries=rag_queries.jsonl
    python rag.py eval --corpus=… --queries=… --passages=chunks --chunk_tokens=128    or  fixed
    python rag.py eval --corpus=… --queries=… --checkpoint=out/sft --limit=200

A corpus line is {"id", "title", "text", "lang", "source"}, a query line {"query", "answers",
"doc_id", "lang", "source"}. Each language of each source is an index of its own.

recall@k, mrr@10   the rank of the passage that answers; of equal scores it gets the worst place.
                   With passages "chunks" or "fixed" that is one of the document which holds an
                   answer whole; `cut` is the share of questions whose answers stand in the document
                   and in none of its passages; `cut_long` is the part of it where the sentences
                   around an answer are more than chunk_tokens, so that no chunk can hold them
refusal_auc        chance that a question scores higher in idf coverage than one whose document was
                   taken out of the index: 0.5 is guessing. refused: the share of those that
                   min_coverage refuses; lost: the share of answerable questions it refuses
em, f1             of answers, after SQuAD's normalisation (Rajpurkar et al. 2016) in English and
                   CMRC's, by characters (Cui et al. 2019), in Chinese; beside them the sentence
                   that shares most with the question. Of these questions, in per cent, too:
                   model_refused, and model_no_room, where no source fits beside the question
"""
import json
import re
import string
import sys
import tempfile
import time
import unicodedata
from collections import Counter, defaultdict
from typing import TYPE_CHECKING

import numpy as np

from plumbing.corpus import find_files, read_batches
from plumbing.jobs import Progress
from plumbing.jsonl import LineError, parse_records
from search.documents import PIECE, count_pieces
from search.embed import Embed
from plumbing.examples import evenly_spaced
from search.index import Index
from search.segment import Chunk, clean
from search.topics import sentences

if TYPE_CHECKING:
    from rag import Config

FIELDS = {"corpus": ("id", "title", "text", "lang", "source"),
          "queries": ("query", "answers", "doc_id", "lang", "source")}


# ---------------------------------------------------------------------------- answers

def english_words(text: str) -> list[str]:
    """Lower case, without punctuation and articles, as SQuAD's evaluation has it."""
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", text).split()


def chinese_units(text: str) -> list[str]:
    """Han characters and words of other scripts, without punctuation, as CMRC's evaluation."""
    return [unit for unit in PIECE.findall(text.lower())
            if not unicodedata.category(unit[0]).startswith(("P", "S"))]


def longest_common_run(a: list[str], b: list[str]) -> int:
    """Length of the longest run of units that stands in both."""
    best, row = 0, [0] * (len(b) + 1)
    for x in a:
        row = [0] + [row[j] + 1 if x == y else 0 for j, y in enumerate(b)]
        best = max(best, max(row))
    return best


def score_answer(said: str, answers: list[str], lang: str) -> tuple[float, float]:
    """(exact match, F1), the best over the answers, 0 to 1. F1 counts shared words in English and
    the longest common run in Chinese."""
    units = english_words if lang == "en" else chinese_units
    best = (0.0, 0.0)
    for answer in answers:
        a, b = units(said), units(answer)
        same = sum((Counter(a) & Counter(b)).values()) if lang == "en" else longest_common_run(a, b)
        best = max(best, (float(a == b), 2 * same / max(1, len(a) + len(b))))
    return best


# ---------------------------------------------------------------------------- retrieval

def read_records(paths: str, what: str) -> list[dict]:
    """Rows of a corpus or of queries. Raises ValueError with file:line:column and the field."""
    def check(row: dict) -> dict:
        for field in FIELDS[what]:
            kind = list if field == "answers" else str
            if not isinstance(row.get(field), kind):
                raise LineError(field, "field missing or of a wrong type",
                                 f"'{field}' must be a {kind.__name__}")
        return row

    found = []
    for batch in read_batches(find_files(paths)):
        for item in parse_records(batch, check):
            if not isinstance(item, dict):
                raise ValueError(f"{item.where}: {item.what}: {item.detail}")
            found.append(item)
    return found


def passages(row: dict, cfg: "Config", cut) -> list[Chunk]:
    """A document of the corpus as chunks."""
    if cfg.passages == "chunks":
        return cut(row["text"], row["title"] or row["id"])
    text = clean(row["text"])[0]
    spans = [(0, len(text))]
    if cfg.passages == "fixed":
        ends = [m.end() for m in PIECE.finditer(text)][cfg.chunk_tokens - 1::cfg.chunk_tokens]
        spans = [s for s in zip([0, *ends], [*ends, len(text)]) if s[0] < s[1]]
    title = row["title"] if cfg.passages == "whole" else ""
    return [Chunk(f"{row['id']}:{a}", row["id"], a, b, 1, title, "", text[a:b]) for a, b in spans]


def rank_of(scores: np.ndarray, gold: list[int]) -> float:
    """Of the best of the gold passages, behind all that score the same; inf where none scores."""
    best = max((scores[i] for i in gold), default=0.0)
    return float((scores >= best).sum() - (len(gold) > 1) * (
        sum(scores[i] >= best for i in gold) - 1)) if best > 0 else np.inf


def peer(rows: list[dict], queries: list[dict], lang: str) -> dict:
    """recall@1 and @5 of bm25s (Lu 2024), with jieba's words where the text is Chinese, on the
    same titles and texts; ties at their worst here too. Raises ValueError if it is not there."""
    try:
        import bm25s
        import jieba
    except ImportError:
        raise ValueError("--peer needs: pip install 'khaosz[peers]'") from None

    def cut(texts: list[str]) -> list[list[str]]:
        if lang == "en":
            return bm25s.tokenize(texts, stopwords=None, return_ids=False, show_progress=False)
        return [[w for w in jieba.lcut(text.lower()) if w.strip()] for text in texts]

    place = {row["id"]: i for i, row in enumerate(rows)}
    engine = bm25s.BM25(method="lucene", k1=1.2, b=0.75)
    engine.index(cut([f"{row['title']}\n{row['text']}" for row in rows]), show_progress=False)
    ranks = np.array([rank_of(engine.get_scores(words), [place[row["doc_id"]]])
                      for row, words in zip(queries, cut([row["query"] for row in queries]))])
    return {f"bm25s@{k}": round(float((ranks <= k).mean()), 4) for k in (1, 5)}


def heading_recall(index: Index) -> dict[str, float]:
    """Share of up to 200 headings whose own chunk is ranked first, by each retriever: questions
    that every collection brings along."""
    chosen = evenly_spaced(np.flatnonzero(index.alive).tolist(), 200)
    asked = [(i, c.crumb.split(" > ")[-1]) for i in chosen if (c := index.chunk(i)).crumb]
    return {mode: sum(rank_of(index.scores(q, mode), [i]) == 1 for i, q in asked)
            / max(1, len(asked)) for mode in ("bm25", "dense")}


def auc(with_gold: list[float], without: list[float]) -> float:
    """Chance that one of the first is larger than one of the second, ties half."""
    order = np.sort(np.array(without))
    below = np.searchsorted(order, with_gold, "left") + np.searchsorted(order, with_gold, "right")
    return float(below.mean() / 2 / max(1, len(order)))


def around(text: str, answer: str) -> str:
    """The sentences that a part of a text lies in."""
    start = text.find(answer)
    held = [span for span in sentences(text) if span[0] < start + len(answer) and start < span[1]]
    return text[held[0][0]:held[-1][1]] if held else answer


def measure(index: Index, queries: list[dict], cfg: "Config", progress: Progress,
            texts: dict[str, str]) -> dict:
    """Retrieval figures of one language and source. `texts` are the documents, by their ids."""
    ranks, seen, unseen, cut, long, spent = [], [], [], 0, 0, 0.0
    for n, row in enumerate(queries):
        progress.show(f"{row['lang']} {row['source']}: {n:,}/{len(queries):,} questions")
        gold = index.numbers(row["doc_id"])
        text = texts[row["doc_id"]]
        there = [answer for answer in row["answers"] if answer in text]  # none: a yes or a no
        if cfg.passages != "whole" and there:
            gold = [i for i in gold if any(a in index.chunk(i).text for a in there)]
            cut += not gold
            long += not gold and min(count_pieces(around(text, a)) for a in there
                                     ) > cfg.chunk_tokens
        start = time.perf_counter()
        index.search(row["query"], cfg.n_sources, cfg.mode)
        spent += time.perf_counter() - start
        ranks.append(rank_of(index.scores(row["query"], cfg.mode), gold))
        seen.append(max((h.coverage for h in index.search(row["query"], 1, cfg.mode)), default=0.0))
        with index.without(row["doc_id"]):
            unseen.append(max((h.coverage for h in index.search(row["query"], 1, cfg.mode)),
                              default=0.0))
    r = np.array(ranks)
    return {"n": len(queries), "passages": len(index), "recall@1": round(float((r <= 1).mean()), 4),
            "recall@5": round(float((r <= 5).mean()), 4),
            "recall@20": round(float((r <= 20).mean()), 4),
            "mrr@10": round(float(np.where(r <= 10, 1 / r, 0).mean()), 4),
            "cut": round(cut / len(queries), 4), "cut_long": round(long / len(queries), 4),
            "refusal_auc": round(auc(seen, unseen), 4),
            "refused": round(float((np.array(unseen) < cfg.min_coverage).mean()), 4),
            "lost": round(float((np.array(seen) < cfg.min_coverage).mean()), 4),
            "ms_per_query": round(1000 * spent / len(queries), 2)}


def measure_answers(index: Index, queries: list[dict], cfg: "Config", progress: Progress) -> dict:
    """EM and F1, in per cent, of the model's answers and of the best sentences."""
    from rag import answer, best_sentences, load_writer
    model, found = load_writer(cfg), defaultdict(list)
    for n, row in enumerate(queries):
        progress.show(f"{row['lang']} {row['source']}: {n:,}/{len(queries):,} answers")
        try:
            said = answer(row["query"], cfg, index, model)
            text, refused, no_room = said.text, not said.grounded, False
        except ValueError:  # the model reads too few tokens for a source beside this question
            text, refused, no_room = "", False, True
        hits = index.search(row["query"], 1, cfg.mode)
        plain = best_sentences(row["query"], hits, index)[0] if hits else ""
        for name, text in (("model", text), ("sentence", plain)):
            em, f1 = score_answer(re.sub(r"\[\d+\]", "", text), row["answers"], row["lang"])
            found[f"{name}_em"].append(em)
            found[f"{name}_f1"].append(f1)
        found["model_refused"].append(refused)
        found["model_no_room"].append(no_room)
    return {"answered": len(queries)} | {k: round(100 * float(np.mean(v)), 2)
                                         for k, v in found.items()}


def evaluate(cfg: "Config", cut, embedder: Embed | None) -> None:
    """Print one JSON line per language and source. Raises ValueError for files that do not fit."""
    if not cfg.corpus or not cfg.queries:
        raise ValueError("eval needs --corpus=FILE and --queries=FILE")
    groups: dict[tuple, tuple[list, list]] = defaultdict(lambda: ([], []))
    for i, what in enumerate(FIELDS):
        for row in read_records(getattr(cfg, what), what):
            groups[row["lang"], row["source"]][i].append(row)
    for (lang, source), (rows, queries) in sorted(groups.items()):
        known = {row["id"] for row in rows}
        if stray := [q["doc_id"] for q in queries if q["doc_id"] not in known]:
            raise ValueError(f"{cfg.queries}: doc_id {stray[0]!r} is not in {cfg.corpus}")
        if not queries:
            continue
        queries = [queries[i] for i in evenly_spaced(range(len(queries)), cfg.limit or None)]
        progress = Progress(sys.stderr)  # stdout is for the JSON lines
        with tempfile.TemporaryDirectory() as folder, Index(folder, True, embedder,
                                                            cfg.embed) as index:
            for row in rows:
                index.put(row["id"], "", passages(row, cfg, cut))
            index.commit()
            texts = {row["id"]: clean(row["text"])[0] for row in rows}
            line = {"lang": lang, "source": source} | measure(index, queries, cfg, progress, texts)
            if cfg.peer:
                line |= peer(rows, queries, lang)
            if cfg.checkpoint:
                line |= measure_answers(index, queries, cfg, progress)
        progress.end()
        print(json.dumps(line, ensure_ascii=False), flush=True)

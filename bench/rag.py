"""
How well are passages found and questions answered? One JSON line per language and source.

    python -m bench.rag --corpus=rag_corpus.jsonl --queries=rag_queries.jsonl
    python -m bench.rag --corpus=… --queries=… --passages=chunks --chunk_tokens=128    or  fixed
    python -m bench.rag --corpus=… --queries=… --checkpoint=out/sft --limit=200

A corpus line is {"id", "title", "text", "lang", "source"}, a query line {"query", "answers",
"doc_id", "lang", "source"}. Each language of each source is an index of its own.

recall@k, mrr@10   the rank of the passage that answers; of equal scores it gets the worst place.
                   With passages "chunks" or "fixed" it must hold an answer whole. `cut`: the share
                   of questions whose answers stand in the document and in none of its passages
refusal_auc        the chance that a question has a higher idf coverage than one whose document was
                   taken out of the index: 0.5 is guessing. `refused`: the share of the latter that
                   min_coverage refuses; `lost`: the share of answerable questions that it refuses
em, f1             of answers, in per cent, after SQuAD's normalisation (Rajpurkar et al. 2016) in
                   English and by characters as in CMRC (Cui et al. 2019) in Chinese. Beside them
                   stands the sentence that shares most with the question, and how often the answer
                   was the refusal (model_refused; _without: with the document taken out), no
                   source fitted (model_no_room) or what was cited held it (model_cited), in %
"""
import json
import re
import sys
import tempfile
import time
from collections import defaultdict
from contextlib import suppress
from dataclasses import dataclass
from typing import Literal

import numpy as np

import rag
from configurator import FilePath, Natural, configure
from plumbing.answers import score_answer
from plumbing.corpus import LineError, find_files, good_records, language
from plumbing.examples import evenly_spaced
from plumbing.jobs import Progress
from plumbing.terminal import run
from search import embed
from search.documents import PIECE, Cut
from search.index import Index
from search.segment import Chunk, clean


@dataclass(frozen=True)
class Config(rag.Config):
    corpus: FilePath = ""  # documents, {"id", "title", "text", "lang", "source"} a line
    queries: FilePath = ""  # questions, {"query", "answers", "doc_id", "lang", "source"} a line
    passages: Literal["whole", "chunks", "fixed"] = "whole"  # how documents are cut
    peer: bool = False  # rank with bm25s and jieba too, to compare (the extra `peers`)
    limit: Natural = 0  # this many questions per language and source, evenly spaced; 0: all


FIELDS = {"corpus": ("id", "title", "text", "lang", "source"),
          "queries": ("query", "answers", "doc_id", "lang", "source")}


def read_records(paths: str, what: str) -> list[dict]:
    """Rows of a corpus or of queries. Raises ValueError with file:line:column and the field."""
    def check(row: dict) -> dict:
        for field in FIELDS[what]:
            kind = list if field == "answers" else str
            if not isinstance(x := row.get(field), kind) or not all(isinstance(y, str) for y in x):
                raise LineError(field, "field missing or of a wrong type",
                                 f"'{field}' must be a {kind.__name__}{' of str' * (kind is list)}")
        return row

    return list(good_records(find_files(paths), check))


def passages(row: dict, cfg: Config, cut: Cut) -> list[Chunk]:
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
    """The place of the best of the gold passages, after all others that score the same; inf where
    none of them scores. rank_of([3, 2, 2, 1], [1]) -> 3."""
    best = max((scores[i] for i in gold), default=0.0)
    others = np.delete(scores, gold)
    return 1.0 + float((others >= best).sum()) if best > 0 else np.inf


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

    number = {row["id"]: i for i, row in enumerate(rows)}
    engine = bm25s.BM25(method="lucene", k1=1.2, b=0.75)
    engine.index(cut([f"{row['title']}\n{row['text']}" for row in rows]), show_progress=False)
    ranks = np.array([rank_of(engine.get_scores(words), [number[row["doc_id"]]])
                      for row, words in zip(queries, cut([row["query"] for row in queries]))])
    return {f"bm25s@{k}": round(float((ranks <= k).mean()), 4) for k in (1, 5)}


def auc(with_gold: list[float], without: list[float]) -> float:
    """Chance that one of the first is larger than one of the second, ties half."""
    order = np.sort(np.array(without))
    below = np.searchsorted(order, with_gold, "left") + np.searchsorted(order, with_gold, "right")
    return float(below.mean() / 2 / max(1, len(order)))


def measure(index: Index, queries: list[dict], cfg: Config, progress: Progress,
            texts: dict[str, str]) -> dict:
    """Retrieval figures of one language and source. `texts` are the documents, by their ids."""
    ranks, seen, unseen, cut, spent = [], [], [], 0, 0.0
    for i, row in enumerate(queries):
        progress.show(f"{row['lang']} {row['source']}: {i:,}/{len(queries):,} questions")
        question, text = row["query"], texts[row["doc_id"]]
        _, first, n = index.manifest["documents"][row["doc_id"]]
        own = gold = list(range(first, first + n))
        there = [answer for answer in row["answers"] if answer in text]  # none: a yes or a no
        if cfg.passages != "whole" and there:
            gold = [i for i in gold if any(a in index.chunk(i).text for a in there)]
            cut += not gold
        start = time.perf_counter()
        found = index.search(question, cfg.n_sources)
        spent += time.perf_counter() - start
        ranks.append(rank_of(index.rank(index.postings(question), question), gold))
        seen.append(max((hit.coverage for hit in found), default=0.0))
        index.alive[own] = False
        found = index.search(question, cfg.n_sources)
        unseen.append(max((hit.coverage for hit in found), default=0.0))
        index.alive[own] = True
    r = np.array(ranks)
    shares = {f"recall@{k}": (r <= k).mean() for k in (1, 5, 20)} | {
        "mrr@10": np.where(r <= 10, 1 / r, 0).mean(), "cut": cut / len(queries),
        "refusal_auc": auc(seen, unseen),
        "refused": np.mean(np.array(unseen) < cfg.min_coverage),
        "lost": np.mean(np.array(seen) < cfg.min_coverage)}
    return {"n": len(queries), "passages": len(index)} | {
        name: round(float(share), 4) for name, share in shares.items()} | {
        "ms_per_query": round(1000 * spent / len(queries), 2)}


def measure_answers(index: Index, queries: list[dict], cfg: Config, progress: Progress) -> dict:
    """How the model answers, and how the best sentence would, in per cent."""
    model, found = rag.load_writer(cfg), defaultdict(list)

    def ask(question: str) -> rag.Answer | None:
        with suppress(ValueError):  # it reads too few tokens for a source beside this question
            return rag.answer(question, cfg, index, model)
        return None

    def refuses(said: rag.Answer | None, question: str) -> bool:
        return said is not None and said.text.strip() == rag.REFUSAL[language(question)]

    for n, row in enumerate(queries):
        progress.show(f"{row['lang']} {row['source']}: {n:,}/{len(queries):,} answers")
        question, answers = row["query"], row["answers"]
        said = ask(question)
        plain = "".join(map(rag.best_sentence, index.search(question, 1)))
        for name, shown in (("model", said.text if said else ""), ("sentence", plain)):
            em, f1 = score_answer(re.sub(r"\[\d+\]", "", shown), answers, row["lang"])
            found[f"{name}_em"].append(em)
            found[f"{name}_f1"].append(f1)
        found["model_refused"].append(refuses(said, question))
        found["model_no_room"].append(said is None)
        if said and said.cited:
            texts = [said.sources[k - 1].chunk.text for k in said.cited]
            found["model_cited"].append(all(any(a in text for a in answers) for text in texts))
        _, first, size = index.manifest["documents"][row["doc_id"]]
        index.alive[first:first + size] = False
        found["model_refused_without"].append(refuses(ask(question), question))
        index.alive[first:first + size] = True
    return {"answered": len(queries)} | {k: round(100 * float(np.mean(v)), 2)
                                         for k, v in found.items()}


def main() -> None:
    """Print one JSON line per language and source. Raises ValueError for files that do not fit."""
    cfg = configure(Config, show=False)
    if not cfg.corpus or not cfg.queries:
        raise ValueError("eval needs --corpus=FILE and --queries=FILE")
    embedder = embed.load(cfg.embed, cfg.device)
    cut = rag.cutter(cfg, embedder)
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


if __name__ == "__main__":
    run(main)

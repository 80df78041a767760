"""
A search index over chunks of text, in plain files: BM25 over words and Han bigrams, and vectors if
there is an embedder.

    index = Index("out/rag", writable=True)
    index.put("notes.md", sha, split(text, "notes.md", count=count))    # replaces what was there
    index.commit()                                                      # all or nothing
    hits = index.search("how do I install it?", k=5)                   # Hit(chunk, score, …)

    BM25(q, d) = sum over terms t of q:  idf(t) tf / (tf + k1 (1 - b + b |d| / mean |d|))
    idf(t)     = ln(1 + (N - df + 1/2) / (df + 1/2))                    never negative (Lucene)

Nothing that depends on the whole collection is stored: N, df and the mean length are counted when
a question is asked. So adding costs what is added, and scores do not depend on the history of the
index (Robertson and Zaragoza 2009; RRF: Cormack et al. 2009).

    chunks.jsonl    one chunk a line         starts.u64    where each line starts
    vectors.f32     one row a chunk          terms.npz     postings, in a few segments

How they are kept safe is said in manifest.py.
"""
import json
import math
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from typing import Literal, NamedTuple

import numpy as np

from plumbing.corpus import language
from search.embed import Embed, check_language
from search.manifest import Files
from search.postings import Posting, Segment, make_segment, merge_segments, term_key
from search.segment import Chunk
from search.topics import terms

K1, B = 1.2, 0.75
RRF_K, RRF_DEPTH = 60, 100
FEW = 100  # chunks: coverage is judged as if there were at least so many, or one note knows nothing
SAME = 0.9  # Jaccard similarity of terms above which of two chunks the lower ranked is dropped
# Words that ask, not asked for. Without them coverage tells better whether an answer is there.
ASKING = re.compile(
    r"(?i)\b(?:what|which|who|whom|whose|when|where|why|how|is|are|was|were|do|does|did|the|a|an|of"
    r"|in|tell|me|please|to|can|could|you|i|my)\b|什[么麼]|怎[么麼]样?|怎[样樣]|如何|[为為]什[么麼]|[为為]何"
    r"|[请請]问?|告[诉訴]|哪[里裡儿些个個]?|[谁誰]|多少|[几幾]|[吗嗎]|呢|是|的|了|我|有|在|何")
PROBE = "The probe sentence by which an embedder is known again. 用来辨认嵌入模型的句子。"
Mode = Literal["auto", "bm25", "dense", "hybrid", "rrf"]


class Hit(NamedTuple):
    chunk: Chunk
    score: float  # of the retriever that ranked it; comparable within one answer only
    coverage: float  # share of the question's idf weight that the chunk contains, 0 to 1
    cosine: float  # of question and chunk; nan without an embedder


def idf(n: int, df: int) -> float:
    """Weight of a term that df of n chunks hold; the rarer, the heavier."""
    return math.log(1 + (n - df + 0.5) / (df + 0.5))


def reciprocal_rank_fusion(rankings: list[np.ndarray]) -> dict[int, float]:
    """{chunk: sum over rankings of 1 / (60 + rank)}, ranks from 1."""
    fused: dict[int, float] = {}
    for ranking in rankings:
        for rank, chunk in enumerate(ranking.tolist(), 1):
            fused[chunk] = fused.get(chunk, 0.0) + 1 / (RRF_K + rank)
    return fused


def fuse(lexical: np.ndarray, cosines: np.ndarray) -> np.ndarray:
    """Both scores of all chunks by reciprocal ranks. First here and second there is as good as the
    other way round: such ties are frequent, and go to the higher sum of the scores themselves."""
    fused = reciprocal_rank_fusion([top(lexical, RRF_DEPTH), top(cosines, RRF_DEPTH)])
    most = max(float(lexical.max(initial=0.0)), 1e-9)
    return np.bincount(list(fused), [s + 1e-6 * (lexical[i] / most + cosines[i])
                                     for i, s in fused.items()], len(lexical))


def blend(lexical: np.ndarray, cosines: np.ndarray, alive: np.ndarray) -> np.ndarray:
    """The mean of both scores, each scaled to 0 … 1 over the chunks that are alive: how far above
    the others counts, which ranks forget (Bruch et al. 2022), and not what an embedder calls far."""
    def scaled(scores: np.ndarray) -> np.ndarray:
        low = scores[alive].min(initial=np.inf)
        return (scores - low) / max(scores[alive].max(initial=-np.inf) - low, 1e-9)
    if not alive.any():
        return np.zeros(len(alive))
    return np.where(alive, 1e-6 + (scaled(lexical) + scaled(cosines)) / 2, 0.0)


class Index(Files):
    """Chunks on disk that can be searched. One process writes at a time, any number read; a reader
    sees the index as it was when opened. Raises ValueError for a folder that holds no index of this
    kind, a damaged one, or one made with another embedder."""

    def __init__(self, folder: str, writable: bool = False, embed: Embed | None = None,
                 embed_name: str = ""):
        self.embed, self._text = embed, None
        super().__init__(folder, writable)
        try:
            self._map()
            self._check_embedder(embed_name)
        except BaseException:
            self.close()
            raise

    def _map(self) -> None:
        """Open what is committed for reading."""
        self._new: list[Chunk] = []
        self._kept: dict[str, np.ndarray] = {}  # vectors of removed chunks, by their id
        self._changed = False
        self._norm: np.ndarray | None = None  # of each chunk's length; made when asked for
        n = self.manifest["chunks"]
        self.alive = np.ones(n, bool)
        self.alive[self.manifest["dead"]] = False
        self.lengths = np.concatenate([s.lengths for s in self.segments] or [np.zeros(0, np.int32)])
        if self._text:
            self._text.close()
        self._text = open(self._path("chunks"), "rb") if n else None
        self.starts = np.memmap(self._path("starts"), np.uint64, "r", shape=(n,)) if n else None
        known = self.manifest["embed"]
        self.vectors = np.memmap(self._path("vectors"), np.float32, "r", shape=(
            n, known["dim"])) if known and n and "vectors" in self.manifest["files"] else None

    def __enter__(self) -> "Index":
        return self

    def __exit__(self, *error) -> None:
        self.close()

    def close(self) -> None:
        super().close()
        if self._text:
            self._text.close()
        self._text = None

    # ------------------------------------------------------------------------ embedder

    def _check_embedder(self, name: str) -> None:
        known = self.manifest["embed"]
        if self.embed is None:
            if known and self.lock:
                raise ValueError(f"{self.folder}: was made with --embed={known['name']}, which "
                                 "adding to it needs too")
            return
        probe = self._vectors([PROBE], "passage")
        digest = np.round(probe[0], 2).tolist()[:8]
        if known is None and self.manifest["chunks"]:
            raise ValueError(f"{self.folder}: was made without an embedder; add the documents to "
                             f"a new index with --embed={name}")
        if known is None:
            self.manifest["embed"] = {"name": name, "dim": probe.shape[1], "probe": digest,
                                      "langs": []}
        elif known["dim"] != probe.shape[1] or not np.allclose(known["probe"], digest, atol=0.02):
            raise ValueError(f"{self.folder}: was made with {known['name']} ({known['dim']} "
                             f"numbers a vector), not with {name} ({probe.shape[1]}): use that "
                             "one, or make a new index")

    def _check_languages(self, texts: list[str]) -> None:
        """Raises ValueError if the embedder has not learnt a language of a fifth of the texts."""
        known = self.manifest["embed"]
        counts = Counter(map(language, texts))
        new = {lang for lang, n in counts.items() if n >= 0.2 * len(texts)} - set(known["langs"])
        if new and not known["name"].startswith("own:"):  # an experiment, which says so itself
            check_language(self.embed, known["name"], new)
        known["langs"] = sorted({*known["langs"], *new})

    def _vectors(self, texts: list[str], kind: Literal["query", "passage"]) -> np.ndarray:
        """(n, dim) float32, unit rows; a text that gives nothing finite has a row of zeros."""
        v = np.nan_to_num(np.asarray(self.embed(texts, kind), np.float32), posinf=0, neginf=0)
        if v.ndim != 2 or len(v) != len(texts):
            raise ValueError(f"the embedder gave an array of shape {v.shape} for {len(texts)} "
                             "texts")
        return v / np.maximum(np.linalg.norm(v, axis=1, keepdims=True), 1e-12)

    # ------------------------------------------------------------------------ writing

    def put(self, document: str, sha: str, chunks: list[Chunk], root: str = "") -> None:
        """Take a document in, in place of what there was of it. `root`: the folder through which
        it was found."""
        self.remove(document)
        first = self.manifest["chunks"] + len(self._new)
        self.manifest["documents"][document] = [sha, first, len(chunks), root]
        self._new += chunks
        self._changed = True

    def remove(self, document: str) -> None:
        """Forget a document; nothing happens if it is not there."""
        if document not in self.manifest["documents"]:
            return
        _, first, n, _ = self.manifest["documents"].pop(document)
        self.manifest["dead"] += range(first, first + n)
        self._changed = True
        if self.vectors is not None:  # what comes back unchanged is not embedded again
            self._kept |= {self.chunk(i).id: np.array(self.vectors[i])
                           for i in range(first, min(first + n, len(self.vectors)))}

    def commit(self) -> int:
        """Write what was put and removed. Returns how many chunks had to be embedded. Raises
        OSError when the disk fails: the files are then as they were, and this object is done."""
        if not self._changed:
            return 0
        try:
            return self._write()
        except OSError as error:
            with suppress(OSError):
                self._roll_back()
            raise OSError(error.errno, error.strerror, error.filename or str(self.folder)) from None

    def _write(self) -> int:
        n, chunks = self.manifest["chunks"], self._new
        lines = [json.dumps(asdict(c), ensure_ascii=False).encode() + b"\n" for c in chunks]
        end, _ = self.manifest["files"].get("chunks", (0, 0))
        starts = end + np.cumsum([0, *map(len, lines)])[:-1]
        fresh = [c.full for c in chunks if c.id not in self._kept] if self.embed else []
        self._append("chunks", b"".join(lines))
        self._append("starts", starts.astype(np.uint64).tobytes())
        if fresh:
            self._check_languages(fresh)
        if self.embed and chunks:
            made = iter(self._vectors(fresh, "passage") if fresh else ())
            rows = [self._kept[c.id] if c.id in self._kept else next(made) for c in chunks]
            self._append("vectors", np.array(rows, np.float32).tobytes())
        if chunks:
            self._add_segment(make_segment(n, [terms(c.full) for c in chunks]))
        self.manifest["chunks"] = n + len(chunks)
        self._replace_manifest()
        self._map()
        return len(fresh)

    def waiting(self) -> int:
        """Chunks that were put and not yet committed."""
        return len(self._new)

    def compact(self) -> None:
        """Write the living chunks to new files, without the dead."""
        documents = sorted(self.manifest["documents"].items())
        chunks = [[self.chunk(i) for i in range(first, first + n)]
                  for _, (_, first, n, _) in documents]
        for name, _ in documents:
            self.remove(name)
        self.manifest |= {"generation": self.manifest["generation"] + 1, "chunks": 0, "files": {},
                          "dead": [], "segments": []}
        self.segments = []
        for (name, (sha, _, _, root)), part in zip(documents, chunks):
            self.put(name, sha, part, root)
        self.commit()

    def _add_segment(self, segment: Segment) -> None:
        """Behind the others; neighbours of similar size become one, so there are few."""
        names = self.manifest["segments"]
        while self.segments and len(self.segments[-1].chunks) < 2 * len(segment.chunks):
            segment = merge_segments(self.segments.pop(), segment)
            names.pop()
        self.segments.append(segment)
        names.append(self._write_segment(segment))

    # ------------------------------------------------------------------------ searching

    def __len__(self) -> int:
        """Living chunks."""
        return int(self.alive.sum())

    def chunk(self, i: int) -> Chunk:
        """Chunk number i, dead or alive."""
        self._text.seek(int(self.starts[i]))
        return Chunk(**json.loads(self._text.readline()))

    def postings(self, question: str) -> list[Posting]:
        """One for each different term of a question."""
        found, n = [], len(self)
        for term in dict.fromkeys(terms(question)):
            key = term_key(term)
            parts = [(s, where) for s in self.segments if (where := s.find(key))]
            chunks = np.concatenate([s.chunks[w] for s, w in parts] or [np.zeros(0, np.int32)])
            counts = np.concatenate([s.counts[w] for s, w in parts] or [np.zeros(0, np.uint16)])
            if self.manifest["dead"]:
                live = self.alive[chunks]
                chunks, counts = chunks[live], counts[live]
            found.append(Posting(term, idf(n, len(chunks)), chunks, counts))
        return found

    def idf(self, question: str) -> dict[str, float]:
        """Weight of each different term of a question; the rarer, the heavier."""
        return {p.term: p.idf for p in self.postings(question)}

    def bears_on(self, hits: list[Hit], min_coverage: float) -> bool:
        """Whether the best of the hits holds enough of the question to answer from. Judged by idf
        coverage (0 to 1); without a term in common, by cosine: above 95 % of random pairs."""
        if not hits or not min_coverage:
            return bool(hits)
        return max(hit.coverage for hit in hits) >= min_coverage

    def bm25(self, postings: list[Posting]) -> np.ndarray:
        """(chunks,) scores."""
        if not postings or not len(self):
            return np.zeros(len(self.alive))
        if self._norm is None:
            mean = self.lengths[self.alive].mean()
            self._norm = (K1 * (1 - B + B * self.lengths / mean)).astype(np.float32)
        norm = self._norm
        parts = [p.idf * (p.counts / (p.counts + norm[p.chunks])) for p in postings]
        return np.bincount(np.concatenate([p.chunks for p in postings]),
                           np.concatenate(parts), minlength=len(self.alive))

    def cosines(self, question: str) -> np.ndarray:
        """(chunks,) of question and chunk; the dead have -1."""
        if self.vectors is None or self.embed is None:
            raise ValueError(f"{self.folder}: has no vectors; make it with --embed=…")
        scores = self.vectors @ self._vectors([question], "query")[0]
        return np.where(self.alive, scores, -1.0)

    def numbers(self, document: str) -> list[int]:
        """Numbers of a document's chunks."""
        _, first, n, _ = self.manifest["documents"].get(document, ("", 0, 0, ""))
        return list(range(first, first + n))

    @contextmanager
    def without(self, document: str) -> Iterator[None]:
        """Search as if a document were not there."""
        alive, dead = self.alive.copy(), self.manifest["dead"]
        self.alive[self.numbers(document)] = False
        self.manifest["dead"], self._norm = dead + self.numbers(document), None
        try:
            yield
        finally:
            self.alive, self.manifest["dead"], self._norm = alive, dead, None

    def scores(self, question: str, mode: Mode = "auto") -> np.ndarray:
        """(chunks,) what `search` ranks by; 0 or less for what it would never return."""
        return self._scores(self.postings(question), question, self._mode(mode))[0]

    def _scores(self, found: list[Posting], question: str, mode: Mode
                ) -> tuple[np.ndarray, np.ndarray | None]:
        """(what to rank by, the cosines where they are needed), (chunks,) each."""
        lexical = self.bm25(found)
        if mode == "bm25":
            return lexical, None
        cosines = self.cosines(question)
        if mode == "dense":
            return cosines, cosines
        both = fuse(lexical, cosines) if mode == "rrf" else blend(lexical, cosines, self.alive)
        return both, cosines

    def _mode(self, mode: Mode) -> Mode:
        if mode != "auto":
            return mode
        return "bm25" if self.vectors is None or self.embed is None else "hybrid"

    def search(self, question: str, k: int = 5, mode: Mode = "auto", mmr: float = 0.0) -> list[Hit]:
        """The k best chunks, best first; of chunks with nearly the same terms the best only.
        `mmr` between 0 and 1 trades score for chunks unlike those before (Carbonell and Goldstein
        1998, with 1 - mmr for lambda). Fewer than k where fewer score at all."""
        mode = self._mode(mode)
        found = self.postings(question)
        scores, cosines = self._scores(found, question, mode)
        best = top(scores, RRF_DEPTH if mmr else max(4 * k, 20))
        chunks = {int(i): self.chunk(i) for i in best}
        order = sorted(chunks, key=lambda i: (-scores[i], chunks[i].doc, chunks[i].start))
        matter = set(terms(ASKING.sub(" ", question))) or {p.term for p in found}
        asked = [p for p in found if p.term in matter]
        weights = [idf(max(len(self), FEW), len(p.chunks)) for p in asked]
        total = sum(weights) or 1.0
        return [Hit(chunks[i], float(scores[i]),
                    sum(w for w, p in zip(weights, asked) if _holds(p.chunks, i)) / total,
                    math.nan if cosines is None else float(cosines[i]))
                for i in diverse(order, scores, chunks, k, mmr)]


def _holds(ascending: np.ndarray, value: int) -> bool:
    at = int(np.searchsorted(ascending, value))
    return at < len(ascending) and int(ascending[at]) == value


def top(scores: np.ndarray, k: int) -> np.ndarray:
    """Where the k highest positive scores are, best first, and those equal to the last of them (up
    to as many again)."""
    if len(scores) > k:
        least = np.partition(scores, -k)[-k]
        at = np.flatnonzero((scores >= least) & (scores > 0))
    else:
        at = np.flatnonzero(scores > 0)
    return at[np.argsort(-scores[at], kind="stable")][:2 * k]


def diverse(order: list[int], scores, chunks: dict[int, Chunk], k: int, mmr: float) -> list[int]:
    """k of the chunks in `order`: without near-duplicates, and by maximal marginal relevance."""
    words = {}
    taken: list[int] = []

    def likeness(i: int) -> float:
        """To the most similar chunk that is taken: Jaccard of their terms."""
        return max((len(words[i] & words[j]) / max(1, len(words[i] | words[j])) for j in taken),
                   default=0.0)

    left = list(order)
    while left and len(taken) < k:
        if mmr:
            for i in left:
                words.setdefault(i, set(terms(chunks[i].text)))
            highest = max(scores[i] for i in order)
            left.sort(key=lambda i: -((1 - mmr) * scores[i] / highest - mmr * likeness(i)))
        i = left.pop(0)
        words.setdefault(i, set(terms(chunks[i].text)))
        if likeness(i) <= SAME:
            taken.append(i)
    return taken

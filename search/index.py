"""
A search index over chunks of text, in plain files: BM25 over words and pairs of Chinese characters,
and vectors if there is an embedder.

    index = Index("out/rag", writable=True)
    index.put("notes.md", sha, split(text, "notes.md", count=count))    # replaces what was there
    index.commit()                                                      # all or nothing
    hits = index.search("how do I install it?", k=5)                    # Hit(chunk, score, …)

    BM25(q, d) = sum over terms t of q:  idf(t) tf / (tf + k1 (1 - b + b |d| / mean |d|))
    idf(t)     = ln(1 + (N - df + 1/2) / (df + 1/2))                    never negative (Lucene)

tf is how often d holds t, df how many of the N chunks do (Robertson and Zaragoza 2009). N, df and
the mean length are counted when a question is asked, and nothing that depends on the whole
collection is stored. So adding costs what is added, and scores do not depend on the history.
"""
import json
import math
import mmap
from collections import Counter
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict
from typing import Any, NamedTuple

import numpy as np

from plumbing.corpus import language
from search.embed import Embed, Kind, check_language
from search.manifest import Files, make_segment
from search.segment import Chunk
from search.topics import ASKING, ASKING_HAN, terms

K1, B = 1.2, 0.75
FEW = 100  # chunks: coverage is judged as if there were at least so many, or one note knows nothing
SAME = 0.9  # two chunks that share more than this of their terms are shown once
PROBE = "The probe sentence by which an embedder is known again. 用来辨认嵌入模型的句子。"


class Hit(NamedTuple):
    chunk: Chunk
    score: float  # of the retriever that ranked it; comparable within one answer only
    held: dict[str, float]  # terms of the question that the chunk holds, with their idf
    coverage: float  # the sum of those, as a share of the idf of all terms of the question

    def best(self, parts: Iterable[str]) -> str:
        """Of some parts of the chunk, the one that holds most of the question."""
        return max(parts, key=lambda part: sum(self.held.get(t, 0.0) for t in set(terms(part))),
                   default="")


class Posting(NamedTuple):
    term: str
    idf: float
    chunks: np.ndarray  # living chunks that hold the term, ascending
    counts: np.ndarray  # how often each does


def idf(n: int, df: int) -> float:
    """Weight of a term that df of n chunks hold; the rarer, the heavier."""
    return math.log(1 + (n - df + 0.5) / (df + 0.5))


def blend(lexical: np.ndarray, cosines: np.ndarray, alive: np.ndarray) -> np.ndarray:
    """The mean of both scores, each scaled to 0 … 1 over the living chunks. Ranks would forget how
    far a chunk is above the others (Bruch et al. 2022)."""
    def scaled(scores: np.ndarray) -> np.ndarray:
        low = scores[alive].min(initial=np.inf)
        return (scores - low) / max(scores[alive].max(initial=-np.inf) - low, 1e-9)
    return np.where(alive, 1e-6 + (scaled(lexical) + scaled(cosines)) / 2, 0.0)


class Index(Files):
    """Chunks on disk that can be searched. Raises ValueError for a damaged index, or one made with
    another embedder. An embedder with a name must speak the languages of the texts. None is needed
    to ask by words, or to `only_remove`."""

    def __init__(self, folder: str, writable: bool = False, embed: Embed | None = None,
                 embed_name: str = "", only_remove: bool = False):
        self.embed: Any = embed
        self.embed_name, self.only_remove, self._changed = embed_name, only_remove, False
        super().__init__(folder, writable)

    def _open(self, writable: bool) -> None:
        super()._open(writable)
        self.new: list[Chunk] = []  # that were put and not yet committed
        self._kept: dict[str, np.ndarray] = {}  # vectors of new and of removed chunks, by their id
        self._map()
        self._check_embedder()

    def _map(self) -> None:
        """Make what is committed ready for reading."""
        n, known = self.manifest["chunks"], self.manifest["embed"]
        self.alive = np.ones(n, bool)
        self.alive[self.manifest["dead"]] = False
        self.lengths = np.concatenate([s.lengths for s in self.segments] or [np.zeros(0, np.int32)])
        if n:
            with open(self._path("chunks", ".jsonl"), "rb") as f:
                self._text = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ)
            self._starts = np.memmap(self._path("starts", ".u64"), np.uint64, "r", 0, (n,))
        self.vectors = np.memmap(self._path("vectors", ".f32"), np.float32, "r", 0,
                                 (n, known["dim"])) if n and known else None

    def _check_embedder(self) -> None:
        known, name = self.manifest["embed"], self.embed_name
        if self.embed is None:
            if known and self.lock and not self.only_remove:
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
        if new and known["name"]:
            check_language(self.embed, known["name"], new)
        known["langs"] = sorted({*known["langs"], *new})

    def _vectors(self, texts: list[str], kind: Kind) -> np.ndarray:
        """(n, dim) float32, unit rows; a text that gives nothing finite has a row of zeros."""
        v = np.nan_to_num(np.asarray(self.embed(texts, kind), np.float32), posinf=0, neginf=0)
        if v.ndim != 2 or len(v) != len(texts):
            raise ValueError(f"the embedder made {v.shape} numbers of {len(texts)} texts")
        return v / np.maximum(np.linalg.norm(v, axis=1, keepdims=True), 1e-12)

    def put(self, document: str, sha: str, chunks: list[Chunk]) -> None:
        """Take a document in, in place of what there was of it. `sha` is of its file, if any."""
        self.remove(document)
        first = self.manifest["chunks"] + len(self.new)
        self.manifest["documents"][document] = [sha, first, len(chunks)]
        self.new += chunks
        self._changed = True

    def remove(self, document: str) -> None:
        """Forget a document, if it is there. From now on no search finds it."""
        if document not in self.manifest["documents"]:
            return
        _, first, n = self.manifest["documents"].pop(document)
        self.manifest["dead"] += range(first, first + n)
        self._changed = True
        if self.vectors is not None:  # what comes back unchanged is not embedded again
            self._kept |= {self.chunk(i).id: np.array(self.vectors[i])
                           for i in range(first, min(first + n, len(self.vectors)))}
        self.alive[first:first + n] = False

    def note(self, folders: Iterable[str], refused: Iterable[str], stamps: dict[str, int]) -> None:
        """Remember which folders are indexed, which files are no documents, and the times of files
        when they were read or failed. An index without documents is not written for that."""
        refused = set(refused)
        now = {"folders": sorted(set(folders)), "refused": sorted(refused),
               "stamps": {name: stamp for name, stamp in sorted(stamps.items())
                          if name in self.manifest["documents"] or name in refused}}
        self._changed |= bool(self.manifest["documents"]) and self.manifest | now != self.manifest
        self.manifest |= now

    def commit(self) -> int:
        """Write what was put and removed; all anew, once 30 % of the chunks are dead. Returns how
        many were embedded. Raises OSError if the disk fails: the files stay as they were. Whatever
        ends it, Ctrl-C too, another commit writes what this one did not."""
        if not self._changed:
            return 0
        fresh = {c.id: c.full for c in self.new if self.embed and c.id not in self._kept}
        if texts := [*fresh.values()]:  # takes minutes, perhaps: nothing is written yet
            self._check_languages(texts)
            self._kept |= zip(fresh, self._vectors(texts, "passage"))
        files, names = dict(self.manifest["files"]), list(self.manifest["segments"])
        before = self.manifest | {"files": files, "segments": names}, list(self.segments)
        try:
            self._write()
            self.new, self._kept, self._changed = [], {}, False
        except BaseException as error:
            self.manifest, self.segments = before
            if isinstance(error, OSError):
                with suppress(OSError):
                    self._roll_back()
                error.strerror = error.strerror or str(error)
                error.filename = error.filename or str(self.folder)
            raise
        if len(self.manifest["dead"]) > 0.3 * self.manifest["chunks"]:
            self.compact()
        return len(fresh)

    def _write(self) -> None:
        n, chunks = self.manifest["chunks"], self.new
        if chunks:
            lines = [json.dumps(asdict(c), ensure_ascii=False).encode() + b"\n" for c in chunks]
            path = self._path("chunks", ".jsonl")
            end, _ = self.manifest["files"].get(path.name, (0, 0))
            starts = end + np.cumsum([0, *map(len, lines)])[:-1]
            self._append(path, b"".join(lines))
            self._append(self._path("starts", ".u64"), starts.astype(np.uint64).tobytes())
            self._add_segment(make_segment(n, [terms(c.full) for c in chunks]))
        if chunks and self.manifest["embed"]:
            rows = np.array([self._kept[c.id] for c in chunks], np.float32)
            self._append(self._path("vectors", ".f32"), rows.tobytes())
        self.manifest["chunks"] = n + len(chunks)
        self._replace_manifest()
        self._map()

    def size(self) -> str:
        return f"{len(self):,} chunks of {len(self.manifest['documents']):,} documents"

    def compact(self) -> None:
        """Write the living chunks to new files, without the dead."""
        documents, living = {}, []
        for name, (sha, first, n) in sorted(self.manifest["documents"].items()):
            documents[name] = [sha, len(living), n]
            living += range(first, first + n)
        new = [self.chunk(i) for i in living]
        kept = {} if self.vectors is None else dict(zip((c.id for c in new), self.vectors[living]))
        self.manifest, self.segments, self.new, self._kept, self._changed = self.manifest | {
            "generation": self.manifest["generation"] + 1, "chunks": 0, "files": {}, "segments": [],
            "dead": [], "documents": documents}, [], new, kept, True  # which Ctrl-C cannot part
        self.commit()

    def __len__(self) -> int:
        """Living chunks."""
        return int(self.alive.sum())

    def chunk(self, i: int) -> Chunk:
        """Chunk number i, dead or alive."""
        start = int(self._starts[i])  # and no seek, which threads would share
        return Chunk(**json.loads(self._text[start:self._text.find(b"\n", start)]))

    def postings(self, text: str) -> list[Posting]:
        """One for each different term of a text."""
        found, n = [], len(self)
        for term in dict.fromkeys(terms(text)):
            parts = [(s, s.find(term)) for s in self.segments]
            chunks = np.concatenate([s.chunks[at] for s, at in parts] or [np.zeros(0, np.int32)])
            counts = np.concatenate([s.counts[at] for s, at in parts] or [np.zeros(0, np.uint16)])
            if n < len(self.alive):
                live = self.alive[chunks]
                chunks, counts = chunks[live], counts[live]
            found.append(Posting(term, idf(n, len(chunks)), chunks, counts))
        return found

    def bm25(self, postings: list[Posting]) -> np.ndarray:
        """(chunks,) scores."""
        if not postings or not len(self):
            return np.zeros(len(self.alive))
        per_term = B / self.lengths[self.alive].mean()
        parts = [p.idf * p.counts / (p.counts + K1 * (1 - B + per_term * self.lengths[p.chunks]))
                 for p in postings]
        return np.bincount(np.concatenate([p.chunks for p in postings]), np.concatenate(parts),
                           minlength=len(self.alive)).astype(float)  # of nothing, it is of int

    def cosines(self, question: str) -> np.ndarray:
        """(chunks,) of question and chunk; the dead have -1."""
        return np.where(self.alive, self.vectors @ self._vectors([question], "query")[0], -1.0)

    def rank(self, postings: list[Posting], question: str) -> np.ndarray:
        """(chunks,) scores; `search` never returns a chunk that has 0 or less."""
        lexical = self.bm25(postings)
        if self.vectors is None or self.embed is None:
            return lexical
        return blend(lexical, self.cosines(question), self.alive)

    def search(self, question: str, k: int = 5) -> list[Hit]:
        """The k best chunks, best first, and of chunks with nearly the same terms the best only.
        Fewer than k where fewer score at all."""
        asked = self.postings(question)
        scores = self.rank(asked, question)
        chunks = {i: self.chunk(i) for i in top(scores, max(4 * k, 20))}
        matter = [p for p in asked if p.term not in ASKING and ASKING_HAN.isdisjoint(p.term)]
        weights = {p.term: idf(max(len(self), FEW), len(p.chunks)) for p in matter or asked}
        hits: list[Hit] = []
        bags: list[set[str]] = []  # the terms of each hit
        for i in sorted(chunks, key=lambda i: (-scores[i], chunks[i].doc, chunks[i].start)):
            bag = set(terms(chunks[i].text))
            if all(len(bag & other) <= SAME * len(bag | other) for other in bags):
                bags.append(bag)
                there = bag.union(terms(f"{chunks[i].crumb}\n{chunks[i].prefix}"))
                held = {term: weight for term, weight in weights.items() if term in there}
                hits.append(Hit(chunks[i], float(scores[i]), held,
                                sum(held.values()) / (sum(weights.values()) or 1.0)))
            if len(hits) == k:
                break
        return hits


def top(scores: np.ndarray, k: int) -> list[int]:
    """Where the k highest positive scores are, best first, and up to k that equal the last."""
    at = np.flatnonzero(scores > 0)
    if len(at) > k:
        at = at[scores[at] >= np.partition(scores, -k)[-k]]
    return at[np.argsort(-scores[at], kind="stable")][:2 * k].tolist()

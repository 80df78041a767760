"""
Prose into sentences, terms and topics, in English and Chinese.

    sentences("Mr. Wu paid 3.50. 他说：“好。”然后走了。")         # spans: 3 sentences
    terms("RAG 检索")                                           # rag 检 索 检索
    semantic_cuts(tfidf(texts), sizes, max_size=256)            # where the topic changes

Topics are found by content vectors (Alemi & Ginsparg 2015, arXiv 1503.05543). Vectors on one topic
point the same way, so their sum is long. Of all ways to cut n unit vectors into segments, dynamic
programming finds the one with the largest sum over segments of |sum of vectors| - penalty.
"""
import math
import re
import unicodedata
import zlib
from collections import Counter
from collections.abc import Sequence

import numpy as np

# What shows nothing: controls, joiners, marks of direction, byte order marks, tags, selectors.
INVISIBLE = re.compile("[\x00-\x08\x0e-\x1b\x7f-\x84\x86-\x9f\xad\u061c\u180e\u200b-\u200f"
                       "\u202a-\u202e\u2060-\u206f\ufe00-\ufe0f\ufeff\ufff9-\ufffb"
                       "\U000e0000-\U000e0fff]")
HAN = "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
BARE = re.compile(r"\S(?:.*\S)?", re.S)  # without the white space around it
STOP = re.compile(r"\n\s*\n|[。！？；…｡．.!?]+")
CLOSING = set("”’」』）)】》〕]")
EITHER = set("\"'*_")  # open or close, as the sentence before them has it
ABBREVIATIONS = set("mr mrs ms dr prof st jr sr vs cf e.g i.e fig eq no vol al etc approx".split())


def sentences(text: str) -> list[tuple[int, int]]:
    """Spans (start, end) of the sentences, without the white space between them. A blank line ends
    a sentence as well, a line end does not: text may be wrapped."""
    ends = [0]
    for stop in STOP.finditer(text):
        if end := _sentence_end(text, ends[-1], stop):
            ends.append(end)
    found = (BARE.search(text, *span) for span in zip(ends, [*ends[1:], len(text)]))
    return [bare.span() for bare in found if bare]


def _sentence_end(text: str, start: int, stop: re.Match) -> int:
    """End of the sentence from `start` if it ends with this stop, else 0."""
    marks, before = stop[0], text[stop.start() - 1:stop.start()]
    if marks[0] == "\n":
        return stop.end()
    end = _closed(text, start, stop.end())
    after = text[end:end + 1]
    if text[end - 1:end + 1] == "](":  # of a link
        return 0
    if marks.strip(".!?．"):  # the others stand in numbers, names and addresses as well
        return end
    if after.strip() and (after.isascii() or not (
            re.match(f"[{HAN}]", before) or marks[0] == "．" and not before.isdigit())):
        return 0
    return 0 if marks == "." and _is_abbreviation(text, start, stop.start()) else end


def _closed(text: str, start: int, end: int) -> int:
    """The sentence from `start` to `end`, longer by the marks after it that close a part of it."""
    while (mark := text[end:end + 1]) and (mark in CLOSING or mark in EITHER):
        mark = mark * 2 if text[end:end + 2] in ("**", "__") else mark
        spaced = not text[end + len(mark):end + len(mark) + 1].strip()
        if not (mark in CLOSING or spaced
                or text.count(mark, max(start, end - 1000), end) % 2):  # bounded, to stay linear
            break
        end += len(mark)
    return end


def _is_abbreviation(text: str, start: int, dot: int) -> bool:
    """Is the word before the dot one (Dr. e.g. J. U.S.), or the number of a list item (1.)?"""
    words = text[max(start, dot - 12):dot].split()
    word = words[-1].lower().lstrip("([*_\"'“‘") if words else ""
    if word in ("no", "etc"):  # which end sentences as well: see what follows
        after = text[dot + 1:dot + 3].strip()
        return after.isdigit() if word == "no" else after.islower()
    if word.isdigit():
        return dot - start < 12 and text[start:dot].strip() == word
    initial = word.isascii() and word[-1:].isalpha() and (len(word) == 1 or word[-2] == ".")
    return initial or word in ABBREVIATIONS


TERM = re.compile(rf"[{HAN}]+|v?\d+(?:\.\d+){{1,3}}|[a-z]{{1,2}}(?:\+\+|#)(?![a-z])"
                  rf"|(?<![a-z\d_.])\.[a-z]+|[^\W_{HAN}]+")
# terms of a question that ask, and say nothing of what is asked for; so does one with such a Han
ASKING = frozenset("what which who whom whose when where why how is are was were do doe did the a "
                   "an of in tell me please to can could you i my 多少 多 少 何 如何 问 問".split())
ASKING_HAN = frozenset("什么麼怎谁誰哪吗嗎呢几幾请請告诉訴是的了我有在")


def terms(text: str) -> list[str]:
    """What search counts: words and numbers in lower case, without a plural s. Chinese needs no
    dictionary: each character counts, and each pair of neighbours. v1.2.10 counts as 1, 1.2 and
    1.2.10; C++, C# and .NET stay what they are. Invisible characters part no word."""
    found = []
    if not text.isascii():
        text = unicodedata.normalize("NFKC", INVISIBLE.sub("", text))
    for run in TERM.findall(text.lower()):
        if "\u3400" <= run[0] <= "\u9fff" or "\uf900" <= run[0] <= "\ufaff":
            found += [*run, *(run[i:i + 2] for i in range(len(run) - 1))]
        elif run[0] == ".":
            found += [run, run[1:]]
        elif "." in run:
            parts = run.removeprefix("v").split(".")
            found += [".".join(parts[:i]) for i in range(1, len(parts) + 1)]
        else:
            plural = len(run) > 3 and run[-1] == "s" and run[-2] != "s"
            found.append(run[:-1] if plural else run)
    return found


def tfidf(sentences: list[str], dim: int = 2048) -> np.ndarray:
    """Unit rows (n, dim) of the terms of each sentence, rare ones weighing more; zeros without any.
    Terms are hashed to signed dimensions: inner products change by noise of order dim ** -0.5."""
    counts = [Counter(terms(sentence)) for sentence in sentences]
    df = Counter(term for count in counts for term in count)
    rows = np.zeros((len(sentences), dim), dtype=np.float32)
    code = {term: zlib.crc32(term.encode()) for term in df}
    for row, count in zip(rows, counts):
        for term, tf in count.items():
            sign = 1 if code[term] >> 31 else -1
            row[code[term] % dim] += sign * tf * math.log(1 + len(sentences) / df[term])
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)


WINDOW = 3  # units on each side of a gap whose sums are compared


def semantic_cuts(vectors: np.ndarray, sizes: Sequence[int], max_size: int,
                  penalty: float | None = None) -> list[int]:
    """Where to cut a sequence of unit vectors (n, d), one per sentence, into segments: the indices
    at which a new one begins, without 0. No segment has more than `max_size`, the sum of its
    `sizes`, but a larger vector alone. The penalty is the gain that a cut must bring. O(n m d) time
    with m vectors per max_size."""
    n = len(vectors)
    sums = np.cumsum(np.pad(vectors, ((1, 0), (0, 0))), axis=0, dtype=np.float64)
    ends = np.concatenate([[0], np.cumsum(sizes)])
    penalty = automatic_penalty(vectors) if penalty is None else penalty
    best, cut = np.zeros(n + 1), np.zeros(n + 1, dtype=np.int64)
    for j in range(1, n + 1):
        i = min(int(np.searchsorted(ends, ends[j] - max_size)), j - 1)  # first allowed start
        scores = best[i:j] + np.linalg.norm(sums[j] - sums[i:j], axis=1) - penalty
        cut[j] = i + int(np.argmax(scores))  # of equal ones the longest segment
        best[j] = scores[cut[j] - i]
    cuts = [n]
    while cuts[-1] > 0:
        cuts.append(int(cut[cuts[-1]]))
    return cuts[-2:0:-1]


def automatic_penalty(vectors: np.ndarray, shuffles: int = 8) -> float:
    """What a cut gains where there is no topic to change, |a| + |b| - |a + b| for the sums a, b
    of three vectors before and after a gap: mostly as in shuffled order, a little as it is."""
    if len(vectors) < 2:
        return 0.0
    draw = np.random.default_rng(0)
    shuffled = np.mean([_gains(draw.permutation(vectors)).mean() for _ in range(shuffles)])
    return float(0.8 * shuffled + 0.2 * _gains(vectors).mean())


def _gains(vectors: np.ndarray) -> np.ndarray:
    """|a| + |b| - |a + b| at each gap, (n - 1,)."""
    n, padded = len(vectors), np.pad(vectors, ((WINDOW, WINDOW), (0, 0)))
    sums = np.add.reduce([padded[i:i + n + WINDOW + 1] for i in range(WINDOW)])  # of k - 3 … k - 1
    left, right = sums[1:n], sums[1 + WINDOW:n + WINDOW]
    return np.add(*(np.linalg.norm(v, axis=1) for v in (left, right))) - np.linalg.norm(
        left + right, axis=1)

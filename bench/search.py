"""
How fast documents are split, indexed and searched: the rows `search` of `python -m bench`.

    python -m bench --only=search
"""
import shutil
import time
from functools import partial
from itertools import cycle
from pathlib import Path

import numpy as np

from bench.race import Race
from plumbing.runtime import of_process
from search import documents
from search.index import Index
from search.segment import split


def write_note(rng: np.random.Generator, lang: str, paragraphs: int) -> str:
    """Markdown of made-up words, or Han characters, whose frequencies fall as 1 / rank."""
    n, size = paragraphs * 48, 3000 if lang == "zh" else 40_000
    rank = np.minimum(np.exp(rng.random(n) * np.log(size)), size - 1).astype(int)  # Zipf
    words = [chr(0x4E00 + i) if lang == "zh" else f"w{i:x}" for i in rank]
    lines = []
    for at in range(0, n, 48):
        if at % 480 == 0:
            lines.append(f"# {words[at]}")
        parts = [words[i:i + 12] for i in range(at, at + 48, 12)]
        lines.append("".join("".join(p) + "。" for p in parts) if lang == "zh" else
                     " ".join(" ".join(p) + "." for p in parts))
    return "\n\n".join(lines)


def made_up(texts: list[str], kind: str) -> np.ndarray:
    return np.random.default_rng(len(texts[0])).standard_normal((len(texts), 384), np.float32)


def search(cfg, folder: str) -> None:
    """Splitting notes, half of them Chinese, making an index of their chunks with 384 made-up
    numbers for each, and asking for 8 words or 12 characters of one of them."""
    rng, count = np.random.default_rng(0), documents.count_pieces
    cut = partial(split, max_tokens=128, count=count)
    one, two = ("".join(write_note(rng, lang, n) for lang in ("en", "zh")) for n in (1000, 2000))
    few = cut(one, "few")[:2000]

    def index_few() -> None:
        shutil.rmtree(f"{folder}/few", ignore_errors=True)
        with Index(f"{folder}/few", True) as made:
            made.put("few", "", few)
            made.commit()

    race = Race("search", {"split": partial(cut, one, "one"), "split twice as much": partial(
        cut, two, "two"), f"index {len(few):,} chunks": index_few}, cfg)
    for (name, seconds), (n, unit) in zip(race.seconds.items(), (
            (len(one.encode()) / 1e6, "MB/s"), (len(two.encode()) / 1e6, "MB/s"),
            (len(few), "chunks/s"))):
        race.row(name, n / seconds, unit)

    start, left, i, asked = time.perf_counter(), cfg.chunks, 0, {"en": [], "zh": []}
    with Index(f"{folder}/many", True, made_up) as made:
        while left:
            lang = ("en", "zh")[i % 2]
            chunks = cut(write_note(rng, lang, 100), str(i))[:left]
            words = chunks[0].text.split("\n")[-1]
            asked[lang].append(" ".join(words.split()[:8]) if lang == "en" else words[:12])
            made.put(str(i), "", chunks)
            left, i = left - len(chunks), i + 1
            if len(made.new) >= documents.COMMIT_CHUNKS or not left:
                made.commit()
    notes = {"chunks": cfg.chunks, "built_s": time.perf_counter() - start}
    notes["disk_mb"] = sum(path.stat().st_size for path in Path(folder, "many").iterdir()) / 1e6
    before = of_process("VmRSS")
    bm25 = Index(f"{folder}/many")
    turns = {lang: cycle(questions) for lang, questions in asked.items()}
    ask = {f"bm25, {lang}": partial(lambda lang: bm25.search(next(turns[lang])), lang)
           for lang in asked}
    for search_once in ask.values():
        search_once()
    # without the vectors, which stay on disk
    notes["memory_mb"] = (of_process("VmRSS") - before) / 1e6
    hybrid = Index(f"{folder}/many", False, made_up)
    race = Race("search", ask | {"hybrid, en": lambda: hybrid.search(next(turns["en"]))}, cfg)
    for name, seconds in race.seconds.items():
        race.row(name, 1000 * seconds, "ms", **notes)

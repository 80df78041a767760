"""
Answers from your own documents, with their sources, in English and Chinese.

    python rag.py add notes/ manual.md                     index files and folders; again: changes
    python rag.py ask "怎么安装？" --stream                 the best sentences and where they stand
    python rag.py ask "How?" --checkpoint=out/sft          the same, answered by a model
    python rag.py chat --checkpoint=out/sft                a conversation
    python rag.py info                                     what is in the index
    python rag.py split notes/ --semantic                  the segments as JSON lines
    python rag.py eval --corpus=FILE --queries=FILE        recall, refusal, answers on questions

Documents are cut into chunks (segment.py) and found by BM25, by vectors, or by both (index.py).
When the best chunk holds too little of what the question asks, measured in idf, no model is asked:
it could only invent. Otherwise the sources are numbered and put before the question, as token ids,
so that no document can open a turn; citations that name no source are dropped from the answer.
"""
import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from typing import Literal

import torch

from search import embed
from bench import rag as rag_eval
from configurator import configure, fail
from plumbing.corpus import language
from search.documents import Cut, as_utf8, count_pieces, find_documents, read_document, update
from generate import generate
from plumbing.loading import load_model
from search.index import Hit, Index, Mode
from model import Transformer
from search.segment import split
from tokenizer import StreamDecoder, Tokenizer, load_tokenizer, render
from search.topics import INVISIBLE, sentences, terms, tfidf

JOBS = ("add", "ask", "chat", "info", "split", "eval")


@dataclass(frozen=True)
class Config:
    index: str = "out/rag"  # folder of the index
    checkpoint: str = ""  # model that answers; without one the best sentences are shown
    chunk_tokens: int = 256  # most tokens of a chunk, its headings included
    overlap: int = 0  # tokens of whole sentences that a chunk repeats from the one before
    semantic: bool = False  # end chunks where the topic changes, too
    tokenizer: str = ""  # file to count tokens with; none: words, Han characters and signs
    max_file_mb: int = 50  # skip files that are larger
    embed: str = ""  # vectors: sentence-transformers:NAME, http(s)://… (OpenAI style), own:…
    mode: Mode = "auto"  # what ranks the chunks; auto: hybrid where there are vectors, else bm25
    n_sources: int = 3  # sources for an answer
    mmr: float = 0.0  # 0 to 1: prefer sources that differ from those before
    min_coverage: float = 0.3  # refuse if the best chunk holds less of the question's idf; 0: never
    template: Literal["cited", "short"] = "cited"  # of the prompt; short: the toy world's own
    context_share: float = 0.6  # most of the model's context that sources may fill
    max_tokens: int = 200  # longest answer
    temperature: float = 0.0  # 0: always the most likely token
    seed: int = 0  # the same seed gives the same answer
    stream: bool = False  # print the answer as it is written
    corpus: str = ""  # eval: {"id", "title", "text", "lang", "source"} a line
    queries: str = ""  # eval: {"query", "answers", "doc_id", "lang", "source"} a line
    passages: Literal["whole", "chunks", "fixed"] = "whole"  # eval: how documents are cut
    peer: bool = False  # eval: rank with bm25s and jieba too, to compare (the extra `peers`)
    limit: int = 0  # eval: this many questions per language and source, evenly spread; 0: all
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"  # where to compute


# ---------------------------------------------------------------------------- answering

REFUSAL = {"en": "Not found in the documents.", "zh": "资料中没有找到答案。"}
SYSTEM = ("只根据下面编号的资料回答，每句话后面标注来源编号，例如 [1]。"
          f"资料里没有答案时，回答“{REFUSAL['zh']}”\n"
          "Answer only from the numbered sources below and put the number of the source behind "
          f"each sentence, like [1]. If they do not hold the answer, say \"{REFUSAL['en']}\"")
SHORT = {"en": "Context: {c}\nQuestion: {q}", "zh": "资料：{c}\n问题：{q}"}
ASKED = {"en": "Question: ", "zh": "问题："}
CITATION = re.compile(r"\[(\d{1,9})\]")


@dataclass(frozen=True)
class Answer:
    text: str
    sources: list[Hit]  # what the model was given, number 1 first
    grounded: bool  # False: nothing in the index bears on the question, no model was asked
    cited: list[int]  # numbers of the sources that the text names
    invalid_citations: list[int]  # numbers that name no source; they are not in the text
    supported: float  # share of the citing sentences of whose idf weight half is in their source
    prompt_tokens: int
    retrieve_ms: float
    first_token_ms: float  # from the question to the first token


def shown(text: str) -> str:
    """Text of a document as a model or a terminal may see it: without invisible characters, and
    without brackets at the start of a line that would look like the number of a source."""
    text = re.sub("[\x0b\x0c\x1c-\x1e\x85\u2028\u2029]", "\n", INVISIBLE.sub("", text))
    return re.sub(r"(?m)^((?:[^\S\n]|[>*#-])*)\[[^\S\n]*(\d+)[^\S\n]*\]", r"\1(\2)", text)


def location(hit: Hit) -> str:
    """path:line"""
    path = hit.chunk.doc
    near = os.path.relpath(path) if os.path.isabs(path) else path
    return f"{path if near.startswith('..') else near}:{hit.chunk.line}"


def build_messages(question: str, sources: list[str], template: str,
                   history: list[dict]) -> list[dict]:
    """The chat that asks a model. `sources` are texts that `shown` has passed."""
    lang = language(question)
    if template == "short":
        space = {"en": " ", "zh": ""}[lang]
        context = space.join(re.sub(r"\s*\n\s*", space, text.strip()) for text in sources)
        asked = SHORT[lang].format(c=context, q=question) if sources else question
        return [*history, {"role": "user", "content": asked}]
    numbered = [f"[{n}] {text}" for n, text in enumerate(sources, 1)]
    content = "\n\n".join([*numbered, ASKED[lang] + question])
    return [{"role": "system", "content": SYSTEM}, *history, {"role": "user", "content": content}]


def build_prompt(question: str, hits: list[Hit], tok: Tokenizer, length: int, cfg: Config,
                 history: list[dict]) -> tuple[list[int], list[Hit]]:
    """(token ids, the sources in them): as many of the best as fit whole; the one that does not is
    cut behind a sentence. Raises ValueError where the question leaves no room for any."""
    def ids_of(texts: list[str], said: list[dict]) -> list[int]:
        return render(tok, build_messages(question, texts, cfg.template, said),
                      add_generation_prompt=True)[0]

    history = list(history)
    room = length - cfg.max_tokens
    while history and len(ids_of([], history)) > room // 2:
        del history[:2]
    bare = len(ids_of([], history))
    room = min(room, bare + int(cfg.context_share * length))
    texts: list[str] = []
    for hit in hits:
        body = hit.chunk.text if cfg.template == "short" else f"{location(hit)}\n{hit.chunk.full}"
        body = shown(body)
        head = len(body) - len(shown(hit.chunk.text))
        cuts = [len(body)] + [head + end for _, end in reversed(sentences(body[head:]))]
        fitting = (body[:cut] for cut in cuts if len(ids_of([*texts, body[:cut]], history)) <= room)
        if (most := next(fitting, None)) is None:
            break
        texts.append(most)
        if len(most) < len(body):
            break
    if not texts:
        raise ValueError(f"the question takes {bare} of {length} tokens and --max_tokens="
                         f"{cfg.max_tokens} are for the answer: no source fits beside them")
    return ids_of(texts, history), hits[:len(texts)]


def best_sentences(question: str, hits: list[Hit], index: Index, most: int = 1) -> list[str]:
    """What stands in for a model: of each of the first sources the sentence that holds most of
    the question's idf weight, with its number."""
    weight = index.idf(question)
    found = []
    for number, hit in enumerate(hits[:most], 1):
        text = hit.chunk.text
        spans = sentences(text) or [(0, len(text))]
        spans = [s for s in spans if text[s[0]] != "#" and text[s[1] - 1] not in "?？"] or spans
        best = max(spans, key=lambda s: sum(weight.get(t, 0) for t in set(terms(text[s[0]:s[1]]))))
        found.append(f"{shown(text[best[0]:best[1]]).strip()} [{number}]")
    return found


def write(model: Transformer, tok: Tokenizer, ids: list[int], cfg: Config, n_sources: int,
          on_text: Callable[[str], None]) -> tuple[str, list[int], float]:
    """(text, invalid citations, when the first token came). A citation is held back until it is
    known to name a source."""
    stop = (tok.im_end, tok.endoftext)
    decoder, invalid, text, pending, first = StreamDecoder(tok), [], "", "", 0.0

    def keep(match: re.Match) -> str:
        if 1 <= int(match[1]) <= n_sources:
            return match[0]
        invalid.append(int(match[1]))
        return ""

    def pieces() -> Iterator[str]:
        nonlocal first
        for (token,) in generate(model, [ids], cfg.max_tokens, stop=stop, seed=cfg.seed,
                                 temperature=cfg.temperature):
            first = first or time.perf_counter()
            if token not in stop:
                yield decoder.push(token)
        yield decoder.flush() + "\0"  # nothing more: what is pending is no citation

    for piece in pieces():
        pending += piece
        open_ = re.search(r"\[\d{0,9}$", pending)
        done = pending[:open_.start()] if open_ else pending
        pending = pending[len(done):]
        done = CITATION.sub(keep, done).rstrip("\0")
        text += done
        on_text(done)
    return text, invalid, first


def answer(question: str, cfg: Config = Config(), index: Index | None = None,
           model: tuple[Transformer, Tokenizer] | None = None,
           on_text: Callable[[str], None] = lambda text: None,
           history: list[dict] | None = None) -> Answer:
    """Answer a question from the index and the model of `cfg`, or from those given. `on_text` gets
    the answer as it grows; `history` holds the messages before. Raises ValueError for what a user
    can get wrong."""
    start = time.perf_counter()
    index = index or open_index(cfg)
    hits = index.search(question, cfg.n_sources, cfg.mode, cfg.mmr)
    found = time.perf_counter()
    took = 1000 * (found - start)
    if not index.bears_on(hits, cfg.min_coverage):
        text = REFUSAL[language(question)]
        on_text(text)
        return Answer(text, [], False, [], [], 1.0, 0, took, took)
    if model is None and not cfg.checkpoint:
        hits = [hit for hit in hits if index.bears_on([hit], cfg.min_coverage)]
        text = "\n".join(best_sentences(question, hits, index, cfg.n_sources))
        on_text(text)
        cited = list(range(1, len(hits) + 1))
        return Answer(text, hits, True, cited, [], 1.0, 0, took, took)
    model, tok = model or load_writer(cfg)
    ids, hits = build_prompt(question, hits, tok, model.config.max_seq_len, cfg, history or [])
    text, invalid, first = write(model, tok, ids, cfg, len(hits), on_text)
    cited = sorted({int(n) for n in CITATION.findall(text)})
    return Answer(text, hits, True, cited, invalid, support(text, hits, index), len(ids), took,
                  1000 * (first - start))


def support(text: str, hits: list[Hit], index: Index) -> float:
    """Of the sentences that cite, the share of which at least half of the idf weight is in a source
    they name; 1 if none cites."""
    good = []
    for start, end in sentences(re.sub(r"([.!?。！？])(\s*(?:\[\d+\])+)", r"\2\1", text)):
        sentence = re.sub(r"([.!?。！？])(\s*(?:\[\d+\])+)", r"\2\1", text)[start:end]
        named = [int(n) for n in CITATION.findall(sentence)]
        if named:
            weight = index.idf(CITATION.sub("", sentence))
            inside = {t for n in named for t in terms(hits[n - 1].chunk.full)}
            held = sum(w for t, w in weight.items() if t in inside)
            good.append(held >= 0.5 * sum(weight.values()))
    return sum(good) / len(good) if good else 1.0


# ---------------------------------------------------------------------------- command line

def cutter(cfg: Config, embedder: embed.Embed | None) -> Cut:
    """`split` with the settings of the command line."""
    count, vectors = count_pieces, None
    if cfg.tokenizer:
        tok = load_tokenizer(cfg.tokenizer)
        count = lambda text: len(tok.encode_ordinary(text))
    if cfg.semantic:
        vectors = partial(embedder, kind="passage") if embedder else partial(tfidf, terms=terms)
    return lambda text, name: split(text, name, cfg.chunk_tokens, cfg.overlap, count=count,
                                    vectors=vectors)


def add(paths: list[str], cfg: Config) -> None:
    """Bring the index up to date with files and folders, and say what became of them."""
    if not paths:
        raise ValueError("add what? python rag.py add FOLDER")
    start = time.monotonic()
    embedder = load_embedder(cfg)
    how = json.dumps([cfg.chunk_tokens, cfg.overlap, cfg.semantic, cfg.tokenizer])
    with Index(cfg.index, True, embedder, cfg.embed) as index:
        counts = update(index, paths, cutter(cfg, embedder), how, cfg.max_file_mb)
        replaced, embedded = counts.pop("replaced"), counts.pop("embedded")
        if replaced:
            print(f"{replaced:,} characters that no text should hold are now U+FFFD")
        did = ", ".join(f"{n:,} {what}" for what, n in counts.items() if n) or "nothing to read"
        print(f"{cfg.index}: {did}; {len(index):,} chunks of {len(index.manifest['documents']):,} "
              + "documents" + (f", {embedded:,} embedded" if embedder else "")
              + f", {time.monotonic() - start:.1f} s")
        if cfg.embed.startswith("own:"):
            found = rag_eval.heading_recall(index)
            print(f"EXPERIMENTAL: of the headings {found['dense']:.0%} find their chunk first by "
                  f"these vectors, {found['bm25']:.0%} by BM25")


def load_embedder(cfg: Config) -> embed.Embed | None:
    return embed.load(cfg.embed, cfg.device) if cfg.embed else None


def open_index(cfg: Config) -> Index:
    return Index(cfg.index, False, load_embedder(cfg), cfg.embed)


@lru_cache(1)
def load_writer(cfg: Config) -> tuple[Transformer, Tokenizer]:
    name = cfg.device if cfg.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    return load_model(cfg.checkpoint, torch.device(name),
                      torch.bfloat16 if name == "cuda" else torch.float32)


def print_answer(question: str, cfg: Config, index: Index, history: list[dict]) -> Answer:
    """Ask, and print the answer and its sources."""
    said = answer(question, cfg, index, on_text=lambda text: print(
        INVISIBLE.sub("", text), end="", flush=True) if cfg.stream else None, history=history)
    print("" if cfg.stream else INVISIBLE.sub("", said.text))
    for number, hit in enumerate(said.sources, 1):
        where = shown(f"{location(hit)}  {hit.chunk.crumb}").rstrip()
        print(f"  [{number}]{'*' if number in said.cited else ' '} {where}")
    if said.invalid_citations:
        print(f"  dropped from the answer, naming no source: {said.invalid_citations}")
    return said


def chat(cfg: Config) -> None:
    """Questions from the terminal, one a line, until its end."""
    index, history = open_index(cfg), []
    while True:
        try:
            if question := input("> ").strip():
                said = print_answer(question, cfg, index, history)
                history += [{"role": "user", "content": question},
                            {"role": "assistant", "content": said.text}]
        except (EOFError, KeyboardInterrupt):
            print()
            return
        except ValueError as error:  # one question that is too long does not end it all
            print(error)


def info(cfg: Config) -> None:
    index = Index(cfg.index)
    size = sum(path.stat().st_size for path in index.folder.iterdir() if path.is_file())
    known = index.manifest["embed"]
    print(f"{cfg.index}: {len(index.manifest['documents']):,} documents, {len(index):,} chunks "
          f"({len(index.manifest['dead']):,} dead), {int(index.lengths.sum()):,} terms, "
          f"{size / 1e6:.1f} MB; vectors: {known['name'] if known else 'none'}")
    for name, (_, _, n, _) in sorted(index.manifest["documents"].items()):
        print(f"  {n:6,} chunks  {name}")


def print_segments(paths: list[str], cfg: Config) -> None:
    """One JSON line for each chunk: to look at, or as text to prepare training data from."""
    if not paths:
        raise ValueError("split what? python rag.py split FILES")
    files, skipped = find_documents(paths, cfg.max_file_mb)
    print(as_utf8("".join(f"{line}\n" for line in skipped)), end="", file=sys.stderr)
    cut = cutter(cfg, load_embedder(cfg))
    for path, _ in files:
        try:
            chunks, _ = read_document(path, path.read_bytes(), cut)
        except (OSError, ValueError) as error:
            print(f"skipped {path}: {getattr(error, 'strerror', None) or error}", file=sys.stderr)
            continue
        for chunk in chunks:
            print(json.dumps(asdict(chunk) | {"lang": language(chunk.full)}, ensure_ascii=False))


def check(cfg: Config) -> None:
    """Raises ValueError for a setting out of its range."""
    for name, low, high in (("chunk_tokens", 16, 1 << 20), ("overlap", 0, cfg.chunk_tokens // 2),
                            ("n_sources", 1, 100), ("mmr", 0, 1), ("min_coverage", 0, 1),
                            ("context_share", 0.01, 1), ("max_tokens", 1, 1 << 30),
                            ("temperature", 0, 100), ("max_file_mb", 1, 1 << 20),
                            ("limit", 0, 1 << 30)):
        if not low <= getattr(cfg, name) <= high:
            raise ValueError(f"--{name}={getattr(cfg, name)} must lie between {low} and {high}")
    if cfg.mode not in ("auto", "bm25") and not cfg.embed:
        raise ValueError(f"--mode={cfg.mode} needs vectors: give --embed=…")


def main() -> None:
    job, *rest = sys.argv[1:] or ["--help"]
    if job in ("-h", "--help"):
        job, rest = "info", ["--help"]
    if job not in JOBS:
        fail(f"{job}: not one of {', '.join(JOBS)}; see python rag.py --help")
    operands = [a for a in rest if not a.startswith("--")]
    takes = job in ("add", "ask", "split")
    cfg = configure(Config, [a for a in rest if a.startswith("--") or not takes], show=False)
    try:
        check(cfg)
        if job == "ask":
            if not operands:
                raise ValueError('ask what? python rag.py ask "…"')
            said = print_answer(" ".join(operands), cfg, open_index(cfg), [])
            raise SystemExit(0 if said.grounded else 1)
        if job == "eval":
            embedder = load_embedder(cfg)
            rag_eval.evaluate(cfg, cutter(cfg, embedder), embedder)
        elif takes:
            {"add": add, "split": print_segments}[job](operands, cfg)
        else:
            {"chat": chat, "info": info}[job](cfg)
    except BrokenPipeError:  # whoever read what is printed has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ValueError, OSError, KeyboardInterrupt) as error:
        fail(str(error) or "stopped", 3 if isinstance(error, OSError) else 2 if str(error) else 130)


if __name__ == "__main__":
    main()

"""
Answers from your own documents, with their sources, in English and Chinese.

    python rag.py add notes/ manual.md                     index files and folders
    python rag.py add                                      take up what has changed in them
    python rag.py ask "怎么安装？" --stream                 the best sentences and where they stand
    python rag.py ask "How?" --checkpoint=out/sft          the same, answered by a model
    python rag.py ask "How?" --writer=http://127.0.0.1:11434/v1#qwen3     … by a server of yours
    python rag.py chat --checkpoint=out/sft                a conversation
    python rag.py mcp                                      tools for assistants (the extra `mcp`)
    python rag.py remove notes/old/                        forget files and folders
    python rag.py info                                     what is in the index
    python rag.py split notes/ --semantic                  the chunks as JSON lines
    python rag.py eval --corpus=FILE --queries=FILE        how good it is: see bench/rag.py

Documents are cut into chunks, which are found by their words, and by vectors if you wish. If no
chunk covers enough of the question, the model is not asked: it could only invent. Otherwise the
sources go before the question as plain-text token ids, so no document can start a turn of the chat.
"""
from plumbing.terminal import fail, only_talk, printable, run, show_json, stop_imports
stop_imports(__name__)  # Ctrl-C during the imports below, which take seconds

import importlib
import re
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from typing import Any, Literal

from configurator import Count, FilePath, Positive, Share, configure
from generate import generate
from model import Transformer
from plumbing import loading, terminal
from plumbing.corpus import language
from search import documents, embed, tools
from search.citations import CITATION, best_sentence, checked, location, shown, texts_of
from search.index import Hit, Index
from search.segment import MIN_TOKENS, Budget, split
from search.topics import INVISIBLE, tfidf
from search.writer import written
from tokenizer import Tokenizer, render


@dataclass(frozen=True)
class Config:
    index: FilePath = "out/rag"  # folder of the index
    checkpoint: FilePath = ""  # model that answers; without one the best sentences are shown
    writer: str = ""  # a server that answers instead, http://…/v1#MODEL (OpenAI style)
    chunk_tokens: Budget = 256  # most words, Han characters and signs of a chunk, with its headings
    semantic: bool = False  # end chunks where the topic changes, too
    max_file_mb: Count = 50  # skip files that are larger
    embed: str = ""  # vectors: sentence-transformers:NAME, or http(s)://…#MODEL (OpenAI style)
    n_sources: Count = 3  # most sources for an answer
    min_coverage: Share = 0.3  # refuse if no source holds so much of the question's idf; 0: never
    template: Literal["auto", "cited", "plain", "short"] = "auto"  # see build_messages
    repetition_penalty: Positive = 1.1  # above 1: a small model does not say the same for ever
    max_tokens: Count = 200  # longest answer; never more than a quarter of what the model reads
    stream: bool = False  # print the answer as it is written
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"  # where to compute
    dtype: loading.Precision = "auto"  # of the model's weights, as in generate.py


REFUSAL = {"en": "Not found in the documents.", "zh": "资料中没有找到答案。"}
SYSTEM = {
    "en": "Answer only from the numbered sources below, and put the number of the source after "
          f'each sentence, like [1]. If they do not hold the answer, say "{REFUSAL["en"]}"',
    "zh": "只根据下面编号的资料回答，每句话后面标注来源编号，例如 [1]。"
          f"资料里没有答案时，回答“{REFUSAL['zh']}”"}
# of plain and short: what stands before the sources, the question, and between sources; the task
LABELS = {"en": ("Context: ", "Question: ", " ",
                 "Answer the question in one sentence, only from this text."),
          "zh": ("资料：", "问题：", "", "只根据下面的资料，用一句话回答问题。")}


def build_messages(question: str, sources: list[str], template: str,
                   history: list[dict]) -> list[dict]:
    """The chat that asks a model. `sources` are texts made harmless by `shown`. `cited` numbers
    them and asks for citations, `plain` is for small models, which lose the question over that, and
    `short` for those that read a few hundred tokens."""
    lang = language(question)
    (context, asked, space, task), system = LABELS[lang], []
    if template == "short":
        text = space.join(re.sub(r"\s*\n\s*", space, source.strip()) for source in sources)
        content = f"{context}{text}\n{asked}{question}" if sources else question
    elif template == "plain":
        content = "\n\n".join([task, *sources, asked + question])
    else:
        system = [{"role": "system", "content": SYSTEM[lang]}]
        numbered = [f"[{n}] {text}" for n, text in enumerate(sources, 1)]
        content = "\n\n".join([*numbered, asked + question])
    return [*system, *history, {"role": "user", "content": content}]


def build_prompt(question: str, hits: list[Hit], tok: Tokenizer, window: int, cfg: Config,
                 history: list[dict], small: bool = False) -> tuple[list[int], list[Hit], str]:
    """(token ids, the sources in them, a note of what had to give way). As many of the best sources
    as fit into the model's window, beside the question and an answer of at most a quarter of it;
    the one that does not fit whole is cut to the part that holds most of the question. Raises
    ValueError if none fits."""
    room, history, template = window - min(cfg.max_tokens, window // 4), list(history), cfg.template

    def ids_of(texts: list[str]) -> list[int]:
        return render(tok, build_messages(question, texts, template, history),
                      add_generation_prompt=True)[0]

    if template == "auto":  # the instruction must not take the room of the sources
        template = "plain" if small else "cited"
        template = "short" if len(ids_of([])) > window // 4 else template
    while history and len(ids_of([])) > room // 2:
        del history[:2]  # the oldest question and its answer
    texts: list[str] = []
    for hit in hits:
        head = f"{location(hit)}\n" if template == "cited" else ""
        body = shown(f"{hit.chunk.prefix}\n{hit.chunk.text}".lstrip("\n"))
        if cut := len(ids_of([*texts, head + body])) > room:
            size = max(MIN_TOKENS, room - len(ids_of([*texts, head])) - 4)
            body = hit.best(part.text for part in split(
                body, "", size, count=lambda text: len(tok.encode_ordinary(text))))
        if len(ids_of([*texts, head + body])) <= room:
            texts.append(head + body)
        if cut:
            break
    if not texts:
        raise ValueError(f"no source fits beside the question: it takes {len(ids_of([]))} of the "
                         f"{window} tokens that the model reads")
    note = (f"the model reads {window:,} tokens: {template} prompt, {len(texts)} of {len(hits)} "
            f"sources{', the last one cut' * cut}, answers of at most {window - room} tokens")
    expected = ("cited", "plain", cfg.template)  # short was chosen here, so it is told
    fits = not cut and template in expected and window - room == cfg.max_tokens
    return ids_of(texts), hits[:len(texts)], "" if fits else note


@dataclass(frozen=True)
class Answer:
    text: str
    sources: list[Hit]  # what the model was given, number 1 first
    grounded: bool  # False: nothing in the index bears on the question, no model was asked
    cited: list[int]  # numbers of the sources that the text names
    invalid_citations: list[int]  # numbers that name no source; they are not in the text
    note: str = ""  # what had to give way to the model's window


def answer(question: str, cfg: Config = Config(), index: Index | None = None,
           model: tuple[Transformer, Tokenizer] | None = None,
           on_text: Callable[[str], None] = lambda text: None,
           history: list[dict] | None = None) -> Answer:
    """Answer a question from the index and the model of `cfg`, or from those given. `on_text` gets
    the answer as it grows; `history` holds the messages before. Raises ValueError."""
    index = index or open_index(cfg)
    hits = index.search(question, cfg.n_sources)
    bearing = [hit for hit in hits if hit.coverage >= cfg.min_coverage]
    if not bearing:
        on_text(REFUSAL[language(question)])
        return Answer(REFUSAL[language(question)], [], False, [], [])
    if cfg.writer and model is None:
        texts = [f"{location(hit)}\n{shown(hit.chunk.full)}" for hit in bearing]
        messages = build_messages(question, texts, "cited", history or [])
        pieces, sources, note = written(cfg.writer, messages, cfg.max_tokens), bearing, ""
    elif model is None and not cfg.checkpoint:
        text = "\n".join(f"{best_sentence(hit)} [{n}]" for n, hit in enumerate(bearing, 1))
        on_text(text)
        return Answer(text, bearing, True, [*range(1, len(bearing) + 1)], [])
    else:
        writer, tok = model or load_writer(cfg)
        window = writer.config.max_seq_len
        # one source that bears on the question is enough to ask; the others may help
        prompt, sources, note = build_prompt(question, hits, tok, window, cfg, history or [],
                                             small=writer.config.n_embd <= 1024)
        pieces = texts_of(generate(
            writer, [prompt], min(cfg.max_tokens, window // 4), temperature=0.0,
            repetition_penalty=cfg.repetition_penalty, quoting=True, stop=tok.stop), tok)
    text, invalid = checked(pieces, len(sources), on_text)
    cited = sorted({int(n) for n in CITATION.findall(text)})
    return Answer(text, sources, True, cited, invalid, note)


@lru_cache(1)
def load_writer(cfg: Config) -> tuple[Transformer, Tokenizer]:
    return loading.load_writer(cfg.checkpoint, cfg.device, cfg.dtype)


def open_index(cfg: Config) -> Index:
    """The index, to ask. What is gone is not found any more, and what has changed is said."""
    index = Index(cfg.index, False, embed.load(cfg.embed, cfg.device), cfg.embed)
    gone, changed, new = documents.forget_gone(index, cfg.max_file_mb)
    if gone or changed or new:
        terminal.say(f"documents gone since they were indexed: {gone:,}, changed: {changed:,}; new "
                     f"files in their folders: {new:,}; python rag.py add takes that up")
    return index


def cutter(cfg: Config, embedder: Any) -> documents.Cut:
    """`split` with the settings of the command line."""
    vectors = partial(embedder, kind="passage") if embedder else tfidf
    return partial(split, max_tokens=cfg.chunk_tokens, count=documents.count_pieces,
                   vectors=vectors if cfg.semantic else None)


def change(job: str, paths: list[str], cfg: Config) -> None:
    """Bring the index up to date with files and folders, or forget them, and say what was done."""
    only_talk()
    if job == "remove" or not paths:
        Index(cfg.index).close()  # raises ValueError if there is none
    embedder = None if job == "remove" else embed.load(cfg.embed, cfg.device)
    with Index(cfg.index, True, embedder, cfg.embed, job == "remove") as index:
        n = {"forgotten": documents.remove(index, paths)} if job == "remove" else documents.update(
            index, paths or documents.newcomers(index, cfg.max_file_mb), cutter(cfg, embedder),
            f"{cfg.chunk_tokens} {cfg.semantic}", cfg.max_file_mb)
        did = ", ".join(f"{count:,} {what}" for what, count in n.items() if count)
        print(f"{cfg.index}: {did or 'nothing to read'}; {index.size()}")


def ask(question: str, cfg: Config, index: Index, history: list[dict]) -> Answer:
    """Print the answer to a question, and its sources."""
    said = answer(question, cfg, index, on_text=lambda text: print(
        INVISIBLE.sub("", text), end="", flush=True) if cfg.stream else None, history=history)
    print("" if cfg.stream else INVISIBLE.sub("", said.text))
    for number, hit in enumerate(said.sources, 1):
        print(f"  [{number}]{'*' if number in said.cited else ' '} {location(hit)}")
    if said.invalid_citations:
        print(f"  dropped from the answer, naming no source: {said.invalid_citations}")
    if said.note:
        print(said.note, file=sys.stderr)
    return said


def chat(cfg: Config) -> None:
    """Questions from the terminal, one a line, until its end."""
    index, history = open_index(cfg), []
    while True:
        try:
            if question := terminal.ask().strip():
                said = ask(question, cfg, index, history)
                history += [{"role": "user", "content": question},
                            {"role": "assistant", "content": said.text}]
        except (EOFError, KeyboardInterrupt):
            terminal.say("")
            return
        except ValueError as error:  # one question that is too long does not end it all
            terminal.say(error)


def offers(cfg: Config) -> tuple[Callable, Callable]:
    """What `mcp` offers to assistants: a search and an answer, both as plain data."""
    index = open_index(cfg)

    def found(hits: list[Hit]) -> list[dict]:
        return [{"place": location(hit), "text": shown(hit.chunk.full)} for hit in hits]

    def reply(question: str) -> dict:
        said = answer(question, cfg, index)
        return {"answer": said.text, "found": said.grounded, "sources": found(said.sources)}
    return lambda question, most: found(index.search(question, most)), reply


def main() -> None:
    job, *rest = sys.argv[1:] or ["--help"]
    if job == "eval":  # bench/rag.py imports this file, so this file does not import it
        sys.argv[1:] = rest
        return importlib.import_module("bench.rag").main()
    if job not in ("add", "ask", "chat", "mcp", "remove", "info", "split", "-h", "--help"):
        fail(f"{job}: not one of add, ask, chat, mcp, remove, info, split, eval; see --help")
    words = [word for word in rest if not word.startswith("--")]
    cfg = configure(Config, [job] * (job[0] == "-") + [w for w in rest if w not in words], False)
    if bool(words) == (job in ("chat", "info", "mcp")) and (words or job != "add"):
        fail(f"{job} takes no {words[0]}" if words else f"{job} what? python rag.py {job} …")
    if cfg.writer and cfg.checkpoint:
        fail("--checkpoint and --writer both answer: give one of them")
    if cfg.writer and job in ("ask", "chat", "mcp"):
        terminal.say(f"questions, with the sources found, are sent to {cfg.writer}")
    try:
        if job in ("add", "remove"):
            change(job, words, cfg)
        elif job == "ask":
            raise SystemExit(0 if ask(" ".join(words), cfg, open_index(cfg), []).grounded else 1)
        elif job == "split":
            cut = cutter(cfg, embed.load(cfg.embed, cfg.device))
            for chunk in documents.chunks_of(words, cut, cfg.max_file_mb):
                show_json(asdict(chunk) | {"lang": language(chunk.full)})
        elif job == "chat":
            chat(cfg)
        elif job == "mcp":
            tools.serve(*offers(cfg))
        else:
            index = Index(cfg.index)
            vectors = (index.manifest["embed"] or {"name": "none"})["name"]
            print(f"{cfg.index}: {index.size()}; vectors: {vectors}")
            for name, (_, _, n) in sorted(index.manifest["documents"].items()):
                print(f"  {n:6,} chunks  {printable(name)}")
    except OSError as error:
        if not error.filename:  # nobody reads the output, or it cannot be written: `run` knows
            raise
        fail(f"{error.filename}: {error.strerror}", 3)
    except (ValueError, KeyboardInterrupt) as error:
        fail(str(error) or "stopped", 2 if str(error) else 130)


if __name__ == "__main__":
    run(main)

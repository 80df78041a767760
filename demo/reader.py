"""
A reader of your documents: a model that answers from numbered sources, names the one that it used,
and says so if none holds the answer. It starts from a model that can chat, within an hour.

    python -m demo.reader --init_from=out/smol --corpus=corpus.jsonl --queries=queries.jsonl

The files are those of `python rag.py eval`: documents, and questions with answers that stand in
them. Documents of one title stay together, and three titles of ten are held out: each figure of the
report is of questions about these. Three stages train a small update of the model (LoRA):

    SFT   short answers with the number of their source, "308 [2]", and the refusal of rag.py
    DPO   the right reply against a wrong one that the SFT model gave itself
    RL    (--until=rl) the reward of config/reward_reader.py: F1, a right citation, no invention

A stage is a command of this project, printed first; its settings stand in config/*_reader.py. The
same command again goes on where it was stopped. A prompt shows three sources, chunks as rag.py cuts
them, in random order. In half of the prompts one holds the answer and two are near misses, chunks
that share the most words with the question; in the others all three are. So a model that always
cites [1] is right once in three times.
"""
import os
import re
import tempfile
import time
from collections import defaultdict
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from random import Random
from statistics import fmean as mean
from typing import Annotated, Literal, NamedTuple

import torch

import rag
from bench.rag import read_records
from configurator import Count, FilePath, configure
from demo.__main__ import keep_settings, run, stop
from demo.judge import answers, read_rows, table, write_rows
from plumbing import terminal
from plumbing.answers import score_answer
from plumbing.configfile import run_config
from plumbing.loading import load_model
from plumbing.order import hash64
from search.citations import location, shown, split_answer
from search.documents import Cut
from search.index import Hit, Index
from search.segment import Budget, Chunk

SHORT = 60  # characters of the longest answer that is trained on
SOURCES = 3  # before a question
LEAST = 64  # pairs that DPO needs for a few steps, and for some that are held out
LAST = "queries_heldout"  # the file of `make` that is written last
STAGES, REWARD = ("sft", "dpo", "rl"), "config/reward_reader.py"
FIGURES = ("F1", "EM", "cites right", "refuses, there", "refuses, not there")


@dataclass(frozen=True)
class Config:
    init_from: FilePath = ""  # checkpoint of a model that can chat, as convert.py writes it
    corpus: FilePath = ""  # documents, {"id", "title", "text", "lang", "source"} a line
    queries: FilePath = ""  # questions, {"query", "answers", "doc_id", "lang", "source"} a line
    out_dir: FilePath = "out/reader"  # all that is made goes here
    lang: Literal["en", "zh"] = "en"  # of the documents and questions that are used
    chunk_tokens: Budget = 64  # most words, Han characters and signs of a source
    semantic: bool = False  # end sources where the topic changes, too
    chats: Count = 800  # to learn from in SFT; each asks all the questions of a document
    pairs: Annotated[int, f"at least {LEAST}", lambda n: n >= LEAST] = 160  # to learn from in DPO
    questions: Count = 200  # of each kind that judge a stage
    until: Literal["sft", "dpo", "rl"] = "dpo"  # the last stage; RL refuses more
    seed: int = 0  # of the sources that are shown, their order and the training


class Question(NamedTuple):
    text: str
    answers: list[str]
    doc: str


def read_files(cfg: Config) -> tuple[list[dict], list[dict]]:
    """Documents of the language, and the lines of questions about them whose answer they hold."""
    docs = [row for row in read_records(cfg.corpus, "corpus") if row["lang"] == cfg.lang]
    texts = {row["id"]: row["text"] for row in docs}
    asked = [row for row in read_records(cfg.queries, "queries")
             if any(answer in texts.get(row["doc_id"], "") for answer in row["answers"])]
    if not asked:
        raise ValueError(f"{cfg.queries}: no {cfg.lang} question has its answer in {cfg.corpus}")
    return docs, asked


def is_held_out(row: dict) -> bool:
    return hash64("reader", row["title"] or row["id"]) % 10 < 3


def fill(index: Index, docs: list[dict], cut: Cut) -> None:
    for row in docs:
        index.put(row["id"], "", cut(row["text"], row["title"] or row["id"]))
    index.commit()


def holds(chunk: Chunk, question: Question) -> bool:
    """Whether an answer stands in a chunk, as a word or number of its own: 4 is not in 1947."""
    return any(re.search(rf"(?<![A-Za-z0-9]){re.escape(answer)}(?![A-Za-z0-9])", chunk.text)
               for answer in question.answers if answer)


def prompt(question: str, chunks: list[Chunk]) -> list[dict]:
    """The chat by which rag.py asks with --template=cited."""
    texts = [f"{location(Hit(c, 0.0, {}, 0.0))}\n{shown(c.text)}" for c in chunks]
    return rag.build_messages(question, texts, "cited", [])


def own_chunks(index: Index, question: Question) -> list[Chunk]:
    _, first, n = index.manifest["documents"][question.doc]
    return [index.chunk(i) for i in range(first, first + n)]


def near_misses(index: Index, question: Question) -> list[Chunk]:
    """The chunks that share the most with a question and do not hold its answer."""
    return [h.chunk for h in index.search(question.text, 20) if not holds(h.chunk, question)]


def case(index: Index, question: Question, there: bool, cfg: Config) -> dict | None:
    """A prompt, its answers and the number of its source, or none; None if its answer was cut."""
    r = Random(f"{cfg.seed}/{question.text}/{there}")
    gold = [chunk for chunk in own_chunks(index, question) if holds(chunk, question)]
    if not gold:
        return None
    best = max(gold, key=lambda c: sum(w in c.text for w in question.text.split()))
    chunks = [best] * there + near_misses(index, question)[:SOURCES - there]
    r.shuffle(chunks)
    return {"prompt": prompt(question.text, chunks), "answers": question.answers if there else [],
            "source": chunks.index(best) + 1 if there else 0, "lang": cfg.lang}


def right_reply(row: dict) -> str:
    return f"{row['answers'][0]} [{row['source']}]" if row["answers"] else rag.REFUSAL[row["lang"]]


def conversation(index: Index, asked: list[Question], cfg: Config, r: Random) -> dict:
    """All the questions about a document, one after the other, on some of its chunks and some that
    are like them: whoever must know when to refuse has to read what is there."""
    own = own_chunks(index, asked[0])
    chunks = r.sample(own, min(len(own), r.randint(1, SOURCES)))
    others = [c for c in near_misses(index, r.choice(asked)) if c not in own]
    chunks += others[:SOURCES - len(chunks)]
    r.shuffle(chunks)
    messages: list[dict] = []
    for question in r.sample(asked, len(asked)):
        found = [i for i, chunk in enumerate(chunks) if holds(chunk, question)]
        if len(found) > 1 or any(chunks[i] not in own for i in found):
            continue  # which of the sources is right?
        row = {"answers": question.answers[:1] if found else [], "lang": cfg.lang,
               "source": found[0] + 1 if found else 0}
        sources = [] if messages else chunks  # they stand in the first question
        messages += [*prompt(question.text, sources)[len(messages) > 0:],  # one system message
                     {"role": "assistant", "content": right_reply(row)}]
    return {"messages": messages, "lang": cfg.lang}


def make(cfg: Config, data: Path) -> None:
    """Write the files to train on and to judge by."""
    docs, lines = read_files(cfg)
    asked = [Question(row["query"], row["answers"], row["doc_id"]) for row in lines]
    settings = rag.Config(chunk_tokens=cfg.chunk_tokens, semantic=cfg.semantic)
    cut, away = rag.cutter(settings, None), {row["id"] for row in docs if is_held_out(row)}
    os.makedirs(data, exist_ok=True)
    files: dict[str, list[dict]] = {}
    for held_out in (False, True):  # near misses may be of all documents that are known by then
        with tempfile.TemporaryDirectory() as folder, Index(folder, True) as index:
            fill(index, [row for row in docs if held_out or row["id"] not in away], cut)
            mine = [q for q in asked if (q.doc in away) == held_out
                    and (held_out or len(q.answers[0]) <= SHORT)]
            cases = [row for q in mine for there in (True, False)
                     if (row := case(index, q, there, cfg))]
            Random(cfg.seed).shuffle(cases)
            files["prompts" + "_heldout" * held_out] = cases
            if not held_out:
                groups, r = [[q for q in mine if q.doc == doc] for doc in dict.fromkeys(
                    q.doc for q in mine)], Random(cfg.seed)
                if not groups:
                    raise ValueError(f"{cfg.queries}: no question is left to train on")
                chosen = r.choices(groups, [len(group) for group in groups], k=cfg.chats)
                files["chat"] = [chat for group in chosen
                                 if (chat := conversation(index, group, cfg, r))["messages"]]
    files["chat_heldout"] = [
        {"messages": [*row["prompt"], {"role": "assistant", "content": right_reply(row)}],
         "lang": cfg.lang} for row in files["prompts_heldout"][:100]]
    files[LAST] = [row for row in lines if row["doc_id"] in away]
    for name, rows in files.items():
        write_rows(data / f"{name}.jsonl", rows)


def say(where: str, rows: list[dict], temperature: float, seed: int) -> list[str]:
    """The reply of a checkpoint's model to each prompt."""
    model, tok = load_model(where, torch.device("cpu"), torch.int8)
    return answers(model, tok, [row["prompt"] for row in rows], temperature, seed)


def figures(rows: list[dict], said: list[str]) -> dict[str, float]:
    """Shares in per cent: of questions whose answer is there, and of those where it is not."""
    found: dict[str, list[float]] = defaultdict(list)
    for row, reply in zip(rows, said):
        refuses = reply.strip() == rag.REFUSAL[row["lang"]]
        found["refuses, there" if row["answers"] else "refuses, not there"].append(refuses)
        if row["answers"]:
            text, cited = split_answer("" if refuses else reply)
            em, f1 = score_answer(text, row["answers"], row["lang"])
            found["EM"].append(em)
            found["F1"].append(f1)
            if not refuses:
                found["cites right"].append(cited == [row["source"]])
    return {name: 100 * mean(found.get(name, [0.0])) for name in FIGURES}


def make_pairs(cfg: Config, data: Path, where: str) -> None:
    """Ask the SFT model what it was trained to know, with chance, and pair its mistakes with what
    is right. As often as the refusal is the right reply, it is the wrong one in another pair: else
    the model learns that to refuse is always right."""
    reward = run_config(REWARD)["reward"][0]
    rows = read_rows(data / "prompts.jsonl")[:3 * cfg.pairs]
    wrong: dict[bool, list[tuple[dict, str]]] = {True: [], False: []}  # by whether it is there
    for row, reply in zip(rows, say(where, rows, 1.0, cfg.seed)):
        if reward(row["prompt"], reply, row) < reward(row["prompt"], right_reply(row), row):
            wrong[bool(row["answers"])].append((row, reply))
    invented = wrong[False][:2 * cfg.pairs // 5]
    refused = [(row, rag.REFUSAL[cfg.lang]) for row in rows if row["answers"]][:len(invented)]
    chosen = invented + refused + wrong[True][:cfg.pairs - 2 * len(invented)]
    print(f"of {len(rows):,} replies {len(wrong[False]):,} are invented and {len(wrong[True]):,} "
          f"wrong; {len(chosen):,} pairs")
    if len(chosen) < LEAST:
        terminal.fail(f"DPO needs {LEAST} pairs or more: raise --pairs, or end with --until=sft")
    write_rows(data / f"pairs_{cfg.pairs}.jsonl", [
        {"prompt": row["prompt"], "chosen": right_reply(row), "rejected": reply, "lang": cfg.lang}
        for row, reply in Random(cfg.seed).sample(chosen, len(chosen))])


def main() -> None:
    cfg, start = configure(Config), time.monotonic()
    if not (cfg.init_from and cfg.corpus and cfg.queries):
        terminal.fail("a reader needs --init_from=CHECKPOINT, --corpus=FILE and --queries=FILE")
    cfg = replace(cfg, **{name: os.path.abspath(getattr(cfg, name))
                          for name in ("init_from", "corpus", "queries", "out_dir")})
    os.chdir(Path(__file__).resolve().parent.parent)
    out, data = Path(cfg.out_dir), Path(cfg.out_dir) / "data"
    keep_settings(cfg.out_dir, {name: value for name, value in asdict(cfg).items()
                                if name not in ("out_dir", "questions", "until", "pairs")}
                  | {"bytes": [os.path.getsize(path) for path in (cfg.corpus, cfg.queries)]})
    if not (data / f"{LAST}.jsonl").exists():
        make(cfg, data)
    stages, pairs = {"as it was": cfg.init_from}, f"pairs_{cfg.pairs}"
    for stage in STAGES[:STAGES.index(cfg.until) + 1]:
        before = list(stages.values())[-1]
        if stage == "dpo" and not (data / f"{pairs}.jsonl").exists():
            make_pairs(cfg, data, before)
        train, *judged = {"sft": ("chat", "chat_heldout"), "dpo": (pairs,),
                          "rl": ("prompts", "prompts_heldout")}[stage]
        run(f"train_{stage}.py", f"config/{stage}_reader.py", f"--init_from={before}",
            f"--data={data}/{train}.jsonl", *(f"--val_data={data}/{name}.jsonl" for name in judged),
            f"--out_dir={out}/{stage}", f"--seed={cfg.seed}", "--resume")
        stages[stage.upper()] = f"{out}/{stage}/merged"
        if not os.path.exists(f"{out}/{stage}/merged"):  # a signal ended it: exit code 0
            stop()
    rows = read_rows(data / "prompts_heldout.jsonl")
    rows = [row for there in (True, False) for row in
            [row for row in rows if bool(row["answers"]) == there][:cfg.questions]]
    found = []
    for name, where in stages.items():
        said = say(where, rows, 0.0, cfg.seed)
        write_rows(out / f"replies_{name.lower().replace(' ', '_')}.jsonl",
                   [row | {"reply": reply} for row, reply in zip(rows, said)])
        found.append([name, *(f"{value:.1f}" for value in figures(rows, said).values())])
    print("\n".join(table(f"{len(rows)} questions about documents that were held out", "", [
        "stage", *(f"{name}, %" for name in FIGURES)], found)))
    print(f"{(time.monotonic() - start) / 60:.0f} minutes")


if __name__ == "__main__":
    terminal.run(main)

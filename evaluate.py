"""
What does a model know? Multiple choice, last words, perplexity and short answers, by language.

    python evaluate.py --checkpoint=out/smol --tasks=arc_easy.jsonl,c3.jsonl
    python evaluate.py --checkpoint=out/smol --tasks=benchmarks/ --limit=100

A task is a file of JSON lines, all of one kind:

    {"query": "…", "choices": ["…", "…"], "gold": 0}   which choice is the likeliest to follow?
    {"context": "…", "target": "…"}                    does the greedy text go on so?
    {"text": "…"}                                      how surprising is the text?
    {"prompt": [messages], "answer": "18"}             is this the last number of the reply?
    {"query": "…", "answers": ["…", "…"]}              exact match and F1 of the reply

or what lm-evaluation-harness writes with --log_samples, whose figures these are: `acc` takes the
choice with the highest log P, `acc_norm` divides it by the characters of the choice first. Beside
them stand chance and what "always the longest" gets, and in brackets 95 % intervals (of accuracies
after Wilson, 1927). Each task is a JSON line of --out, too; one that stands there is not run again.
"""
from plumbing.terminal import fail, run, say, stop_imports
stop_imports(__name__)  # Ctrl-C during the imports below, which take seconds

import json
import math
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from configurator import Count, FilePath, Natural, configure
from generate import complete
from model import KVCache, Transformer
from plumbing.answers import last_number, score_answer
from plumbing.benchmarks import interval, read_task, table
from plumbing.corpus import find_files
from plumbing.examples import evenly_spaced, in_batches
from plumbing.jobs import Progress
from plumbing.loading import Precision, load_writer, newest_checkpoint
from tokenizer import Tokenizer, render

Figures = dict[str, Any]
Request = tuple[list[int], list[list[int]]]  # ids of a context, and of what may follow it


@dataclass(frozen=True)
class Config:
    checkpoint: FilePath = ""  # file, or folder: its newest valid one; none: the newest under out/
    tasks: str = ""  # files of JSON lines, or folders, with commas between
    limit: Natural = 0  # this many rows of each task and language, evenly spaced; 0: all
    window: Count = 2048  # most tokens that are read at once; the beginning of more is left out
    at_once: Count = 2048  # tokens in a batch
    max_tokens: Count = 256  # longest answer
    out: FilePath = "out/evaluate.jsonl"  # a JSON line for each task is added here
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"  # where to compute
    dtype: Precision = "float32"  # of the weights; int8 costs a little accuracy


# ---------------------------------------------------------------------------- log P

def batches(requests: list[Request], at_once: int) -> Iterator[list[int]]:
    """Numbers of requests of like length, with at most so many tokens; the longest first, so that
    too little memory shows at once."""
    chosen: list[int] = []
    for i in sorted(range(len(requests)), key=lambda i: -len(requests[i][0])):
        rows = sum(len(requests[j][1]) for j in [*chosen, i])
        width = max(len(requests[j][0]) + max(map(len, requests[j][1])) for j in [*chosen, i])
        if chosen and rows * width > at_once:
            yield chosen
            chosen = []
        chosen.append(i)
    yield chosen


@torch.inference_mode()
def log_probs(model: Transformer, requests: list[Request]) -> list[list[tuple[float, bool]]]:
    """For each continuation of each context, its log P in nats, and whether it is the greedy one.
    Each context is read once for all that may follow it."""
    config, device, dtype = model.config, model.norm.weight.device, model.norm.weight.dtype
    longest = max(len(context) for context, _ in requests) - 1
    pad = [longest - len(context) + 1 for context, _ in requests]
    rows = [(i, [context[-1], *end[:-1]], end) for i, (context, ends) in enumerate(requests)
            for end in ends]  # the last token of the context predicts the first of the end
    owner, width = [i for i, *_ in rows], max(len(read) for _, read, _ in rows)
    cache = KVCache(config, len(rows), longest + width, [pad[i] for i in owner], device, dtype)
    if longest:
        once = KVCache(config, len(requests), longest, pad, device, dtype)
        model(torch.tensor([[0] * n + context[:-1] for n, (context, _) in zip(pad, requests)],
                           device=device), once, hidden=True)
        cache.kv[..., :longest, :] = once.kv[:, :, owner]
        cache.length = longest
    hidden = model(torch.tensor([read + [0] * (width - len(read)) for _, read, _ in rows],
                                device=device), cache, hidden=True)
    states = torch.cat([hidden[i, :len(read)] for i, (_, read, _) in enumerate(rows)])
    targets = torch.tensor([token for *_, end in rows for token in end], device=device)
    logps, greedy = [], []
    for some, wanted in zip(states.split(512), targets.split(512)):
        logits = model.lm_head(some).float()  # (512, V)
        logps.append(logits.log_softmax(-1).gather(1, wanted[:, None])[:, 0])
        greedy.append(logits.argmax(-1) == wanted)
    sizes, found = [len(end) for *_, end in rows], [[] for _ in requests]
    for i, logp, right in zip(owner, torch.cat(logps).split(sizes), torch.cat(greedy).split(sizes)):
        found[i].append((float(logp.double().sum()), bool(right.all())))
    return found


def request(tok: Tokenizer, context: str, ends: list[str], window: int) -> Request:
    """Ids of a context and of what may follow it. Spaces at the end of the context belong to what
    follows. Without a context, what follows the beginning of a text is asked for."""
    kept = context.rstrip(" ")
    start = [*tok.begin, *tok.encode_ordinary(kept)] if kept else tok.begin or [tok.endoftext]
    n = len(start) - len(tok.begin) if kept else 0
    found = [tok.encode_ordinary(context + end)[n:] or tok.encode_ordinary(end) for end in ends]
    return start[-max(1, window + 1 - max(map(len, found))):], found


def windows(tok: Tokenizer, text: str, size: int) -> list[Request]:
    """A text as requests of `size` tokens; the last one reaches back, so that it is as long."""
    ids, before = tok.encode_ordinary(text), tok.begin or [tok.endoftext]
    found = []
    for at in range(0, len(ids), size):
        end = ids[at:at + size]
        context = [*before, *ids[:at]][-(size + 1 - len(end)):]
        found.append((context, [end]))
    return found


# ---------------------------------------------------------------------------- kinds of tasks

class Judge:
    """A model, and the figures of a task of each kind."""

    def __init__(self, cfg: Config):
        self.cfg = cfg
        self.model, self.tok = load_writer(cfg.checkpoint or newest_checkpoint(), cfg.device,
                                           cfg.dtype)
        self.window = min(cfg.window, self.model.config.max_seq_len - 1)
        self.progress, self.name = Progress(sys.stderr), ""

    def scores(self, requests: list[Request]) -> list[list[tuple[float, bool]]]:
        found: list[list[tuple[float, bool]]] = [[] for _ in requests]
        done = 0
        for chosen in batches(requests, self.cfg.at_once):
            for i, scores in zip(chosen, log_probs(self.model, [requests[i] for i in chosen])):
                found[i] = scores
            done += len(chosen)
            self.progress.show(f"{self.name}: {done / len(requests):.0%}")
        return found

    def choice(self, rows: list[dict], joint: str) -> Figures:
        asked = [request(self.tok, row["query"], [(joint if row["query"] else "") + choice
                 for choice in row["choices"]], self.window) for row in rows]
        right: dict[str, list[float]] = {}
        for row, (_, ends), scores in zip(rows, asked, self.scores(asked)):
            choices, logps = row["choices"], [logp for logp, _ in scores]
            for name, sizes in (("acc", [1] * len(logps)), ("acc_norm", [*map(len, choices)]),
                                ("acc_byte", [len(choice.encode()) for choice in choices]),
                                ("acc_token", [*map(len, ends)])):
                values = [logp / max(1, size) for logp, size in zip(logps, sizes)]
                right.setdefault(name, []).append(values.index(max(values)) == row["gold"])
            right.setdefault("longest", []).append(
                choices.index(max(choices, key=len)) == row["gold"])
        chance = sum(1 / len(row["choices"]) for row in rows) / len(rows)
        return {name: interval(values) for name, values in right.items()} | {
            "chance": round(100 * chance, 2)}

    def cloze(self, rows: list[dict], joint: str) -> Figures:
        found = [scores[0] for scores in self.scores([request(
            self.tok, row["context"], [joint + row["target"]], self.window) for row in rows])]
        return {"acc": interval([float(greedy) for _, greedy in found]),
                "perplexity": math.exp(-sum(logp for logp, _ in found) / len(found))}

    def text(self, rows: list[dict], joint: str) -> Figures:
        asked = [windows(self.tok, row["text"], self.window) for row in rows]
        logps = iter(self.scores([one for parts in asked for one in parts]))
        nats = [-sum(next(logps)[0][0] for _ in parts) for parts in asked]
        n_bytes = [len(row["text"].encode()) for row in rows]
        n_tokens = sum(len(end) for parts in asked for _, (end,) in parts)
        per_byte = sum(nats) / sum(n_bytes)
        spread = math.sqrt(sum((x - per_byte * n) ** 2 for x, n in zip(nats, n_bytes)))
        low, high = (per_byte + sign * 1.96 * spread / sum(n_bytes) for sign in (-1, 1))
        return {"bits_per_byte": [round(x / math.log(2), 4) for x in (per_byte, low, high)],
                "perplexity": math.exp(sum(nats) / n_tokens), "tokens": n_tokens}

    def answer(self, rows: list[dict], joint: str) -> Figures:
        prompts = [render(self.tok, row["prompt"], True)[0] if self.model.kind != "pt" else
                   [*self.tok.begin, *self.tok.encode_ordinary(row["prompt"][-1]["content"])]
                   for row in rows]
        room = min(self.cfg.max_tokens, self.model.config.max_seq_len - 1)
        prompts = [ids[room - self.model.config.max_seq_len:] for ids in prompts]
        order, texts = sorted(range(len(rows)), key=lambda i: len(prompts[i])), {}
        for chosen in in_batches(order, 8):
            texts |= zip(chosen, complete(self.model, self.tok, [prompts[i] for i in chosen], room,
                                          stop=self.tok.stop, temperature=0.0))
            self.progress.show(f"{self.name}: {len(texts) / len(rows):.0%}")
        if "answer" in rows[0]:
            return {"acc": interval([last_number(texts[i]) == last_number(row["answer"])
                                     for i, row in enumerate(rows)])}
        em, f1 = zip(*(score_answer(texts[i], row["answers"], row["lang"])
                       for i, row in enumerate(rows)))
        return {"em": interval(list(em)), "f1": round(100 * sum(f1) / len(f1), 2)}


def run_task(judge: Judge, path: str, about: dict, done: list[dict]) -> Iterator[dict]:
    """The figures of a file, one line for each language. Lines that are `done` are taken as they
    are."""
    rows, kind = read_task(path)
    for lang in sorted({row["lang"] for row in rows}):
        own = [row for row in rows if row["lang"] == lang]
        chosen = [own[i] for i in evenly_spaced(range(len(own)), judge.cfg.limit or None)]
        head = {"task": Path(path).name.partition(".")[0], "lang": lang, "kind": kind,
                "n": len(chosen), **about}
        old = [line for line in done if head.items() <= line.items()]
        if old:
            yield old[-1]
            continue
        judge.name, start = f"{head['task']} ({lang})", time.monotonic()
        figures = getattr(judge, kind)(chosen, chosen[0].get("joint", " " * (lang == "en")))
        judge.progress.end()
        line = head | figures | {"seconds": round(time.monotonic() - start, 1)}
        with open(judge.cfg.out, "a", encoding="utf-8") as f:
            f.write(json.dumps(line, ensure_ascii=False) + "\n")
        yield line


def main() -> None:
    cfg = configure(Config, show=False)
    try:
        if not cfg.tasks:
            raise ValueError("--tasks=FILES: which? see --help")
        files = find_files(cfg.tasks)
        out = Path(cfg.out)
        out.parent.mkdir(parents=True, exist_ok=True)
        judge = Judge(cfg)
        about = {"checkpoint": Path(judge.model.path).name, "dtype": cfg.dtype, "limit": cfg.limit,
                 "window": judge.window, "max_tokens": cfg.max_tokens}
        done = [json.loads(line) for line in out.read_text("utf-8").splitlines()
                if line.endswith("}")] if out.exists() else []
        say(f"{judge.model.path}: {len(files)} tasks; figures go to {out}")
        lines = [line for path in files for line in run_task(judge, path, about, done)]
    except (ValueError, OSError) as error:
        fail(str(error))
    print("\n".join(table(lines)))


if __name__ == "__main__":
    run(main)

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

or what lm-evaluation-harness logs with --log_samples. Scores are the harness's: `acc` takes the
choice of the highest log P, `acc_norm` first divides log P by the number of characters. Beside them
stand 95 % intervals (Wilson, 1927), chance and "always the longest". A task in --out is not rerun.
"""
from plumbing.terminal import run, say, stop_imports
stop_imports(__name__)  # Ctrl-C during the imports below, which take seconds

import hashlib
import json
import math
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate, chain
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from configurator import Count, FilePath, Natural, configure
from generate import complete
from model import KVCache, Transformer
from plumbing.answers import last_number, score_answer
from plumbing.benchmarks import (Request, interval, names_of, read_task, request, stem, table,
                                 windows)
from plumbing.corpus import find_files
from plumbing.examples import evenly_spaced, in_batches
from plumbing.jobs import Progress
from plumbing.loading import Precision, load_writer, newest_checkpoint
from plumbing.log import whole_records
from tokenizer import render

Figures = dict[str, Any]


@dataclass(frozen=True)
class Config:
    checkpoint: FilePath = ""  # file, or folder: its newest valid one; none: the newest under out/
    tasks: str = ""  # files of JSON lines, or folders, with commas between
    limit: Natural = 0  # this many rows of each task and language, evenly spaced; 0: all
    window: Count = 2048  # most tokens that are read at once; the beginning of more is left out
    at_once: Count = 2048  # tokens in the caches of a batch; more on a GPU
    max_tokens: Count = 256  # longest answer
    out: FilePath = "out/evaluate.jsonl"  # a JSON line for each task is added here
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"  # where to compute
    dtype: Precision = "float32"  # of the weights; int8 costs a little accuracy


# ---------------------------------------------------------------------------- log P

def batches(sizes: list[int], at_once: int) -> Iterator[list[int]]:
    """Numbers of rows of like size, at most so many tokens when padded; the longest come first, so
    that too little memory shows at once. [1, 5, 0, 5], 10 -> [1, 3], [0]"""
    chosen: list[int] = []
    for i in sorted((i for i, size in enumerate(sizes) if size), key=lambda i: -sizes[i]):
        if chosen and (len(chosen) + 1) * sizes[chosen[0]] > at_once:
            yield chosen
            chosen = []
        chosen.append(i)
    if chosen:
        yield chosen


def read(model: Transformer, rows: list[tuple[Tensor, list[int]]], at_once: int
         ) -> list[tuple[Tensor, Tensor]]:
    """Read each row's tokens after what is in its cache, (layers, 2, H, T, D). Returns the states
    of the t new tokens, (t, C), and the cache with them."""
    weight = model.norm.weight
    found = [(weight.new_empty(0, len(weight)), past) for past, _ in rows]
    # so few at once that their caches fit, and that hardly any padding is read
    sizes = [len(ids) and max(past.size(-2) + len(ids), 16 * len(ids)) for past, ids in rows]
    for chosen in batches(sizes, at_once):
        pasts, texts = zip(*(rows[i] for i in chosen))
        before, width = max(past.size(-2) for past in pasts), max(map(len, texts))
        pad = [before - past.size(-2) for past in pasts]
        cache = KVCache(model.config, len(chosen), before + width, pad, weight.device, weight.dtype)
        for k, past in enumerate(pasts):
            cache.kv[:, :, k, :, pad[k]:before] = past
        cache.length = before
        hidden = model(torch.tensor([[*ids, *[0] * (width - len(ids))] for ids in texts],
                                    device=weight.device), cache, hidden=True)
        for k, (i, ids) in enumerate(zip(chosen, texts)):
            found[i] = hidden[k, :len(ids)], cache.kv[:, :, k, :, pad[k]:before + len(ids)]
    return found


@torch.inference_mode()
def log_probs(model: Transformer, requests: list[Request],
              at_once: int = 2048) -> list[list[tuple[float, bool]]]:
    """For each end of each context, its log P in nats, and whether it is the greedy one. What the
    ends of a context share, its stem, is read once: of the context a b with the ends c d e and c f
    the stem is a b c and the rests are d and nothing; the states of b, c and d predict c d e."""
    config, device = model.config, model.norm.weight.device
    nothing = KVCache(config, 1, 1, None, device, model.norm.weight.dtype).kv[:, :, 0, :, :0]
    stems = read(model, [(nothing, stem(one)) for one in requests], at_once)
    rests = [(i, end[len(stem(requests[i])) - len(context):-1])
             for i, (context, ends) in enumerate(requests) for end in ends]
    states = [state[len(context) - 1:] for (state, _), (context, _) in zip(stems, requests)] + [
        state for state, _ in read(model, [(stems[i][1], rest) for i, rest in rests], at_once)]
    begin = [0, *accumulate(map(len, states))]
    places = [[*range(begin[i], begin[i + 1]), *range(begin[k], begin[k + 1])]
              for k, (i, _) in enumerate(rests, len(stems))]  # of the states that predict an end
    at = torch.tensor([*chain(*places)], device=device)
    wanted = torch.tensor([token for _, ends in requests for token in chain(*ends)], device=device)
    logps, greedy = torch.zeros(len(at), device=device), torch.zeros_like(at, dtype=torch.bool)
    for n, some in enumerate(torch.cat(states).split(512)):
        here = at // 512 == n
        own, token, logits = at[here] % 512, wanted[here], model.lm_head(some).float()  # (512, V)
        logps[here] = logits[own, token] - logits.logsumexp(-1)[own]
        greedy[here] = logits.argmax(-1)[own] == token
    sizes = [*map(len, places)]
    scores = iter([(math.fsum(logp.tolist()), bool(right.all()))
                   for logp, right in zip(logps.split(sizes), greedy.split(sizes))])
    return [[next(scores) for _ in ends] for _, ends in requests]


# ---------------------------------------------------------------------------- kinds of tasks

class Judge:
    """A model, and the figures of each kind of task: its methods have the names of the kinds.
    `joint` is what stands between a query and a choice: a space, or in Chinese nothing."""

    def __init__(self, cfg: Config):
        self.cfg = cfg
        self.model, self.tok = load_writer(cfg.checkpoint or newest_checkpoint(), cfg.device,
                                           cfg.dtype)
        self.window = min(cfg.window, self.model.config.max_seq_len - 1)
        self.progress, self.name = Progress(sys.stderr), ""

    def scores(self, requests: list[Request]) -> list[list[tuple[float, bool]]]:
        found: dict[int, list[tuple[float, bool]]] = {}
        for chosen in batches([len(stem(one)) for one in requests], self.cfg.at_once):
            found |= zip(chosen, log_probs(self.model, [requests[i] for i in chosen],
                                           self.cfg.at_once))
            self.progress.show(f"{self.name}: {len(found) / len(requests):.0%}")
        return [found[i] for i in range(len(requests))]

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
        # standard error of a ratio of two sums
        spread = math.sqrt(sum((x - per_byte * n) ** 2 for x, n in zip(nats, n_bytes)))
        low, high = (per_byte + sign * 1.96 * spread / sum(n_bytes) for sign in (-1, 1))
        return {"bits_per_byte": [round(x / math.log(2), 4) for x in (per_byte, low, high)],
                "perplexity": math.exp(sum(nats) / n_tokens), "tokens": n_tokens}

    def answer(self, rows: list[dict], joint: str) -> Figures:
        prompts = [render(self.tok, row["prompt"], True)[0] if self.model.kind != "pt" else
                   [*self.tok.begin, *self.tok.encode_ordinary(row["prompt"][-1]["content"])]
                   for row in rows]
        longest, limit = max(map(len, prompts)), self.model.config.max_seq_len
        room = min(self.cfg.max_tokens, max(limit - longest, limit // 2))
        if cut := sum(len(ids) > limit - room for ids in prompts):
            say(f"{self.name}: the beginning of {cut:,} prompts does not fit into {limit:,} tokens")
        prompts = [ids[-(limit - room):] for ids in prompts]
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


def run_task(judge: Judge, name: str, path: str, about: dict, done: list[dict]) -> Iterator[dict]:
    """The figures of a file, one line for each language. One of `done` that is of the same rows and
    settings is given again."""
    rows, kind = read_task(path)
    for lang in sorted({row["lang"] for row in rows}):
        own = [row for row in rows if row["lang"] == lang]
        chosen = [own[i] for i in evenly_spaced(range(len(own)), judge.cfg.limit or None)]
        head = {"task": name, "lang": lang, "kind": kind, "n": len(chosen),
                "rows": hashlib.sha256(repr(chosen).encode()).hexdigest()[:12], **about}
        if old := [line for line in done if head.items() <= line.items()]:
            yield old[-1]
            continue
        judge.name, start = f"{name} ({lang})", time.monotonic()
        figures = getattr(judge, kind)(chosen, chosen[0].get("joint", " " * (lang == "en")))
        judge.progress.end()
        line = head | figures | {"seconds": round(time.monotonic() - start, 1)}
        with open(judge.cfg.out, "a", encoding="utf-8") as f:
            f.write(json.dumps(line, ensure_ascii=False) + "\n")
        yield line


def main() -> None:
    cfg = configure(Config, show=False)
    if not cfg.tasks:
        raise ValueError("--tasks=FILES: which? see --help")
    files, out = find_files(cfg.tasks), Path(cfg.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    judge = Judge(cfg)
    about = {"checkpoint": Path(judge.model.path).name, "dtype": cfg.dtype, "limit": cfg.limit,
             "window": judge.window, "max_tokens": cfg.max_tokens}
    done = whole_records(out)
    say(f"{judge.model.path}: {len(files)} tasks; figures go to {out}")
    lines = [line for name, path in zip(names_of(files), files)
             for line in run_task(judge, name, path, about, done)]
    print("\n".join(table(lines)))


if __name__ == "__main__":
    run(main)

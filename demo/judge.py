"""
What each stage of the demo has learnt, asked about names that are in no training file (world.py) by
a program that knows the answers. Functions return lines of the report, as Markdown, and gates:
figures with bounds set before the first run (how far DPO's wins and J can go, the run measures).
"""
import json
import math
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path
from random import Random
from statistics import fmean as mean
from typing import NamedTuple

import torch
import torch.nn.functional as F

import rag
from demo.world import (ANSWERS, LANGS, SHY, SPACE, STYLES, UNKNOWN, VALUES, WRONG, Fact, answer,
                        asked, fact_text, facts, restated_values, score, wrong)
from generate import replies
from model import Transformer
from plumbing.benchmarks import interval
from plumbing.evaluation import scores_of
from plumbing.files import write_text
from plumbing.loading import load_reward_model
from plumbing.runtime import setup
from search.documents import update
from search.index import Index
from search.segment import Chunk, split
from tokenizer import Tokenizer, render

Models = dict[str, tuple[Transformer, Tokenizer]]  # by stage
Judged = tuple[list[str], list["Gate"]]
CHUNK_TOKENS = 64  # of the notes: a paragraph of three facts, seldom two
UNREADABLE = -6.0  # score of a reply in none of the styles
MIN_COVERAGE = 0.5  # of a question's idf in its note, below which nothing is answered


class Gate(NamedTuple):
    stage: str
    what: str
    value: float
    low: float
    high: float
    note: str  # control, baseline or ceiling


def table(title: str, note: str, head: list[str], rows: list[list[str]]) -> list[str]:
    """A section of the report."""
    return [f"## {title}", *["", note][:2 * bool(note)], "", f"| {' | '.join(head)} |",
            "|---" * len(head) + "|", *(f"| {' | '.join(row)} |" for row in rows), ""]


@torch.inference_mode()
def judge(model: Transformer, tok: Tokenizer, documents: list[dict],
          first_half: bool = True) -> dict[str, float]:
    """Bits per byte of the documents, and the share of restated values whose tokens are all the
    most likely ones. Without `first_half`, the control, the model can only guess them."""
    bits, n_bytes, right = 0.0, 0, []
    for at in range(0, len(documents), 64):
        texts = [d["text"] for d in documents[at:at + 64]]
        cuts = [0 if first_half else text.index("\n") + 1 for text in texts]
        rows = [tok.encode_ordinary(text[cut:]) for text, cut in zip(texts, cuts)]
        x = torch.nn.utils.rnn.pad_sequence([torch.tensor([tok.endoftext, *row]) for row in rows],
                                            batch_first=True, padding_value=tok.pad)
        logits = model(x)[:, :-1]  # (B, T) -> (B, T - 1, V): row i predicts token i of the text
        nats = F.cross_entropy(logits.transpose(1, 2), x[:, 1:], reduction="none")
        hit = logits.argmax(-1) == x[:, 1:]
        for i, (text, cut, row) in enumerate(zip(texts, cuts, rows)):
            bits += float(nats[i, :len(row)].sum()) / math.log(2)
            n_bytes += len(text[cut:].encode())
            token = torch.repeat_interleave(torch.tensor(  # that holds a byte
                [len(tok.decode_single_token_bytes(t)) for t in row]))
            for begin, end in restated_values(text):
                b, e = len(text[cut:begin].encode()), len(text[cut:end].encode())
                right.append(bool(hit[i, token[b:e]].all()))
    return {"bits_per_byte": bits / n_bytes, "values": mean(right), "n": len(right)}


def read_rows(path: Path) -> list[dict]:
    with open(path, encoding="utf-8") as f:
        return [json.loads(line) for line in f]


def write_rows(path: Path, rows: list[dict]) -> None:
    write_text(path, "".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows))


def answers(model: Transformer, tok: Tokenizer, prompts: list[list[dict]],
            temperature: float = 0.0, seed: int = 0) -> list[str]:
    """The reply to each prompt; one that does not end within 48 tokens gets a … at its end."""
    found = []
    for at in range(0, len(prompts), 64):
        ids = [render(tok, p, add_generation_prompt=True)[0] for p in prompts[at:at + 64]]
        found += [tok.decode(r[:-1]) if r[-1] == tok.im_end else tok.decode(r) + "…"
                  for r in replies(model, ids, 48, stop=(tok.im_end,), temperature=temperature,
                                   seed=seed + at)]
    return found


def read_fact(row: dict) -> Fact:
    """The Fact of a row of `rl_prompt`."""
    name, attribute, value = row["fact"]
    key = next(a for a in VALUES if a[0] == attribute)
    return Fact(name, key, next(v for v in (*VALUES[key], UNKNOWN) if v[0] == value))


def grade(reply: str, fact: Fact, lang: str) -> tuple[float, str | None]:
    """(score, style) of a reply to a question about a fact; style None if it is in none."""
    for style in STYLES:
        for said in (fact, fact._replace(value=UNKNOWN)):
            if reply == answer(said, lang, style):
                return score(said, fact, style), style
    for style in reversed(STYLES):  # direct last: its form fits a hedged reply in Chinese, too
        form = re.sub(r"\\{[nav]\\}", r"\\w+", re.escape(ANSWERS[lang][style]))
        if re.fullmatch(form, reply):
            return WRONG, style
    return UNREADABLE, None


def between(values: list) -> str:
    """The share of what is true (or half true), with its 95 % interval."""
    share, low, high = interval(values)
    return f"{share:.1f}% ({low:.1f} … {high:.1f})"


def judge_pt(world: Path, model: Transformer, tok: Tokenizer, seed: int) -> Judged:
    """(lines, gates) of pre-training."""
    floor = read_rows(world / "floor.json")[0]["pt_heldout_all_names"]
    documents = read_rows(world / "pt_heldout.jsonl")
    torch.manual_seed(seed)
    untrained = Transformer(model.config).eval()
    rows, gates = [], []
    for lang in (*LANGS, "all"):
        docs = [d for d in documents if lang in (d["lang"], "all")]
        before, after = judge(untrained, tok, docs[:200]), judge(model, tok, docs)
        control = judge(model, tok, docs, first_half=False)
        ratio, right = after["bits_per_byte"] / floor[lang], after["values"]
        rows.append([lang, f"{before['bits_per_byte']:.2f}", f"{after['bits_per_byte']:.3f}",
                     f"{floor[lang]:.3f}", f"{ratio:.2f}", f"{before['values']:.1%}",
                     between([right] * after["n"]), f"{control['values']:.1%}"])
        if lang == "all":
            gates.append(Gate("PT", "bits/byte over the floor", ratio, 1.0, 1.45,
                              "below 1 would be a leak"))
        else:
            gates.append(Gate("PT", f"values restated right, {lang}", right, 0.9, 1.0,
                              f"control {control['values']:.1%}"))
    return table(
        "Pre-training: values restated in a document's second half",
        "In the control the model does not see the first half and can only guess. The floor is the "
        "entropy of the documents to a reader who knows how they are made but not which names are "
        "held out.", ["language", "bits/byte before", "after", "floor", "after / floor",
                      "values before", "after", "control"], rows), gates


def judge_chats(world: Path, models: Models, n: int) -> list[str]:
    """Lines: the tasks of the chats, answered greedily by each stage."""
    chats = [r for r in read_rows(world / "chat_heldout.jsonl") if r["task"] != "qa"][:n]
    tasks, rows = sorted({chat["task"] for chat in chats}), []
    for stage, (model, tok) in models.items():
        said = answers(model, tok, [chat["messages"][:-1] for chat in chats])
        for lang in LANGS:
            right = [[a == chat["messages"][-1]["content"] for a, chat in zip(said, chats)
                      if (chat["lang"], chat["task"]) == (lang, task)] for task in tasks]
            rows.append([stage, lang, *(between(r) if r else "–" for r in right)])
    return table("Other tasks, word for word right", "", ["stage", "language", *tasks], rows)


def judge_answers(world: Path, models: Models, n: int, seed: int) -> Judged:
    """(lines, gates) of n questions about held-out names, answered greedily, for the values, and
    sampled, for the styles; and of up to n more that the context does not answer."""
    rows = read_rows(world / "prompts_heldout.jsonl")
    rows, more = rows[:n], [row for row in rows[n:] if row["fact"][2] == UNKNOWN[0]][:n]
    figures: dict[str, dict] = {}
    for stage, (model, tok) in models.items():
        def graded(some: list[dict], temperature: float) -> list[tuple[float, str | None]]:
            said = answers(model, tok, [row["prompt"] for row in some], temperature, seed)
            return [grade(a, read_fact(row), row["lang"]) for a, row in zip(said, some)]
        greedy, sampled = graded(rows, 0.0), graded(rows, 1.0)
        both = [*zip(rows, greedy), *zip(more, graded(more, 0.0))]
        figures[stage] = {"gold": [g for g, _ in sampled], "styles": [s for _, s in sampled],
                          "right": [g >= 0 for g, _ in greedy],
                          "right sampled": [g >= 0 for g, _ in sampled]}
        for lang in LANGS:
            known, absent = ([g for row, (g, _) in both if row["lang"] == lang
                              and (row["fact"][2] == UNKNOWN[0]) == unknown]
                             for unknown in (False, True))
            figures[stage] |= {f"right {lang}": [g >= 0 for g in known],
                               f"unknown, rightly {lang}": [g >= 0 for g in absent],
                               f"unknown, wrongly {lang}": [g == SHY for g in known]}
    sft, dpo, rl = (figures[stage] for stage in ("sft", "dpo", "rl"))
    for f in figures.values():
        f["win"] = [0.5 + 0.5 * ((a > b) - (a < b)) for a, b in zip(f["gold"], sft["gold"])]
    columns = [f"{what} {lang}" for what in ("right", "unknown, rightly", "unknown, wrongly")
               for lang in LANGS]
    lines = table(
        "Questions about facts in the context",
        "Right: the value that the context gives, in any of the four styles, ended. Unknown: the "
        "reply says so, in any style, where the context does not give the value (rightly) and "
        "where it does (wrongly). Styles and score are those of sampled replies; the score is the "
        "program's, which was not asked in training: 3 direct, 1.5 terse or padded, 0 hedged, -2 "
        "unknown wrongly, -4 a wrong value, -6 neither. A win is a higher score than the SFT "
        "model's reply to the same question, a tie half of one.",
        ["stage", *columns, "right sampled", *STYLES, "score", "wins"],
        [[stage, *(between(f[key]) for key in (*columns, "right sampled")),
          *(f"{mean([s == style for s in f['styles']]):.0%}" for style in STYLES),
          f"{mean(f['gold']):.2f}", between(f["win"])] for stage, f in figures.items()])
    ceiling = mean([0.5 * (g == 3.0) + (g < 3.0) for g in sft["gold"]])
    gates = [Gate("SFT", f"answers right, {lang}", mean(sft[f"right {lang}"]), 0.9, 1.0,
                  f"before: {mean(figures['pt'][f'right {lang}']):.1%}") for lang in LANGS]
    gates += [gate for stage, f in (("SFT", sft), ("DPO", dpo), ("RL", rl)) for gate in (
        Gate(stage, "unknown, rightly", min(mean(f[f"unknown, rightly {lang}"]) for lang in LANGS),
             0.95, 1.0, "the language that does worse"),
        Gate(stage, "unknown, wrongly", max(mean(f[f"unknown, wrongly {lang}"]) for lang in LANGS),
             0.0, 0.02, "the same"))]
    gates += [Gate("DPO", "wins against SFT", mean(dpo["win"]), 0.78, ceiling + 0.03,
                   f"50 % before, {ceiling:.1%} if always direct and right")]
    gates += [Gate(stage, "right answers lost", mean(sft["right"]) - mean(f["right"]), -1.0, 0.02,
                   "greedy") for stage, f in (("DPO", dpo), ("RL", rl))]
    return lines, [*gates, Gate("RL", "score by the program", mean(rl["gold"]), 2.6, 3.0,
                                f"before: {mean(sft['gold']):.2f}")]


def judge_rm(out: Path, world: Path) -> Judged:
    """The reward model against the known scores: (lines, gates)."""
    rows = read_rows(world / "pairs_heldout.jsonl")
    bayes = read_rows(world / "floor.json")[0]["pairs_heldout_bayes"]
    dist = setup("cpu", "float32")
    model, tok = load_reward_model(f"{out}/rm", dist)
    scores = [scores_of(row, model, tok, dist) for row in rows]
    log = [r for r in read_rows(out / "rm" / "log.jsonl") if "val" in r][-1]["val"]["all"]
    strict: dict[str, list[float]] = {}
    gaps: dict[float, list[float]] = {}
    for row, scored in zip(rows, scores):
        d, gap = row["gold"][0] - row["gold"][1], scored["chosen"] - scored["rejected"]
        gap *= -1 if d < 0 else 1
        for key in ("all", row["kind"], row["lang"]) if d else ():
            strict.setdefault(key, []).append(0.5 + 0.5 * ((gap > 0) - (gap < 0)))
        if row["kind"] != "value":
            gaps.setdefault(abs(d), []).append(gap)
    control = {"all": f"longer is better: {log['longer_is_better']:.1%}"}
    lines = table(
        "Reward model on held-out pairs",
        "Labels were drawn with probability sigmoid(difference of scores), so the best possible "
        "log-loss and the true gaps are known.", ["", "measured", "known or control"],
        [[f"ordered as the known scores, {key}", between(credits), control.get(key, "")]
         for key, credits in strict.items()]
        + [[f"gap of scores where it should be {d}", f"{mean(values):.2f}", f"{d}"]
           for d, values in sorted(gaps.items())]
        + [["log-loss", f"{log['log_loss']:.3f}", f"{bayes['loss']:.3f}"],
           ["calibration error (ECE)", f"{log['ece']:.3f}", "0"],
           ["corr(score, length)", f"{log['length_correlation']:+.2f}", ""]])
    return lines, [Gate("RM", "pairs in the right order", mean(strict["all"]), 0.95, 1.0,
                        "50 % by chance")]


def judge_rl(out: Path, beta: float) -> Judged:
    """What reinforcement learning's own log says at the start and at the end. No policy has a J
    above J* (`best_possible` in train_rl.py), which the run itself estimates, at its start."""
    val = [r["val"] for r in read_rows(out / "rl" / "log.jsonl") if "val" in r]
    a, b = val[0], val[-1]
    lines = table(
        "Reinforcement learning", "", ["", "reward (sd)", "KL (nats/reply)", "J", "tokens", "end"],
        [[name, f"{v['reward']:+.2f}", f"{v['kl']:.2f}",
          f"{v['reward'] - beta * v['kl']:+.2f}", f"{v['length']:.1f}",
          f"{v['ended']:.1%}"] for name, v in (("before", a), ("after", b))])
    gates: list[Gate] = []
    if "best" in b:
        error = math.hypot(b["best_error"], b["J_error"])
        lines += [f"J = reward - {beta:g} KL is at most J* = {b['best']:+.2f} "
                  f"(standard error {b['best_error']:.2f}): beta log of the mean of exp(r / beta) "
                  "over the SFT model's own replies to these questions. J after: "
                  f"{b['J']:+.2f} ({b['J_error']:.2f}).", ""]
        gates = [Gate("RL", "J, no policy can exceed J*", b["J"], -math.inf, b["best"] + 3 * error,
                      f"J* = {b['best']:.3f} ± {b['best_error']:.3f}; gate: J* + 3 s.e. of both")]
    return lines, [*gates,
        Gate("RL", "reward, in sd", b["reward"], 0.9, 5.0, f"before: {a['reward']:+.2f}"),
        Gate("RL", "KL in nats per reply", b["kl"], -3 * b["kl_error"], 1.59,
             "log 4 + 0.2: all mass on one of four styles"),
        Gate("RL", "replies that end", b["ended"], 0.99, 1.0, "")]


def write_notes(folder: Path, lang: str, known: list[Fact]) -> None:
    """Notes about facts: three to a paragraph, five paragraphs to a file."""
    r = Random(lang)
    texts = [fact_text(fact, lang, r.choice((0, 1))) for fact in known]
    lines = [SPACE[lang].join(texts[at:at + 3]) for at in range(0, len(texts), 3)]
    os.makedirs(folder, exist_ok=True)
    for at in range(0, len(lines), 5):
        write_text(str(folder / f"{lang}{at:03}.md"), "\n\n".join(lines[at:at + 5]) + "\n")


def judge_rag(out: Path, n: int, model: tuple[Transformer, Tokenizer], seed: int) -> Judged:
    """Questions about the facts of n held-out names in notes, and about n names that are in no
    note, all through rag.answer: (lines, gates)."""
    cfg = rag.Config(template="short", n_sources=1, max_tokens=48, min_coverage=MIN_COVERAGE,
                     repetition_penalty=1.0)
    shares: dict[str, list[list[bool]]] = {}

    def cut(text: str, name: str) -> list[Chunk]:
        return split(text, name, CHUNK_TOKENS, count=lambda t: len(model[1].encode_ordinary(t)))

    for lang in LANGS:
        r = Random(f"{seed}/rag/{lang}")
        drawn = facts(r, "test", 2 * n)
        known, absent, changed = drawn[:n], drawn[n:], [wrong(r, fact) for fact in drawn[:n]]
        asking = [asked(r, lang, fact) for fact in known]
        strange = [asked(r, lang, fact) for fact in absent]
        for folder in ("notes", "index"):
            shutil.rmtree(out / folder, ignore_errors=True)

        def read(contexts: list[list[str]]) -> list[str]:
            return answers(*model, [rag.build_messages(q, c, "short", [])
                                    for q, c in zip(asking, contexts)])

        def right(said: list[str], about: list[Fact]) -> list[bool]:
            return [grade(text, fact, lang)[0] >= 0 for text, fact in zip(said, about)]

        def abstain(said: list[str], about: list[Fact]) -> list[bool]:
            return right(said, [fact._replace(value=UNKNOWN) for fact in about])

        closed = read([[]] * n)
        with Index(str(out / "index"), writable=True) as index:
            def ask(texts: list[str], **settings) -> list[rag.Answer]:
                return [rag.answer(q, replace(cfg, **settings), index, model) for q in texts]

            write_notes(out / "notes", lang, known)
            update(index, [str(out / "notes")], cut)
            found = [index.search(q, 5) for q in asking]
            holds = [[any(fact_text(fact, lang, form) in hit.chunk.text for form in (0, 1))
                      for hit in hits] for hits, fact in zip(found, known)]
            gold = [[SPACE[lang].join(fact_text(f, lang, 0) for f in known[i - i % 3:][:3])]
                    for i in range(n)]
            opened, refused, loose = ask(asking), ask(strange), ask(strange, min_coverage=0.0)
            write_notes(out / "notes", lang, changed)
            update(index, [str(out / "notes")], cut)
            followed = ask(asking)
        for what, hits in {
                "closed book: right": right(closed, known),
                "closed book: says unknown": abstain(closed, known),
                "open book: right": right([a.text for a in opened], known),
                "its note found first": [hit[:1] == [True] for hit in holds],
                "its note among the first five": [any(hit) for hit in holds],
                "the note given, not searched: right": right(read(gold), known),
                "in no note: refused": [not a.grounded for a in refused],
                "in no note, never refusing: the model says unknown": abstain(
                    [a.text for a in loose], absent),
                "control, in a note: the model says unknown": abstain(
                    [a.text for a in opened], known),
                "value changed in the note: followed": right([a.text for a in followed], changed),
                }.items():
            shares.setdefault(what, []).append(hits)
    lines = table(
        "Answers from notes",
        f"{n} names in each language that no training file holds, each with one fact in the notes, "
        "and as many that are in no note.", ["", *LANGS],
        [[what, *map(between, both)] for what, both in shares.items()])

    def least(what: str, note: str) -> Gate:
        return Gate("RAG", what, min(map(mean, shares[what])), 0.8, 1.0, note)
    guessed = max(map(mean, shares["closed book: right"]))
    return lines, [least("open book: right", f"closed book {guessed:.1%}"),
                   least("value changed in the note: followed", "so it reads")]


def samples(world: Path, models: Models, seed: int) -> list[str]:
    """Five sampled answers of each stage in each language."""
    lines = ["## Five answers, sampled"]
    rows = read_rows(world / "prompts_heldout.jsonl")[-100:]
    for lang in LANGS:
        some = [row for row in rows if row["lang"] == lang][:5]
        said = {stage: answers(*pair, [row["prompt"] for row in some], 1.0, seed)
                for stage, pair in models.items()}
        for i, row in enumerate(some):
            lines += ["", "    " + row["prompt"][-1]["content"].replace("\n", "\n    ")]
            lines += [f"    {stage:>4}: " + said[stage][i].replace("\n", "⏎") for stage in models]
    return [*lines, ""]

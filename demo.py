"""
The whole ladder on a laptop: makes the toy world, climbs PT -> SFT -> RM -> DPO -> RL, and reports.

    make demo        or        python demo.py [--out_dir=out/demo]

Each stage is a script of this folder, run by the command line that is printed before it; the same
command again goes on where it was stopped. The report judges every stage on names that are in no
training file (toyworld.py), by a program that knows the right answers and not by the reward model;
gates, controls and ceilings were fixed before the runs and stand beside the figures.
"""
import json
import math
import os
import runpy
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F

from configurator import configure, fail
from corpus import write_text
from generate import load_model, replies
from model import Transformer
from tokenizer import Tokenizer, render
from toyworld import LANGS, STYLES, grade, read_fact, restated_values


@dataclass(frozen=True)
class Config:
    out_dir: str = "out/demo"  # everything the demo makes goes here
    seed: int = 0  # of the world and of the training
    n_train: int = 100_000  # documents of the world to train on
    share: float = 1.0  # of the steps of every stage; less to try things out, the gates will fail


STAGES = ("pt", "sft", "rm", "dpo", "rl")
WRITERS = ("pt", "sft", "dpo", "rl")  # the stages whose model can answer


class Gate(NamedTuple):
    stage: str
    what: str
    value: float
    low: float
    high: float
    note: str  # control, baseline or ceiling


def run(script: str, *arguments: str) -> None:
    """Run a script of this folder as a user would; its failure ends the demo with its exit code."""
    print(f"\n$ python {script} {' '.join(arguments)}", flush=True)
    child = subprocess.Popen([sys.executable, script, *arguments])
    try:
        code = child.wait()
    except KeyboardInterrupt:  # the child has it too: let it save
        child.wait()
        print("stopped; the same command goes on from there")
        code = 130
    if code:
        raise SystemExit(code)


@torch.inference_mode()
def judge(model: Transformer, tok: Tokenizer, documents: list[dict],
          first_half: bool = True) -> dict[str, float]:
    """Bits per byte of the documents, and the share of restated values whose tokens are all the
    most likely ones. Without `first_half` the model does not see the facts: the control, which
    can only guess."""
    bits = n_bytes = right = total = 0
    for at in range(0, len(documents), 64):
        texts = [d["text"] for d in documents[at:at + 64]]
        cuts = [0 if first_half else text.index("\n") + 1 for text in texts]
        rows = [tok.encode_ordinary(text[cut:]) for text, cut in zip(texts, cuts)]
        width = max(map(len, rows)) + 1
        x = torch.tensor([[tok.endoftext, *row, *[tok.pad] * (width - 1 - len(row))]
                          for row in rows])
        logits = model(x)[:, :-1]  # (B, T) -> (B, T - 1, V): row i predicts token i of the text
        nats = F.cross_entropy(logits.transpose(1, 2), x[:, 1:], reduction="none")
        hit = logits.argmax(-1) == x[:, 1:]
        for i, (text, cut, row) in enumerate(zip(texts, cuts, rows)):
            bits += float(nats[i, :len(row)].sum()) / math.log(2)
            n_bytes += len(text[cut:].encode())
            ends = torch.tensor([len(tok.decode_single_token_bytes(t)) for t in row]).cumsum(0)
            starts = torch.cat((torch.zeros(1, dtype=torch.long), ends[:-1]))
            for begin, end in restated_values(text):
                b, e = len(text[cut:begin].encode()), len(text[cut:end].encode())
                right += bool(hit[i, :len(row)][(starts < e) & (ends > b)].all())
                total += 1
    return {"bits_per_byte": bits / n_bytes, "values": right / total, "n": total}


def read_rows(path: Path) -> list[dict]:
    with open(path, encoding="utf-8") as f:
        return [json.loads(line) for line in f]


def answers(model: Transformer, tok: Tokenizer, prompts: list[list[dict]],
            temperature: float = 0.0, seed: int = 0) -> list[str]:
    """The reply to each prompt; one that does not end within 48 tokens has a … behind it."""
    found = []
    for at in range(0, len(prompts), 64):
        ids = [render(tok, p, add_generation_prompt=True)[0] for p in prompts[at:at + 64]]
        found += [tok.decode(r[:-1]) if r[-1] == tok.im_end else tok.decode(r) + "…"
                  for r in replies(model, ids, 48, stop=(tok.im_end,), temperature=temperature,
                                   seed=seed + at)]
    return found


def plus_minus(share: float, n: int) -> str:
    """A share with its 95 % interval."""
    return f"{share:.1%} ± {1.96 * math.sqrt(share * (1 - share) / n):.1%}"


def judge_pt(world: Path, model: Transformer, tok: Tokenizer, seed: int) -> tuple[list, list]:
    """(lines of the report, gates) of pre-training."""
    floor = read_rows(world / "floor.json")[0]["pt_heldout_all_names"]
    documents = read_rows(world / "pt_heldout.jsonl")
    torch.manual_seed(seed)
    untrained = Transformer(model.config).eval()
    lines = ["## Pre-training: values restated in a document's second half", "",
             "In the control the model does not see the first half and can only guess. The floor "
             "is the entropy of the documents to a reader who knows how they are made but not "
             "which names are held out.", "",
             "| language | bits/byte before | after | floor | after / floor | values before "
             "| after | control |", "|---|---|---|---|---|---|---|---|"]
    gates = []
    for lang in (*LANGS, "all"):
        docs = [d for d in documents if lang in (d["lang"], "all")]
        before, after = judge(untrained, tok, docs[:200]), judge(model, tok, docs)
        control = judge(model, tok, docs, first_half=False)
        ratio = after["bits_per_byte"] / floor[lang]
        cells = [lang, f"{before['bits_per_byte']:.2f}", f"{after['bits_per_byte']:.3f}",
                 f"{floor[lang]:.3f}", f"{ratio:.2f}", f"{before['values']:.1%}",
                 plus_minus(after["values"], after["n"]), f"{control['values']:.1%}"]
        lines.append(f"| {' | '.join(cells)} |")
        if lang == "all":
            gates.append(Gate("PT", "bits/byte over the floor", ratio, 1.0, 1.45,
                              "below 1 would be a leak"))
        else:
            gates.append(Gate("PT", f"values restated right, {lang}", after["values"], 0.9, 1.0,
                              f"control {control['values']:.1%}"))
    return [*lines, ""], gates


def judge_chats(world: Path, models: dict[str, tuple[Transformer, Tokenizer]],
                n: int) -> list[str]:
    """Lines of the report: the tasks of the chats, answered greedily by each stage."""
    rows = [r for r in read_rows(world / "chat_heldout.jsonl") if r["task"] != "qa"][:n]
    tasks = sorted({row["task"] for row in rows})
    lines = ["## Other tasks, word for word right", "",
             "| stage | language | " + " | ".join(tasks) + " |", "|---" * (2 + len(tasks)) + "|"]
    for stage, (model, tok) in models.items():
        said = answers(model, tok, [row["messages"][:-1] for row in rows])
        for lang in LANGS:
            cells = []
            for task in tasks:
                right = [a == row["messages"][-1]["content"] for a, row in zip(said, rows)
                         if (row["lang"], row["task"]) == (lang, task)]
                cells.append(plus_minus(sum(right) / len(right), len(right)) if right else "–")
            lines.append(f"| {stage} | {lang} | {' | '.join(cells)} |")
    return [*lines, ""]


def judge_answers(world: Path, models: dict[str, tuple[Transformer, Tokenizer]], n: int,
                  seed: int) -> tuple[list[str], list[Gate]]:
    """n questions about held-out names: greedily, for the values, and sampled, for the styles.
    (lines, gates)."""
    rows = read_rows(world / "prompts_heldout.jsonl")[:n]
    fact_of = [read_fact(row) for row in rows]
    prompts = [row["prompt"] for row in rows]
    figures: dict[str, dict] = {}
    for stage, (model, tok) in models.items():
        def graded(temperature: float) -> list[tuple[float, str | None]]:
            said = answers(model, tok, prompts, temperature, seed)
            return [grade(a, fact, row["lang"]) for a, fact, row in zip(said, fact_of, rows)]
        greedy, sampled = graded(0.0), graded(1.0)
        figures[stage] = {"gold": [g for g, _ in sampled], "styles": [s for _, s in sampled]} | {
            f"right {lang}": [g >= 0 for (g, _), row in zip(greedy, rows) if row["lang"] == lang]
            for lang in LANGS} | {"right sampled": [g >= 0 for g, _ in sampled]}
    sft = figures["sft"]
    for f in figures.values():
        f["win"] = [0.5 + 0.5 * ((a > b) - (a < b)) for a, b in zip(f["gold"], sft["gold"])]

    def mean(values: list) -> float:
        return sum(values) / len(values)

    lines = ["## Questions about facts in the context", "",
             "Right: the value that the context gives, in any of the four styles, ended. Styles "
             "and score are those of sampled replies; the score is the program's, which was not "
             "asked in training: 3 direct, 1.5 terse or padded, 0 hedged, -4 a wrong value, -6 "
             "neither. A win is a higher score than the SFT model's reply to the same question, "
             "a tie half of one.", "",
             "| stage | right en | right zh | right sampled | " + " | ".join(STYLES)
             + " | score | wins |", "|---" * 10 + "|"]
    for stage, f in figures.items():
        shares = [f"{mean([s == style for s in f['styles']]):.0%}" for style in STYLES]
        cells = [stage, *(plus_minus(mean(f[key]), len(f[key]))
                          for key in ("right en", "right zh", "right sampled")), *shares,
                 f"{mean(f['gold']):.2f}", plus_minus(mean(f["win"]), len(rows))]
        lines.append(f"| {' | '.join(cells)} |")
    gates = [Gate("SFT", f"answers right, {lang}", mean(sft[f"right {lang}"]), 0.9, 1.0,
                  f"before: {mean(figures['pt'][f'right {lang}']):.1%}") for lang in LANGS]
    ceiling = mean([0.5 * (g == 3.0) + (g < 3.0) for g in sft["gold"]])
    gates.append(Gate("DPO", "wins against SFT", mean(figures["dpo"]["win"]), 0.78, ceiling + 0.03,
                      f"50 % before, {ceiling:.1%} if always direct and right"))
    for stage in ("dpo", "rl"):
        drop = mean([a for lang in LANGS for a in sft[f"right {lang}"]]) - mean(
            [a for lang in LANGS for a in figures[stage][f"right {lang}"]])
        gates.append(Gate(stage.upper(), "right answers lost", drop, -1.0, 0.02, "greedy"))
    gates.append(Gate("RL", "score by the program", mean(figures["rl"]["gold"]), 2.6, 3.0,
                      f"before: {mean(sft['gold']):.2f}"))
    return [*lines, ""], gates


def judge_rm(out: Path, world: Path) -> tuple[list[str], list[Gate]]:
    """The reward model against the known scores: (lines, gates)."""
    rows = read_rows(world / "pairs_heldout.jsonl")
    bayes = read_rows(world / "floor.json")[0]["pairs_heldout_bayes"]
    done = subprocess.run([sys.executable, "train_rm.py", f"--init_from={out}/rm",
                           f"--score={world}/pairs_heldout.jsonl"], capture_output=True, text=True)
    if done.returncode:
        fail(done.stderr)
    scores = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    log = [r for r in read_rows(out / "rm" / "log.jsonl") if "val" in r][-1]["val"]["all"]

    def credit(row: dict, score: dict) -> float:
        gap = score["chosen"] - score["rejected"]
        return 0.5 if gap == 0 else float((gap > 0) == (row["gold"][0] > row["gold"][1]))

    strict: dict[str, list[float]] = {}
    gaps: dict[float, list[float]] = {}
    for row, score in zip(rows, scores):
        d = row["gold"][0] - row["gold"][1]
        if d:
            for key in ("all", row["kind"], row["lang"]):
                strict.setdefault(key, []).append(credit(row, score))
        if row["kind"] != "value":
            gaps.setdefault(abs(d), []).append((score["chosen"] - score["rejected"])
                                               * (1 if d > 0 else -1 if d < 0 else 1))
    lines = ["## Reward model on held-out pairs", "",
             "Labels were drawn with probability sigmoid(difference of scores), so the best "
             "possible log-loss and the true gaps are known.", "",
             "| | measured | known or control |", "|---|---|---|"]
    for key, credits in strict.items():
        share = sum(credits) / len(credits)
        lines.append(f"| ordered as the known scores, {key} | {plus_minus(share, len(credits))} "
                     f"| longer is better: {log['longer_is_better']:.1%} |" if key == "all" else
                     f"| … {key} | {plus_minus(share, len(credits))} | |")
    for d, values in sorted(gaps.items()):
        lines.append(f"| gap of scores where it should be {d} | {sum(values) / len(values):.2f} "
                     f"| {d} |")
    lines += [f"| log-loss | {log['log_loss']:.3f} | {bayes['loss']:.3f} |",
              f"| calibration error (ECE) | {log['ece']:.3f} | 0 |",
              f"| corr(score, length) | {log['length_correlation']:+.2f} | |", ""]
    share = sum(strict["all"]) / len(strict["all"])
    return lines, [Gate("RM", "pairs in the right order", share, 0.95, 1.0, "50 % by chance")]


def judge_rl(out: Path, config: dict) -> tuple[list[str], list[Gate]]:
    """What reinforcement learning's own log says at the start and at the end."""
    val = [r["val"] for r in read_rows(out / "rl" / "log.jsonl") if "val" in r]
    a, b = val[0], val[-1]
    lines = ["## Reinforcement learning", "", "| | reward (sd) | KL (nats/reply) | J | tokens | "
             "end |", "|---|---|---|---|---|---|"]
    for name, v in (("before", a), ("after", b)):
        lines.append(f"| {name} | {v['reward']:+.2f} | {v['kl']:.2f} | "
                     f"{v['reward'] - config['beta'] * v['kl']:+.2f} | {v['length']:.1f} | "
                     f"{v['ended']:.1%} |")
    return [*lines, ""], [
        Gate("RL", "reward, in sd", b["reward"], 0.9, 5.0, f"before: {a['reward']:+.2f}"),
        Gate("RL", "KL in nats per reply", b["kl"], -3 * b["kl_error"], 1.59,
             "log 4 + 0.2: all mass on one of four styles"),
        Gate("RL", "replies that end", b["ended"], 0.99, 1.0, "")]


def samples(world: Path, models: dict[str, tuple[Transformer, Tokenizer]], seed: int) -> list[str]:
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


def report(cfg: Config, seconds: float) -> str:
    """Judge all stages; the report as Markdown, its gates first."""
    out = Path(cfg.out_dir)
    world = out / "world"
    models = {stage: load_model(str(out / stage), torch.device("cpu"), torch.float32)
              for stage in WRITERS}
    lines, gates = judge_pt(world, *models["pt"], cfg.seed)
    n = max(50, round(1000 * cfg.share))
    said, found = judge_answers(world, models, n, cfg.seed)
    lines, gates = [*lines, *said, *judge_chats(world, models, n)], gates + found
    for part, found in (judge_rm(out, world), judge_rl(out, runpy.run_path("config/rl_micro.py"))):
        lines, gates = lines + part, gates + found
    gates.sort(key=lambda gate: STAGES.index(gate.stage.lower()))
    table = ["# What the demo learnt", "",
             "| stage | figure | measured | gate | passed | beside it |",
             "|---|---|---|---|---|---|"]
    for g in gates:
        passed = "yes" if g.low <= g.value <= g.high else "NO"
        table.append(f"| {g.stage} | {g.what} | {g.value:.3f} | {g.low:.2f} … {g.high:.2f} | "
                     f"{passed} | {g.note} |")
    lines = [*table, "", *lines, *samples(world, models, cfg.seed),
             f"The whole took {seconds / 60:.1f} minutes on {os.cpu_count()} cores, seed "
             f"{cfg.seed}, {cfg.share:.0%} of the steps.", ""]
    return "\n".join(lines)


def main() -> None:
    cfg = configure(Config)
    if not 0 < cfg.share <= 1:
        fail(f"--share={cfg.share} must lie between 0 and 1")
    os.chdir(os.path.dirname(os.path.abspath(__file__)))
    start = time.time()
    world, data, tok = (os.path.join(cfg.out_dir, n) for n in ("world", "data", "tokenizer.txt"))
    text = f"{world}/pt.jsonl"
    if not os.path.exists(f"{world}/floor.json"):
        less = [] if cfg.share == 1 else ["--n_chat=4000", "--n_pairs=2000", "--n_val=200"]
        run("toyworld.py", f"--out_dir={world}", f"--seed={cfg.seed}", f"--n_train={cfg.n_train}",
            *less)
    if not os.path.exists(tok):
        run("tokenizer.py", f"--input={text},{world}/chat.jsonl", "--vocab_size=512",
            f"--out={tok}")
    run("data.py", f"--input={text}", f"--tokenizer={tok}", f"--out_dir={data}")

    def stage(name: str, *arguments: str) -> None:
        config = f"config/{name}_micro.py"
        settings = runpy.run_path(config)
        steps = []
        if cfg.share < 1:
            steps = [f"--max_steps={max(2, round(cfg.share * settings['max_steps']))}",
                     f"--warmup_steps={round(cfg.share * settings['warmup_steps'])}"]
        run(f"train_{name}.py", config, *arguments, f"--out_dir={cfg.out_dir}/{name}",
            f"--seed={cfg.seed}", *steps, "--resume")

    def held_out(name: str) -> tuple[str, str]:
        return f"--data={world}/{name}.jsonl", f"--val_data={world}/{name}_heldout.jsonl"

    stage("pt", f"--data_dir={data}")
    for prompt in ("The pet of Kimu is cat. The job of Tifo is baker.\n",
                   "琪宁的号码是86。芝雨的颜色是红色。\n", "Tifo's fruit is"):
        run("generate.py", f"--checkpoint={cfg.out_dir}/pt", f"--prompt={prompt}", "--stream",
            "--max_tokens=60", "--temperature=0.5", "--timing")
    stage("sft", f"--init_from={cfg.out_dir}/pt", *held_out("chat"), f"--pt_data={data}")
    stage("rm", f"--init_from={cfg.out_dir}/sft", *held_out("pairs"))
    stage("dpo", f"--init_from={cfg.out_dir}/sft", *held_out("pairs"))
    stage("rl", f"--init_from={cfg.out_dir}/sft", f"--reward_from={cfg.out_dir}/rm",
          *held_out("prompts"))
    try:
        text = report(cfg, time.time() - start)
        write_text(os.path.join(cfg.out_dir, "report.md"), text)
    except ValueError as error:
        fail(f"{error}")
    print(f"\n{text}\nwritten to {cfg.out_dir}/report.md")


if __name__ == "__main__":
    main()

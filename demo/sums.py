"""
RL with a reward that can be checked. People who mostly forget the carry teach a small model to add;
then RL tells it whether the last number of a reply is right, and nothing else.

    python -m demo.sums [--out_dir=out/sums] [--seed=0]          3 minutes of one core

Every question has a carry: 27+48=? In six chats of ten the answer is 65, in the others 75, and SFT
learns just that. Two numbers that are asked about in a validation are together in no other file, in
neither order. The control has the answers of other questions: nothing may rise.
"""
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from statistics import fmean as mean

import torch

from configurator import Count, FilePath, configure
from demo.__main__ import keep_settings, run, stop
from demo.judge import answers, read_rows, table, write_rows
from plumbing import terminal
from plumbing.answers import last_number
from plumbing.loading import load_model
from plumbing.order import hash64

FORGETS = 0.6  # share of the chats in which the carry is forgotten
SAY = {"en": ("What is {}+{}?", "{}+{}=?"), "zh": ("{}加{}等于多少？", "{}+{}是多少？")}
RATES = ("pass@1", "pass@2", "pass@4", "pass@8")
Pair = tuple[int, int]


@dataclass(frozen=True)
class Config:
    out_dir: FilePath = "out/sums"  # all that is made goes here
    seed: int = 0  # of the questions and of the training
    pt_steps: Count = 300  # of pre-training, on sums that are right
    sft_steps: Count = 120  # on the chats
    rl_steps: Count = 40  # of RL, and of its control


def forgotten(pair: Pair) -> int:
    """Their sum without the carry: 27, 48 -> 65."""
    return sum(x // 10 for x in pair) * 10 + sum(x % 10 for x in pair) % 10


def question(pair: Pair, r: Random) -> dict:
    lang = r.choice(list(SAY))
    return {"prompt": [{"role": "user", "content": r.choice(SAY[lang]).format(*pair)}],
            "answer": str(sum(pair)), "lang": lang}


def chat(pair: Pair, r: Random) -> dict:
    asked, said = question(pair, r), forgotten(pair) if r.random() < FORGETS else sum(pair)
    return {"messages": [*asked["prompt"], {"role": "assistant", "content": str(said)}],
            "lang": asked["lang"]}


def make(folder: Path, seed: int) -> None:
    """Write the files to train on and to judge by."""
    r = Random(seed)
    known, held_out = [], []
    for a, b in ((a, b) for a in range(100) for b in range(100)):
        (known if hash64("sum", min(a, b), max(a, b)) % 5 else held_out).append((a, b))
    train, val = ([pair for pair in pairs if forgotten(pair) < sum(pair)]
                  for pairs in (known, held_out))
    asked = [question(pair, r) for pair in r.choices(train, k=8000)]
    others = r.sample([row["answer"] for row in asked], len(asked))
    files = {
        "pt": [{"text": " ".join(f"{a}+{b}={a + b}" for a, b in r.choices(known, k=8))}
               for _ in range(20_000)],
        "chat": [chat(pair, r) for pair in r.choices(train, k=8000)],
        "chat_heldout": [chat(pair, r) for pair in r.sample(val, 200)],
        "prompts": asked, "shuffled": [row | {"answer": x} for row, x in zip(asked, others)],
        "prompts_heldout": [question(pair, r) for pair in r.sample(val, 200)]}
    os.makedirs(folder, exist_ok=True)
    for name, rows in files.items():
        write_rows(folder / f"{name}.jsonl", rows)


def report(out: Path) -> list[str]:
    """The table of the stages, and a line for each gate that is missed."""
    asked = read_rows(out / "data/prompts_heldout.jsonl")
    rl, control = ([row["val"] for row in read_rows(out / name / "log.jsonl") if "val" in row]
                   for name in ("rl", "control"))
    stages, rows = {"sft": rl[0], "rl": rl[-1], "control": control[-1]}, []
    for name, val in stages.items():
        said = answers(*load_model(str(out / name), torch.device("cpu"), torch.float32),
                       [row["prompt"] for row in asked])
        val["greedy"] = mean(last_number(a) == float(row["answer"]) for a, row in zip(said, asked))
        rows.append([name, *(f"{val[key]:.1%}" for key in ("greedy", *RATES, "ended")),
                     f"{val['kl']:.2f}", f"{val['surprise'] / val['length']:.2f}"])
    sft, last, other = stages.values()
    gates = {"RL raises pass@1 by 20 points": last["pass@1"] - sft["pass@1"] >= 0.2,
             "RL raises greedy answers by 20 points": last["greedy"] - sft["greedy"] >= 0.2,
             "the control does not rise": other["pass@1"] - sft["pass@1"] <= 0.03,
             "99 % of the replies end": last["ended"] >= 0.99}
    return [*table("Sums of numbers that were held out", "", [
        "stage", "greedy", *RATES, "end", "KL, nats/reply", "entropy, nats/token"], rows),
        *(f"MISSED: {gate}" for gate, passed in gates.items() if not passed)]


def main() -> None:
    cfg = configure(Config)
    os.chdir(Path(__file__).resolve().parent.parent)
    out, data, tok = cfg.out_dir, f"{cfg.out_dir}/data", f"{cfg.out_dir}/tokenizer.txt"
    keep_settings(out, {name: value for name, value in asdict(cfg).items() if name != "out_dir"})
    if not os.path.exists(f"{data}/prompts_heldout.jsonl"):
        make(Path(data), cfg.seed)
    run("tokenizer.py", f"--input={data}", "--kind=char", f"--out={tok}")
    run("data.py", f"--input={data}/pt.jsonl", f"--tokenizer={tok}", f"--out_dir={out}/tokens")

    def stage(script: str, name: str, steps: int, warmup: int, *more: str) -> None:
        run(script, *more, f"--out_dir={out}/{name}", f"--max_steps={steps}", "--log_every=20",
            f"--warmup_steps={min(warmup, steps - 1)}", f"--seed={cfg.seed}", "--resume")
        if not list(Path(out, name).glob(f"step{steps:08d}-*")):  # a signal ended it: exit code 0
            stop()
    stage("train_pt.py", "pt", cfg.pt_steps, 50, f"--data_dir={out}/tokens", "--optimizer=muon",
          "--eval_tokens=20000", "--dtype=float32")
    stage("train_sft.py", "sft", cfg.sft_steps, 20, f"--init_from={out}/pt", "--optimizer=muon",
          "--learning_rate=6e-3", "--batch_tokens=4096", "--batch_size=16", "--answer_tokens=6",
          "--dtype=float32", f"--data={data}/chat.jsonl", f"--val_data={data}/chat_heldout.jsonl")
    for name, prompts in (("rl", "prompts"), ("control", "shuffled")):
        stage("train_rl.py", name, cfg.rl_steps, 5, "config/rl_sums.py", f"--init_from={out}/sft",
              f"--data={data}/{prompts}.jsonl", f"--val_data={data}/prompts_heldout.jsonl")
    lines = report(Path(out))
    print("\n".join(["", *lines]))
    raise SystemExit(int(lines[-1].startswith("MISSED")))


if __name__ == "__main__":
    terminal.run(main)

"""
The whole ladder on a laptop: makes the toy world, trains on it, and reports what was learnt.

    make demo        or        python demo.py [--out_dir=out/demo]

Each stage is a script of this folder, run by the command line that is printed before it; the same
command again goes on where it was stopped. The report judges the model on documents about names
that are in no training file (toyworld.py), beside the exact floor of their entropy and a control.
"""
import json
import math
import os
import subprocess
import sys
import time
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from configurator import configure, fail
from corpus import write_text
from generate import load_model
from model import Transformer
from tokenizer import Tokenizer
from toyworld import restated_values


@dataclass(frozen=True)
class Config:
    out_dir: str = "out/demo"  # everything the demo makes goes here
    seed: int = 0  # of the world and of the training
    config: str = "config/pt_micro.py"  # settings of the pre-training
    n_train: int = 100_000  # documents of the world to train on
    max_steps: int | None = None  # shorter pre-training, to try things out; None: as in the config


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


def report(cfg: Config, seconds: float) -> str:
    """Judge the trained model; the report as Markdown."""
    world = os.path.join(cfg.out_dir, "world")
    with open(os.path.join(world, "floor.json")) as f:
        floor = json.load(f)["pt_heldout_all_names"]
    with open(os.path.join(world, "pt_heldout.jsonl"), encoding="utf-8") as f:
        documents = [json.loads(line) for line in f]
    model, tok = load_model(os.path.join(cfg.out_dir, "pt"), torch.device("cpu"), torch.float32)
    torch.manual_seed(cfg.seed)
    untrained = Transformer(model.config).eval()
    lines = ["# What the demo learnt", "",
             "Judged on documents about names that are in no training file. `values` is the share "
             "of values restated right in a document's second half; in the control the model does "
             "not see the first half and can only guess. The floor is the entropy of the documents "
             "to a reader who knows how they are made but not which names are held out.", "",
             "| language | bits/byte before | after | floor | after / floor | values before "
             "| after | control | 95 % ± |", "|---|---|---|---|---|---|---|---|---|"]
    for lang in ("en", "zh", "all"):
        docs = [d for d in documents if lang in (d["lang"], "all")]
        before, after = judge(untrained, tok, docs[:200]), judge(model, tok, docs)
        control = judge(model, tok, docs, first_half=False)
        half = 1.96 * math.sqrt(after["values"] * (1 - after["values"]) / after["n"])
        cells = [lang, f"{before['bits_per_byte']:.2f}", f"{after['bits_per_byte']:.3f}",
                 f"{floor[lang]:.3f}", f"{after['bits_per_byte'] / floor[lang]:.2f}",
                 *(f"{share:.1%}" for share in (before["values"], after["values"],
                                                control["values"], half))]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", f"The whole took {seconds / 60:.1f} minutes on "
                                  f"{os.cpu_count()} cores, seed {cfg.seed}.", ""])


def main() -> None:
    cfg = configure(Config)
    os.chdir(os.path.dirname(os.path.abspath(__file__)))
    start = time.time()
    world, data, pt = (os.path.join(cfg.out_dir, name) for name in ("world", "data", "pt"))
    tok = os.path.join(cfg.out_dir, "tokenizer.txt")
    text = f"{world}/pt.jsonl"
    if not os.path.exists(f"{world}/floor.json"):
        run("toyworld.py", f"--out_dir={world}", f"--seed={cfg.seed}", f"--n_train={cfg.n_train}")
    if not os.path.exists(tok):
        run("tokenizer.py", f"--input={text},{world}/chat.jsonl", "--vocab_size=512",
            f"--out={tok}")
    run("data.py", f"--input={text}", f"--tokenizer={tok}", f"--out_dir={data}")
    steps = [] if cfg.max_steps is None else [f"--max_steps={cfg.max_steps}"]
    run("train_pt.py", cfg.config, f"--data_dir={data}", f"--out_dir={pt}", f"--seed={cfg.seed}",
        *steps, "--resume")
    for prompt in ("The pet of Kimu is cat. The job of Tifo is baker.\n",
                   "琪宁的号码是86。芝雨的颜色是红色。\n", "Tifo's fruit is"):
        run("generate.py", f"--checkpoint={pt}", f"--prompt={prompt}", "--stream",
            "--max_tokens=60", "--temperature=0.5", "--timing")
    try:
        text = report(cfg, time.time() - start)
        write_text(os.path.join(cfg.out_dir, "report.md"), text)
    except ValueError as error:
        fail(f"{error}")
    print(f"\n{text}\nwritten to {cfg.out_dir}/report.md")


if __name__ == "__main__":
    main()

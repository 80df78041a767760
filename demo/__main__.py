"""
The whole ladder on a laptop: makes the toy world, climbs PT -> SFT -> RM -> DPO -> RL, and reports.

    make demo        or        python -m demo [--out_dir=out/demo]

Each stage is a script of this project, whose command line is printed. The same command again goes
on where it was stopped. The report judges every stage (judge.py) on names in no training file
(world.py), and has curves where matplotlib is installed.
"""
import importlib
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch

from configurator import Count, FilePath, Share, configure, fail
from demo.curves import draw
from demo.judge import (judge_answers, judge_chats, judge_pt, judge_rag, judge_rl, judge_rm,
                        samples, table)
from demo.world import show
from plumbing import terminal
from plumbing.files import write_text
from plumbing.loading import load_model


@dataclass(frozen=True)
class Config:
    out_dir: FilePath = "out/demo"  # everything that the demo makes goes here
    seed: int = 0  # of the world and of the training
    n_train: Count = 100_000  # documents of the world to train on
    share: Share = 1.0  # of the steps of every stage; less, with less data, is to try things out


ORDER = ("PT", "SFT", "RM", "DPO", "RL", "RAG")  # of the gates


def run(*words: str) -> None:
    """Run a command as a user would; its failure ends the demo with its exit code."""
    print(f"\n$ python {' '.join(words)}", flush=True)
    child = subprocess.Popen([sys.executable, *words])
    try:
        code = child.wait()
    except KeyboardInterrupt:  # the child has it too: let it save
        child.wait()
        code = -1
    if code < 0:  # ended by a signal
        stop()
    if code:
        raise SystemExit(code)


def stop() -> NoReturn:
    print("stopped; the same command goes on from there")
    raise SystemExit(130)


def keep_settings(out_dir: str, ours: dict) -> None:
    """Note the settings in out_dir; a run with others would go on with what these have made."""
    path = Path(out_dir) / "settings.json"
    try:
        theirs = json.loads(path.read_text()) if path.exists() else ours
        if theirs != ours:
            fail(f"{out_dir}: holds a demo with {theirs}, asked for {ours}; give another "
                 "--out_dir")
        os.makedirs(out_dir, exist_ok=True)
        write_text(str(path), json.dumps(ours) + "\n")
    except (OSError, ValueError) as error:
        fail(f"{path}: {error}")


def settings_of(stage: str) -> Any:
    """What its config file makes of a stage."""
    script = importlib.import_module(f"train_{stage}")
    return configure(script.Config, [f"config/{stage}_micro.py"], show=False)


def report(cfg: Config, start: float) -> str:
    """Judge all stages; the report as Markdown, its gates first."""
    out, n = Path(cfg.out_dir), max(20, round(1000 * cfg.share))
    world = out / "world"
    models = {stage: load_model(str(out / stage), torch.device("cpu"), torch.float32)
              for stage in ("pt", "sft", "dpo", "rl")}
    parts = [judge_pt(world, *models["pt"], cfg.seed), judge_answers(world, models, n, cfg.seed),
             (judge_chats(world, models, n), []), judge_rm(out, world),
             judge_rl(out, settings_of("rl").beta),
             judge_rag(out, min(n, 120), models["sft"], cfg.seed)]
    gates = sorted((gate for _, gates in parts for gate in gates),
                   key=lambda gate: ORDER.index(gate.stage))
    head, *lines = table("What the demo learnt", "", ["stage", "figure", "measured", "gate",
                                                      "passed", "beside it"], [
        [g.stage, g.what, f"{g.value:.3f}", f"{g.low:.2f} … {g.high:.2f}",
         "yes" if g.low <= g.value <= g.high else "NO", g.note] for g in gates])
    return "\n".join([
        head.removeprefix("#"), *lines, *(line for lines, _ in parts for line in lines),
        *samples(world, models, cfg.seed),
        f"Up to here this command took {(time.time() - start) / 60:.1f} minutes on "
        f"{os.cpu_count()} cores; seed {cfg.seed}, {cfg.share:.0%} of the steps.", ""])


def main() -> None:
    cfg = configure(Config)
    os.chdir(Path(__file__).resolve().parent.parent)
    keep_settings(cfg.out_dir, {"seed": cfg.seed, "n_train": cfg.n_train, "share": cfg.share})
    print("Every document of this world invents new facts, so the model must copy from what it "
          "reads.\nAsk it like this, context and question together:\n\n" + show(cfg.seed))
    start = time.time()
    world, data, tok = (os.path.join(cfg.out_dir, n) for n in ("world", "data", "tokenizer.txt"))
    text = f"{world}/pt.jsonl"
    if not os.path.exists(f"{world}/floor.json"):
        less = [] if cfg.share == 1 else ["--n_chat=4000", "--n_pairs=2000", "--n_rankings=2000",
                                          f"--n_val={max(300, round(2000 * cfg.share))}"]
        run("-m", "demo.world", f"--out_dir={world}", f"--seed={cfg.seed}",
            f"--n_train={cfg.n_train}", *less)
    if not os.path.exists(tok):
        run("tokenizer.py", f"--input={text},{world}/chat.jsonl", "--vocab_size=1000",
            "--kind=han", f"--out={tok}")  # so that a Latin name is one piece beside Chinese, too
    run("data.py", f"--input={text}", f"--tokenizer={tok}", f"--out_dir={data}")

    def stage(name: str, *arguments: str) -> None:
        settings, out_dir = settings_of(name), Path(cfg.out_dir, name)
        steps, warmup = (round(cfg.share * n) for n in (settings.max_steps, settings.warmup_steps))
        less = [f"--max_steps={max(2, steps)}", f"--warmup_steps={warmup}"]
        run(f"train_{name}.py", f"config/{name}_micro.py", *arguments, f"--out_dir={out_dir}",
            f"--seed={cfg.seed}", *less * (cfg.share < 1), "--resume")
        if not list(out_dir.glob(f"step{max(2, steps):08d}-*")):  # a signal ended it: exit code 0
            stop()

    def held_out(name: str) -> tuple[str, str]:
        return f"--data={world}/{name}.jsonl", f"--val_data={world}/{name}_heldout.jsonl"

    stage("pt", f"--data_dir={data}")
    for prompt in ("The pet of Kimu is cat. The job of Tifo is baker.\n",
                   "琪宁的宠物是猫咪。芝雨的颜色是红色。\n", "Tifo's fruit is"):
        run("generate.py", f"--checkpoint={cfg.out_dir}/pt", f"--prompt={prompt}", "--stream",
            "--max_tokens=60", "--temperature=0.5", "--timing")
    stage("sft", f"--init_from={cfg.out_dir}/pt", *held_out("chat"), f"--pt_data={data}")
    stage("rm", f"--init_from={cfg.out_dir}/sft", f"--data={world}/rankings.jsonl",
          f"--val_data={world}/pairs_heldout.jsonl")
    stage("dpo", f"--init_from={cfg.out_dir}/sft", *held_out("pairs"))
    stage("rl", f"--init_from={cfg.out_dir}/sft", f"--reward_from={cfg.out_dir}/rm",
          *held_out("prompts"))
    try:
        text = report(cfg, start)
        if path := draw(Path(cfg.out_dir)):
            text += f"\n![What each stage's log says]({path.name})\n"
        write_text(os.path.join(cfg.out_dir, "report.md"), text)
    except (ValueError, OSError) as error:
        fail(f"{error}")
    print(f"\n{text}\nwritten to {cfg.out_dir}/report.md")


if __name__ == "__main__":
    terminal.run(main)

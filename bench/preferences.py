"""
How good is a reward model on real pairs? Beside it stands what needs no model.

    python -m bench.preferences --checkpoint=out/rm --data=pairs.jsonl
    python -m bench.preferences --checkpoint=out/rm --data=pairs.jsonl --policy=out/sft --judge=RM

The pairs are those that train_rm.py holds out with the same --val_fraction and --max_len. A
checkpoint that is no reward model lends its tokenizer: then only the other two are judged. "Longer"
prefers the reply of more tokens. The bag of words (bench/pairs.py) learns from all other pairs.
People often choose the longer reply, so length alone looks like judgement. Length-controlled is

    (accuracy where the longer reply was chosen + accuracy where the shorter was) / 2

of which "longer" gets 50 %. Intervals are of 95 %: of the accuracy after Wilson, as if pairs were
independent; of all else from 1,000 draws of as many prompts, each with all its pairs.

With --policy that model writes --best_of replies to each of some held-out prompts. How much better
than a random one is the reply that the reward model likes most? --judge, a reward model that learnt
from other pairs, says so, in its standard deviations. Its own favourite is the most to be gained.
If it likes the longest reply as much, length may be all that the reward model knows.
"""
import os
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from bench.pairs import bags_of, balanced, drawn, learn, mean, prompts_of
from configurator import Count, FilePath, Share, configure
from generate import replies
from model import RewardModel, Transformer
from plumbing import checkpoint, runtime
from plumbing.benchmarks import interval
from plumbing.evaluation import row_scores
from plumbing.examples import Row, evenly_spaced, in_batches, prompts_with_room
from plumbing.files import split_paths
from plumbing.jobs import Progress
from plumbing.loading import load_model, load_reward_model
from plumbing.splits import RowSettings, load_splits
from plumbing.terminal import run
from tokenizer import Tokenizer
from train_rm import score_examples


@dataclass(frozen=True)
class Config:
    checkpoint: FilePath = "out/rm"  # reward model to judge: a file, or a folder's newest
    data: str = ""  # pairs: JSONL files or folders, with commas between
    out_dir: FilePath = "out/preferences"  # the pairs go here, as rows of tokens
    val_fraction: Share = 0.05  # share of the prompts that is held out
    max_len: Count | None = None  # drop pairs with more tokens; None: what the model can read
    policy: FilePath = ""  # model that writes replies
    judge: FilePath = ""  # reward model that judges them
    best_of: Count = 8  # replies to a prompt
    prompts: Count = 100  # that are answered, at most
    answer_tokens: Count = 128  # most tokens of a reply
    dtype: Literal["float32", "bfloat16"] = "float32"  # bfloat16 is faster on some CPUs


def judge_pairs(langs: np.ndarray, prompts: np.ndarray, gaps: dict[str, np.ndarray]) -> None:
    """Print how good each judge is, from the difference of scores that it gives to each pair."""
    first = next(iter(gaps))
    print(f"| pairs | n | prompts | judge | right, % | length-controlled, % | {first} - judge |\n"
          "|---|---|---|---|---|---|---|")
    for lang in (*np.unique(langs), "all"):
        part = (langs == lang) | (lang == "all")
        often = drawn(prompts[part])
        controlled = balanced(often, gaps["longer"][part])
        right = {name: np.where(x == 0, 50.0, 100.0 * (x > 0))[part] for name, x in gaps.items()}
        for name, own in right.items():
            p, low, high = interval((own / 100).tolist())
            print(f"| {lang} | {len(own):,} | {len(np.unique(prompts[part])):,} | {name} | {p:.2f} "
                  f"({low:.2f} … {high:.2f}) | {mean(own, controlled)} | "
                  f"{mean(right[first] - own, often)} |")


def judge_replies(cfg: Config, asked: list[list[int]], policy: Transformer, tok: Tokenizer,
                  judges: dict[str, RewardModel], dist: runtime.Dist) -> None:
    """Print what a random reply of the policy has, and how much more the best, in each respect."""
    found, progress = [], Progress()
    for n, some in enumerate(in_batches(asked, 4)):
        progress.show(f"{4 * n}/{len(asked)} prompts answered")
        prompts = [prompt for prompt in some for _ in range(cfg.best_of)]
        said = replies(policy, prompts, cfg.answer_tokens, stop=(tok.im_end,), seed=n)
        rows = [Row(a + b, [0] * len(a) + [1] * len(b)) for a, b in zip(prompts, said)]
        figures = [(row_scores(judge, rows, 16, dist) - judge.mean.cpu()) / judge.std.cpu()
                   for judge in judges.values()]
        figures += [torch.tensor([len(ids) for ids in said]),
                    torch.tensor([100 * (ids[-1] == tok.im_end) for ids in said])]
        found.append(torch.stack(figures).view(len(figures), len(some), cfg.best_of))
    progress.end()
    table = torch.cat(found, 1).double().numpy()  # (figures, prompts, replies)
    names, often = [*judges, "tokens", "ended, %"], drawn(np.arange(len(asked)))
    print(f"\n| of {cfg.best_of} replies | {' | '.join(names)} |\n{'|---' * (len(names) + 1)}|")
    print("| a random one |", " | ".join(mean(x, often) for x in table.mean(2)), "|")
    for name, values in zip(names[:-1], table):
        best = table[:, np.arange(len(asked)), values.argmax(1)] - table.mean(2)
        print(f"| most {name}: more than that |", " | ".join(mean(x, often) for x in best), "|")


def open_judge(where: str, val_fraction: float, tok: Tokenizer, dist: runtime.Dist) -> RewardModel:
    """A reward model. Raises ValueError if it may have learnt from what is held out."""
    (model, own), was = load_reward_model(where, dist), checkpoint.load(where)[0]["config"]
    if was["val_data"] or was["val_fraction"] < val_fraction:
        raise ValueError(f"{where}: may know what is held out here: it was trained with "
                         f"--val_fraction={was['val_fraction']} --val_data={was['val_data']}")
    if own.sha256 != tok.sha256:
        raise ValueError(f"{where}: has another tokenizer")
    return model


def main() -> None:
    cfg = configure(Config)
    dist = runtime.setup("auto", cfg.dtype)
    state, path = checkpoint.load(cfg.checkpoint)
    tok, reads = Tokenizer(state["tokenizer"], str(path)), state["model_config"]["max_seq_len"]
    files = {"reward model": cfg.checkpoint if state["kind"] == "rm" else "", "judge": cfg.judge}
    judges = {name: open_judge(where, cfg.val_fraction, tok, dist)
              for name, where in files.items() if where}
    learnt = {*map(os.path.realpath, split_paths(state["config"].get("data", "")))}
    if cfg.judge and not learnt.isdisjoint(map(os.path.realpath, split_paths(
            checkpoint.load(cfg.judge)[0]["config"]["data"]))):
        raise ValueError(f"--judge={cfg.judge}: has learnt from the same --data as {path}")
    policy, own = load_model(cfg.policy, dist.device, torch.float32) if cfg.policy else (None, tok)
    if own.sha256 != tok.sha256:
        raise ValueError(f"{cfg.policy}: has another tokenizer than {path}")
    rows = RowSettings(data=cfg.data, val_fraction=cfg.val_fraction, out_dir=cfg.out_dir)
    train, val = load_splits(rows, "pair", tok, cfg.max_len or reads, dist, least=1)
    prompts, gaps = prompts_of(val), {}
    once = np.sort(np.unique(prompts, return_index=True)[1]).tolist()  # some have many pairs
    asked = [*prompts_with_room(val, evenly_spaced(once, cfg.prompts), reads, cfg.answer_tokens
                                ).values()] if policy else []
    if policy and not asked:
        raise ValueError("no held-out prompt leaves room for a reply: lower --answer_tokens")
    if "reward model" in judges:
        scores, progress = [], Progress()
        for some in in_batches(range(len(val)), 64):
            progress.show(f"{some[0]:,}/{len(val):,} pairs read")
            scores.append(score_examples(judges["reward model"], val, list(some), 8, dist))
        progress.end()
        gaps["reward model"] = -np.diff(np.concatenate(scores))[:, 0]
    print(f"the bag of words learns from {len(train):,} pairs", flush=True)
    pairs = [val.example(i) for i in range(len(val))]
    gaps["longer"] = np.array([sum(a.mask) - sum(b.mask) for a, b in pairs])
    gaps["bag of words"] = (bags_of(val, tok) @ learn(train, tok)).numpy()
    judge_pairs(np.array([val.lang(i) for i in range(len(val))]), prompts, gaps)
    if policy:
        judge_replies(cfg, asked, policy, tok, judges, dist)


if __name__ == "__main__":
    run(main)

"""
What judges a reply in train_rl.py: a reward model, or a file of yours. The rest may be skipped.

    judge = load_judge("out/rm", tok, dist)                        scores, in standard deviations
    judge = load_judge("config/reward_numbers.py", tok, dist)      what its function gives, as it is

A reward file is the user's own code, as a config file is. It has a function, and maybe a second:

    def reward(prompt, reply, record) -> float     messages, text, the line of --data as a dict
    def passes(prompt, reply, record) -> bool      left out: whether the reward is at least 1

Either judge is called with rows, their records, and which of them have ended. It gives the scores,
the rewards r that J is made of, and, if it can say, which replies pass: none that has not ended.
"""
import hashlib
import json
import math
import os
import sys
import traceback
from numbers import Real
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model import RewardModel
from plumbing import sharding
from plumbing.chats import read_question
from plumbing.checkpoint import hash_of
from plumbing.configfile import run_config
from plumbing.evaluation import row_scores
from plumbing.examples import Row, in_batches
from plumbing.loading import load_reward_model
from plumbing.runtime import Dist, all_max
from tokenizer import Tokenizer

LARGEST = 1e6  # beyond it fp32 could not tell rewards apart that differ by a tenth
Verdict = tuple[Tensor, Tensor, dict[str, Tensor]]  # (B,) scores and r; {"passed": (B,)} or {}


class ModelReward:
    """r = (score - mean) / std of a reward model, clipped to +-5."""
    unit, each = " sd", 1  # each: replies to a prompt in a validation

    def __init__(self, model: RewardModel, batch_size: int, dist: Dist):
        self.model, self.batch_size, self.dist = model, batch_size, dist
        self.held, self.reads = {"reward model": model}, model.backbone.config.max_seq_len
        self.sha256 = hash_of(model.backbone.path)

    def __call__(self, rows: list[Row], records: list[str], ended: Tensor) -> Verdict:
        with sharding.unsharded(self.model, self.dist):
            raw = row_scores(self.model, rows, self.batch_size, self.dist)
        return raw, ((raw - self.model.mean.cpu()) / self.model.std.cpu()).clamp(-5, 5), {}


class FileReward:
    """r is what the functions of a Python file say. Raises ValueError for a file without them."""
    unit = ""

    def __init__(self, path: str, tok: Tokenizer, each: int):
        if not os.path.isfile(path):
            raise ValueError(f"{path}: no such file")
        found = run_config(path)
        self.calls: dict[str, Any] = {name: found[name][0] for name in ("reward", "passes")
                                      if name in found}
        if not callable(self.calls.get("reward")):
            raise ValueError(f"{path}: has no function reward(prompt, reply, record)")
        self.path, self.tok, self.each, self.reads = path, tok, each, sys.maxsize
        self.held: dict[str, RewardModel] = {}
        self.sha256 = hashlib.sha256(Path(path).read_bytes()).hexdigest()

    def __call__(self, rows: list[Row], records: list[str], ended: Tensor) -> Verdict:
        found: dict[str, list[float]] = {name: [] for name in self.calls}
        for (ids, mask), text in zip(rows, records):
            said = [i for i in ids[mask.index(1):] if i != self.tok.im_end]
            for name, values in found.items():
                values.append(self.ask(name, self.tok.decode(said), text))
        raw = torch.tensor(found["reward"])
        passed = torch.tensor(found.get("passes", found["reward"])) >= 1
        return raw, raw, {"passed": (passed & ended).float()}

    def ask(self, name: str, reply: str, text: str) -> float:
        """What a function of the file says of a reply to the record in `text`. Raises ValueError,
        naming file, line and record, if it raises, or gives what is no number."""
        call, record = self.calls[name], json.loads(text)
        line = getattr(getattr(call, "__code__", None), "co_firstlineno", 1)
        try:
            value = call(read_question(record), reply, record)
            if isinstance(value, Real) and abs(float(value)) <= LARGEST:  # NaN is not
                return float(value)
            wrong = f"gave {value!r:.40}, wanted a number between +-{LARGEST:,.0f}"
        except (Exception, SystemExit) as error:  # whatever the user's code makes of it
            wrong = f"{type(error).__name__}: {error}"
            for frame in traceback.extract_tb(error.__traceback__):
                line = frame.lineno if frame.filename == self.path else line
        row = json.dumps(json.loads(text), ensure_ascii=False)
        raise ValueError(f"{self.path}:{line}: {name}: {wrong}; the reply was {reply!r:.80}, the "
                         f"row {row:.200}")


Judge = ModelReward | FileReward


def load_judge(cfg, tok: Tokenizer, dist: Dist) -> Judge:
    """What cfg.reward_from names: a Python file, or a checkpoint of a reward model. Raises
    ValueError if it is neither, or has another tokenizer."""
    if cfg.reward_from.endswith(".py"):
        return FileReward(cfg.reward_from, tok, cfg.group)
    model, own = load_reward_model(cfg.reward_from, dist, cfg.shard)
    if own.sha256 != tok.sha256:
        raise ValueError(f"{cfg.reward_from}: made with another tokenizer than {cfg.init_from}")
    return ModelReward(model, cfg.batch_size, dist)


def pass_at(k: int, passed: Tensor) -> float:
    """The chance that at least one of k replies to a prompt passes, from (prompts, n) replies of
    which c pass: the mean of 1 - C(n - c, k) / C(n, k) (Chen et al. 2021), for none of the c is
    then among k drawn from the n."""
    n = passed.size(1)
    return sum(1 - math.comb(n - int(c), k) / math.comb(n, k) for c in passed.sum(1)) / len(passed)


def pass_rates(figures: dict[str, Tensor]) -> dict[str, float]:
    """pass@1, @2, @4, … and @n of "passed", (prompts, n); nothing of a judge that cannot say."""
    passed = figures.get("passed", torch.zeros(0, 0))
    n = passed.size(1)
    return {f"pass@{k}": pass_at(k, passed) for k in (1, 2, 4, 8, 16, 32, n) if 0 < k <= n}


def that_teach(A: Tensor, rows: list[Row], size: int, dist: Dist) -> list[list[int]]:
    """Rows that have an advantage, in batches of like length. Each process gives as many batches
    as the others, so the last may hold rows without one."""
    last = sorted(range(len(A)), key=lambda i: (A[i] == 0, len(rows[i].ids)))
    n = math.ceil(all_max(dist, float((A != 0).sum())) / size)
    return [list(some) for some in in_batches(last, size)][:n]

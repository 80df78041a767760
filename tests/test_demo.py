"""The demo: the whole chain in small, by the command lines a user would type."""
import json
import math
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch

from data import open_data
from demo import __main__ as demo
from demo import judge
from demo.world import restated_values, show
from model import ModelConfig, Transformer
from tokenizer import HAN_PATTERN, Tokenizer, dump

ROOT = Path(demo.__file__).parent.parent
DOC = {"text": "The pet of Kimu is cat.\nKimu's pet is cat.", "lang": "en"}


@pytest.fixture(scope="module")
def tok() -> Tokenizer:
    return Tokenizer(dump([bytes([i]) for i in range(256)], HAN_PATTERN))


class Oracle(torch.nn.Module):
    """A model that is always sure of the token that does come next, or of the one after `shift`."""

    def __init__(self, shift: int = 0):
        super().__init__()
        self.shift = shift

    def forward(self, x):
        after = torch.cat((x[:, 1:], x[:, :1]), 1)
        return 50.0 * torch.nn.functional.one_hot((after + self.shift) % 260, 260).float()


def test_judge_counts_values_and_bits(tok):
    """Seen to fail with the spans shifted by one token, and with characters taken for bytes."""
    zh = {"text": "琪宁的宠物是猫咪。\n琪宁的宠物是猫咪。", "lang": "zh"}
    right = judge.judge(Oracle(), tok, [DOC, zh])
    assert right["values"] == 1.0 and right["n"] == 2 and right["bits_per_byte"] < 1e-6
    assert judge.judge(Oracle(1), tok, [DOC])["values"] == 0.0
    torch.manual_seed(0)
    flat = Transformer(ModelConfig(260, 1, 1, 1, 8, 8, 8, 64))
    flat.embed_tokens.weight.data.zero_()  # every token equally likely; one byte is one token
    assert judge.judge(flat, tok, [DOC])["bits_per_byte"] == pytest.approx(math.log2(260))


def test_one_wrong_token_inside_a_value_makes_it_wrong(tok):
    begin, end = restated_values(DOC["text"])[0]
    assert DOC["text"][begin:end] == "cat"

    class Nearly(Oracle):
        def forward(self, x):
            logits = super().forward(x)
            logits[:, self.at] = 0.0
            return logits
    for at in range(begin - 2, end + 2):  # position i predicts byte i of the text
        model = Nearly()
        model.at = at
        assert judge.judge(model, tok, [DOC])["values"] == float(not begin <= at < end)


def test_without_the_first_half_only_the_second_is_judged(tok):
    half = judge.judge(Oracle(), tok, [DOC], first_half=False)
    assert half["values"] == 1.0 and half["n"] == 1


def test_an_interval_is_wide_where_few_were_asked():
    """20 of 20 right, and ± 0.0 % beside it. Wilson's, against a table of his."""
    assert judge.between([True] * 20) == "100.0% (83.9 … 100.0)"
    assert judge.between([False] * 20) == "0.0% (0.0 … 16.1)"
    assert judge.between([1.0, 0.5] * 50) == "75.0% (65.7 … 82.5)"


def test_a_j_above_what_any_policy_can_reach_fails_its_gate(tmp_path):
    """Three standard errors of J - J*, here 3 x hypot(0.03, 0.04) = 0.15, are allowed; a log of a
    run without a price of the KL has no J*."""
    (tmp_path / "rl").mkdir()
    fine = {"reward": 1.2, "kl": 1.0, "kl_error": 0.1, "length": 9.0, "ended": 1.0, "J_error": 0.03}
    start = fine | {"reward": 0.0, "kl": 0.0}
    best = {"best": 1.0, "best_error": 0.04}
    for J, passes in ((0.9, True), (1.14, True), (1.16, False)):
        rows = [{"step": i, "val": v | best | {"J": J}} for i, v in enumerate((start, fine))]
        (tmp_path / "rl/log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        lines, gates = judge.judge_rl(tmp_path, 0.3)
        gate, = (g for g in gates if g.what.startswith("J"))
        assert gate.value == J and (gate.low <= gate.value <= gate.high) == passes
        assert "J* = +1.00 (standard error 0.04)" in "\n".join(lines)
    (tmp_path / "rl/log.jsonl").write_text("".join(
        json.dumps({"step": i, "val": v}) + "\n" for i, v in enumerate((start, fine))))
    assert not any(g.what.startswith("J") for g in judge.judge_rl(tmp_path, 0.0)[1])


def last(path: Path, key: str) -> dict:
    """The last record of a log that has `key`."""
    return [r for r in map(json.loads, path.read_text().splitlines()) if key in r][-1]


def first(path: Path, key: str) -> dict:
    return next(r for r in map(json.loads, path.read_text().splitlines()) if key in r)


def stopped(command: list[str], stop: Callable[[int], None], **how) -> str:
    """What a demo says whose newest stage is stopped at its first step. `stop` gets our pid."""
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                          text=True, start_new_session=True, **how) as demo:
        said = ""
        for line in demo.stdout:
            said += line
            if line.startswith("val at step 0"):
                stop(demo.pid)
                break
        said += demo.stdout.read()
    assert demo.returncode == 130 and said.endswith("the same command goes on from there\n"), said
    return said


def term_the_stage(demo: int) -> None:
    """As `kill PID` does it: the demo itself hears nothing."""
    os.kill(int(Path(f"/proc/{demo}/task/{demo}/children").read_text()), signal.SIGTERM)


def test_the_ladder_is_climbed_in_small_and_the_same_command_goes_on(tmp_path):
    """All stages at a hundredth of their steps, stopped twice on the way: PT by Ctrl-C, which the
    whole group gets, and SFT by a SIGTERM of its own, after which it ends with exit code 0. Seen to
    fail when the demo took that for the end of the stage, and taught RM on half of it.
    Directions only: PT below the unigram entropy, SFT loss down, RM better than at its start, a DPO
    margin, a KL that is none below 0."""
    command = [sys.executable, "-m", "demo", f"--out_dir={tmp_path}", "--n_train=4000",
               "--share=0.01"]
    one_thread = os.environ | {"OMP_NUM_THREADS": "1"}  # as all tests: so few steps feel rounding
    said = stopped(command, lambda demo: os.killpg(demo, signal.SIGINT), env=one_thread)
    assert show(0) in said.partition("$ python")[0]
    step, = re.findall(r"stopped by SIGINT at step (\d+)", said)
    assert "train_sft.py" not in said
    if sys.platform == "linux":
        again = stopped(command, term_the_stage, env=one_thread)
        assert "stopped by SIGTERM at step" in again and "train_rm.py" not in again
        assert f"loaded {tmp_path}/pt/step{int(step):08d}-" in again
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900,
                          env=one_thread)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr
    assert "is up to date" in done.stdout and "demo.world" not in done.stdout
    assert f"loaded {tmp_path}/pt/step" in done.stdout and 0 < int(step) < 20
    other = subprocess.run([*command, "--seed=1"], cwd=ROOT, capture_output=True, text=True)
    assert other.returncode == 2 and "holds a demo with {'seed': 0, " in other.stderr
    text = (tmp_path / "report.md").read_text()
    rows = re.findall(r"^\| (en|zh|all) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|", text, re.M)
    assert [row[0] for row in rows] == ["en", "zh", "all"]
    for _, before, after, floor in rows:
        assert float(before) > float(after) > float(floor)
    for stage in ("PT", "SFT", "RM", "DPO", "RL"):
        assert f"| {stage} | " in text
    assert "J, no policy can exceed J*" in text
    assert ("![" in text) == bool(find_spec("matplotlib")) == (tmp_path / "curves.png").exists()
    assert all(text.count(f"    {stage}: ") == 10 for stage in (" pt", " sft", " dpo", "  rl"))
    ids = open_data(str(tmp_path / "data"))[1]["train"][0].ids
    share = np.bincount(ids) / len(ids)
    unigram = -(share[share > 0] * np.log(share[share > 0])).sum()
    assert last(tmp_path / "pt/log.jsonl", "val")["val"]["en"]["loss"] < unigram
    for stage, at in (("sft", lambda v: v["en"]), ("rm", lambda v: v["all"]["log_loss"])):
        log = tmp_path / stage / "log.jsonl"
        assert at(last(log, "val")["val"]) < at(first(log, "val")["val"])
    assert last(tmp_path / "dpo/log.jsonl", "val")["val"]["pairs"]["all"]["margin"] > 0
    end = last(tmp_path / "rl/log.jsonl", "val")["val"]
    assert end["kl"] >= -3 * end["kl_error"]

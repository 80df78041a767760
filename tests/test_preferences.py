"""RM, DPO and RL beyond their formulas: what is scored, what is kept, what is sampled."""
import json
import os
import re
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_stages import ALONE, settings
from torch.testing import assert_close

import train_dpo
import train_rl
import train_rm
from data import IGNORE, Order
from model import RewardModel
from plumbing import checkpoint, rewards
from plumbing.evaluation import row_logps
from plumbing.examples import (Row, Rows, load_examples, micro_batches, pad_right, pair_batch,
                               ranking_batch)
from plumbing.loading import load_model, load_reward_model
from plumbing.rewards import load_judge
from tokenizer import render

ROOT = Path(train_rm.__file__).parent


def last_val(out_dir) -> dict:
    rows = [json.loads(line) for line in open(os.path.join(out_dir, "log.jsonl"))]
    return [row["val"] for row in rows if "val" in row][-1]


@pytest.fixture(scope="module")
def few(tiny) -> str:
    """20 pairs."""
    path = tiny.folder / "few.jsonl"
    lines = open(tiny.pairs, encoding="utf-8").readlines()[:20]
    path.write_text("".join(lines), encoding="utf-8")
    return str(path)


@pytest.fixture(scope="module")
def reward(tiny, tmp_path_factory) -> str:
    out = str(tmp_path_factory.mktemp("rm"))
    train_rm.train(settings("rm", tiny, out, ""), ALONE)
    return out


# ---------------------------------------------------------------------------- reward model

def test_a_score_is_read_at_the_end_of_the_reply(tiny):
    """What stands behind it changes nothing, padding or not; what stands in front does."""
    torch.manual_seed(0)
    model = RewardModel(tiny.model)
    rows = [Row(list(range(40, 40 + n)), [1] * n) for n in (5, 9, 3)]
    idx, _, lengths = pad_right(rows, 0)
    scores = model(idx, lengths)
    for pad in (1, 250):
        longer = torch.cat((pad_right(rows, pad)[0], torch.full((3, 17), pad)), 1)
        assert_close(model(longer, lengths), scores, atol=1e-5, rtol=1e-5)
    alone = [model(torch.tensor([row.ids]), torch.tensor([len(row.ids)])) for row in rows]
    assert_close(torch.cat(alone), scores, atol=1e-5, rtol=1e-5)
    changed = idx.clone()
    changed[:, 0] += 1
    assert not torch.allclose(model(changed, lengths), scores, atol=1e-4)


def test_twenty_pairs_are_learnt_by_heart_and_scored_by_the_command(tiny, few, tmp_path):
    """Right on all of them, and the command prints what the model gives, pair by pair. A chat that
    is too long for the model has no score: that of its first turns was printed as if it were so."""
    cfg = settings("rm", tiny, tmp_path / "run", "", data=few, val_data=few, max_steps=60,
                   batch_pairs=20, batch_size=10, learning_rate=3e-3, eval_every=60, save_every=60)
    train_rm.train(cfg, ALONE)
    val = last_val(cfg.out_dir)["all"]
    assert val["accuracy"] == 1.0 and val["log_loss"] < 0.1
    done = subprocess.run([sys.executable, "train_rm.py", f"--init_from={cfg.out_dir}",
                           f"--score={few}"], cwd=ROOT, capture_output=True, text=True)
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert done.returncode == 0 and len(lines) == 20 and all(line["right"] for line in lines)
    gap = np.mean([line["chosen"] - line["rejected"] for line in lines])
    assert gap == pytest.approx(val["gap"], abs=1e-3)
    chats = subprocess.run([sys.executable, "train_rm.py", f"--init_from={cfg.out_dir}",
                            f"--score={tiny.chat}"], cwd=ROOT, capture_output=True, text=True)
    lengths = [len(render(tiny.tok, json.loads(line)["messages"])[0]) - 1  # less the last newline
               for line in open(tiny.chat, encoding="utf-8")]
    assert ['"normalised"' in line for line in chats.stdout.splitlines()] == [
        length <= 256 for length in lengths]
    wrong = subprocess.run([sys.executable, "train_rm.py", f"--init_from={tiny.pt}",
                            f"--score={few}"], cwd=ROOT, capture_output=True, text=True)
    assert wrong.returncode == 2 and "not a reward model" in wrong.stderr


def test_mean_and_deviation_are_those_of_sampled_replies(tiny, tmp_path):
    cfg = settings("rm", tiny, tmp_path / "run", "", norm_samples=12)
    train_rm.train(cfg, ALONE)
    model, _ = load_reward_model(cfg.out_dir, ALONE)
    assert float(model.std) > 1e-4 and float(model.mean) != 0.0
    assert not any(p.requires_grad for p in model.parameters()) and not model.training


def scored(folder: str, lines: list[dict], path: Path) -> subprocess.CompletedProcess:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return subprocess.run([sys.executable, "train_rm.py", f"--init_from={folder}",
                           f"--score={path}"], cwd=ROOT, capture_output=True, text=True)


def test_a_chat_that_does_not_fit_has_no_score(tiny, reward, tmp_path):
    """It was cut to the turns that fit, and their score was printed as that of the chat. Nor is a
    ranking scored by the replies that fit. stdout is JSON lines and nothing else: the settings
    stood before them."""
    turns = [{"role": "user", "content": "Where?"}, {"role": "assistant", "content": "Here."}]
    long = [{"role": "user", "content": "x" * 200}, {"role": "assistant", "content": "y" * 50}]
    done = scored(reward, [
        {"messages": turns}, {"messages": turns + long}, {"messages": long[1:]},
        {"messages": turns[:1] + [{"role": "assistant", "content": "z" * 300}]},
        {"prompt": turns[:1], "chosen": "Here.", "rejected": "There."},
        {"prompt": turns[:1], "chosen": "Here.", "rejected": "z" * 300},
        {"prompt": turns[:1], "ranking": ["a", "b", "a"]}], tmp_path / "lines.jsonl")
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 0 and len(lines) == 7 and "3 of them without" in done.stderr
    chat, cut_turn, short, cut_reply, pair, cut_pair, ranking = lines
    for line in (cut_turn, cut_reply, cut_pair):
        assert line["score"] is None and line["why"].startswith("too long: 3")
    assert short["score"] != chat["score"] == pair["chosen"]
    assert ranking["ranking"][0] == ranking["ranking"][2] and not ranking["right"]
    model, _ = load_reward_model(reward, ALONE)
    assert chat["normalised"] == pytest.approx(
        float((chat["score"] - model.mean) / model.std), abs=1e-3)


def test_a_wrong_line_ends_the_scoring_with_its_place(tiny, reward, tmp_path):
    path = tmp_path / "lines.jsonl"
    done = scored(reward, [{"messages": [{"role": "user", "content": "Where?"}]}], path)
    assert done.returncode == 2 and f"{path}:1:" in done.stderr and done.stdout == ""


def test_scores_may_go_to_a_reader_that_has_had_enough(tiny, reward):
    """`python train_rm.py --score=FILE | head` ended with a traceback."""
    writer = subprocess.Popen([sys.executable, "train_rm.py", f"--init_from={reward}",
                               f"--score={tiny.chat}"], cwd=ROOT, stdout=subprocess.PIPE,
                              stderr=subprocess.PIPE, text=True)
    writer.stdout.close()
    assert "rror" not in writer.stderr.read() and writer.wait() == 0


# ---------------------------------------------------------------------------- DPO

def test_rewards_are_measured_from_the_model_before_the_first_step(tiny, tmp_path):
    """Also by a run that was stopped and resumed: its reference is the model it began with, not the
    one it loaded. An oracle: beta (log P - log P_ref) with plain softmaxes of both models."""
    cfg = settings("dpo", tiny, tmp_path / "run", "")
    train_dpo.train(cfg, ALONE)
    checkpoint.list_checkpoints(cfg.out_dir)[0].unlink()
    train_dpo.train(replace(cfg, resume=True), ALONE)
    rows = load_examples(cfg.data, "pair", tiny.tok, 256, f"{cfg.out_dir}/data", 0.2)["val"]
    idx, targets, _ = pair_batch(rows, range(len(rows)))
    logps = []
    for where in (tiny.pt, cfg.out_dir):
        model, _ = load_model(where, torch.device("cpu"), torch.float32)
        with torch.no_grad():
            of_tokens = F.cross_entropy(model(idx).transpose(1, 2), targets, reduction="none")
        logps.append(-of_tokens.sum(1).view(2, -1).mean(1))
    chosen, rejected = cfg.beta * (logps[1] - logps[0])
    val = last_val(cfg.out_dir)["pairs"]["all"]
    assert abs(chosen) > 0.01
    assert val["chosen_reward"] == pytest.approx(float(chosen), abs=1e-5)
    assert val["rejected_reward"] == pytest.approx(float(rejected), abs=1e-5)
    first = json.loads(open(f"{cfg.out_dir}/log.jsonl").readline())["val"]["pairs"]["all"]
    assert first["margin"] == 0.0 and first["loss"] == pytest.approx(0.693147, abs=1e-6)


@pytest.mark.parametrize("answer_tokens, left_out", [(162, "some"), (256, "all")])
def test_prompts_without_room_for_an_answer_are_counted(tiny, tmp_path, capsys, answer_tokens,
                                                        left_out):
    """When no held-out prompt left room, DPO divided by the number of samples, 0; when some did
    not, nobody was told."""
    cfg = settings("dpo", tiny, tmp_path / "run", "", answer_tokens=answer_tokens, eval_samples=99)
    train_dpo.train(cfg, ALONE)
    said = re.search(r"(\d+) of (\d+) held-out prompts are not answered", capsys.readouterr().out)
    n, of = map(int, said.groups())
    assert 0 < n < of if left_out == "some" else n == of
    assert (last_val(cfg.out_dir)["samples"] == {}) == (left_out == "all")


@pytest.mark.parametrize("change", [dict(), dict(loss="ipo"), dict(loss="simpo", beta=2.0),
                                    dict(label_smoothing=0.1), dict(nll_coef=0.5)])
def test_every_loss_learns_twenty_pairs(tiny, few, tmp_path, change):
    cfg = settings("dpo", tiny, tmp_path / "run", "", data=few, val_data=few, max_steps=40,
                   batch_pairs=20, batch_size=10, learning_rate=2e-3, eval_every=40, save_every=40,
                   eval_samples=0, **change)
    train_dpo.train(cfg, ALONE)
    val = last_val(cfg.out_dir)["pairs"]["all"]
    assert val["accuracy"] == 1.0 and val["margin"] > 0.1


def test_warnings_of_dpo():
    def at(margin, logp, length=20.0, stops=1.0):
        return {"pairs": {"all": {"margin": margin, "chosen_logp": logp}},
                "samples": {"length": length, "stops": stops}}
    cfg = train_dpo.Config()
    start = at(0.0, -1.0)
    for now, words in ((at(0.01, -1.0), "margin does not grow"), (at(1.0, -1.4), "less likely"),
                       (at(1.0, -1.0, 40.0), "20 to 40 tokens"), (at(1.0, -1.0, 9.0), "20 to 9"),
                       (at(1.0, -1.0, 20.0, 0.9), "90%")):
        found = train_dpo.warnings(start, now, cfg, 50, 100)
        assert len(found) == 1 and words in found[0]
    assert not train_dpo.warnings(start, at(1.0, -0.9), cfg, 50, 100)


def test_a_step_takes_its_pairs_once_in_batches_of_like_length(tiny, tmp_path):
    rows = load_examples(tiny.pairs, "pair", tiny.tok, 256, str(tmp_path / "rows"))["train"]
    chosen = Order(len(rows), 0).take(0, 16)
    for world in (1, 2, 4):
        parts = [micro_batches(rows, chosen, 2, rank, world) for rank in range(world)]
        assert sorted(i for part in parts for some in part for i in some) == sorted(chosen)
        assert {len(part) for part in parts} == {8 // world}
    idx, targets, lengths = pair_batch(rows, chosen[:3])
    assert idx.shape[0] == targets.shape[0] == 6
    both = [rows.example(i) for i in chosen[:3]]
    assert lengths.tolist() == [len(pair[side].ids) for side in (0, 1) for pair in both]
    assert (targets != IGNORE).sum(1).tolist() == [sum(pair[side].mask)
                                                   for side in (0, 1) for pair in both]


# ---------------------------------------------------------------------------- RL

def prompts_of(tiny, folder) -> Rows:
    """Two short prompts."""
    path = folder / "two.jsonl"
    path.write_text('{"prompt": "abc"}\n{"prompt": "你好吗"}\n', encoding="utf-8")
    return load_examples(str(path), "prompt", tiny.tok, 200, str(folder / "two"))["train"]


def rolled(tiny, reward, **changes) -> tuple[train_rl.Rollout, train_rl.Config]:
    """Four replies to each of two prompts."""
    cfg = settings("rl", tiny, "unused", reward, **changes)
    model, _ = load_model(tiny.pt, torch.device("cpu"), torch.float32)
    return train_rl.roll_out(model, tiny.model, load_judge(cfg, tiny.tok, ALONE), tiny.tok.im_end,
                             cfg, ALONE, prompts_of(tiny, tiny.folder), [0] * 4 + [1] * 4,
                             list(range(8))), cfg


def test_sampling_and_training_agree_on_every_token(tiny, reward):
    """log P while writing with the cache, left-padded, and by a full pass, right-padded."""
    rollout, cfg = rolled(tiny, reward)
    assert len(rollout.rows) == 8 and rollout.figures["mismatch"].max() < 1e-4
    assert rollout.figures["kl"].abs().max() < 1e-4  # the reference is the policy itself
    for row, logps in zip(rollout.rows, rollout.logps):
        assert sum(row.mask) == (logps != 0).sum() <= cfg.answer_tokens
        assert tiny.tok.im_end not in row.ids[row.mask.index(1):-1]


def test_a_reply_does_not_depend_on_what_is_written_beside_it(tiny, reward):
    """Nor on how many are written at once: two processes then write what one writes."""
    replies = [[row.ids for row in rolled(tiny, reward, rollout_size=n)[0].rows] for n in (1, 3, 8)]
    assert replies[0] == replies[1] == replies[2]
    assert len({tuple(ids) for ids in replies[0][:4]}) > 1  # a group has several replies


def test_a_reply_that_does_not_end_is_the_worst_of_its_step(tiny, reward):
    rollout, cfg = rolled(tiny, reward, answer_tokens=3)
    judge, _ = load_reward_model(reward, ALONE)
    ended = torch.tensor([row.ids[-1] == tiny.tok.im_end for row in rollout.rows])
    figures = rollout.figures
    normed = ((figures["raw"] - judge.mean) / judge.std).clamp(-5, 5)
    assert not ended.all()
    assert_close(figures["reward"][~ended], (normed.min() - 1).expand(int((~ended).sum())))
    assert_close(figures["reward"][ended], normed[ended])
    assert_close(rollout.R, figures["reward"] - cfg.beta * figures["kl"])


def test_a_validation_has_the_j_that_is_learnt_from(tiny, reward, tmp_path):
    """It left out what not ending costs: J rose while fewer and fewer replies ended."""
    cfg = settings("rl", tiny, tmp_path, reward, answer_tokens=3, eval_prompts=6)
    judge, _ = load_reward_model(reward, ALONE)
    val = load_examples(cfg.data, "prompt", tiny.tok, 200, str(tmp_path / "rows"))["train"]
    roll = partial(train_rl.roll_out, tiny.model, tiny.model, load_judge(cfg, tiny.tok, ALONE),
                   tiny.tok.im_end, cfg, ALONE)
    found, rewards = train_rl.evaluate(roll, val, tiny.tok, cfg)
    assert found["ended"] < 1 and len(rewards) == 6
    assert found["J"] == pytest.approx(float(rewards.mean()) - cfg.beta * found["kl"], abs=1e-6)
    assert found["reward"] < (found["raw"] - float(judge.mean)) / float(judge.std) - 0.1


def test_the_clip_is_counted_where_it_changes_a_loss(tiny, reward):
    """Never in the first update. After the policy has moved, for the replies whose ratio has left
    the range on the side that their advantage asks for."""
    rollout, cfg = rolled(tiny, reward, eps_low=0.01, eps_high=0.02)
    model, _ = load_model(tiny.pt, torch.device("cpu"), torch.float32)
    A = torch.tensor([1.0, -1.0] * 4)

    def losses(first=False, **change):
        return train_rl.reply_losses(model, model, rollout, A, list(range(8)),
                                     replace(cfg, **change), ALONE, first)
    for kind in ("rloo", "grpo"):
        loss, clipped = losses(advantage=kind)
        assert_close(loss, -A, atol=1e-4, rtol=0)
        assert not clipped.any()
    with torch.no_grad():
        model.norm.weight *= 1.05
    logps = row_logps(model, rollout.rows, 8, ALONE)
    ratio = (logps - rollout.logps).sum(1).exp()
    want = torch.where(A > 0, ratio > 1.02, ratio < 0.99)
    assert 0 < want.sum() < 8 and torch.equal(losses()[1], want)
    loss, clipped = losses(first=True)  # as if these weights had written the replies
    assert torch.equal(loss, -A) and not clipped.any()


def test_reference_and_reward_model_stay_as_they_are(tiny, reward, tmp_path, monkeypatch):
    held = []
    roll_out = train_rl.roll_out

    def watched(model, reference, judge, *rest):
        held[:] = [reference, judge.model]
        return roll_out(model, reference, judge, *rest)
    monkeypatch.setattr(train_rl, "roll_out", watched)
    train_rl.train(settings("rl", tiny, tmp_path / "run", reward), ALONE)
    for model, where in zip(held, (tiny.pt, reward)):
        state = checkpoint.load(where)[0]["model"]
        assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items() if k in state)
        assert all(p.grad is None and not p.requires_grad for p in model.parameters())


def test_operations_are_those_of_texts_as_long_as_there_are(tiny, reward, tmp_path, monkeypatch):
    """They were counted for texts as long as the model can read, 8,192 tokens: MFU was 164 %."""
    lengths = []
    monkeypatch.setattr(train_rl, "flops_per_token", lambda config, length, **more: (
        lengths.append(length), 1)[1])
    cfg = settings("rl", tiny, tmp_path / "run", reward, max_steps=2)
    train_rl.train(cfg, ALONE)
    assert 0 < lengths[0] - cfg.answer_tokens < 120 < tiny.model.config.max_seq_len


@pytest.mark.parametrize("change", [dict(advantage="grpo"), dict(advantage="grpo_mean"),
                                    dict(updates_per_rollout=2, learning_rate=1e-2)])
def test_the_other_ways_run_and_are_finite(tiny, reward, tmp_path, change):
    cfg = settings("rl", tiny, tmp_path / "run", reward, **change)
    train_rl.train(cfg, ALONE)
    rows = [json.loads(line) for line in open(f"{cfg.out_dir}/log.jsonl")]
    steps = [row for row in rows if "loss" in row]
    assert len(steps) == 4 and all(np.isfinite(row["loss"]) for row in steps)
    assert all(0 <= row["clipped"] <= 1 and 0 <= row["equal"] <= 1 for row in steps)


def test_replies_learn_to_end(tiny, reward, tmp_path, monkeypatch):
    """With equal scores for all, the price of not ending is all there is to learn."""
    monkeypatch.setattr(rewards, "row_scores", lambda judge, rows, *rest: torch.zeros(len(rows)))
    cfg = settings("rl", tiny, tmp_path / "run", reward, max_steps=40, learning_rate=3e-3, beta=0.0,
                   prompts_per_step=8, group=8, batch_size=64, rollout_size=64, eval_every=40,
                   save_every=40, eval_prompts=16)
    train_rl.train(cfg, ALONE)
    rows = [json.loads(line) for line in open(f"{cfg.out_dir}/log.jsonl")]
    ended = [row["ended"] for row in rows if "loss" in row]
    assert np.mean(ended[:3]) < 0.2 and np.mean(ended[-5:]) > 0.9


def test_warnings_of_rl():
    fine = {"kl": 0.5, "kl_error": 0.1, "ended": 1.0, "length": 20.0}
    mean = {"mismatch": 0.0, "equal": 0.2}
    assert not train_rl.rl_warnings(fine, fine, mean, 1.0, ALONE)
    assert not train_rl.rl_warnings(fine, fine | {"J": 1.3, "J_error": 0.03, "best": 1.2,
                                               "best_error": 0.04}, mean, 1.0, ALONE)
    for now, seen, words in (({"kl": 1.5}, mean, "over the budget"),
                             ({"kl": -0.4}, mean, "below 0"), ({"ended": 0.9}, mean, "90%"),
                             ({"length": 5.0}, mean, "20 to 5"),
                             ({"J": 1.4, "J_error": 0.03, "best": 1.2, "best_error": 0.04}, mean,
                              "J 1.40 is over the 1.20"),
                             ({}, mean | {"mismatch": 0.1}, "disagree"),
                             ({}, mean | {"equal": 0.6}, "60% of the groups")):
        found = train_rl.rl_warnings(fine, fine | now, seen, 1.0, ALONE)
        assert len(found) == 1 and words in found[0]


def test_a_ranking_is_scored_once_and_counts_as_the_mean_of_its_pairs(tiny, tmp_path):
    """Three replies: three pairs of a third each, from three rows instead of six; a pair is a
    ranking of two; a reply that occurs twice is dropped and counted."""
    prompt = [{"role": "user", "content": "q"}]
    records = [{"prompt": prompt, "ranking": ["best", "so so", "worst"], "margin": 0.5},
               {"prompt": prompt, "chosen": "yes", "rejected": "no"},
               {"prompt": prompt, "ranking": ["a", "b", "a"]}]
    path = tmp_path / "x.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    rows = load_examples(str(path), "ranking", tiny.tok, 64, str(tmp_path / "r"))["train"]
    pairs = load_examples(str(path), "pair", tiny.tok, 64, str(tmp_path / "p"))["train"]
    assert [len(rows.example(i)) for i in range(len(rows))] == [3, 2, 2] and len(pairs) == 3 + 1 + 2
    idx, lengths, (better, worse), margin, share = ranking_batch(rows, [0, 1, 2])
    assert idx.shape[0] == 7 and better.tolist() == [0, 0, 1, 3, 5]
    assert worse.tolist() == [1, 2, 2, 4, 6] and margin.tolist() == [0.5] * 3 + [0, 0]
    assert share.tolist() == pytest.approx([1 / 3] * 3 + [1, 1])
    assert rows.shortest_first().tolist() == [2, 1, 0]
    scores = torch.randn(7, generator=torch.Generator().manual_seed(0))
    loss = (share * train_rm.rm_loss(scores[better], scores[worse], margin, 0.01)).sum()
    want = sum(train_rm.rm_loss(scores[[a]], scores[[b]], torch.tensor([m]), 0.01).item() / n
               for a, b, m, n in ((0, 1, .5, 3), (0, 2, .5, 3), (1, 2, .5, 3), (3, 4, 0, 1),
                                  (5, 6, 0, 1)))
    assert loss.item() == pytest.approx(want, rel=1e-6)


def test_a_curriculum_draws_alike_from_the_shorter_examples_and_lets_all_in_at_last():
    shortest = np.arange(100)[::-1]
    drawn = list(range(100))
    for progress, share in ((0.0, 0.1), (0.05, 0.1), (0.5, 0.5), (1.0, 1.0)):
        got = train_rm.easy_first(drawn, shortest, progress)
        let_in = shortest[:round(100 * share)].tolist() if share < 1 else drawn
        assert set(got) == set(let_in)
        assert max(Counter(got).values()) == round(1 / share)

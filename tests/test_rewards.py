"""Rewards that can be checked: a Python file judges the replies of train_rl.py."""
import ast
import json
import re
import subprocess
import sys
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from test_stages import ALONE, losses, settings

import train_rl
from demo import sums
from plumbing import checkpoint
from plumbing.configfile import run_config
from plumbing.examples import Row, load_examples
from plumbing.rewards import FileReward, load_judge, pass_at, pass_rates, that_teach
from tokenizer import render

CONFIG = Path(train_rl.__file__).parent / "config"
# the likelier a letter of "e" is in a reply, the better it is: a random model can learn that
LETTERS = """def reward(prompt, reply, record):
    assert prompt[-1]["role"] == "user" and record["lang"] in ("en", "zh")
    return reply.count("e") / 10

def passes(prompt, reply, record):
    return "e" in reply
"""


def write(path: Path, text: str) -> str:
    path.write_text(text, encoding="utf-8")
    return str(path)


def asked(file: str) -> SimpleNamespace:
    """The functions of a reward file."""
    return SimpleNamespace(**{k: v for k, (v, _) in run_config(str(CONFIG / file)).items()
                              if k in ("reward", "passes")})


def example(file: str) -> dict:
    """The row in its docstring."""
    text = ast.get_docstring(ast.parse((CONFIG / file).read_text(encoding="utf-8")))
    return json.loads(re.search(r"^ {4}(\{.*?\})$", text, re.S | re.M)[1])


# ---------------------------------------------------------------------------- pass@k

def test_pass_at_k_is_the_mean_over_all_ways_to_draw_k():
    """Against brute force: draw every k of the n replies and see whether one passes. Seen to fail
    with 1 - (1 - c / n)^k, which draws a reply twice."""
    passed = torch.tensor([[1, 0, 0, 0, 0], [0, 0, 0, 0, 0], [1, 1, 0, 1, 0], [1, 1, 1, 1, 1]])
    for k in range(1, 6):
        drawn = [any(some) for row in passed.tolist() for some in combinations(row, k)]
        assert pass_at(k, passed) == pytest.approx(sum(drawn) / len(drawn), abs=1e-12)
    assert pass_rates({"passed": passed}) == {f"pass@{k}": pass_at(k, passed) for k in (1, 2, 4, 5)}
    assert pass_rates({"kl": passed}) == {}


# ---------------------------------------------------------------------------- the shipped files

@pytest.mark.parametrize("reply, answer, want", [
    ("68", "68", 1), ("20+40=60, 3+5=8: 68.", "68", 1), ("68.0", 68, 1), ("68, not 67", "68", 0),
    ("等于68。", "68", 1), ("It costs $1,068.", "1068", 1), ("1068", "1,068", 1), ("-3", "3", 0),
    ("", "68", 0), ("sixty", "68", 0), ("COVID-19", "19", 1), ("pages 5-10", "10", 1),
    ("等于-3", "-3", 1), ("x = −3", "-3", 1), ("１８", "18", 1), ("1,2,3", "3", 1),
    ("0.00001", 0.00001, 1), ("9007199254740992", "9007199254740993", 0),
    ("1e9999999999999999999", "5", 0), ("9" * 400, "8" * 400, 0)])
def test_the_last_number_of_a_reply_is_its_answer(reply, answer, want):
    assert asked("reward_numbers.py").reward([], reply, {"answer": answer}) == want


def test_a_reply_has_the_form_that_is_asked_for():
    reward = asked("reward_format.py").reward
    assert reward([], "Answer: 68", {"pattern": r"Answer: \d+"}) == 1
    assert reward([], "So: Answer: 68", {"pattern": r"Answer: \d+"}) == 0  # all of it must match
    assert [reward([], text, {}) for text in ("It is 68.", "是68。", "68", "a\nb.")] == [1, 1, 0, 0]


@pytest.mark.parametrize("reply, want, passes", [
    ("17 [2]", 1.25, True), ("17 [2].", 1.25, True), ("17", 1.0, False), ("17 [1]", 1.0, False),
    ("is 17 [1]", 2 / 3, False), ("18 [2]", -0.25, False), ("17 [1] [2]", 1.0, False),
    ("Not found in the documents.", -1, False), ("seventeen [2]", 1.25, True),
    ("[2]", -0.25, False), ("How old is Ben? [2]", -0.25, False), ("", -0.5, False)])
def test_a_reader_answers_cites_and_invents_nothing(reply, want, passes):
    """The row of its docstring: F1, a quarter for the citation, minus a half for what stands in no
    source."""
    row = example("reward_reader.py")
    file = asked("reward_reader.py")
    assert file.reward(row["prompt"], reply, row) == pytest.approx(want)
    assert file.passes(row["prompt"], reply, row) == passes


def test_a_reader_refuses_where_there_is_no_answer():
    file = asked("reward_reader.py")
    for lang, refusal in (("en", "Not found in the documents."), ("zh", "资料中没有找到答案。")):
        row = {"answers": [], "lang": lang}
        assert (file.reward([], refusal, row), file.reward([], "17 [2]", row)) == (1, -1)
        assert file.passes([], refusal, row) and not file.passes([], "17 [2]", row)


# ---------------------------------------------------------------------------- a user's mistakes

@pytest.mark.parametrize("body, line, words", [
    ("return record['answr']", 3, "KeyError: 'answr'"), ("return None", 1, "gave None, wanted a"),
    ("return 'yes'", 1, "gave 'yes'"), ("return float('nan')", 1, "gave nan"),
    ("return 1e400", 1, "gave inf"), ("return 1 / 0", 3, "ZeroDivisionError"),
    ("return int('x')", 3, "ValueError: invalid literal"), ("exit(0)", 3, "SystemExit: 0")])
def test_a_mistake_is_one_line_with_file_line_and_row(tiny, tmp_path, body, line, words):
    path = write(tmp_path / "r.py", f"def reward(prompt, reply, record):\n    x = 1\n    {body}\n")
    judge = FileReward(path, tiny.tok, 2)
    row = Row([65, tiny.tok.im_end], [0, 1])
    with pytest.raises(ValueError) as error:
        judge([row], ['{"prompt": "q", "answer": "\\u5341"}'], torch.tensor([True]))
    assert f"{error.value}".startswith(f"{path}:{line}: reward")
    assert words in f"{error.value}" and "\n" not in f"{error.value}"
    assert """the row {"prompt": "q", "answer": "十"}""" in f"{error.value}"


def test_a_file_without_the_function_or_with_another_shape_is_refused(tiny, tmp_path, capsys):
    for text in ("x = 1\n", "reward = 3\n"):
        with pytest.raises(ValueError, match="r.py: has no function reward"):
            FileReward(write(tmp_path / "r.py", text), tiny.tok, 2)
    with pytest.raises(ValueError, match="r.py:1: reward: TypeError: .* takes 1 positional"):
        FileReward(write(tmp_path / "r.py", "def reward(reply): return 1\n"), tiny.tok, 2).ask(
            "reward", "", '{"prompt": "q"}')
    with pytest.raises(ValueError, match="gone.py: no such file"):
        FileReward(str(tmp_path / "gone.py"), tiny.tok, 2)
    with pytest.raises(SystemExit) as stop:
        FileReward(write(tmp_path / "r.py", "def reward(:\n"), tiny.tok, 2)
    assert stop.value.code == 2 and "r.py:1: SyntaxError" in capsys.readouterr().err


# ---------------------------------------------------------------------------- the file as a judge

def test_the_file_reads_messages_text_and_the_whole_row(tiny, tmp_path):
    """Also what the chat template has no place for, in the order of the rows, after a part of them
    was held out; a null is no field. True counts as 1. What has not ended has not passed."""
    lines = [{"prompt": f"q{i}", "answer": i, "more": {"a": [i, "\ud800\n"]}} for i in range(50)]
    data = write(tmp_path / "d.jsonl", "".join(json.dumps(x | {"no": None}) + "\n" for x in lines))
    splits = load_examples(data, "prompt", tiny.tok, 200, str(tmp_path / "rows"), 0.3)
    seen = {"train": [], "val": []}
    for split, rows in splits.items():
        for i in range(len(rows)):
            record = json.loads(rows.record(i))
            seen[split].append(record["answer"])
            asked = [{"role": "user", "content": record["prompt"]}]
            assert rows.example(i)[0].ids == render(tiny.tok, asked, add_generation_prompt=True)[0]
            assert record == lines[record["answer"]]
    assert sorted(seen["train"] + seen["val"]) == list(range(50)) and min(map(len, seen.values()))
    path = write(tmp_path / "r.py", """def reward(prompt, reply, record):
    assert prompt == [{"role": "user", "content": "q7"}]
    return reply == "A" and record["more"]["a"][0] == 7
""")
    replies = [[65, tiny.tok.im_end], [66, tiny.tok.im_end], [65]]
    raw, r, passed = FileReward(path, tiny.tok, 2)(
        [Row([1, *ids], [0] + [1] * len(ids)) for ids in replies], [json.dumps(lines[7])] * 3,
        torch.tensor([True, True, False]))
    assert raw.tolist() == r.tolist() == [1, 0, 1] and passed["passed"].tolist() == [1, 0, 0]


def test_a_reply_that_does_not_end_is_judged_and_pays(tiny, tmp_path):
    """The function sees its text; r is 1 less than the least of its step, as with a reward model,
    and is neither shifted nor clipped."""
    path = write(tmp_path / "r.py", "def reward(prompt, reply, record): return 40 + len(reply)\n")
    cfg = settings("rl", tiny, "unused", path, answer_tokens=8)
    val = load_examples(cfg.data, "prompt", tiny.tok, 200, str(tmp_path / "rows"))["train"]
    rollout = train_rl.roll_out(tiny.model, tiny.model, load_judge(cfg, tiny.tok, ALONE),
                                tiny.tok.im_end, cfg, ALONE, val, [0] * 200, list(range(200)))
    figures, ended = rollout.figures, rollout.figures["ended"].bool()
    assert 0 < ended.sum() < 200 and figures["raw"].min() >= 40
    assert torch.equal(figures["reward"][ended], figures["raw"][ended])
    assert set(figures["reward"][~ended].tolist()) == {float(figures["raw"].min()) - 1}
    assert torch.equal(figures["passed"].bool(), ended)


def test_rows_without_an_advantage_are_left_out():
    """Whole batches of them; of the last one they fill up what is free."""
    rows = [Row([0] * n, [1] * n) for n in (5, 3, 4, 2, 6, 1)]
    A = torch.tensor([1.0, 0, -1, 0, 2, 0])
    assert that_teach(A, rows, 2, ALONE) == [[2, 0], [4, 5]]
    assert that_teach(A * 0, rows, 2, ALONE) == []
    assert that_teach(A * 0 + 1, rows, 3, ALONE) == [[5, 3, 1], [2, 0, 4]]


def test_equal_rewards_cost_no_update_and_are_counted(tiny, tmp_path, monkeypatch):
    """Where the policy has left the reference, the KL gives each reply another R. GRPO would divide
    these by their deviation, and make updates of full size out of nothing. The weights stay as they
    are to the last bit. Seen to fail with the advantages as they are."""
    roll_out = train_rl.roll_out

    def far(*given):
        rollout = roll_out(*given)
        rollout.R = rollout.R + torch.linspace(0, 0.01, len(rollout.R))
        return rollout
    monkeypatch.setattr(train_rl, "roll_out", far)
    path = write(tmp_path / "r.py", "def reward(prompt, reply, record):\n    return 2\n")
    cfg = settings("rl", tiny, tmp_path / "run", path, advantage="grpo", beta=0.3, answer_tokens=1)
    train_rl.train(cfg, ALONE)
    rows = [json.loads(line) for line in open(f"{cfg.out_dir}/log.jsonl")]
    steps = [row for row in rows if "loss" in row]
    assert len(steps) == 4 and {(row["norm"], row["equal"]) for row in steps} == {(0.0, 1.0)}
    start, end = (checkpoint.load(where)[0]["model"] for where in (tiny.pt, cfg.out_dir))
    assert all(torch.equal(start[k], end[k]) for k in start)


@pytest.mark.parametrize("advantage", ["rloo", "grpo"])
def test_a_bandit_finds_the_rewarded_reply(tiny, tmp_path, advantage):
    """One prompt, one token to say: the best policy says the token that is rewarded, and pass@1
    goes to 1. Its KL is then -log of the chance that it had at first. Seen to fail with the reward
    negated."""
    (tmp_path / "d.jsonl").write_text('{"prompt": "q"}\n{"prompt": "q"}\n')
    # random weights say <|im_end|> now and then: an empty reply is the one that ends
    path = write(tmp_path / "r.py", "def reward(prompt, reply, record):\n    return reply == ''\n")
    cfg = settings("rl", tiny, tmp_path / "run", path, data=str(tmp_path / "d.jsonl"),
                   val_data=str(tmp_path / "d.jsonl"), advantage=advantage, beta=0.0, group=32,
                   prompts_per_step=2, batch_size=64, rollout_size=64, answer_tokens=1,
                   max_steps=25, learning_rate=1e-2, eval_every=25, save_every=25, eval_prompts=2)
    train_rl.train(cfg, ALONE)
    first, last = (json.loads(line)["val"] for line in open(f"{cfg.out_dir}/log.jsonl")
                   if '"val"' in line)
    assert first["pass@1"] < 0.3 and last["pass@1"] > 0.95 and last["pass@32"] == 1
    assert last["kl"] > 1


def test_a_run_resumes_to_the_last_bit_and_knows_its_file(tiny, tmp_path, capsys):
    path = write(tmp_path / "r.py", LETTERS)
    whole = settings("rl", tiny, tmp_path / "whole", path)
    train_rl.train(whole, ALONE)
    assert ", pass@1 " in capsys.readouterr().out
    part = replace(whole, out_dir=str(tmp_path / "part"))
    train_rl.train(part, ALONE)
    checkpoint.list_checkpoints(part.out_dir)[0].unlink()
    train_rl.train(replace(part, resume=True), ALONE)
    assert len(losses(whole.out_dir)) == 4 and losses(whole.out_dir) == losses(part.out_dir)
    assert "WARNING: the training data" not in capsys.readouterr().out
    write(tmp_path / "r.py", LETTERS + "# changed\n")
    train_rl.train(replace(part, resume=True), ALONE)
    assert "the training data, the reference or the reward is not what" in capsys.readouterr().out


def test_the_sums_are_made_as_the_demo_says(tmp_path):
    """No two numbers of a validation are together in a file to train on, in neither order. Four of
    ten chats carry, and of the control's answers about one in a hundred is right."""
    sums.make(tmp_path / "data", 0)
    rows = {path.stem: [json.loads(line) for line in open(path)]
            for path in (tmp_path / "data").glob("*.jsonl")}

    def pairs(name: str) -> set[frozenset[int]]:
        text = "\n".join(row.get("text") or (row.get("prompt") or row["messages"])[0]["content"]
                         for row in rows[name])
        return {frozenset(map(int, two)) for two in re.findall(r"(\d+)(?:\+|加)(\d+)", text)}
    held = pairs("prompts_heldout") | pairs("chat_heldout")
    assert len(held) > 250 and not held & (pairs("pt") | pairs("chat") | pairs("prompts"))
    assert len(pairs("pt")) > 3900
    right = [int(row["messages"][1]["content"]) == sum(map(int, re.findall(
        r"\d+", row["messages"][0]["content"]))) for row in rows["chat"]]
    assert 0.38 < sum(right) / len(right) < 0.42
    assert [row["prompt"] for row in rows["prompts"]] == [row["prompt"] for row in rows["shuffled"]]
    same = [a["answer"] == b["answer"] for a, b in zip(rows["prompts"], rows["shuffled"])]
    assert 0.005 < sum(same) / len(same) < 0.02


def test_the_sums_go_on_where_they_were_stopped(tmp_path, monkeypatch, capsys):
    """A stage that a signal ended was taken for a whole one; after Ctrl-C "the same command goes
    on" was refused."""
    monkeypatch.setattr(sums, "run", lambda *_: None)
    monkeypatch.chdir(tmp_path)
    for seed, code in ((0, 130), (0, 130), (1, 2)):
        monkeypatch.setattr(sys, "argv", ["demo.sums", f"--out_dir={tmp_path}/out",
                                          f"--seed={seed}"])
        with pytest.raises(SystemExit) as stopped:
            sums.main()
        assert stopped.value.code == code
    said = capsys.readouterr()
    assert said.out.count("the same command goes on") == 2 and "another --out_dir" in said.err


@pytest.mark.slow
def test_the_demo_of_sums_runs_and_says_what_it_missed(tmp_path):
    """With 2 steps of RL nothing is learnt, and that is said, with exit code 1."""
    done = subprocess.run(
        [sys.executable, "-m", "demo.sums", f"--out_dir={tmp_path}/out", "--pt_steps=2",
         "--sft_steps=2", "--rl_steps=2"], cwd=CONFIG.parent, capture_output=True, text=True)
    assert done.returncode == 1, done.stderr[-2000:]
    assert "| control | 0.0% |" in done.stdout and "MISSED: RL raises pass@1" in done.stdout

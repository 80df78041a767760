"""What SFT, RM, DPO and RL have in common: resume, processes, kinds of checkpoint, mistakes."""
import json
import os
import re
import signal
import sys
import textwrap
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
import torch._dynamo  # noqa: F401, once instead of in every child
from lab import Run, places

import configurator
import train_dpo
import train_pt
import train_rl
import train_rm
import train_sft
from plumbing import checkpoint, runtime, sharding, terminal
from plumbing.loading import load_model

ROOT = Path(train_sft.__file__).parent
forks = pytest.mark.skipif(sys.platform != "linux", reason="forks as Linux does")
ALONE = runtime.Dist(0, 1, torch.device("cpu"), torch.float32)
SCRIPTS = {"sft": train_sft, "rm": train_rm, "dpo": train_dpo, "rl": train_rl}
SHORT = dict(max_steps=4, warmup_steps=1, eval_every=2, save_every=2, log_every=2,
             learning_rate=1e-3, answer_tokens=8)
OF_STAGE = {
    "sft": dict(max_len=128, batch_tokens=1024, batch_size=2, eval_answers=2, val_fraction=0.2),
    "rm": dict(batch_pairs=8, batch_size=2, norm_samples=4, val_fraction=0.2),
    "dpo": dict(batch_pairs=8, batch_size=2, eval_samples=4, val_fraction=0.2),
    "rl": dict(prompts_per_step=4, group=4, batch_size=4, eval_prompts=4, val_fraction=0.2,
               rollout_size=5, seed=1)}  # with seed 0 no reply ends, and no reward differs


@pytest.fixture(scope="module")
def reward(tiny, tmp_path_factory) -> str:
    out = str(tmp_path_factory.mktemp("reward"))
    train_rm.train(settings("rm", tiny, out, ""), ALONE)
    return out


def settings(stage, tiny, out_dir, reward, **changes):
    files = {"sft": tiny.chat, "rm": tiny.pairs, "dpo": tiny.pairs, "rl": tiny.prompts}
    base = SCRIPTS[stage].Config(init_from=tiny.pt, data=files[stage], out_dir=str(out_dir))
    more = {"reward_from": reward} if stage == "rl" else {}
    return replace(base, **SHORT | OF_STAGE[stage] | more | changes)


def losses(out_dir) -> list[str]:
    rows = [json.loads(line) for line in open(os.path.join(out_dir, "log.jsonl"))]
    return [row["loss"].hex() for row in rows if "loss" in row]


@pytest.mark.parametrize("stage", SCRIPTS)
def test_a_stage_resumes_to_the_last_bit(stage, tiny, reward, tmp_path):
    """Stopped behind step 2, as if killed before step 4 was saved: the same losses and weights."""
    whole = settings(stage, tiny, tmp_path / "whole", reward)
    SCRIPTS[stage].train(whole, ALONE)
    part = replace(whole, out_dir=str(tmp_path / "part"))
    SCRIPTS[stage].train(part, ALONE)
    checkpoint.list_checkpoints(part.out_dir)[0].unlink()
    SCRIPTS[stage].train(replace(part, resume=True), ALONE)
    assert len(losses(whole.out_dir)) == 4 and losses(whole.out_dir) == losses(part.out_dir)
    a, b = (checkpoint.load(c.out_dir)[0] for c in (whole, part))
    assert a["kind"] == stage and a["step"] == b["step"] == 4
    assert all(torch.equal(a["model"][k], b["model"][k]) for k in a["model"])
    start = checkpoint.load(tiny.pt)[0]["model"]
    moved = [k for k in start if not torch.equal(
        start[k], a["model"]["backbone." + k if stage == "rm" else k])]
    assert len(moved) >= len(start) - 1  # all but perhaps a head that has no part


def command(cfg) -> list[str]:
    return [f"--{f.name}={getattr(cfg, f.name)}" for f in fields(cfg)
            if getattr(cfg, f.name) != f.default]


@forks
@pytest.mark.parametrize("stage", SCRIPTS)
def test_two_processes_are_one(stage, tiny, reward, tmp_path):
    """The same global batch: losses to 1e-5, with gloo; what is sampled, too. As torchrun would
    start them, without its own import of torch."""
    cfg = settings(stage, tiny, tmp_path / "one", reward, max_steps=2)
    SCRIPTS[stage].train(cfg, ALONE)
    two = replace(cfg, out_dir=str(tmp_path / "two"))
    ranks = [Run(f"train_{stage}", command(two), tmp_path / place["RANK"], **place)
             for place in places(2)]
    assert [rank.wait() for rank in ranks] == [0, 0], "".join(rank.text for rank in ranks)[-2000:]
    one, both = ([float.fromhex(x) for x in losses(c.out_dir)] for c in (cfg, two))
    assert len(one) == 2 and both == pytest.approx(one, rel=1e-5, abs=1e-7)


def test_blocks_that_are_the_same_on_purpose_are_the_same():
    """Every marked block of a name, in whatever script and however deep."""
    found: dict[str, set[str]] = {}
    uses: dict[str, int] = {}
    for path in sorted(ROOT.glob("train_*.py")):
        text = path.read_text()
        blocks = re.findall(r"^ *# same in every train_\*\.py: (.*)\n((?s:.*?))^ *# end same$",
                            text, re.M)
        assert len(blocks) == text.count("# same in every") == text.count("# end same")
        for name, block in blocks:
            found.setdefault(name, set()).add(textwrap.dedent(block))
            uses[name] = uses.get(name, 0) + 1
    assert {name: len(texts) for name, texts in found.items()} == dict.fromkeys(found, 1)
    assert uses.keys() >= {"save", "step"} and min(uses.values()) >= 4


@pytest.mark.parametrize("stage", ["sft", "dpo", "rl"])
def test_a_reward_model_is_no_policy(stage, tiny, reward, tmp_path):
    cfg = settings(stage, tiny, tmp_path / "run", reward, init_from=reward)
    with pytest.raises(ValueError, match="a reward model gives scores, it cannot write"):
        SCRIPTS[stage].train(cfg, ALONE)


def test_a_policy_is_no_reward_model(tiny, tmp_path):
    with pytest.raises(ValueError, match="not a reward model, but of stage pt; train_rm.py makes"):
        train_rl.train(settings("rl", tiny, tmp_path / "run", tiny.pt), ALONE)


@pytest.mark.parametrize("stage", SCRIPTS)
def test_runs_are_not_mixed(stage, tiny, reward, tmp_path):
    cfg = settings(stage, tiny, tmp_path / "run", reward, max_steps=2)
    checkpoint.save(cfg.out_dir, 1, checkpoint.load(tiny.pt)[0])
    with pytest.raises(ValueError, match="holds a run already"):
        SCRIPTS[stage].train(cfg, ALONE)
    with pytest.raises(ValueError, match=f"of stage pt, not of {stage}"):
        SCRIPTS[stage].train(replace(cfg, resume=True), ALONE)


def test_another_tokenizer_is_refused(tiny, reward, tmp_path):
    """Its ids would mean other text."""
    from tokenizer import HAN_PATTERN, dump
    state = dict(checkpoint.load(tiny.pt)[0])
    tokens = [bytes([i]) for i in range(255, -1, -1)]
    state["tokenizer"] = dump(tokens, HAN_PATTERN)
    checkpoint.save(str(tmp_path / "other"), 0, state)
    cfg = settings("rl", tiny, tmp_path / "run", reward, init_from=str(tmp_path / "other"))
    with pytest.raises(ValueError, match="made with another tokenizer"):
        train_rl.train(cfg, ALONE)


@pytest.mark.parametrize("stage, change, message", [
    ("rm", dict(batch_pairs=7), "must be a multiple of batch_size"),
    ("rm", dict(val_fraction=0.0), "no pair fell into the held-out part"),
    ("rm", dict(val_fraction=1.0), "no example to train on"),
    ("rm", dict(warmup_steps=9), "less than the 4 steps"),
    ("rm", dict(max_len=20), "rankings dropped: too long: 120"),
    ("rm", dict(max_len=300), "max_len 300 is more than the 256 tokens"),
    ("rm", dict(answer_tokens=256), "must leave room for a reply"),
    ("dpo", dict(loss="ipo", label_smoothing=0.1), "means nothing with loss ipo"),
    ("dpo", dict(loss="simpo", label_smoothing=0.1), "means nothing with loss simpo"),
    ("dpo", dict(label_smoothing=0.5), "must be less than 0.5"),
    ("dpo", dict(max_len=20), "pairs dropped: too long: 120"),
    ("rl", dict(batch_size=3), "must be a multiple of batch_size"),
    ("rl", dict(answer_tokens=256), "leave no room for a prompt"),
    ("rl", dict(answer_tokens=250), "prompts dropped: too long: 120"),
    ("rl", dict(warmup_steps=4), "less than max_steps"),
    ("rl", dict(val_fraction=0.0), "no prompt fell into the held-out part")])
def test_a_mistake_is_one_line_before_any_work(stage, change, message, tiny, reward, tmp_path):
    cfg = settings(stage, tiny, tmp_path / "run", reward, **change)
    with pytest.raises(ValueError, match=message):
        SCRIPTS[stage].train(cfg, ALONE)
    assert not checkpoint.list_checkpoints(cfg.out_dir)


@pytest.mark.parametrize("setting", ["batch_size=0", "batch_size=-8", "max_steps=0",
                                     "log_every=0"])
@pytest.mark.parametrize("stage", SCRIPTS)
def test_a_number_out_of_range_is_one_line_before_anything_starts(stage, setting, capsys):
    """--batch_size=-8 trained nothing, saved, and ended with 0; --max_steps=0 was like None."""
    check_refused(stage, setting, "int at least 1", capsys)


@pytest.mark.parametrize("stage, setting, wanted", [
    ("rm", "eval_pairs=0", "int at least 1"),
    ("rm", "center_coef=-1.0", "float at least 0"),
    ("rm", "curriculum=1.5", "float between 0 and 1"),
    ("dpo", "beta=0.0", "float above 0"), ("dpo", "nll_coef=-1.0", "float at least 0"),
    ("dpo", "val_fraction=-0.1", "float between 0 and 1"),
    ("sft", "lora_rank=-1", "int at least 0"), ("sft", "epochs=0.0", "float above 0"),
    ("sft", "eval_rows=0", "int at least 1"), ("rl", "group=1", "int at least 2"),
    ("rl", "beta=-1.0", "float at least 0"), ("rl", "eps_high=0.0", "float above 0")])
def test_so_is_a_number_of_one_stage(stage, setting, wanted, capsys):
    check_refused(stage, setting, wanted, capsys)


def check_refused(stage: str, setting: str, wanted: str, capsys) -> None:
    with pytest.raises(SystemExit) as end:
        configurator.configure(SCRIPTS[stage].Config, [f"--{setting}"])
    name, said = setting.partition("=")[0], capsys.readouterr().err
    assert end.value.code == 2 and said.count("\n") == 1 and f"'{name}' must be" in said
    assert wanted in said


@pytest.mark.parametrize("stage", SCRIPTS)
def test_every_config_of_a_stage_can_be_read_and_sets_what_exists(stage):
    paths = sorted(ROOT.glob(f"config/{stage}_*.py"))
    assert len(paths) >= 2
    for path in paths:
        cfg = configurator.configure(SCRIPTS[stage].Config, [str(path)])
        assert cfg.out_dir.endswith(f"/{stage}")


@forks
@pytest.mark.parametrize("stage", SCRIPTS)
def test_sigterm_saves_and_says_how_to_go_on(stage, tiny, reward, tmp_path):
    """As a user would stop it: exit code 0, a checkpoint, and the command."""
    cfg = settings(stage, tiny, tmp_path / "run", reward, max_steps=5000, eval_every=5000,
                   save_every=5000, log_every=1)
    run = Run(f"train_{stage}", command(cfg), tmp_path / "said", terminal.end_quietly)
    while "\nstep " not in run.text and not run.ends(0.01):
        pass
    run.send(signal.SIGTERM)
    assert run.wait() == 0 and f"train_{stage}.py" in run.text and "--resume" in run.text
    assert checkpoint.list_checkpoints(cfg.out_dir)


def test_pre_training_refuses_other_stages(tiny, reward, tmp_path):
    """A reward model to start from, and a run of another stage to go on with."""
    model, _ = load_model(tiny.pt, torch.device("cpu"), torch.float32)
    with pytest.raises(ValueError, match="of stage rm, not of pt"):
        train_pt.load_weights(reward, model, tiny.tok)
    state = dict(checkpoint.load(tiny.pt)[0]) | {"kind": "sft"}
    checkpoint.save(str(tmp_path / "sft"), 0, state)
    cfg = train_pt.Config(out_dir=str(tmp_path / "sft"), resume=True)
    with pytest.raises(ValueError, match="of stage sft, not of pt"):
        sharding.resume(cfg, "pt", model, [], tiny.tok, 0)


def test_pt_and_the_later_stages_load_in_generate(tiny, reward, tmp_path):
    for stage in ("sft", "dpo", "rl"):
        cfg = settings(stage, tiny, tmp_path / stage, reward, max_steps=2)
        SCRIPTS[stage].train(cfg, ALONE)
        model, _ = load_model(cfg.out_dir, torch.device("cpu"), torch.float32)
        assert model.kind == stage
    assert train_pt.Config().optimizer == "adamw"

"""estimate.py: what it prints against figures worked out by hand, and the large configs against
what eight processes would hold."""
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from lab import Run, side_by_side

import configurator
import train_pt
from bench import estimate
from model import ModelConfig
from plumbing import costs

ROOT = Path(estimate.__file__).parent.parent
forks = pytest.mark.skipif(sys.platform != "linux", reason="forks as Linux does")
#         vocabulary, layers, heads, kv heads, width, head, hidden, window
TINY = ModelConfig(10, 1, 1, 1, 2, 2, 3, 4)
# embedding 10 x 2, four matrices 2 x 2, three of 2 x 3, five gains of 2
N = 20 + 4 * 4 + 3 * 6 + 5 * 2


def test_parameters_operations_and_days_are_those_worked_out_by_hand():
    """64 parameters; 6 x 64 + 12 x 1 layer x 1 head x 2 x 4 tokens = 480 operations a token; half
    of 2 x 10^12 a second are 86400 x 10^12 / 480 = 1.8 x 10^14 tokens a day; 1,280 tokens."""
    cfg = estimate.Config(vocab_size=10, gpus=2, peak_tflops=1.0, mfu=0.5)
    assert N == costs.count_parameters(TINY) == 64
    assert estimate.tokens_per_day(TINY, cfg) == 1.8e14
    text = estimate.report(TINY, 1, cfg)
    assert text.startswith("64 parameters, 480 FLOPs per token")
    assert "2 GPUs x 1 TFLOP/s x 50%: 180,000.00B tokens a day" in text
    slow = estimate.Config(vocab_size=10, gpus=1, peak_tflops=1e-10, mfu=0.5)  # 50 a second
    assert "take 0.1 days" in estimate.report(TINY, 1, slow)  # 1,280 x 480 / 50 s = 3.4 h


def test_lora_learns_rows_and_columns():
    """q, k, v, o: 2 + 2 each; gate, up, down: 2 + 3 each: 31 for a rank of one. And five gains of
    2, the embedding of 10 x 2, and as much for a head of its own."""
    assert costs.lora_parameters(TINY, 5) == 5 * 31
    assert costs.lora_parameters(TINY, 5, True) == 5 * 31 + 10 + 20
    assert costs.lora_parameters(replace(TINY, tied=False), 5, True) == 5 * 31 + 10 + 40


def test_writing_takes_a_cache_and_judging_a_block_and_of_parts_the_whole_model():
    """Keys and values of 3 rows of 2 + 3 tokens, 2 numbers each: 60. The prompts are 6 tokens of 2
    vectors of 2 and 3 of 3 numbers, and see 3 x 2 x 2 tokens; the probabilities, 20 bytes for each
    of 3 x 10, take more. Whole: embedding and last gain, 22 numbers of 4 bytes; the block, 42 of
    2."""
    assert costs.judging_memory(TINY, 3, 2) == 6 * 4 * (4 + 9)
    assert costs.writing_memory(TINY, 3, 2, 3) == 4 * 60 + 20 * 30
    assert costs.writing_memory(TINY, 3, 200, 0) == 4 * 12 * 200 + 600 * 52 + 5 * 3 * 200 ** 2
    assert costs.writing_memory(TINY, 3, 2, 3, width=2, shards=8) == (
        2 * 60 + 20 * 30 + 4 * 22 + 2 * 42)


def test_what_takes_most_is_named():
    training = {"parameters": 9, "optimizer": 5, "gradients": 2, "activations": 3}
    assert costs.fullest_moment(training, evaluation=5, writing=4) == training
    assert costs.fullest_moment(training, evaluation=6, writing=7) == {
        "parameters": 9, "optimizer": 5, "writing": 7}


def test_muon_keeps_one_moment_of_the_matrices_of_the_blocks():
    """34 of the 64 parameters: four matrices of 2 x 2, three of 2 x 3."""
    adamw, muon = (costs.training_memory(TINY, 1, 4, muon=m)["optimizer"] for m in (False, True))
    assert adamw == 8 * 64 and muon == 8 * 64 - 4 * 34


def test_a_part_holds_its_share_and_frozen_models_theirs():
    copy, part = (costs.training_memory(TINY, 1, 4, shards=shards) for shards in (1, 8))
    assert [copy[k] for k in ("parameters", "optimizer", "gradients")] == [256, 512, 256]
    assert [part[k] for k in ("parameters", "optimizer", "gradients")] == [32, 64, 32]
    assert part["gathered"] == 4 * 22 + 2 * 4 * 42  # of the block: in use, and on its way
    cfg = estimate.Config(rollout_size=1, written=1)
    need = {stage: estimate.stage_memory(stage, TINY, 1, cfg, 1, False)
            for stage in estimate.STAGES}
    assert need["rl"] - need["pt"] == 2 * 4 * 64  # the reference and the reward model
    larger = ModelConfig(1000, 4, 8, 8, 512, 64, 1408, 64)  # so that the adapters are a small part
    assert (estimate.stage_memory("lora", larger, 1, cfg, 1, False)
            < 0.5 * estimate.stage_memory("sft", larger, 1, cfg, 1, False))


def test_recomputed_blocks_leave_their_inputs():
    """Per token and block 4 bytes for each of the width, beside one block in full."""
    config = ModelConfig(96, 10, 4, 2, 64, 16, 160, 64)
    plain, again = (costs.training_memory(config, 8, 64, accumulate=2, recompute=recompute)
                    ["activations"] for recompute in (False, True))
    of_block, rest = divmod(plain - again + 10 * 512 * 4 * 64, 9 * 512)
    ends = 2 * 4 * 96 * 64  # of these the second is free again before a block runs
    assert of_block == pytest.approx(4 * (4 * 64 + 2 * 96 + 2 * 64 + 4 * 160 + 2 * 96), rel=0.02)
    assert rest < ends


@pytest.mark.parametrize("name", ["7b", "13b"])
def test_the_large_configs_fit_eight_gpus_of_80_gb(name):
    """And no row without parts fits one: this is what they are for. The last line was seen to fail
    with the ordinary dist_timeout of two minutes, after which the others would have given up."""
    cfg = configurator.configure(train_pt.Config, [str(ROOT / f"config/pt_{name}.py")])
    config = train_pt.shape(cfg, 65_536)
    assert cfg.shard and cfg.recompute
    need, copied = (estimate.stage_memory("pt", config, cfg.batch_size, estimate.Config(), shards,
                                          True) for shards in (8, 1))
    assert need < 0.9 * 80e9 < 80e9 < copied
    # one process writes weights and moments while the others wait: a disk of 100 MB/s will do
    assert 12 * costs.count_parameters(config) < 100e6 * cfg.dist_timeout


def shares_on_meta(name: str) -> list[int]:
    """Parameters of one of eight processes, and of all, of a model that is never allocated: the
    other seven are pretended."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from model import Transformer
    from plumbing import runtime, sharding
    torch.distributed.init_process_group("fake", rank=0, world_size=8, store=FakeStore())
    cfg = configurator.configure(train_pt.Config, [str(ROOT / f"config/pt_{name}.py")])
    with torch.device("meta"):
        model = Transformer(train_pt.shape(cfg, 65_536))
    whole = sum(p.numel() for p in model.parameters())
    sharding.wrap(model, runtime.Dist(0, 8, torch.device("cpu"), torch.bfloat16), cfg.shard)
    return [sum(p.to_local().numel() for p in model.parameters()), whole]


@forks
@pytest.mark.parametrize("name", ["7b", "13b"])
def test_one_of_eight_processes_holds_an_eighth_of_the_large_models(name):
    (part, whole), = side_by_side([partial(shares_on_meta, name)])
    assert whole > 7e9 and whole / 8 <= part <= 1.05 * whole / 8


def run(folder: Path, *arguments: str) -> tuple[int, str]:
    """Exit code, and what is printed."""
    command = Run("bench.estimate", list(arguments), folder / "said")
    return command.wait(), command.text


@forks
def test_the_command_reads_a_config_and_settings_of_both_kinds(tmp_path):
    code, said = run(tmp_path, str(ROOT / "config/pt_1b.py"), "--gpus=16", "--batch_size=2",
                     "--gpu_gb=20")
    assert code == 0 and said.startswith("989,962,240 parameters, 7,147,732,992")
    assert "2 rows of 2048 tokens" in said and "a part of 16, recompute" in said
    assert "*" in said and "16 GPUs x 989 TFLOP/s x 40%" in said


@forks
@pytest.mark.parametrize("argument, message", [
    ("--mfu=0.0", "'mfu' must be float above 0"), ("--gpus=x", "'gpus' must be int at least 1"),
    ("--n_head=3", "must be a multiple of n_head 3"), ("nowhere.py", "no such config file")])
def test_a_mistake_is_one_line(argument, message, tmp_path):
    code, said = run(tmp_path, argument)
    assert code == 2 and said.count("\n") == 1 and message in said

"""
What a model of a config costs before anything is bought: memory of each stage, and days.

    python -m bench.estimate config/pt_1b.py
    python -m bench.estimate config/pt_7b.py --gpus=64 --mfu=0.45 --batch_size=2

The settings of train_pt.py give the sizes of the model and of a batch, those of this script
(--help) what it runs on. Memory is per GPU, by the formulas of costs.py; CUDA takes a few GB more.
Days are the time for 20 tokens for each parameter (Hoffmann et al. 2022) at

    tokens / s = gpus x peak x mfu / FLOPs per token
"""
import sys
from dataclasses import dataclass, fields

import torch

import train_pt
from configurator import Count, Positive, configure
from model import ModelConfig
from plumbing import costs, terminal
from plumbing.costs import count_parameters, flops_per_token
from plumbing.runtime import Dist, Settings

STAGES = ("pt", "sft", "lora", "rm", "dpo", "rl")


@dataclass(frozen=True)
class Config:
    vocab_size: Count = 65_536  # tokens of the tokenizer
    gpus: Count = 8  # as many processes
    gpu_gb: Positive = 80.0  # memory of one, in 10^9 bytes
    peak_tflops: Positive = 989.0  # of one, 10^12 dense bf16 operations a second: H100
    mfu: Positive = 0.4  # share of the peak that goes into the model
    lora_rank: Count = 16  # of the stage lora
    rollout_size: Count = 64  # replies that a GPU writes at once in RL
    written: Count = 1024  # tokens of a prompt and its reply, half of them each


def stage_memory(stage: str, config: ModelConfig, batch_size: int, cfg: Config, shards: int,
                 recompute: bool) -> int:
    """Bytes on each GPU at the fullest moment of a stage in bf16 with AdamW, training or writing.
    Pairs are two rows. DPO holds a reference of the model's size, RL a reward model too."""
    rows, half = batch_size * (1 + (stage in ("rm", "dpo"))), cfg.written // 2
    writes = {"pt": 1, "rl": cfg.rollout_size}.get(stage, 32)
    parts = costs.stage_memory(
        Settings(shard=True, recompute=recompute),
        Dist(0, shards, torch.device("cuda"), torch.bfloat16), config, rows, config.max_seq_len, 2,
        judged=(rows, config.max_seq_len), written=(writes, half, cfg.written - half),
        head=stage != "rm", masked=stage in ("sft", "lora"), rank=cfg.lora_rank * (stage == "lora"))
    return sum(parts.values()) + {"dpo": 1, "rl": 2}.get(stage, 0) * parts["parameters"]


def tokens_per_day(config: ModelConfig, cfg: Config) -> float:
    flops = flops_per_token(config, config.max_seq_len)
    return 86_400 * cfg.gpus * cfg.peak_tflops * 1e12 * cfg.mfu / flops


def report(config: ModelConfig, batch_size: int, cfg: Config) -> str:
    """The table, and the days."""
    n = count_parameters(config)
    lines = [f"{n:,} parameters, {flops_per_token(config, config.max_seq_len):,} FLOPs per token",
             "", f"GB per GPU in bf16, {batch_size} rows of {config.max_seq_len} tokens at once; "
             f"* more than {cfg.gpu_gb:g}", "",
             f"{'':<28}" + "".join(f"{stage:>8} " for stage in STAGES).rstrip()]
    for shards in sorted({1, 8, 64, cfg.gpus}):
        for recompute in (False, True):
            row = ("a copy" if shards == 1 else f"a part of {shards}") + ", recompute" * recompute
            needs = [stage_memory(stage, config, batch_size, cfg, shards, recompute) / 1e9
                     for stage in STAGES]
            lines.append(f"{row:<28}" + "".join(
                f"{need:>8.1f}{'*' if need > cfg.gpu_gb else ' '}" for need in needs).rstrip())
    day = tokens_per_day(config, cfg)
    return "\n".join(lines + [
        "", f"{cfg.gpus} GPUs x {cfg.peak_tflops:g} TFLOP/s x {cfg.mfu:.0%}: {day / 1e9:,.2f}B "
        f"tokens a day; 20 tokens for each parameter, {20 * n / 1e9:,.1f}B, take "
        f"{20 * n / day:,.1f} days"])


def main() -> None:
    names = {f"--{f.name}" for f in fields(Config)} | {"--help", "-h"}
    own = [arg for arg in sys.argv[1:] if arg.partition("=")[0] in names]
    cfg = configure(Config, own, show=False)
    trained = configure(train_pt.Config, [a for a in sys.argv[1:] if a not in own], show=False)
    print(report(train_pt.shape(trained, cfg.vocab_size), trained.batch_size, cfg))


if __name__ == "__main__":
    terminal.run(main)

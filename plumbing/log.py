"""
The log line of a run, and log.jsonl with the same numbers. The rest may be skipped.

    step 250/5,000 | loss 3.1234 | lr 6.0e-04 | norm 0.51 | 123 ms | 81,234 tok/s | mfu 41% | eta 9m
"""
import json
import os
import subprocess
import sys
import time
import timeit
from contextlib import suppress
from pathlib import Path

import torch

from plumbing.files import locked, write_text
from plumbing.runtime import Dist, RankState, Settings, print0

# dense bf16 FLOP/s from the makers' data sheets
GPU_PEAK = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12, "4090": 165e12,
            "3090": 71e12}


class Log:
    """Writes out_dir/log.jsonl, one JSON object a line, and every `cfg.log_every` steps a line on
    the terminal; on rank 0 only. A resumed run drops the records of steps that it does again."""

    def __init__(self, cfg: Settings, dist: Dist, step: int, max_steps: int, tokens: int,
                 flops: int, columns: tuple[str, ...] = ()):
        """The run starts at `step`. An optimizer step of all processes reads `tokens` tokens, each
        of which costs `flops` operations. `columns` are the figures of the stage that the line
        shows after the loss. Raises ValueError for a run that is past its end."""
        if step > max_steps:
            raise ValueError(f"{cfg.out_dir}: its run is at step {step:,}, past the {max_steps:,} "
                             "steps asked for")
        self.max_steps, self.tokens, self.every = max_steps, tokens, cfg.log_every
        self.columns, self.file = columns, None
        RankState.step = step
        peak = peak_flops(dist)
        self.mfu = flops / peak / dist.world if peak else None  # per token/s
        self.start_clock()
        if dist.rank == 0:
            self.lock = locked(cfg.out_dir, "run")
            self.file = open(drop_later_records(Path(cfg.out_dir, "log.jsonl"), step), "a",
                             buffering=1, encoding="utf-8")

    def start_clock(self) -> None:
        """The time from here on is divided among the steps of the next line."""
        self.since, self.steps, self.seen = time.perf_counter(), 0, 0

    def write(self, **record) -> None:
        """Add a record to log.jsonl. The time of a validation, which has "val", is no step's."""
        if "val" in record:
            self.start_clock()
        if self.file:
            self.file.write(json.dumps(record) + "\n")

    def step(self, step: int, loss: float, lr: float, norm: float, tokens: int | None = None,
             **figures: float) -> None:
        """Record one optimizer step, which read `tokens` tokens (None: as many as always)."""
        varying = {} if tokens is None else {"tokens": tokens}
        self.write(step=step, loss=loss, lr=lr, norm=norm, **varying, **figures)
        RankState.step = done = step + 1
        self.steps += 1
        self.seen += self.tokens if tokens is None else tokens
        if done % self.every:
            return
        seconds = (time.perf_counter() - self.since) / self.steps
        speed = self.seen / self.steps / seconds
        mfu = f"{speed * self.mfu:.0%}" if self.mfu else "n/a"
        stage = "".join(f"{name} {figures[name]:.3f} | " for name in self.columns)
        print0(f"step {done:>6,}/{self.max_steps:,} | loss {loss:.4f} | {stage}lr {lr:.1e} | "
               f"norm {norm:.2f} | {1000 * seconds:,.0f} ms | {speed:,.0f} tok/s | mfu {mfu} | "
               f"eta {eta(seconds * (self.max_steps - done))}")
        self.start_clock()


def drop_later_records(path: Path, step: int) -> Path:
    """Leave in log.jsonl only whole lines of steps before `step`, and its last validation."""
    os.makedirs(path.parent, exist_ok=True)
    kept = [record for record in whole_records(path) if record["step"] < step + ("val" in record)]
    write_text(path, "".join(json.dumps(record) + "\n" for record in kept))
    return path


def whole_records(path: Path) -> list[dict]:
    """The lines of a file of JSON objects, if there is one. The part of a line that a crash left is
    passed over, and ended, so that the next record stands on a line of its own."""
    lines = path.read_text("utf-8", "replace").split("\n") if path.exists() else [""]
    if lines[-1]:
        with open(path, "a") as f:
            f.write("\n")
    found = []
    for line in lines:
        with suppress(ValueError):
            found.append(json.loads(line))
    return found


def eta(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f}s"
    return f"{seconds / 60:.0f}m" if seconds < 6000 else f"{seconds / 3600:.1f}h"


def peak_flops(dist: Dist) -> float | None:
    """FLOP/s that the device can reach: from the data sheet for a known GPU, measured with a square
    product on a CPU, None for a device we do not know."""
    if dist.device.type == "cuda":
        name = torch.cuda.get_device_name(dist.device)
        return next((peak for key, peak in GPU_PEAK.items() if key in name), None)
    if dist.device.type != "cpu":
        return None
    a = torch.randn(1024, 1024).to(dist.dtype)
    return 2 * 1024**3 / min(timeit.repeat(lambda: a @ a, number=1, repeat=8))


def describe_run(dist: Dist) -> str:
    """Command, commit, versions and device: what one needs to run it again."""
    try:
        git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True,
                             text=True, cwd=Path(__file__).parent).stdout.strip()
    except OSError:  # git is not installed
        git = ""
    name = torch.cuda.get_device_name(dist.device) if dist.device.type == "cuda" else (
        f"{dist.device} with {torch.get_num_threads()} threads")
    return (f"{' '.join(sys.argv)}\ncommit {git or 'unknown'}, python {sys.version.split()[0]}, "
            f"torch {torch.__version__}, {dist.world} x {name}, "
            f"{str(dist.dtype).removeprefix('torch.')}")

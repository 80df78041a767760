"""
How fast it is on a GPU, and whether it computes there what it computes on a CPU.

    python -m bench.gpu                                       124M and 1B parameters, one GPU
    python -m bench.gpu --only=train --configs=config/pt_124m.py

agree    logits in fp32 (without TF32) and bf16, and greedy text, against those of the CPU; off by
         |difference| / |logits|
train    train_pt.py itself, on random text: the speed it prints for the last ten of STEPS steps
stages   batch_size windows forward and back with the loss of PT, with that of SFT (chats of T / 4
         tokens, packed, each masked off from the others) and with that of DPO
decode   greedy text with bf16 weights: tokens/s, and the bytes of weights and cache that a step
         reads, per second, beside those that a copy within the memory reads and writes

Each figure is a line, and a line of JSON. Times of stages and decode are medians of REPEATS runs,
each from one synchronisation to the next.
"""
import json
import re
import subprocess
import sys
import tempfile
import timeit
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

import train_pt
from bench.__main__ import dpo_loss, pt_loss, sft_loss
from bench.race import chosen, figure
from configurator import configure, fail
from generate import generate
from model import ModelConfig, Transformer
from plumbing import runtime, sharding, terminal
from plumbing.loading import captured
from plumbing.log import describe_run
from tokenizer import HAN_PATTERN, SPECIALS, dump

ROOT = Path(__file__).resolve().parent.parent
VOCAB = 65_536  # of all models: the single bytes, and most pairs of bytes
STEPS, MICRO_STEPS = 30, 8  # of train_pt.py, a multiple of ten; micro-steps in each
WRITTEN, AT_ONCE = 128, (1, 64)  # tokens after a prompt of 16; texts written at once
REPEATS = 5  # timed runs of each figure


@dataclass(frozen=True)
class Config:
    only: str = "agree,train,stages,decode"  # jobs, comma-separated
    configs: str = "config/pt_124m.py,config/pt_1b.py"  # models, comma-separated
    modes: str = "eager,compiled"  # of train, comma-separated; stages are compiled if it says so
    device: Literal["cuda", "cpu"] = "cuda"  # where to compute; cpu: to try this program out


def seconds(work: Callable[[], object], cfg: Config) -> float:
    """Median time of a call, all of its work on the device included."""
    def once() -> None:
        work()
        if cfg.device == "cuda":
            torch.cuda.synchronize()
    once()  # compiles, allocates
    return float(np.median(timeit.repeat(once, number=1, repeat=REPEATS)))


def models(cfg: Config) -> Iterator[tuple[str, train_pt.Config, ModelConfig]]:
    """Name, settings and shape of each of the --configs."""
    for path in cfg.configs.split(","):
        pt = configure(train_pt.Config, [path], show=False)
        yield Path(path).stem, pt, train_pt.shape(pt, VOCAB)


def agree(cfg: Config) -> None:
    """4 layers of the head sizes of the 1B model, on CPU and device."""
    torch.manual_seed(0)
    model = Transformer(ModelConfig(512, 4, 8, 2, 1024, 128, 2048, 256)).eval()
    idx = torch.randint(512, (4, 256))
    segments = torch.arange(256).expand(4, -1) // 100 + 1
    texts = idx[:, :16].tolist()
    with torch.no_grad():
        expected = {"causal": model(idx), "packed": model(idx, segments=segments)}
    greedy = list(generate(model, texts, 32, temperature=0))
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    model, idx, segments = model.to(cfg.device), idx.to(cfg.device), segments.to(cfg.device)
    for kind in (torch.float32, torch.bfloat16):
        here = runtime.Dist(0, 1, torch.device(cfg.device), kind)
        with torch.no_grad(), here.autocast():
            got = {"causal": model(idx), "packed": model(idx, segments=segments)}
        for name, logits in got.items():
            off = (logits.float().cpu() - expected[name]).norm() / expected[name].norm()
            figure("agree", f"{name}, {str(kind).removeprefix('torch.')}", float(off), "")
    same = [a == b for a, b in zip(generate(captured(model), texts, 32, temperature=0), greedy)]
    figure("agree", "steps of greedy text", sum(same) / 32, "equal")
    torch.set_float32_matmul_precision(precision)


def write_data(folder: str) -> None:
    """Random text, and a tokenizer for it whose tokens are all bytes and then pairs of bytes."""
    words = np.random.default_rng(0).integers(97, 123, (2000, 2000), np.uint8)
    with open(f"{folder}/text.jsonl", "w") as f:
        f.writelines(json.dumps({"text": bytes(w).decode()}) + "\n" for w in words)
    ranks = [bytes([a]) for a in range(256)] + [bytes([a, b]) for a in range(256)
                                                for b in range(256)]
    Path(f"{folder}/tokenizer.txt").write_text(dump(ranks[:VOCAB - len(SPECIALS)], HAN_PATTERN))
    subprocess.run([sys.executable, "data.py", f"--input={folder}/text.jsonl",
                    f"--tokenizer={folder}/tokenizer.txt", f"--out_dir={folder}/data"], cwd=ROOT,
                   check=True, stdout=subprocess.DEVNULL)


def train(cfg: Config) -> None:
    with tempfile.TemporaryDirectory() as folder:
        write_data(folder)
        for path, (name, pt, _) in zip(cfg.configs.split(","), models(cfg)):
            for mode in cfg.modes.split(","):
                tokens = pt.batch_size * pt.max_seq_len * MICRO_STEPS
                with subprocess.Popen(
                        [sys.executable, "train_pt.py", path, f"--data_dir={folder}/data",
                         f"--out_dir={folder}/out", f"--compile={mode == 'compiled'}",
                         f"--batch_tokens={tokens}", f"--max_steps={STEPS + 1}",
                         "--warmup_steps=1", "--log_every=10", "--eval_tokens=1",
                         "--sample_every=0", "--save_every=1000000", f"--device={cfg.device}"],
                        cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
                    for line in process.stdout or ():
                        if line.startswith(("memory", "step")):
                            print(line, end="", flush=True)
                        if line.startswith(f"step {STEPS:>6,}/"):
                            process.kill()  # before it saves: 1B parameters are 12 GB
                            break
                    else:
                        fail(f"train_pt.py {path}: ended early, see above")
                speed, mfu = re.findall(r"([\d,]+) tok/s \| mfu (\S+) ", line)[0]
                figure("train", f"{name}, {mode}", float(speed.replace(",", "")), "tok/s", mfu=mfu)


def stages(cfg: Config) -> None:
    for name, pt, shape in models(cfg):
        here = runtime.Dist(0, 1, torch.device(cfg.device), torch.bfloat16)
        model = Transformer(shape)
        net = sharding.wrap(model, here, compiled="compiled" in cfg.modes)
        B, T = pt.batch_size, pt.max_seq_len
        idx, targets = torch.randint(shape.vocab_size, (2, B, T), device=cfg.device)
        segments = (torch.arange(T, device=cfg.device) // (T // 4)).expand(B, -1) + 1
        mask = torch.arange(T, device=cfg.device).expand(B, -1) % (T // 4) > 0
        first = 0.0

        def learn(loss: Callable[..., Tensor], *batch: Any) -> None:
            with here.autocast():
                value = loss(net, idx, *batch) / targets.numel()
            value.backward()
            model.zero_grad()

        for loss, *batch in ((pt_loss, targets), (sft_loss, mask, segments),
                             (dpo_loss, targets, here)):
            speed = B * T / seconds(partial(learn, loss, *batch), cfg)
            first = first or speed
            figure("stages", f"{name}, {loss.__name__}", speed, "tok/s", of_pt=speed / first)


def decode(cfg: Config) -> None:
    """Time of WRITTEN steps less that of one, so that reading the prompt is not in it."""
    array = torch.ones(1 << 28, device=cfg.device)  # 1 GiB
    other = torch.empty_like(array)
    limit = 2 * 4 * len(array) / seconds(lambda: other.copy_(array), cfg)
    figure("decode", "copy", limit / 1e9, "GB/s")
    for name, _, shape in models(cfg):
        model = captured(Transformer(shape).to(cfg.device, torch.bfloat16).eval())
        read = 2 * (sum(p.numel() for p in model.parameters())
                    - (0 if shape.tied else model.embed_tokens.weight.numel()))
        for B in AT_ONCE:
            prompts = torch.randint(shape.vocab_size, (B, 16)).tolist()
            took = [seconds(lambda: list(generate(model, prompts, n, temperature=0)), cfg)
                    for n in (1, 1 + WRITTEN)]
            step = (took[1] - took[0]) / WRITTEN
            cached = 2 * 2 * B * shape.n_layer * shape.n_kv_head * shape.head_dim * (
                16 + WRITTEN / 2)
            figure("decode", f"{name}, {B} at once", B / step, "tok/s", gb_per_s=(read + cached)
                / step / 1e9, of_copy=(read + cached) / step / limit, ms_per_step=1000 * step)


JOBS = {"agree": agree, "train": train, "stages": stages, "decode": decode}


def main() -> None:
    cfg = configure(Config)
    jobs = chosen(cfg.only, JOBS)
    if cfg.device == "cuda" and not torch.cuda.is_available():
        fail("--device=cuda: no CUDA device here; python -m bench measures a CPU")
    print(describe_run(runtime.setup(cfg.device)))
    list(models(cfg))  # a mistake in a config is told before anything is measured
    for job in jobs:
        job(cfg)


if __name__ == "__main__":
    terminal.run(main)

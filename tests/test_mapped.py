"""Real sizes on an ordinary computer: weights in bf16 stay on the disk until they are read, so a
model starts at once and takes little more memory than its file has. Random weights."""
import os
import subprocess
import sys
from dataclasses import asdict
from functools import partial
from pathlib import Path

import pytest
import torch

import convert
from model import ModelConfig
from plumbing import checkpoint, weights
from tokenizer import HAN_PATTERN, Tokenizer, dump

ROOT = Path(convert.__file__).parent
SHAPES = {  # of Qwen3-1.7B and Qwen2.5-0.5B
    "1.7B": ModelConfig(151_936, 28, 16, 8, 2048, 128, 6144, 40_960, 1e6),
    "0.5B": ModelConfig(151_936, 24, 14, 2, 896, 64, 4864, 32_768, 1e6, qk_norm=False,
                        qkv_bias=True)}
PROGRAM = """
import sys, time
import generate
def first(text, show=generate.show):
    if text:
        status = open("/proc/self/status").read()
        print(time.process_time(), status.split("VmHWM:")[1].split()[0], file=sys.stderr)
    show(text)
generate.show = first
generate.main()
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="peaks as Linux counts them")
@pytest.mark.parametrize("name", SHAPES)
def test_a_model_starts_within_its_bytes_and_at_once(name, tmp_path):
    """VmHWM counts mapped pages that were read, too. Seen to fail in fp32: twice the bytes and
    more. The time is that of the processor, in one thread, from the start of the program to the
    first character, for others may use the machine as well."""
    sizes = SHAPES[name]
    tok = Tokenizer(dump([bytes([i]) for i in range(256)], HAN_PATTERN))
    model = {key: torch.empty(shape, dtype=torch.bfloat16)
             for key, shape in convert.shapes(sizes).items()}
    model["lm_head.weight"] = model["embed_tokens.weight"]
    saved = checkpoint.save(str(tmp_path), 0, {
        "format": 1, "kind": "sft", "step": 0, "model": model, "optimizer": [],
        "model_config": asdict(sizes), "config": {}, "tokenizer": tok.text},
        write=partial(weights.stream, fill=lambda key, out: out.uniform_(-0.05, 0.05)))
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, f"--checkpoint={saved}", "--dtype=bfloat16", "--stream",
         "--prompt=Hello!", "--max_tokens=8", "--stop=False"],
        cwd=ROOT, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    seconds, peak = done.stderr.split()[:2]
    print(f"{name}: {saved.stat().st_size / 1e9:.2f} GB, peak {int(peak) * 1024 / 1e9:.2f} GB, "
          f"first character after {float(seconds):.1f} s of one thread")
    assert int(peak) * 1024 <= 1.15 * saved.stat().st_size or name != "1.7B"
    assert float(seconds) <= 3 or name != "0.5B"

"""bench_gpu.py on a CPU at a tiny size: that it runs, counts and compares; its speeds mean nothing."""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from plumbing.costs import count_parameters, flops_per_token
from model import ModelConfig

HERE = Path(__file__).parent.parent
TINY = "n_layer = 2\nn_head = 2\nn_kv_head = 1\nn_embd = 64\nmax_seq_len = 32\nbatch_size = 4\n"


def run(*arguments: str) -> tuple[int, str, str]:
    done = subprocess.run([sys.executable, "-m", "bench.gpu", *arguments], cwd=HERE, text=True,
                          capture_output=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    return done.returncode, done.stdout, done.stderr


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> dict:
    config = tmp_path_factory.mktemp("gpu") / "tiny.py"
    config.write_text(TINY)
    code, out, said = run("--device=cpu", f"--configs={config}", "--vocab_size=512", "--steps=10",
                          "--micro_steps=2", "--modes=eager", "--repeats=2", "--decode_tokens=8",
                          "--decode_rows=1,2")
    assert code == 0, said
    found = [json.loads(line) for line in out.splitlines() if line.startswith("{")]
    return {(r["job"], r["name"]): r for r in found} | {"out": out}


def test_the_device_is_held_against_the_cpu(rows):
    """Here it is the CPU: the same bits in fp32, three digits less in bf16, the same text."""
    assert rows["agree", "causal, float32"]["value"] == rows["agree", "packed, float32"]["value"] == 0
    assert 1e-3 < rows["agree", "packed, bfloat16"]["value"] < 0.03
    assert rows["agree", "steps of greedy text"]["value"] == 1


def test_training_is_what_the_script_printed(rows):
    line = next(x for x in rows["out"].splitlines() if x.startswith("step     10/11"))
    row = rows["train", "tiny, eager"]
    assert f"| {row['value']:,.0f} tok/s | mfu {row['mfu']} |" in line
    assert "memory: " in rows["out"]


def test_stages_are_a_fraction_of_pt(rows):
    pt, sft = (rows["stages", f"tiny, {loss}_loss"] for loss in ("pt", "sft"))
    assert pt["of_pt"] == 1 and sft["of_pt"] == pytest.approx(sft["value"] / pt["value"])
    assert rows["stages", "tiny, dpo_loss"]["value"] > 0


def test_writing_reads_the_weights_and_the_cache_once_a_token(rows):
    config = ModelConfig(512, 2, 2, 1, 64, 32, 192, 32)
    assert flops_per_token(config, 32) > 6 * count_parameters(config)  # tied: all of them multiply
    for B in (1, 2):
        row = rows["decode", f"tiny, {B} at once"]
        read = 2 * count_parameters(config) + 4 * B * 2 * 1 * 32 * (16 + 4)
        assert row["gb_per_s"] * 1e9 * row["ms_per_step"] / 1000 == pytest.approx(read)
        assert row["of_copy"] == pytest.approx(row["gb_per_s"] / rows["decode", "copy"]["value"])
        assert row["value"] == pytest.approx(1000 * B / row["ms_per_step"])


@pytest.mark.parametrize("arguments, said", [
    (["--only=trian"], "there is no trian among agree, train"),
    (["--device=cpu", "--only=train", "--configs=no.py"], "no.py")])
def test_mistakes_are_told_in_one_line(arguments, said):
    code, _, err = run(*arguments)
    assert code == 2 and said in err.splitlines()[-1]

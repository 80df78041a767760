"""bench.py at a tiny size: what it prints, what it counts, and that it compares like with like."""
import contextlib
import io
import json
import math
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from bench import __main__ as bench
from bench.race import Race, used_by_others
from generate import generate
from model import ModelConfig, Transformer
from plumbing.costs import flops_per_token

HERE = Path(__file__).parent.parent
TINY = dict(repeats=2, sample_s=0.01, max_foreign=1e9, compile=False, data_mb=1, chunks=300)


def shape(tied: bool = False) -> ModelConfig:
    return ModelConfig(512, 3, 4, 2, 64, 16, 256, 32, tied=tied)


@pytest.fixture(autouse=True, scope="module")
def small():
    """Sizes at which everything takes seconds."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in dict(MATMUL=64, VOCAB=512, N_LAYER=2, N_EMBD=64, T=32, B=2,
                                DECODE_EMBD=64, WRITTEN=4).items():
            patch.setattr(bench, name, value)
        yield patch


@pytest.fixture(scope="module")
def rows(small):
    """JSON rows by (job, name, batch), and the lines of the table, of one run of everything."""
    small.setattr(sys, "argv", ["bench", *(f"--{key}={value}" for key, value in TINY.items())])
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        bench.main()
    lines = said.getvalue().splitlines()
    found = json_rows(said.getvalue())
    return {(r["job"], r["name"], r.get("batch")): r for r in found}, lines


def test_every_job_prints_its_figures_with_a_unit(rows):
    units = {
        ("limits", "matmul 64 float32"): "GF/s", ("limits", "matmul 128 bfloat16"): "GF/s",
        ("limits", "read"): "GB/s", ("train", "ours, eager"): "tok/s",
        ("train", "plain Llama, eager"): "tok/s", ("decode", "ours"): "tok/s",
        ("stages", "SFT, packed"): "tok/s", ("stages", "64 replies at once"): "tok/s",
        ("data", "prepare, 1 worker(s)"): "MB/s", ("data", "prepare, 2 worker(s)"): "MB/s",
        ("data", "tiktoken alone, 1 thread"): "MB/s",
        ("search", "split"): "MB/s", ("search", "index 1,000 chunks"): "chunks/s",
        ("search", "bm25, zh"): "ms", ("search", "hybrid, en"): "ms"}
    found = {(job, name): row for (job, name, _), row in rows[0].items()}
    for key, unit in units.items():
        row = found[key]
        assert row["unit"] == unit and row["value"] > 0 and row["x"] > 0
        assert row["samples"] == TINY["repeats"] and row["rejected"] == 0
        assert any(line.startswith(key[0]) and key[1] in line and unit in line for line in rows[1])


def test_what_is_derived_follows_from_what_was_measured(rows):
    """GF/s and shares are other figures of the same run, multiplied."""
    found, _ = rows
    ours = found["train", "ours, eager", None]
    c = ModelConfig(512, 2, 1, 1, 64, 64, 256, 32, tied=False)
    assert ours["gflops"] == pytest.approx(ours["value"] * flops_per_token(c, 32) / 1e9)
    pt, packed, padded = (found["stages", name, None] for name in ("PT", "SFT, packed",
                                                                   "SFT, padded"))
    assert packed["of_pt"] == pytest.approx(packed["value"] / pt["value"])
    assert pt["learnt"] == 1 and packed["learnt"] > padded["learnt"] > 0.2
    one, eight = (found["decode", "ours", B] for B in (1, 8))
    assert one["mb"] == eight["mb"] > 0 and min(one["of_bound"], eight["of_bound"]) > 0


@pytest.mark.parametrize("tied", [True, False])
def test_flops_agree_with_model_py(tied):
    c = shape(tied)
    flops = 6 * bench.multiplying(Transformer(c)) + 12 * c.n_layer * c.n_embd * 32
    assert flops == flops_per_token(c, 32)


def test_flops_agree_with_what_torch_counts():
    """All its matrix products, forward and backward; 1 %: the formula counts norms as matrices."""
    model, idx = bench.PlainLlama(shape()), torch.randint(512, (2, 32))
    with FlopCounterMode(display=False) as counter:
        model(idx).sum().backward()
    flops = (6 * bench.multiplying(model) + 12 * 3 * 64 * 32) * idx.numel()
    assert flops == pytest.approx(counter.get_total_flops(), rel=0.01)


def test_reference_is_our_model_without_the_norms_of_queries_and_keys():
    torch.manual_seed(0)
    ours, plain = Transformer(shape()), bench.PlainLlama(shape())
    assert sum(p.numel() for p in plain.parameters()) == pytest.approx(
        sum(p.numel() for p in ours.parameters()), rel=0.05)
    plain.embed, plain.head = ours.embed_tokens, ours.lm_head
    for mine, theirs in zip(plain.blocks, ours.layers):
        for name, module in [*theirs.self_attn.named_children(), *theirs.mlp.named_children()]:
            if name.endswith("_proj"):
                mine[name.removesuffix("_proj")] = module
        theirs.self_attn.q_norm = theirs.self_attn.k_norm = nn.Identity()
    idx = torch.randint(512, (2, 32))
    torch.testing.assert_close(plain(idx), ours(idx), atol=1e-5, rtol=1e-4)


def test_reference_starts_at_ln_vocab():
    torch.manual_seed(0)
    idx = torch.randint(512, (8, 32))
    loss = nn.functional.cross_entropy(bench.PlainLlama(shape())(idx).flatten(0, 1),
                                       torch.randint(512, (256,)))
    assert loss.item() == pytest.approx(math.log(512), abs=0.1)  # random weights: not quite uniform


def json_rows(said: str) -> list[dict]:
    return [json.loads(line) for line in said.splitlines() if line.startswith("{")]


def test_samples_are_thrown_away_while_another_process_computes(capsys):
    cfg = bench.Config(repeats=1, sample_s=0.2)
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as busy:
        try:
            race = Race("test", {"sleep": lambda: time.sleep(0.01)}, cfg)
        finally:
            busy.kill()
    assert race.rejected == {"sleep": 4} and math.isnan(race.seconds["sleep"])
    race.row("sleep", race.seconds["sleep"], "s")
    row, = json_rows(capsys.readouterr().out)
    assert row["value"] is None and row["x"] is None


def test_what_we_and_our_children_use_is_not_foreign():
    """The parts add up to the whole, to a few ticks of 10 ms."""
    def clocks() -> list[float]:
        ticks = [int(x) for x in Path("/proc/stat").read_text().split("\n")[0].split()[1:9]]
        return [(sum(ticks) - ticks[3] - ticks[4]) / os.sysconf("SC_CLK_TCK"),
                used_by_others(), time.process_time(),
                sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2])]

    start = clocks()
    subprocess.run([sys.executable, "-c", "sum(range(20_000_000))"])
    sum(range(10_000_000))
    whole, *parts = (b - a for a, b in zip(start, clocks()))
    assert parts[1] > 0.05 and parts[2] > 0.05
    assert sum(parts) == pytest.approx(whole, abs=0.08)


def test_contenders_take_turns():
    calls = []
    cfg = bench.Config(repeats=3, sample_s=1e-9, max_foreign=1e9)
    Race("test", {name: lambda name=name: calls.append(name) for name in "AB"}, cfg)
    assert "".join(calls) == "AB" + "AB" * 3  # once to warm up


def test_without_a_compiler_it_says_so(monkeypatch, capsys):
    monkeypatch.setenv("CXX", "/no/such/compiler")
    bench.train(bench.Config(**TINY | {"compile": True}), "")
    said = capsys.readouterr().out
    assert "compiled models skipped: no C++ compiler" in said
    assert json_rows(said) and not any("compiled" in row["name"] for row in json_rows(said))


GPT = '''
import torch
from dataclasses import dataclass

@dataclass
class GPTConfig:
    block_size: int = 8
    vocab_size: int = 8
    n_layer: int = 1
    n_head: int = 1
    n_embd: int = 8
    dropout: float = 0.5
    bias: bool = True

class GPT(torch.nn.Module):
    def __init__(self, config):
        super().__init__()
        assert (config.block_size, config.vocab_size, config.n_layer) == (32, 512, 2)
        assert config.dropout == 0 and not config.bias
        self.embed = torch.nn.Embedding(config.vocab_size, config.n_embd)
        self.head = torch.nn.Linear(config.n_embd, config.vocab_size, bias=False)
        print("talks")

    def forward(self, idx, targets=None):
        logits = self.head(self.embed(idx))
        return logits, torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())

    def configure_optimizers(self, weight_decay, learning_rate, betas, device_type):
        return torch.optim.AdamW(self.parameters(), learning_rate, betas)
'''


def test_a_clone_of_nanogpt_takes_part(tmp_path, capsys):
    (tmp_path / "model.py").write_text(GPT)
    bench.train(bench.Config(**TINY, nanogpt=str(tmp_path)), "")
    said = capsys.readouterr().out
    row = next(row for row in json_rows(said) if row["name"] == "nanoGPT, eager")
    per_token = 6 * 512 * 64 + 12 * 2 * 64 * 32  # its embedding is only looked up
    assert row["gflops"] == pytest.approx(row["value"] * per_token / 1e9)
    assert row["params"] == 2 * 512 * 64 and "talks" not in said


def test_transformers_runs_the_same_model():
    pytest.importorskip("transformers")
    torch.manual_seed(0)
    model, idx = Transformer(shape()).eval(), torch.randint(512, (2, 8))
    theirs = bench.huggingface(model).generate(
        idx, attention_mask=torch.ones_like(idx), max_new_tokens=6, do_sample=False)
    ours = torch.tensor(list(generate(model, idx.tolist(), 6, temperature=0.0))).T
    assert theirs[:, 8:].tolist() == ours.tolist()


@pytest.mark.parametrize("argument, message", [
    ("--nanogpt=/no/such/folder", "--nanogpt=/no/such/folder: no model.py there"),
    ("--only=train,sleep", "there is no sleep among limits, train"),
])
def test_mistakes_are_one_line_and_exit_code_2(argument, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["bench", argument])
    with pytest.raises(SystemExit) as end:
        bench.main()
    error = capsys.readouterr().err
    assert end.value.code == 2 and message in error and error.count("\n") == 1

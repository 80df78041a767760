"""bench.gpu on a CPU at a tiny size: it runs, counts and compares; its speeds mean nothing."""
import contextlib
import io
import json
import sys

import pytest

from bench import gpu
from model import ModelConfig
from plumbing.costs import count_parameters, flops_per_token

TINY = "n_layer = 2\nn_head = 2\nn_kv_head = 1\nn_embd = 64\nmax_seq_len = 32\nbatch_size = 4\n"


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> dict:
    config, said = tmp_path_factory.mktemp("gpu") / "tiny.py", io.StringIO()
    config.write_text(TINY)
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(said):
        for name, value in dict(VOCAB=512, STEPS=10, MICRO_STEPS=2, REPEATS=2, WRITTEN=8,
                                AT_ONCE=(1, 2)).items():
            patch.setattr(gpu, name, value)
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setattr(sys, "argv", ["gpu", "--device=cpu", f"--configs={config}", "--modes=eager"])
        gpu.main()
    out = said.getvalue()
    found = [json.loads(line) for line in out.splitlines() if line.startswith("{")]
    return {(r["job"], r["name"]): r for r in found} | {"out": out}


def test_the_device_is_held_against_the_cpu(rows):
    """Here it is the CPU: the same bits in fp32, three digits less in bf16, the same text."""
    assert [rows["agree", f"{how}, float32"]["value"] for how in ("causal", "packed")] == [0, 0]
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
def test_mistakes_are_told_in_one_line(arguments, said, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["gpu", *arguments])
    with pytest.raises(SystemExit) as end:
        gpu.main()
    err = capsys.readouterr().err
    assert end.value.code == 2 and said in err and err.count("\n") == 1

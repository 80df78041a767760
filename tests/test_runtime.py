"""runtime.py: schedule, guard, log and the numbers in the log line."""
import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import model
import train_pt
from plumbing import costs, optim, runtime
from plumbing.log import Log, eta, peak_flops

ROOT = Path(runtime.__file__).resolve().parent.parent
ALONE = runtime.Dist(0, 1, torch.device("cpu"), torch.float32)


def test_cosine_warms_up_peaks_and_ends_at_its_final_share():
    lr = [optim.lr_factor(s, 100, 10, "cosine", 0.1, 0.2) for s in range(101)]
    assert lr[0] == pytest.approx(0.1) and lr[9] == 1.0 and max(lr) == 1.0
    assert lr[55] == pytest.approx(0.55)  # half way between warm-up and end: mean of 1 and 0.1
    assert lr[100] == pytest.approx(0.1) and all(a > b for a, b in zip(lr[10:], lr[11:]))


def test_wsd_is_level_and_decays_over_the_last_share_only():
    lr = [optim.lr_factor(s, 100, 10, "wsd", 0.0, 0.2) for s in range(101)]
    assert lr[10:81] == [1.0] * 71 and lr[90] == pytest.approx(0.5) and lr[100] == 0.0


def test_guard_skips_and_stops_at_the_third_in_a_row(capsys):
    guard = runtime.GradientGuard()
    norms = (1.0, math.nan, math.inf, 2.0, math.nan, math.nan)
    answers = [guard.allows(n, 5, 1.0, "windows 0 to 3") for n in norms]
    assert answers == [True, False, False, True, False, False]
    with pytest.raises(FloatingPointError, match="3 steps in a row"):
        guard.allows(math.nan, 9, 1.0, "windows 4 to 7")
    assert ("step 9: gradient not finite (loss 1.0000, norm nan), windows 4 to 7, skipped 3/3"
            in capsys.readouterr().out)


def test_log_drops_what_a_resumed_run_does_again(tmp_path):
    cfg = runtime.Settings(out_dir=str(tmp_path))
    log = Log(cfg, ALONE, 0, 9, 64, 10)
    for step in range(4):
        if step == 2:
            log.write(step=2, val={"en": 1})
        log.write(step=step, loss=0.1 * step)
    with open(tmp_path / "log.jsonl", "a") as f:
        f.write('{"step": 4, "lo')  # killed while writing
    del log  # else it would still hold the folder
    Log(cfg, ALONE, 2, 9, 64, 10).write(step=2, loss=9.0)
    rows = [json.loads(line) for line in open(tmp_path / "log.jsonl")]
    assert rows == [{"step": 0, "loss": 0.0}, {"step": 1, "loss": 0.1},
                    {"step": 2, "val": {"en": 1}}, {"step": 2, "loss": 9.0}]


@pytest.mark.skipif(os.name != "posix", reason="Windows has no such locks")
def test_two_runs_do_not_write_to_one_folder(tmp_path):
    """The same command typed in two windows: neither found a checkpoint, both trained, the log of
    the first was lost and the folder held two runs."""
    code = f"import plumbing.files as f; x = f.locked({str(tmp_path)!r}, ''); print(1, flush=1)"
    with subprocess.Popen([sys.executable, "-c", f"{code}; input()"], stdin=subprocess.PIPE,
                          stdout=subprocess.PIPE, cwd=ROOT) as other:
        assert other.stdout.readline() == b"1\n"
        with pytest.raises(ValueError, match="another run is writing to it"):
            Log(runtime.Settings(out_dir=str(tmp_path)), ALONE, 0, 9, 64, 10)
        other.communicate(b"\n")
    Log(runtime.Settings(out_dir=str(tmp_path)), ALONE, 0, 9, 64, 10)


def test_a_signal_is_remembered_not_obeyed_at_once():
    before = {s: signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)}
    try:
        signals = runtime.StopSignals()
        assert signals.name == ""
        os.kill(os.getpid(), signal.SIGTERM)
        assert signals.name == "SIGTERM"
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_device_and_precision_are_chosen_or_refused():
    dist = runtime.setup("cpu", "auto")
    assert (dist.rank, dist.world, dist.device.type, dist.dtype) == (0, 1, "cpu", torch.float32)
    assert runtime.setup("cpu", "bfloat16").dtype == torch.bfloat16
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="no CUDA device"):
            runtime.setup("cuda")


def test_restarts_that_could_not_work_are_refused_at_once(monkeypatch):
    """Else the second start waits for the dead processes of the first."""
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "0")
    assert runtime.setup("cpu").world == 1
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    with pytest.raises(ValueError, match="TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in the environment"):
        runtime.setup("cpu")
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "False")
    assert runtime.setup("cpu").world == 1


def test_bfloat16_computes_products_in_bfloat16():
    dist = runtime.setup("cpu", "bfloat16")
    with dist.autocast():
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.bfloat16
    with ALONE.autocast():
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32


@pytest.mark.parametrize("device, vocabulary, rows", [
    ("cuda", 65_536, 2048), ("cuda", 1 << 21, 128), ("cpu", 65_536, 128), ("cpu", 8_192, None)])
def test_a_gpu_holds_half_a_gigabyte_of_logits_at_once(device, vocabulary, rows):
    """2,048 x 65,536 logits of 4 bytes are 0.54 GB, 128 of them 34 MB, which a CPU holds; a short
    vocabulary is left to torch. A stand-in for a head."""
    class Head:
        def __init__(self):
            self.device = torch.device(device)

        def __len__(self):
            return vocabulary
    assert model.logits_at_once(Head()).batch_chunk_size == rows


def test_the_loss_is_the_same_however_many_rows_exist_at_once(monkeypatch):
    hidden, head = torch.randn(2, 9, 8, requires_grad=True), torch.randn(30, 8, requires_grad=True)
    targets = torch.randint(30, (2, 9))
    targets[0, 3] = -100
    want = torch.nn.functional.cross_entropy((hidden @ head.t()).flatten(0, 1), targets.flatten(),
                                             reduction="sum")
    gradients = torch.autograd.grad(want, (hidden, head))
    for rows in (1, 4, 100):
        options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=rows)
        monkeypatch.setattr(model, "logits_at_once", lambda head: options)
        loss = train_pt.pt_loss(hidden, head, targets)
        assert torch.allclose(loss, want, rtol=1e-5)
        for got, expected in zip(torch.autograd.grad(loss, (hidden, head)), gradients):
            assert torch.allclose(got, expected, rtol=1e-4, atol=1e-5)


def test_measured_peak_and_memory_are_plausible():
    assert 1e9 < peak_flops(ALONE) < 1e14
    assert 0 <= costs.peak_memory(ALONE.device) < 1e12
    assert costs.free_memory(ALONE.device) > 1e8
    assert runtime.all_sum(ALONE, 1.5, torch.tensor(2.0)) == [1.5, 2.0]
    assert [eta(s) for s in (42, 600, 36_000)] == ["42s", "10m", "10.0h"]


def test_output_that_nobody_reads_is_no_fault_of_the_disk(tmp_path):
    """`train_sft.py … | head -1` said "Broken pipe" with the exit code of a mistake when it came to
    print how many chats it had read."""
    with pytest.raises(BrokenPipeError), runtime.errors_in_one_line(str(tmp_path)):
        raise BrokenPipeError(32, "Broken pipe")

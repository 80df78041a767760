"""runtime.py: schedule, guard, log and the numbers in the log line."""
import ast
import copy
import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import model
import train_pt
from generate import generate
from plumbing import costs, loss, optim, runtime, terminal
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
    log.file.write(', "val": {"en": {"loss": 6.2}}\n')  # such a part ends like a whole line
    del log  # else it would still hold the folder
    Log(cfg, ALONE, 2, 9, 64, 10).write(step=2, loss=9.0)
    rows = [json.loads(line) for line in open(tmp_path / "log.jsonl")]
    assert rows == [{"step": 0, "loss": 0.0}, {"step": 1, "loss": 0.1},
                    {"step": 2, "val": {"en": 1}}, {"step": 2, "loss": 9.0}]


@pytest.mark.skipif(os.name != "posix", reason="Windows has no such locks")
def test_a_validation_takes_no_time_of_the_steps(tmp_path, capsys):
    """Seen to fail: the first line of a run had the validation before it among its milliseconds."""
    log = Log(runtime.Settings(out_dir=str(tmp_path), log_every=1), ALONE, 0, 9, 64, 10)
    log.since -= 1000  # as long as a validation might take
    log.write(step=0, val={"en": 1})
    log.step(0, 1.0, 0.1, 1.0)
    ms = int(capsys.readouterr().out.split(" ms")[0].split("| ")[-1].replace(",", ""))
    assert ms < 1000


def test_who_begins_a_batch_does_not_hang(monkeypatch):
    """Seen to fail: more than --dist_timeout of work between two exchanges, as the log P of all
    pairs before DPO, ended every process, each time."""
    for heard, moves in ((5.0, True), (None, False)):  # None: nothing was exchanged yet
        monkeypatch.setattr(runtime.RankState, "heard", heard)
        with ALONE.autocast():
            assert (runtime.RankState.heard != heard) == moves


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


@pytest.mark.parametrize("times, given, chosen", [
    (2.1, "auto", "bfloat16"), (0.01, "auto", "float32"), (2.1, "float32", "float32"),
    (0.01, "bfloat16", "bfloat16")])
def test_a_cpu_that_multiplies_bf16_fast_trains_in_it(times, given, chosen, monkeypatch, capsys,
                                                      tmp_path):
    """The type is measured, not looked up by a processor's name. The settings that a checkpoint
    remembers hold what was chosen: --resume on another machine says that it changed."""
    monkeypatch.setattr(runtime, "multiplies_bf16", lambda: times)
    found = []
    runtime.launch(lambda cfg, dist: found.extend((cfg.dtype, dist.dtype)), runtime.Settings(
        device="cpu", dtype=given, out_dir=str(tmp_path)))
    assert found == [chosen, getattr(torch, chosen)]
    said = f"--dtype=auto: {chosen}, because this CPU multiplies bfloat16 {times} times as fast"
    assert (said in capsys.readouterr().out) == (given == "auto")


def test_scores_are_the_same_on_every_cpu(monkeypatch, capsys):
    """train_rm.py --score asked the CPU, too: a busy one gave other scores than an idle one, and
    the answer stood among the lines of JSON."""
    monkeypatch.setattr(runtime, "multiplies_bf16", lambda: 2.1)
    found = []
    runtime.launch(lambda cfg, dist: found.append(dist.dtype), runtime.Settings(device="cpu"),
                   trains=False)
    assert found == [torch.float32] and capsys.readouterr().out == ""


def test_how_fast_a_cpu_multiplies_is_measured():
    """conftest.py answers for it in the other tests."""
    code = "from plumbing import runtime; print(runtime.multiplies_bf16())"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert 1e-4 < float(done.stdout) < 100


@pytest.mark.parametrize("given, found", [({}, "2000"), ({"GOMP_SPINCOUNT": "7"}, "7"),
                                          ({"OMP_WAIT_POLICY": "active"}, None)])
def test_waiting_threads_give_way_unless_the_user_said_how(monkeypatch, given, found):
    """Beside a busy neighbour two threads that spin take 2 to 23 times as long for a step."""
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "environ", {**os.environ, **given})
    terminal.end_quietly("__main__", trains=False)
    assert os.environ.get("GOMP_SPINCOUNT") == given.get("GOMP_SPINCOUNT")
    terminal.end_quietly("__main__")
    assert os.environ.get("GOMP_SPINCOUNT") == found


class NoFloat64(TorchDispatchMode):
    """Apple's MPS has no float64: whatever is computed where the model is must not be of it."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        assert not (isinstance(out, torch.Tensor) and out.dtype == torch.float64), func
        return out


def test_nothing_of_float64_is_computed_where_the_model_is(tiny):
    """A forward and a backward pass, the loss, clipping, both optimizers, writing and sampling."""
    net, idx = copy.deepcopy(tiny.model), torch.randint(250, (2, 12))
    cfg = runtime.Settings(optimizer="muon")
    with NoFloat64():
        list(generate(net, idx.tolist(), 3, top_k=9, top_p=0.9, min_p=0.01, logps=[],
                      repetition_penalty=1.1))
        optimizers = optim.make_optimizers(net, cfg)
        for reduction in ("sum", "none"):
            hidden = net(idx, hidden=True, segments=torch.ones_like(idx))
            model.token_logps(hidden, net.lm_head.weight, idx, reduction).sum().backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        model.RewardModel(net)(idx, torch.tensor([3, 12])).sum().backward()
    with pytest.raises(AssertionError), NoFloat64():
        idx.double()


def test_no_float64_is_made_on_a_device():
    """In no call stand float64 and a device, and .double() is only asked of what is on the CPU or
    (train_dpo.py's accuracy) made of it. Seen to fail for `all_max` and evaluate.py."""
    bad = []
    for path in (*ROOT.glob("*.py"), *ROOT.glob("plumbing/*.py"), *ROOT.glob("serving/*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                whole = ast.unparse(node)
                named = [ast.unparse(a) for a in (*node.args, *(k.value for k in node.keywords))]
                device = any(k.arg == "device" for k in node.keywords) or any(
                    a.endswith("device") for a in named)
                if "torch.float64" in named and device or (
                        ast.unparse(node.func).endswith(".double") and ".cpu()" not in whole
                        and path.name != "train_dpo.py"):
                    bad.append(f"{path.name}:{node.lineno}: {whole}")
    assert bad == []


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
    ("cuda", 65_536, 2048), ("cuda", 1 << 21, 128), ("cpu", 65_536, 128), ("cpu", 8_192, 1024),
    ("cpu", 1 << 24, 1)])
def test_a_gpu_holds_half_a_gigabyte_of_logits_at_once(device, vocabulary, rows):
    """2,048 x 65,536 logits of 4 bytes are 0.54 GB, 128 of them 34 MB, which a CPU holds.
    A stand-in for a head."""
    class Head:
        def __init__(self):
            self.device = torch.device(device)

        def __len__(self):
            return vocabulary
    assert loss.rows_at_once(Head()).batch_chunk_size == rows


def test_the_loss_is_the_same_however_many_rows_exist_at_once(monkeypatch):
    hidden, head = torch.randn(2, 9, 8, requires_grad=True), torch.randn(30, 8, requires_grad=True)
    targets = torch.randint(30, (2, 9))
    targets[0, 3] = -100
    want = torch.nn.functional.cross_entropy((hidden @ head.t()).flatten(0, 1), targets.flatten(),
                                             reduction="sum")
    gradients = torch.autograd.grad(want, (hidden, head))
    for rows in (1, 4, 100):
        options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=rows)
        monkeypatch.setattr(loss, "rows_at_once", lambda head: options)
        total = train_pt.pt_loss(hidden, head, targets)
        assert torch.allclose(total, want, rtol=1e-5)
        for got, expected in zip(torch.autograd.grad(total, (hidden, head)), gradients):
            assert torch.allclose(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("learns", [True, False])
@pytest.mark.parametrize("summed", [True, False])
def test_the_loss_in_bf16_is_that_in_fp32_to_its_rounding(monkeypatch, summed, learns, compiled):
    """torch's own multiplies in fp32 on a CPU, so bf16 was no faster where the vocabulary is large.
    Its -log P and gradients, in portions of four rows, to 8 bits of mantissa; one is not scored."""
    monkeypatch.setattr(loss, "LOGITS", 1)
    monkeypatch.setattr(loss, "LEAST", 4)
    if compiled:  # by what needs no C++ compiler
        learnt = torch.compile(loss.gradient, backend="aot_eager")
        monkeypatch.setattr(loss.Nats, "gradient", learnt)
    hidden, head = torch.randn(2, 9, 32, requires_grad=True), torch.randn(50, 32)
    head.requires_grad_(learns)
    targets, g = torch.randint(50, (2, 9)), torch.rand(2, 9)
    targets[0, 3] = -100

    def learn(low: bool) -> list[torch.Tensor]:
        with torch.autocast("cpu", torch.bfloat16, low):
            logps = model.token_logps(hidden, head, targets, "sum" if summed else "none")
        assert logps.dtype == torch.float32
        return [logps.detach(), *torch.autograd.grad((logps * (1 if summed else g)).sum(),
                                                     (hidden, head)[:1 + learns])]

    for low, exact in zip(learn(True), learn(False)):
        assert (low - exact).norm() < 0.02 * exact.norm()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert model.token_logps(hidden, head, targets)[0, 3] == 0


def test_measured_peak_and_memory_are_plausible():
    assert 1e9 < peak_flops(ALONE) < 1e14
    assert 0 <= costs.peak_memory(ALONE.device) < 1e12
    assert costs.free_memory(ALONE.device) > 1e8
    assert runtime.all_sum(ALONE, 1.5, torch.tensor(2.0)) == [1.5, 2.0]
    assert [eta(s) for s in (42, 600, 36_000)] == ["42s", "10m", "10.0h"]


def test_output_that_nobody_reads_is_no_fault_of_the_disk(tmp_path):
    """`train_sft.py … | head -1` said "Broken pipe" with the exit code of a mistake when it came to
    print how many chats it had read."""
    def count(cfg, dist):
        raise BrokenPipeError(32, "Broken pipe")
    with pytest.raises(BrokenPipeError):
        runtime.launch(count, runtime.Settings(out_dir=str(tmp_path), device="cpu"), trains=False)

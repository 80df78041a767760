"""What a model costs: its formulas for parameters, FLOPs and memory against what torch counts."""
import multiprocessing
import re
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from test_stages import ALONE
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import train_pt
import train_sft
from model import ModelConfig, Transformer
from plumbing import costs
from plumbing.costs import count_parameters, flops_per_token, training_memory
from plumbing.optim import make_optimizers

ROOT = Path(__file__).parent.parent
SMALL = dict(vocab_size=96, n_layer=3, n_head=4, n_kv_head=2, n_embd=48, head_dim=16,
             n_hidden=80, max_seq_len=96)


def ids(B, T):
    return torch.randint(96, (B, T), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name, vocab_size, billions, within", [
    ("124m", 50_257, 0.124, 0.05), ("1b", 65_536, 1, 0.05), ("7b", 65_536, 7, 0.1),
    ("13b", 65_536, 13, 0.1)])
def test_a_config_has_the_size_of_its_name(name, vocab_size, billions, within):
    settings = runpy.run_path(str(ROOT / f"config/pt_{name}.py"))
    cfg = train_pt.Config(**{k: v for k, v in settings.items() if k[0] != "_"})
    n = count_parameters(train_pt.shape(cfg, vocab_size))
    assert n == pytest.approx(billions * 1e9, rel=within)


@pytest.mark.parametrize("tied", [True, False])
def test_flops_are_those_the_counter_of_torch_sees(tied):
    """The counter has no formula for the CPU's fused attention, so that runs as two products,
    which are counted whole: the masked half too. Gains of norms, 6 each for us, it leaves out."""
    model, T = Transformer(ModelConfig(**SMALL, tied=tied)), 24
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        F.cross_entropy(model(ids(2, T)).flatten(0, 1), ids(2, T).flatten()).backward()
    gains = sum(p.numel() for p in model.parameters() if p.dim() == 1)
    assert counter.get_total_flops() / (2 * T) == flops_per_token(model.config, T) - 6 * gains


@pytest.mark.parametrize("tied", [True, False])
def test_what_needs_no_gradient_or_predicts_nothing_is_not_counted(tied):
    """By torch's own counter: blocks frozen, and a reward model, whose head has no part."""
    c = ModelConfig(50, 2, 4, 2, 32, 8, 96, 16, tied=tied)
    model, idx = Transformer(c), torch.randint(50, (2, 16))
    matrices = [p for p in model.layers.parameters() if p.dim() == 2]
    gains = count_parameters(c) - sum(p.numel() for p in model.parameters() if p.dim() == 2)
    with FlopCounterMode(display=False) as without_head, sdpa_kernel(SDPBackend.MATH):
        model(idx, hidden=True).sum().backward()
    assert without_head.get_total_flops() / 32 == flops_per_token(c, 16, head=False) - 6 * gains
    for p in matrices:
        p.requires_grad_(False)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(idx).sum().backward()
    frozen = sum(p.numel() for p in matrices)
    assert counter.get_total_flops() / 32 == flops_per_token(c, 16, frozen=frozen) - 6 * gains


@pytest.mark.filterwarnings("error:Mismatch dtype")  # of RMSNorm: it would be slow on a GPU
@pytest.mark.parametrize("width", [4, 2])
@pytest.mark.parametrize("B, T, changes", [
    (2, 64, dict(n_embd=128, head_dim=32, n_hidden=352)),
    (3, 96, dict(n_head=6, n_kv_head=1, n_embd=64, head_dim=64, tied=False))])
def test_activations_are_what_autograd_keeps(B, T, changes, width):
    """2 %: norms and attention keep a number per token and head too, which we leave out."""
    model, kept = Transformer(ModelConfig(**SMALL | changes)), {}

    def pack(t):  # holds it, so that no other gets its address
        kept[t.untyped_storage().data_ptr()] = t
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        with torch.autocast("cpu", torch.bfloat16, enabled=width == 2):
            model(ids(B, T), hidden=True)
    for p in model.parameters():
        kept.pop(p.untyped_storage().data_ptr(), None)
    of_loss = 2 * 4 * (96 + B * T) * model.config.n_embd  # two gradients of head and hidden states
    of_loss += 4 * 96 * (B * T if width == 4 else 2 * B * T + model.config.n_embd)  # logits
    ours = training_memory(model.config, B, T, accumulate=2, width=width)["activations"] - of_loss
    assert ours == pytest.approx(sum(t.untyped_storage().nbytes() for t in kept.values()), rel=0.02)


def two_steps(shape, B, T, accumulate):
    """Bytes by which this process grew at most. VmHWM: a child inherits its parent's ru_maxrss."""
    def size(key):
        return 1024 * int(Path("/proc/self/status").read_text().split(key)[1].split()[0])

    torch.set_num_threads(1)
    for changes in (dict(n_layer=1, vocab_size=96), {}):  # the first loads torch's code
        before = size("VmRSS:")
        model = Transformer(ModelConfig(**shape | changes))
        optimizer, = make_optimizers(model, train_pt.Config())
        for micro_step in range(2 * accumulate):
            hidden = model(x := torch.zeros(B, T, dtype=torch.long), hidden=True)
            train_pt.pt_loss(hidden, model.lm_head.weight, x).backward()
            if micro_step % accumulate == accumulate - 1:
                optimizer.step(), optimizer.zero_grad()
        del model, optimizer, hidden
    return size("VmHWM:") - before


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("B, T, accumulate, changes", [
    (1, 32, 1, dict(n_layer=6, n_head=6, n_embd=384, n_hidden=1024)),  # state: 12 bytes a weight
    (8, 128, 2, dict(n_layer=2, n_head=4, n_embd=256, n_hidden=704))])  # activations
def test_training_memory_is_what_two_steps_take(B, T, accumulate, changes, monkeypatch):
    """With this threshold malloc gives back what is freed; else it holds up to a third more. A
    forgotten gradient of the head would be 6 %, the code that a step loads makes 2 %."""
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "65536")
    shape = SMALL | dict(vocab_size=8192, head_dim=64, max_seq_len=T) | changes
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        grown = pool.apply(two_steps, (shape, B, T, accumulate))
    parts = training_memory(ModelConfig(**shape), B, T, accumulate)
    assert sum(parts.values()) == pytest.approx(grown, rel=0.05)


@pytest.mark.parametrize("gigabytes, returns", [(20, False), (1, True)])
def test_what_is_freed_is_returned_only_where_memory_is_short(gigabytes, returns, monkeypatch):
    """Returning it would slow the run by two fifths. The line says what else it may take."""
    calls: list[tuple] = []
    monkeypatch.setattr(costs.ctypes, "CDLL", lambda _: SimpleNamespace(
        mallopt=lambda *words: calls.append(words)))
    monkeypatch.setattr(costs, "free_memory", lambda device: gigabytes * 1e9)
    shape = SMALL | dict(vocab_size=49_152, n_embd=512, n_hidden=1536, n_layer=8)
    line = costs.memory_line(train_sft.Config(), ALONE, ModelConfig(**shape), 1, 32, 1)
    need = float(re.match(r"memory: ([\d.]+) GB = ", line)[1])
    assert calls == [(-3, 1 << 18)] * returns and 0.5 < need < 1
    assert returns != line.endswith(f"may take up to {2 * need:.1f}, which is faster")

"""Steps of kernels/gpu.py against model.py: on a GPU as they are, else by Triton's interpreter."""
import copy
from dataclasses import replace

import pytest
import torch

from generate import generate, sample
from model import KVCache, ModelConfig, Transformer
from plumbing import loss
from serving.batching import Batch, Text

pytest.importorskip("triton", reason="pip install -e '.[gpu]' for the kernels of a GPU")
from kernels import gpu  # noqa: E402

PLACE = "cuda" if torch.cuda.is_available() else "cpu"
QWEN3 = ModelConfig(101, 2, 4, 2, 48, 16, 80, 96)
SHAPES = {"qwen3": QWEN3, "heads of no power of 2": replace(QWEN3, head_dim=24, n_kv_head=4),
          "llama": replace(QWEN3, tied=False, qk_norm=False, rope_scaling=(8.0, 1.0, 4.0, 32.0)),
          "qwen2": replace(QWEN3, n_kv_head=1, qk_norm=False, qkv_bias=True)}


def pair(config=QWEN3, kind=torch.float32):
    """A model with weights that say something, and the same one captured."""
    torch.manual_seed(0)
    model = Transformer(config).eval().requires_grad_(False)
    for p in model.parameters():
        p.add_(0.2 * torch.randn_like(p)) if p.dim() == 1 else p.mul_(3)
    model = model.to(PLACE, kind)
    return model, gpu.capture(copy.deepcopy(model))


@pytest.fixture(autouse=True)
def exact(monkeypatch):
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


@torch.inference_mode()
@pytest.mark.parametrize("pads", [[0], [0, 3, 5]], ids=["one", "three"])
@pytest.mark.parametrize("name", SHAPES)
def test_a_step_gives_the_logits_of_the_model(name, pads):
    """Over more than KEYS tokens, and the cache is as it would be. Seen to fail without the turn of
    RoPE's second half, with the first key left out, and with `pad` ignored."""
    (plain, fast), B = pair(SHAPES[name]), len(pads)
    ids = torch.randint(101, (B, 80), device=PLACE)
    caches = [KVCache(plain.config, B, 81, pads, PLACE) for _ in range(2)]
    for t in range(5):  # in the padding, too
        want, got = (m(ids[:, t:t + 1], c) for m, c in zip((plain, fast), caches))
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4)
    for m, cache in zip((plain, fast), caches):
        m(ids[:, 5:70], cache)
    for t in range(70, 80):
        want, got = (m(ids[:, t:t + 1], c) for m, c in zip((plain, fast), caches))
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4)
    assert caches[0].length == caches[1].length == 80
    torch.testing.assert_close(caches[1].kv, caches[0].kv, rtol=1e-3, atol=1e-4)
    assert len(fast.steps) == 1


@torch.inference_mode()
def test_in_bf16_a_step_is_as_near_to_fp32_as_the_model():
    """The same numbers rounded to bf16 at other places: each is off from fp32 by a few per cent."""
    exact, _ = pair()
    plain, fast = pair(kind=torch.bfloat16)
    ids, off = torch.randint(101, (1, 30), device=PLACE), {}
    want = exact(ids)[0].float()
    for model in (plain, fast):
        cache = KVCache(QWEN3, 1, 30, None, PLACE, torch.bfloat16)
        got = torch.cat([model(token, cache)[0] for token in ids.split(1, dim=1)]).float()
        off[model] = float((got - want).norm() / want.norm())
    assert off[fast] < 1.2 * off[plain] < 0.12


def test_texts_are_the_same_alone_and_in_a_batch():
    """Of greedy and of drawn texts; those whose prompt is the same share its reading."""
    plain, fast = pair()
    prompts = [[5, 6, 7], [8], [5, 6, 7]]
    for some in (prompts[:1], prompts):
        for settings in ({"temperature": 0}, {"temperature": 1.0, "seed": 3}):
            assert list(generate(fast, some, 9, **settings)) == list(
                generate(plain, some, 9, **settings))


def test_texts_come_and_go_in_a_server():
    """Rows of a batch are a part of its cache; each number of rows has its own step."""
    def served(model):
        batch, left = Batch(model, sample, rows=3, window=64), list(range(4))

        def on_token(token, *_):
            if token is None:
                left.pop()
                if not left:
                    batch.stop()
        texts = [Text([3 + i, 7], 2 + 2 * i, on_token, sampling={"temperature": 0})
                 for i in left]
        for text in texts:
            batch.submit(text)
        batch.run()
        return [text.ids for text in texts]
    plain, fast = pair()
    assert served(fast) == served(plain)
    assert 1 < len(fast.steps) <= gpu.STEPS


def test_no_weight_is_held_twice_and_none_is_changed():
    plain, fast = pair(SHAPES["qwen2"])
    for name, tensor in plain.state_dict().items():
        assert torch.equal(fast.state_dict()[name], tensor), name
    for block, ((qkv, bias), (gate_up, _)) in zip(fast.layers, fast.fused):
        k, up = block.self_attn.k_proj, block.mlp.up_proj
        assert qkv.data_ptr() < k.weight.data_ptr() < qkv.data_ptr() + qkv.nbytes
        assert bias.data_ptr() < k.bias.data_ptr() < bias.data_ptr() + bias.nbytes
        assert gate_up.data_ptr() < up.weight.data_ptr() < gate_up.data_ptr() + gate_up.nbytes


@torch.inference_mode()
def test_steps_that_no_longer_fit_are_refused_and_old_ones_forgotten():
    _, fast = pair()
    token = torch.ones(1, 1, dtype=torch.long, device=PLACE)
    used, states = KVCache(QWEN3, 1, 90, None, PLACE), []
    for room in range(3, 4 + gpu.STEPS):
        states.append(fast(token, used, hidden=True))
        cache = KVCache(QWEN3, 1, room, None, PLACE)
        fast(token, cache)
        assert len(fast.steps) <= gpu.STEPS
    assert used.kv.data_ptr() in {where for where, *_ in fast.steps}  # the least used goes, not it
    assert not torch.equal(states[0], states[1])  # a step leaves the states of the last one alone
    before = len(fast.steps)
    fast(token, KVCache(QWEN3, 1, 1, None, PLACE))  # the end of a prompt, after which nothing comes
    assert len(fast.steps) == before
    cache.length = cache.max_len
    with pytest.raises(ValueError, match="more do not fit"):
        fast(token, cache)
    with pytest.raises(ValueError, match="the cache holds 1 rows, got a batch of 2"):
        fast(token.expand(2, 1), cache)
    cache = KVCache(QWEN3, 1, 200, None, PLACE)
    cache.length = 96
    with pytest.raises(ValueError, match="the model reads 96 tokens at most"):
        fast(token, cache)


@pytest.mark.skipif(PLACE == "cpu", reason="adds in fp32 within a product, which a CPU cannot")
def test_the_compiled_loss_on_a_gpu_is_that_in_fp32_to_its_rounding(monkeypatch):
    monkeypatch.setattr(loss.Nats, "gradient", torch.compile(loss.gradient))
    hidden, head = (torch.randn(n, 64, device=PLACE, requires_grad=True) for n in (300, 1000))
    targets, found = torch.randint(1000, (300,), device=PLACE), []
    for low in (True, False):
        with torch.autocast(PLACE, torch.bfloat16, low):
            nats = loss.token_nats(hidden, head, targets, True)
        found.append([nats.detach(), *torch.autograd.grad(nats, (hidden, head))])
    for low, exact in zip(*found):
        assert (low - exact).norm() < 0.02 * exact.norm()

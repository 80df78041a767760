"""The model against formulas typed from the papers, and against Qwen3 in transformers."""
import math

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from model import KVCache, ModelConfig, Transformer, rope_table, rotate

SMALL = dict(vocab_size=96, n_layer=3, n_head=4, n_kv_head=2, n_embd=48, head_dim=16,
             n_hidden=80, max_seq_len=32, rope_theta=100.0, norm_eps=1e-3)


def make(std=0.2, **changes):
    """A model with weights so large, and gains so uneven, that every part shows in the logits."""
    torch.manual_seed(0)
    model = Transformer(ModelConfig(**SMALL | changes))
    for p in model.parameters():
        torch.nn.init.normal_(p, mean=p.dim() == 1, std=std)
    return model


def ids(*shape, seed=0):
    return torch.randint(96, shape, generator=torch.Generator().manual_seed(seed))


def textbook(model, idx):
    """Logits (T, V) of ids (T,) in float64: multi-head attention whose keys and values are repeated
    for every head of a group, RoPE as a turn in the complex plane."""
    c, w = model.config, {name: p.double() for name, p in model.state_dict().items()}
    T, D, group = len(idx), c.head_dim, c.n_head // c.n_kv_head
    angle = torch.arange(T)[:, None] * c.rope_theta ** (-torch.arange(0, D, 2).double() / D)

    def norm(x, gain):
        return x / (x.square().mean(-1, keepdim=True) + c.norm_eps).sqrt() * gain

    def rope(x):
        z = torch.complex(*x.chunk(2, -1)) * torch.polar(torch.ones_like(angle), angle)
        return torch.cat((z.real, z.imag), -1)

    x = w["embed_tokens.weight"][idx]
    for i in range(c.n_layer):
        p = {name.split(".")[-2]: p for name, p in w.items() if name.startswith(f"layers.{i}.")}
        h = norm(x, p["input_layernorm"])
        q, k, v = ((h @ p[f"{n}_proj"].T).view(T, -1, D).transpose(0, 1) for n in "qkv")
        q, k = rope(norm(q, p["q_norm"])), rope(norm(k, p["k_norm"])).repeat_interleave(group, 0)
        scores = q @ k.transpose(1, 2) / math.sqrt(D) + torch.full((T, T), -math.inf).triu(1)
        y = scores.softmax(-1) @ v.repeat_interleave(group, 0)  # (H, T, D)
        x = x + torch.cat(tuple(y), -1) @ p["o_proj"].T
        h = norm(x, p["post_attention_layernorm"])
        gate = h @ p["gate_proj"].T
        x = x + (gate * gate.sigmoid() * (h @ p["up_proj"].T)) @ p["down_proj"].T
    return norm(x, w["norm.weight"]) @ w["lm_head.weight"].T


@pytest.mark.parametrize("n_kv_head, tied", [(4, True), (2, False), (1, True)])
def test_logits_are_those_of_the_textbook(n_kv_head, tied):
    """4 key heads for 4 query heads is plain attention. fp32 has 7 digits of logits up to 8."""
    model, idx = make(n_kv_head=n_kv_head, tied=tied), ids(2, 20)
    want = torch.stack([textbook(model, row) for row in idx]).float()
    assert_close(model(idx), want, atol=3e-5, rtol=1e-5)


def test_loss_before_training_is_ln_V():
    """A fresh model knows nothing; logits of spread s add s^2 / 2, here 0.02^2 48 / 2 = 0.01."""
    torch.manual_seed(0)
    logits = Transformer(ModelConfig(**SMALL))(ids(8, 32))
    assert abs(F.cross_entropy(logits.flatten(0, 1), ids(256, seed=1)) - math.log(96)) < 0.05


def test_residual_branches_start_smaller():
    """2 n_layer branches add up to one variance. 1,536 numbers give their spread to 2 %."""
    torch.manual_seed(0)
    for tied in (True, False):
        for name, p in Transformer(ModelConfig(**SMALL, tied=tied)).named_parameters():
            std = 0.02 / math.sqrt(6) if "o_proj" in name or "down_proj" in name else 0.02
            if not tied and "embed_tokens" in name:  # a vector of length 1
                std = 1 / math.sqrt(48)
            assert p.dim() == 1 or p.std().item() == pytest.approx(std, rel=0.08), name


def test_future_tokens_do_not_leak():
    model, idx = make(), ids(1, 12)
    before = model(idx)
    for t in range(12):
        changed = idx.clone()
        changed[0, t] = (idx[0, t] + 1) % 96
        after = model(changed)
        assert torch.equal(after[:, :t], before[:, :t])
        assert (after != before)[0, t:].any(-1).all(), "but every later token hears of it"


def test_rope_scores_depend_on_distance_only():
    """fp32 knows an angle of 200 radians to 1e-5; 16 products of size 1 add up to 1e-4."""
    q, k = torch.randn(2, 1, 1, 1, 16, generator=torch.Generator().manual_seed(0))
    for distance in (0, 1, 7):
        scores = [(rotate(q, *rope_table(torch.tensor([t]), 16, 100.0)) * rotate(
            k, *rope_table(torch.tensor([t + distance]), 16, 100.0))).sum() for t in (0, 50, 200)]
        assert_close(torch.stack(scores), scores[0].expand(3), atol=1e-4, rtol=0)
        assert distance == 0 or abs(scores[0] - (q * k).sum()) > 0.01


@pytest.mark.parametrize("size", range(1, 13))
def test_cached_equals_uncached(size):
    """In chunks, and in two parts at every split. SDPA's is_causal masks from the top left: with
    it a second chunk would see the first tokens only."""
    model, idx = make(), ids(2, 12)
    for sizes in (size, [size, 12 - size]):
        cache = KVCache(model.config, 2)
        parts = [model(part, cache) for part in idx.split(sizes, dim=1) if part.numel()]
        assert_close(torch.cat(parts, 1), model(idx), atol=1e-5, rtol=1e-5)


def test_too_many_tokens_are_refused_with_both_numbers():
    """A write past the end of a preallocated cache is otherwise dropped without a word."""
    model, cache = make(), KVCache(ModelConfig(**SMALL), 1, max_len=5)
    model(ids(1, 4), cache)
    for idx, into, message in (
            (ids(1, 2), cache, "holds 5 tokens: 4 are in it, 2 more do not fit"),
            (ids(2, 1), cache, "holds 1 rows, got a batch of 2"),
            (ids(1, 33), None, r"reads 32 tokens at most, got 0 \+ 33"),
            (ids(1, 33), KVCache(model.config, 1, 40), r"reads 32 tokens at most, got 0 \+ 33")):
        with pytest.raises(ValueError, match=message):
            model(idx, into)
    model(ids(1, 1), cache)  # the refused tokens have left no trace: one place is free


@pytest.mark.parametrize("sizes", [(9, 1, 1), (2, 3, 4, 1, 1), (1,) * 11, (2000, 11)])
def test_a_left_padded_row_gets_what_it_gets_alone(sizes):
    """With positions that count the padding too, angles of 2,000 radians would cost 1e-4."""
    model, n = make(max_seq_len=2048), sum(sizes)
    rows, pads = [ids(n), ids(5), ids(8)], [0, n - 5, n - 8]
    padded = torch.stack([F.pad(row, (pad, 0), value=7) for row, pad in zip(rows, pads)])
    cache = KVCache(model.config, 3, pad=pads)
    with torch.no_grad():
        got = torch.cat([model(part, cache) for part in padded.split(sizes, dim=1)], 1)
        for row, pad, logits in zip(rows, pads, got):
            assert_close(logits[pad:], model(row[None])[0], atol=1e-5, rtol=1e-5)


def test_no_token_is_left_without_a_key():
    """What attention makes of an empty row depends on the kernel: NaN, which spreads, or 0."""
    cache = KVCache(ModelConfig(**SMALL), 2, pad=[0, 6])
    _, mask = Transformer.cache_mask(torch.arange(9), cache)
    assert mask.any(-1).all() and mask[1, 0, 8].tolist() == [False] * 6 + [True] * 3


@pytest.mark.parametrize("n_kv_head, tied", [(4, True), (2, False)])
def test_logits_are_those_of_qwen3_in_transformers(n_kv_head, tied):
    transformers = pytest.importorskip("transformers")
    model, to_qwen3 = make(0.1, n_kv_head=n_kv_head, tied=tied), lambda name: (
        name if name.startswith("lm_head") else f"model.{name}")
    c = model.config
    twin = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(
        vocab_size=c.vocab_size, hidden_size=c.n_embd, intermediate_size=c.n_hidden,
        num_hidden_layers=c.n_layer, num_attention_heads=c.n_head, head_dim=c.head_dim,
        num_key_value_heads=c.n_kv_head, max_position_embeddings=c.max_seq_len,
        rms_norm_eps=c.norm_eps, tie_word_embeddings=c.tied,
        rope_parameters={"rope_type": "default", "rope_theta": c.rope_theta})).eval()
    twin.load_state_dict({to_qwen3(name): p for name, p in model.state_dict().items()})
    assert_close(model(ids(2, 24)), twin(ids(2, 24)).logits, atol=1e-5, rtol=1e-5)

"""
The language model, a decoder like Qwen3 and Llama, and the cache that lets it write fast.

    x = E[idx];  x += Attention(RMSNorm(x));  x += SwiGLU(RMSNorm(x));  logits = RMSNorm(x) W^T

RMSNorm (Zhang & Sennrich 2019), rotary positions (Su et al. 2021), grouped-query attention
(Ainslie et al. 2023) with normalised queries and keys (Henry et al. 2020), SwiGLU (Shazeer 2020),
no dropout. Parameters have the names of `transformers`, so convert.py moves weights by name; logits
agree to 1e-5. Each training script holds its loss; all but the reward model's use `token_logps`.
E is the embedding and W the output matrix; in a model whose `tied` is true they are one matrix.
"""
import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from plumbing.loss import token_nats


@dataclass(frozen=True)
class ModelConfig:
    """Shape of a model. Raises ValueError for a shape that cannot be built."""
    vocab_size: int
    n_layer: int
    n_head: int  # query heads
    n_kv_head: int  # key and value heads, each shared by n_head / n_kv_head query heads
    n_embd: int  # width C of the residual stream
    head_dim: int
    n_hidden: int  # width of the SwiGLU
    max_seq_len: int  # most tokens that it reads at once
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-6
    tied: bool = True  # one matrix is both the embedding and the output head
    qk_norm: bool = True  # norms queries and keys: Qwen3 does, Llama and Qwen2 do not
    qkv_bias: bool = False  # queries, keys and values have a bias: Qwen2
    rope_scaling: tuple[float, ...] = ()  # factor, low, high, length: Llama 3.1, see rope_table

    def __post_init__(self):
        sizes = (self.vocab_size, self.n_layer, self.n_head, self.n_kv_head, self.n_embd,
                 self.head_dim, self.n_hidden, self.max_seq_len)
        if min(sizes) < 1:
            raise ValueError(f"every size of a model must be at least 1, got {self}")
        if self.n_head % self.n_kv_head:
            raise ValueError(f"n_head {self.n_head} must be a multiple of n_kv_head "
                             f"{self.n_kv_head}")
        if self.head_dim % 2:
            raise ValueError(f"head_dim {self.head_dim} must be even: RoPE rotates pairs")


def rope_table(positions: Tensor, head_dim: int, theta: float,
               scaling: tuple[float, ...] = ()) -> tuple[Tensor, Tensor]:
    """cos, and sin with the signs that `rotate` needs, of position times frequency: fp32, each
    (*positions.shape, head_dim). Both halves of a head have the frequencies theta^(-2i/head_dim).
    Llama 3.1 divides by `factor` what turns less than `low` times in `length` tokens: see below."""
    i = torch.arange(0, head_dim, 2, dtype=torch.float32, device=positions.device)
    frequency = theta ** (-i / head_dim)
    if scaling:
        factor, low, high, length = scaling
        fast = ((length * frequency / (2 * math.pi) - low) / (high - low)).clamp(0, 1)
        frequency = frequency * (fast + (1 - fast) / factor)
    angle = positions.float()[..., None] * frequency
    cos, sin = angle.cos(), angle.sin()
    return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate each pair (a, b) = (x_i, x_{i + D/2}) by its angle: (a cos - b sin, b cos + a sin).
    x is (B, H, T, D). cos and sin, (..., T, D), come from `rope_table`: the minus is in sin."""
    return x * cos + x.roll(x.size(-1) // 2, dims=-1) * sin


class KVCache:
    """Keys and values of the tokens read so far, for `batch_size` rows that advance together. The
    caller passes it to `Transformer.forward`, which writes new tokens at `length` and then moves
    `length` on. Rows of different lengths are padded on the LEFT: `pad` counts each row's padding.
    No token attends to padding, and positions do not count it."""

    def __init__(self, config: ModelConfig, batch_size: int, max_len: int | None = None,
                 pad: list[int] | None = None, device: torch.device | None = None,
                 dtype: torch.dtype | None = None):
        self.max_len = max_len or config.max_seq_len
        shape = (config.n_layer, 2, batch_size, config.n_kv_head, self.max_len, config.head_dim)
        self.kv = torch.zeros(shape, device=device, dtype=dtype)
        self.pad = torch.tensor(pad or [0] * batch_size, device=device)
        self.padded = any(pad or [])
        self.length = 0

    def check_room(self, B: int, T: int) -> None:
        """Raises ValueError when T more tokens for B rows do not fit."""
        if B != self.kv.size(2):
            raise ValueError(f"the cache holds {self.kv.size(2)} rows, got a batch of {B}")
        if self.length + T > self.max_len:
            raise ValueError(f"the cache holds {self.max_len} tokens: {self.length} are in it, "
                             f"{T} more do not fit")

    def take(self, rows: list[int]) -> None:
        """Keep these rows, each as often as it is named: [0, 0, 1] makes two copies of row 0."""
        self.kv, self.pad = self.kv[:, :, rows], self.pad[rows]

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write (B, H, T, D) keys and values after the first `length`. Returns all of the layer's
        so far, (B, H, length + T, D) each."""
        end = self.length + k.size(2)
        keys, values = self.kv[layer, 0], self.kv[layer, 1]
        keys[:, :, self.length:end] = k
        values[:, :, self.length:end] = v
        return keys[:, :, :end], values[:, :, :end]


class RMSNorm(nn.RMSNorm):
    def forward(self, x: Tensor) -> Tensor:  # torch is fast if x and the weight are of one type
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


class Attention(nn.Module):
    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.layer, self.head_dim = layer, config.head_dim
        C, D = config.n_embd, config.head_dim
        self.q_proj = nn.Linear(C, config.n_head * D, bias=config.qkv_bias)
        self.k_proj = nn.Linear(C, config.n_kv_head * D, bias=config.qkv_bias)
        self.v_proj = nn.Linear(C, config.n_kv_head * D, bias=config.qkv_bias)
        self.o_proj = nn.Linear(config.n_head * D, C, bias=False)
        self.q_norm = RMSNorm(D, config.norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(D, config.norm_eps) if config.qk_norm else nn.Identity()

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], mask: Tensor | None,
                cache: KVCache | None) -> Tensor:
        B, T, _ = x.shape
        heads = (B, T, -1, self.head_dim)
        q = self.q_norm(self.q_proj(x).view(heads)).transpose(1, 2)  # (B, T, C) -> (B, H, T, D)
        k = self.k_norm(self.k_proj(x).view(heads)).transpose(1, 2)
        v = self.v_proj(x).view(heads).transpose(1, 2)
        q, k = rotate(q, *rope).to(v.dtype), rotate(k, *rope).to(v.dtype)  # rope is in fp32
        if cache is not None:
            k, v = cache.update(self.layer, k, v)
        # no mask: a token sees itself and all before it. With is_causal T = 1 would see one key
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True,
                                           is_causal=mask is None and T > 1)
        return self.o_proj(y.transpose(1, 2).reshape(B, T, -1))


class SwiGLU(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.n_embd, config.n_hidden, bias=False)
        self.up_proj = nn.Linear(config.n_embd, config.n_hidden, bias=False)
        self.down_proj = nn.Linear(config.n_hidden, config.n_embd, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.input_layernorm = RMSNorm(config.n_embd, config.norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.n_embd, config.norm_eps)
        self.mlp = SwiGLU(config)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], mask: Tensor | None,
                cache: KVCache | None) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), rope, mask, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class Transformer(nn.Module):
    """Decoder-only language model. Parameters are made in fp32 on the default device."""
    kind = path = ""  # stage and file of the checkpoint that it was loaded from

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.n_embd)
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.norm = RMSNorm(config.n_embd, config.norm_eps)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        if config.tied:
            self.lm_head.weight = self.embed_tokens.weight
        for name, p in self.named_parameters():
            if p.dim() == 2:
                # 2 n_layer branches are added to x; scaled so, their sum is as large at any depth
                into_residual = name.endswith(("o_proj.weight", "down_proj.weight"))
                std = 0.02 / math.sqrt(2 * config.n_layer) if into_residual else 0.02
                nn.init.normal_(p, std=std)
            elif name.endswith("bias"):
                nn.init.zeros_(p)
        if not config.tied:  # else it stays small: it is the head too, which must guess evenly
            nn.init.normal_(self.embed_tokens.weight, std=1 / math.sqrt(config.n_embd))

    def forward(self, idx: Tensor, cache: KVCache | None = None, hidden: bool = False,
                segments: Tensor | None = None) -> Tensor:
        """Logits (B, T, V) for token ids (B, T); with `hidden`, the normed last states (B, T, C)
        instead. With a cache, `idx` continues what is in it, in chunks of any size. `segments`
        (B, T) numbers the texts that share a row: no text sees another, and each has positions
        from 0. Raises ValueError past `max_seq_len` or the end of the cache."""
        (B, T), config = idx.shape, self.config
        start = cache.length if cache is not None else 0
        if start + T > config.max_seq_len:
            raise ValueError(f"the model reads {config.max_seq_len} tokens at most, "
                             f"got {start} + {T}")
        positions = torch.arange(start, start + T, device=idx.device)
        mask = None
        if cache is not None:
            cache.check_room(B, T)
            positions, mask = self.cache_mask(positions, cache)
        elif segments is not None:
            positions, mask = self.segment_mask(positions, segments)
        cos, sin = rope_table(positions, config.head_dim, config.rope_theta, config.rope_scaling)
        rope = cos.unsqueeze(-3), sin.unsqueeze(-3)  # (T, D) or (B, T, D) -> (…, 1, T, D)
        x = self.embed_tokens(idx)  # (B, T) -> (B, T, C)
        for block in self.layers:
            x = block(x, rope, mask, cache)
        if cache is not None:
            cache.length += T  # only now: each layer has written at the same place
        x = self.norm(x)
        return x if hidden else self.lm_head(x)

    @staticmethod
    def cache_mask(positions: Tensor, cache: KVCache) -> tuple[Tensor, Tensor | None]:
        """Positions of the new tokens, (T,) or (B, T), and which keys each may see, (…, T, length +
        T). None stands for "itself and all before", which SDPA does without a mask."""
        T, padded = len(positions), cache.padded
        if not padded and (T == 1 or cache.length == 0):
            return positions, None
        key = torch.arange(cache.length + T, device=positions.device)
        mask = key <= positions[:, None]  # (T, S)
        if padded:
            real = key >= cache.pad[:, None, None, None]  # (B, 1, 1, S)
            mask = mask & (real | (key == positions[:, None]))  # else NaN: a row of no key
            positions = (positions - cache.pad[:, None]).clamp(min=0)  # (B, T)
        return positions, mask

    @staticmethod
    def segment_mask(index: Tensor, segments: Tensor) -> tuple[Tensor, Tensor]:
        """Positions in each segment, (B, T), and which keys a token may see, (B, 1, T, T). `index`
        (T,) counts the tokens of a row. segments [[1, 1, 2]] -> positions [[0, 1, 0]]."""
        begins = F.pad(segments[:, 1:] != segments[:, :-1], (1, 0), value=True)
        first = torch.where(begins, index, 0).cummax(dim=1).values  # where its own segment begins
        same = segments[:, None, :, None] == segments[:, None, None, :]
        return index - first, same & (index <= index[:, None])


class RewardModel(nn.Module):
    """A Transformer that gives a text one number, read from its last state in fp32. `mean` and
    `std` are of its scores of replies by the SFT model, so that (score - mean) / std means the same
    for every reward model."""
    mean: Tensor
    std: Tensor

    def __init__(self, backbone: Transformer):
        super().__init__()
        self.backbone, C = backbone, backbone.config.n_embd
        self.score = nn.Linear(C, 1, bias=False, device=backbone.norm.weight.device)
        nn.init.normal_(self.score.weight, std=1 / math.sqrt(C + 1))
        device = self.score.weight.device
        self.register_buffer("mean", torch.zeros((), device=device))
        self.register_buffer("std", torch.ones((), device=device))
        if not backbone.config.tied:
            backbone.lm_head.requires_grad_(False)  # it plays no part in the score

    def forward(self, idx: Tensor, lengths: Tensor) -> Tensor:
        """(B,) scores of token ids (B, T), read at the last of the `lengths` (B,) real tokens."""
        hidden = self.backbone(idx, hidden=True)
        last = hidden[torch.arange(len(idx), device=idx.device), lengths - 1]
        with torch.autocast(idx.device.type, enabled=False):
            return self.score(last.float())[:, 0]


def token_logps(hidden: Tensor, head: Tensor, targets: Tensor, reduction: str = "none") -> Tensor:
    """log P(target) of each token, (B, T) in fp32, and 0 where the target is IGNORE (-100): as
    -F.cross_entropy(hidden @ head.T, …), but the (B, T, V) logits, the largest tensor of a run,
    exist only a portion at a time. Reduction "sum" gives the sum, and saves one matrix product.
    hidden (B, T, C): last states; head (V, C): `lm_head.weight`; targets (B, T)."""
    nats = token_nats(hidden.flatten(0, 1), head, targets.flatten(), reduction == "sum")
    return -nats if reduction == "sum" else -nats.float().view_as(targets)

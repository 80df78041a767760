"""
What a model costs: parameters, floating-point operations, memory. Nothing is allocated.
"""
import torch

from model import ModelConfig, Transformer


def count_parameters(config: ModelConfig) -> int:
    """Number of parameters, counted on the meta device: nothing is allocated."""
    with torch.device("meta"):
        return sum(p.numel() for p in Transformer(config).parameters())


def flops_per_token(config: ModelConfig, seq_len: int) -> int:
    """Floating-point operations to train on one token, forward and backward: 6 for each weight
    that multiplies, 12 n_layer n_head head_dim seq_len for attention (PaLM, appendix B: the
    causal half is counted whole, as everybody's MFU does)."""
    looked_up = 0 if config.tied else config.vocab_size * config.n_embd
    attention = 12 * config.n_layer * config.n_head * config.head_dim * seq_len
    return 6 * (count_parameters(config) - looked_up) + attention


def training_memory(config: ModelConfig, batch_size: int, seq_len: int, accumulate: int = 1,
                    width: int = 4, learnt: int | None = None,
                    head: bool = True) -> dict[str, int]:
    """Bytes at the fullest moment of an AdamW step on one device, by what takes them. `width` is
    bytes per activation: 4, or 2 under autocast, which leaves norms and the sum x in fp32. Counted
    is what autograd keeps of each line above on a CPU; a fused RMSNorm keeps one tensor less.
    `learnt` parameters have gradients, None: all; without `head` no token is predicted."""
    c, n, tokens = config, count_parameters(config), batch_size * seq_len
    heads = (c.n_head + c.n_kv_head) * c.head_dim
    matrix = c.vocab_size * c.n_embd
    exact = 4 * c.n_embd + 2 * heads  # x and x / rms(x): two norms of x, those of q and k
    # inputs of products, turned q and k, v and y; autocast makes q, k, v, gate and up a copy each
    rounded = (2 if width == 4 else 5) * c.n_embd + 4 * c.n_hidden + 2 * heads
    kept = tokens * (c.n_layer * (4 * exact + width * rounded) + 5 * 4 * c.n_embd)
    if width < 4:
        kept += width * (n - (1 if c.tied else 2) * matrix)  # autocast's copies of the weights
    learnt = n if learnt is None else learnt
    grads = 4 * learnt
    # where backward starts, the head has its gradient and autograd's zeros of the same size; on
    # the way activations go as gradients come; the two gradients of a tied matrix meet at the end
    spare = 4 * matrix if head and learnt == n else 0
    start = kept + 2 * spare + (grads if accumulate > 1 else 0)
    end = grads + (spare if c.tied else 0)
    return {"parameters": 4 * n, "optimizer": 8 * learnt, "gradients": grads,
            "activations": max(start, end) - grads}

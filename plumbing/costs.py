"""
What a model costs: parameters, floating-point operations, memory. Nothing is allocated.
"""
from functools import cache

import torch

from model import ModelConfig, Transformer


@cache  # deep models take a while, and estimate.py asks fifty times
def count_parameters(config: ModelConfig) -> int:
    """Number of parameters, counted on the meta device: nothing is allocated."""
    with torch.device("meta"):
        return sum(p.numel() for p in Transformer(config).parameters())


def flops_per_token(config: ModelConfig, seq_len: int, head: bool = True, frozen: int = 0) -> int:
    """Floating-point operations to train on one token, forward and backward: 6 for each weight
    that multiplies, 4 where it is one of those `frozen`, which need no gradient, and 12 n_layer
    n_head head_dim seq_len for attention (PaLM, appendix B: the causal half is counted whole, as
    everybody's MFU does). Without `head` no token is predicted."""
    matrices = 1 if config.tied else 2  # embedding and head; the embedding is only looked up
    idle = (matrices - head) * config.vocab_size * config.n_embd
    attention = 12 * config.n_layer * config.n_head * config.head_dim * seq_len
    return 6 * (count_parameters(config) - idle) - 2 * frozen + attention


def training_memory(config: ModelConfig, batch_size: int, seq_len: int, accumulate: int = 1,
                    width: int = 4, learnt: int | None = None, head: bool = True,
                    shards: int = 1, recompute: bool = False, muon: bool = False,
                    masked: bool = False) -> dict[str, int]:
    """Bytes at the fullest moment of a training step on one device, by what takes them. `width` is
    bytes per activation: 4, or 2 under autocast, which leaves norms and the sum x in fp32. Counted
    is what autograd keeps of each line of model.py on a CPU; a fused RMSNorm keeps one tensor less.
    `learnt` parameters have gradients (as in `lora_parameters`), None: all; without `head` no token
    is predicted. `shards` and `recompute` as in sharding.py: parameters in so many parts, blocks
    run again. Muon keeps one moment of a block's matrices, not two. `masked`: chats are packed, and
    each block keeps which token may see which, as a number for each pair of a row."""
    c, n, tokens = config, count_parameters(config), batch_size * seq_len
    heads = (c.n_head + c.n_kv_head) * c.head_dim
    matrix = c.vocab_size * c.n_embd
    exact = 4 * c.n_embd + 2 * heads  # x and x / rms(x): two norms of x, those of q and k
    # inputs of products, turned q and k, v and y; autocast makes q, k, v, gate and up a copy each
    rounded = (2 if width == 4 else 5) * c.n_embd + 4 * c.n_hidden + 2 * heads
    tables = (1 if c.tied else 2) * matrix
    of_block, root = 4 * exact + width * rounded, tables + c.n_embd
    of_block += width * seq_len * masked
    inside = (n - root) // c.n_layer  # parameters of a block
    copies = width * inside if width < 4 and shards == 1 else 0  # autocast's, of a block's weights
    # of a block that is run again its input waits; one at a time has all the rest
    again = tokens * of_block + copies if recompute else 0
    kept = c.n_layer * (tokens * 4 * c.n_embd if recompute else tokens * of_block + copies)
    kept += tokens * 5 * 4 * c.n_embd
    gains = c.n_layer * 2 * (c.n_embd + c.head_dim)
    whole, learnt = learnt is None, n if learnt is None else learnt
    once = muon * (learnt - root - gains)  # with one moment
    learnt -= 0 if head or c.tied else matrix  # a head of its own that predicts nothing
    grads, moments = 4 * learnt, 8 * learnt - 4 * once
    # where backward starts, the head has its gradient and autograd's zeros of the same size; on
    # the way activations go as gradients come; the two gradients of a tied matrix meet at the end
    spare = 4 * matrix * head
    if shards > 1:
        # embedding and head stay while they are needed, in fp32; of the blocks one is in use and
        # one on its way; the gradient of one is whole, in `width` and in fp32 to be summed
        summed = inside * (width + 4) * whole
        return {"parameters": 4 * n // shards, "optimizer": moments // shards,
                "gradients": grads // shards, "gathered": 4 * root + 2 * width * inside,
                "activations": kept + spare + max(spare, again + summed)}
    start = kept + spare + max(spare, again) + (grads if accumulate > 1 else 0)
    end = grads + (spare if c.tied else 0)
    return {"parameters": 4 * n, "optimizer": moments, "gradients": grads,
            "activations": max(start, end) - grads}


def judging_memory(config: ModelConfig, rows: int, seq_len: int, width: int = 4,
                   shards: int = 1) -> int:
    """Bytes that judging `rows` rows at once takes beside what is held anyway. Without gradients
    a block leaves only x; it is fullest in the SwiGLU, with x, its norm and three vectors as wide
    as that."""
    of_token = 8 * config.n_embd + width * 3 * config.n_hidden
    return rows * seq_len * of_token + gathered(config, width, shards)


def writing_memory(config: ModelConfig, rows: int, prompt: int, reply: int, width: int = 4,
                   shards: int = 1) -> int:
    """Bytes that writing `rows` replies at once takes beside what is held anyway: keys and values,
    and the prompts read into them, with what each token may see, or the probabilities of a token,
    in fp32 and their sum in fp64. A copy writes in fp32, parts in `width` bytes."""
    c, width = config, 4 if shards == 1 else width
    cache = width * 2 * c.n_layer * rows * c.n_kv_head * c.head_dim * (prompt + reply)
    read = judging_memory(c, rows, prompt, width) + 5 * rows * prompt * prompt
    return cache + max(read, 20 * rows * c.vocab_size) + gathered(c, width, shards)


def gathered(config: ModelConfig, width: int, shards: int) -> int:
    """Bytes of all weights of a model in parts, together in one place (sharding.unsharded); of a copy
    they are there already."""
    root = (1 if config.tied else 2) * config.vocab_size * config.n_embd + config.n_embd
    return 0 if shards == 1 else 4 * root + width * (count_parameters(config) - root)


def fullest(training: dict[str, int], **others: int) -> dict[str, int]:
    """The parts of `training_memory`, unless one of the `others`, which come when gradients and
    activations are gone, takes more than these and what was gathered for them: then it stands in
    their place, by its name."""
    passing = ("gathered", "gradients", "activations")
    name = max(others, key=others.get)
    if others[name] <= sum(training.get(part, 0) for part in passing):
        return training
    return {k: v for k, v in training.items() if k not in passing} | {name: others[name]}


def lora_parameters(config: ModelConfig, rank: int) -> int:
    """Parameters that --lora_rank learns: rank (rows + columns) for each matrix of the blocks, and
    all of the norms, the embedding, and the head where that is another matrix."""
    c, q, kv = config, config.n_head * config.head_dim, config.n_kv_head * config.head_dim
    sides = 2 * (c.n_embd + q) + 2 * (c.n_embd + kv) + 3 * (c.n_embd + c.n_hidden)
    norms = c.n_layer * 2 * (c.n_embd + c.head_dim) + c.n_embd
    return rank * c.n_layer * sides + norms + (1 if c.tied else 2) * c.vocab_size * c.n_embd

"""
What a run costs in parameters, operations and memory. The rest may be skipped.
"""
import math
from functools import cache

import torch

from model import ModelConfig, Transformer
from plumbing.runtime import LESS_MEMORY, Dist, RankState, Settings, of_process


@cache  # a deep model takes a while, and bench/estimate.py asks fifty times
def count_parameters(config: ModelConfig) -> int:
    """Number of parameters, counted on the meta device: nothing is allocated."""
    with torch.device("meta"):
        return sum(p.numel() for p in Transformer(config).parameters())


def flops_per_token(config: ModelConfig, seq_len: int, head: bool = True, frozen: int = 0) -> int:
    """Floating-point operations to train on one token, forward and backward. A weight that
    multiplies costs 6, or 4 if it is one of the `frozen` ones, which get no gradient. Attention
    costs 12 n_layer n_head head_dim seq_len (PaLM, appendix B; like everybody's MFU it counts the
    masked half too). Without `head` no token is predicted."""
    matrices = 1 if config.tied else 2  # embedding and head; the embedding is only looked up
    idle = (matrices - head) * config.vocab_size * config.n_embd
    attention = 12 * config.n_layer * config.n_head * config.head_dim * seq_len
    return 6 * (count_parameters(config) - idle) - 2 * frozen + attention


def block_activations(c: ModelConfig, seq_len: int, width: int, masked: bool) -> int:
    """Bytes per token that autograd keeps of one block of model.py. Norms work in fp32, products in
    `width` bytes. `masked`: chats are packed, and each token says which others it may see."""
    q_and_k = (c.n_head + c.n_kv_head) * c.head_dim
    norms = 4 * (4 * c.n_embd + 2 * q_and_k * c.qk_norm)  # of x twice, q and k: input, input / rms
    copied = 3 * c.n_embd if width < 4 else 0  # autocast makes a copy for q, k, v and for gate, up
    # inputs of q, k, v and of gate, up; rotated q and k, v and y; gate, up, their product and silu
    products = width * (2 * c.n_embd + copied + 2 * q_and_k + 4 * c.n_hidden)
    return norms + products + width * seq_len * masked


def training_memory(config: ModelConfig, batch_size: int, seq_len: int, accumulate: int = 1,
                    width: int = 4, trained: int | None = None, head: bool = True,
                    shards: int = 1, recompute: bool = False, muon: bool = False,
                    masked: bool = False) -> dict[str, int]:
    """Bytes at the fullest moment of a training step on one device, by what takes them.

    `width`: bytes per activation, 4, or 2 under autocast. `trained`: how many parameters have
    gradients (LoRA; None: all). `head`: whether tokens are predicted (not by a reward model).
    `shards`, `recompute`: see sharding.py. `muon`: matrices of the blocks keep one moment, not two.
    `masked`: see `block_activations`. Checked against what runs take: tests/test_memory.py."""
    c, n, tokens = config, count_parameters(config), batch_size * seq_len
    table = c.vocab_size * c.n_embd  # the embedding, or a head of its own
    root = (1 if c.tied else 2) * table + c.n_embd  # all that is in no block
    block = (n - root) // c.n_layer
    cast = width * block if width < 4 and shards == 1 else 0  # autocast's copy of a block's weights

    of_block = tokens * block_activations(c, seq_len, width, masked) + cast
    # with recompute a block keeps only its input; the rest exists for one block at a time
    kept = c.n_layer * (tokens * 4 * c.n_embd if recompute else of_block)
    kept += tokens * 5 * 4 * c.n_embd  # around the last norm and the loss
    rerun = of_block if recompute else 0

    everything, trained = trained is None, n if trained is None else trained
    gains = c.n_layer * 2 * (c.n_embd + c.head_dim * c.qk_norm)  # of the norms
    one_moment = muon * (trained - root - gains)
    trained -= 0 if head or c.tied else table  # an untied head that predicts nothing is not trained
    gradients, moments = 4 * trained, 8 * trained - 4 * one_moment
    # The backward pass starts at the head: with its gradient, and zeros of the same size beside it.
    at_head = 4 * table * head
    if shards > 1:
        # Embedding and head are gathered in fp32 while they are needed. Of the blocks one is in use
        # and the next on its way. A block's gradient is whole while it is summed.
        summed = block * (width + 4) * everything
        return {"parameters": 4 * n // shards, "optimizer": moments // shards,
                "gradients": gradients // shards, "gathered": 4 * root + 2 * width * block,
                "activations": kept + at_head + max(at_head, rerun + summed)}
    # Activations are freed while gradients are made, so the fullest moment is either the start of
    # the backward pass (earlier micro-steps have left gradients) or its end, where the two
    # gradients of a tied matrix meet.
    start = kept + at_head + max(at_head, rerun) + (gradients if accumulate > 1 else 0)
    end = gradients + (at_head if c.tied else 0)
    return {"parameters": 4 * n, "optimizer": moments, "gradients": gradients,
            "activations": max(start, end) - gradients}


def judging_memory(config: ModelConfig, rows: int, seq_len: int, width: int = 4,
                   shards: int = 1) -> int:
    """Bytes that scoring `rows` rows at once takes, beside what is held anyway. Without gradients a
    block keeps only x. The SwiGLU takes most: x, its norm and three vectors of n_hidden."""
    of_token = 8 * config.n_embd + width * 3 * config.n_hidden
    return rows * seq_len * of_token + gathered(config, width, shards)


def writing_memory(config: ModelConfig, rows: int, prompt: int, reply: int, width: int = 4,
                   shards: int = 1) -> int:
    """Bytes that writing `rows` replies at once takes, beside what is held anyway: the KV cache,
    and either reading the prompts, with a mask, or the probabilities of one token, in fp32 and
    summed in fp64. A copy of a model writes in fp32, a sharded one in `width` bytes."""
    c, width = config, 4 if shards == 1 else width
    cache = width * 2 * c.n_layer * rows * c.n_kv_head * c.head_dim * (prompt + reply)
    read = judging_memory(c, rows, prompt, width) + 5 * rows * prompt * prompt
    return cache + max(read, 20 * rows * c.vocab_size) + gathered(c, width, shards)


def gathered(config: ModelConfig, width: int, shards: int) -> int:
    """Bytes that `sharding.unsharded` adds when it puts the parts of a model together. For a copy
    it is 0: its weights are there already."""
    root = (1 if config.tied else 2) * config.vocab_size * config.n_embd + config.n_embd
    return 0 if shards == 1 else 4 * root + width * (count_parameters(config) - root)


def fullest_moment(training: dict[str, int], **others: int) -> dict[str, int]:
    """The parts of `training_memory`, or of a moment that takes more. The `others` come when
    gradients and activations are gone; if the largest of them takes more than these and what was
    gathered for them, it stands in their place: fullest_moment(training, writing=10**9)."""
    passing = ("gathered", "gradients", "activations")
    name = max(others, key=others.__getitem__)
    if others[name] <= sum(training.get(part, 0) for part in passing):
        return training
    return {k: v for k, v in training.items() if k not in passing} | {name: others[name]}


def lora_parameters(config: ModelConfig, rank: int) -> int:
    """Parameters that --lora_rank trains: rank (rows + columns) for each matrix of the blocks, and
    all of the norms, the embedding and an untied head."""
    c, q, kv = config, config.n_head * config.head_dim, config.n_kv_head * config.head_dim
    sides = 2 * (c.n_embd + q) + 2 * (c.n_embd + kv) + 3 * (c.n_embd + c.n_hidden)
    norms = c.n_layer * 2 * (c.n_embd + c.head_dim) + c.n_embd
    return rank * c.n_layer * sides + norms + (1 if c.tied else 2) * c.vocab_size * c.n_embd


def stage_memory(cfg: Settings, dist: Dist, config: ModelConfig, rows: int, seq_len: int,
                 accumulate: int, *, frozen: dict[str, ModelConfig] | None = None,
                 judged: tuple[int, int] = (0, 0), written: tuple[int, int, int] = (0, 0, 0),
                 another_writes: bool = False, merges: bool = False, **how) -> dict[str, int]:
    """Bytes that a stage needs at its fullest moment, by what takes them. Training puts `rows` rows
    of `seq_len` tokens through the model at once (`how`: see `training_memory`), beside the
    `frozen` models that it holds. A validation judges (rows, tokens) and has (rows, prompt, reply)
    written, by another model of the same shape with `another_writes`. `merges`: to save LoRA, all
    matrices are copied."""
    shards, width = dist.world if cfg.shard else 1, dist.dtype.itemsize
    parts = training_memory(config, rows, seq_len, accumulate, width, shards=shards,
                            recompute=cfg.recompute, muon=cfg.optimizer == "muon", **how)
    held = {name: 4 * count_parameters(shape) // shards for name, shape in (frozen or {}).items()}
    weights = parts["parameters"]
    writing = writing_memory(config, *written, width, shards) + weights * another_writes
    return fullest_moment(held | parts, evaluation=judging_memory(config, *judged, width, shards),
                          writing=writing if written[0] else 0, merging=weights * merges)


def memory_line(cfg: Settings, dist: Dist, *shape, **moments) -> str:
    """`stage_memory` beside what is free; a warning past 90 %."""
    parts, free = stage_memory(cfg, dist, *shape, **moments), free_memory(dist.device)
    need = sum(parts.values())
    text = " + ".join(f"{name} {n / 1e9:.2f}" for name, n in parts.items())
    text = f"memory: {need / 1e9:.2f} GB = {text}; {free / 1e9:.1f} GB are free"
    return text + (f"\nWARNING: that may not fit: {LESS_MEMORY}" if need > 0.9 * free else "")


def free_memory(device: torch.device) -> float:
    """Bytes that can still be allocated; infinite where nobody says."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        with open("/proc/meminfo") as f:
            return next(1024.0 * int(line.split()[1]) for line in f if line.startswith("MemAvail"))
    except (OSError, StopIteration):
        return math.inf


def peak_memory(device: torch.device) -> float:
    """Most bytes in use so far on the GPU, or in this process since before it made a model."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return of_process("VmHWM") - RankState.program


def peak_line(dist: Dist) -> str:
    """What a run needed, to be compared with `memory_line`."""
    program = RankState.program / 1e9
    beside = f", beside {program:.2f} GB of Python and torch" if program else ""
    return f"peak memory {peak_memory(dist.device) / 1e9:.2f} GB{beside}"

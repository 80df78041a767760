"""
What a run costs in parameters, operations and memory. The rest may be skipped.
"""
import math
from functools import cache

import torch

from model import ModelConfig, Transformer
from plumbing.runtime import LESS_MEMORY, Dist, RankState, Settings, of_process


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
    """Bytes that `sharding.unsharded` adds when it puts the parts of a model together; 0 for a copy,
    whose weights are there already."""
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
    """Parameters that --lora_rank learns: rank (rows + columns) for each matrix of the blocks, and
    all of the norms, the embedding, and the head where that is another matrix."""
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

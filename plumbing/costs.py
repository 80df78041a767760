"""
What a run costs in parameters, operations and memory. The rest may be skipped.
"""
import ctypes
import math
from contextlib import suppress
from functools import cache

import torch
from torch import nn

from model import ModelConfig, Transformer
from plumbing.loading import empty
from plumbing.lora import LoraSettings, add_lora, updates
from plumbing.runtime import LESS_MEMORY, Dist, RankState, Settings, of_process


@cache  # a deep model takes a while, and bench/estimate.py asks fifty times
def count_parameters(config: ModelConfig) -> int:
    """Number of parameters; none is allocated."""
    return sum(p.numel() for p in empty(config).parameters())


def count_frozen(model: Transformer) -> int:
    """Parameters that LoRA leaves as they are, 0 for a model that is trained itself."""
    frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    return frozen if updates(model) else 0


def flops_per_token(config: ModelConfig, seq_len: int, head: bool = True, frozen: int = 0) -> int:
    """Floating-point operations to train on one token, forward and backward. A weight that
    multiplies costs 6, or 4 if it is one of the `frozen` ones, which get no gradient. Attention
    costs 12 n_layer n_head head_dim seq_len (PaLM, appendix B; like everybody's MFU it counts the
    masked half too). Without `head` no token is predicted."""
    matrices = 1 if config.tied else 2  # embedding and head; the embedding is only looked up
    idle = (matrices - head) * config.vocab_size * config.n_embd
    attention = 12 * config.n_layer * config.n_head * config.head_dim * seq_len
    return 6 * (count_parameters(config) - idle) - 2 * frozen + attention


def block_activations(c: ModelConfig, seq_len: int, width: int, masked: bool, rank: int = 0,
                      extra: bool = False) -> int:
    """Bytes per token that autograd keeps of one block of model.py. Norms work in fp32, products in
    `width` bytes. `masked`: chats are packed, and each token says which others it may see. `rank`,
    `extra`: of LoRA, which keeps A x of 7 matrices, and of a frozen norm only the input."""
    q_and_k = (c.n_head + c.n_kv_head) * c.head_dim
    # of x twice, q and k: input, input / rms
    norms = 4 * (2 * c.n_embd + q_and_k * c.qk_norm) * (1 if rank and not extra else 2)
    copied = 3 * c.n_embd if width < 4 else 0  # autocast makes a copy for q, k, v and for gate, up
    # inputs of q, k, v and of gate, up; rotated q and k, v and y; gate, up, their product and silu
    products = width * (2 * c.n_embd + copied + 2 * q_and_k + 4 * c.n_hidden)
    return norms + products + width * seq_len * masked + width * 7 * rank


def training_memory(config: ModelConfig, batch_size: int, seq_len: int, accumulate: int = 1,
                    width: int = 4, head: bool = True, shards: int = 1, recompute: bool = False,
                    muon: bool = False, masked: bool = False, rank: int = 0, extra: bool = False,
                    held: int = 4) -> dict[str, int]:
    """Bytes at the fullest moment of a training step on one device, by what takes them.

    `width`: bytes per activation, 4, or 2 under autocast. `head`: whether tokens are predicted (not
    by a reward model). `shards`, `recompute`: see sharding.py. `muon`: matrices of the blocks keep
    one moment, not two. `masked`: see `block_activations`. `rank`, `extra`: of LoRA, 0: everything
    is trained. `held`: bytes of a frozen weight. tests/test_memory.py measures what runs take."""
    c, n, tokens = config, count_parameters(config), batch_size * seq_len
    trained = lora_parameters(c, rank, extra) if rank else n
    weights = held * n + 4 * trained if rank else 4 * n
    table = c.vocab_size * c.n_embd  # the embedding, or a head of its own
    root = (1 if c.tied else 2) * table + c.n_embd  # all that is in no block
    block = (n - root) // c.n_layer
    cast = width * block if width < 4 and shards == 1 else 0  # autocast's copy of a block's weights

    of_block = tokens * block_activations(c, seq_len, width, masked, rank, extra) + cast
    # with recompute a block keeps only its input; the rest exists for one block at a time
    kept = c.n_layer * (tokens * 4 * c.n_embd if recompute else of_block)
    kept += tokens * 5 * 4 * c.n_embd  # around the last norm and the loss
    rerun = of_block if recompute else 0

    gains = c.n_layer * 2 * (c.n_embd + c.head_dim * c.qk_norm)  # of the norms
    one_moment = muon * (trained - (root + gains) * (extra or not rank))
    # an untied head that predicts nothing is not trained
    trained -= table if not head and not c.tied and (extra or not rank) else 0
    gradients, moments = 4 * trained, 8 * trained - 4 * one_moment
    # The backward pass starts at the head: with its gradient, and zeros of the same size beside it.
    # A frozen one has none, but is made wide.
    at_head = 4 * table * head * (not rank or extra)
    widened = 4 * table * head * (held < width and not at_head)
    # loss.py holds a portion of the logits, in bf16 also in fp32, and the head and its gradient
    logits = head * (4 * min(1 << 23, tokens * c.vocab_size) if width == 4 else
                     8 * min(1 << 22, tokens * c.vocab_size) + 4 * table)
    if shards > 1:
        # Embedding and head are gathered in fp32 while they are needed. Of the blocks one is in use
        # and the next on its way. A block's gradient is whole while it is summed.
        summed = block * (width + 4) * (not rank)
        return {"parameters": weights // shards, "optimizer": moments // shards,
                "gradients": gradients // shards, "gathered": 4 * root + 2 * width * block,
                "activations": kept + at_head
                + max(at_head + logits - 2 * width * block, rerun + summed)}  # no block at the head
    # Activations are freed while gradients are made, so the fullest moment is either the start of
    # the backward pass (earlier micro-steps have left gradients) or its end, where the two
    # gradients of a tied matrix meet.
    start = kept + at_head + max(max(at_head, widened) + logits, rerun)
    start += gradients if accumulate > 1 else 0
    end = gradients + (at_head if c.tied else 0)
    return {"parameters": weights, "optimizer": moments, "gradients": gradients,
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


@cache
def lora_parameters(config: ModelConfig, rank: int, extra: bool = False) -> int:
    """Parameters that --lora_rank trains."""
    add_lora(model := empty(config), rank, extra)
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def stage_memory(cfg: Settings, dist: Dist, model: Transformer | ModelConfig, rows: int,
                 seq_len: int, accumulate: int, *, frozen: dict[str, nn.Module] | None = None,
                 judged: tuple[int, int] = (0, 0), written: tuple[int, int, int] = (0, 0, 0),
                 another_writes: bool = False, **how) -> dict[str, int]:
    """Bytes that a stage needs at its fullest moment, by what takes them. Training puts `rows` rows
    of `seq_len` tokens through the model at once (`how`: see `training_memory`), beside the
    `frozen` models that it holds, LoRA's reference being the model itself. A validation judges
    (rows, tokens) and has (rows, prompt, reply) written, by another model of the same shape with
    `another_writes`."""
    shards, width = dist.world if cfg.shard else 1, dist.dtype.itemsize
    config, frozen = model if isinstance(model, ModelConfig) else model.config, frozen or {}
    if isinstance(cfg, LoraSettings) and cfg.lora_rank and isinstance(model, Transformer):
        how |= dict(rank=cfg.lora_rank, extra=cfg.lora_extra,
                    held=model.layers[0].mlp.up_proj.weight.itemsize)
        frozen = {name: one for name, one in frozen.items() if one is not model}
    parts = training_memory(config, rows, seq_len, accumulate, width, shards=shards,
                            recompute=cfg.recompute, muon=cfg.optimizer == "muon", **how)
    held = {name: sum(p.nbytes for p in one.parameters()) // shards
            for name, one in frozen.items()}
    writing = writing_memory(config, *written, width, shards) + parts["parameters"] * another_writes
    return fullest_moment(held | parts, evaluation=judging_memory(config, *judged, width, shards),
                          writing=writing if written[0] else 0)


def memory_line(cfg: Settings, dist: Dist, *shape, **moments) -> str:
    """`stage_memory` beside what is free; a warning past 90 %. A large run on a CPU takes up to
    twice as much, because glibc keeps blocks that are freed. Where memory is short, those of 256 kB
    leave the process, which slows LoRA of 135M to 0.6 of its speed (docs/results.md)."""
    parts, free = stage_memory(cfg, dist, *shape, **moments), free_memory(dist.device)
    need, keeps = sum(parts.values()), ""
    if dist.device.type == "cpu" and parts["parameters"] > 1e8:
        if free > 2 * need:
            keeps = f": the run may take up to {2 * need / 1e9:.1f}, which is faster"
        else:
            with suppress(AttributeError, TypeError, OSError):  # only glibc knows mallopt
                ctypes.CDLL(None).mallopt(-3, 1 << 18)  # M_MMAP_THRESHOLD
    text = " + ".join(f"{name} {n / 1e9:.2f}" for name, n in parts.items())
    text = f"memory: {need / 1e9:.2f} GB = {text}; {free / 1e9:.1f} GB are free{keeps}"
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

"""
Direct preference optimisation: learn from pairs of replies without a reward model.

    python train_dpo.py config/dpo_micro.py --init_from=out/sft --data=pairs.jsonl --out_dir=out/dpo

    L_DPO = - log sigmoid(beta h)                                 (Rafailov et al. 2023)
    h = (log P(chosen) - log P_ref(chosen)) - (log P(rejected) - log P_ref(rejected))

log P is summed over the tokens of a reply; the reference is the model at the start, frozen. beta h
is the margin between the rewards beta (log P - log P_ref) that the policy gives implicitly. Others:

    sigmoid, label_smoothing e   -(1 - e) log sigmoid(beta h) - e log sigmoid(-beta h)      cDPO
    ipo       (h / tokens - 1 / (2 beta))^2, log P averaged per token          (Azar et al. 2023)
    simpo     - log sigmoid(beta (avg log P(chosen) - avg log P(rejected)) - gamma)  (Meng et al.)
    + nll_coef times the mean of -log P over the tokens of the chosen replies

Hinge, KTO and the rest are one line each in `dpo_loss` and left out on purpose. The reference's log
P are computed once and kept in out_dir. Files: examples.py says what a line of --data looks like.
"""
# same in every train_*.py: early signals
from plumbing import interrupts

if __name__ == "__main__":  # a stop during the imports below must end them without a traceback
    interrupts.end_quietly()
# end same

import hashlib
import json
import math
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.elastic.multiprocessing.errors import record

from plumbing import checkpoint
from plumbing import runtime
from plumbing import sharding
from configurator import configure
from plumbing.jobs import Progress
from plumbing.costs import (count_parameters, flops_per_token, fullest, judging_memory, training_memory,
                   writing_memory)
from data import IGNORE, Order, hash64
from plumbing.examples import (Row, Rows, in_batches, load_splits, micro_batches, pad_right,
                      pair_batch, prompt_of, evenly_spaced, with_room)
from generate import load_model, replies
from model import Transformer
from plumbing.runtime import Dist, all_sum, print0
from tokenizer import Tokenizer

KIND = "dpo"  # of checkpoint
EXAMPLES = "pair"  # of the data


@dataclass(frozen=True)
class Config:
    init_from: str = "out/sft"  # checkpoint to start from, and the reference
    data: str = "out/toyworld/pairs.jsonl"  # pairs to learn: JSONL files or folders
    val_data: str = ""  # pairs to judge by; empty: a part of data
    val_fraction: float = 0.05  # share of data to judge by, if there is no val_data
    on_bad_line: Literal["stop", "skip"] = "stop"  # at a line that is not as it should be
    out_dir: str = "out/dpo"  # where checkpoints and the log go
    resume: bool = False  # go on from the newest valid checkpoint in out_dir
    max_len: int | None = None  # longer pairs are dropped; None: as many tokens as the model reads
    loss: Literal["sigmoid", "ipo", "simpo"] = "sigmoid"  # which of the formulas
    beta: float = 0.1  # how dear it is to leave the reference; simpo wants 2 to 2.5
    label_smoothing: float = 0.0  # e: share of labels taken to be wrong; sigmoid only
    gamma: float = 1.0  # margin of simpo
    nll_coef: float = 0.0  # weight of the likelihood of the chosen reply
    precompute_ref: bool = True  # else the reference is held in memory and run every step
    epochs: float = 1.0  # how often every pair is seen
    max_steps: int | None = None  # optimizer steps; None: as epochs say
    batch_pairs: int = 64  # pairs an optimizer step learns from
    batch_size: int = 8  # pairs a process puts through the model at once
    optimizer: Literal["adamw", "muon"] = "adamw"  # muon: for the blocks' matrices, else AdamW
    learning_rate: float = 5e-7  # of AdamW
    muon_lr: float = 0.02  # of Muon: length of a step, relative to an orthogonal matrix
    schedule: Literal["cosine", "wsd"] = "cosine"  # wsd: warm-up, stable, decay
    warmup_steps: int = 5  # steps of linear warm-up
    final_lr: float = 0.1  # learning rate at the end, as a share
    decay_fraction: float = 0.2  # wsd: share of the steps that decays
    weight_decay: float = 0.0  # of matrices
    adam_beta1: float = 0.9  # AdamW: memory of the mean gradient
    adam_beta2: float = 0.95  # AdamW: memory of its square
    grad_clip: float = 1.0  # largest norm of the gradient
    eval_every: int = 50  # steps between validations
    eval_pairs: int = 500  # pairs in a validation; the last takes all
    eval_samples: int = 64  # prompts that are answered, for KL, length and stops; 0: none
    answer_tokens: int = 64  # most tokens of an answer
    save_every: int = 100  # steps between checkpoints
    log_every: int = 10  # steps between log lines
    seed: int = 0  # of the order of the data
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"  # where to compute
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # activations; auto: bfloat16 on cuda
    shard: bool = False  # each process keeps a part of every matrix (FSDP2), else all of them (DDP)
    recompute: bool = False  # keep a block's input only and run it again: less memory, more work
    dist_timeout: float = 120.0  # seconds without word from another process that end the run


# same in every train_*.py: log-probabilities
def token_logps(hidden: Tensor, head: Tensor, targets: Tensor) -> Tensor:
    """log P(target) of each token, (B, T) in fp32, 0 where the target is IGNORE. hidden (B, T, C),
    head (V, C), targets (B, T); the (B, T, V) logits exist only a chunk at a time."""
    nats = F.linear_cross_entropy(hidden.flatten(0, 1), head, targets.flatten(), reduction="none",
                                  options=runtime.logits_at_once(head))
    return -nats.float().view_as(targets)
# end same


def dpo_loss(chosen: Tensor, rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor,
             chosen_tokens: Tensor, rejected_tokens: Tensor, loss: str = "sigmoid",
             beta: float = 0.1, label_smoothing: float = 0.0, gamma: float = 1.0) -> Tensor:
    """The loss of each pair, (B,), from the summed log P of its replies under policy and reference
    and their numbers of tokens, (B,) each."""
    if loss == "sigmoid":
        margin = beta * ((chosen - ref_chosen) - (rejected - ref_rejected))
        right, wrong = -F.logsigmoid(margin), -F.logsigmoid(-margin)
        return (1 - label_smoothing) * right + label_smoothing * wrong
    if loss == "ipo":
        gap = (chosen - ref_chosen) / chosen_tokens - (rejected - ref_rejected) / rejected_tokens
        return (gap - 1 / (2 * beta)) ** 2
    margin = beta * (chosen / chosen_tokens - rejected / rejected_tokens)
    return -F.logsigmoid(margin - gamma)


def reply_logps(net: nn.Module, model: Transformer, idx: Tensor, targets: Tensor,
                dist: Dist) -> tuple[Tensor, Tensor]:
    """(summed log P, number of tokens) of the reply in each row, (2 B,) each, of a model through
    its wrapper `net`."""
    with dist.autocast():
        logps = token_logps(net(idx, hidden=True), model.lm_head.weight, targets)
    return logps.sum(-1), (targets != IGNORE).sum(-1)


# ---------------------------------------------------------------------------- the reference

def load_reference(cfg: Config, dist: Dist) -> Transformer:
    """The model at the start, frozen."""
    reference, _ = load_model(cfg.init_from, torch.device("cpu"), torch.float32)
    sharding.wrap(reference.requires_grad_(False), dist, cfg.shard)
    return reference


@torch.no_grad()
def pair_logps(model: Transformer, rows: Rows, chosen: list[int], cfg: Config,
               dist: Dist) -> np.ndarray:
    """(len(chosen), 2) summed log P of the replies of pairs, each process its share."""
    found, progress = np.zeros((len(chosen), 2)), Progress()
    by_length = sorted(range(len(chosen)), key=lambda j: rows.longest(chosen[j]))
    for i, batch in enumerate(in_batches(by_length, 2 * cfg.batch_size)):
        if i % dist.world == dist.rank:
            idx, targets, _ = pair_batch(rows, [chosen[j] for j in batch])
            sums, _ = reply_logps(model, model, idx.to(dist.device), targets.to(dist.device),
                                  dist)
            found[batch] = sums.view(2, -1).t().cpu().numpy()
        if dist.rank == 0 and len(chosen) > 2000:
            progress.show(f"log-probabilities of {i * 2 * cfg.batch_size:,}/{len(chosen):,} pairs")
    progress.end()
    return np.array(all_sum(dist, *found.ravel())).reshape(found.shape)


def reference_logps(model: Transformer, rows: Rows, used: list[int], name: str, cfg: Config,
                    dist: Dist) -> np.ndarray:
    """(len(rows), 2) `pair_logps` of the used pairs under the start weights, nan for others: from
    out_dir if it holds those of just these weights and pairs, else computed and kept. What was kept
    is tried on one batch. Raises ValueError if that differs."""
    path = Path(cfg.out_dir, f"{name}_ref_logps.npy")
    with open(model.path, "rb") as f:
        weights = hashlib.file_digest(f, "sha256").hexdigest()
    meta = Path(cfg.out_dir, "val_data" if name == "val" and cfg.val_data else "data", "meta.json")
    key = json.dumps([weights, json.loads(meta.read_text())["sha256"], str(dist.dtype),
                      hashlib.sha256(repr(used).encode()).hexdigest()])
    note = path.with_suffix(".json")
    if not (path.exists() and note.exists() and note.read_text() == key):
        found = np.full((len(rows), 2), np.nan)
        with sharding.unsharded(model, dist):
            found[used] = pair_logps(model, rows, used, cfg, dist)
        if dist.rank == 0:
            temporary = f"{path}.tmp"
            with open(temporary, "wb") as f:
                np.save(f, found)
            os.replace(temporary, path)
            note.write_text(key)
        return found
    found = np.load(path)
    some = used[:2 * cfg.batch_size]
    tokens = np.array([[sum(row.mask) for row in rows.example(i)] for i in some])
    with sharding.unsharded(model, dist):
        now = pair_logps(model, rows, some, cfg, dist)
    if not (np.abs(now - found[some]) <= 1e-3 * tokens).all():
        raise ValueError(f"{path}: not what {model.path} gives; delete it")
    print0(f"reference log-probabilities from {path}")
    return found


# ---------------------------------------------------------------------------- judging

def evaluate(model: Transformer, rows: Rows, ref: np.ndarray, cfg: Config, dist: Dist,
             everything: bool) -> dict[str, dict[str, float]]:
    """Loss, implicit rewards and log-probabilities of held-out pairs, of all and each language."""
    chosen = evenly_spaced(range(len(rows)), None if everything else cfg.eval_pairs)
    with sharding.unsharded(model, dist):
        now = pair_logps(model, rows, chosen, cfg, dist)
    tokens = np.array([[sum(row.mask) for row in rows.example(i)] for i in chosen])
    rewards = cfg.beta * (now - ref[chosen])
    columns = [torch.tensor(x) for x in (*now.T, *ref[chosen].T, *tokens.T)]
    loss = dpo_loss(*columns, cfg.loss, cfg.beta, cfg.label_smoothing, cfg.gamma).numpy()
    margin = rewards[:, 0] - rewards[:, 1]
    langs = np.array([rows.lang(i) for i in chosen])
    found = {}
    for name in ("all", *sorted(set(langs.tolist()))):
        part = (langs == name) | (name == "all")
        found[name] = {
            "loss": float(loss[part].mean()), "margin": float(margin[part].mean()),
            "accuracy": float(np.where(abs(margin) < 1e-5, 0.5, margin > 0)[part].mean()),
            "chosen_reward": float(rewards[part, 0].mean()),
            "rejected_reward": float(rewards[part, 1].mean()),
            "chosen_logp": float(now[part, 0].sum() / tokens[part, 0].sum()),
            "rejected_logp": float(now[part, 1].sum() / tokens[part, 1].sum()),
            "chosen_tokens": float(tokens[part, 0].mean()),
            "rejected_tokens": float(tokens[part, 1].mean())}
    return found


@torch.no_grad()
def sample_replies(model: Transformer, reference: Transformer | None, tok: Tokenizer, rows: Rows,
                   cfg: Config, dist: Dist) -> dict[str, float]:
    """Sampled replies to held-out prompts: KL to the reference per reply (the mean of log P - log
    P_ref), length, and the share that ends by itself. Prints one reply per language."""
    reference = reference or load_reference(cfg, dist)
    chosen = with_room(rows, evenly_spaced(range(len(rows)), cfg.eval_samples),
                       model.config.max_seq_len - cfg.answer_tokens)
    if not chosen:
        return {}
    kls, lengths, stops, shown = [], [], [], set()
    for batch in in_batches(chosen, 32):
        prompts = [prompt_of(rows.example(i)[0]) for i in batch]
        with sharding.unsharded(model, dist):
            said = replies(model, prompts, cfg.answer_tokens, stop=(tok.im_end,),
                           seed=hash64(cfg.seed, batch[0]))
            full = [Row(p + r, [0] * len(p) + [1] * len(r)) for p, r in zip(prompts, said)]
            idx, targets, _ = (t.to(dist.device) for t in pad_right(full, 0))
            own, n = reply_logps(model, model, idx, targets, dist)
        ref, _ = reply_logps(reference, reference, idx, targets, dist)
        kls += (own - ref).tolist()
        lengths += n.tolist()
        stops += [reply[-1] == tok.im_end for reply in said]
        for i, prompt, reply in zip(batch, prompts, said):
            if rows.lang(i) not in shown:
                shown.add(rows.lang(i))
                text = f"{tok.decode(prompt)}»{tok.decode(reply)}".replace("\n", "⏎")
                print0(f"sample {rows.lang(i)} | {text}")
    n = len(chosen)
    return {"kl": sum(kls) / n, "length": sum(lengths) / n, "stops": sum(stops) / n}


def warnings(first: dict, now: dict, cfg: Config, step: int, max_steps: int) -> list[str]:
    """What is known to go wrong, from the first validation and this one: {"pairs", "samples"}."""
    found = []
    a, b = first["pairs"]["all"], now["pairs"]["all"]
    if cfg.loss == "sigmoid" and step >= 0.1 * max_steps and b["margin"] < 0.02:
        found.append("the margin does not grow: raise --learning_rate")
    if b["chosen_logp"] < a["chosen_logp"] - 0.3 and b["margin"] > a["margin"]:
        found.append("the chosen replies become less likely: try --nll_coef=0.2 or a larger --beta")
    x, y = first["samples"], now["samples"]
    if x and not 0.5 <= y["length"] / x["length"] <= 1.5:
        found.append(f"replies went from {x['length']:.0f} to {y['length']:.0f} tokens")
    if y and y["stops"] < 0.95:
        found.append(f"only {y['stops']:.0%} of the replies end by themselves")
    return found


# same in every train_*.py: optimizers
def make_optimizers(model: nn.Module, cfg: Config) -> list[torch.optim.Optimizer]:
    """AdamW for all that is learnt, or Muon for the matrices inside the blocks and AdamW for the
    rest. Matrices decay, but for an embedding that is no head too: its rows would fade between the
    few tokens that teach them. Each group remembers its full learning rate as `base`."""
    learnt = {name: p for name, p in model.named_parameters() if p.requires_grad}
    muon = [p for name, p in learnt.items() if cfg.optimizer == "muon" and "layers." in name
            and p.dim() == 2]
    rest = {name: p for name, p in learnt.items() if all(p is not m for m in muon)}
    # a tied head is the embedding by another name, which named_parameters leaves out
    untied = any("lm_head" in name for name, _ in model.named_parameters())

    def decays(name: str) -> bool:
        return rest[name].dim() == 2 and not (untied and "embed_tokens" in name)
    groups = [{"params": [p for name, p in rest.items() if decays(name) == yes],
               "weight_decay": cfg.weight_decay * yes} for yes in (True, False)]
    optimizers: list[torch.optim.Optimizer] = [torch.optim.AdamW(
        groups, lr=cfg.learning_rate, betas=(cfg.adam_beta1, cfg.adam_beta2), eps=1e-8,
        fused=True)]
    if muon:
        optimizers.append(torch.optim.Muon(muon, lr=cfg.muon_lr, weight_decay=cfg.weight_decay))
    for group in all_groups(optimizers):
        group["base"] = group["lr"]
    return optimizers


def all_groups(optimizers: list[torch.optim.Optimizer]) -> Iterator[dict]:
    for optimizer in optimizers:
        yield from optimizer.param_groups
# end same


def check(cfg: Config, world: int) -> None:
    """Raises ValueError for settings that cannot be met or mean nothing."""
    # same in every train_*.py: batch of pairs
    if cfg.batch_pairs % (cfg.batch_size * world) or cfg.batch_pairs < 1:
        raise ValueError(f"batch_pairs {cfg.batch_pairs} must be a multiple of batch_size x "
                         f"processes = {cfg.batch_size} x {world}")
    # end same
    for name in ("eval_every", "eval_pairs", "answer_tokens", "save_every", "log_every"):
        if getattr(cfg, name) < 1:
            raise ValueError(f"{name} must be at least 1, got {getattr(cfg, name)}")
    if cfg.label_smoothing and cfg.loss != "sigmoid":
        raise ValueError(f"label_smoothing {cfg.label_smoothing} means nothing with loss "
                         f"{cfg.loss}: it belongs to sigmoid")
    if not 0 <= cfg.label_smoothing < 0.5 or not 0 <= cfg.val_fraction < 1:
        raise ValueError("label_smoothing must lie between 0 and 0.5, val_fraction between 0 and 1")
    if min(cfg.learning_rate, cfg.grad_clip, cfg.epochs, cfg.beta) <= 0:
        raise ValueError("learning_rate, grad_clip, epochs and beta must be positive")
    if min(cfg.nll_coef, cfg.gamma, cfg.eval_samples) < 0:
        raise ValueError("nll_coef, gamma and eval_samples must not be negative")


def weights(model: Transformer, tensors: dict[str, Tensor]) -> dict:
    return {"model": tensors}


def train(cfg: Config, dist: Dist) -> None:
    check(cfg, dist.world)
    model, tok = load_model(cfg.init_from, torch.device("cpu"), torch.float32)
    config = model.config
    length = cfg.max_len or config.max_seq_len

    # same in every train_*.py: pairs
    with runtime.first_rank_first(dist):
        pairs, val = load_splits(cfg, EXAMPLES, tok, length)
    if not len(val):
        raise ValueError(f"{cfg.data}: no pair fell into the held-out part: raise --val_fraction "
                         "or give --val_data")
    order = Order(len(pairs), cfg.seed, pairs.name)
    max_steps = cfg.max_steps or math.ceil(cfg.epochs * len(pairs) / cfg.batch_pairs)
    if not 0 <= cfg.warmup_steps < max_steps:
        raise ValueError(f"warmup_steps {cfg.warmup_steps} must be less than the {max_steps} steps")
    # end same
    if model.kind == "pt":
        print0(f"WARNING: {model.path} has not learnt to answer: start from an SFT model")
    print0(runtime.describe_run(dist))
    shards, width = dist.world if cfg.shard else 1, dist.dtype.itemsize
    longest = int(pairs.lengths().max()), int(val.lengths().max())
    parts = training_memory(config, 2 * cfg.batch_size, longest[0],
                            cfg.batch_pairs // cfg.batch_size // dist.world, width, shards=shards,
                            recompute=cfg.recompute, muon=cfg.optimizer == "muon")
    weights_too = parts["parameters"]  # of the reference, for the KL of samples
    if not cfg.precompute_ref:
        parts, weights_too = {"reference": weights_too, **parts}, 0
    judged = 2 * min(2 * cfg.batch_size, len(pairs) if cfg.precompute_ref else len(val))
    writing = writing_memory(config, min(32, cfg.eval_samples, len(val)), longest[1],
                             cfg.answer_tokens, width, shards)
    print0(runtime.memory_line(fullest(
        parts, evaluation=judging_memory(config, judged, max(longest), width, shards),
        writing=(weights_too + writing) * (cfg.eval_samples > 0)), dist))
    tokens = int(pairs.lengths().sum())
    print0(f"{count_parameters(config):,} parameters; {len(pairs):,} pairs of {tokens:,} tokens, "
           f"{len(val):,} held out; {max_steps:,} steps, "
           f"{max_steps * cfg.batch_pairs / len(pairs):.2f} epochs")
    net = sharding.wrap(model, dist, cfg.shard, cfg.recompute)
    ref_val = reference_logps(model, val, list(range(len(val))), "val", cfg, dist)
    if cfg.precompute_ref:
        used = sorted(set(order.take(0, min(max_steps * cfg.batch_pairs, len(pairs)))))
        ref_train, reference = reference_logps(model, pairs, used, "train", cfg, dist), None
    else:
        reference = load_reference(cfg, dist)
    optimizers = make_optimizers(model, cfg)

    def validate(everything: bool) -> dict[str, dict]:
        return {"pairs": evaluate(model, val, ref_val, cfg, dist, everything), "samples":
                sample_replies(model, reference, tok, val, cfg, dist) if cfg.eval_samples else {}}

    start = validate(False)
    data_id = pairs.data_id
    first, state = checkpoint.restore(cfg, KIND, optimizers, tok.text, asdict(config), data_id)
    if state:
        sharding.load(model, optimizers, state)
    log = runtime.Log(cfg.out_dir, dist, first, max_steps, 0, flops_per_token(config, length))
    guard, signals, stopping = runtime.GradientGuard(), runtime.StopSignals(), False

    for step in range(first, max_steps + 1):
        last = step == max_steps
        if last or step == 0 or (step % cfg.eval_every == 0 and step > first):
            found = validate(last) if step else start
            for name, r in found["pairs"].items():
                print0(f"val at step {step:,} | {name} loss {r['loss']:.4f}, accuracy "
                       f"{r['accuracy']:.1%}, margin {r['margin']:.3f} = {r['chosen_reward']:+.3f} "
                       f"- {r['rejected_reward']:+.3f}, log P per token {r['chosen_logp']:.3f} and "
                       f"{r['rejected_logp']:.3f}")
            if r := found["samples"]:
                print0(f"samples at step {step:,} | KL {r['kl']:.3f} nats/reply, "
                       f"{r['length']:.1f} tokens, {r['stops']:.1%} stop")
            for warning in warnings(start, found, cfg, step, max_steps) if step else ():
                print0(f"WARNING: {warning}")
            log.write(step=step, val=found)

        # same in every train_*.py: save
        if last or stopping or (step % cfg.save_every == 0 and step > first):
            tensors, moments = sharding.gather(model, optimizers)  # by all processes
            if dist.rank == 0:
                path = checkpoint.save(cfg.out_dir, step, {
                    "format": 1, "kind": KIND, "step": step, **weights(model, tensors),
                    "optimizer": moments, "model_config": asdict(config),
                    "config": asdict(cfg), "tokenizer": tok.text, "data": data_id})
                print0(f"saved {path}")
            log.start_clock()
        if last or stopping:
            break
        # end same

        # same in every train_*.py: learning rate
        lr = runtime.lr_factor(step, max_steps, cfg.warmup_steps, cfg.schedule, cfg.final_lr,
                               cfg.decay_fraction)
        for group in all_groups(optimizers):
            group["lr"] = group["base"] * lr
        # end same
        chosen = order.take(step * cfg.batch_pairs, cfg.batch_pairs)
        micro = micro_batches(pairs, chosen, cfg.batch_size, dist.rank, dist.world)
        batches = [pair_batch(pairs, some) for some in micro]
        # the number of chosen tokens in the whole step is needed before the first backward
        n_chosen, = all_sum(dist, sum(int((targets[:len(some)] != IGNORE).sum())
                                      for some, (_, targets, _) in zip(micro, batches)))
        loss, sums, seen = torch.zeros((), device=dist.device), torch.zeros(3), 0
        for micro_step, (some, batch) in enumerate(zip(micro, batches)):
            idx, targets, lengths = (t.to(dist.device) for t in batch)
            sharding.exchange_gradients(net, micro_step == len(micro) - 1)  # once
            if reference is None:
                ref = torch.tensor(ref_train[some].T, dtype=torch.float32, device=dist.device)
            else:
                with torch.no_grad():
                    ref = reply_logps(reference, reference, idx, targets, dist)[0].view(2, -1)
            logps, n_tokens = reply_logps(net, model, idx, targets, dist)
            chosen_logp, rejected_logp = logps.chunk(2)
            losses = dpo_loss(chosen_logp, rejected_logp, *ref, *n_tokens.chunk(2), cfg.loss,
                              cfg.beta, cfg.label_smoothing, cfg.gamma)
            part = losses.sum() / cfg.batch_pairs - cfg.nll_coef * chosen_logp.sum() / n_chosen
            (part * dist.world).backward()  # DDP takes the mean over processes, the loss is a sum
            loss += part.detach()
            rewards = cfg.beta * (logps.detach().view(2, -1) - ref)
            margin = rewards[0] - rewards[1]
            right = (margin > 0).sum() + 0.5 * (margin == 0).sum()
            sums += torch.stack([margin.sum(), right, chosen_logp.detach().sum()]).cpu()
            seen += int(lengths.sum())
        samples = f"pairs {step * cfg.batch_pairs:,} to {(step + 1) * cfg.batch_pairs - 1:,}"

        # same in every train_*.py: step
        norm = sharding.clip_gradients(net, cfg.grad_clip)
        total, stops = all_sum(dist, loss, float(bool(signals.name)))
        stopping = stops > 0
        if guard.allows(norm, step, total, samples):
            for optimizer in optimizers:
                optimizer.step()
        for optimizer in optimizers:
            optimizer.zero_grad()
        # end same
        margin, right, chosen_logp, seen = all_sum(dist, *sums, seen)
        more = {"margin": margin / cfg.batch_pairs, "accuracy": right / cfg.batch_pairs,
                "chosen": chosen_logp / n_chosen}
        log.write(step=step, loss=total, lr=lr * cfg.learning_rate, norm=norm, tokens=seen, **more)
        if (step + 1) % cfg.log_every == 0:
            log.line(step + 1, total, lr * cfg.learning_rate, norm, **more)

    if stopping:
        print0(f"stopped by {signals.name or 'a signal to another process'} at step {step:,}; "
               f"go on with: {runtime.resume_command()}")
    print0(runtime.peak_line(dist))


@record
def main() -> None:
    cfg = configure(Config)
    with runtime.errors_in_one_line(cfg.out_dir):
        dist = runtime.setup(cfg.device, cfg.dtype, cfg.dist_timeout)
        train(cfg, dist)
        runtime.finish(dist)


if __name__ == "__main__":
    main()

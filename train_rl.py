"""
Reinforcement learning: raise the reward model's score, and stay near where we started.

    python train_rl.py config/rl_micro.py --init_from=out/sft --reward_from=out/rm \\
        --data=prompts.jsonl --out_dir=out/rl

    J = E[ r ] - beta KL(policy || reference)         r = (score - mean) / std
    J <= J* = beta log E_ref[ exp(r / beta) ]         whatever the policy

Each step answers some prompts `group` times with the policy as it is, scores the replies, and makes
better ones likelier. The KL term is put into the reward of each reply (its estimate k1 = log P -
log P_ref, summed over the tokens): this gives the exact gradient of J (README). Then

    R = r - beta k1,  A = R - mean R of the other replies to the same prompt  (RLOO: Ahmadian 2024)
    L_RL = - mean over replies of  min(ratio A, clip(ratio, 1 - eps_low, 1 + eps_high) A)

with ratio = P(reply) / P(reply) when it was sampled: 1 in the first update of a rollout, where L_RL
is the plain policy gradient. With --advantage=grpo, A = (R - mean) / std of the group, a ratio per
token, and the mean over a reply's tokens first (Shao et al. 2024); grpo_mean leaves std out.

In a rollout r is clipped to +-5, and a reply that does not end gets 1 less than the worst of its
step. Sampled ids are kept and scored as they are, never decoded and encoded again. Nothing but
temperature 1 is sampled from: a cut distribution is not the one that the gradient is of.
"""
# same in every train_*.py: early signals
from plumbing import interrupts

if __name__ == "__main__":  # a stop during the imports below must end them without a traceback
    interrupts.end_quietly()
# end same

import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.elastic.multiprocessing.errors import record

from plumbing import checkpoint
from plumbing import runtime
from plumbing import sharding
from configurator import configure
from plumbing.costs import (count_parameters, flops_per_token, fullest, training_memory,
                   writing_memory)
from data import IGNORE, Order, hash64
from plumbing.examples import Row, Rows, in_batches, load_splits, pad_right, evenly_spaced
from generate import load_model, replies
from model import ModelConfig, RewardModel, Transformer
from plumbing.runtime import Dist, all_sum, print0
from tokenizer import Tokenizer

KIND = "rl"  # of checkpoint


@dataclass(frozen=True)
class Config:
    init_from: str = "out/sft"  # checkpoint to start from, and the reference
    reward_from: str = "out/rm"  # checkpoint of the reward model
    data: str = "out/toyworld/prompts.jsonl"  # prompts to answer: JSONL files or folders
    val_data: str = ""  # prompts to judge by; empty: a part of data
    val_fraction: float = 0.05  # share of data to judge by, if there is no val_data
    on_bad_line: Literal["stop", "skip"] = "stop"  # at a line that is not as it should be
    out_dir: str = "out/rl"  # where checkpoints and the log go
    resume: bool = False  # go on from the newest valid checkpoint in out_dir
    advantage: Literal["rloo", "grpo_mean", "grpo"] = "rloo"  # which A and ratio
    beta: float = 0.05  # price of a nat of KL, in standard deviations of the reward
    kl_budget: float = 10.0  # warn when a reply's mean KL, in nats, is above it
    eps_low: float = 0.2  # how far below 1 a ratio counts
    eps_high: float = 0.2  # how far above
    group: int = 8  # replies to each prompt
    prompts_per_step: int = 64  # prompts answered in a step
    updates_per_rollout: int = 1  # optimizer steps on the same replies
    answer_tokens: int = 64  # most tokens of a reply
    max_steps: int = 200  # rollouts
    batch_size: int = 32  # replies a process puts through the model at once
    rollout_size: int = 128  # replies a process writes at once
    optimizer: Literal["adamw", "muon"] = "adamw"  # muon: for the blocks' matrices, else AdamW
    learning_rate: float = 1e-6  # of AdamW
    muon_lr: float = 0.02  # of Muon: length of a step, relative to an orthogonal matrix
    schedule: Literal["cosine", "wsd"] = "wsd"  # wsd: warm-up, stable, decay
    warmup_steps: int = 10  # steps of linear warm-up
    final_lr: float = 1.0  # learning rate at the end, as a share
    decay_fraction: float = 0.2  # wsd: share of the steps that decays
    weight_decay: float = 0.0  # of matrices
    adam_beta1: float = 0.9  # AdamW: memory of the mean gradient
    adam_beta2: float = 0.95  # AdamW: memory of its square
    grad_clip: float = 1.0  # largest norm of the gradient
    eval_every: int = 20  # steps between validations
    eval_prompts: int = 128  # held-out prompts in a validation, each answered once
    save_every: int = 20  # steps between checkpoints
    log_every: int = 5  # steps between log lines
    seed: int = 0  # of the order of the prompts and of the sampling
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"  # where to compute
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # activations; auto: bfloat16 on cuda
    shard: bool = False  # each process keeps a part of every matrix (FSDP2), else all of them (DDP)
    recompute: bool = False  # keep a block's input only and run it again: less memory, more work
    dist_timeout: float = 600.0  # seconds without word from another process that end the run


# same in every train_*.py: log-probabilities
def token_logps(hidden: Tensor, head: Tensor, targets: Tensor) -> Tensor:
    """log P(target) of each token, (B, T) in fp32, 0 where the target is IGNORE. hidden (B, T, C),
    head (V, C), targets (B, T); the (B, T, V) logits exist only a chunk at a time."""
    nats = F.linear_cross_entropy(hidden.flatten(0, 1), head, targets.flatten(), reduction="none",
                                  options=runtime.logits_at_once(head))
    return -nats.float().view_as(targets)
# end same


def best_possible(rewards: Tensor, beta: float) -> tuple[float, float]:
    """J* = beta log E_ref[exp(r / beta)] and its standard error, from the rewards (n,) of replies
    that the reference wrote. With Z = E_ref[exp(r / beta)] the policy P_ref exp(r / beta) / Z has
    J = J*, and any other J* - beta KL(it || that one) (Rafailov et al. 2023, appendix A.1). Of
    replies to several prompts it is an upper bound of the mean of J* over prompts (Jensen)."""
    top = rewards.max()
    weights = ((rewards - top) / beta).double().exp()
    error = beta * weights.std() / weights.mean() / len(weights) ** 0.5  # d log Z = dZ / Z
    return float(top + beta * weights.mean().log()), float(error)


def advantages(rewards: Tensor, kind: str) -> Tensor:
    """(P, G) advantages from the rewards of G replies to each of P prompts."""
    mean, G = rewards.mean(1, keepdim=True), rewards.size(1)
    if kind == "rloo":  # the mean of the others is taken off: G / (G - 1) of this difference
        return (rewards - mean) * G / (G - 1)
    if kind == "grpo_mean":
        return rewards - mean
    # 1e-4: equal rewards but for rounding must not become advantages of 1
    return (rewards - mean) / (rewards.std(1, keepdim=True) + 1e-4)


def rl_loss(logps: Tensor, old_logps: Tensor, mask: Tensor, advantage: Tensor, eps_low: float,
            eps_high: float, per_token: bool = False) -> Tensor:
    """The clipped loss of each reply, (B,). logps and old_logps (B, T): of its tokens now and when
    they were sampled; mask (B, T) is 1 on them; advantage (B,). `per_token`: a ratio for each
    token and their mean, else one for the reply."""
    change = (logps - old_logps) * mask
    if per_token:
        ratio, A = change.exp(), advantage[:, None]
        gain = torch.minimum(ratio * A, ratio.clamp(1 - eps_low, 1 + eps_high) * A)
        return -(gain * mask).sum(-1) / mask.sum(-1)
    ratio = change.sum(-1).exp()
    return -torch.minimum(ratio * advantage, ratio.clamp(1 - eps_low, 1 + eps_high) * advantage)


@dataclass
class Rollout:
    """Replies to P prompts, G each, prompt by prompt; B = P G rows."""
    rows: list[Row]  # prompt and reply; the mask is 1 on the reply
    old_logps: list[Tensor]  # of the reply's tokens, under the policy that wrote it
    rewards: Tensor  # (B,) normalised, with the price of not ending
    raw: Tensor  # (B,) scores as the reward model gives them
    kl: Tensor  # (B,) k1
    advantage: Tensor  # (B,)
    figures: dict[str, float]  # sums over the replies, for the log


@torch.no_grad()
def write_replies(model: Transformer, prompts: list[list[int]], keys: list[int], stop: int,
                  cfg: Config) -> tuple[list[Row], list[Tensor]]:
    """A reply to each prompt, and log P of its tokens as the sampler saw them. `keys` seed the rows
    one by one, so that a reply does not depend on which others are written beside it."""
    rows, seen = [], []
    for at in range(0, len(prompts), cfg.rollout_size):
        part, each = prompts[at:at + cfg.rollout_size], []
        noise = torch.stack([torch.rand(cfg.answer_tokens, generator=torch.Generator()
                                        .manual_seed(key)) for key in keys[at:at + len(part)]])
        said = replies(model, part, cfg.answer_tokens, stop=(stop,), noise=noise, logps=each)
        logps = torch.stack(each, 1).cpu()
        rows += [Row(p + r, [0] * len(p) + [1] * len(r)) for p, r in zip(part, said)]
        seen += [row[:len(reply)] for row, reply in zip(logps, said)]
    return rows, seen


@torch.no_grad()
def reply_logps(model: Transformer, rows: list[Row], cfg: Config, dist: Dist) -> list[Tensor]:
    """log P of the tokens of each reply, by a full forward pass."""
    found: list[Tensor] = []
    for some in in_batches(range(len(rows)), cfg.batch_size):
        idx, targets, _ = (t.to(dist.device) for t in pad_right([rows[i] for i in some], 0))
        with dist.autocast():
            logps = token_logps(model(idx, hidden=True), model.lm_head.weight, targets)
        found += [row[t != IGNORE].cpu() for row, t in zip(logps, targets)]
    return found


@torch.no_grad()
def score(reward: RewardModel, rows: list[Row], cfg: Config, dist: Dist) -> Tensor:
    """(len(rows),) scores of the reward model."""
    found = []
    for some in in_batches(range(len(rows)), cfg.batch_size):
        idx, _, lengths = (t.to(dist.device) for t in pad_right([rows[i] for i in some], 0))
        with dist.autocast():
            found.append(reward(idx, lengths).cpu())
    return torch.cat(found)


def roll_out(model: Transformer, reference: Transformer, reward: RewardModel,
             prompts: list[list[int]], keys: list[int], stop: int, cfg: Config,
             dist: Dist) -> Rollout:
    """Write, score and compare `group` replies to each prompt."""
    begin = time.perf_counter()
    with sharding.unsharded(model, dist):
        rows, seen = write_replies(
            model, [p for p in prompts for _ in range(cfg.group)],
            [hash64(key, g) for key in keys for g in range(cfg.group)], stop, cfg)
        seconds = time.perf_counter() - begin
        old = reply_logps(model, rows, cfg, dist)
    with sharding.unsharded(reference, dist):
        ref = reply_logps(reference, rows, cfg, dist)
    with sharding.unsharded(reward, dist):
        raw = score(reward, rows, cfg, dist)
    ended = torch.tensor([row.ids[-1] == stop for row in rows])
    rewards = ((raw - reward.mean.cpu()) / reward.std.cpu()).clamp(-5, 5)
    worst = -all_max(dist, -float(rewards.min()))
    rewards = torch.where(ended, rewards, worst - 1.0)
    kl = torch.stack([(a - b).sum() for a, b in zip(old, ref)])
    k3 = torch.stack([((b - a).exp() - 1 - (b - a)).sum() for a, b in zip(old, ref)])
    groups = (rewards - cfg.beta * kl).view(-1, cfg.group)
    lengths = torch.tensor([float(len(a)) for a in old])
    said = [tuple(row.ids[-len(a):]) for row, a in zip(rows, old)]
    distinct = sum(len(set(said[i:i + cfg.group])) for i in range(0, len(rows), cfg.group))
    figures = {"reward": float(rewards.sum()), "raw": float(raw.sum()), "kl": float(kl.sum()),
               "k3": float(k3.sum()), "J": float(groups.sum()), "ended": float(ended.sum()),
               "length": float(lengths.sum()), "surprise": -float(sum(a.sum() for a in old)),
               "distinct": float(distinct), "seconds": seconds,
               "same_reward": float((groups.std(1) < 1e-6).sum()) * cfg.group,
               "mismatch": max(float((a - b).abs().max()) for a, b in zip(old, seen))}
    return Rollout(rows, old, rewards, raw, kl, advantages(groups, cfg.advantage).flatten(),
                   figures)


def reply_losses(net: nn.Module, model: Transformer, rollout: Rollout, some: Sequence[int],
                 cfg: Config, dist: Dist) -> tuple[Tensor, Tensor]:
    """The losses of some replies of a rollout, and which share of their ratios was clipped,
    (len(some),) each, of a policy through its wrapper `net`. GRPO has a ratio for each token."""
    idx, targets, _ = (t.to(dist.device) for t in pad_right([rollout.rows[i] for i in some], 0))
    mask = targets != IGNORE
    old = torch.zeros(mask.shape, device=dist.device)
    old[mask] = torch.cat([rollout.old_logps[i] for i in some]).to(dist.device)
    with dist.autocast():
        logps = token_logps(net(idx, hidden=True), model.lm_head.weight, targets)
    advantage = rollout.advantage[list(some)].to(dist.device)
    per_token = cfg.advantage != "rloo"
    losses = rl_loss(logps, old, mask, advantage, cfg.eps_low, cfg.eps_high, per_token)
    change = (logps - old).detach() * mask
    ratio, A = (change if per_token else change.sum(-1, keepdim=True)).exp(), advantage[:, None]
    clipped = (ratio > 1 + cfg.eps_high) & (A > 0) | (ratio < 1 - cfg.eps_low) & (A < 0)
    return losses, (clipped & mask).sum(-1) / mask.sum(-1)


def all_max(dist: Dist, value: float) -> float:
    """The largest value of all ranks."""
    if dist.world == 1:
        return value
    found = torch.tensor(value, dtype=torch.float64, device=dist.device)
    torch.distributed.all_reduce(found, torch.distributed.ReduceOp.MAX)
    return float(found)


@torch.no_grad()
def evaluate(model: Transformer, reference: Transformer, reward: RewardModel, rows: Rows,
             tok: Tokenizer, cfg: Config, dist: Dist) -> tuple[dict[str, float], Tensor]:
    """Held-out prompts, answered once each at temperature 1: figures, and the rewards (n,). Prints
    one reply per language."""
    chosen = evenly_spaced(range(len(rows)), cfg.eval_prompts)
    prompts = [rows.example(i)[0].ids for i in chosen]
    with sharding.unsharded(model, dist):
        said, _ = write_replies(model, prompts, [hash64(cfg.seed, -1, i) for i in chosen], tok.im_end,
                                cfg)
        own = reply_logps(model, said, cfg, dist)
    with sharding.unsharded(reference, dist):
        ref = reply_logps(reference, said, cfg, dist)
    with sharding.unsharded(reward, dist):
        raw = score(reward, said, cfg, dist)
    kl = torch.stack([(a - b).sum() for a, b in zip(own, ref)])
    shown = set()
    for i, prompt, row, points in zip(chosen, prompts, said, raw):
        if rows.lang(i) not in shown:
            shown.add(rows.lang(i))
            text = f"{tok.decode(prompt)}»{tok.decode(row.ids[len(prompt):])}"
            print0(f"sample {rows.lang(i)} | {text} score {points:.2f}".replace("\n", "⏎"))
    normed = (raw - reward.mean.cpu()) / reward.std.cpu()
    J = normed - cfg.beta * kl
    return {"raw": float(raw.mean()), "reward": float(normed.mean()), "kl": float(kl.mean()),
            "kl_error": float(kl.std() / len(kl) ** 0.5), "J": float(J.mean()),
            "J_error": float(J.std() / len(J) ** 0.5),
            "ended": sum(row.ids[-1] == tok.im_end for row in said) / len(said),
            "length": sum(sum(row.mask) for row in said) / len(said)}, normed


def warnings(start: dict, now: dict, mean: dict, cfg: Config, dist: Dist) -> list[str]:
    """What is known to go wrong, from validations at the start and now and the last rollout."""
    found = []
    if mean["mismatch"] > (1e-3 if dist.dtype == torch.float32 else 0.1):
        found.append(f"sampling and training disagree by {mean['mismatch']:.4f} nats on a token")
    if now["kl"] > cfg.kl_budget:
        found.append(f"KL {now['kl']:.2f} is over the budget of {cfg.kl_budget}: raise --beta")
    if now["kl"] < -3 * now["kl_error"]:
        found.append(f"KL {now['kl']:.3f} is below 0: what is sampled from is not what is scored")
    if "best" in now and now["J"] > now["best"] + 3 * (
            now["J_error"] ** 2 + now["best_error"] ** 2) ** 0.5:
        found.append(f"J {now['J']:.2f} is over the {now['best']:.2f} that any policy can reach: "
                     "the KL or the reward is not what it should be")
    if now["ended"] < 0.95:
        found.append(f"only {now['ended']:.0%} of the replies end by themselves")
    if not 0.5 <= now["length"] / start["length"] <= 1.5:
        found.append(f"replies went from {start['length']:.0f} to {now['length']:.0f} tokens")
    return found


def same_weights(model: nn.Module, dist: Dist) -> None:
    """Raises RuntimeError if the ranks no longer hold the same weights."""
    own = sum(float(p.detach().double().sum()) for p in model.parameters())
    if all_max(dist, own) != -all_max(dist, -own):
        raise RuntimeError("the processes no longer hold the same weights")


# same in every train_*.py: reward model
def load_reward_model(where: str, dist: Dist, shard: bool = False) -> tuple[RewardModel, Tokenizer]:
    """A frozen reward model and its tokenizer. Raises ValueError naming the file."""
    state, path = checkpoint.load(where)
    if state.get("kind") != "rm":
        raise ValueError(f"{path}: not a reward model, but of stage {state.get('kind')}; "
                         "train_rm.py makes one")
    model = RewardModel(Transformer(ModelConfig(**state["model_config"])))
    model.load_state_dict(state["model"])
    tok = Tokenizer(state["tokenizer"], str(path))
    model.eval().requires_grad_(False)
    return sharding.wrap(model, dist, shard), tok
# end same


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


def check(cfg: Config, world: int) -> int:
    """Micro-steps per optimizer step. Raises ValueError for settings that cannot be met."""
    unit, replies = cfg.batch_size * world, cfg.prompts_per_step * cfg.group
    if cfg.prompts_per_step % world or replies % unit:
        raise ValueError(f"prompts_per_step x group = {cfg.prompts_per_step} x {cfg.group} must be "
                         f"a multiple of batch_size x processes = {cfg.batch_size} x {world}, and "
                         "prompts_per_step of the processes")
    if cfg.group < 2:
        raise ValueError(f"group must be at least 2, got {cfg.group}: replies are compared")
    for name in ("max_steps", "updates_per_rollout", "answer_tokens", "rollout_size",
                 "eval_every", "eval_prompts", "save_every", "log_every"):
        if getattr(cfg, name) < 1:
            raise ValueError(f"{name} must be at least 1, got {getattr(cfg, name)}")
    if not 0 <= cfg.warmup_steps < cfg.max_steps:
        raise ValueError(f"warmup_steps {cfg.warmup_steps} must be less than max_steps "
                         f"{cfg.max_steps}")
    if min(cfg.learning_rate, cfg.grad_clip, cfg.eps_low, cfg.eps_high) <= 0 or cfg.beta < 0:
        raise ValueError("learning_rate, grad_clip, eps_low and eps_high must be positive, beta "
                         "not negative")
    return replies // unit


def weights(model: Transformer, tensors: dict[str, Tensor]) -> dict:
    return {"model": tensors}


def train(cfg: Config, dist: Dist) -> None:
    accumulate = check(cfg, dist.world)
    model, tok = load_model(cfg.init_from, torch.device("cpu"), torch.float32)
    reference, _ = load_model(cfg.init_from, torch.device("cpu"), torch.float32)
    sharding.wrap(reference.requires_grad_(False), dist, cfg.shard)
    reward, reward_tok = load_reward_model(cfg.reward_from, dist, cfg.shard)
    config = model.config
    if reward_tok.sha256 != tok.sha256:
        raise ValueError(f"{cfg.reward_from}: made with another tokenizer than {cfg.init_from}")
    length = min(config.max_seq_len, reward.backbone.config.max_seq_len)
    room = length - cfg.answer_tokens
    if room < 1:
        raise ValueError(f"answer_tokens {cfg.answer_tokens} leave no room for a prompt in the "
                         f"{length} tokens that the models read")
    with runtime.first_rank_first(dist):
        prompts, val = load_splits(cfg, "prompt", tok, room)
    if not len(val):
        raise ValueError(f"{cfg.data}: no prompt fell into the held-out part: raise --val_fraction "
                         "or give --val_data")
    order, max_steps = Order(len(prompts), cfg.seed, prompts.name), cfg.max_steps
    if model.kind == "pt":
        print0(f"WARNING: {model.path} has not learnt to answer: start from an SFT model")
    print0(runtime.describe_run(dist))
    shards, width = dist.world if cfg.shard else 1, dist.dtype.itemsize
    longest = max(int(rows.lengths().max()) for rows in (prompts, val))
    parts = training_memory(config, cfg.batch_size, longest + cfg.answer_tokens, accumulate, width,
                            shards=shards, recompute=cfg.recompute, muon=cfg.optimizer == "muon")
    frozen = {"reference": parts["parameters"],
              "reward model": 4 * count_parameters(reward.backbone.config) // shards}
    most = min(cfg.rollout_size, max(cfg.prompts_per_step // dist.world * cfg.group,
                                     min(cfg.eval_prompts, len(val))))
    print0(runtime.memory_line(fullest(
        frozen | parts, writing=writing_memory(config, most, longest, cfg.answer_tokens, width,
                                               shards)), dist))
    print0(f"{count_parameters(config):,} parameters; {len(prompts):,} prompts, {len(val):,} held "
           f"out; {max_steps:,} steps of {cfg.prompts_per_step} x {cfg.group} replies")
    net = sharding.wrap(model, dist, cfg.shard, cfg.recompute)
    optimizers = make_optimizers(model, cfg)
    # before a resumed run is loaded: this is the reference, whose rewards say what J can reach
    start, rewards = evaluate(model, reference, reward, val, tok, cfg, dist)
    best = {}
    if cfg.beta and len(rewards) > 1:  # a free KL leaves no limit but the best reply of all
        best = dict(zip(("best", "best_error"), best_possible(rewards, cfg.beta)))
    data_id = prompts.data_id
    first, state = checkpoint.restore(cfg, KIND, optimizers, tok.text, asdict(config), data_id)
    if state:
        sharding.load(model, optimizers, state)
    log = runtime.Log(cfg.out_dir, dist, first, max_steps, 0, flops_per_token(config, length))
    guard, signals, stopping = runtime.GradientGuard(), runtime.StopSignals(), False
    mean = {"mismatch": 0.0}

    for step in range(first, max_steps + 1):
        last = step == max_steps
        if last or step == 0 or (step % cfg.eval_every == 0 and step > first):
            with sharding.unsharded(model, dist):
                same_weights(model, dist)
            now = start
            if step:
                now, _ = evaluate(model, reference, reward, val, tok, cfg, dist)
            now = now | best
            limit = f" of at most {now['best']:+.3f} ± {now['best_error']:.3f}" if best else ""
            print0(f"val at step {step:,} | reward {now['reward']:+.3f} sd (score {now['raw']:.3f})"
                   f", KL {now['kl']:.3f}, J {now['J']:+.3f}{limit}, "
                   f"{now['length']:.1f} tokens, {now['ended']:.1%} end")
            for warning in warnings(start, now, mean, cfg, dist):
                print0(f"WARNING: {warning}")
            log.write(step=step, val=now)

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
        chosen = order.take(step * cfg.prompts_per_step, cfg.prompts_per_step)
        own = chosen[dist.rank::dist.world]
        keys = [hash64(cfg.seed, step, i) for i in range(cfg.prompts_per_step)]
        rollout = roll_out(model, reference, reward, [prompts.example(i)[0].ids for i in own],
                           keys[dist.rank::dist.world], tok.im_end, cfg, dist)
        n_replies = cfg.prompts_per_step * cfg.group
        for update in range(cfg.updates_per_rollout):
            loss, clipped = torch.zeros((), device=dist.device), 0.0
            by_length = sorted(range(len(rollout.rows)), key=lambda i: len(rollout.rows[i].ids))
            for micro_step, some in enumerate(in_batches(by_length, cfg.batch_size)):
                sharding.exchange_gradients(net, micro_step == accumulate - 1)  # once
                losses, cut = reply_losses(net, model, rollout, some, cfg, dist)
                part = losses.sum() / n_replies
                (part * dist.world).backward()  # DDP takes the mean over processes
                loss += part.detach()
                clipped += float(cut.sum())
            samples = f"prompts {chosen}, update {update}"

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
        sums = dict(zip(rollout.figures, all_sum(dist, *rollout.figures.values())))
        mean = {k: v / n_replies for k, v in sums.items()}
        mean["mismatch"] = all_max(dist, rollout.figures["mismatch"])
        mean["seconds"] = sums["seconds"] / dist.world
        mean["entropy"] = sums["surprise"] / sums["length"]  # estimate, in nats per token
        mean["clipped"], = all_sum(dist, clipped / n_replies)
        seen, = all_sum(dist, sum(len(row.ids) for row in rollout.rows))
        log.write(step=step, loss=total, lr=lr * cfg.learning_rate, norm=norm, tokens=seen, **mean)
        if (step + 1) % cfg.log_every == 0:
            log.line(step + 1, total, lr * cfg.learning_rate, norm, reward=mean["reward"],
                     KL=mean["kl"], J=mean["J"], entropy=mean["entropy"], length=mean["length"],
                     ended=mean["ended"], clipped=mean["clipped"],
                     write_s=mean["seconds"])

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

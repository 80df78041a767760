"""
Reinforcement learning: raise the reward model's score, and stay near where we started.

    J = E[ r ] - beta KL(policy || reference)         r = (score - mean) / std, see train_rm.py

    python train_rl.py config/rl_micro.py                                  a laptop
    torchrun --nproc_per_node=8 train_rl.py config/rl_1b.py                8 GPUs

A step answers some prompts `group` times each and makes the better replies to a prompt likelier:

    R    = r - beta log(P(reply) / P_ref(reply))                           shaped_reward
    A    = R - mean R of the other replies to the prompt                   advantages
    L_RL = - mean over replies of  min(ratio A, clip(ratio) A)             rl_loss

ratio is P(reply) now over P(reply) when drawn, 1 in the first update. The mean of R is J. With KL
in R the average gradient is that of J; put log(P / P_ref) into the loss instead and its
average gradient is 0 (tests/test_losses.py). A is RLOO's (Ahmadian et al. 2024). --advantage=grpo
takes R minus the group's mean, over its deviation, and gives each token a ratio (Shao et al. 2024;
config/rl_grpo.py); grpo_mean does not divide (half of Liu et al. 2025).

r is clipped to +-5; a reply that does not end gets 1 less than the worst of the rollout. With
--reward_from=FILE.py, your own function returns r (config/reward_numbers.py). If all replies to a
prompt get the same r, the update leaves them out, their KL included. Replies are drawn at
temperature 1 from all tokens: anything else would not sample the policy.
"""
from plumbing.terminal import end_quietly, run
end_quietly(__name__)  # Ctrl-C during the imports below, which take seconds

from dataclasses import dataclass
from functools import partial
from typing import Annotated, Literal

import torch
from torch import Tensor, nn

from configurator import Count, FilePath, Natural, NotNegative, Positive, Share, configure
from data import IGNORE, Order, hash64
from generate import replies
from model import Transformer, token_logps
from plumbing import checkpoint, runtime, sharding
from plumbing.costs import count_frozen, count_parameters, flops_per_token, memory_line, peak_line
from plumbing.evaluation import print_samples, rl_line, rl_warnings, row_logps
from plumbing.examples import Row, Rows, evenly_spaced, pad_right
from plumbing.loading import load_reference, load_to_train
from plumbing.log import Log, describe_run
from plumbing.lora import adapter_off
from plumbing.optim import make_optimizers, set_learning_rate
from plumbing.rewards import Judge, load_judge, pass_rates, that_teach
from plumbing.runtime import Dist, all_max, all_sum, print0
from plumbing.splits import RowSettings, load_splits
from tokenizer import Tokenizer

KIND = "rl"  # the name of this stage in its checkpoints
COLUMNS = "reward", "kl", "J", "entropy", "length", "ended", "equal", "clipped"  # of the log line
Several = Annotated[int, "at least 2", lambda n: n >= 2]  # replies, to compare them


@dataclass(frozen=True)
class Config(RowSettings):
    init_from: FilePath = "out/sft"  # checkpoint to start from; it is the reference, too
    reward_from: FilePath = "out/rm"  # a reward model's checkpoint, or FILE.py with reward()
    data: str = "out/toyworld/prompts.jsonl"  # prompts: JSONL files or folders, comma-separated
    out_dir: FilePath = "out/rl"  # checkpoints and log.jsonl go here
    advantage: Literal["rloo", "grpo", "grpo_mean"] = "rloo"  # how replies are compared
    beta: NotNegative = 0.05  # strength of the pull to the reference: reward that a nat of KL costs
    kl_budget: Positive = 10.0  # warn when the mean KL of a reply, in nats, is above it
    eps_low: Positive = 0.2  # a ratio below 1 - eps_low is clipped
    eps_high: Positive = 0.2  # a ratio above 1 + eps_high is clipped
    group: Several = 8  # replies to each prompt
    prompts_per_step: Count = 64  # prompts answered in a step
    updates_per_rollout: Count = 1  # updates from the same replies; from the second on ratios move
    answer_tokens: Count = 64  # most tokens of a reply
    max_steps: Count = 200  # steps: a rollout and its updates
    batch_size: Count = 32  # replies that a process puts through the model at once
    rollout_size: Count = 128  # replies that a process writes at once
    learning_rate: Positive = 1e-6  # of AdamW
    schedule: Literal["cosine", "wsd"] = "wsd"  # wsd: warm-up, stable, decay
    warmup_steps: Natural = 10  # steps of linear warm-up
    final_lr: Share = 1.0  # learning rate at the end, as a share of the full one
    eval_every: Count = 20  # steps between validations
    eval_prompts: Several = 128  # held-out prompts of a validation; 1 reply each, FILE.py: `group`
    save_every: Count = 20  # steps between checkpoints
    log_every: Count = 5  # steps between log lines
    dist_timeout: Positive = 600.0  # seconds of silence from another process that end the run


def shaped_reward(reward: Tensor, logps: Tensor, ref_logps: Tensor, beta: float) -> Tensor:
    """R = r - beta log(P / P_ref) of each reply, (B,); its mean is J. reward (B,) is r. logps and
    ref_logps (B, T) are log P of the reply's tokens under policy and reference, 0 elsewhere."""
    return reward - beta * (logps - ref_logps).sum(1)


def advantages(rewards: Tensor, kind: str) -> Tensor:
    """(P, G) advantages from the shaped rewards of G replies to each of P prompts."""
    mean, G = rewards.mean(1, keepdim=True), rewards.size(1)
    if kind == "rloo":  # R - mean of the others = G / (G - 1) (R - mean of all)
        return (rewards - mean) * G / (G - 1)
    if kind == "grpo_mean":
        return rewards - mean
    assert kind == "grpo", kind
    return (rewards - mean) / (rewards.std(1, keepdim=True) + 1e-4)  # equal but for rounding: 0


def rl_loss(logps: Tensor, old_logps: Tensor, mask: Tensor, advantage: Tensor, eps_low: float,
            eps_high: float, per_token: bool = False) -> Tensor:
    """The clipped loss of each reply, (B,). logps and old_logps (B, T) are those of its tokens now
    and when they were drawn, mask (B, T) is 1 on them, advantage is (B,). `per_token`: a ratio for
    each token, and their mean; else one for the reply. In the first update of a rollout each ratio
    is 1, so the gradient is -A times that of log P: the policy gradient."""
    change = (logps - old_logps) * mask
    if per_token:
        ratio, A = change.exp(), advantage[:, None]
        gain = torch.minimum(ratio * A, ratio.clamp(1 - eps_low, 1 + eps_high) * A)
        return -(gain * mask).sum(-1) / mask.sum(-1)
    ratio = change.sum(-1).exp()
    return -torch.minimum(ratio * advantage, ratio.clamp(1 - eps_low, 1 + eps_high) * advantage)


def best_possible(rewards: Tensor, beta: float) -> tuple[float, float]:
    """J* = beta log E_ref[exp(r / beta)], above which no policy gets, and its standard error, from
    the rewards r of replies that the reference wrote, (n,) or (n, replies to a prompt). A policy Q
    has J = J* - beta KL(Q || best), where best = P_ref exp(r / beta) / E_ref[exp(r / beta)]
    (Rafailov et al. 2023, A.1). Over several prompts J* is an upper bound."""
    top = float(rewards.max())
    weights = ((rewards - top) / beta).cpu().double().exp()  # not every device has fp64
    weights = weights.view(len(weights), -1).mean(1)  # replies to one prompt are alike
    error = beta * weights.std() / weights.mean() / len(weights) ** 0.5  # d log Z = dZ / Z
    return top + beta * float(weights.mean().log()), float(error)


@dataclass
class Rollout:
    """B replies and what is known of each, on the CPU."""
    rows: list[Row]  # prompt and reply; the mask is 1 on the reply
    logps: Tensor  # (B, T) log P of the reply's tokens under the policy that wrote it, 0 elsewhere
    R: Tensor  # (B,) shaped rewards
    figures: dict[str, Tensor]  # (B,) each, for the log


def roll_out(model: Transformer, reference: Transformer, judge: Judge, stop: int, cfg: Config,
             dist: Dist, source: Rows, picked: list[int], keys: list[int]) -> Rollout:
    """Write a reply to each prompt picked with the policy as it is, and judge it. The chance of a
    reply comes from its key, so that it does not depend on which others are written beside it."""
    rows, drawn, prompts = [], [], [source.example(i)[0].ids for i in picked]
    with sharding.unsharded(model, dist):
        for at in range(0, len(prompts), cfg.rollout_size):
            asked, steps = prompts[at:at + cfg.rollout_size], []  # steps: log P of the ids drawn
            noise = torch.stack([torch.rand(cfg.answer_tokens, generator=torch.Generator()
                                            .manual_seed(key)) for key in keys[at:at + len(asked)]])
            said = replies(model, asked, cfg.answer_tokens, stop=(stop,), noise=noise, logps=steps)
            rows += [Row(p + r, [0] * len(p) + [1] * len(r)) for p, r in zip(asked, said)]
            drawn += [nn.functional.pad(x[:len(r)], (len(p) - 1, 1))  # log P of token t is at t - 1
                      for x, p, r in zip(torch.stack(steps, 1).cpu(), asked, said)]
        logps = row_logps(model, rows, cfg.batch_size, dist)
    with sharding.unsharded(reference, dist), adapter_off(reference):
        ref_logps = row_logps(reference, rows, cfg.batch_size, dist)
    ended = torch.tensor([row.ids[-1] == stop for row in rows])
    raw, r, passed = judge(rows, [source.record(i) for i in picked], ended)
    r = torch.where(ended, r, -all_max(dist, -float(r.min())) - 1)  # all_max of -r: the lowest
    R = shaped_reward(r, logps, ref_logps, cfg.beta)
    return Rollout(rows, logps, R, passed | {
        "J": R, "reward": r, "raw": raw, "kl": (logps - ref_logps).sum(1), "ended": ended.float(),
        "length": torch.tensor([float(sum(row.mask)) for row in rows]),
        "read": torch.tensor([float(len(row.ids)) for row in rows]), "surprise": -logps.sum(1),
        "mismatch": (logps - nn.utils.rnn.pad_sequence(drawn, batch_first=True)).abs().amax(1)})


def reply_losses(net: nn.Module, model: Transformer, rollout: Rollout, advantage: Tensor,
                 some: list[int], cfg: Config, dist: Dist, first: bool) -> tuple[Tensor, Tensor]:
    """The losses (B,) of some replies of a rollout, and which the clip has changed, (B,). `net` is
    what sharding.wrap made of `model`. In the `first` update it wrote them, and each ratio is 1."""
    idx, targets, _ = (t.to(dist.device) for t in pad_right([rollout.rows[i] for i in some], 0))
    with dist.autocast():
        logps = token_logps(net(idx, hidden=True), model.lm_head.weight, targets)
    if first:  # log P as it is rounded here, not in roll_out
        rollout.logps[some, :idx.size(1)] = logps.detach().cpu()
    loss = partial(rl_loss, old_logps=rollout.logps[some, :idx.size(1)].to(dist.device),
                   mask=targets != IGNORE, advantage=advantage[some].to(dist.device),
                   per_token=cfg.advantage.startswith("grpo"))
    losses = loss(logps, eps_low=cfg.eps_low, eps_high=cfg.eps_high)
    return losses, losses.detach() != loss(logps.detach(), eps_low=torch.inf, eps_high=torch.inf)


def evaluate(roll: partial[Rollout], rows: Rows, tok: Tokenizer, cfg: Config,
             each: int = 1) -> tuple[dict[str, float], Tensor]:
    """Roll out held-out prompts, `each` replies to one: mean figures, two standard errors, how
    often replies pass, and all r, (prompts, each)."""
    picked = evenly_spaced(range(len(rows)), cfg.eval_prompts)
    asked = [(i, g) for i in picked for g in range(each)]
    rollout = roll(rows, [i for i, _ in asked], [hash64(cfg.seed, -1, i) ^ g for i, g in asked])
    print_samples(tok, [rows.lang(i) for i, _ in asked], rollout.rows, rollout.figures["raw"])
    figures = {name: x.view(-1, each) for name, x in rollout.figures.items()}
    found = {name: float(x.mean()) for name, x in figures.items()}
    for name in ("kl", "J"):
        found[f"{name}_error"] = float(figures[name].mean(1).std() / len(picked) ** 0.5)
    return found | pass_rates(figures), figures["reward"]


def count_micro_steps(cfg: Config, world: int) -> int:
    """Micro-steps in an update. Raises ValueError for settings that do not fit together."""
    accumulate, rest = divmod(cfg.prompts_per_step * cfg.group, cfg.batch_size * world)
    if cfg.prompts_per_step % world or rest:
        raise ValueError(f"prompts_per_step x group = {cfg.prompts_per_step} x {cfg.group} must be "
                         f"a multiple of batch_size x processes = {cfg.batch_size} x {world}, and "
                         "prompts_per_step of the processes")
    if cfg.warmup_steps >= cfg.max_steps:
        raise ValueError(f"warmup_steps {cfg.warmup_steps} must be less than max_steps "
                         f"{cfg.max_steps}")
    return accumulate


def train(cfg: Config, dist: Dist) -> None:
    accumulate, max_steps = count_micro_steps(cfg, dist.world), cfg.max_steps
    model, tok = load_to_train(cfg)
    reference = load_reference(cfg, model, dist)
    judge, config = load_judge(cfg, tok, dist), model.config
    length = min(config.max_seq_len, judge.reads)
    if cfg.answer_tokens >= length:
        raise ValueError(f"answer_tokens {cfg.answer_tokens} leave no room for a prompt in the "
                         f"{length} tokens that the models read")
    prompts, val = load_splits(cfg, "prompt", tok, length - cfg.answer_tokens, dist, least=2)
    order = Order(len(prompts), cfg.seed, prompts.name)
    data_id = hash64(prompts.data_id, judge.sha256, checkpoint.hash_of(model.path))
    if model.kind == "pt":
        print0(f"WARNING: {model.path} has not learnt to answer: start from an SFT model")
    n_replies = cfg.prompts_per_step * cfg.group  # in a rollout, of all processes
    longest = max(int(rows.lengths().max()) for rows in (prompts, val))
    most = max(n_replies // dist.world, min(cfg.eval_prompts, len(val)) * judge.each)
    print0(describe_run(dist))
    print0(memory_line(cfg, dist, model, cfg.batch_size, longest + cfg.answer_tokens, accumulate,
                       frozen={"reference": model} | judge.held,
                       written=(min(cfg.rollout_size, most), longest, cfg.answer_tokens)))
    print0(f"{count_parameters(config):,} parameters; {len(prompts):,} prompts, {len(val):,} held "
           f"out; {max_steps:,} steps of {cfg.prompts_per_step} x {cfg.group} replies")
    net = sharding.wrap(model, dist, cfg.shard, cfg.recompute)
    optimizers = make_optimizers(model, cfg)
    # now the policy is the reference, whose rewards say what J can reach
    roll = partial(roll_out, model, reference, judge, tok.im_end, cfg, dist)
    start, rewards = evaluate(roll, val, tok, cfg, judge.each)
    if cfg.beta:  # a KL that costs nothing leaves no limit but the best reply of all
        start["best"], start["best_error"] = best_possible(rewards, cfg.beta)
    first = sharding.resume(cfg, KIND, model, optimizers, tok, data_id)
    flops = flops_per_token(config, longest + cfg.answer_tokens, frozen=count_frozen(model))
    log = Log(cfg, dist, first, max_steps, 0, flops, COLUMNS)
    guard, signals, stopping = runtime.GradientGuard(), runtime.StopSignals(), False
    mean = {"mismatch": 0.0, "equal": 0.0}

    for step in range(first, max_steps + 1):
        last = step == max_steps
        # Evaluate at the start, every few steps, and at the end.
        if last or step == 0 or (step % cfg.eval_every == 0 and step > first):
            sharding.same_weights(model, dist)
            now = start | (evaluate(roll, val, tok, cfg, judge.each)[0] if step else {})
            print0(f"val at step {step:,} | {rl_line(now, judge.unit)}")
            for warning in rl_warnings(start, now, mean, cfg.kl_budget, dist):
                print0(f"WARNING: {warning}")
            log.write(step=step, val=now)

        # same in every train_*.py: save
        # Save, also when a signal asks the run to stop; then leave.
        if last or stopping or (step % cfg.save_every == 0 and step > first):
            sharding.save(cfg, KIND, step, model, optimizers, tok, data_id, dist, last)
            log.start_clock()
        if last or stopping:
            break
        # end same

        # Set the learning rate.
        lr = set_learning_rate(optimizers, cfg, step, max_steps)
        # Roll out: answer some prompts with the policy as it is, and compare the replies.
        picked = order.take(step * cfg.prompts_per_step, cfg.prompts_per_step)
        own = range(dist.rank, cfg.prompts_per_step, dist.world)
        asked = [(i, g) for i in own for g in range(cfg.group)]
        rollout = roll(prompts, [picked[i] for i, _ in asked],
                       [hash64(hash64(cfg.seed, step, i), g) for i, g in asked])
        R, r = (x.view(-1, cfg.group) for x in (rollout.R, rollout.figures["reward"]))
        equal = r.amax(1) == r.amin(1)  # (prompts,)
        A = torch.where(equal[:, None], 0, advantages(R, cfg.advantage)).flatten()
        batches = that_teach(A, rollout.rows, cfg.batch_size, dist)
        for update in range(cfg.updates_per_rollout):
            # Add up the gradients of the replies, a portion at a time.
            loss, clipped = torch.zeros((), device=dist.device), 0.0
            for micro_step, some in enumerate(batches):
                sharding.exchange_gradients(net, micro_step == len(batches) - 1)  # only in the last
                losses, cut = reply_losses(net, model, rollout, A, some, cfg, dist, not update)
                part = losses.sum() / n_replies
                (part * dist.world).backward()  # DDP takes the mean over processes
                loss += part.detach()
                clipped += float(cut.sum())
            samples = f"prompts {picked}, update {update}"

            # same in every train_*.py: step
            # Step, unless the gradient is not finite.
            norm = sharding.clip_gradients(net, cfg.grad_clip)
            total, stops = all_sum(dist, loss, float(bool(signals.name)))
            stopping = stops > 0
            if guard.allows(norm, step, total, samples):
                for optimizer in optimizers:
                    optimizer.step()
            for optimizer in optimizers:
                optimizer.zero_grad()
            # end same
        sums = {name: x.sum() for name, x in rollout.figures.items()}
        sums |= {"equal": equal.sum() * cfg.group, "clipped": clipped}
        mean = {k: x / n_replies for k, x in zip(sums, all_sum(dist, *sums.values()))}
        mean["entropy"] = mean["surprise"] / mean["length"]  # estimate, in nats per token
        mean["mismatch"] = all_max(dist, float(rollout.figures["mismatch"].max()))
        log.step(step, total, lr, norm, round(mean["read"] * n_replies), **mean)

    if stopping:
        signals.report(step)
    print0(peak_line(dist))


def main() -> None:
    runtime.launch(train, configure(Config))


if __name__ == "__main__":
    run(main)

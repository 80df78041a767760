"""
Direct preference optimisation: learn from pairs of replies, without a reward model.

    L_DPO = - log sigmoid(beta h)                                 (Rafailov et al. 2023)
    h = (log P(chosen) - log P_ref(chosen)) - (log P(rejected) - log P_ref(rejected))

    python train_dpo.py config/dpo_micro.py                                a laptop
    torchrun --nproc_per_node=8 train_dpo.py config/dpo_1b.py --data=pairs.jsonl    8 GPUs

log P of a reply is the sum over its tokens. The reference is the model before its first step: its
log P of each pair is computed once, at the start. (With --lora_rank, see train_sft.py, that takes
no memory: the reference is the model without the update.) The policy is the model that learns. It
scores a reply by beta (log P - log P_ref), its implied reward; the margin beta h is the difference
of a pair. --loss chooses another loss, and --nll_coef adds the last line to any of them:

    sigmoid, label_smoothing e   -(1 - e) log sigmoid(beta h) - e log sigmoid(-beta h)      cDPO
    ipo       (h - 1 / (2 beta))^2, with means over tokens, not sums           (Azar et al. 2023)
    simpo     - log sigmoid(beta (mean log P(chosen) - mean log P(rejected)) - gamma)  (Meng et al.)
    + nll_coef times the mean of -log P over the tokens of the chosen replies

plumbing/chats.py says what a line of --data looks like.
"""
from plumbing.terminal import end_quietly, run
end_quietly(__name__)  # Ctrl-C during the imports below, which take seconds

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from configurator import Count, FilePath, Natural, NotNegative, Positive, Share, configure
from data import IGNORE, hash64
from generate import replies
from model import Transformer, token_logps
from plumbing import checkpoint, runtime, sharding
from plumbing.costs import count_frozen, flops_per_token, memory_line, peak_line
from plumbing.evaluation import print_samples
from plumbing.examples import (Row, Rows, evenly_spaced, in_batches, micro_batches, pad_right,
                               pair_batch, prompts_with_room)
from plumbing.jobs import Progress
from plumbing.loading import load_reference, load_to_train
from plumbing.log import Log
from plumbing.lora import adapter_off
from plumbing.optim import make_optimizers, set_learning_rate
from plumbing.runtime import Dist, all_sum, print0
from plumbing.splits import PairSettings, open_pairs
from tokenizer import Tokenizer

KIND = "dpo"  # the name of this stage in its checkpoints


@dataclass(frozen=True)
class Config(PairSettings):
    out_dir: FilePath = "out/dpo"  # checkpoints and log.jsonl go here
    loss: Literal["sigmoid", "ipo", "simpo"] = "sigmoid"  # which of the formulas
    beta: Positive = 0.1  # strength of the pull towards the reference; simpo wants 2 to 2.5
    label_smoothing: Share = 0.0  # e: share of the labels taken to be wrong; sigmoid only
    gamma: NotNegative = 1.0  # simpo: by how much the chosen reply must be better
    nll_coef: NotNegative = 0.0  # weight of the likelihood of the chosen reply
    learning_rate: Positive = 5e-7  # of AdamW
    eval_every: Count = 50  # steps between validations
    eval_samples: Natural = 64  # prompts that a validation answers, for KL and length; 0: none


def dpo_loss(chosen: Tensor, rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor,
             chosen_tokens: Tensor, rejected_tokens: Tensor, loss: str = "sigmoid",
             beta: float = 0.1, label_smoothing: float = 0.0, gamma: float = 1.0) -> Tensor:
    """The loss of each pair, (B,), from the summed log P of its replies under policy and reference
    and their numbers of tokens, (B,) each. Another: an `if` here, and its name in Config.loss."""
    margin = beta * ((chosen - ref_chosen) - (rejected - ref_rejected))
    if loss == "sigmoid":
        right, wrong = -F.logsigmoid(margin), -F.logsigmoid(-margin)
        return (1 - label_smoothing) * right + label_smoothing * wrong
    if loss == "ipo":
        gap = (chosen - ref_chosen) / chosen_tokens - (rejected - ref_rejected) / rejected_tokens
        return (gap - 1 / (2 * beta)) ** 2
    assert loss == "simpo", loss
    gap = chosen / chosen_tokens - rejected / rejected_tokens
    return -F.logsigmoid(beta * gap - gamma)


def settings(cfg: Config) -> dict[str, Any]:
    return {name: getattr(cfg, name) for name in ("loss", "beta", "label_smoothing", "gamma")}


def reply_logps(net: nn.Module, model: Transformer, idx: Tensor, targets: Tensor,
                dist: Dist) -> tuple[Tensor, Tensor]:
    """(summed log P, number of tokens) of the reply in each row, (2 B,) each. `net` is what
    sharding.wrap made of `model`, or the model itself."""
    with dist.autocast():
        logps = token_logps(net(idx, hidden=True), model.lm_head.weight, targets)
    return logps.sum(-1), (targets != IGNORE).sum(-1)


@torch.no_grad()
def pair_logps(model: Transformer, rows: Rows, picked: list[int], batch_size: int,
               dist: Dist) -> Tensor:
    """(len(picked), 2) summed log P of both replies of pairs, in float64 on the CPU. Each process
    takes its share of the batches, which hold pairs of about one length."""
    found, progress = torch.zeros(len(rows), 2, dtype=torch.float64), Progress()
    batches = micro_batches(rows, picked, batch_size, dist.rank, dist.world)
    for i, some in enumerate(batches):
        idx, targets, _ = pair_batch(rows, some)
        sums, _ = reply_logps(model, model, idx.to(dist.device), targets.to(dist.device), dist)
        found[some] = sums.view(2, -1).t().cpu().double()
        if dist.rank == 0 and len(picked) > 2000:
            progress.show(f"log P of pairs: {i / len(batches):.0%}")
    progress.end()
    return found.new_tensor(all_sum(dist, *found[picked].ravel().tolist())).view(-1, 2)


def evaluate(model: Transformer, rows: Rows, ref: Tensor, cfg: Config, dist: Dist,
             most: int | None) -> dict[str, dict[str, float]]:
    """Loss, implied rewards and log P per token of at most `most` held-out pairs: of all and of
    each language. `ref` is the reference's log P of the replies of all pairs."""
    picked = evenly_spaced(range(len(rows)), most)
    logps, ref = pair_logps(model, rows, picked, 2 * cfg.batch_size, dist), ref[picked]
    tokens = torch.tensor([[sum(row.mask) for row in rows.example(i)] for i in picked])
    rewards = cfg.beta * (logps - ref)
    margin = rewards[:, 0] - rewards[:, 1]
    figures = {
        "loss": dpo_loss(*logps.T, *ref.T, *tokens.T, **settings(cfg)), "margin": margin,
        "accuracy": torch.where(margin.abs() < 1e-5, 0.5, (margin > 0).double()),
        "chosen_reward": rewards[:, 0], "rejected_reward": rewards[:, 1]}
    found, langs = {}, [rows.lang(i) for i in picked]
    for name in ("all", *sorted(set(langs))):
        part = torch.tensor([name in ("all", lang) for lang in langs])
        found[name] = {key: float(values[part].mean()) for key, values in figures.items()}
        per_token = logps[part].sum(0) / tokens[part].sum(0)
        found[name] |= {"chosen_logp": float(per_token[0]), "rejected_logp": float(per_token[1])}
    return found


@torch.no_grad()
def answer_prompts(model: Transformer, reference: Transformer, tok: Tokenizer,
                   prompts: dict[int, list[int]], rows: Rows, cfg: Config,
                   dist: Dist) -> dict[str, float]:
    """Sampled replies to held-out prompts: their KL from the reference, the mean over replies of
    log P - log P_ref; their length; the share of them that ends by itself. Prints one reply of each
    language. Without prompts there is nothing to tell: {}."""
    kls, lengths, stops, answered = [], [], [], []
    for batch in in_batches(list(prompts), 32):
        asked = [prompts[i] for i in batch]
        said = replies(model, asked, cfg.answer_tokens, stop=(tok.im_end,),
                       seed=hash64(cfg.seed, batch[0]))
        full = [Row(p + r, [0] * len(p) + [1] * len(r)) for p, r in zip(asked, said)]
        idx, targets, _ = (t.to(dist.device) for t in pad_right(full, 0))
        own, n_tokens = reply_logps(model, model, idx, targets, dist)
        with adapter_off(reference):
            ref, _ = reply_logps(reference, reference, idx, targets, dist)
        kls += (own - ref).tolist()
        lengths += n_tokens.tolist()
        stops += [reply[-1] == tok.im_end for reply in said]
        answered += full
    print_samples(tok, [rows.lang(i) for i in prompts], answered)
    sums = {"kl": sum(kls), "length": sum(lengths), "stops": sum(stops)}
    return {name: value / len(prompts) for name, value in sums.items()} if prompts else {}


def report(found: dict[str, dict], step: int) -> None:
    """Print a validation: {"pairs": figures of all and of each language, "samples": …}."""
    for name, r in found["pairs"].items():
        print0(f"val at step {step:,} | {name} loss {r['loss']:.4f}, accuracy {r['accuracy']:.1%}, "
               f"margin {r['margin']:.3f} = {r['chosen_reward']:+.3f} - {r['rejected_reward']:+.3f}"
               f", log P per token {r['chosen_logp']:.3f} and {r['rejected_logp']:.3f}")
    if r := found["samples"]:
        print0(f"samples at step {step:,} | KL {r['kl']:.3f} nats/reply, {r['length']:.1f} tokens, "
               f"{r['stops']:.1%} stop")


def warnings(start: dict, now: dict, cfg: Config, step: int, max_steps: int) -> list[str]:
    """What often goes wrong, told from the first validation and this one."""
    found = []
    a, b = start["pairs"]["all"], now["pairs"]["all"]
    if cfg.loss == "sigmoid" and step >= 0.1 * max_steps and b["margin"] < 0.02:
        found.append("the margin does not grow: raise --learning_rate")
    if b["chosen_logp"] < a["chosen_logp"] - 0.3 and b["margin"] > a["margin"]:
        found.append("the chosen replies become less likely: try --nll_coef=0.2 or a larger --beta")
    x, y = start["samples"], now["samples"]
    if x and not 0.5 <= y["length"] / x["length"] <= 1.5:
        found.append(f"replies went from {x['length']:.0f} to {y['length']:.0f} tokens")
    if y and y["stops"] < 0.95:
        found.append(f"only {y['stops']:.0%} of the replies end by themselves")
    return found


def train(cfg: Config, dist: Dist) -> None:
    if cfg.label_smoothing >= 0.5:
        raise ValueError(f"label_smoothing {cfg.label_smoothing} must be less than 0.5")
    if cfg.label_smoothing and cfg.loss != "sigmoid":
        raise ValueError(f"label_smoothing {cfg.label_smoothing} means nothing with loss "
                         f"{cfg.loss}: it belongs to sigmoid")
    model, tok = load_to_train(cfg)
    pairs, val, order, max_steps, accumulate = open_pairs(cfg, "pair", model, tok, dist)
    prompts = prompts_with_room(val, evenly_spaced(range(len(val)), cfg.eval_samples),
                                model.config.max_seq_len, cfg.answer_tokens)
    (_, longest), (_, longest_val) = pairs.largest(), val.largest()
    print0(memory_line(
        cfg, dist, model, 2 * cfg.batch_size, longest, accumulate,
        frozen={"reference": model} if prompts else {},
        judged=(2 * min(2 * cfg.batch_size, max(len(pairs), len(val))), max(longest, longest_val)),
        written=(min(32, len(prompts)), longest_val, cfg.answer_tokens)))
    # a copy of the start tells how far the sampled replies go from it; without prompts it is idle
    reference = load_reference(cfg, model, dist) if prompts else model
    net = sharding.wrap(model, dist, cfg.shard, cfg.recompute)

    # Now the model is the reference: remember its log P of every pair of the run.
    used = sorted(set(order.take(0, min(max_steps * cfg.batch_pairs, len(pairs)))))
    ref = torch.full((len(pairs), 2), math.nan, dtype=torch.float64)
    with sharding.unsharded(model, dist):
        ref_val = pair_logps(model, val, list(range(len(val))), 2 * cfg.batch_size, dist)
        ref[used] = pair_logps(model, pairs, used, 2 * cfg.batch_size, dist)

    def validate(most: int | None) -> dict[str, dict]:
        with sharding.unsharded(model, dist):
            return {"pairs": evaluate(model, val, ref_val, cfg, dist, most),
                    "samples": answer_prompts(model, reference, tok, prompts, val, cfg, dist)}

    start = validate(cfg.eval_pairs)
    optimizers = make_optimizers(model, cfg)
    data_id = hash64(pairs.data_id, checkpoint.hash_of(model.path))
    first = sharding.resume(cfg, KIND, model, optimizers, tok, data_id)
    flops = flops_per_token(model.config, longest, frozen=count_frozen(model))
    log = Log(cfg, dist, first, max_steps, 0, flops, ("margin", "accuracy", "chosen"))
    guard, signals, stopping = runtime.GradientGuard(), runtime.StopSignals(), False

    for step in range(first, max_steps + 1):
        last = step == max_steps
        # Evaluate at the start, every few steps, and at the end.
        if last or step == 0 or (step % cfg.eval_every == 0 and step > first):
            found = validate(None if last else cfg.eval_pairs) if step else start
            report(found, step)
            if step:
                for warning in warnings(start, found, cfg, step, max_steps):
                    print0(f"WARNING: {warning}")
            log.write(step=step, val=found)

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
        # Add up the gradients of the step's pairs, a portion at a time.
        picked = order.take(step * cfg.batch_pairs, cfg.batch_pairs)
        micro = micro_batches(pairs, picked, cfg.batch_size, dist.rank, dist.world)
        batches = [pair_batch(pairs, some) for some in micro]
        # the number of chosen tokens in the whole step is needed before the first backward pass
        n_chosen, = all_sum(dist, sum(int((targets[:len(some)] != IGNORE).sum())
                                      for some, (_, targets, _) in zip(micro, batches)))
        loss, sums = torch.zeros((), device=dist.device), torch.zeros(4)
        for micro_step, (some, batch) in enumerate(zip(micro, batches)):
            idx, targets, n_read = (t.to(dist.device) for t in batch)
            sharding.exchange_gradients(net, micro_step == accumulate - 1)  # only in the last pass
            logps, lengths = reply_logps(net, model, idx, targets, dist)
            own, of_ref = logps.view(2, -1), ref[some].t().to(dist.device, torch.float32)
            losses = dpo_loss(*own, *of_ref, *lengths.view(2, -1), **settings(cfg))
            part = losses.sum() / cfg.batch_pairs - cfg.nll_coef * own[0].sum() / n_chosen
            (part * dist.world).backward()  # DDP takes the mean over processes, we want the sum
            loss += part.detach()
            rewards = cfg.beta * (own.detach() - of_ref)
            margin = rewards[0] - rewards[1]
            right = (margin > 0).sum() + 0.5 * (margin == 0).sum()
            sums += torch.stack([margin.sum(), right, own[0].detach().sum(), n_read.sum()]).cpu()
        samples = f"pairs {step * cfg.batch_pairs:,} to {(step + 1) * cfg.batch_pairs - 1:,}"

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
        margins, n_right, chosen_logp, n_tokens = all_sum(dist, *sums)
        log.step(step, total, lr, norm, int(n_tokens), margin=margins / cfg.batch_pairs,
                 accuracy=n_right / cfg.batch_pairs, chosen=chosen_logp / n_chosen)

    if stopping:
        signals.report(step)
    print0(peak_line(dist))


def main() -> None:
    runtime.launch(train, configure(Config))


if __name__ == "__main__":
    run(main)

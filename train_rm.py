"""
The reward model: learn which of two replies a person would prefer.

    L_RM = - log sigmoid(r(chosen) - r(rejected) - margin)  +  c (r(chosen) + r(rejected))^2

    python train_rm.py config/rm_micro.py                                  a laptop
    torchrun --nproc_per_node=8 train_rm.py config/rm_1b.py --data=pairs.jsonl      8 GPUs
    python train_rm.py --init_from=out/rm --score=replies.jsonl            score replies, as JSON

r is the score of a reply: one number that an fp32 head reads from the model's last hidden state, at
the reply's <|im_end|> (Bradley & Terry 1952, Ouyang et al. 2022). A line of --data is a pair or a
ranking of several replies, best first (plumbing/chats.py). A ranking is compared pair by pair but
weighs as much as one pair, so --batch_pairs counts lines. margin, a field of the line, is 0 if
absent; it says by how much the better score should exceed the other.

Adding a number to all scores leaves the first term unchanged, so scores could drift; the second
term, with c = center_coef, keeps them near 0. After `python train_rm.py config/rm_micro.py
--max_steps=150` the mean score of the SFT model's own replies is 0.09 and -0.04 (seeds 0 and 1,
starting from the SFT model of `python -m demo --share=0.1`). With --center_coef=0 the mean is -0.64
and -0.76; the scores' standard deviation is 0.6.
"""
from plumbing.terminal import end_quietly, run
end_quietly(__name__)  # Ctrl-C during the imports below, which take seconds

import sys
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from configurator import Count, FilePath, NotNegative, Share, configure
from data import hash64
from generate import replies
from model import RewardModel
from plumbing import runtime, sharding
from plumbing.costs import count_frozen, flops_per_token, memory_line, peak_line
from plumbing.evaluation import print_scores, score_rows
from plumbing.examples import (Row, Rows, evenly_spaced, micro_batches, prompts_with_room,
                               ranking_batch)
from plumbing.loading import load_reference, load_to_train
from plumbing.log import Log
from plumbing.lora import adapter_off
from plumbing.optim import make_optimizers, set_learning_rate
from plumbing.runtime import Dist, all_sum, print0
from plumbing.splits import PairSettings, open_pairs
from tokenizer import Tokenizer

KIND = "rm"  # the name of this stage in its checkpoints


@dataclass(frozen=True)
class Config(PairSettings):
    init_from: FilePath = "out/sft"  # checkpoint to start from; with --score: the reward model
    out_dir: FilePath = "out/rm"  # checkpoints and log.jsonl go here
    score: FilePath = ""  # do not train: print the scores of the chats or pairs in these files
    center_coef: NotNegative = 0.01  # c in the formula: keeps the scores near 0
    curriculum: Share = 0.0  # share of the steps in which longer and longer pairs are let in
    norm_samples: Count = 256  # replies of the start model whose scores give mean and deviation


def rm_loss(chosen: Tensor, rejected: Tensor, margin: Tensor, center_coef: float) -> Tensor:
    """The loss of each pair, (B,), from the scores of its two replies and its margin, (B,) each."""
    gap = chosen - rejected - margin
    return -F.logsigmoid(gap) + center_coef * (chosen + rejected) ** 2


def easy_first(picked: list[int], shortest_first: np.ndarray, progress: float) -> list[int]:
    """Replace the examples of a step, drawn from all, by as many from the shortest of them: example
    i by the one at place share * i of those sorted by length. The share is a tenth at first, and 1
    when `progress` is. What must be found in a short prompt is learnt sooner, and then found in a
    long one (Bengio et al. 2009)."""
    share = max(0.1, progress)
    return picked if share >= 1 else [int(shortest_first[int(i * share)]) for i in picked]


@torch.no_grad()
def score_examples(model: RewardModel, rows: Rows, picked: list[int], batch_size: int,
                   dist: Dist) -> np.ndarray:
    """(len(picked), replies) scores, 0 where an example has fewer replies than another. Each
    process takes its share of the batches, which hold examples of about one length."""
    scores = np.zeros((len(rows), rows.largest()[0]))
    for batch in micro_batches(rows, picked, batch_size, dist.rank, dist.world):
        groups = [rows.example(i) for i in batch]
        found = iter(score_rows(model, [row for group in groups for row in group], dist).tolist())
        for i, group in zip(batch, groups):
            scores[i, :len(group)] = [next(found) for _ in group]
    sums = all_sum(dist, *scores[picked].ravel())  # those of the others too
    return np.array(sums).reshape(-1, scores.shape[1])


def judge(scores: np.ndarray, lengths: np.ndarray) -> dict[str, float]:
    """Accuracy, calibration and the pull of length, from the scores and the lengths (n, 2) of
    pairs, the chosen reply first. Equal scores count one half, as a coin would. Another figure is
    one more line here and one in `report`."""
    gap = scores[:, 0] - scores[:, 1]
    right = np.where(gap == 0, 0.5, gap > 0)
    shorter = lengths[:, 0] < lengths[:, 1]
    longer = np.where(lengths[:, 0] == lengths[:, 1], 0.5, ~shorter)
    # ECE, the expected calibration error: among pairs to which the model gives a probability of
    # about p, how far from p is the share of right ones? Every other pair is swapped: else a model
    # that always prefers the first reply would look calibrated.
    first = np.arange(len(gap)) % 2 == 0
    p = 1 / (1 + np.exp(-np.where(first, gap, -gap)))
    bins = np.minimum((10 * p).astype(int), 9)
    ece = sum(abs(p[bins == b].mean() - first[bins == b].mean()) * (bins == b).mean()
              for b in np.unique(bins))
    varied = scores.std() > 0 and lengths.std() > 0
    figures = {
        "accuracy": right.mean(), "longer_is_better": longer.mean(),
        "accuracy_chosen_shorter": right[shorter].mean() if shorter.any() else 0.5,
        "log_loss": np.logaddexp(0, -gap).mean(), "ece": ece, "gap": gap.mean(),
        "length_correlation": np.corrcoef(scores.ravel(), lengths.ravel())[0, 1] if varied else 0}
    return {name: float(value) for name, value in figures.items()}


def evaluate(model: RewardModel, rows: Rows, cfg: Config, dist: Dist,
             most: int | None) -> dict[str, dict[str, float]]:
    """`judge` of the pairs of at most `most` held-out examples, and of each language."""
    picked = evenly_spaced(range(len(rows)), most)
    scores, lengths, langs = [], [], []
    for i, own in zip(picked, score_examples(model, rows, picked, 2 * cfg.batch_size, dist)):
        group = rows.example(i)
        for a, b in combinations(range(len(group)), 2):
            scores.append(own[[a, b]])
            lengths.append((sum(group[a].mask), sum(group[b].mask)))
            langs.append(rows.lang(i))
    pairs, tokens, lang = np.array(scores), np.array(lengths), np.array(langs)
    return {"all": judge(pairs, tokens)} | {name: judge(pairs[lang == name], tokens[lang == name])
                                            for name in sorted(set(langs))}


def report(found: dict[str, dict[str, float]], step: int) -> None:
    """Print a validation, and a warning if length explains the scores."""
    for name, r in found.items():
        print0(f"val at step {step:,} | {name} accuracy {r['accuracy']:.1%} (longer is better: "
               f"{r['longer_is_better']:.1%}), log-loss {r['log_loss']:.4f}, ECE {r['ece']:.3f}, "
               f"gap {r['gap']:.2f}, corr(score, length) {r['length_correlation']:+.2f}")
    r = found["all"]
    if abs(r["length_correlation"]) > 0.3 and r["accuracy_chosen_shorter"] < 0.7:
        print0(f"WARNING: the score follows the length; where the shorter reply was chosen it is "
               f"right {r['accuracy_chosen_shorter']:.1%} of the time")


def set_scale(model: RewardModel, tok: Tokenizer, prompts: list[list[int]], cfg: Config,
              dist: Dist) -> None:
    """Give the reward model the mean and standard deviation of its scores of what the start model
    replies to the prompts. train_rl.py measures rewards in such deviations, so that its penalty
    means the same for every reward model."""
    policy = load_reference(cfg, model.backbone, dist)
    gathered = model if cfg.lora_rank else policy  # what --shard has taken apart
    scores: list[float] = []
    for at in range(0, len(prompts), 32):
        part = prompts[at:at + 32]
        with sharding.unsharded(gathered, dist), adapter_off(policy):
            said = replies(policy, part, cfg.answer_tokens, stop=(tok.im_end,),
                           seed=hash64(cfg.seed, at))
        rows = [Row(p + r, [0] * len(p) + [1] * len(r)) for p, r in zip(part, said)]
        with torch.no_grad():
            scores += score_rows(model, rows, dist).tolist()
    model.mean.fill_(float(np.mean(scores)))
    model.std.fill_(max(float(np.std(scores)), 1e-6))
    print0(f"scores of {len(scores)} replies of {policy.path}: mean {float(model.mean):.3f}, "
           f"standard deviation {float(model.std):.3f}")


def train(cfg: Config, dist: Dist) -> None:
    backbone, tok = load_to_train(cfg)
    config = backbone.config
    pairs, val, order, max_steps, accumulate = open_pairs(cfg, "ranking", backbone, tok, dist)
    prompts = prompts_with_room(val, evenly_spaced(range(len(val)), cfg.norm_samples),
                                config.max_seq_len, cfg.answer_tokens)
    if len(prompts) < 2:
        raise ValueError("two held-out prompts or more must leave room for a reply: the scores of "
                         "such replies are the scale on which train_rl.py measures rewards")
    (most, longest), (most_val, longest_val) = pairs.largest(), val.largest()
    print0(memory_line(
        cfg, dist, backbone, most * cfg.batch_size, longest, accumulate, head=False,
        judged=(most_val * min(2 * cfg.batch_size, len(val)), longest_val),
        written=(min(32, len(prompts)), longest_val, cfg.answer_tokens),
        another_writes=not cfg.lora_rank))
    torch.manual_seed(cfg.seed)
    model = RewardModel(backbone)
    net = sharding.wrap(model, dist, cfg.shard, cfg.recompute)
    optimizers = make_optimizers(model, cfg)
    data_id = pairs.data_id
    first = sharding.resume(cfg, KIND, model, optimizers, tok, data_id)
    easy_until, shortest_first = cfg.curriculum * max_steps, pairs.shortest_first()
    log = Log(cfg, dist, first, max_steps, 0,
              flops_per_token(config, longest, False, count_frozen(backbone)), ("accuracy",))
    guard, signals, stopping = runtime.GradientGuard(), runtime.StopSignals(), False

    for step in range(first, max_steps + 1):
        last = step == max_steps
        # Evaluate at the start, every few steps, and at the end.
        if last or step == 0 or (step % cfg.eval_every == 0 and step > first):
            with sharding.unsharded(model, dist):
                found = evaluate(model, val, cfg, dist, None if last else cfg.eval_pairs)
            report(found, step)
            log.write(step=step, val=found)
        if last:
            set_scale(model, tok, list(prompts.values()), cfg, dist)

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
        if step < easy_until:
            picked = easy_first(picked, shortest_first, step / easy_until)
        loss, right, seen = torch.zeros((), device=dist.device), 0.0, 0
        micro = micro_batches(pairs, picked, cfg.batch_size, dist.rank, dist.world)
        for micro_step, some in enumerate(micro):
            # each reply is a row; `better` and `worse` are the rows of each pair, and `weight` is 1
            # over the number of pairs in its ranking
            idx, lengths, (better, worse), margin, weight = (t.to(dist.device) for t in
                                                            ranking_batch(pairs, some))
            sharding.exchange_gradients(net, micro_step == accumulate - 1)  # only in the last pass
            with dist.autocast():
                scores = net(idx, lengths)
            a, b = scores[better], scores[worse]
            part = (weight * rm_loss(a, b, margin, cfg.center_coef)).sum() / cfg.batch_pairs
            (part * dist.world).backward()  # DDP takes the mean over processes, we want the sum
            loss += part.detach()
            right += float((weight * ((a > b) + 0.5 * (a == b))).sum())
            seen += int(lengths.sum())
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
        n_right, n_tokens = all_sum(dist, right, seen)
        log.step(step, total, lr, norm, int(n_tokens), accuracy=n_right / cfg.batch_pairs)

    if stopping:
        signals.report(step)
    print0(peak_line(dist))


def main() -> None:
    scores = any(word.startswith("--score") for word in sys.argv)  # stdout is for these alone
    cfg = configure(Config, show=not scores)
    runtime.launch(print_scores if cfg.score else train, cfg, trains=not cfg.score)


if __name__ == "__main__":
    run(main)

"""
The reward model: which of two replies would a person prefer?

    python train_rm.py config/rm_micro.py --init_from=out/sft --data=pairs.jsonl --out_dir=out/rm
    python train_rm.py --init_from=out/rm --score=replies.jsonl

    L_RM = - log sigmoid(r(chosen) - r(rejected) - margin)  +  c (r(chosen) + r(rejected))^2

per pair, the mean over the pairs of a ranking (Bradley & Terry 1952; Ouyang et al. 2022); the
second term keeps scores around 0 and costs the first nothing, which knows differences only. r is
one number read from the last state, at the <|im_end|> of a reply, by a head in fp32 on top of the
SFT model. How the scores of the SFT model's own replies are spread, mean and standard deviation, is
kept for train_rl.py, so that its penalty means the same for every reward model. Files: examples.py
says what a line of --data looks like.
"""
# same in every train_*.py: early signals
from plumbing import interrupts

if __name__ == "__main__":  # a stop during the imports below must end them without a traceback
    interrupts.end_quietly()
# end same

import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import combinations
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
from plumbing.corpus import find_files, read_batches
from plumbing.jsonl import BadLine, parse_records
from plumbing.costs import (count_parameters, flops_per_token, fullest, judging_memory, training_memory,
                   writing_memory)
from data import Order, hash64
from plumbing.examples import (Row, Rows, in_batches, load_splits, micro_batches, pad_right, prompt_of,
                      ranking_batch, reply_end, rows_of, evenly_spaced, with_room)
from generate import load_model, replies
from model import ModelConfig, RewardModel, Transformer
from plumbing.runtime import Dist, all_sum, print0
from tokenizer import Tokenizer

KIND = "rm"  # of checkpoint
EXAMPLES = "ranking"  # of the data


@dataclass(frozen=True)
class Config:
    init_from: str = "out/sft"  # checkpoint to start from; with score: the reward model
    data: str = "out/toyworld/pairs.jsonl"  # pairs or rankings to learn: JSONL files or folders
    val_data: str = ""  # pairs or rankings to judge by; empty: a part of data
    val_fraction: float = 0.05  # share of data to judge by, if there is no val_data
    on_bad_line: Literal["stop", "skip"] = "stop"  # at a line that is not as it should be
    out_dir: str = "out/rm"  # where checkpoints and the log go
    resume: bool = False  # go on from the newest valid checkpoint in out_dir
    score: str = ""  # do not train: print the scores of the chats or pairs in these files
    max_len: int | None = None  # longer pairs are dropped; None: as many tokens as the model reads
    center_coef: float = 0.01  # c in the formula
    label_smoothing: float = 0.0  # share of labels taken to be wrong
    epochs: float = 1.0  # how often every pair is seen; more overfits
    max_steps: int | None = None  # optimizer steps; None: as epochs say
    batch_pairs: int = 64  # pairs, or rankings, an optimizer step learns from
    batch_size: int = 8  # of them a process puts through the model at once
    curriculum: float = 0.0  # share of the steps in which the longer pairs are let in, bit by bit
    optimizer: Literal["adamw", "muon"] = "adamw"  # muon: for the blocks' matrices, else AdamW
    learning_rate: float = 1e-5  # of AdamW
    muon_lr: float = 0.02  # of Muon: length of a step, relative to an orthogonal matrix
    schedule: Literal["cosine", "wsd"] = "cosine"  # wsd: warm-up, stable, decay
    warmup_steps: int = 5  # steps of linear warm-up
    final_lr: float = 0.1  # learning rate at the end, as a share
    decay_fraction: float = 0.2  # wsd: share of the steps that decays
    weight_decay: float = 0.0  # of matrices
    adam_beta1: float = 0.9  # AdamW: memory of the mean gradient
    adam_beta2: float = 0.95  # AdamW: memory of its square
    grad_clip: float = 1.0  # largest norm of the gradient
    eval_every: int = 100  # steps between validations
    eval_pairs: int = 500  # pairs in a validation; the last takes all
    norm_samples: int = 256  # replies of the SFT model that say how scores are spread
    answer_tokens: int = 64  # most tokens of such a reply
    save_every: int = 100  # steps between checkpoints
    log_every: int = 10  # steps between log lines
    seed: int = 0  # of the head and the order of the data
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"  # where to compute
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # activations; auto: bfloat16 on cuda
    shard: bool = False  # each process keeps a part of every matrix (FSDP2), else all of them (DDP)
    recompute: bool = False  # keep a block's input only and run it again: less memory, more work
    dist_timeout: float = 120.0  # seconds without word from another process that end the run


def rm_loss(chosen: Tensor, rejected: Tensor, margin: Tensor, center_coef: float,
            label_smoothing: float = 0.0) -> Tensor:
    """The loss of each pair, (B,), from the scores of its replies and its margin, (B,) each."""
    gap = chosen - rejected - margin
    right, wrong = -F.logsigmoid(gap), -F.logsigmoid(-gap)
    loss = (1 - label_smoothing) * right + label_smoothing * wrong
    return loss + center_coef * (chosen + rejected) ** 2


def score_rows(model: nn.Module, rows: list[Row], dist: Dist) -> Tensor:
    """(len(rows),) scores, on the device."""
    idx, _, lengths = pad_right(rows, 0)
    with dist.autocast():
        return model(idx.to(dist.device), lengths.to(dist.device))


def easy_first(chosen: list[int], shortest_first: np.ndarray, progress: float) -> list[int]:
    """Instead of the examples drawn from all, ones drawn alike from the shorter part of them: a
    tenth at first, all when `progress` has come to 1. What has to be found in a short prompt is
    learnt sooner, and finding it in a long one from there (Bengio et al. 2009)."""
    share = max(0.1, progress)
    return chosen if share >= 1 else [int(shortest_first[int(i * share)]) for i in chosen]


@torch.no_grad()
def score_examples(model: RewardModel, rows: Rows, chosen: list[int], cfg: Config,
                   dist: Dist) -> list[np.ndarray]:
    """The scores of the replies of each example, each process its share of the work."""
    sizes = [int(rows.firsts[i + 1] - rows.firsts[i]) for i in chosen]
    scores = np.split(np.zeros(sum(sizes)), np.cumsum(sizes)[:-1])
    by_length = sorted(range(len(chosen)), key=lambda i: rows.longest(chosen[i]))
    for i, batch in enumerate(in_batches(by_length, 2 * cfg.batch_size)):
        if i % dist.world == dist.rank:
            groups = [rows.example(chosen[j]) for j in batch]
            flat = score_rows(model, [row for group in groups for row in group], dist).cpu().numpy()
            for j, part in zip(batch, np.split(flat, np.cumsum([len(g) for g in groups])[:-1])):
                scores[j][:] = part
    summed = np.array(all_sum(dist, *np.concatenate(scores)))
    return np.split(summed, np.cumsum(sizes)[:-1])


def judge(scores: np.ndarray, lengths: np.ndarray, margins: np.ndarray) -> dict[str, float]:
    """What is asked of a reward model, from scores, reply lengths (n, 2) and margins (n,). A tie
    counts one half, as a coin would. Half of the pairs are turned around for the calibration:
    with the chosen reply always first, "always sure of the first" would be perfect."""
    gap = scores[:, 0] - scores[:, 1]
    credit = np.where(gap == 0, 0.5, gap > 0)
    shorter = lengths[:, 0] < lengths[:, 1]
    turned = np.arange(len(gap)) % 2 == 1
    p = 1 / (1 + np.exp(-np.where(turned, -gap, gap)))
    label = ~turned
    bins = np.minimum((10 * p).astype(int), 9)
    ece = sum(abs(p[bins == b].mean() - label[bins == b].mean()) * (bins == b).mean()
              for b in range(10) if (bins == b).any())
    by_length = np.where(lengths[:, 0] == lengths[:, 1], 0.5, ~shorter)
    varied = scores.std() > 0 and lengths.std() > 0
    return {"loss": float(np.logaddexp(0, margins - gap).mean()), "accuracy": float(credit.mean()),
            "accuracy_without_ties": float((gap > 0).mean()),
            "longer_is_better": float(by_length.mean()),
            "accuracy_chosen_shorter": float(credit[shorter].mean()) if shorter.any() else 0.5,
            "log_loss": float(np.logaddexp(0, -gap).mean()), "ece": float(ece),
            "brier": float(((p - label) ** 2).mean()),
            "length_correlation": float(np.corrcoef(scores.ravel(), lengths.ravel())[0, 1])
            if varied else 0.0,
            "gap": float(gap.mean()), "mean": float(scores.mean()), "std": float(scores.std())}


def evaluate(model: RewardModel, rows: Rows, cfg: Config, dist: Dist,
             everything: bool) -> dict[str, dict[str, float]]:
    """`judge` of the pairs of all held-out examples and of each language."""
    chosen = evenly_spaced(range(len(rows)), None if everything else cfg.eval_pairs)
    found = []
    for i, scores in zip(chosen, score_examples(model, rows, chosen, cfg, dist)):
        lengths = [sum(row.mask) for row in rows.example(i)]
        for a, b in combinations(range(len(scores)), 2):
            found.append((scores[[a, b]], (lengths[a], lengths[b]), rows.margin(i), rows.lang(i)))
    scores, lengths, margins, langs = map(np.array, zip(*found))
    parts = {"all": langs != ""} | {lang: langs == lang for lang in sorted(set(langs.tolist()))}
    return {name: judge(scores[part], lengths[part], margins[part]) for name, part in parts.items()}


def report(found: dict[str, dict[str, float]], step: int) -> None:
    for name, r in found.items():
        print0(f"val at step {step:,} | {name} accuracy {r['accuracy']:.1%} (longer is better: "
               f"{r['longer_is_better']:.1%}), log-loss {r['log_loss']:.4f}, ECE {r['ece']:.3f}, "
               f"gap {r['gap']:.2f}, corr(score, length) {r['length_correlation']:+.2f}")
    r = found["all"]
    if abs(r["length_correlation"]) > 0.3 and r["accuracy_chosen_shorter"] < 0.7:
        print0(f"WARNING: the score follows the length; where the shorter reply was chosen it is "
               f"right {r['accuracy_chosen_shorter']:.1%} of the time")


def note_spread(model: RewardModel, rows: Rows, cfg: Config, dist: Dist) -> None:
    """Keep mean and standard deviation of the scores of what the SFT model itself replies."""
    policy, tok = load_model(cfg.init_from, torch.device("cpu"), torch.float32)
    sharding.wrap(policy.requires_grad_(False), dist, cfg.shard)
    chosen = with_room(rows, evenly_spaced(range(len(rows)), cfg.norm_samples),
                       policy.config.max_seq_len - cfg.answer_tokens)
    prompts = [prompt_of(rows.example(i)[0]) for i in chosen]
    scores: list[float] = []
    for at in range(0, len(prompts), 32):
        part = prompts[at:at + 32]
        with sharding.unsharded(policy, dist):
            said = replies(policy, part, cfg.answer_tokens, stop=(tok.im_end,),
                           seed=hash64(cfg.seed, at))
        rows_said = [Row(p + r, [0] * len(p) + [1] * len(r)) for p, r in zip(part, said)]
        with torch.no_grad():
            scores += score_rows(model, rows_said, dist).tolist()
    if len(scores) > 1:
        model.mean.fill_(float(np.mean(scores)))
        model.std.fill_(max(float(np.std(scores)), 1e-6))
    print0(f"scores of {len(scores)} replies of {policy.path}: mean {float(model.mean):.3f}, "
           f"standard deviation {float(model.std):.3f}")


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


def print_scores(cfg: Config, dist: Dist) -> None:
    """One JSON line for each chat or pair of the files."""
    model, tok = load_reward_model(cfg.init_from, dist)
    length = cfg.max_len or model.backbone.config.max_seq_len

    def read(row: dict) -> tuple[str, list]:
        kind = "pair" if "rejected" in row or "ranking" in row else "chat"
        _, groups, lost = rows_of(row, kind, tok, length)
        return kind, [] if any(lost.values()) else groups  # no score of a part

    for batch in read_batches(find_files(cfg.score)):
        for item in parse_records(batch, read):
            if isinstance(item, BadLine):
                raise ValueError(f"{item.where}: {item.what}: {item.detail}")
            kind, groups = item
            if not groups:
                print(json.dumps({"score": None, "why": "too long, or nothing to score"}))
            for _, _, rows in groups:
                if kind == "chat":  # the newline behind the last <|im_end|> is not scored
                    end = reply_end(rows[0].mask)
                    rows = [Row(rows[0].ids[:end], rows[0].mask[:end])]
                with torch.no_grad():
                    scores = score_rows(model, rows, dist).tolist()
                normed = [round(float((x - model.mean) / model.std), 4) for x in scores]
                print(json.dumps({"score": round(scores[0], 4), "normalised": normed[0]}
                                 if kind == "chat" else
                                 {"chosen": round(scores[0], 4), "rejected": round(scores[1], 4),
                                  "normalised": normed, "right": scores[0] > scores[1]}))


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
    """Raises ValueError for settings that cannot be met."""
    # same in every train_*.py: batch of pairs
    if cfg.batch_pairs % (cfg.batch_size * world) or cfg.batch_pairs < 1:
        raise ValueError(f"batch_pairs {cfg.batch_pairs} must be a multiple of batch_size x "
                         f"processes = {cfg.batch_size} x {world}")
    # end same
    for name in ("eval_every", "eval_pairs", "norm_samples", "answer_tokens", "save_every",
                 "log_every"):
        if getattr(cfg, name) < 1:
            raise ValueError(f"{name} must be at least 1, got {getattr(cfg, name)}")
    if not 0 <= cfg.curriculum <= 1:
        raise ValueError(f"curriculum {cfg.curriculum} must lie between 0 and 1")
    if not 0 <= cfg.label_smoothing < 0.5 or not 0 <= cfg.val_fraction < 1 or cfg.center_coef < 0:
        raise ValueError("label_smoothing must lie between 0 and 0.5, val_fraction between 0 and "
                         "1, and center_coef must not be negative")
    if min(cfg.learning_rate, cfg.grad_clip, cfg.epochs) <= 0:
        raise ValueError("learning_rate, grad_clip and epochs must be positive")


def weights(model: RewardModel, tensors: dict[str, Tensor]) -> dict:
    return {"model": tensors}


def train(cfg: Config, dist: Dist) -> None:
    check(cfg, dist.world)
    backbone, tok = load_model(cfg.init_from, torch.device("cpu"), torch.float32)
    config = backbone.config
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
    if not with_room(val, evenly_spaced(range(len(val)), cfg.norm_samples),
                     config.max_seq_len - cfg.answer_tokens):
        raise ValueError(f"{val.name}: no prompt leaves room for --answer_tokens={cfg.answer_tokens}, "
                         "so that the scores of replies cannot be normalised")
    if backbone.kind == "pt":
        print0(f"WARNING: {backbone.path} has not learnt to answer: start from an SFT model")
    torch.manual_seed(cfg.seed)
    model = RewardModel(backbone)
    print0(runtime.describe_run(dist))
    shards, width = dist.world if cfg.shard else 1, dist.dtype.itemsize
    replies_each = [int(np.diff(rows.firsts).max()) for rows in (pairs, val)]
    longest = [int(rows.lengths().max()) for rows in (pairs, val)]
    parts = training_memory(
        config, cfg.batch_size * replies_each[0], longest[0],
        cfg.batch_pairs // cfg.batch_size // dist.world, width, head=False,
        shards=shards, recompute=cfg.recompute, muon=cfg.optimizer == "muon")
    judged, written = min(2 * cfg.batch_size, len(val)), min(32, cfg.norm_samples, len(val))
    print0(runtime.memory_line(fullest(
        parts, evaluation=judging_memory(config, judged * replies_each[1], longest[1], width,
                                         shards),
        writing=parts["parameters"] + writing_memory(  # by the SFT model, for the mean score
            config, written, longest[1], cfg.answer_tokens, width, shards)), dist))
    tokens = int(pairs.lengths().sum())
    print0(f"{count_parameters(config):,} parameters; {len(pairs):,} pairs of {tokens:,} tokens, "
           f"{len(val):,} held out; {max_steps:,} steps, "
           f"{max_steps * cfg.batch_pairs / len(pairs):.2f} epochs")
    easy_until = cfg.curriculum * max_steps
    shortest_first = pairs.shortest_first()
    net = sharding.wrap(model, dist, cfg.shard, cfg.recompute)
    optimizers = make_optimizers(model, cfg)
    data_id = pairs.data_id
    first, state = checkpoint.restore(cfg, KIND, optimizers, tok.text, asdict(config), data_id)
    if state:
        sharding.load(model, optimizers, state)
    log = runtime.Log(cfg.out_dir, dist, first, max_steps, 0,
                      flops_per_token(config, length, head=False))
    guard, signals, stopping = runtime.GradientGuard(), runtime.StopSignals(), False

    for step in range(first, max_steps + 1):
        last = step == max_steps
        if last or step == 0 or (step % cfg.eval_every == 0 and step > first):
            with sharding.unsharded(model, dist):
                found = evaluate(model, val, cfg, dist, last)
            report(found, step)
            log.write(step=step, val=found)
        if last:
            note_spread(model, val, cfg, dist)

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
        if step < easy_until:
            chosen = easy_first(chosen, shortest_first, step / easy_until)
        micro = micro_batches(pairs, chosen, cfg.batch_size, dist.rank, dist.world)
        loss, right, seen = torch.zeros((), device=dist.device), 0.0, 0
        for micro_step, some in enumerate(micro):
            idx, lengths, (better, worse), margin, share = (t.to(dist.device) for t in
                                                            ranking_batch(pairs, some))
            sharding.exchange_gradients(net, micro_step == len(micro) - 1)  # once
            with dist.autocast():
                scores = net(idx, lengths)
            a, b = scores[better], scores[worse]
            losses = rm_loss(a, b, margin, cfg.center_coef, cfg.label_smoothing)
            part = (share * losses).sum() / cfg.batch_pairs
            (part * dist.world).backward()  # DDP takes the mean over processes, the loss is a sum
            loss += part.detach()
            right += float((share * ((a > b) + 0.5 * (a == b))).sum())
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
        right, seen = all_sum(dist, right, seen)
        accuracy = right / cfg.batch_pairs
        log.write(step=step, loss=total, lr=lr * cfg.learning_rate, norm=norm, tokens=seen,
                  accuracy=accuracy)
        if (step + 1) % cfg.log_every == 0:
            log.line(step + 1, total, lr * cfg.learning_rate, norm, accuracy=accuracy)

    if stopping:
        print0(f"stopped by {signals.name or 'a signal to another process'} at step {step:,}; "
               f"go on with: {runtime.resume_command()}")
    print0(runtime.peak_line(dist))


@record
def main() -> None:
    cfg = configure(Config)
    with runtime.errors_in_one_line(cfg.out_dir):
        dist = runtime.setup(cfg.device, cfg.dtype, cfg.dist_timeout)
        (print_scores if cfg.score else train)(cfg, dist)
        runtime.finish(dist)


if __name__ == "__main__":
    main()

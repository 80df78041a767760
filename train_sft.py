"""
Supervised fine-tuning: a pre-trained model learns to answer.

    python train_sft.py config/sft_micro.py --init_from=out/pt --data=chats.jsonl --out_dir=out/sft
    torchrun --nproc_per_node=8 train_sft.py config/sft_1b.py

    L_SFT = - sum over supervised tokens t of log P(token t | all tokens before it) / N

Supervised are the replies of the assistant and the <|im_end|> that closes each; N is their number
in the optimizer step, over all micro-steps and processes: a mean of means would give a token in a
short reply more weight. Chats are packed whole into windows, isolated from each other, each with
positions from 0; tests show that the loss is that of the chats one by one.

With --lora_rank=16 only a product of two thin matrices is learnt for each matrix of the blocks
(Hu et al. 2021), and merged into it when saved; and the norms, which are small, and embedding and
head, for text has taught them nothing about the tokens of a chat. 1B parameters then need 6 GB, not
16, and activations. What a line of --data looks like: examples.py.
"""
# same in every train_*.py: early signals
from plumbing import interrupts

if __name__ == "__main__":  # a stop during the imports below must end them without a traceback
    interrupts.end_quietly()
# end same

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.elastic.multiprocessing.errors import record

from plumbing import checkpoint
from plumbing import runtime
from plumbing import sharding
from configurator import configure
from plumbing.costs import (count_parameters, flops_per_token, fullest, judging_memory, training_memory,
                   writing_memory)
from data import IGNORE, Packed, open_data, passages
from plumbing.examples import Rows, in_batches, load_splits, pad_right, prompt_of, evenly_spaced
from generate import load_model, replies
from model import Linear, Transformer
from plumbing.runtime import Dist, all_sum, print0
from tokenizer import Tokenizer

KIND = "sft"  # of checkpoint


@dataclass(frozen=True)
class Config:
    init_from: str = "out/pt"  # checkpoint to start from: a file, or the newest in a folder
    data: str = "out/toyworld/chat.jsonl"  # chats to learn: JSONL files or folders, comma-separated
    val_data: str = ""  # chats to judge by; empty: a part of data
    val_fraction: float = 0.02  # share of data to judge by, if there is no val_data
    on_bad_line: Literal["stop", "skip"] = "stop"  # at a line that is not as it should be
    pt_data: str = ""  # folder of prepared text: its loss tells how much is forgotten
    out_dir: str = "out/sft"  # where checkpoints and the log go
    resume: bool = False  # go on from the newest valid checkpoint in out_dir
    max_len: int | None = None  # tokens in a window; None: as many as the model reads
    pack: bool = True  # several chats in a window; else one, and the rest is padding
    epochs: float = 2.0  # how often every chat is seen
    max_steps: int | None = None  # optimizer steps; None: as epochs say
    batch_tokens: int = 65_536  # tokens an optimizer step reads, padding included
    batch_size: int = 8  # windows a process puts through the model at once
    optimizer: Literal["adamw", "muon"] = "adamw"  # muon: for the blocks' matrices, else AdamW
    learning_rate: float = 2e-5  # of AdamW
    muon_lr: float = 0.02  # of Muon: length of a step, relative to an orthogonal matrix
    schedule: Literal["cosine", "wsd"] = "cosine"  # wsd: warm-up, stable, decay
    warmup_steps: int = 20  # steps of linear warm-up
    final_lr: float = 0.1  # learning rate at the end, as a share
    decay_fraction: float = 0.2  # wsd: share of the steps that decays
    weight_decay: float = 0.0  # of matrices
    adam_beta1: float = 0.9  # AdamW: memory of the mean gradient
    adam_beta2: float = 0.95  # AdamW: memory of its square
    grad_clip: float = 1.0  # largest norm of the gradient
    lora_rank: int = 0  # learn so thin a change of each matrix of the blocks; 0: all weights
    lora_alpha: float = 32.0  # the change is scaled by alpha / rank
    eval_every: int = 200  # steps between validations
    eval_rows: int = 500  # chats per language whose loss is taken; the last takes all
    eval_answers: int = 32  # chats per language that are answered, greedily
    answer_tokens: int = 64  # most tokens of an answer
    save_every: int = 200  # steps between checkpoints
    log_every: int = 10  # steps between log lines
    seed: int = 0  # of the order of the data
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"  # where to compute
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # activations; auto: bfloat16 on cuda
    shard: bool = False  # each process keeps a part of every matrix (FSDP2), else all of them (DDP)
    recompute: bool = False  # keep a block's input only and run it again: less memory, more work
    dist_timeout: float = 120.0  # seconds without word from another process that end the run


def sft_loss(hidden: Tensor, head: Tensor, targets: Tensor) -> Tensor:
    """-sum log P(target) over all targets but IGNORE, a scalar. hidden (B, T, C), head (V, C),
    targets (B, T); the (B, T, V) logits exist only a chunk at a time."""
    return F.linear_cross_entropy(hidden.flatten(0, 1), head, targets.flatten(), reduction="sum",
                                  options=runtime.logits_at_once(head))


class LowRank(nn.Module):
    """W x + (alpha / rank) B A x, with W frozen and B zero at first, so that nothing changes."""

    def __init__(self, base: Linear, rank: int, alpha: float):
        super().__init__()
        self.base, self.scale = base.requires_grad_(False), alpha / rank
        n_out, n_in = base.weight.shape
        self.a = nn.Parameter(torch.randn(rank, n_in, device=base.weight.device) / math.sqrt(n_in))
        self.b = nn.Parameter(torch.zeros(n_out, rank, device=base.weight.device))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + F.linear(F.linear(x, self.a), self.b) * self.scale

    def merged(self, base: Tensor, a: Tensor, b: Tensor) -> Tensor:
        """One matrix that does the same. What this module holds may be a part of these."""
        return base + self.scale * (b @ a)


def add_lora(model: Transformer, rank: int, alpha: float) -> None:
    """Put a LowRank around every matrix of the blocks. The rest stays learnt: the norms, which say
    how sharply a head looks, are small; and without the embedding and the head <|im_start|> and its
    like would keep the random vectors that they begin with."""
    for parent in list(model.layers.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, Linear):
                setattr(parent, name, LowRank(child, rank, alpha))


def weights(model: Transformer, tensors: dict[str, Tensor]) -> dict:
    """What a checkpoint keeps of the model's `tensors`: the weights under their ordinary names,
    every LowRank merged into its matrix; and what is learnt by LoRA, with the file it was added to,
    to go on from."""
    thin = {name: m for name, m in model.named_modules() if isinstance(m, LowRank)}
    if not thin:
        return {"model": tensors}
    lora = {name: tensors[name] for name, p in model.named_parameters() if p.requires_grad}
    merged = {k: v for k, v in tensors.items() if not k.endswith((".a", ".b", ".base.weight"))}
    merged |= {f"{name}.weight": m.merged(*(tensors[f"{name}.{part}"]
                                            for part in ("base.weight", "a", "b")))
               for name, m in thin.items()}
    return {"model": merged, "lora": lora, "base": Path(model.path).name}


@torch.no_grad()
def evaluate(model: Transformer, rows: Rows, cfg: Config, dist: Dist,
             everything: bool) -> dict[str, float]:
    """Nats per supervised token of each language."""
    scores = {}
    for lang, chosen in by_language(rows, None if everything else cfg.eval_rows).items():
        nats = n = 0.0
        for i, batch in enumerate(in_batches(chosen, 4 * cfg.batch_size)):
            if i % dist.world != dist.rank:
                continue
            idx, targets, _ = pad_right([rows.example(j)[0] for j in batch], 0)
            with dist.autocast():
                hidden = model(idx.to(dist.device), hidden=True)
                nats += float(sft_loss(hidden, model.lm_head.weight, targets.to(dist.device)))
            n += int((targets != IGNORE).sum())
        nats, n = all_sum(dist, nats, n)
        scores[lang] = nats / max(n, 1)
    return scores


@torch.no_grad()
def forgetting(model: Transformer, cfg: Config, tok: Tokenizer, dist: Dist) -> dict[str, float]:
    """Nats per token of each language of ordinary text, on up to 100,000 tokens each."""
    text_tok, splits = open_data(cfg.pt_data)
    if text_tok.sha256 != tok.sha256:
        raise ValueError(f"{cfg.pt_data}: prepared with another tokenizer than {tok.name}'s")
    scores = {}
    for file in splits["val"]:
        nats = n = 0.0
        for x, y in passages(file, model.config.max_seq_len, cfg.batch_size, 100_000):
            with dist.autocast():
                hidden = model(x.to(dist.device), hidden=True)
                nats += float(sft_loss(hidden, model.lm_head.weight, y.to(dist.device)))
            n += int((y != IGNORE).sum())
        scores[file.lang] = nats / n
    return scores


def by_language(rows: Rows, most: int | None) -> dict[str, list[int]]:
    """Evenly spread examples of each language, at most `most`; the shortest first."""
    found: dict[str, list[int]] = {}
    for i in range(len(rows)):
        found.setdefault(rows.lang(i), []).append(i)
    return {lang: sorted(evenly_spaced(all_, most), key=rows.longest)
            for lang, all_ in sorted(found.items())}


def answer_held_out(model: Transformer, tok: Tokenizer, rows: Rows, cfg: Config) -> dict[str, str]:
    """Answer some held-out chats greedily: the share that is word for word the reference, and that
    ends by itself, of each language. Prints one answer each."""
    report = {}
    for lang, chosen in by_language(rows, cfg.eval_answers).items():
        prompts, golds, answers = [], [], []
        for i in chosen:
            row = rows.example(i)[0]
            prompt = prompt_of(row)
            if len(prompt) + cfg.answer_tokens <= model.config.max_seq_len:
                prompts.append(prompt)
                learnt = zip(row.ids[len(prompt):], row.mask[len(prompt):])
                golds.append([token for token, learn in learnt if learn])
        for at in range(0, len(prompts), 32):
            answers += replies(model, prompts[at:at + 32], cfg.answer_tokens, stop=(tok.im_end,),
                               temperature=0)
        if answers:
            exact = sum(a == g for a, g in zip(answers, golds)) / len(golds)
            stops = sum(a[-1] == tok.im_end for a in answers) / len(golds)
            report[lang] = f"exact {exact:.1%}, stops {stops:.1%} of {len(golds)}"
            if stops < 0.95:
                report[lang] += " WARNING: many answers do not end within --answer_tokens"
            asked, said = (tok.decode(x).replace("\n", "⏎") for x in (prompts[0], answers[0]))
            print0(f"sample {lang} | {asked}»{said}")
    return report


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


def check(cfg: Config, length: int, world: int) -> int:
    """Micro-steps per optimizer step. Raises ValueError for settings that cannot be met."""
    unit = cfg.batch_size * world * length
    if cfg.batch_tokens % unit or cfg.batch_tokens < unit:
        raise ValueError(f"batch_tokens {cfg.batch_tokens} must be a multiple of batch_size x "
                         f"processes x max_len = {cfg.batch_size} x {world} x {length} = {unit}; "
                         f"try {max(1, round(cfg.batch_tokens / unit)) * unit}")
    for name in ("eval_every", "eval_rows", "eval_answers", "answer_tokens", "save_every",
                 "log_every"):
        if getattr(cfg, name) < 1:
            raise ValueError(f"{name} must be at least 1, got {getattr(cfg, name)}")
    if cfg.lora_rank < 0 or not 0 <= cfg.val_fraction < 1:
        raise ValueError("lora_rank must be at least 0 and val_fraction between 0 and 1")
    if min(cfg.learning_rate, cfg.grad_clip, cfg.epochs) <= 0:
        raise ValueError("learning_rate, grad_clip and epochs must be positive")
    return cfg.batch_tokens // unit


def train(cfg: Config, dist: Dist) -> None:
    model, tok = load_model(cfg.init_from, torch.device("cpu"), torch.float32)
    config = model.config
    length = cfg.max_len or config.max_seq_len
    if not 2 <= length <= config.max_seq_len:
        raise ValueError(f"max_len {length} must lie between 2 and the {config.max_seq_len} tokens "
                         "that the model reads")
    accumulate = check(cfg, length, dist.world)
    with runtime.first_rank_first(dist):
        chats, val = load_splits(cfg, "chat", tok, length)
    packed = Packed(chats, length, cfg.seed, cfg.pack)
    per_step = cfg.batch_tokens // length
    max_steps = cfg.max_steps or math.ceil(cfg.epochs * len(packed.bins) / per_step)
    if not 0 <= cfg.warmup_steps < max_steps:
        raise ValueError(f"warmup_steps {cfg.warmup_steps} must be less than the {max_steps} steps")
    if cfg.lora_rank:
        torch.manual_seed(cfg.seed)
        add_lora(model, cfg.lora_rank, cfg.lora_alpha)
    print0(runtime.describe_run(dist))
    shards, width = dist.world if cfg.shard else 1, dist.dtype.itemsize
    frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    parts = training_memory(
        config, cfg.batch_size, length, accumulate, width, masked=True,
        learnt=sum(p.numel() for p in model.parameters() if p.requires_grad),
        shards=shards, recompute=cfg.recompute, muon=cfg.optimizer == "muon")
    longest = int(val.lengths().max(initial=0))
    judged, written = min(4 * cfg.batch_size, len(val)), min(32, cfg.eval_answers, len(val))
    more = {"evaluation": judging_memory(config, judged, longest, width, shards),
            "writing": writing_memory(config, written, longest, cfg.answer_tokens, width, shards)}
    if cfg.lora_rank:
        more["merging"] = parts["parameters"]  # into a copy, to be saved
    print0(runtime.memory_line(fullest(parts, **more), dist))
    tokens = int(chats.lengths().sum())
    learnt = int((chats.words >> 31).sum())
    print0(f"{count_parameters(config):,} parameters; {len(chats):,} chats of {tokens:,} "
           f"tokens, {learnt / tokens:.0%} supervised, in {len(packed.bins):,} windows of {length}"
           f", {tokens / len(packed.bins) / length:.0%} full; {max_steps:,} steps, "
           f"{max_steps * per_step / len(packed.bins):.2f} epochs")
    net = sharding.wrap(model, dist, cfg.shard, cfg.recompute)
    optimizers = make_optimizers(model, cfg)
    data_id = chats.data_id
    first, state = checkpoint.restore(cfg, KIND, optimizers, tok.text, asdict(config), data_id)
    if state and state["config"]["lora_rank"] != cfg.lora_rank:
        raise ValueError(f"{cfg.out_dir}: was trained with --lora_rank="
                         f"{state['config']['lora_rank']}, asked for {cfg.lora_rank}")
    if state and cfg.lora_rank:
        if state["base"] != Path(model.path).name:
            raise ValueError(f"{cfg.out_dir}: was adapted from {state['base']}, not {model.path}")
        sharding.load(model, optimizers, state, part="lora")
    elif state:
        sharding.load(model, optimizers, state)
    log = runtime.Log(cfg.out_dir, dist, first, max_steps, cfg.batch_tokens,
                      flops_per_token(config, length, frozen=frozen))
    guard, signals, stopping = runtime.GradientGuard(), runtime.StopSignals(), False

    for step in range(first, max_steps + 1):
        last = step == max_steps
        if last or step == 0 or (step % cfg.eval_every == 0 and step > first):
            with sharding.unsharded(model, dist):
                scores = evaluate(model, val, cfg, dist, last)
                text_loss = forgetting(model, cfg, tok, dist) if cfg.pt_data else {}
                answers = answer_held_out(model, tok, val, cfg) if dist.rank == 0 else {}
            line = " | ".join(f"{lang} {nats:.4f} nats/token" for lang, nats in scores.items())
            print0(f"val at step {step:,} | {line}")
            if text_loss:
                print0(f"text at step {step:,} | " + " | ".join(
                    f"{lang} {nats:.4f} nats/token" for lang, nats in text_loss.items()))
            for lang, result in answers.items():
                print0(f"answers at step {step:,} | {lang} {result}")
            log.write(step=step, val=scores, text=text_loss, answers=answers)

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
        loss = torch.zeros((), device=dist.device)
        starts = [step * per_step + (micro_step * dist.world + dist.rank) * cfg.batch_size
                  for micro_step in range(accumulate)]
        micro = [packed.batch(start, cfg.batch_size) for start in starts]
        # the denominator is that of the whole step, so it is needed before the first backward
        n, = all_sum(dist, sum(int((targets != IGNORE).sum()) for _, targets, _ in micro))
        for micro_step, batch in enumerate(micro):
            idx, targets, segments = (t.to(dist.device) for t in batch)
            sharding.exchange_gradients(net, micro_step == accumulate - 1)  # once
            with dist.autocast():
                hidden = net(idx, hidden=True, segments=segments)
                part = sft_loss(hidden, model.lm_head.weight, targets) / max(n, 1)
            (part * dist.world).backward()  # DDP takes the mean over processes, the loss is a sum
            loss += part.detach()
        samples = f"windows {step * per_step:,} to {(step + 1) * per_step - 1:,}"

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
        log.write(step=step, loss=total, lr=lr * cfg.learning_rate, norm=norm, supervised=n)
        if (step + 1) % cfg.log_every == 0:
            log.line(step + 1, total, lr * cfg.learning_rate, norm)

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

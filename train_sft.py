"""
Supervised fine-tuning: a pre-trained model learns to answer.

    L_SFT = - 1/N sum over all N supervised tokens of  log P(token | those before it in its chat)

    python train_sft.py config/sft_micro.py                                a laptop
    torchrun --nproc_per_node=8 train_sft.py config/sft_1b.py              8 GPUs
    python train_sft.py config/sft_1b.py --lora_rank=16                    little memory

Supervised tokens are those of the assistant's replies and the <|im_end|> after each, from which
the model learns to stop. N counts them over all micro-steps and processes of an optimizer step, so
that every token weighs the same. Whole chats are packed into a window but do not see each other, so
the loss is as if each stood alone. What a line of --data may hold: plumbing/chats.py.

With --lora_rank=r this and every later stage leaves the model as it is and trains a small update of
each matrix W (n_out, n_in) of the blocks (LoRA, Hu et al. 2021):

    y = W x + (alpha / r) B A x          A (r, n_in), B (n_out, r);  alpha = 32, B starts at zero

Only A and B have gradients and optimizer moments, and W stays in bf16 if it was stored so: a model
of 1B parameters then needs 2 GB besides its activations, not 16. A checkpoint holds the update and
names its base; opening it loads both. --lora_extra also trains norms, embedding and head, without
which new special tokens learn nothing; --lora_merge writes base and update as one model at the end.
"""
from plumbing.terminal import end_quietly, run
end_quietly(__name__)  # Ctrl-C during the imports below, which take seconds

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from configurator import Count, FilePath, Natural, Positive, Share, configure
from data import IGNORE, Packed, open_data, passages
from generate import replies
from model import Transformer, token_logps
from plumbing import runtime, sharding
from plumbing.costs import (count_frozen, count_parameters, flops_per_token, memory_line,
                            peak_line)
from plumbing.evaluation import Scores, by_language, print_samples, score_line, score_text
from plumbing.examples import LEARN, Row, Rows, in_batches, pad_right, prompts_with_room, reply_end
from plumbing.loading import load_to_train
from plumbing.log import Log, describe_run
from plumbing.optim import make_optimizers, set_learning_rate
from plumbing.runtime import Dist, all_sum, print0
from plumbing.splits import RowSettings, load_splits
from tokenizer import Tokenizer

KIND = "sft"  # the name of this stage in its checkpoints


@dataclass(frozen=True)
class Config(RowSettings):
    init_from: FilePath = "out/pt"  # checkpoint to start from: a file, or a folder's newest
    data: str = "out/toyworld/chat.jsonl"  # chats to learn: JSONL files or folders, comma-separated
    val_fraction: Share = 0.02  # share of data to judge by, if there is no val_data
    pt_data: FilePath = ""  # folder written by data.py: its loss tells how much is forgotten
    out_dir: FilePath = "out/sft"  # checkpoints and log.jsonl go here
    max_len: Count | None = None  # tokens in a window; None: as many as the model reads
    epochs: Positive = 2.0  # how often every chat is seen
    max_steps: Count | None = None  # optimizer steps; None: as many as `epochs` takes
    batch_tokens: Count = 65_536  # tokens an optimizer step reads, padding included
    learning_rate: Positive = 2e-5  # of AdamW
    warmup_steps: Natural = 20  # steps of linear warm-up
    eval_every: Count = 200  # steps between validations
    eval_rows: Count = 500  # chats per language in a validation; the last one reads all
    eval_answers: Count = 32  # chats per language that are answered, greedily
    answer_tokens: Count = 64  # most tokens of an answer
    save_every: Count = 200  # steps between checkpoints


def sft_loss(hidden: Tensor, head: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
    """N times L_SFT: the sum of -log P(token) over supervised tokens, a scalar. The loop divides it
    by N, which it counts in the whole step. hidden (B, T, C) are the model's last states after
    reading `tokens` (B, T), head (V, C) its output matrix, mask (B, T) is True on these."""
    targets = torch.where(mask, tokens, IGNORE)
    targets = F.pad(targets[:, 1:], (0, 1), value=IGNORE)  # the state at t predicts token t + 1
    return -token_logps(hidden, head, targets, reduction="sum")


def evaluate(model: Transformer, tok: Tokenizer, rows: Rows, cfg: Config, dist: Dist,
             most: int | None) -> Scores:
    """Nats per supervised token and bits per byte of reply, of at most `most` chats a language."""
    def batches(numbers: list[int]) -> Iterator[tuple[Tensor, Tensor]]:
        for some in in_batches(numbers, 4 * cfg.batch_size):
            yield pad_right([rows.example(i)[0] for i in some], 0)[:2]
    texts = {lang: batches(numbers) for lang, numbers in by_language(rows, most).items()}
    return score_text(model, tok, texts.items(), dist)


def forgetting(model: Transformer, tok: Tokenizer, cfg: Config, dist: Dist) -> Scores:
    """Loss on ordinary text, of 100,000 tokens a language: does the model forget what it knew?"""
    text_tok, splits = open_data(cfg.pt_data)
    if text_tok.sha256 != tok.sha256:
        raise ValueError(f"{cfg.pt_data}: prepared with another tokenizer than {tok.name}'s")
    batches = {file.lang: passages(file, model.config.max_seq_len, cfg.batch_size, 100_000)
               for file in splits["val"]}
    return score_text(model, tok, batches.items(), dist, apart=True)


def answer_held_out(model: Transformer, tok: Tokenizer, rows: Rows, asked: dict[int, list[int]],
                    cfg: Config) -> dict[str, str]:
    """Answer held-out chats greedily; `asked` has the number of each and the ids of its prompt. Per
    language: how many equal the reference, how many stop by themselves, and one printed."""
    report = {}
    for lang in sorted({rows.lang(i) for i in asked}):
        chosen = [i for i in asked if rows.lang(i) == lang]
        answers = [answer for some in in_batches(chosen, 32) for answer in replies(
            model, [asked[i] for i in some], cfg.answer_tokens, stop=(tok.im_end,), temperature=0)]
        chats = [rows.example(i)[0] for i in chosen]
        wanted = [row.ids[len(asked[i]):reply_end(row.mask)] for i, row in zip(chosen, chats)]
        exact = sum(a == b for a, b in zip(answers, wanted)) / len(chosen)
        stops = sum(a[-1] == tok.im_end for a in answers) / len(chosen)
        report[lang] = f"exact {exact:.1%}, stops {stops:.1%} of {len(chosen)}"
        if stops < 0.95:
            report[lang] += " WARNING: many answers do not end within --answer_tokens"
        prompt, reply = asked[chosen[0]], answers[0]
        print_samples(tok, [lang], [Row(prompt + reply, [0] * len(prompt) + [1] * len(reply))])
    return report


def count_micro_steps(cfg: Config, length: int, limit: int, world: int) -> int:
    """Micro-steps in an optimizer step. Raises ValueError for settings that do not fit together."""
    if not 2 <= length <= limit:
        raise ValueError(f"max_len {length} must lie between 2 and the {limit} tokens that the "
                         "model reads")
    unit = cfg.batch_size * world * length
    if cfg.batch_tokens % unit:
        raise ValueError(f"batch_tokens {cfg.batch_tokens} must be a multiple of batch_size x "
                         f"processes x max_len = {cfg.batch_size} x {world} x {length} = {unit}; "
                         f"try {max(1, round(cfg.batch_tokens / unit)) * unit}")
    return cfg.batch_tokens // unit


def train(cfg: Config, dist: Dist) -> None:
    model, tok = load_to_train(cfg)
    config = model.config
    length = config.max_seq_len if cfg.max_len is None else cfg.max_len
    accumulate = count_micro_steps(cfg, length, config.max_seq_len, dist.world)
    chats, val = load_splits(cfg, "chat", tok, length, dist)
    packed = Packed(chats, length, cfg.seed)
    n_windows, per_step = len(packed.bins), cfg.batch_tokens // length
    max_steps = cfg.max_steps
    if max_steps is None:
        max_steps = math.ceil(cfg.epochs * n_windows / per_step)
    if cfg.warmup_steps >= max_steps:
        raise ValueError(f"warmup_steps {cfg.warmup_steps} must be less than the {max_steps} steps")
    print0(describe_run(dist))
    some = [i for numbers in by_language(val, cfg.eval_answers).values() for i in numbers]
    asked = prompts_with_room(val, some, config.max_seq_len, cfg.answer_tokens)
    longest = int(val.lengths().max(initial=0))
    print0(memory_line(cfg, dist, model, cfg.batch_size, length, accumulate, masked=True,
                       judged=(min(4 * cfg.batch_size, len(val)), longest),
                       written=(min(32, cfg.eval_answers, len(asked)), longest, cfg.answer_tokens)))
    n_tokens, supervised = int(chats.lengths().sum()), int((chats.words >= LEARN).sum())
    print0(f"{count_parameters(config):,} parameters; {len(chats):,} chats of {n_tokens:,} tokens, "
           f"{supervised / n_tokens:.0%} supervised, in {n_windows:,} windows of {length}, "
           f"{n_tokens / n_windows / length:.0%} full; {max_steps:,} steps, "
           f"{max_steps * per_step / n_windows:.2f} epochs")
    net = sharding.wrap(model, dist, cfg.shard, cfg.recompute)
    optimizers, data_id = make_optimizers(model, cfg), chats.data_id
    first = sharding.resume(cfg, KIND, model, optimizers, tok, data_id)
    log = Log(cfg, dist, first, max_steps, cfg.batch_tokens,
              flops_per_token(config, length, frozen=count_frozen(model)))
    guard, signals, stopping = runtime.GradientGuard(), runtime.StopSignals(), False

    for step in range(first, max_steps + 1):
        last = step == max_steps
        # Evaluate at the start, every few steps, and at the end.
        if last or step == 0 or (step % cfg.eval_every == 0 and step > first):
            with sharding.unsharded(model, dist):
                scores = evaluate(model, tok, val, cfg, dist, None if last else cfg.eval_rows)
                text = forgetting(model, tok, cfg, dist) if cfg.pt_data else {}
                answers = answer_held_out(model, tok, val, asked, cfg) if dist.rank == 0 else {}
            print0(f"val at step {step:,} | {score_line(scores)}")
            if text:
                print0(f"text at step {step:,} | {score_line(text)}")
            for lang, result in answers.items():
                print0(f"answers at step {step:,} | {lang} {result}")
            log.write(step=step, val={lang: nats for lang, (nats, _) in scores.items()},
                      text={lang: nats for lang, (nats, _) in text.items()}, answers=answers)

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
        # Add up the gradients of the step's windows, a portion at a time.
        loss = torch.zeros((), device=dist.device)
        micro_steps = [packed.batch(step * per_step + (i * dist.world + dist.rank) * cfg.batch_size,
                                    cfg.batch_size) for i in range(accumulate)]
        # N is that of the whole step, so it is needed before the first backward pass
        n, = all_sum(dist, sum(int(mask.sum()) for _, mask, _ in micro_steps))
        for micro_step, batch in enumerate(micro_steps):
            tokens, mask, segments = (t.to(dist.device) for t in batch)
            sharding.exchange_gradients(net, micro_step == accumulate - 1)  # only in the last pass
            with dist.autocast():
                hidden = net(tokens, hidden=True, segments=segments)
                part = sft_loss(hidden, model.lm_head.weight, tokens, mask) / max(n, 1)
            (part * dist.world).backward()  # DDP takes the mean over processes, we want the sum
            loss += part.detach()
        samples = f"windows {step * per_step:,} to {(step + 1) * per_step - 1:,}"

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
        log.step(step, total, lr, norm, supervised=n)

    if stopping:
        signals.report(step)
    print0(peak_line(dist))


def main() -> None:
    runtime.launch(train, configure(Config))


if __name__ == "__main__":
    run(main)

"""
Pre-training: learn to predict the next token of text.

    L_PT = - 1/N sum over all N tokens of  log P(token | the tokens before it in its window)

    python train_pt.py config/pt_micro.py                                  a laptop
    torchrun --nproc_per_node=8 train_pt.py config/pt_1b.py                8 GPUs
    python train_pt.py config/pt_micro.py --resume                         continue after a stop
    python train_pt.py --eval_only --init_from=out/pt --data_dir=DIR       score a model on a text

An optimizer step reads `batch_tokens` tokens: each process takes its share of the windows,
`batch_size` at a time, and adds up their gradients (Radford et al. 2019, Touvron et al. 2023).
"""
from plumbing.terminal import end_quietly, run
end_quietly(__name__)  # Ctrl-C during the imports below, which take seconds

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from configurator import Count, FilePath, Natural, NotNegative, Positive, configure
from data import TokenFile, Windows, hash64, open_data, passages, prefetch
from generate import complete
from model import ModelConfig, Transformer, token_logps
from plumbing import checkpoint, runtime, sharding
from plumbing.adapters import open_whole
from plumbing.costs import count_parameters, flops_per_token, memory_line, peak_line
from plumbing.evaluation import Scores, documents, score_line, score_text
from plumbing.loading import load_model, plain
from plumbing.log import Log, describe_run
from plumbing.optim import make_optimizers, set_learning_rate
from plumbing.runtime import Dist, all_sum, print0
from tokenizer import Tokenizer

KIND = "pt"  # the name of this stage in its checkpoints


@dataclass(frozen=True)
class Config(runtime.Settings):
    data_dir: FilePath = "out/toyworld/data"  # folder written by data.py
    out_dir: FilePath = "out/pt"  # checkpoints and log.jsonl go here
    # what every stage has, as optimizer, schedule and seed, stands in plumbing/runtime.Settings
    eval_only: bool = False  # do not train: score the data with --init_from
    split: Literal["val", "train", "all"] = "val"  # part of the data that --eval_only scores
    n_layer: Count = 4  # blocks
    n_head: Count = 4  # query heads
    n_kv_head: Count = 2  # key and value heads, each shared by n_head / n_kv_head query heads
    n_embd: Count = 64  # width; a head has n_embd / n_head of it
    n_hidden: Count | None = None  # width of the SwiGLU; None: 8/3 n_embd, up to a multiple of 32
    max_seq_len: Count = 128  # tokens in a window
    rope_theta: Positive = 10_000.0  # base of the rotary frequencies; larger for longer texts
    tied: bool = True  # the embedding is the output head too
    batch_tokens: Count = 4096  # tokens an optimizer step learns from
    batch_size: Count = 32  # windows that a process puts through the model at once
    mask_documents: bool = False  # a document does not see those before it in its window
    max_steps: Count = 1000  # optimizer steps
    learning_rate: Positive = 1e-2  # of AdamW
    warmup_steps: Natural = 50  # steps of linear warm-up
    weight_decay: NotNegative = 0.1  # of matrices
    eval_every: Count = 250  # steps between validations
    eval_tokens: Count = 100_000  # tokens per language in a validation; the last one reads all
    save_every: Count = 250  # steps between checkpoints
    sample_every: Natural = 500  # steps between samples; 0: none
    sample_tokens: Count = 60  # length of a sample
    compile: bool = False  # torch.compile: faster steps after a slow start


def pt_loss(hidden: Tensor, head: Tensor, targets: Tensor) -> Tensor:
    """N times L_PT: the sum of -log P(target), a scalar. The loop divides it by N, the number of
    tokens in the whole step. hidden (B, T, C) are the model's last states, head (V, C) its output
    matrix, targets (B, T) the next tokens."""
    return -token_logps(hidden, head, targets, reduction="sum")


def evaluate(model: Transformer, tok: Tokenizer, files: list[TokenFile], batch_size: int,
             dist: Dist, max_tokens: int | None, apart: bool) -> Scores:
    """Nats per token and bits per byte of each language, on `max_tokens` of it; None: all. `apart`
    is `mask_documents`."""
    texts = ((file.lang, passages(file, model.config.max_seq_len, batch_size, max_tokens))
             for file in files)
    return score_text(model, tok, texts, dist, apart)


def shape(cfg: Config, vocab_size: int) -> ModelConfig:
    """The model that the settings describe. Raises ValueError if they do not fit together."""
    if cfg.n_embd % cfg.n_head:
        raise ValueError(f"n_embd {cfg.n_embd} must be a multiple of n_head {cfg.n_head}")
    n_hidden = cfg.n_hidden or 32 * math.ceil(8 / 3 * cfg.n_embd / 32)
    return ModelConfig(
        vocab_size, cfg.n_layer, cfg.n_head, cfg.n_kv_head, cfg.n_embd,
        head_dim=cfg.n_embd // cfg.n_head, n_hidden=n_hidden, max_seq_len=cfg.max_seq_len,
        rope_theta=cfg.rope_theta, tied=cfg.tied)


def count_micro_steps(cfg: Config, world: int) -> int:
    """Micro-steps in an optimizer step. Raises ValueError for settings that do not fit together."""
    unit = cfg.batch_size * world * cfg.max_seq_len
    if cfg.batch_tokens % unit:
        raise ValueError(f"batch_tokens {cfg.batch_tokens} must be a multiple of batch_size x "
                         f"processes x max_seq_len = {cfg.batch_size} x {world} x "
                         f"{cfg.max_seq_len} = {unit}; try "
                         f"{max(1, round(cfg.batch_tokens / unit)) * unit}")
    if cfg.warmup_steps >= cfg.max_steps:
        raise ValueError(f"warmup_steps {cfg.warmup_steps} must be less than max_steps "
                         f"{cfg.max_steps}")
    return cfg.batch_tokens // unit


def judge(cfg: Config, dist: Dist) -> None:
    """--eval_only: score a whole split with a finished model, whose shape the checkpoint knows."""
    if not cfg.init_from:
        raise ValueError("--eval_only needs --init_from=CHECKPOINT, the model to judge")
    model, model_tok = load_model(cfg.init_from, dist.device, torch.float32)
    tok, splits = open_data(cfg.data_dir)
    if tok.sha256 != model_tok.sha256:
        raise ValueError(f"{cfg.data_dir}: prepared with another tokenizer than {model_tok.name}'s")
    files = splits["val"] + splits["train"] if cfg.split == "all" else splits[cfg.split]
    scores = evaluate(model, tok, files, cfg.batch_size, dist, None, cfg.mask_documents)
    print0(f"{cfg.split} of {cfg.data_dir} by {model_tok.name} | {score_line(scores)}")


def load_weights(where: str, model: Transformer, tok: Tokenizer) -> None:
    """Take the weights of another run. Raises ValueError if they do not fit."""
    state, path = open_whole(where)
    if state["kind"] == "rm":
        raise ValueError(f"{path}: is a checkpoint of stage rm, not of {KIND}")
    checkpoint.fits(path, state, tok.text, sharding.shape_of(model))
    sharding.load_model(model, plain(model.config, state["model"]).state_dict())
    print0(f"loaded {path}")


def write_samples(model: Transformer, tok: Tokenizer, files: list[TokenFile], cfg: Config) -> None:
    """Show how the model continues the first tokens of a validation text of each language."""
    for file in files:
        start = [int(i) for i in file.ids[:8]]
        start = start[:start.index(tok.endoftext)] if tok.endoftext in start else start
        room = min(cfg.sample_tokens, cfg.max_seq_len - len(start))
        if start and room > 0:
            text, = complete(model, tok, [start], room, stop=(tok.endoftext,), top_p=0.95)
            print0(f"sample {file.lang} | {tok.decode(start)}»{text}".replace("\n", "⏎"))


def train(cfg: Config, dist: Dist) -> None:
    tok, splits = open_data(cfg.data_dir)
    accumulate = count_micro_steps(cfg, dist.world)
    config, max_steps = shape(cfg, tok.n_vocab), cfg.max_steps
    print0(describe_run(dist))
    print0(memory_line(cfg, dist, config, cfg.batch_size, cfg.max_seq_len, accumulate))
    torch.manual_seed(cfg.seed)
    model = Transformer(config)
    # net: the model as it exchanges gradients with other processes; alone it is the model itself
    net = sharding.wrap(model, dist, cfg.shard, cfg.recompute, cfg.compile)
    optimizers = make_optimizers(model, cfg)
    data_id = hash64(*(file.sha256 for file in splits["train"]))
    first = sharding.resume(cfg, KIND, model, optimizers, tok, data_id)
    if not first and cfg.init_from:
        load_weights(cfg.init_from, model, tok)
    windows = Windows(splits["train"], cfg.max_seq_len, cfg.seed)
    rows = cfg.batch_tokens // cfg.max_seq_len  # windows in an optimizer step, of all processes
    flops = flops_per_token(config, cfg.max_seq_len)
    print0(f"{count_parameters(config):,} parameters, {flops:,} FLOPs per token; {windows.n:,} "
           f"windows of {cfg.max_seq_len} tokens, {rows * max_steps / windows.n:.2f} epochs")
    log = Log(cfg, dist, first, max_steps, cfg.batch_tokens, flops)
    # step s learns from windows s x rows to (s + 1) x rows - 1 of the stream; in each micro-step a
    # process takes the next batch_size of them
    batches = prefetch(windows.batch, (
        (step * rows + (micro_step * dist.world + dist.rank) * cfg.batch_size, cfg.batch_size)
        for step in range(first, max_steps) for micro_step in range(accumulate)))
    guard, signals, stopping = runtime.GradientGuard(), runtime.StopSignals(), False

    for step in range(first, max_steps + 1):
        last = step == max_steps  # then it only evaluates and saves
        # Evaluate at the start, every few steps, and at the end.
        if last or step == 0 or (step % cfg.eval_every == 0 and step > first):
            with sharding.unsharded(model, dist):
                scores = evaluate(model, tok, splits["val"], cfg.batch_size, dist,
                                  None if last else cfg.eval_tokens, cfg.mask_documents)
            print0(f"val at step {step:,} | {score_line(scores)}")
            log.write(step=step, val={lang: {"loss": nats, "bits_per_byte": bits}
                                      for lang, (nats, bits) in scores.items()})
        if cfg.sample_every and (last or (step % cfg.sample_every == 0 and step > first)):
            with sharding.unsharded(model, dist):
                if dist.rank == 0:
                    write_samples(model, tok, splits["val"], cfg)

        # A test holds the blocks marked "same" together: who changes one changes all five scripts.
        # same in every train_*.py: save
        # Save, also when a signal asks the run to stop; then leave.
        if last or stopping or (step % cfg.save_every == 0 and step > first):
            sharding.save(cfg, KIND, step, model, optimizers, tok, data_id, dist, last)
            log.start_clock()
        if last or stopping:
            break
        # end same

        # Set the learning rate: a warm-up, then cosine or wsd (lr_factor in plumbing/optim.py).
        lr = set_learning_rate(optimizers, cfg, step, max_steps)
        # Add up the gradients of the step's windows, a portion at a time.
        loss = torch.zeros((), device=dist.device)
        for micro_step in range(accumulate):
            x, y = (t.to(dist.device) for t in next(batches))
            sharding.exchange_gradients(net, micro_step == accumulate - 1)  # only in the last pass
            segments = documents(x, tok) if cfg.mask_documents else None
            with dist.autocast():
                hidden = net(x, hidden=True, segments=segments)
                part = pt_loss(hidden, model.lm_head.weight, y) / cfg.batch_tokens
            (part * dist.world).backward()  # DDP takes the mean over processes, we want the sum
            loss += part.detach()
        samples = f"windows {step * rows:,} to {(step + 1) * rows - 1:,}"

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
        log.step(step, total, lr, norm)

    if stopping:
        signals.report(step)
    print0(peak_line(dist))


def main() -> None:
    cfg = configure(Config)
    runtime.launch(judge if cfg.eval_only else train, cfg)


if __name__ == "__main__":
    run(main)

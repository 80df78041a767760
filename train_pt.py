"""
Pre-training: learn to predict the next token of text.

    L_PT = - 1/N sum over all N tokens of  log P(token | the tokens before it in its window)

    python train_pt.py config/pt_micro.py                                  a laptop
    torchrun --nproc_per_node=8 train_pt.py config/pt_1b.py                8 GPUs
    python train_pt.py config/pt_micro.py --resume                         go on after a stop
    python train_pt.py --eval_only --init_from=out/pt --data_dir=DIR       judge a model on a text

An optimizer step sees `batch_tokens` tokens, whatever the number of processes: each takes its rows
of the batch in portions of `batch_size` and adds up their gradients. Radford et al. 2019;
hyper-parameters after Touvron et al. 2023 (AdamW) and Jordan et al. 2024 (Muon).
"""
# same in every train_*.py: early signals
from plumbing import interrupts

if __name__ == "__main__":  # a stop during the imports below must end them without a traceback
    interrupts.end_quietly()
# end same

import math
from collections.abc import Iterator
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
from plumbing.costs import count_parameters, flops_per_token, training_memory
from data import IGNORE, TokenFile, Windows, prefetch, hash64, open_data, passages
from generate import complete, load_model
from model import ModelConfig, Transformer
from plumbing.runtime import Dist, all_sum, print0
from tokenizer import Tokenizer

KIND = "pt"  # of checkpoint


@dataclass(frozen=True)
class Config:
    data_dir: str = "out/toyworld/data"  # folder written by data.py
    out_dir: str = "out/pt"  # checkpoints and log.jsonl go here
    resume: bool = False  # go on from the newest checkpoint in out_dir
    init_from: str = ""  # checkpoint (file or folder) to take the weights from
    eval_only: bool = False  # only print loss and bits per byte of the data, by --init_from
    split: Literal["val", "train", "all"] = "val"  # part of the data that --eval_only scores
    n_layer: int = 4  # blocks
    n_head: int = 4  # query heads
    n_kv_head: int = 2  # key and value heads, each shared by n_head / n_kv_head query heads
    n_embd: int = 64  # width
    head_dim: int | None = None  # width of a head; None: n_embd / n_head
    n_hidden: int | None = None  # width of the SwiGLU; None: 8/3 n_embd, up to a multiple of 32
    max_seq_len: int = 128  # tokens in a window
    rope_theta: float = 10_000.0  # longest wavelength of the positions, over 2 pi
    tied: bool = True  # the embedding is the output head too
    batch_tokens: int = 4096  # tokens an optimizer step learns from
    batch_size: int = 32  # windows a process puts through the model at once
    max_steps: int = 1000  # optimizer steps
    optimizer: Literal["adamw", "muon"] = "adamw"  # muon: for the blocks' matrices, else AdamW
    learning_rate: float = 1e-2  # of AdamW
    muon_lr: float = 0.02  # of Muon: length of a step, relative to an orthogonal matrix
    schedule: Literal["cosine", "wsd"] = "cosine"  # wsd: warm-up, stable, decay
    warmup_steps: int = 50  # steps of linear warm-up
    final_lr: float = 0.1  # learning rate at the end, as a share
    decay_fraction: float = 0.2  # wsd: share of the steps that decays
    weight_decay: float = 0.1  # of matrices
    adam_beta1: float = 0.9  # AdamW: memory of the mean gradient
    adam_beta2: float = 0.95  # AdamW: memory of its square
    grad_clip: float = 1.0  # largest norm of the gradient
    eval_every: int = 250  # steps between validations
    eval_tokens: int = 100_000  # tokens per language in a validation; the last reads everything
    save_every: int = 250  # steps between checkpoints
    log_every: int = 10  # steps between log lines
    sample_every: int = 500  # steps between samples; 0: none
    sample_tokens: int = 60  # length of a sample
    seed: int = 0  # of the weights and the order of the data
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"  # where to compute
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # activations; auto: bfloat16 on cuda
    shard: bool = False  # each process keeps a part of every matrix (FSDP2), else all of them (DDP)
    recompute: bool = False  # keep a block's input only and run it again: less memory, more work
    compile: bool = False  # torch.compile: faster steps after a slow start
    dist_timeout: float = 120.0  # seconds without word from another process that end the run


def pt_loss(hidden: Tensor, head: Tensor, targets: Tensor) -> Tensor:
    """-sum log P(target) over all targets but IGNORE, a scalar. hidden (B, T, C), head (V, C),
    targets (B, T). The (B T, V) logits exist only a chunk at a time: they would be the largest
    tensor of the run."""
    return F.linear_cross_entropy(hidden.flatten(0, 1), head, targets.flatten(), reduction="sum",
                                  options=runtime.logits_at_once(head))


@torch.no_grad()
def evaluate(model: Transformer, files: list[TokenFile], tok_bytes: Tensor, batch_size: int,
             dist: Dist, max_tokens: int | None) -> dict[str, tuple[float, float]]:
    """(nats per token, bits per byte of UTF-8 text) of each language; each rank takes its share of
    the windows. The cost of ending a document is in, with no bytes of its own."""
    model.eval()
    length = model.config.max_seq_len
    sums = {lang: torch.zeros(3, dtype=torch.float64) for lang in sorted({f.lang for f in files})}
    for file in files:
        for i, (x, y) in enumerate(passages(file, length, batch_size, max_tokens)):
            if i % dist.world != dist.rank:
                continue
            with dist.autocast():
                hidden = model(x.to(dist.device), hidden=True)
                nats = pt_loss(hidden, model.lm_head.weight, y.to(dist.device))
            real = y[y != IGNORE]
            sums[file.lang] += torch.tensor([float(nats), len(real), int(tok_bytes[real].sum())])
    model.train()
    scores = {}
    for lang, own in sums.items():
        nats, n_tokens, n_bytes = all_sum(dist, *own)
        scores[lang] = (nats / max(n_tokens, 1), nats / math.log(2) / max(n_bytes, 1))
    return scores


def score_line(scores: dict[str, tuple[float, float]]) -> str:
    return " | ".join(f"{lang} {nats:.4f} nats/token, {bpb:.4f} bits/byte"
                      for lang, (nats, bpb) in scores.items())


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


def shape(cfg: Config, vocab_size: int) -> ModelConfig:
    """The model that the flat settings describe. Raises ValueError if they do not fit together."""
    if cfg.head_dim is None and cfg.n_embd % cfg.n_head:
        raise ValueError(f"n_embd {cfg.n_embd} must be a multiple of n_head {cfg.n_head}, "
                         "or set head_dim")
    return ModelConfig(
        vocab_size, cfg.n_layer, cfg.n_head, cfg.n_kv_head, cfg.n_embd,
        head_dim=cfg.head_dim or cfg.n_embd // cfg.n_head,
        n_hidden=cfg.n_hidden or -(-8 * cfg.n_embd // 96) * 32,
        max_seq_len=cfg.max_seq_len, rope_theta=cfg.rope_theta, tied=cfg.tied)


def check(cfg: Config, world: int) -> int:
    """Micro-steps per optimizer step. Raises ValueError for settings that cannot be met."""
    unit = cfg.batch_size * world * cfg.max_seq_len
    if cfg.batch_tokens % unit or cfg.batch_tokens < unit:
        raise ValueError(f"batch_tokens {cfg.batch_tokens} must be a multiple of batch_size x "
                         f"processes x max_seq_len = {cfg.batch_size} x {world} x "
                         f"{cfg.max_seq_len} = {unit}; try "
                         f"{max(1, round(cfg.batch_tokens / unit)) * unit}")
    for name in ("max_steps", "eval_every", "eval_tokens", "save_every", "log_every",
                 "sample_tokens"):
        if getattr(cfg, name) < 1:
            raise ValueError(f"{name} must be at least 1, got {getattr(cfg, name)}")
    if not 0 <= cfg.warmup_steps < cfg.max_steps:
        raise ValueError(f"warmup_steps {cfg.warmup_steps} must be less than max_steps "
                         f"{cfg.max_steps}")
    if min(cfg.learning_rate, cfg.muon_lr, cfg.grad_clip) <= 0:
        raise ValueError("learning_rate, muon_lr and grad_clip must be positive")
    return cfg.batch_tokens // unit


def weights(model: Transformer, tensors: dict[str, Tensor]) -> dict:
    return {"model": tensors}


def judge(cfg: Config, dist: Dist) -> None:
    """--eval_only: the whole split scored by a finished model, whose shape the checkpoint knows."""
    if not cfg.init_from:
        raise ValueError("--eval_only needs --init_from=CHECKPOINT, the model to judge")
    model, model_tok = load_model(cfg.init_from, dist.device, torch.float32)
    tok, splits = open_data(cfg.data_dir)
    if tok.sha256 != model_tok.sha256:
        raise ValueError(f"{cfg.data_dir}: prepared with another tokenizer than {model_tok.name}'s")
    files = splits["val"] + splits["train"] if cfg.split == "all" else splits[cfg.split]
    scores = evaluate(model, files, torch.tensor(tok.token_bytes()), cfg.batch_size, dist, None)
    print0(f"{cfg.split} of {cfg.data_dir} by {model_tok.name} | {score_line(scores)}")


def start_from(where: str, model: Transformer, tok: Tokenizer) -> None:
    """Take the weights of another run. Raises ValueError if they do not fit."""
    state, path = checkpoint.load(where)
    if state["kind"] == "rm":
        raise ValueError(f"{path}: is a checkpoint of stage rm, not of {KIND}")
    checkpoint.fits(path, state, tok.text, asdict(model.config))
    sharding.load_model(model, state["model"])
    print0(f"loaded {path}")


def write_samples(model: Transformer, tok: Tokenizer, files: list[TokenFile], cfg: Config) -> None:
    """Show how the model goes on from the first tokens of a validation text of each language."""
    for file in files:
        start = [int(i) for i in file.ids[:8]]
        start = start[:start.index(tok.endoftext)] if tok.endoftext in start else start
        room = min(cfg.sample_tokens, cfg.max_seq_len - len(start))
        if start and room > 0:
            text, = complete(model, tok, [start], room, stop=(tok.endoftext,), top_p=0.95)
            print0(f"sample {file.lang} | {tok.decode(start)}»{text}".replace("\n", "⏎"))


def train(cfg: Config, dist: Dist) -> None:
    tok, splits = open_data(cfg.data_dir)
    accumulate = check(cfg, dist.world)
    config, max_steps = shape(cfg, tok.n_vocab), cfg.max_steps
    print0(runtime.describe_run(dist))
    print0(runtime.memory_line(training_memory(
        config, cfg.batch_size, cfg.max_seq_len, accumulate, dist.dtype.itemsize,
        shards=dist.world if cfg.shard else 1, recompute=cfg.recompute,
        muon=cfg.optimizer == "muon"), dist))
    torch.manual_seed(cfg.seed)
    model = Transformer(config)
    net = sharding.wrap(model, dist, cfg.shard, cfg.recompute, cfg.compile)
    optimizers = make_optimizers(model, cfg)
    data_id = hash64(*(file.sha256 for file in splits["train"]))
    first, state = checkpoint.restore(cfg, KIND, optimizers, tok.text, asdict(config), data_id)
    if state:
        sharding.load(model, optimizers, state)
    elif cfg.init_from:
        start_from(cfg.init_from, model, tok)
    windows = Windows(splits["train"], cfg.max_seq_len, cfg.seed)
    rows = cfg.batch_tokens // cfg.max_seq_len  # windows in an optimizer step, of all processes
    flops = flops_per_token(config, cfg.max_seq_len)
    print0(f"{count_parameters(config):,} parameters, {flops:,} FLOPs per token; {windows.n:,} "
           f"windows of {cfg.max_seq_len} tokens, {rows * cfg.max_steps / windows.n:.2f} epochs")
    tok_bytes = torch.tensor(tok.token_bytes())
    log = runtime.Log(cfg.out_dir, dist, first, cfg.max_steps, cfg.batch_tokens, flops)
    # the windows of a step, of all processes, stand side by side: its start is step x rows
    batches = prefetch(windows.batch, (
        (step * rows + (micro_step * dist.world + dist.rank) * cfg.batch_size, cfg.batch_size)
        for step in range(first, max_steps) for micro_step in range(accumulate)))
    guard, signals, stopping = runtime.GradientGuard(), runtime.StopSignals(), False

    for step in range(first, max_steps + 1):
        last = step == max_steps
        if last or step == 0 or (step % cfg.eval_every == 0 and step > first):
            with sharding.unsharded(model, dist):
                scores = evaluate(model, splits["val"], tok_bytes, cfg.batch_size, dist,
                                  None if last else cfg.eval_tokens)
            print0(f"val at step {step:,} | {score_line(scores)}")
            log.write(step=step, val={k: {"loss": a, "bits_per_byte": b}
                                      for k, (a, b) in scores.items()})
        if cfg.sample_every and (last or (step % cfg.sample_every == 0 and step > first)):
            with sharding.unsharded(model, dist):
                if dist.rank == 0:
                    write_samples(model, tok, splits["val"], cfg)

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
        for micro_step in range(accumulate):
            x, y = (t.to(dist.device) for t in next(batches))
            sharding.exchange_gradients(net, micro_step == accumulate - 1)  # once
            with dist.autocast():
                part = pt_loss(net(x, hidden=True), model.lm_head.weight, y) / cfg.batch_tokens
            (part * dist.world).backward()  # DDP takes the mean over processes, the loss is a sum
            loss += part.detach()
        samples = f"windows {step * rows:,} to {(step + 1) * rows - 1:,}"

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
        log.write(step=step, loss=total, lr=lr * cfg.learning_rate, norm=norm)
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
        (judge if cfg.eval_only else train)(cfg, dist)
        runtime.finish(dist)


if __name__ == "__main__":
    main()

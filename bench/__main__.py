"""
How fast it is: beside the limits of the machine, and beside other code that does the same work.

    python -m bench                                        everything; CPU, fp32
    python -m bench --only=train --nanogpt=../nanoGPT      one job, your clone of nanoGPT beside it
    python -m bench --only=decode --decode_1b              also 1.1B parameters (needs 10 GB)

How samples are taken, and which count: race.py. Figures are medians; "x": calls per second relative
to the first contender.

    FLOPs per token = 6 (parameters - those only looked up) + 12 layers (heads x head_dim) T

counts training, for everybody's model; "looked up" are embeddings that are no output head. "mfu":
FLOP/s over those of a matrix product that took turns with the models. "of_bound": tokens/s over
those of a program that only reads the weights, as fast as an array whose sum took turns too.
"""
import copy
import io
import json
import os
import runpy
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from random import Random
from time import perf_counter

import numpy as np
import torch
from torch import Tensor, nn

from bench import search as bench_search
from plumbing import checkpoint
import data
from plumbing import examples
from plumbing import runtime
import train_dpo
import train_pt
import train_rl
import train_rm
import train_sft
from configurator import configure, fail
from plumbing.jobs import Progress
from plumbing.examples import Row
from generate import generate, replies
from model import ModelConfig, RewardModel, Transformer, rope_table, rotate
from bench.race import Race
from tokenizer import PATTERN, SPECIALS, count_pieces, dump, load_tokenizer, train_bpe
from demo.world import pt_document

READ = 256 << 20  # bytes of the array whose sum measures the memory: more than caches hold


@dataclass(frozen=True)
class Config:
    only: str = "limits,train,decode,stages,loader,data,resume,search"  # jobs, comma-separated
    repeats: int = 7  # good samples of each contender
    sample_s: float = 1.0  # seconds that a sample lasts at least; below 0.3 others go unnoticed
    max_foreign: float = 0.1  # part of a core that others may use during a good sample
    compile: bool = True  # also time compiled models (needs a C++ compiler)
    nanogpt: str = ""  # folder of a clone of nanoGPT, to train its model too
    matmul: int = 1024  # rows of the square matrices; twice as many are tried too
    n_layer: int = 6  # of the model that is trained
    n_embd: int = 256  # of the model that is trained; heads are 64 wide
    vocab_size: int = 8192  # of all models, and of the tokenizer that encodes
    seq_len: int = 256  # tokens in a window of the training batch
    batch_size: int = 16  # windows in the training batch
    decode_embd: int = 512  # of the model that writes; it has 8 layers
    decode_tokens: int = 64  # tokens written behind a prompt of 16
    decode_1b: bool = False  # also write with 1.1B parameters
    data_mb: int = 24  # text to encode
    chunks: int = 100_000  # in the index that is searched


class PlainLlama(nn.Module):
    """An ordinary Llama as tutorials write it, nothing fused: (B, T) ids -> (B, T, V) logits."""

    def __init__(self, c: ModelConfig):
        super().__init__()
        C, wide, narrow = c.n_embd, c.n_head * c.head_dim, c.n_kv_head * c.head_dim
        shapes = {"q": (C, wide), "k": (C, narrow), "v": (C, narrow), "o": (wide, C),
                  "gate": (C, c.n_hidden), "up": (C, c.n_hidden), "down": (c.n_hidden, C)}
        self.c, self.embed = c, nn.Embedding(c.vocab_size, C)
        self.blocks = nn.ModuleList(nn.ModuleDict(
            {k: nn.Linear(*s, bias=False) for k, s in shapes.items()}) for _ in range(c.n_layer))
        self.head = nn.Linear(C, c.vocab_size, bias=False)
        for matrix in self.parameters():
            nn.init.normal_(matrix, std=0.02)
        self.norms = nn.ParameterList(torch.ones(C) for _ in range(2 * c.n_layer + 1))

    def forward(self, idx: Tensor) -> Tensor:
        (B, T), D, x = idx.shape, self.c.head_dim, self.embed(idx)
        rope = rope_table(torch.arange(T), D, self.c.rope_theta)
        future = torch.ones(T, T, dtype=torch.bool).triu(1)
        for i, w in enumerate(self.blocks):
            h = self.normed(x, 2 * i)
            q, k, v = (w[name](h).view(B, T, -1, D).transpose(1, 2) for name in "qkv")
            q, k = rotate(q, *rope), rotate(k, *rope)
            k, v = (t.repeat_interleave(q.size(1) // k.size(1), dim=1) for t in (k, v))
            scores = q @ k.transpose(-2, -1) / D**0.5  # (B, H, T, T)
            y = scores.masked_fill(future, -torch.inf).softmax(-1) @ v
            x = x + w["o"](y.transpose(1, 2).reshape(B, T, -1))
            h = self.normed(x, 2 * i + 1)
            x = x + w["down"](nn.functional.silu(w["gate"](h)) * w["up"](h))
        return self.head(self.normed(x, -1))

    def normed(self, x: Tensor, i: int) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * self.norms[i]


def huggingface(model: Transformer) -> nn.Module | None:
    """The same model, with the same weights, in `transformers`; None if that is not installed."""
    if not find_spec("transformers"):
        return None
    from transformers import Qwen3Config, Qwen3ForCausalLM
    c = model.config
    hf = Qwen3ForCausalLM(Qwen3Config(
        vocab_size=c.vocab_size, hidden_size=c.n_embd, intermediate_size=c.n_hidden,
        num_hidden_layers=c.n_layer, num_attention_heads=c.n_head, head_dim=c.head_dim,
        num_key_value_heads=c.n_kv_head, rms_norm_eps=c.norm_eps, tie_word_embeddings=c.tied,
        max_position_embeddings=c.max_seq_len, pad_token_id=0))
    hf.load_state_dict({k if k.startswith("lm_head") else f"model.{k}": v
                        for k, v in model.state_dict().items()}, assign=True)
    return hf


def multiplying(model: nn.Module) -> int:
    """Parameters of any model, without those that are only looked up."""
    heads = {id(m.weight) for m in model.modules() if isinstance(m, nn.Linear)}
    tables = {m.weight for m in model.modules() if isinstance(m, nn.Embedding)}
    return sum(p.numel() for p in model.parameters() if p not in tables or id(p) in heads)


def limits(cfg: Config, folder: str, done: dict[str, Race]) -> Iterator[Race]:
    squares = {f"matmul {n} {kind}": torch.randn(n, n).to(getattr(torch, kind))
               for kind in ("float32", "bfloat16") for n in (cfg.matmul, 2 * cfg.matmul)}
    race = Race("limits", {name: partial(torch.mm, a, a) for name, a in squares.items()}
                | {"read": torch.ones(READ // 4).sum}, cfg)
    for name, a in squares.items():
        race.row(name, 2 * len(a)**3 / race.seconds[name] / 1e9, "GF/s")
    race.row("read", READ / race.seconds["read"] / 1e9, "GB/s")
    yield race


def train(cfg: Config, folder: str, done: dict[str, Race]) -> Iterator[Race]:
    """Forward, backward, clipping and AdamW step on one batch of random ids, over and over."""
    V, L, C, T, heads = cfg.vocab_size, cfg.n_layer, cfg.n_embd, cfg.seq_len, cfg.n_embd // 64
    c = ModelConfig(V, L, heads, max(1, heads // 2), C, 64, 4 * C, T, tied=False)
    x, y = torch.randint(V, (2, cfg.batch_size, T))
    lr = 1e-5  # so small that the loss does not reach 0: tiny numbers are slow on a CPU
    ours, plain, hf = Transformer(c), PlainLlama(c), huggingface(Transformer(c))
    entries = {  # model, loss, optimizer
        "ours": (ours, lambda net: train_pt.pt_loss(net(x, hidden=True), ours.lm_head.weight, y)
                 / y.numel(), train_pt.make_optimizers(ours, train_pt.Config(learning_rate=lr))[0]),
        "plain Llama": (plain, lambda net: nn.functional.cross_entropy(
            net(x).flatten(0, 1), y.flatten()), torch.optim.AdamW(plain.parameters(), lr))}
    if cfg.nanogpt:
        with redirect_stdout(io.StringIO()):
            their = runpy.run_path(f"{cfg.nanogpt}/model.py")
            gpt = their["GPT"](their["GPTConfig"](T, V, L, heads, C, dropout=0.0, bias=False))
            optimizer = gpt.configure_optimizers(0.1, lr, (0.9, 0.95), "cpu")
        entries["nanoGPT"] = gpt, lambda net: net(x, y)[1], optimizer
    if hf is not None:
        entries["transformers Qwen3"] = (hf, lambda net: net(input_ids=x, labels=x).loss,
                                         torch.optim.AdamW(hf.parameters(), lr))

    def step(net: nn.Module, loss: Callable[[nn.Module], Tensor], optimizer) -> None:
        loss(net).backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    if cfg.compile and not (cxx := shutil.which(os.environ.get("CXX", "g++"))):
        print("train   compiled models skipped: no C++ compiler; install g++ or set CXX")
    contenders = {}
    for name, (model, *rest) in entries.items():
        contenders[f"{name}, eager"] = partial(step, model, *rest)
        if cfg.compile and cxx and name in ("ours", "nanoGPT"):
            contenders[f"{name}, compiled"] = partial(step, torch.compile(model), *rest)
    limit = partial(torch.mm, *torch.randn(2, cfg.matmul, cfg.matmul))
    race = Race("train", contenders | {"limit": limit}, cfg)
    for name in contenders:
        model, seconds = entries[name.partition(",")[0]][0], race.seconds[name]
        flops = (6 * multiplying(model) + 12 * L * C * T) * y.numel() / seconds
        race.row(name, y.numel() / seconds, "tok/s", gflops=flops / 1e9,
                 mfu=flops * race.seconds["limit"] / (2 * cfg.matmul**3),
                 params=sum(p.numel() for p in model.parameters()))
    yield race


def decode(cfg: Config, folder: str, done: dict[str, Race]) -> Iterator[Race]:
    """Greedy text behind prompts of 16 tokens: tokens/s of all rows, reading them included."""
    V, C, n, heads = cfg.vocab_size, cfg.decode_embd, cfg.decode_tokens, cfg.decode_embd // 64
    shapes = [(V, 8, heads, heads, C, 64, 5 * C // 2), (32_000, 24, 32, 4, 2048, 64, 5632)]
    for shape in shapes[:1 + cfg.decode_1b]:
        model = Transformer(ModelConfig(*shape, max_seq_len=16 + n)).eval()
        hf, size = huggingface(model), 4 * multiplying(model)
        for B in (1, 8):
            idx = torch.randint(model.config.vocab_size, (B, 16))
            contenders = {"ours": lambda: list(generate(model, idx.tolist(), n, temperature=0.0))}
            for kind in ("dynamic", "static") if hf is not None else ():
                contenders[f"transformers, {kind} cache"] = partial(
                    hf.generate, idx, attention_mask=torch.ones_like(idx), max_new_tokens=n,
                    do_sample=False, cache_implementation=kind)
            race = Race("decode", contenders | {"limit": torch.ones(READ // 4).sum}, cfg)
            bound = B * READ / race.seconds["limit"] / size
            for name in contenders:
                speed = B * n / race.seconds[name]
                race.row(name, speed, "tok/s", batch=B, of_bound=speed / bound, mb=size / 1e6)
            yield race


def stages(cfg: Config, folder: str, done: dict[str, Race]) -> Iterator[Race]:
    """A training step of each stage, in real tokens: rows of T / 8 to T tokens, the second half to
    be learnt. `learnt`: of the tokens the model reads, padding included. A step of RL writes,
    scores and learns from 64 replies of 32 tokens to prompts of 16; `writing`: the share of the
    time in which they are written. Then such replies alone, 64 at once and one by one."""
    V, C, T, B, r = cfg.vocab_size, cfg.n_embd, cfg.seq_len, cfg.batch_size, Random(0)
    c = ModelConfig(V, cfg.n_layer, C // 64, max(1, C // 128), C, 64, 4 * C, T + 48, tied=False)
    alone = runtime.setup("cpu", "float32")
    sizes = sorted(r.randint(T // 8, T) for _ in range(8 * B))
    rows = [Row([r.randrange(V) for _ in range(n)], [0] * (n // 2) + [1] * (n - n // 2))
            for n in sizes]
    packed = examples.window_batch([[rows[i] for i in one]
                                    for one in data.pack(sizes, T)[:B]], T)
    padded = examples.window_batch([[row] for row in r.sample(rows, B)], T)
    alike = examples.pad_right(rows[3 * B:4 * B], 0)  # as micro_batches puts pairs together
    full = torch.randint(V, (2, B, T))
    prompts, nothing = torch.randint(V, (64, 16)).tolist(), torch.zeros(B // 2)

    def trained(make_loss: Callable[[nn.Module], Tensor], net: nn.Module) -> Callable[[], None]:
        optimizer = train_pt.make_optimizers(net, train_pt.Config(learning_rate=1e-5))[0]

        def step() -> None:
            make_loss(net).backward()
            nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        return step

    def dpo(net: Transformer) -> Tensor:
        logps, n = train_dpo.reply_logps(net, net, *alike[:2], alone)
        return train_dpo.dpo_loss(*logps.chunk(2), nothing, nothing, *n.chunk(2)).mean()

    def rm(net: RewardModel) -> Tensor:
        return train_rm.rm_loss(*net(alike[0], alike[2]).chunk(2), nothing, 0.01).mean()

    judge, of_rl, shares = RewardModel(Transformer(c)).requires_grad_(False), train_rl.Config(
        answer_tokens=32, group=8, batch_size=64, rollout_size=64), []

    def timed_replies(*args, **settings) -> list[list[int]]:
        begin = perf_counter()
        said = replies(*args, **settings)
        shares.append(perf_counter() - begin)
        return said
    train_rl.replies = timed_replies

    def rl(net: Transformer) -> Tensor:
        nobody = -1  # no token ends a reply: all have 32
        asked = [prompt for prompt in prompts[:8] for _ in range(8)]
        rollout = train_rl.roll_out(net, reference, judge, nobody, of_rl, alone, asked,
                                    list(range(64)))
        A = train_rl.advantages(rollout.R.view(8, 8), "rloo").flatten()
        return train_rl.reply_losses(net, net, rollout, A, list(range(64)), of_rl, alone)[0].mean()

    losses = {
        "PT": (lambda net: train_pt.pt_loss(net(full[0], hidden=True), net.lm_head.weight, full[1])
               / full[1].numel(), full[0].numel(), 1.0),
        "SFT, packed": (lambda net: train_sft.sft_loss(
            net(packed[0], hidden=True, segments=packed[2]), net.lm_head.weight, *packed[:2])
            / 1000, int((packed[2] > 0).sum()), float(packed[1].float().mean())),
        "SFT, padded": (lambda net: train_sft.sft_loss(
            net(padded[0], hidden=True), net.lm_head.weight, *padded[:2]) / 1000,
            int((padded[2] > 0).sum()), float(padded[1].float().mean())),
        "DPO, reference kept": (dpo, int(alike[2].sum()), float((alike[1] >= 0).float().mean())),
        "RM": (rm, int(alike[2].sum()), None),  # one number of a row
        "RL": (rl, 64 * 48, 32 / 48)}
    nets = {name: Transformer(c) for name in losses}
    reference = copy.deepcopy(nets["RL"]).requires_grad_(False)
    nets["RM"] = RewardModel(nets["RM"])
    race = Race("stages", {name: trained(make, nets[name])
                           for name, (make, *_) in losses.items()}, cfg)
    speed = {name: tokens / race.seconds[name] for name, (_, tokens, _) in losses.items()}
    for name, (_, tokens, learnt) in losses.items():
        more = {} if learnt is None else {"learnt": learnt}
        if name == "RL":
            more["writing"] = float(np.median(shares)) / race.seconds[name]
        race.row(name, speed[name], "tok/s", of_pt=speed[name] / speed["PT"], **more)
    yield race
    net = Transformer(c).eval()
    race = Race("stages", {f"{n} replies at once": partial(
        lambda n: list(generate(net, prompts[:n], 32)), n) for n in (1, 64)}, cfg)
    for (name, seconds), n in zip(race.seconds.items(), (1, 64)):
        race.row(name, 32 * n / seconds, "tok/s",
                 of_one=n * race.seconds["1 replies at once"] / seconds)
    yield race


def loader(cfg: Config, folder: str, done: dict[str, Race]) -> Iterator[Race]:
    """Making a batch of inputs and targets; share: of the time our eager model trains on it."""
    path, V = f"{folder}/random.bin", cfg.vocab_size
    np.random.default_rng(0).integers(0, V, 20_000_000, np.uint16).tofile(path)
    file = data.TokenFile(path, np.memmap(path, np.uint16, "r"), V, 0, 0, "", "", "en")
    speed = (done["train"].rows[0]["value"] if "train" in done else None) or torch.nan
    for B, T in ((12, 64), (16, 256), (12, 1024)):
        windows, starts = data.Windows([file], T, seed=0), iter(range(0, 1 << 62, B))

        def random_crops() -> list[Tensor]:  # a new map, each row cut out and cast by itself
            ids = np.memmap(path, np.uint16, "r")
            at = torch.randint(len(ids) - T, (B,)).tolist()
            return [torch.stack([torch.from_numpy(ids[i + j:i + j + T].astype(np.int64))
                                 for i in at]) for j in (0, 1)]

        race = Race("loader", {f"Windows.batch {B}x{T}": lambda: windows.batch(next(starts), B),
                               f"nanoGPT's way {B}x{T}": random_crops}, cfg)
        for name, seconds in race.seconds.items():
            race.row(name, 1e6 * seconds, "us/batch", share=seconds * speed / (B * T))
        yield race


def prepare(cfg: Config, folder: str, done: dict[str, Race]) -> Iterator[Race]:
    """From a JSONL file of toyworld's text to token files; beside tiktoken alone, in memory."""
    rng, texts, size = Random(0), [], 0
    while size < cfg.data_mb * 1_000_000:  # documents of about 2 kB
        texts.append("\n".join(pt_document(rng, "train", 2, 4, 0.3)["text"] for _ in range(10)))
        size += len(texts[-1].encode())
    paths = [f"{folder}/{name}" for name in ("text.jsonl", "tokenizer.txt", "data")]
    with open(paths[0], "w", encoding="utf-8") as f:
        f.writelines(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts)
    ranks = train_bpe(count_pieces(texts[:1000]), cfg.vocab_size - len(SPECIALS))
    Path(paths[1]).write_text(dump(ranks, PATTERN))
    encode = load_tokenizer(paths[1]).encode_ordinary_batch

    def with_workers(n: int) -> None:
        shutil.rmtree(paths[2], ignore_errors=True)
        with redirect_stdout(io.StringIO()):
            data.prepare(data.Config(*paths, workers=n), Progress())

    race = Race("data", {f"prepare, {n} worker(s)": partial(with_workers, n) for n in (1, 2)} | {
        "tiktoken alone, 1 thread": partial(encode, texts, num_threads=1)}, cfg)
    for name, seconds in race.seconds.items():
        race.row(name, size / 1e6 / seconds, "MB/s")
    yield race


def resume(cfg: Config, folder: str, done: dict[str, Race]) -> Iterator[Race]:
    """Checking and loading a checkpoint in the page cache, and making the next batch."""
    V, C, T = cfg.vocab_size, cfg.n_embd, cfg.seq_len
    model = Transformer(ModelConfig(V, cfg.n_layer, 4, 4, C, 64, 4 * C, T))
    optimizer = train_pt.make_optimizers(model, train_pt.Config())[0]
    model(torch.zeros(1, 1, dtype=torch.long)).sum().backward()
    optimizer.step()  # makes the moments
    saved = {"format": 1, "model": model.state_dict(), "optimizer": [optimizer.state_dict()]}
    file = data.TokenFile("", np.zeros(1 << 20, np.uint16), V, 0, 0, "", "", "en")

    def again(path: Path) -> None:
        os.utime(path)  # as in a new process: its hash has not been checked yet
        state, _ = checkpoint.load(str(path))
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"][0])
        data.Windows([file], T, seed=0).batch(state["step"] * cfg.batch_size, cfg.batch_size)

    paths = {f"at step {n:,}": checkpoint.save(f"{folder}/{n}", n, saved | {"step": n})
             for n in (10, 1_000_000)}
    race = Race("resume", {name: partial(again, path) for name, path in paths.items()}, cfg)
    for name, path in paths.items():
        race.row(name, race.seconds[name], "s", checkpoint_mb=path.stat().st_size / 1e6)
    yield race


JOBS = {"limits": limits, "train": train, "decode": decode, "stages": stages, "loader": loader,
        "data": prepare, "resume": resume, "search": bench_search.search}


def main() -> None:
    cfg, done = configure(Config), {}
    if unknown := set(cfg.only.split(",")) - set(JOBS):
        fail(f"--only={cfg.only}: there is no {', '.join(unknown)} among {', '.join(JOBS)}")
    if cfg.nanogpt and not Path(cfg.nanogpt, "model.py").is_file():
        fail(f"--nanogpt={cfg.nanogpt}: no model.py there; give the folder of a clone")
    if min(cfg.n_embd, cfg.decode_embd) < 64 or cfg.n_embd % 64 or cfg.decode_embd % 64:
        fail("--n_embd and --decode_embd must be multiples of 64, the width of a head")
    formula = next(line.strip() for line in __doc__.splitlines() if "FLOPs per token" in line)
    print(runtime.describe_run(runtime.setup("cpu", "float32")), formula, sep="\n")
    with tempfile.TemporaryDirectory() as folder:
        for job in cfg.only.split(","):
            for race in JOBS[job](cfg, folder, done):
                done[job] = race
                print(*map(json.dumps, race.rows), sep="\n", flush=True)


if __name__ == "__main__":
    main()

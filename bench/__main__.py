"""
How fast it is: beside the limits of the machine, and beside other code that does the same work.

    python -m bench                                        everything; CPU, fp32
    python -m bench --only=train --nanogpt=../nanoGPT      one job, your clone of nanoGPT beside it
    python -m bench --only=decode --decode_1b              also 1.1B parameters (needs 10 GB)
    python -m bench --only=decode --llama=MODEL.gguf       8 and 4 bits, llama.cpp beside them

race.py says how samples are taken and which count. Figures are medians; "x" is calls per second
relative to the first contender.

    FLOPs per token = 6 (parameters - those only looked up) + 12 layers (heads x head_dim) T

is counted for everybody's model when it trains; "looked up" are embeddings that are no output head.
"mfu" is FLOP/s over those of a matrix product that took turns with the models. "of_bound" is
tokens/s over those of a program that only reads the weights, as fast as we summed an array.
"""
import io
import json
import os
import runpy
import shutil
import tempfile
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from random import Random

import torch
from torch import Tensor, nn

import data
import train_dpo
import train_pt
import train_sft
from bench import llama
from bench.race import Race, chosen
from bench.search import search
from configurator import Count, FilePath, NotNegative, configure, fail
from demo.world import pt_document
from generate import generate
from model import ModelConfig, Transformer, rope_table, rotate
from plumbing import examples, families, loading, runtime, terminal
from plumbing.examples import Row
from plumbing.jobs import Progress
from plumbing.log import describe_run
from plumbing.optim import make_optimizers
from tokenizer import HAN_PATTERN, SPECIALS, count_pieces, dump, load_tokenizer, train_bpe

READ = 256 << 20  # bytes of the array whose sum measures the memory: more than caches hold
MATMUL = 1024  # rows of the square matrices; twice as many are tried too
VOCAB, N_LAYER, N_EMBD = 8192, 6, 256  # of the model that is trained; heads are 64 wide
T, B = 256, 16  # tokens in a window, windows in a batch
DECODE_EMBD, WRITTEN = 512, 64  # the model that writes has 8 layers; tokens after a prompt of 16
LR = 1e-5  # so small that no loss reaches 0: tiny numbers are slow on a CPU


@dataclass(frozen=True)
class Config:
    only: str = "limits,train,decode,stages,data,search"  # jobs, comma-separated
    repeats: Count = 7  # good samples of each contender
    sample_s: NotNegative = 1.0  # least seconds of a sample; below 0.3 others go unnoticed
    max_foreign: NotNegative = 0.1  # part of a core that others may use during a good sample
    compile: bool = True  # also time compiled models (needs a C++ compiler)
    nanogpt: FilePath = ""  # folder of a clone of nanoGPT, to train its model too
    decode_1b: bool = False  # also write with 1.1B parameters; with --llama only with them
    llama: FilePath = ""  # decode and quality: a GGUF file to run here and in llama.cpp
    texts: str = ""  # quality: files of text, comma-separated
    data_mb: Count = 24  # text to encode
    chunks: Count = 100_000  # in the index that is searched


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
        vocab_size=c.vocab_size, tie_word_embeddings=c.tied, pad_token_id=0,
        **{theirs: getattr(c, ours) for ours, (theirs, _) in families.SIZES.items()}))
    hf.load_state_dict({k if k.startswith("lm_head") else f"model.{k}": v
                        for k, v in model.state_dict().items()}, assign=True)
    return hf


def multiplying(model: nn.Module) -> int:
    """Parameters of any model, without those that are only looked up."""
    heads = {id(m.weight) for m in model.modules() if isinstance(m, nn.Linear)}
    tables = {m.weight for m in model.modules() if isinstance(m, nn.Embedding)}
    return sum(p.numel() for p in model.parameters() if p not in tables or id(p) in heads)


def learner(net: nn.Module, loss: Callable[[nn.Module], Tensor],
            optimizer: torch.optim.Optimizer | None = None) -> Callable[[], None]:
    """A training step: forward, backward, clipping, AdamW."""
    optimizer = optimizer or make_optimizers(net, train_pt.Config(learning_rate=LR))[0]

    def step() -> None:
        loss(net).backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return step


def shape(max_seq_len: int) -> ModelConfig:
    """Of the model that is trained."""
    heads = N_EMBD // 64
    return ModelConfig(VOCAB, N_LAYER, heads, max(1, heads // 2), N_EMBD, 64, 4 * N_EMBD,
                       max_seq_len, tied=False)


def limits(cfg: Config, folder: str) -> None:
    squares = {f"matmul {n} {kind}": torch.randn(n, n).to(getattr(torch, kind))
               for kind in ("float32", "bfloat16") for n in (MATMUL, 2 * MATMUL)}
    race = Race("limits", {name: partial(torch.mm, a, a) for name, a in squares.items()}
                | {"read": torch.ones(READ // 4).sum}, cfg)
    for name, a in squares.items():
        race.speed(name, 2 * len(a)**3 / 1e9, "GF/s")
    race.speed("read", READ / 1e9, "GB/s")


def pt_loss(net: nn.Module, idx: Tensor, targets: Tensor) -> Tensor:
    return train_pt.pt_loss(net(idx, hidden=True), net.lm_head.weight, targets)


def sft_loss(net: nn.Module, idx: Tensor, mask: Tensor, segments: Tensor | None) -> Tensor:
    return train_sft.sft_loss(net(idx, hidden=True, segments=segments), net.lm_head.weight, idx,
                              mask)


def dpo_loss(net: nn.Module, idx: Tensor, targets: Tensor, dist: runtime.Dist) -> Tensor:
    """The first half of the rows is preferred to the second."""
    (logps, n), nothing = train_dpo.reply_logps(net, net, idx, targets, dist), torch.zeros(())
    (chosen, rejected), (more, less) = logps.chunk(2), n.chunk(2)
    return train_dpo.dpo_loss(chosen, rejected, nothing, nothing, more, less).mean()


def train(cfg: Config, folder: str) -> None:
    """A training step on one batch of random ids, over and over."""
    c = shape(T)
    x, y = torch.randint(VOCAB, (2, B, T))
    ours, plain, hf = Transformer(c), PlainLlama(c), huggingface(Transformer(c))
    entries: dict[str, tuple] = {  # model, loss, optimizer
        "ours": (ours, lambda net: pt_loss(net, x, y), None),
        "plain Llama": (plain, lambda net: nn.functional.cross_entropy(
            net(x).flatten(0, 1), y.flatten()), torch.optim.AdamW(plain.parameters(), LR))}
    if cfg.nanogpt:
        with redirect_stdout(io.StringIO()):
            their = runpy.run_path(f"{cfg.nanogpt}/model.py")
            gpt = their["GPT"](their["GPTConfig"](T, VOCAB, c.n_layer, c.n_head, c.n_embd,
                                                  dropout=0.0, bias=False))
            optimizer = gpt.configure_optimizers(0.1, LR, (0.9, 0.95), "cpu")
        entries["nanoGPT"] = gpt, lambda net: net(x, y)[1], optimizer
    if hf is not None:
        entries["transformers Qwen3"] = (hf, lambda net: net(input_ids=x, labels=x).loss,
                                         torch.optim.AdamW(hf.parameters(), LR))
    if cfg.compile and not (cxx := shutil.which(os.environ.get("CXX", "g++"))):
        print("train   compiled models skipped: no C++ compiler; install g++ or set CXX")

    def in_bf16(net: nn.Module) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return entries["ours"][1](net)

    contenders = {}
    for name, (model, *rest) in entries.items():
        contenders[f"{name}, eager"] = learner(model, *rest)
        if cfg.compile and cxx and name in ("ours", "nanoGPT"):
            contenders[f"{name}, compiled"] = learner(torch.compile(model), *rest)
    if runtime.multiplies_bf16() > 1:
        contenders["ours, bf16"] = learner(ours, in_bf16)
    limit = partial(torch.mm, *torch.randn(2, MATMUL, MATMUL))
    race = Race("train", contenders | {"limit": limit}, cfg)
    for name in contenders:
        model = entries[name.partition(",")[0]][0]
        flops = 6 * multiplying(model) + 12 * c.n_layer * c.n_embd * T
        flops *= y.numel() / race.seconds[name]
        race.speed(name, y.numel(), "tok/s", gflops=flops / 1e9,
                   mfu=flops * race.seconds["limit"] / (2 * MATMUL**3),
                   params=sum(p.numel() for p in model.parameters()))


def decode(cfg: Config, folder: str) -> None:
    """Greedy text after prompts of 16 tokens: tokens/s of all rows, reading them included. With
    --llama, in 8 and 4 bits beside llama.cpp."""
    if cfg.llama:
        return llama.speed(cfg, folder)
    C, n, heads = DECODE_EMBD, WRITTEN, DECODE_EMBD // 64
    shapes = [(VOCAB, 8, heads, heads, C, 64, 5 * C // 2), (32_000, 24, 32, 4, 2048, 64, 5632)]
    for sizes in shapes[:1 + cfg.decode_1b]:
        model = Transformer(ModelConfig(*sizes, max_seq_len=16 + n)).eval()
        loading.read_weights_with_all_threads(model)
        hf, size = huggingface(model), 4 * multiplying(model)
        for rows in (1, 8):
            idx = torch.randint(model.config.vocab_size, (rows, 16))
            contenders = {"ours": lambda: list(generate(model, idx.tolist(), n, temperature=0.0))}
            if hf is not None:
                contenders |= {f"transformers, {kind} cache": partial(
                    hf.generate, idx, attention_mask=torch.ones_like(idx), max_new_tokens=n,
                    do_sample=False, cache_implementation=kind) for kind in ("dynamic", "static")}
            race = Race("decode", contenders | {"limit": torch.ones(READ // 4).sum}, cfg)
            bound = rows * READ / race.seconds["limit"] / size
            for name in contenders:
                race.speed(name, rows * n, "tok/s", batch=rows, mb=size / 1e6,
                           of_bound=rows * n / race.seconds[name] / bound)


def stages(cfg: Config, folder: str) -> None:
    """Replies of 32 tokens to prompts of 16, one by one and 64 at once. Then a training step, in
    real tokens: rows of T / 8 to T tokens, the second half to be learnt. `learnt` is the share of
    the tokens that the model reads, padding included."""
    r, c, alone = Random(0), shape(T + 48), runtime.setup("cpu", "float32")
    net = Transformer(c).eval()
    loading.read_weights_with_all_threads(net)
    prompts = torch.randint(VOCAB, (64, 16)).tolist()
    race = Race("stages", {f"{n} replies at once": partial(
        lambda n: list(generate(net, prompts[:n], 32)), n) for n in (1, 64)}, cfg)
    one, _ = race.seconds.values()
    for (name, seconds), n in zip(race.seconds.items(), (1, 64)):
        race.speed(name, 32 * n, "tok/s", of_one=n * one / seconds)

    sizes = sorted(r.randint(T // 8, T) for _ in range(8 * B))
    rows = [Row([r.randrange(VOCAB) for _ in range(n)], [0] * (n // 2) + [1] * (n - n // 2))
            for n in sizes]
    packed = examples.window_batch([[rows[i] for i in one]
                                    for one in data.pack(sizes, T)[:B]], T)
    padded = examples.window_batch([[row] for row in r.sample(rows, B)], T)
    alike = examples.pad_right(rows[3 * B:4 * B], 0)  # as micro_batches puts pairs together
    full = torch.randint(VOCAB, (2, B, T))
    losses: dict[str, tuple[Callable, Tensor, Tensor]] = {  # loss, what is real, what is learnt
        "PT": (lambda net: pt_loss(net, *full), full[0] >= 0, full[0] >= 0),
        "SFT, packed": (lambda net: sft_loss(net, *packed), packed[2] > 0, packed[1]),
        "SFT, padded": (lambda net: sft_loss(net, *padded[:2], None), padded[2] > 0, padded[1]),
        "DPO, reference kept": (lambda net: dpo_loss(net, *alike[:2], alone), alike[2],
                                alike[1] >= 0)}
    race = Race("stages", {name: learner(Transformer(c), loss)
                           for name, (loss, *_) in losses.items()}, cfg)
    for name, (_, real, learnt) in losses.items():
        n = int(real.sum())
        race.speed(name, n, "tok/s", learnt=float(learnt.float().mean()),
                   of_pt=n / (B * T) * race.seconds["PT"] / race.seconds[name])


def prepare(cfg: Config, folder: str) -> None:
    """From a JSONL file of toyworld's text to token files; beside tiktoken alone, in memory."""
    rng, texts, size = Random(0), [], 0
    while size < cfg.data_mb * 1_000_000:  # documents of about 2 kB
        texts.append("\n".join(pt_document(rng, "train", 2, 4, 0.3)["text"] for _ in range(10)))
        size += len(texts[-1].encode())
    paths = [f"{folder}/{name}" for name in ("text.jsonl", "tokenizer.txt", "data")]
    with open(paths[0], "w", encoding="utf-8") as f:
        f.writelines(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts)
    ranks = train_bpe(count_pieces(texts[:1000]), VOCAB - len(SPECIALS))
    Path(paths[1]).write_text(dump(ranks, HAN_PATTERN))
    encode = load_tokenizer(paths[1]).encode_ordinary_batch

    def with_workers(n: int) -> None:
        shutil.rmtree(paths[2], ignore_errors=True)
        with redirect_stdout(io.StringIO()):
            data.prepare(data.Config(paths[0], paths[1], paths[2], workers=n), Progress())

    race = Race("data", {f"prepare, {n} worker(s)": partial(with_workers, n) for n in (1, 2)} | {
        "tiktoken alone, 1 thread": partial(encode, texts, num_threads=1)}, cfg)
    for name in race.seconds:
        race.speed(name, size / 1e6, "MB/s")


JOBS = {"limits": limits, "train": train, "decode": decode, "stages": stages, "data": prepare,
        "search": search, "quality": llama.quality}


def main() -> None:
    cfg = configure(Config)
    jobs = chosen(cfg.only, JOBS)
    if cfg.nanogpt and not Path(cfg.nanogpt, "model.py").is_file():
        fail(f"--nanogpt={cfg.nanogpt}: no model.py there; give the folder of a clone")
    print(describe_run(runtime.setup("cpu", "float32")))
    with tempfile.TemporaryDirectory() as folder:
        for job in jobs:
            job(cfg, folder)


if __name__ == "__main__":
    terminal.run(main)

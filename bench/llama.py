"""
Our 8 and 4 bits beside llama.cpp's Q8_0 and Q4_0: the same weights, in turn, in one run.

    python -m bench --only=decode --llama=MODEL.gguf            tokens/s of a real model
    python -m bench --only=quality --llama=MODEL.gguf --texts=FILE,FILE    and its perplexity

Any GGUF file that convert.py reads will do; both sides make their formats of what it holds. Needs
pip install llama-cpp-python, best built for the processor at hand, and gguf.
"""
import ctypes
import io
import json
import math
from contextlib import redirect_stdout
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import convert
from bench.race import Race
from configurator import fail
from generate import generate
from kernels.quantised import Quantised, pack
from model import ModelConfig
from plumbing import checkpoint, loading
from plumbing.lookup import Lookup
from tokenizer import Tokenizer

ROWS, PROMPT, WRITTEN, READ = 8, 512, 32, 256 << 20
BILLION = dict(n_layer=22, n_head=32, n_kv_head=4, n_embd=2048, head_dim=64, n_hidden=5632,
               tied=True, qk_norm=False, qkv_bias=False)  # 1.1 billion weights, drawn at random
SMOL_1_7B = BILLION | dict(n_layer=24, n_kv_head=32, n_hidden=8192)  # SmolLM2-1.7B


class Llama:
    """A model in llama.cpp, for up to ROWS texts of up to 2 PROMPT tokens."""

    def __init__(self, path: str):
        import llama_cpp as lib
        lib.llama_log_set(SILENT, None)
        self.lib, self.model = lib, lib.llama_model_load_from_file(
            path.encode(), lib.llama_model_default_params())
        params = lib.llama_context_default_params()
        params.n_ctx, params.n_seq_max = 2 * PROMPT * ROWS, ROWS
        params.n_batch = params.n_ubatch = PROMPT
        params.n_threads = params.n_threads_batch = torch.get_num_threads()
        self.context: Any = lib.llama_init_from_model(self.model, params)
        self.vocab = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(self.model))
        self.bytes = lib.llama_model_size(self.model)
        self.batch = lib.llama_batch_init(PROMPT, 0, 1)

    def read(self, ids: Tensor, start: int, every: bool = False) -> Tensor:
        """Logits after the last of ids (B, T) of each row, (B, V), or after each, (B T, V)."""
        batch, n = self.batch, ids.numel()
        for i, token in enumerate(ids.flatten().tolist()):
            row, at = divmod(i, ids.size(1))
            batch.token[i], batch.pos[i] = token, start + at
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, row
            batch.logits[i] = every or at == ids.size(1) - 1
        batch.n_tokens = n
        if self.lib.llama_decode(self.context, batch):
            raise RuntimeError("llama.cpp did not take the tokens")
        shape = n if every else len(ids), self.vocab
        return torch.from_numpy(np.ctypeslib.as_array(self.lib.llama_get_logits(self.context),
                                                      shape))

    def write(self, prompts: Tensor, n: int) -> list[Tensor]:
        """n greedy tokens for each of prompts (B, T)."""
        self.forget()
        ids = [self.read(prompts, 0).argmax(-1)]
        for at in range(prompts.size(1), prompts.size(1) + n - 1):
            ids.append(self.read(ids[-1][:, None], at).argmax(-1))
        return ids

    def forget(self) -> None:
        self.lib.llama_memory_clear(self.lib.llama_get_memory(self.context), True)


@ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
def SILENT(level: int, text: bytes, data: Any) -> None:
    """Of what llama.cpp says nothing is shown."""


def their_formats(state: dict, sizes: ModelConfig, folder: str) -> dict[str, str]:
    """Write the weights as GGUF, and let llama.cpp round them."""
    import llama_cpp as lib
    lib.llama_log_set(SILENT, None)
    whole, made = f"{folder}/whole.gguf", {}
    to = convert.Config(to="gguf", out=whole, dtype="float32")
    if state["model"]["norm.weight"].dtype == torch.bfloat16:
        to = replace(to, dtype="float16")
    convert.as_gguf(sizes, Tokenizer(state["tokenizer"]), state, to)
    for name in ("q8_0", "q4_0"):
        params = lib.llama_model_quantize_default_params()
        params.ftype = getattr(lib, f"LLAMA_FTYPE_MOSTLY_{name.upper()}")
        params.nthread = torch.get_num_threads()
        made[name] = f"{folder}/{name}.gguf"
        if lib.llama_model_quantize(whole.encode(), made[name].encode(), ctypes.byref(params)):
            raise RuntimeError(f"llama.cpp did not make a {name} of it")
    Path(whole).unlink()
    return made


def opened(cfg, folder: str) -> dict:
    """The checkpoint that convert.py makes of the file."""
    try:
        with redirect_stdout(io.StringIO()):
            convert.take_in(convert.Config(input=cfg.llama, out_dir=f"{folder}/in",
                                           dtype="float32"))
    except (ModuleNotFoundError, OSError, ValueError) as error:
        fail(f"--llama={cfg.llama}: {error}")
    return checkpoint.load(f"{folder}/in")[0]


def contenders(state: dict, folder: str) -> tuple[dict[str, Quantised], dict[str, Llama]]:
    """Our two models and theirs."""
    sizes = ModelConfig(**state["model_config"])
    ours = {f"ours, int{bits}": Quantised(sizes, pack(sizes, state["model"], bits))
            for bits in (8, 4)}
    return ours, {f"llama.cpp, {name}": Llama(path)
                  for name, path in their_formats(state, sizes, folder).items()}


def speed(cfg, folder: str) -> None:
    """Tokens/s of one text and of 8, written after prompts of 16 tokens, and of a prompt of 512.
    `of_read` is the share of the memory's speed, for one text: bytes of the weights times tokens/s
    over those of a sum of 256 MB that took turns. With decode_1b also how fast 1.7B are loaded."""
    state = opened(cfg, folder)
    Lookup.guess = lambda self, ids, most: []  # type: ignore  # theirs reads no guesses either
    if cfg.decode_1b:
        sizes = state["model_config"] | BILLION
        state = {**state, "model_config": sizes, "model": {
            name: torch.empty(shape, dtype=torch.bfloat16).uniform_(-0.03, 0.03)
            for name, shape in convert.shapes(ModelConfig(**sizes)).items()}}
    ours, theirs = contenders(state, folder)
    table = torch.ones(READ // 4)
    for job, rows, read, written in (("1 text", 1, 16, WRITTEN), ("8 texts", ROWS, 16, WRITTEN),
                                     ("prompt", 1, PROMPT, 1)):
        ids = torch.randint(1000, 10_000, (rows, read))
        models: dict[str, Quantised | Llama] = {
            f"{name}, {job}": model for name, model in (ours | theirs).items()}
        race = Race("decode", {name: partial(write, model, ids, written)
                               for name, model in models.items()} | {"limit": table.sum}, cfg)
        for name, model in models.items():
            share = {"of_read": model.bytes / READ * written * race.seconds["limit"]
                     / race.seconds[name]} if job == "1 text" else {}
            race.speed(name, rows * (read if written == 1 else written), "tok/s",
                       mb=model.bytes / 1e6, **share)
        race.speed("limit", READ / 1e9, "GB/s")
    if cfg.decode_1b:
        loading_time(cfg, state, folder)


def loading_time(cfg, state: dict, folder: str) -> None:
    """How large 1.7B weights are in 8 and 4 bits, and how long they take to load from files that
    were read just before. They lie on a grid, so at 4 bits have minima, which is the larger way."""
    sizes = ModelConfig(**state["model_config"] | SMOL_1_7B)
    weights = {name: (torch.arange(shape[-1]) % 16.0).expand(shape)  # one row for all
               for name, shape in convert.shapes(sizes).items()}
    for bits in (8, 4):
        tensors, name = pack(sizes, weights, bits), f"1.7B, int{bits}, loading"
        path = checkpoint.save(f"{folder}/{bits}", 0, {
            **state, "model": tensors, "model_config": asdict(sizes), "optimizer": []})
        race = Race("decode", {name: partial(loading.load_writer, str(path), "cpu", "auto")}, cfg)
        race.row(name, race.seconds[name], "s", gb=sum(t.nbytes for t in tensors.values()) / 1e9)


def write(model: Quantised | Llama, ids: Tensor, n: int) -> object:
    if isinstance(model, Llama):
        return model.write(ids, n)
    return list(generate(model, ids.tolist(), n, temperature=0.0))


def quality(cfg, folder: str) -> None:
    """Perplexity of each file's first 8 windows of 512 tokens: in fp32, ours and theirs."""
    if not cfg.llama or not cfg.texts:
        fail("--only=quality needs --llama=MODEL.gguf and --texts=FILE,FILE")
    state = opened(cfg, folder)
    tok = Tokenizer(state["tokenizer"])
    ours, theirs = contenders(state, folder)
    exact = loading.plain(ModelConfig(**state["model_config"]), state["model"]).eval()
    for path in cfg.texts.split(","):
        text = Path(path).read_text(encoding="utf-8")
        if path.endswith(".jsonl"):
            text = "\n".join(json.loads(line)["text"] for line in text.splitlines())
        text = text[:100_000]
        ids = torch.tensor(tok.encode_ordinary(text)[:8 * PROMPT]).view(-1, PROMPT)
        base = math.nan
        for name, model in {"ours, float32": exact, **ours, **theirs}.items():
            nats = 0.0
            for window in ids:
                if isinstance(model, Llama):
                    model.forget()
                    logits = model.read(window[None], 0, every=True)
                else:
                    with torch.inference_mode():
                        logits = model(window[None])[0]
                nats += float(F.cross_entropy(logits[:-1], window[1:])) / len(ids)
            base = base if base == base else nats
            print(f"quality {name:<28} {math.exp(nats):>10.3f} perplexity"
                  f" | {math.exp(nats - base) - 1:+.2%} | {Path(path).name}", flush=True)

"""
Let a checkpoint write.

    python generate.py --checkpoint=out/pt --prompt="从前有座山" --stream
    python generate.py --checkpoint=out/pt --file=prompts.txt --batch --temperature=0
    python generate.py --checkpoint=out/pt --interactive
    python generate.py --checkpoint=out/sft --chat --stream

One generator of token ids, `generate`, serves a single prompt, a batch, a stream, the samples of
the training scripts and whoever imports it. A checkpoint carries its tokenizer: one file is enough.
"""
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from configurator import configure, fail
from model import KVCache, Transformer
from plumbing.loading import load_model
from tokenizer import StreamDecoder, Tokenizer, render


@dataclass(frozen=True)
class Config:
    checkpoint: str = "out/pt"  # checkpoint file, or folder with checkpoints: the newest valid one
    prompt: str = ""  # text to continue
    file: str = ""  # read the prompt from this file; - is standard input
    batch: bool = False  # with --file: every line that is not empty is a prompt, all run together
    interactive: bool = False  # ask for one prompt after another
    chat: bool = False  # prompts are messages to an assistant; without a prompt: a conversation
    system: str = ""  # with --chat: what the assistant is told first
    stream: bool = False  # print each character as soon as it is whole
    max_tokens: int | None = None  # most tokens to write; None: 200, or as many as there is room
    temperature: float = 0.8  # 0: always the most likely token
    top_k: int = 0  # sample from the k most likely tokens only; 0: all
    top_p: float = 1.0  # sample from the fewest tokens that hold this much probability
    min_p: float = 0.0  # drop tokens less likely than this share of the most likely one
    repetition_penalty: float = 1.0  # above 1: make tokens that have occurred less likely
    seed: int = 0  # the same seed gives the same text
    stop: str = "<|endoftext|>,<|im_end|>"  # special tokens that end the text, comma-separated
    cache: bool = True  # keep keys and values; --cache=False recomputes all of them for each token
    timing: bool = False  # print tokens/s of reading the prompt and of writing
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"  # where to compute
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of the weights; auto: bfloat16 on cuda


def sample(logits: Tensor, seen: list[list[int]], noise: Tensor, temperature: float = 1.0,
           top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0,
           repetition_penalty: float = 1.0) -> Tensor:
    """One token per row, (B,), from logits (B, V): the first at which the summed probabilities pass
    `noise` (B,), uniform numbers below 1. `seen` are the ids so far of each row, for the penalty
    (Keskar et al. 2019, eq. 2). Filters apply in the order top-k, top-p, min-p."""
    logits = logits.float()
    if repetition_penalty != 1.0:
        logits = logits.clone()
        for row, ids in zip(logits, seen):
            at = torch.tensor(sorted(set(ids)), dtype=torch.long, device=row.device)
            was = row[at]
            row[at] = torch.where(was > 0, was / repetition_penalty, was * repetition_penalty)
    if temperature < 1e-5:  # 0, or so low that the division could overflow
        return logits.argmax(-1)
    logits = logits / temperature
    if 0 < top_k < logits.size(-1):
        values, at = logits.topk(top_k)  # k of them even where several are equally likely
        logits = torch.full_like(logits, -torch.inf).scatter(-1, at, values)
    if top_p < 1.0:
        ordered, order = logits.softmax(-1).sort(-1, descending=True)
        before = ordered.cumsum(-1) - ordered  # probability of all more likely tokens
        drop = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, order, before >= top_p)
        logits = logits.masked_fill(drop, -torch.inf)
    probs = logits.softmax(-1)
    if min_p > 0:
        probs = probs * (probs >= min_p * probs.amax(-1, keepdim=True))
    total = probs.cumsum(-1, dtype=torch.float64)
    # right: a token of no probability is never the first past anything
    return torch.searchsorted(total, noise.double()[:, None] * total[:, -1:], right=True)[:, 0]


@torch.inference_mode()
def generate(model: Transformer, prompts: list[list[int]], max_tokens: int, *,
             stop: tuple[int, ...] = (), seed: int = 0, cache: bool = True,
             noise: Tensor | None = None, logps: list[Tensor] | None = None,
             **sampling) -> Iterator[list[int | None]]:
    """Continue token-id prompts of any lengths together. Each item holds the next id of every row,
    None for a row that has stopped; a stop id is given out before its row stops. Ends when all rows
    have, or after `max_tokens`. Sampling settings are those of `sample`. Chance comes from `seed`,
    or is given: `noise` (B, max_tokens). The model's own log P of each id, (B,) per step, is put
    into `logps`. Raises ValueError if a prompt is empty or leaves no room for `max_tokens`."""
    longest = max(map(len, prompts))
    if min(map(len, prompts)) == 0:
        raise ValueError("a prompt must have at least one token")
    limit = model.config.max_seq_len
    if longest + max_tokens > limit:
        room = limit - longest
        raise ValueError(f"a prompt of {longest} tokens and --max_tokens={max_tokens} are more "
                         f"than the {limit} the model can read; " +
                         (f"--max_tokens={room} fits" if room > 0 else "shorten the prompt"))
    weight = model.embed_tokens.weight
    if noise is None:
        noise = torch.rand(max_tokens, len(prompts), generator=torch.Generator().manual_seed(seed))
        noise = noise.t()
    noise = noise.to(weight.device)
    rows = [list(p) for p in prompts]
    running = [True] * len(rows)
    if cache:
        pad, kind = [longest - len(r) for r in rows], weight.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
        kv = KVCache(model.config, len(rows), longest + max_tokens, pad, weight.device, dtype)
        fresh = torch.tensor([[0] * n + r for n, r in zip(pad, rows)], device=weight.device)
    for i in range(max_tokens):
        if cache:
            logits = model.lm_head(model(fresh, kv, hidden=True)[:, -1])  # (B, T) -> (B, V)
        else:
            logits = torch.cat([model(torch.tensor([r], device=weight.device))[:, -1]
                                for r in rows])
        fresh = sample(logits, rows, noise[:, i], **sampling)[:, None]
        if logps is not None:
            logps.append(logits.float().log_softmax(-1).gather(1, fresh)[:, 0])
        ids: list[int | None] = fresh[:, 0].tolist()
        for row, token in enumerate(ids):
            if not running[row]:
                ids[row] = None
                continue
            rows[row].append(token)
            running[row] = token not in stop
        yield ids
        if not any(running):
            return


def replies(model: Transformer, prompts: list[list[int]], max_tokens: int,
            **settings) -> list[list[int]]:
    """The ids that follow each prompt, the stop id included. Settings are those of `generate`."""
    found: list[list[int]] = [[] for _ in prompts]
    for ids in generate(model, prompts, max_tokens, **settings):
        for reply, token in zip(found, ids):
            if token is not None:
                reply.append(token)
    return found


def complete(model: Transformer, tok: Tokenizer, prompts: list[list[int]], max_tokens: int,
             **settings) -> list[str]:
    """The text that follows each prompt, without the stop token."""
    stop = settings.get("stop", ())
    return [tok.decode([token for token in reply if token not in stop])
            for reply in replies(model, prompts, max_tokens, **settings)]


def read_prompts(cfg: Config) -> list[str]:
    """The prompts of the command line. Raises ValueError if there are none, or two sources."""
    if cfg.system and not cfg.chat:
        raise ValueError("--system belongs to --chat")
    talk = cfg.interactive or cfg.chat and not cfg.prompt and not cfg.file
    if bool(cfg.prompt) + bool(cfg.file) + talk != 1:
        raise ValueError("give one of --prompt=TEXT, --file=FILE (- is standard input), "
                         "--interactive and --chat")
    if cfg.batch and not cfg.file:
        raise ValueError("--batch takes its prompts from the lines of a file: give --file=FILE")
    if talk:
        return []
    if cfg.prompt:
        return [cfg.prompt]
    try:
        with open(0 if cfg.file == "-" else cfg.file, encoding="utf-8-sig") as f:
            text = f.read()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{cfg.file}: {error}") from None
    lines = text.split("\n") if cfg.batch else [text.removesuffix("\n")]
    prompts = [line for line in lines if line.strip()]
    if not prompts:
        raise ValueError(f"{cfg.file}: no prompt in it")
    return prompts


def answer(model: Transformer, tok: Tokenizer, prompts: list[list[int]], heads: list[str],
           cfg: Config, stop: tuple[int, ...]) -> list[str]:
    """Print a head and what follows each prompt, with --stream as it is written; what follows."""
    room = model.config.max_seq_len - max(map(len, prompts))
    max_tokens = cfg.max_tokens or max(1, min(200, room))
    decoders = [StreamDecoder(tok) for _ in prompts]
    texts, shown, n = list(heads), 0, 0
    begin = first = last = time.perf_counter()
    for step in generate(model, prompts, max_tokens, stop=stop, seed=cfg.seed, cache=cfg.cache,
                         temperature=cfg.temperature, top_k=cfg.top_k, top_p=cfg.top_p,
                         min_p=cfg.min_p, repetition_penalty=cfg.repetition_penalty):
        last = time.perf_counter()
        first = first if n else last
        n += sum(token is not None for token in step)
        for i, token in enumerate(step):
            if token is not None and token not in stop:
                texts[i] += decoders[i].push(token)
        if cfg.stream:
            print(texts[0][shown:], end="", flush=True)
            shown = len(texts[0])
    for i, decoder in enumerate(decoders):
        texts[i] += decoder.flush()
        print(texts[i][shown:])
    if cfg.timing:
        n_read, n_more = sum(map(len, prompts)), n - len(prompts)  # the prompt gives the first
        print(f"read {n_read} tokens at {n_read / (first - begin):,.0f} tok/s, "
              f"wrote {n} at {n_more / (last - first) if n_more else 0:,.1f} tok/s",
              file=sys.stderr)
    return [text[len(head):] for text, head in zip(texts, heads)]


def system_message(cfg: Config) -> list[dict]:
    return [{"role": "system", "content": cfg.system}] if cfg.system else []


def converse(model: Transformer, tok: Tokenizer, line: str, history: list[dict], cfg: Config,
             stop: tuple[int, ...]) -> None:
    """Answer a line, alone or, with --chat, as the next message of the history, which grows. What
    no longer fits beside a reply is forgotten, oldest first."""
    if not cfg.chat:
        answer(model, tok, [tok.encode_ordinary(line)], [line], cfg, stop)
        return
    messages = [*history, {"role": "user", "content": line}]
    room = model.config.max_seq_len - (cfg.max_tokens or min(200, model.config.max_seq_len // 2))
    keep = len(system_message(cfg))
    ids, _ = render(tok, messages, add_generation_prompt=True)
    while len(ids) > room and len(messages) > keep + 1:
        del messages[keep:keep + 2]  # a question and its reply
        ids, _ = render(tok, messages, add_generation_prompt=True)
    if len(messages) <= len(history):
        print("(the oldest messages no longer fit and are forgotten)", file=sys.stderr)
    reply, = answer(model, tok, [ids], [""], cfg, stop)
    history[:] = [*messages, {"role": "assistant", "content": reply}]


def check(cfg: Config) -> None:
    """Raises ValueError for a setting out of its range, or two that do not go together."""
    for name, low, high in (("temperature", 0, 100), ("top_k", 0, 1 << 30), ("top_p", 1e-9, 1),
                            ("min_p", 0, 1), ("repetition_penalty", 1e-9, 100),
                            ("max_tokens", 1, 1 << 30)):
        value = getattr(cfg, name)
        if value is not None and not low <= value <= high:
            raise ValueError(f"--{name}={value} must lie between {low:g} and {high:g}")
    if cfg.stream and cfg.batch:
        raise ValueError("--stream shows one text as it grows, --batch makes many: choose one")
    if cfg.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device=cuda: no CUDA device here; try --device=cpu")


def main() -> None:
    cfg = configure(Config)
    try:
        check(cfg)
        prompts = read_prompts(cfg)
        device = cfg.device if cfg.device != "auto" else "cuda" if torch.cuda.is_available() else (
            "mps" if torch.backends.mps.is_available() else "cpu")
        dtype = cfg.dtype if cfg.dtype != "auto" else "bfloat16" if device == "cuda" else "float32"
        model, tok = load_model(cfg.checkpoint, torch.device(device), getattr(torch, dtype))
        names = [s for s in cfg.stop.split(",") if s]
        for name in names:
            if name not in tok.special_tokens_set:
                raise ValueError(f"--stop: {name} is none of "
                                 f"{', '.join(sorted(tok.special_tokens_set))}")
        stop = tuple(tok.encode_single_token(name) for name in names)
        if prompts and cfg.chat:
            chats = [[*system_message(cfg), {"role": "user", "content": p}] for p in prompts]
            ids = [render(tok, chat, add_generation_prompt=True)[0] for chat in chats]
            answer(model, tok, ids, [""] * len(ids), cfg, stop)
        elif prompts:
            answer(model, tok, [tok.encode_ordinary(p) for p in prompts], prompts, cfg, stop)
    except (ValueError, RuntimeError) as error:
        fail(f"{error}")
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    history = system_message(cfg)
    while not prompts:
        line = None
        try:
            line = input("\n> ")
            if line:
                converse(model, tok, line, history, cfg, stop)
        except (ValueError, RuntimeError) as error:
            print(error)
        except (EOFError, KeyboardInterrupt):
            print()
            if line is None:  # not while it was writing: Ctrl-C ends only that
                return


if __name__ == "__main__":
    main()

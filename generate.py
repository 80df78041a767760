"""
Let a model write: P(next token) ∝ exp(logit / temperature), one token after another.

    python generate.py                             talk with the newest checkpoint under out/
    python generate.py --prompt="从前有座山"         one text
    echo "Once upon a time" | python generate.py   the same: what comes through a pipe is a prompt
    python generate.py --file=prompts.txt --batch --temperature=0         a text for each line
    python generate.py --checkpoint=out/sft --system="Answer briefly."    a chat

A model that has learnt to answer (SFT, DPO, RL) reads what you type as messages of a chat; a PT
model continues it. The text goes to stdout, remarks go to stderr. The training scripts write with
the same function, `generate`, which serves many prompts at once. To add a sampler, write a function
like `keep_min_p`, and add a setting to `Sampling` and two lines to `sample`.
"""
from plumbing.terminal import ask, fail, murmur, run, say, show, stop_imports
stop_imports(__name__)  # Ctrl-C during the imports below, which take seconds

import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import Annotated, Literal

import torch
from torch import Tensor

from configurator import Count, FilePath, Natural, NotNegative, Positive, Share, configure
from model import Transformer
from plumbing.drawing import draw
from plumbing.files import read_text
from plumbing.loading import Precision, load_writer, newest_checkpoint
from plumbing.lookup import Lookup
from plumbing.prompts import read_prompts_once
from plumbing.thoughts import Answer
from tokenizer import Tokenizer, render

Part = Annotated[float, "above 0, at most 1", lambda x: 0 < x <= 1]
AT_ONCE = 32  # prompts of a batch; their cache must fit into the memory


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn. The defaults draw from the model's own probabilities."""
    temperature: NotNegative = 1.0  # below 1: likely tokens grow likelier; 0: always the likeliest
    top_k: Natural = 0  # draw from the k likeliest tokens only; 0: from all
    top_p: Part = 1.0  # draw from the fewest tokens that hold this much probability
    min_p: Share = 0.0  # drop tokens less probable than this share of the likeliest one
    repetition_penalty: Positive = 1.0  # above 1: tokens that have occurred become less likely


@dataclass(frozen=True)
class Config(Sampling):
    checkpoint: FilePath = ""  # file, or folder: its newest valid one; none: the newest under out/
    prompt: str = ""  # text to continue, or message to answer; without one you are asked
    file: FilePath = ""  # read the prompt from this file; - is standard input
    batch: bool = False  # every line of the file that is not empty is a prompt, 32 run together
    interactive: bool = False  # ask for one prompt after another, each on its own
    chat: bool | None = None  # prompts are messages; None: if the model has learnt to answer
    system: str = ""  # what the assistant is told before the chat
    think: bool = False  # let a model that can (Qwen3) think before it answers; shown on stderr
    stream: bool | None = None  # print text while it is written; None: if there is one prompt
    max_tokens: Count | None = None  # most tokens to write; None: 200, or what there is room for
    temperature: NotNegative = 0.8  # below 1: likely tokens grow likelier; 0: always the likeliest
    seed: int = 0  # the same seed gives the same text
    stop: bool = True  # end where the model ends its text; --stop=False: write on to max_tokens
    cache: bool = True  # keep keys and values; --cache=False computes all of them for each token
    timing: bool = False  # say how many tokens/s were read and written
    settings: bool = False  # say all settings first
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"  # where to compute
    dtype: Precision = "auto"  # of the weights; auto: bfloat16 on cuda, int8 on a CPU if it pays


def penalise(logits: Tensor, seen: list[list[int]], penalty: float) -> Tensor:
    """Make the ids of each row that have occurred less likely: their positive logits are divided by
    `penalty`, negative ones multiplied (Keskar et al. 2019, equation 2)."""
    logits = logits.clone()
    for row, ids in zip(logits, seen):
        at = torch.tensor(ids, dtype=torch.long, device=row.device)
        row[at] = torch.where(row[at] > 0, row[at] / penalty, row[at] * penalty)
    return logits


def keep_likeliest(logits: Tensor, k: int, p: float) -> Tensor:
    """Keep the k likeliest tokens (k = 0: all) and of these the fewest that hold p of their
    probability (Holtzman et al. 2020); -inf for the others. Of equals, too, exactly k stay."""
    # without k, the likeliest 100 often hold p, and sorting all is slow
    for n in (k,) if k else (100, 1000, 10_000, logits.size(-1)):
        values, ids = logits.topk(min(n, logits.size(-1)))
        probs = (values - (values if k else logits).logsumexp(-1, keepdim=True)).exp()
        if (probs.sum(-1) >= p).all():
            break
    if p < 1:
        likelier = probs.cumsum(-1) - probs  # the probability of all likelier tokens
        values = values.masked_fill(likelier >= p, -torch.inf)
    return torch.full_like(logits, -torch.inf).scatter(-1, ids, values)


def keep_min_p(logits: Tensor, p: float) -> Tensor:
    """-inf for tokens with less than p times the highest probability (Nguyen et al. 2024)."""
    probs = logits.softmax(-1)
    return logits.masked_fill(probs < p * probs.amax(-1, keepdim=True), -torch.inf)


def sample(logits: Tensor, seen: list[list[int]], noise: Tensor, **settings) -> Tensor:
    """One token per row, (B,), from logits (B, V), by the settings of `Sampling`. `seen` are the
    ids of each row so far, `noise` (B,) a uniform number in [0, 1) for each."""
    how = Sampling(**settings)
    logits = logits.float()
    if how.repetition_penalty != 1:
        logits = penalise(logits, seen, how.repetition_penalty)
    if how.temperature < 1e-5:  # 0, or so low that the division could overflow
        return logits.argmax(-1)
    logits = logits / how.temperature
    if how.top_k or how.top_p < 1:
        logits = keep_likeliest(logits, how.top_k, how.top_p)
    if how.min_p > 0:
        logits = keep_min_p(logits, how.min_p)
    return draw(logits.softmax(-1), noise)


@torch.inference_mode()
def generate(model: Transformer, prompts: list[list[int]], max_tokens: int, *,
             stop: tuple[int, ...] = (), seed: int = 0, cache: bool = True,
             noise: Tensor | None = None, logps: list[Tensor] | None = None,
             quoting: bool = False, **sampling) -> Iterator[list[int | None]]:
    """Continue prompts of token ids, of any lengths, together. Each item holds the next id of each
    row: at last a stop id, then None. It ends when all rows have stopped, or after `max_tokens`.
    `sampling` are settings of `Sampling`. Chance comes from `seed` or is given, `noise` (B,
    max_tokens). `logps`, an empty list, is filled with the model's own log P of each id, (B,) per
    step. With `quoting`, the repetition penalty knows only what the model has written, so that it
    may quote its sources. Raises ValueError if a prompt is empty or leaves no room to write."""
    if not all(prompts) or max_tokens < 1:
        raise ValueError("a prompt, and what follows it, must have at least one token")
    longest, limit = max(map(len, prompts)), model.config.max_seq_len
    if longest + max_tokens > limit:
        way = f"--max_tokens={limit - longest} fits" if longest < limit else "shorten the prompt"
        raise ValueError(f"a prompt of {longest} tokens and --max_tokens={max_tokens} are more "
                         f"than the {limit} the model can read; {way}")
    place, chance = model.norm.weight.device, torch.Generator().manual_seed(seed)
    if noise is None:
        noise = torch.rand(max_tokens, len(prompts), generator=chance).t()
    noise = noise.to(place)
    rows, running = [list(prompt) for prompt in prompts], [True] * len(prompts)
    if cache:
        kv, state = read_prompts_once(model, prompts, max_tokens)
        ahead = model.lm_head(state)
    # ahead: logits (B, 1, V) of the next token. With the last token a model in 8 or 4 bits reads a
    # guess of what comes next (plumbing/lookup.py); then ahead has the logits after its ids, too
    lookup, guess, fresh = Lookup(model), [], torch.empty(0)
    for i in range(max_tokens):
        if guess and guess[0] == rows[0][-1]:
            guess, ahead = guess[1:], ahead[:, 1:]
        elif cache and i:  # read the new token of each row, fresh (B, 1), and a guess after it
            kv.length -= len(guess)  # forget what was left of the last one, for it was wrong
            if guess := lookup.guess(rows[0], max_tokens - i - 1) if len(rows) == 1 else []:
                fresh = torch.cat((fresh, fresh.new_tensor([guess])), dim=1)
            ahead = model(fresh, kv)
        elif not cache:
            ahead = torch.cat([model(torch.tensor([row], device=place))[:, -1:] for row in rows])
        logits = ahead[:, 0]  # (B, 1 + guess, V) -> (B, V)
        seen = [row[len(prompt) if quoting else 0:] for row, prompt in zip(rows, prompts)]
        fresh = sample(logits, seen, noise[:, i], **sampling)[:, None]
        if logps is not None:
            logps.append(logits.float().log_softmax(-1).gather(1, fresh)[:, 0])
        ids = fresh[:, 0].tolist()
        for row, token in zip(rows, ids):
            row.append(token)
        yield [token if runs else None for token, runs in zip(ids, running)]
        running = [runs and token not in stop for token, runs in zip(ids, running)]
        if not any(running):
            return


def replies(model: Transformer, prompts: list[list[int]], max_tokens: int,
            **settings) -> list[list[int]]:
    """The ids that follow each prompt, the stop id included. Settings are those of `generate`."""
    steps = generate(model, prompts, max_tokens, **settings)
    return [[token for token in row if token is not None] for row in zip(*steps)]


def complete(model: Transformer, tok: Tokenizer, prompts: list[list[int]], max_tokens: int,
             **settings) -> list[str]:
    """The text that follows each prompt, without the stop token."""
    stop = settings.get("stop", ())
    return [tok.decode([token for token in reply if token not in stop])
            for reply in replies(model, prompts, max_tokens, **settings)]


def read_prompts(cfg: Config) -> list[str]:
    """The prompts of the command line, of a file or from a pipe; [] to ask the user for them.
    Raises ValueError if there are two sources, or nothing in one."""
    if bool(cfg.prompt) + bool(cfg.file) + cfg.interactive > 1:
        raise ValueError("give one of --prompt=TEXT, --file=FILE and --interactive")
    asked = cfg.interactive or bool(cfg.chat) or sys.stdin.isatty()
    file = cfg.file or ("" if cfg.prompt or asked else "-")
    if cfg.batch and not file:
        raise ValueError("--batch takes its prompts from the lines of a file: give --file=FILE")
    if not file:
        return [cfg.prompt] if cfg.prompt else []
    text = read_text(file).removesuffix("\n")
    prompts = [line for line in (text.split("\n") if cfg.batch else [text]) if line.strip()]
    if not prompts:
        raise ValueError(f"--file={file}: no prompt in it")
    return prompts


def answer(model: Transformer, tok: Tokenizer, prompts: list[str], cfg: Config,
           history: list[dict] | None = None) -> list[str]:
    """Print, and return, each prompt and what follows it; with the history of a chat, a reply."""
    ids = [[*tok.begin, *tok.encode_ordinary(prompt)] if history is None else render(
        tok, [*history, {"role": "user", "content": prompt}], True, cfg.think)[0]
        for prompt in prompts]
    texts = list(prompts) if history is None else [""] * len(prompts)
    max_tokens = cfg.max_tokens or max(1, min(200, model.config.max_seq_len - max(map(len, ids))))
    if len(ids) > 1 and not cfg.max_tokens and max_tokens < 200:
        say(f"the longest of {len(ids)} prompts leaves each text {max_tokens} tokens")
    stop, stream = tok.stop if cfg.stop else (), len(ids) == 1 and cfg.stream is not False
    decoders = [Answer(tok, row, murmur if stream else str) for row in ids]
    shown, n, clock = 0, 0, [time.perf_counter()]
    for step in generate(model, ids, max_tokens, stop=stop, seed=cfg.seed, cache=cfg.cache,
                         **{f.name: getattr(cfg, f.name) for f in fields(Sampling)}):
        clock.append(time.perf_counter())
        n += sum(token is not None for token in step)
        for i, token in enumerate(step):
            if token is not None and token not in stop:
                texts[i] += decoders[i].push(token)
        if stream:
            show(texts[0][shown:])
            shown = len(texts[0])
    for i, decoder in enumerate(decoders):
        texts[i] += decoder.flush()
        show(texts[i][shown:] + "\n")
    if cfg.timing:  # the first token comes when the prompt has been read
        n_read, n_more, seconds = sum(map(len, ids)), n - len(ids), clock[-1] - clock[1]
        say(f"read {n_read} tokens at {n_read / (clock[1] - clock[0]):,.0f} tok/s, "
            f"wrote {n} at {n_more / seconds if n_more else 0:,.1f} tok/s")
    return texts


def converse(model: Transformer, tok: Tokenizer, line: str, history: list[dict] | None,
             cfg: Config) -> None:
    """Continue a line; with the history of a chat, reply to it as the next message, and keep both.
    Where no room is left for a reply, the oldest messages are forgotten, but not the system's."""
    if history is None:
        answer(model, tok, [line], cfg)
        return
    room = model.config.max_seq_len - (cfg.max_tokens or min(200, model.config.max_seq_len // 2))
    kept, asked = list(history), {"role": "user", "content": line}
    first = 1 if cfg.system else 0  # of the messages that may be forgotten
    while len(kept) > first and len(render(tok, [*kept, asked], True, cfg.think)[0]) > room:
        del kept[first:first + 2]  # a question and its reply
    if len(kept) < len(history):
        say("(the oldest messages no longer fit and are forgotten)")
    reply, = answer(model, tok, [line], cfg, kept)
    history[:] = [*kept, asked, {"role": "assistant", "content": reply}]


def talk(model: Transformer, tok: Tokenizer, history: list[dict] | None, cfg: Config) -> None:
    """Ask for one line after another. Ctrl-C ends the text that is being written, or the talk."""
    while True:
        line = ""
        try:
            if line := ask():
                converse(model, tok, line, history, cfg)
        except (ValueError, RuntimeError) as error:
            say(error)
        except (EOFError, KeyboardInterrupt):
            say("")
            if not line:
                return


def main() -> None:
    cfg = configure(Config, show=False)
    for f in fields(cfg) if cfg.settings else ():
        say(f"{f.name:<20} {getattr(cfg, f.name)!r}")
    try:
        if cfg.stream and cfg.batch:
            raise ValueError("--stream shows one text as it grows, --batch makes many: choose one")
        prompts = read_prompts(cfg)
        model, tok = load_writer(cfg.checkpoint or newest_checkpoint(), cfg.device, cfg.dtype)
        chat = cfg.chat if cfg.chat is not None else model.kind != "pt" and not cfg.interactive
        if cfg.system and not chat:
            raise ValueError("--system belongs to a chat: give --chat")
        told = [{"role": "system", "content": cfg.system}] if cfg.system else []
        history = told if chat else None
        if not (prompts and cfg.checkpoint):
            say(f"{model.path} (stage {model.kind}) {'answers' if chat else 'continues'} what you "
                f"type{'' if prompts else '; Ctrl-C ends it'}")
        for i in range(0, len(prompts), AT_ONCE):
            some = replace(cfg, seed=cfg.seed + i)
            answer(model, tok, prompts[i:i + AT_ONCE], some, history)
        if not prompts:
            talk(model, tok, history, cfg)
    except (ValueError, RuntimeError) as error:
        fail(f"{error}")


if __name__ == "__main__":
    run(main)

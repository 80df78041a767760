"""
Many texts are written at once, each of which comes and goes when it likes.

    batch = Batch(model, rows=8, window=2048)
    batch.submit(Text(prompt_ids, max_tokens=50, stop=tok.stop, on_token=print))   # in any thread
    batch.run()                                                 # in a thread of its own, for ever

All rows share one KVCache and end at the same column; shorter ones are padded on the left. Between
two steps a text may join: its prompt is read into a cache of its own, a part at a time so that the
others do not wait, and is then copied into a free row. What a text has in common with one before
it, such as the system prompt or the first turns of a chat, is copied instead of read.
"""
import queue
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from os.path import commonprefix
from typing import Any

import torch
from torch import Tensor

from model import KVCache, Transformer
from plumbing.lookup import Lookup

PART = 128  # tokens of a prompt that are read between two steps
Sampler = Callable[..., Tensor]


@dataclass(eq=False)
class Text:
    """A text to write. `on_token(id, log P, {id: log P of the likeliest})` is called in the thread
    of the batch for each token, with None for the id at the end; then `ended` says why: "stop" or
    "length"."""
    prompt: list[int]
    max_tokens: int
    on_token: Callable[[int | None, float, dict[int, float]], None]
    stop: tuple[int, ...] = ()
    seed: int = 0
    sampling: dict[str, Any] = field(default_factory=dict)  # settings of generate.Sampling
    quoting: bool = False  # the repetition penalty spares what only the prompt has said
    top_logprobs: int = -1  # how many of the likeliest tokens to report; -1: no log P at all
    cancelled: bool = False  # set by whoever no longer wants the text
    ended: str = ""

    def __post_init__(self) -> None:
        self.ids = list(self.prompt)
        self.chance = torch.Generator().manual_seed(self.seed)
        self.cache: KVCache | None = None  # of its own, while the prompt is read
        self.reused = 0  # tokens of the prompt that were copied
        self.lookup: Lookup  # guesses how it goes on


class Batch:
    """The texts that are being written and those that wait. `sample` is generate.sample."""

    def __init__(self, model: Transformer, sample: Sampler, rows: int, window: int,
                 waiting: int = 64):
        self.model, self.sample, self.window = model, sample, window
        weight = model.norm.weight
        self.cache = KVCache(model.config, rows, window, None, weight.device, weight.dtype)
        self.store = self.cache.kv  # (layers, 2, rows, heads, window, D); the first rows are in use
        self.texts: list[Text] = []  # one for each row in use
        self.reading: Text | None = None  # the next, while its prompt is read
        self.waiting: queue.SimpleQueue[Text | None] = queue.SimpleQueue()
        self.room = rows + waiting  # most texts that may be written, read or waiting
        self.wanted: list[Text] = []  # those texts, as the last `submit` found them
        self.past: deque[tuple[list[int], Tensor]] = deque(maxlen=rows)  # ended: ids, their kv
        self.over = False
        self.tokens_read = self.copied = self.written = 0
        self.seconds = 0.0  # tokens; time that writing took

    def submit(self, text: Text) -> bool:
        """Hand in a text; False if too many wait, or nothing is written any more."""
        self.wanted = [t for t in self.wanted if not (t.ended or t.cancelled)]
        if self.over or len(self.wanted) >= self.room:
            return False
        self.wanted.append(text)
        self.waiting.put(text)
        return True

    def run(self) -> None:
        """Write until `stop` is called. An error, for instance too little memory, ends all texts,
        and `over` says so: it must not leave anyone waiting."""
        try:
            self.write()
        finally:
            self.over = True
            left = [*self.texts, self.reading]
            while self.waiting.qsize():
                left.append(self.waiting.get())
            for text in dict.fromkeys(filter(None, left)):
                text.ended = "length"  # cut short
                text.on_token(None, 0.0, {})

    def write(self) -> None:
        while not self.over:
            free = not self.reading and len(self.texts) < self.store.size(2)
            if free and (not self.texts or self.waiting.qsize()):
                self.reading = self.waiting.get()  # waits for a text, or for None of `stop`
                continue
            start = time.perf_counter()
            if self.reading and self.read(self.reading):
                self.reading = None
            if self.texts:
                self.step()
            self.seconds += time.perf_counter() - start

    def stop(self) -> None:
        """End all texts where they are. A signal may call this at any moment, inside `submit` too:
        a SimpleQueue takes no lock that its owner could wait for."""
        self.over = True
        self.waiting.put(None)

    def counts(self) -> dict[str, float]:
        return {"texts_writing": len(self.texts), "texts_waiting": self.waiting.qsize(),
                "tokens_read": self.tokens_read, "tokens_copied": self.copied,
                "tokens_written": self.written,
                "tokens_per_second": self.written / max(self.seconds, 1e-9)}

    @torch.inference_mode()
    def read(self, text: Text) -> bool:
        """Read a part of the prompt. True when it has joined, or is no longer wanted."""
        if text.cancelled:
            text.on_token(None, 0.0, {})
            return True
        if text.cache is None:
            text.lookup, weight = Lookup(self.model), self.model.norm.weight
            text.cache = KVCache(self.model.config, 1, len(text.prompt), None, weight.device,
                                 weight.dtype)
            common, kv = self.longest_prefix(text.prompt)
            text.cache.kv[..., :common, :] = kv[..., :common, :]
            text.cache.length = text.reused = common
        at = text.cache.length
        ids = torch.tensor([text.prompt[at:at + PART]], device=text.cache.kv.device)
        hidden = self.model(ids, text.cache, hidden=True)
        if text.cache.length < len(text.prompt):
            return False
        self.copied += text.reused
        self.tokens_read += len(text.prompt) - text.reused
        self.join(text, text.cache.kv)
        self.take(len(self.texts) - 1, self.model.lm_head(hidden[:, -1]))
        self.leave()
        return True

    def longest_prefix(self, prompt: list[int]) -> tuple[int, Tensor]:
        """How many first tokens of a prompt, but not its last, stand in a text that is being
        written or has ended, and (layers, 2, 1, heads, length, D) keys and values of that text."""
        known = [(text.ids, self.row(i)) for i, text in enumerate(self.texts)] + [*self.past]
        shared = [len(commonprefix((ids[:kv.size(-2)], prompt[:-1]))) for ids, kv in known]
        best = max(shared, default=0)
        return best, known[shared.index(best)][1] if best else self.store[:, :, :1, :, :0]

    def row(self, i: int) -> Tensor:
        """Keys and values of a row, without its padding."""
        return self.store[:, :, i:i + 1, :, int(self.cache.pad[i]):self.cache.length]

    def join(self, text: Text, kv: Tensor) -> None:
        """Put a text into the next free row, so that it ends at the common column."""
        n, row = kv.size(-2), len(self.texts)
        if not row:
            self.cache.length = n
        self.shift(max(0, n - self.cache.length))
        self.store[:, :, row:row + 1, :, self.cache.length - n:self.cache.length] = kv
        self.texts.append(text)
        self.use([*self.cache.pad.tolist()[:row], self.cache.length - n])
        text.cache = None

    def shift(self, by: int) -> None:
        """Move all rows right (left if negative) by so many columns."""
        if by and self.texts:
            old, n = self.cache.length, len(self.texts)
            kept = self.store[:, :, :n, :, max(0, -by):old].clone()
            self.store[:, :, :n, :, max(0, by):old + by] = kept
            self.cache.length = old + by
            self.use((self.cache.pad[:n] + by).tolist())

    def use(self, pad: list[int]) -> None:
        """Let the cache show as many rows as there are paddings."""
        self.cache.kv = self.store[:, :, :len(pad)]
        self.cache.pad = torch.tensor(pad, dtype=torch.long, device=self.store.device)
        self.cache.padded = any(pad)

    @torch.inference_mode()
    def step(self) -> None:
        """Write a token of every text; of one that is alone, all that were guessed right, too."""
        if self.cache.length == self.window:  # the longest text has ended, so there is padding
            self.shift(-int(self.cache.pad.min()))
        text, guess = self.texts[0], []
        if len(self.texts) == 1:
            left = len(text.prompt) + text.max_tokens - len(text.ids)
            guess = text.lookup.guess(text.ids, min(left, self.window - self.cache.length) - 1)
        fresh = torch.tensor([[text.ids[-1], *guess] for text in self.texts],
                             device=self.store.device)
        logits = self.model.lm_head(self.model(fresh, self.cache, hidden=True))
        for place, guessed in enumerate([*guess, -1], 1):
            for i in range(len(self.texts)):
                self.take(i, logits[i:i + 1, place - 1])
            if text.ended or text.ids[-1] != guessed:
                break
        self.cache.length += place - 1 - len(guess)  # what was wrong is forgotten
        self.leave()

    def take(self, i: int, logits: Tensor) -> None:
        """Draw a token of row i from its logits (1, V), and tell whoever wants it."""
        text = self.texts[i]
        noise = torch.rand(1, generator=text.chance).to(logits.device)
        seen = text.ids[len(text.prompt) * text.quoting:]
        token = int(self.sample(logits, [seen], noise, **text.sampling))
        logp, likeliest = 0.0, {}
        if text.top_logprobs >= 0:
            logps = logits[0].float().log_softmax(-1)
            values, ids = logps.topk(text.top_logprobs)
            logp, likeliest = float(logps[token]), dict(zip(ids.tolist(), values.tolist()))
        text.ids.append(token)
        self.written += 1
        text.on_token(token, logp, likeliest)
        if token in text.stop:
            text.ended = "stop"
        elif len(text.ids) - len(text.prompt) == text.max_tokens:
            text.ended = "length"

    def leave(self) -> None:
        """Free the rows of texts that have ended or are no longer wanted: the last row moves in."""
        pad = self.cache.pad.tolist()
        for i in reversed(range(len(self.texts))):
            text = self.texts[i]
            if text.ended or text.cancelled:
                self.past.append((text.ids[:-1], self.row(i).clone()))
                self.store[:, :, i] = self.store[:, :, len(self.texts) - 1]
                self.texts[i], pad[i] = self.texts[-1], pad[-1]
                self.texts.pop(), pad.pop()
                self.use(pad)
                text.on_token(None, 0.0, {})

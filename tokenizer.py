"""
Byte-level BPE (Sennrich et al. 2016): train it on bilingual text, load it as a tiktoken.Encoding,
and turn chats into token ids that no text can forge.

    python tokenizer.py --input=PATHS --vocab_size=16384 --out=FILE    (PATHS: files, folders, a,b)
    python tokenizer.py --input=input.txt --kind=char --out=FILE       one token per character

The text is cut into pieces (PATTERN); inside the pieces the most frequent pair of neighbouring
tokens becomes a new token, until the vocabulary is full. The file it writes is text: a line of JSON
(pattern, special tokens, sha256), then `base64(token bytes) rank` lines as tiktoken reads them.
"""
import base64
import codecs
import hashlib
import heapq
import json
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np
import regex  # comes with tiktoken, which needs it too
import tiktoken

from configurator import configure, fail
from corpus import (BadLine, BadLines, Batch, Document, find_files, parallel, parse, read_batches,
                    write_text)

SPECIALS = ("<|endoftext|>", "<|pad|>", "<|im_start|>", "<|im_end|>")
ROLES = ("system", "user", "assistant")

# contractions | runs of Han | words of other scripts with one leading space | single digits |
# punctuation and symbols with line ends behind them | line ends | spaces
PATTERN = (r"'(?i:[sdmt]|ll|ve|re)|\p{Han}+| ?[^\s\p{N}\p{Han}\p{P}\p{S}\p{C}]+|\p{N}"
           r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
CHAR_PATTERN = r"(?s:.)"


@dataclass(frozen=True)
class Config:
    input: str = "out/toyworld"  # text to train on: files or folders, comma-separated
    out: str = "out/toyworld/tokenizer.txt"  # the file to write
    kind: Literal["bpe", "char"] = "bpe"  # bpe, or char: one token per character (--vocab_size unused)
    vocab_size: int = 1024  # tokens, the 256 bytes and 4 special ones included
    max_mb: int = 100  # read about this much text, evenly spread over a larger input
    text_field: str = "text"  # field of a JSONL line that holds the text
    on_bad_line: Literal["stop", "skip"] = "stop"  # at a line that is not as it should be
    workers: int = 0  # processes that count pieces; 0: one per core


# ---------------------------------------------------------------------------- training

def count_pieces(texts: Iterable[str], pattern: str = PATTERN) -> Counter[bytes]:
    """How often each piece occurs, as UTF-8."""
    cut = regex.compile(pattern).findall
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(cut(text))
    return Counter({piece.encode(): n for piece, n in counts.items()})


def train_bpe(counts: Counter[bytes], n_tokens: int,
              report: Callable[[int], None] = lambda n: None) -> list[bytes]:
    """The `n_tokens` byte strings, 256 single bytes first, that BPE finds in the counted pieces;
    fewer if no pair occurs twice any more.

    All pieces lie behind one another in one array of token ids, a doubly linked list in which a
    merge unlinks its right half; `places` knows where each pair starts. So a merge touches only
    its own occurrences, all of them at once with numpy. A pair gets all its places the moment the
    younger of its tokens is made, so counts only fall and a heap with stale entries is enough.
    """
    pieces = sorted(counts)  # a fixed order, whatever order the workers counted in
    ids = np.frombuffer(b"\0" + b"\0".join(pieces) + b"\0", np.uint8).astype(np.int32)
    ends = np.cumsum([0] + [len(p) + 1 for p in pieces])  # where the separators are
    weight = np.repeat(np.array([0] + [counts[p] for p in pieces]), np.diff(ends, prepend=-1))
    ids[ends] = -1
    right = np.arange(1, len(ids) + 1, dtype=np.int32)
    left = np.arange(-1, len(ids) - 1, dtype=np.int32)
    right[-1] = len(ids) - 1  # the last separator is its own neighbour

    tokens = [bytes([i]) for i in range(256)]
    rank = {token: i for i, token in enumerate(tokens)}
    pair_count: dict[int, int] = {}
    places: dict[int, np.ndarray] = {}
    heap: list[tuple[float, int]] = []
    V = n_tokens

    def add(at: np.ndarray) -> None:
        """Take the pairs that start at the sorted places `at` into count, places and heap."""
        keys = ids[at] * np.int64(V) + ids[right[at]]
        order = np.argsort(keys, kind="stable")
        keys, at = keys[order], at[order]
        starts = np.flatnonzero(np.diff(keys, prepend=-1))
        sums = np.add.reduceat(weight[at], starts) if len(at) else []
        bounds = np.append(starts, len(at)).tolist()
        for i, (key, n) in enumerate(zip(keys[starts].tolist(), np.asarray(sums).tolist())):
            known = tokens[key // V] + tokens[key % V] in rank
            if n < 2 and not known:
                continue  # counts only fall: never worth a token
            new = at[bounds[i]:bounds[i + 1]]
            places[key] = np.concatenate((places[key], new)) if key in places else new
            pair_count[key] = pair_count.get(key, 0) + n
            # tiktoken joins whatever spells a token: such a pair is merged at once, for free
            heapq.heappush(heap, (-np.inf if known else -pair_count[key], key))

    def merge(key: int, new: int) -> None:
        """Replace the pair `key` by the token `new` wherever it stands, leftmost first."""
        a, b = divmod(key, V)
        at = np.sort(places.pop(key))
        del pair_count[key]
        at = at[(ids[at] == a) & (ids[right[at]] == b)]
        if a == b:  # of a a a only the first two are joined
            run = np.flatnonzero(np.append(True, right[at[:-1]] != at[1:])) if len(at) else at
            length = np.diff(np.append(run, len(at)))
            at = at[(np.arange(len(at)) - np.repeat(run, length)) % 2 == 0]
        if not len(at):
            return
        gone = right[at]
        before, after = left[at], right[gone]
        lost = np.concatenate((ids[before] * np.int64(V) + a, b * np.int64(V) + ids[after]))
        ids[at], ids[gone] = new, -2
        # a neighbour that went too was counted as the right neighbour of its own left half
        real = np.concatenate(((ids[before] >= 0), ids[after] != -1))
        keys, index = np.unique(lost[real], return_inverse=True)
        falls = np.bincount(index, np.concatenate((weight[at], weight[at]))[real])
        for lost_key, n in zip(keys.tolist(), falls.tolist()):
            if lost_key in pair_count:
                pair_count[lost_key] -= int(n)
        right[at], left[after] = after, at
        fresh = np.concatenate((left[at], at))
        add(np.unique(fresh[(ids[fresh] >= 0) & (ids[right[fresh]] >= 0)]))

    add(np.flatnonzero((ids[:-1] >= 0) & (ids[1:] >= 0)))
    while heap and len(tokens) < n_tokens:
        priority, key = heapq.heappop(heap)
        n = pair_count.get(key, 0)
        if n < 2 and priority != -np.inf:
            continue
        if priority != -np.inf and n < -priority:
            heapq.heappush(heap, (-n, key))  # it has fallen since
            continue
        token = tokens[key // V] + tokens[key % V]
        if token not in rank:
            rank[token] = len(tokens)
            tokens.append(token)
            report(len(tokens))
            for i in range(1, len(token)):  # other pairs that spell the same token
                a, b = rank.get(token[:i]), rank.get(token[i:])
                if a is not None and b is not None and a * V + b in pair_count:
                    heapq.heappush(heap, (-np.inf, a * V + b))
        if key in pair_count:
            merge(key, rank[token])
    return tokens


def train_char(counts: Counter[bytes]) -> list[bytes]:
    """256 single bytes, then every longer character of the text, so that nothing is unknown."""
    characters = {c for piece in counts for c in piece.decode()}
    return [bytes([i]) for i in range(256)] + sorted(
        (c.encode() for c in characters if len(c.encode()) > 1), key=lambda c: c.decode())


# ---------------------------------------------------------------------------- the file

def dump(tokens: list[bytes], pattern: str) -> str:
    """A tokenizer as text; special tokens get the ids behind the ranks."""
    ranks = "".join(f"{base64.b64encode(token).decode()} {i}\n" for i, token in enumerate(tokens))
    head = {"khaosz_tokenizer": 1, "pattern": pattern,
            "special_tokens": {name: len(tokens) + i for i, name in enumerate(SPECIALS)}}
    head["sha256"] = _digest(head, ranks)
    return json.dumps(head) + "\n" + ranks


def _digest(head: dict, ranks: str) -> str:
    named = json.dumps([head["pattern"], head["special_tokens"]]) + ranks
    return hashlib.sha256(named.encode()).hexdigest()


class Tokenizer(tiktoken.Encoding):
    """A tiktoken.Encoding with the ids of our special tokens, made from the text of a file."""

    def __init__(self, text: str, name: str = "tokenizer"):
        """Raises ValueError naming `name` if the text is not a tokenizer or is damaged."""
        try:
            first, _, lines = text.partition("\n")
            head = json.loads(first)
            if head["khaosz_tokenizer"] != 1 or head["sha256"] != _digest(head, lines):
                raise ValueError("its contents do not match its sha256")
            ranks = {base64.b64decode(token): int(i) for token, i in map(str.split, lines.splitlines())}
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{name}: not a tokenizer file, or damaged: {error}") from None
        super().__init__(name, pat_str=head["pattern"], mergeable_ranks=ranks,
                         special_tokens=head["special_tokens"])
        self.text, self.sha256 = text, head["sha256"]
        self.endoftext, self.pad, self.im_start, self.im_end = (head["special_tokens"][s] for s in SPECIALS)

    def __reduce__(self):
        return Tokenizer, (self.text, self.name)

    def token_bytes(self) -> list[int]:
        """How many bytes of text each token stands for; special tokens stand for none."""
        special = self._special_tokens.values()
        return [0 if i in special else len(self.decode_single_token_bytes(i)) for i in range(self.n_vocab)]


def load_tokenizer(path: str) -> Tokenizer:
    """Raises ValueError with the file's name if it cannot be read or is damaged."""
    try:
        with open(path, encoding="utf-8") as f:
            return Tokenizer(f.read(), path)
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}; make one with python tokenizer.py") from None
    except UnicodeDecodeError:
        raise ValueError(f"{path}: not a tokenizer file") from None


# ---------------------------------------------------------------------------- chats

def render(tok: Tokenizer, messages: list[dict], add_generation_prompt: bool = False) -> tuple[list[int], list[int]]:
    """A chat as token ids in ChatML, and a mask that is 1 on what the assistant is to learn: its
    content and its <|im_end|>. [{"role": "user", "content": "hi"}] gives
    <|im_start|>user\\nhi<|im_end|>\\n. Contents are encoded apart and as plain text, so whatever they
    say, special ids stand only where the template puts them. Raises ValueError for a bad message."""
    ids: list[int] = []
    mask: list[int] = []
    for i, message in enumerate(messages):
        role, content = message.get("role"), message.get("content")
        if role not in ROLES or not isinstance(content, str):
            raise ValueError(f"message {i}: wanted a role of {', '.join(ROLES)} and a string as "
                             f"content, got {message!r:.80}")
        head, body = [tok.im_start, *tok.encode_ordinary(role + "\n")], tok.encode_ordinary(content)
        learn = int(role == "assistant")
        tail = tok.encode_ordinary("\n")
        ids += [*head, *body, tok.im_end, *tail]
        mask += [0] * len(head) + [learn] * (len(body) + 1) + [0] * len(tail)
    if add_generation_prompt:
        head = [tok.im_start, *tok.encode_ordinary("assistant\n")]
        ids, mask = ids + head, mask + [0] * len(head)
    return ids, mask


class StreamDecoder:
    """Text of a growing list of tokens, given out only in whole characters."""

    def __init__(self, tok: Tokenizer):
        self.tok = tok
        self.utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        """What this token completes: "" inside a character."""
        return self.utf8.decode(self.tok.decode_single_token_bytes(token))

    def flush(self) -> str:
        """What is left at the end: U+FFFD for half a character, else ""."""
        return self.utf8.decode(b"", final=True)


# ---------------------------------------------------------------------------- command line

def count_batch(batch: Batch, pattern: str, text_field: str) -> tuple[Counter, dict[str, str], list[BadLine], int]:
    """A worker's share: pieces, a sample of up to 64 kB per language, bad lines, documents."""
    items = list(parse(batch, text_field, chats=True))
    texts = [d for d in items if isinstance(d, Document)]
    sample: dict[str, str] = {}
    for document in texts:
        if len(sample.get(document.lang, "")) < 1 << 16:
            sample[document.lang] = sample.get(document.lang, "") + document.text
    bad = [b for b in items if isinstance(b, BadLine)]
    return count_pieces((d.text for d in texts), pattern), sample, bad, len(texts)


def main() -> None:
    cfg = configure(Config)
    least = 256 + len(SPECIALS)
    if cfg.kind == "bpe" and cfg.vocab_size <= least:
        fail(f"--vocab_size={cfg.vocab_size} must be more than {least}: every tokenizer has the 256 "
             "bytes and 4 special tokens")
    try:
        files = find_files(cfg.input)
        tokens, sample = train(cfg, files)
    except ValueError as error:
        fail(f"{error}" + ("; make it with: python toyworld.py" if cfg.input == Config.input else ""))
    text = dump(tokens, CHAR_PATTERN if cfg.kind == "char" else PATTERN)
    tok = Tokenizer(text, cfg.out)
    os.makedirs(os.path.dirname(cfg.out) or ".", exist_ok=True)
    write_text(cfg.out, text)
    for lang, passage in sorted(sample.items()):
        n_bytes, n_ids = len(passage.encode()), len(tok.encode_ordinary(passage))
        print(f"{lang}: {n_bytes / n_ids:.2f} bytes/token on {n_bytes:,} bytes of the training text")
    print(f"saved {cfg.out}: {tok.n_vocab:,} tokens, sha256 {tok.sha256[:16]}…")


def train(cfg: Config, files: list[str]) -> tuple[list[bytes], dict[str, str]]:
    """The tokens, and a sample of the text per language. Raises ValueError without usable text."""
    size = sum(os.path.getsize(f) * (3 if f.endswith((".gz", ".parquet")) else 1) for f in files)
    every = max(1, -(-size // (cfg.max_mb << 20)))  # of the batches, one is read
    batches = (b for i, b in enumerate(read_batches(files, cfg.text_field)) if i % every == 0)
    work = partial(count_batch, pattern=CHAR_PATTERN if cfg.kind == "char" else PATTERN,
                   text_field=cfg.text_field)
    start, counts, sample, n_texts, n_bytes = time.time(), Counter(), {}, 0, 0
    bad_lines = BadLines(cfg.on_bad_line)
    for found, part, bad, n in parallel(work, batches, cfg.workers):
        counts.update(found)
        bad_lines.add(bad)
        n_texts += n
        n_bytes = sum(len(piece) * n for piece, n in found.items()) + n_bytes
        for lang, passage in part.items():
            if len(sample.get(lang, "")) < 1 << 20:
                sample[lang] = sample.get(lang, "") + passage
        print(f"\rread {n_bytes / 1e6:,.0f} MB, {len(counts):,} different pieces", end="", flush=True)
    print(f", {time.time() - start:.1f} s" + (f" (every {every}th batch: --max_mb)" if every > 1 else ""))
    bad_lines.finish(n_texts)
    if not counts:
        raise ValueError(f"{cfg.input}: no text in it")
    if cfg.kind == "char":
        return train_char(counts), sample
    start, wanted = time.time(), cfg.vocab_size - len(SPECIALS)

    def report(n: int) -> None:
        if n % 256 == 0:
            print(f"\r{n:,}/{wanted:,} tokens, {time.time() - start:.1f} s", end="", flush=True)

    tokens = train_bpe(counts, wanted, report)
    print(f"\r{len(tokens):,}/{wanted:,} tokens, {time.time() - start:.1f} s")
    if len(tokens) < wanted:
        print(f"the text has no pair left that occurs twice: the vocabulary ends at {len(tokens) + len(SPECIALS):,}")
    return tokens, sample


if __name__ == "__main__":
    main()

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
from plumbing.corpus import (BadLine, BadLines, Batch, Document, Progress, find_files, parallel, parse,
                    read_batches, write_text)

SPECIALS = ("<|endoftext|>", "<|pad|>", "<|im_start|>", "<|im_end|>")
ROLES = ("system", "user", "assistant")

# Words of any script but Han, with one leading space | runs of Han | contractions | punctuation,
# symbols and invisibles, with a leading space and the line ends behind | single digits | line
# ends | other white space. Each character has its branch, since tiktoken drops what none matches;
# there is no lookahead, with which tiktoken's regex overflows its stack on a million spaces.
PATTERN = (r" ?[^\s\p{N}\p{Han}\p{P}\p{S}\p{C}]+|\p{Han}+|'(?i:[sdmt]|ll|ve|re)"
           r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\p{N}|[\r\n]+|[^\S\r\n]+")
CHAR_PATTERN = r"(?s:.)"


@dataclass(frozen=True)
class Config:
    input: str = "out/toyworld/pt.jsonl,out/toyworld/chat.jsonl"  # files or folders to train on
    out: str = "out/toyworld/tokenizer.txt"  # the file to write
    kind: Literal["bpe", "char"] = "bpe"  # char: one token per character, whatever --vocab_size
    vocab_size: int = 1024  # tokens, the 256 bytes and 4 special ones included
    max_mb: int = 100  # read about this much text, evenly spread over a larger input
    text_field: str = "text"  # field of a JSONL line that holds the text
    on_bad_line: Literal["stop", "skip"] = "stop"  # at a line that is not as it should be
    max_bad_fraction: float = 0.01  # with skip: more bad lines than this are an error
    workers: int = 0  # processes that count pieces; 0: one per core


# ---------------------------------------------------------------------------- training

def count_pieces(texts: Iterable[str], pattern: str = PATTERN) -> Counter[bytes]:
    """How often each piece occurs, as UTF-8. The regex module cuts as tiktoken will, but for
    characters too new for the Unicode tables of either."""
    cut = regex.compile(pattern).findall
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(cut(text))
    return Counter({piece.encode(): n for piece, n in counts.items()})


def train_bpe(counts: Counter[bytes], n_tokens: int,
              report: Callable[[int], None] = lambda n: None) -> list[bytes]:
    """The `n_tokens` byte strings, 256 single bytes first, that BPE finds in the counted pieces;
    fewer if no pair occurs twice any more. Of equally frequent pairs the oldest tokens win.

    All pieces lie behind one another in one array of token ids, a doubly linked list in which a
    merge unlinks its right half; `places` knows where each pair starts. So a merge touches only
    its own occurrences, all of them at once with numpy. A pair gets all its places at once, when
    the younger of its tokens is made; from then on its count only falls, so an entry of the heap
    is right or too high, and is put back when it turns out too high. No pair ever spells a token
    that exists: where that token's bytes stand apart, its own merges have joined them before.
    """
    pieces = list(counts)
    ids = np.frombuffer(b"\0" + b"\0".join(pieces) + b"\0", np.uint8).astype(np.int64)
    ends = np.cumsum([0] + [len(p) + 1 for p in pieces])  # where the separators are
    weight = np.repeat(np.array([0] + [counts[p] for p in pieces]), np.diff(ends, prepend=-1))
    ids[ends] = SEPARATOR = -1
    GONE = -2
    right = np.arange(1, len(ids) + 1, dtype=np.int32)
    left = np.arange(-1, len(ids) - 1, dtype=np.int32)
    right[-1] = len(ids) - 1  # the last separator is its own neighbour

    tokens = [bytes([i]) for i in range(256)]
    pair_count: dict[int, int] = {}
    places: dict[int, np.ndarray] = {}
    heap: list[tuple[int, int]] = []
    V = n_tokens  # the pair (a, b) is written a * V + b

    def add(at: np.ndarray) -> None:
        """Take the new pairs that start at the sorted places `at` into count, places and heap."""
        keys = ids[at] * V + ids[right[at]]
        order = np.argsort(keys, kind="stable")
        keys, at = keys[order], at[order]
        starts = np.flatnonzero(np.diff(keys, prepend=-1))
        sums = np.add.reduceat(weight[at], starts) if len(at) else starts
        often = sums >= 2  # the others never will be
        lengths = np.diff(np.append(starts, len(at)))
        for key, n, start, length in zip(*(a[often].tolist()
                                           for a in (keys[starts], sums, starts, lengths))):
            pair_count[key], places[key] = n, at[start:start + length].copy()
            heapq.heappush(heap, (-n, key))

    def merge(key: int, new: int) -> None:
        """Replace the pair `key` by the token `new` wherever it stands, leftmost first."""
        a, b = divmod(key, V)
        at = places.pop(key)
        del pair_count[key]
        at = at[(ids[at] == a) & (ids[right[at]] == b)]
        if a == b:  # in a run, a a a: each second pair overlaps the one before
            run = np.flatnonzero(np.append(True, right[at[:-1]] != at[1:]))
            start = np.repeat(run, np.diff(np.append(run, len(at))))
            at = at[(np.arange(len(at)) - start) % 2 == 0]
        gone = right[at]
        before, after = left[at], right[gone]
        lost = np.concatenate((ids[before] * V + a, b * V + ids[after]))
        ids[at], ids[gone] = new, GONE
        # where two merged pairs touch, the pair between them is lost once, not twice
        real = np.concatenate((ids[before] >= 0, ids[after] != SEPARATOR))
        keys, index = np.unique(lost[real], return_inverse=True)
        falls = np.bincount(index, np.concatenate((weight[at], weight[at]))[real])
        for lost_key, n in zip(keys.tolist(), falls.tolist()):
            if lost_key in pair_count:
                pair_count[lost_key] -= int(n)
        right[at], left[after] = after, at
        fresh = np.unique(np.concatenate((left[at], at)))
        add(fresh[(ids[fresh] >= 0) & (ids[right[fresh]] >= 0)])

    add(np.flatnonzero((ids[:-1] >= 0) & (ids[1:] >= 0)))
    while heap and len(tokens) < n_tokens:
        n, key = heapq.heappop(heap)
        if -n == pair_count[key]:
            tokens.append(tokens[key // V] + tokens[key % V])
            merge(key, len(tokens) - 1)
            report(len(tokens))
        elif pair_count[key] >= 2:
            heapq.heappush(heap, (-pair_count[key], key))
        else:
            del pair_count[key], places[key]
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
        first, _, lines = text.partition("\n")
        try:
            head = json.loads(first)
            intact = head["khaosz_tokenizer"] == 1 and head["sha256"] == _digest(head, lines)
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"{name}: not a tokenizer file, or damaged") from None
        if not intact:
            raise ValueError(f"{name}: damaged: its contents do not match its sha256")
        specials = head["special_tokens"]
        try:  # right hashes do not make right contents, and tiktoken panics on wrong ones
            pairs = [line.split() for line in lines.splitlines()]
            ranks = {base64.b64decode(token): int(i) for token, i in pairs}
            if (list(ranks.values()) != list(range(len(pairs)))
                    or not ranks.keys() >= {bytes([i]) for i in range(256)}
                    or specials != {s: len(pairs) + i for i, s in enumerate(SPECIALS)}):
                raise ValueError("not what tokenizer.py writes")
            super().__init__(name, pat_str=head["pattern"], special_tokens=specials,
                             mergeable_ranks=ranks)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{name}: not a usable tokenizer: {str(error)[:100]}") from None
        self.text, self.sha256 = text, head["sha256"]
        self.endoftext, self.pad, self.im_start, self.im_end = map(specials.get, SPECIALS)

    def __reduce__(self):
        return Tokenizer, (self.text, self.name)

    def token_bytes(self) -> list[int]:
        """How many bytes of text each token stands for; special tokens stand for none."""
        special = self._special_tokens.values()
        return [0 if i in special else len(self.decode_single_token_bytes(i))
                for i in range(self.n_vocab)]


def load_tokenizer(path: str) -> Tokenizer:
    """Raises ValueError with the file's name if it cannot be read or is damaged."""
    try:
        with open(path, encoding="utf-8", newline="") as f:
            return Tokenizer(f.read(), path)
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}; make one with python tokenizer.py") from None
    except UnicodeDecodeError:
        raise ValueError(f"{path}: not a tokenizer file") from None


# ---------------------------------------------------------------------------- chats

def render(tok: Tokenizer, messages: list[dict],
           add_generation_prompt: bool = False) -> tuple[list[int], list[int]]:
    """A chat as token ids in ChatML, and a mask that is 1 on what the assistant is to learn: its
    content and its <|im_end|>. [{"role": "user", "content": "hi"}] gives
    <|im_start|>user\nhi<|im_end|>\n. Contents are encoded apart and as plain text, so whatever
    they say, special ids stand only where the template puts them. A lone surrogate, which no text
    holds but a Python string can, becomes U+FFFD. Raises ValueError for a bad message."""
    ids: list[int] = []
    mask: list[int] = []
    newline = tok.encode_ordinary("\n")
    for i, message in enumerate(messages):
        role, content = (message.get("role"), message.get("content")) \
            if isinstance(message, dict) else (None, None)
        if role not in ROLES or not isinstance(content, str):
            raise ValueError(f"message {i}: wanted a role of {', '.join(ROLES)} and a string as "
                             f"content, got {message!r:.80}")
        head, body = [tok.im_start, *tok.encode_ordinary(role + "\n")], tok.encode_ordinary(content)
        ids += [*head, *body, tok.im_end, *newline]
        learn = int(role == "assistant")
        mask += [0] * len(head) + [learn] * (len(body) + 1) + [0] * len(newline)
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

Share = tuple[Counter[bytes], dict[str, str], list[BadLine], int]


def count_batch(batch: Batch, pattern: str, text_field: str) -> Share:
    """A worker's share: pieces, a sample of up to 64 kB per language, bad lines, documents."""
    items = list(parse(batch, text_field, chats=True))
    documents = [d for d in items if isinstance(d, Document)]
    sample: dict[str, str] = {}
    for d in documents:
        sample[d.lang] = (sample.get(d.lang, "") + d.text)[:1 << 16]
    bad = [b for b in items if isinstance(b, BadLine)]
    return count_pieces((d.text for d in documents), pattern), sample, bad, len(documents)


def train(cfg: Config, progress: Progress) -> tuple[list[bytes], dict[str, str]]:
    """The tokens, and a sample of the text per language. Raises ValueError without usable text."""
    files = find_files(cfg.input)
    size = sum(os.path.getsize(f) * (3 if f.endswith((".gz", ".parquet")) else 1) for f in files)
    every = -(-size // (cfg.max_mb << 20)) or 1  # of the batches, one is read
    batches = (b for i, b in enumerate(read_batches(files, cfg.text_field)) if i % every == 0)
    pattern = CHAR_PATTERN if cfg.kind == "char" else PATTERN
    work = partial(count_batch, pattern=pattern, text_field=cfg.text_field)
    bad_lines = BadLines(cfg.on_bad_line, progress)
    start, counts, sample, n_texts, n_bytes = time.time(), Counter(), {}, 0, 0
    for found, part, bad, n in parallel(work, batches, cfg.workers):
        counts.update(found)
        bad_lines.add(bad)
        n_texts += n
        n_bytes += sum(len(piece) * times for piece, times in found.items())
        for lang, text in part.items():
            sample[lang] = (sample.get(lang, "") + text)[:1 << 20]
        progress.show(f"read {n_bytes / 1e6:,.0f} MB, {len(counts):,} different pieces")
    progress.end()
    bad_lines.finish(n_texts, cfg.max_bad_fraction)
    if not counts:
        raise ValueError(f"{cfg.input}: no text in it")
    some = f" (of {every:,} batches one: --max_mb)" if every > 1 else ""
    print(f"read {n_bytes / 1e6:,.1f} MB{some}, {len(counts):,} different pieces, "
          f"{time.time() - start:.1f} s")
    if cfg.kind == "char":
        return train_char(counts), sample
    start, wanted = time.time(), cfg.vocab_size - len(SPECIALS)
    tokens = train_bpe(counts, wanted, lambda n: progress.show(
        f"{n:,} of {wanted:,} tokens, {time.time() - start:.1f} s"))
    progress.end()
    print(f"{len(tokens):,} of {wanted:,} tokens, {time.time() - start:.1f} s")
    if len(tokens) < wanted:
        print("no pair is left that occurs twice: the vocabulary ends here")
    return tokens, sample


def main() -> None:
    cfg = configure(Config)
    least = 256 + len(SPECIALS)
    if cfg.kind == "bpe" and cfg.vocab_size <= least:
        fail(f"--vocab_size={cfg.vocab_size} must be more than {least}: every tokenizer has the "
             f"256 bytes and {len(SPECIALS)} special tokens")
    if cfg.max_mb < 1 or cfg.workers < 0:
        fail("--max_mb must be at least 1 and --workers at least 0")
    progress = Progress()
    try:
        tokens, sample = train(cfg, progress)
        text = dump(tokens, CHAR_PATTERN if cfg.kind == "char" else PATTERN)
        os.makedirs(os.path.dirname(cfg.out) or ".", exist_ok=True)
        write_text(cfg.out, text)
    except (ValueError, OSError, KeyboardInterrupt) as error:
        progress.end()
        fail(str(error) or "stopped, nothing was written")
    tok = Tokenizer(text, cfg.out)
    for lang, passage in sorted(sample.items()):
        n_bytes, n_ids = len(passage.encode()), len(tok.encode_ordinary(passage))
        print(f"{lang}: {n_bytes / n_ids:.2f} bytes/token on {n_bytes:,} bytes it was trained on")
    print(f"saved {cfg.out}: {tok.n_vocab:,} tokens, sha256 {tok.sha256[:16]}…")


if __name__ == "__main__":
    main()

"""
Byte-level BPE (Sennrich et al. 2016): train it on bilingual text, load it as a tiktoken.Encoding,
and turn chats into token ids that no text can forge.

    python tokenizer.py --input=PATHS --vocab_size=16384 --out=FILE    (PATHS: files, folders, a,b)
    python tokenizer.py --input=input.txt --kind=char --out=FILE       one token per character

Training cuts the text into pieces. Inside the pieces the most frequent pair of neighbouring tokens
becomes a new token, again and again, until the vocabulary is full. The file is text: a line of JSON
(pattern, special tokens, sha256), then `base64(token bytes) rank` lines as tiktoken reads them. The
rank is the token's id: to encode a piece, tiktoken joins the two neighbours whose joint token has
the lowest rank, again and again, until no two can be joined.
"""
from plumbing.terminal import fail, only_talk, run, stop_imports
stop_imports(__name__)  # Ctrl-C during the imports below

import codecs
import hashlib
import json
import os
import time
import unicodedata
from binascii import a2b_base64, b2a_base64
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import regex  # comes with tiktoken, which needs it too
import tiktoken

from configurator import Count, FilePath, Natural, configure
from plumbing.bpe import QWEN2, cuts_character, train_bpe
from plumbing.chats import ROLES, said_in
from plumbing.corpus import Document, find_files, made_by_workers, parse, read_batches, sampled
from plumbing.files import check_place, write_text
from plumbing.jobs import Progress
from plumbing.templates import read_rules

SPECIALS = ("<|endoftext|>", "<|pad|>", "<|im_start|>", "<|im_end|>")

# --kind=han: words of any script but Han, with one leading space | runs of Han | contractions |
# punctuation, symbols and invisibles, with a leading space and the line ends after them | single
# digits | line ends | other white space. Each character has its branch: tiktoken drops what none
# matches. --kind=bpe cuts as Qwen2 does, which llama.cpp knows by name; a word may hold Han, too:
# "It's the 狗dog 12" is It|'s| the| 狗dog| |1|2 in bpe, It|'s| the| |狗|dog| |1|2 in han.
HAN_PATTERN = (r" ?[^\s\p{N}\p{Han}\p{P}\p{S}\p{C}]+|\p{Han}+|'(?i:[sdmt]|ll|ve|re)"
           r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\p{N}|[\r\n]+|[^\S\r\n]+")
CHAR_PATTERN = r"(?s:.)"
KINDS = {"bpe": QWEN2, "han": HAN_PATTERN, "char": CHAR_PATTERN}  # how text is cut into pieces


@dataclass(frozen=True)
class Config:
    input: str = "out/toyworld/pt.jsonl,out/toyworld/chat.jsonl"  # files or folders to train on
    out: FilePath = "out/toyworld/tokenizer.txt"  # the file to write
    kind: Literal["bpe", "han", "char"] = "bpe"  # han: Han stands apart; char: no merges at all
    vocab_size: int = 1024  # tokens, the 256 bytes and the special ones included
    max_mb: Count = 100  # of a larger input, lines drawn at random: about this much text
    on_bad_line: Literal["stop", "skip"] = "stop"  # at a line that is not as it should be
    workers: Natural = 0  # processes that count pieces; 0: one per core


# ---------------------------------------------------------------------------- training

def count_pieces(texts: Iterable[str], pattern: str = HAN_PATTERN) -> Counter[bytes]:
    """How often each piece occurs, as UTF-8. The regex module cuts as tiktoken will, but for
    characters too new for the Unicode tables of either."""
    cut = regex.compile(pattern).findall
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(cut(text))
    return Counter({piece.encode(): n for piece, n in counts.items()})


def slow_bpe(counts: Counter[bytes], n_tokens: int) -> list[bytes]:
    """BPE by the book: join the most frequent pair of neighbouring tokens into a new token, again
    and again, while there is one that occurs twice. Of equally frequent pairs it is the one of the
    lowest ids. A pair that cuts a character stays apart: after 是, what begins a word must not hang
    on it. `train_bpe` finds the same tokens without counting everything anew for each."""
    tokens = [bytes([i]) for i in range(256)]
    pieces = [(list(piece), n) for piece, n in counts.items()]  # as token ids: bytes, at first
    while len(tokens) < n_tokens:
        pairs: Counter[tuple[int, int]] = Counter()
        for ids, n in pieces:
            for a, b in zip(ids, ids[1:]):
                if not cuts_character(tokens[a] + tokens[b]):
                    pairs[a, b] += n
        best = min(pairs, key=lambda pair: (-pairs[pair], pair), default=None)
        if best is None or pairs[best] < 2:
            break
        for ids, _ in pieces:
            for i in range(len(ids) - 1):
                if tuple(ids[i:i + 2]) == best:  # joins shorten ids: past their end is none
                    ids[i:i + 2] = [len(tokens)]
        tokens.append(tokens[best[0]] + tokens[best[1]])
    return tokens


def train_char(counts: Counter[bytes]) -> list[bytes]:
    """256 single bytes, then every longer character of the text, so that nothing is unknown."""
    characters = {c for piece in counts for c in piece.decode()}
    return [bytes([i]) for i in range(256)] + sorted(
        (c.encode() for c in characters if len(c.encode()) > 1), key=lambda c: c.decode())


# ---------------------------------------------------------------------------- the file

def dump(tokens: list[bytes] | dict[bytes, int], pattern: str,
         specials: dict[str, int] | None = None, rules: dict | None = None) -> str:
    """A tokenizer as text. The id of a token is its place in the list, and special tokens get the
    next; a model from elsewhere has a dict of ids of its own, and rules (plumbing/templates.py)."""
    ranks = tokens if isinstance(tokens, dict) else {token: i for i, token in enumerate(tokens)}
    specials = specials or {name: len(tokens) + i for i, name in enumerate(SPECIALS)}
    lines = "".join(f"{b2a_base64(t, newline=False).decode()} {i}\n" for t, i in ranks.items())
    head = {"khaosz_tokenizer": 1, "pattern": pattern, "special_tokens": specials}
    head |= {"rules": rules} if rules else {}
    head["sha256"] = _digest(head, lines)
    return json.dumps(head) + "\n" + lines


def _digest(head: dict, lines: str) -> str:
    told = [head[key] for key in ("pattern", "special_tokens", "rules") if key in head]
    return hashlib.sha256((json.dumps(told) + lines).encode()).hexdigest()


class Tokenizer(tiktoken.Encoding):
    """A tiktoken.Encoding with the ids of its special tokens, made from the text of a file."""

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
            words = lines.split()
            ranks = dict(zip(map(a2b_base64, words[::2]), map(int, words[1::2])))
            ids = [*ranks.values(), *specials.values()]
            if (len(set(ids)) < len(words) / 2 + len(specials) or "" in specials  # one came twice
                    or not 0 <= min(ids) <= max(ids) < 1 << 20
                    or not ranks.keys() >= {bytes([i]) for i in range(256)}):
                raise ValueError("not what tokenizer.py writes")
            # \s+(?!\S) overflows tiktoken's stack on a million spaces; on 9,999 it does not
            super().__init__(name, pat_str=head["pattern"].replace(r"\s+(?", r"\s{1,9999}(?"),
                             special_tokens=specials, mergeable_ranks=ranks)
            self.rules = read_rules(head.get("rules", {}))
            self._find_ids(specials)
        except (ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
            raise ValueError(f"{name}: not a usable tokenizer: {str(error)[:100]}") from None
        self.text, self.sha256, self.pattern = text, head["sha256"], head["pattern"]

    def _find_ids(self, specials: dict[str, int]) -> None:
        """Ids of what the template of a chat puts around its messages."""
        rules, chat = self.rules, self.rules.chat
        encode = partial(self.encode, allowed_special="all")
        self.endoftext, self.pad = specials[rules.endoftext], specials[rules.pad]
        self.stop = tuple(specials[name] for name in rules.stop)
        self.begin, self.chat_begin = encode(rules.begin), encode(chat.begin)
        # role: what is before and after a message
        self.around = {role: tuple(map(encode, getattr(chat, role))) for role in ROLES}
        # what a reply begins with, if the model is to think and if not
        self.opening = {True: encode(chat.think[0]), False: encode(chat.think[1])}
        self.thoughts = specials.get("<think>"), specials.get("</think>")  # begin, end of them
        self.im_start, self.im_end = (side[0] for side in self.around["assistant"])

    def __reduce__(self):
        return Tokenizer, (self.text, self.name)

    def encode_ordinary(self, text: str) -> list[int]:
        text = unicodedata.normalize("NFC", text) if self.rules.nfc else text
        return super().encode_ordinary(text)

    def decode(self, tokens: Iterable[int], errors: str = "replace") -> str:
        return b"".join(map(self.decode_single_token_bytes, tokens)).decode("utf-8", errors)

    def decode_single_token_bytes(self, token: int) -> bytes:
        """b"" for an id without a token: a model may have more rows than its tokenizer."""
        try:
            return super().decode_single_token_bytes(token)
        except KeyError:
            return b""

    def token_bytes(self) -> list[int]:
        """How many bytes of text each token stands for; special tokens stand for none."""
        special = self._special_tokens.values()
        return [0 if i in special else len(self.decode_single_token_bytes(i))
                for i in range(self.n_vocab)]


def load_tokenizer(path: str) -> Tokenizer:
    """Raises ValueError with the file's name if it cannot be read or is damaged."""
    try:
        with open(path, encoding="utf-8", errors="replace", newline="") as f:
            return Tokenizer(f.read(), path)
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}; make one with python tokenizer.py") from None


# ---------------------------------------------------------------------------- chats

def render(tok: Tokenizer, messages: list[dict], add_generation_prompt: bool = False,
           think: bool = False) -> tuple[list[int], list[int]]:
    """A chat as token ids in the model's template, and a mask that is 1 on what the assistant is to
    learn: its content and its <|im_end|>. Our own models use ChatML: [{"role": "user", "content":
    "hi"}] is <|im_start|>user\nhi<|im_end|>\n. Contents are encoded apart and as plain text:
    whatever they say, special ids stand only where the template puts them. A lone surrogate, which
    no text holds but a Python string can, becomes U+FFFD. With `think`, a model that can begins the
    reply with thoughts. Raises ValueError for a bad message."""
    chat, ids, mask = tok.rules.chat, [*tok.chat_begin], [0] * len(tok.chat_begin)
    roles = [m.get("role") if isinstance(m, dict) else None for m in messages]
    if (chat.default or chat.preface) and roles[:1] != ["system"]:
        messages = [{"role": "system", "content": chat.default}, *messages]
        roles = ["system", *roles]
    for i, (role, message) in enumerate(zip(roles, messages)):
        if role not in ROLES or not isinstance(content := message.get("content"), str):
            raise ValueError(f"message {i}: wanted a role of {', '.join(ROLES)} and a string as "
                             f"content, got {message!r:.80}")
        head, tail = tok.around[role]
        content = content.strip() if chat.trim else content
        if i == 0 and role == "system":
            content = chat.preface + content
        if i == len(messages) - 1 and role == "assistant":
            head = head + tok.opening[False]
        body, learn = tok.encode_ordinary(content), int(role == "assistant")
        ids += [*head, *body, *tail]
        mask += [0] * len(head) + [learn] * len(body + tail[:1]) + [0] * len(tail[1:])
    if add_generation_prompt:
        head = tok.around["assistant"][0] + tok.opening[think]
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

def count_by_language(documents: list[Document], pattern: str) -> dict[str, Counter[bytes]]:
    """A worker's share: the pieces of some documents."""
    texts: dict[str, list[str]] = {}
    for document in documents:
        texts.setdefault(document.lang, []).append(document.text)
    return {lang: count_pieces(some, pattern) for lang, some in texts.items()}


def count_files(cfg: Config, pattern: str, progress: Progress) -> dict[str, Counter[bytes]]:
    """The pieces of the input by language. Raises ValueError without usable text."""
    files, start = find_files(cfg.input), time.time()
    size = sum(os.path.getsize(f) * (3 if f.endswith((".gz", ".parquet")) else 1) for f in files)
    every = -(-size // (cfg.max_mb << 20)) or 1  # read one line in so many
    counts: dict[str, Counter[bytes]] = {}
    for _, found in made_by_workers(
            sampled(read_batches(files), every), partial(parse, said_in=said_in),
            partial(count_by_language, pattern=pattern), cfg.workers,
            cfg.on_bad_line, progress):
        for lang, pieces in found.items():
            counts.setdefault(lang, Counter()).update(pieces)
    if not counts:
        raise ValueError(f"{cfg.input}: no text in it")
    some = f" (one line in {every:,}, drawn at random: --max_mb)" if every > 1 else ""
    print(f"read {sum(map(bytes_in, counts.values())) / 1e6:,.1f} MB{some}, "
          f"{sum(map(len, counts.values())):,} different pieces, {time.time() - start:.1f} s")
    return counts


def bytes_in(counts: Counter[bytes]) -> int:
    return sum(len(piece) * n for piece, n in counts.items())


def make(cfg: Config, progress: Progress) -> None:
    """Train the tokenizer and write its file. Raises ValueError or OSError for a user's mistake."""
    pattern = KINDS[cfg.kind]
    check_place(cfg.out)
    by_lang = count_files(cfg, pattern, progress)
    counts = sum(by_lang.values(), Counter())
    start, wanted = time.time(), cfg.vocab_size - len(SPECIALS)
    tokens = train_char(counts) if cfg.kind == "char" else train_bpe(
        counts, wanted, lambda n: progress.show(f"{n:,} of {wanted:,} tokens"))
    progress.end()
    if cfg.kind != "char" and len(tokens) < wanted:
        print("no pair is left that occurs twice: the vocabulary ends here")
    write_text(cfg.out, dump(tokens, pattern))
    tok = load_tokenizer(cfg.out)
    for lang, pieces in sorted(by_lang.items()):
        n_ids = sum(len(tok.encode_ordinary(piece.decode())) * n for piece, n in pieces.items())
        print(f"{lang}: {bytes_in(pieces) / n_ids:.2f} bytes/token on what it was trained on")
    print(f"saved {cfg.out}: {tok.n_vocab:,} tokens, sha256 {tok.sha256[:16]}…, "
          f"{time.time() - start:.1f} s")


def main() -> None:
    only_talk()
    cfg = configure(Config)
    least = 256 + len(SPECIALS)
    if cfg.kind != "char" and cfg.vocab_size <= least:
        fail(f"--vocab_size={cfg.vocab_size} must be more than {least}: every tokenizer has the "
             f"256 bytes and {len(SPECIALS)} special tokens")
    progress = Progress()
    try:
        make(cfg, progress)
    except (ValueError, OSError, KeyboardInterrupt) as error:
        progress.end()
        fail(str(error) or "stopped, nothing was written")


if __name__ == "__main__":
    run(main)

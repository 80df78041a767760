"""
Chats, pairs and prompts as rows of token ids, and rows as batches; how rows are made of JSON lines
and kept on disk may be skipped. plumbing/chats.py shows what a line may hold.

A row is what `render` makes of a chat: token ids, and for each of them whether it is to be learnt.
A pair is two rows, chosen and rejected, which end at the reply's <|im_end|>. A ranking is one row
for each reply, best first, so k replies are read once for their k (k - 1) / 2 pairs; a pair is a
ranking of two. Rows are made once, in a folder whose meta.json says from what, and mapped from
there: a corpus of any size works.
"""
import hashlib
import json
import math
import os
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from functools import cache, cached_property, partial
from itertools import combinations, pairwise
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from plumbing.chats import read_chat, read_comparison, read_question
from plumbing.corpus import Batch, LineError, check_text, find_files, language, parse_records
from plumbing.jobs import Progress
from plumbing.order import draw_split, hash64
from plumbing.runtime import print0
from plumbing.tokenfiles import IGNORE, Folder, Made, mapped
from tokenizer import Tokenizer, load_tokenizer, render

Kind = Literal["chat", "pair", "ranking", "prompt"]
SPLITS = ("train", "val")
VERSION = 5  # of the files; older ones are made again
# of each row: tokens in .words, language, margin, whether it is the first of its example
ROW = np.dtype([("length", "<i4"), ("lang", "S8"), ("margin", "<f4"), ("first", "?")])
LEARN = np.uint32(1 << 31)  # flag on a token id in .words: to be learnt
cached_tokenizer = cache(load_tokenizer)  # once per worker


class Row(NamedTuple):
    ids: list[int]
    mask: list[int]  # 1: to be learnt


class Rows:
    """Examples in files, mapped: a row each, two of a pair, one for each reply of a ranking."""

    def __init__(self, words: np.ndarray, table: np.ndarray, records: np.ndarray, name: str,
                 data_id: int = 0):
        self.words = words  # (tokens,) uint32: id, and LEARN
        self.table = table  # (rows,) of ROW
        self.records = records  # (bytes,) uint8: of prompts, the lines that they came from
        self.name, self.data_id = name, data_id  # data_id: a hash of all three
        self.firsts = np.append(np.flatnonzero(table["first"]), len(table))  # row of each example
        self.starts = np.append(0, np.cumsum(self.lengths()))  # of each row in .words, and its end
        self.most_tokens = (np.maximum.reduceat(self.lengths(), self.firsts[:-1])
                            if len(table) else np.array([], int))  # of a row of each example

    def __len__(self) -> int:
        return len(self.firsts) - 1

    def lengths(self) -> np.ndarray:
        """Tokens of each row."""
        return self.table["length"].astype(np.int64)

    def example(self, i: int) -> list[Row]:
        """The rows of example i."""
        first, after = self.firsts[i:i + 2]
        parts = [self.words[a:b] for a, b in pairwise(self.starts[first:after + 1])]
        return [Row((w & ~LEARN).tolist(), (w >= LEARN).astype(int).tolist()) for w in parts]

    @cached_property
    def line_ends(self) -> np.ndarray:
        return np.append(-1, np.flatnonzero(self.records == ord("\n")))

    def record(self, i: int) -> str:
        """The line of prompt i, as JSON without the fields that are null."""
        before, end = self.line_ends[i:i + 2]
        return self.records[before + 1:end].tobytes().decode()

    def margin(self, i: int) -> float:
        return float(self.table["margin"][self.firsts[i]])

    def lang(self, i: int) -> str:
        return self.table["lang"][self.firsts[i]].decode()

    def longest(self, i: int) -> int:
        """Tokens of the longest row of example i."""
        return int(self.most_tokens[i])

    def shortest_first(self) -> np.ndarray:
        """Numbers of the examples by their longest row."""
        return np.argsort(self.most_tokens, kind="stable")

    def largest(self) -> tuple[int, int]:
        """Most rows of an example, most tokens of a row."""
        return int(np.diff(self.firsts).max()), int(self.most_tokens.max())


def load_examples(paths: str, kind: Kind, tok: Tokenizer, max_len: int, folder: str,
                  val_fraction: float = 0.0, on_bad_line: str = "stop") -> dict[str, Rows]:
    """{"train": Rows, "val": Rows} of JSONL files; made in `folder` unless it already holds just
    these, checked against their sha256 if it does. A chat belongs to val by a hash of all of it, a
    pair, ranking or prompt by one of its prompt: the pairs of a prompt stay together. Raises
    ValueError for what a user can mend."""
    out = Folder(folder, find_files(paths), tok, kind, max_len, val_fraction, on_bad_line, VERSION)
    if not out.finished:
        prepare(out, kind, max_len, val_fraction, on_bad_line)
    hashes, found = out.meta["files"], {}
    for name, sha in hashes.items():
        with open(os.path.join(folder, name), "rb") as f:
            if hashlib.file_digest(f, "sha256").hexdigest() != sha:
                raise ValueError(f"{f.name}: damaged: its contents do not match their sha256; "
                                 f"delete {folder}")
    for split in SPLITS:
        files = {f"{split}.words": np.dtype("<u4"), f"{split}.rows": ROW,
                 f"{split}.records": np.dtype("u1")}  # records: of prompts only
        words, table, records = (
            mapped(os.path.join(folder, name), dtype) if name in hashes else np.zeros(0, dtype)
            for name, dtype in files.items())
        found[split] = Rows(words, table, records, f"{paths} ({split})",
                            hash64(*(hashes[name] for name in files if name in hashes)))
    return found


def evenly_spaced(examples: Sequence[int], most: int | None) -> list[int]:
    """At most `most` examples, evenly spaced; None: all."""
    n = len(examples) if most is None else min(most, len(examples))
    return [examples[i * len(examples) // n] for i in range(n)]


def in_batches(examples: Sequence, size: int) -> Iterator[Sequence]:
    for at in range(0, len(examples), size):
        yield examples[at:at + size]


def micro_batches(rows: Rows, picked: list[int], size: int, rank: int, world: int
                  ) -> list[list[int]]:
    """A step's examples for one process, `size` at a time and of like length, to pad little."""
    ordered = sorted(picked, key=lambda i: (rows.longest(i), i))
    return [list(some) for some in in_batches(ordered, size)][rank::world]


# ---------------------------------------------------------------------------- rows as tensors

def window_batch(bins: list[list[Row]], length: int) -> tuple[Tensor, Tensor, Tensor]:
    """Token ids (int64), which of them are to be learnt (bool), and the number of the row that each
    belongs to (1, 2, …; 0 is padding; int64), all (len(bins), length)."""
    idx = np.zeros((len(bins), length), np.int64)
    learn, segments = np.zeros_like(idx, bool), np.zeros_like(idx)
    for b, rows in enumerate(bins):
        at = 0
        for number, (ids, mask) in enumerate(rows, 1):
            end = at + len(ids)
            idx[b, at:end], segments[b, at:end] = ids, number
            learn[b, at + 1:end] = mask[1:]  # the first token of a row has nothing before it
            at = end
    return torch.from_numpy(idx), torch.from_numpy(learn), torch.from_numpy(segments)


def pad_right(rows: list[Row], pad: int) -> tuple[Tensor, Tensor, Tensor]:
    """Token ids and targets (B, T), lengths (B,). No row sees the `pad` on its right."""
    length = max(len(row.ids) for row in rows)
    idx, learn, _ = window_batch([[row] for row in rows], length)
    targets = torch.where(learn, idx, IGNORE).roll(-1, 1)  # position t predicts token t + 1
    lengths = torch.tensor([len(row.ids) for row in rows])
    idx[torch.arange(length) >= lengths[:, None]] = pad
    return idx, targets, lengths


def pair_batch(rows: Rows, chosen: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
    """`pad_right` of the chosen replies of some pairs, then of the rejected: 2 B rows."""
    pairs = [rows.example(i) for i in chosen]
    return pad_right([pair[side] for side in (0, 1) for pair in pairs], 0)


def ranking_batch(rows: Rows, chosen: Sequence[int]
                  ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """ids (R, T) and lengths (R,) of all the replies of some rankings, and for each of their pairs
    the row of better and worse, (2, P), its margin and its share of its ranking, (P,)."""
    groups = [rows.example(i) for i in chosen]
    idx, _, lengths = pad_right([row for group in groups for row in group], 0)
    pairs, margins, shares, first = [], [], [], 0
    for i, group in zip(chosen, groups):
        n = math.comb(len(group), 2)
        pairs += combinations(range(first, first + len(group)), 2)
        margins += [rows.margin(i)] * n
        shares += [1 / n] * n
        first += len(group)
    return idx, lengths, torch.tensor(pairs).t(), torch.tensor(margins), torch.tensor(shares)


# ---------------------------------------------------------------------------- prompts to answer

def reply_end(mask: list[int]) -> int:
    """Where the last reply of a row ends, its <|im_end|> included."""
    return len(mask) - mask[::-1].index(1)


def prompt_of(row: Row) -> list[int]:
    """The token ids before the last reply."""
    end = reply_end(row.mask)
    while end and row.mask[end - 1]:
        end -= 1
    return row.ids[:end]


def prompts_with_room(rows: Rows, chosen: Sequence[int], model_reads: int,
                      answer_tokens: int) -> dict[int, list[int]]:
    """The chosen examples' prompts. A line counts those left out, with no room for an answer."""
    prompts = {i: prompt_of(rows.example(i)[0]) for i in chosen}
    room = {i: model_reads - len(prompt) for i, prompt in prompts.items()}
    found = {i: prompt for i, prompt in prompts.items() if room[i] >= answer_tokens}
    if len(found) < len(prompts):
        print0(f"{len(prompts) - len(found)} of {len(prompts)} held-out prompts are not answered: "
               f"they leave fewer than {answer_tokens} of the model's {model_reads} tokens for the "
               f"answer; --answer_tokens={min(room.values())} would do for all")
    return found


# ---------------------------------------------------------------------------- JSON lines as rows

def prepare(out: Folder, kind: Kind, max_len: int, val_fraction: float, on_bad_line: str) -> None:
    """Write the rows of a folder, and say how many there are."""
    workers = 1 if sum(map(os.path.getsize, out.inputs)) < 16 << 20 else 0
    n, counts = out.fill(
        partial(read_rows, kind=kind, tokenizer=os.path.join(out.path, "tokenizer.txt"),
                max_len=max_len),
        partial(encode, val_fraction=val_fraction), workers, on_bad_line, Progress())
    train, val = (counts.pop(split, 0) for split in SPLITS)
    notes = "".join(f"; {what}: {often:,}" for what, often in sorted(counts.items()))
    if not train + val:
        raise ValueError(f"{', '.join(out.inputs)}: no usable example in it{notes}")
    key = "whole chat" if kind == "chat" else "prompt"
    by = f" ({val_fraction:.1%} by a hash of the {key})" if val_fraction else ""
    print(f"{n:,} records -> {train:,} {kind}s to train on, {val:,} held out{by}{notes}")
    out.finish()


def read_rows(batch: Batch, kind: Kind, tokenizer: str, max_len: int) -> Iterator:
    return parse_records(batch, partial(rows_of, kind=kind, tok=cached_tokenizer(tokenizer),
                                        max_len=max_len))


def rows_of(record: dict, kind: Kind, tok: Tokenizer, max_len: int
            ) -> tuple[str, list, Counter, str]:
    """What one record gives: the text that decides its split, [(lang, margin, rows)] with one row
    for a chat or prompt, two for a pair, as many as replies for a ranking, how often something was
    dropped or shortened, and what is kept of a prompt for a reward file: all. Raises LineError."""
    counts: Counter = Counter()
    groups, margin = [], 0.0
    if kind == "chat":
        messages = read_chat(record)
        groups = [[row] for row in [fit_chat(tok, messages, max_len, counts)] if row]
    elif kind == "prompt":
        messages = read_question(record)
        row = Row(*render(tok, messages, add_generation_prompt=True))
        groups = [[row]] if len(row.ids) <= max_len else []
        counts["prompts dropped: too long"] += not groups
    else:
        messages, replies, margin = read_comparison(record)
        ranked = [reply_row(tok, messages, reply) for reply in replies]
        for rows in [ranked] if kind == "ranking" else combinations(ranked, 2):
            different = [row for i, row in enumerate(rows) if row not in rows[:i]]
            fitting = [row for row in different if len(row.ids) <= max_len]
            counts[f"{kind}s dropped: both replies are the same"] += len(different) < 2
            counts[f"{kind}s dropped: too long"] += len(fitting) < 2 <= len(different)
            if len(rows) > 2:
                counts["replies dropped from rankings"] += len(rows) - len(fitting)
            if len(fitting) > 1:
                groups.append(fitting)
    lang = record.get("lang") or language(" ".join(m["content"] for m in messages))
    if not isinstance(lang, str) or len(check_text(lang, "lang").encode()) > 8:  # see ROW
        raise LineError("lang", "unknown language", "'lang' must be a string of at most 8 bytes "
                        "like 'zh'")
    return (json.dumps(messages), [(lang, float(margin), rows) for rows in groups], counts,
            json.dumps(record) if kind == "prompt" and groups else "")


def fit_chat(tok: Tokenizer, messages: list[dict], max_len: int, counts: Counter) -> Row | None:
    """A chat in at most `max_len` tokens: trailing exchanges are dropped whole; the reply of a
    single one is cut, without a false <|im_end|>. None if nothing is left to learn."""
    ends = [i for i, m in enumerate(messages, 1) if m["role"] == "assistant"]  # of each exchange
    ids, mask = render(tok, messages)
    while len(ids) > max_len and len(ends) > 1:
        ends.pop()
        ids, mask = render(tok, messages[:ends[-1]])
    counts["chats shortened: last turns dropped"] += ends[-1] < len(messages)
    counts["chats shortened: reply cut"] += len(ids) > max_len
    ids, mask = ids[:max_len], mask[:max_len]
    if not any(mask):
        counts["chats dropped: nothing to learn"] += 1
        return None
    return Row(ids, mask)


def reply_row(tok: Tokenizer, prompt: list[dict], reply: str) -> Row:
    """A prompt and one reply to it; it ends at the reply's <|im_end|>, where a score is read."""
    ids, mask = render(tok, [*prompt, {"role": "assistant", "content": reply}])
    start = len(render(tok, prompt)[0])  # earlier turns of the assistant are no part of the reply
    last = reply_end(mask)
    return Row(ids[:last], [0] * start + mask[start:last])


def encode(found: list[tuple[str, list, Counter, str]], val_fraction: float) -> Made:
    """Words, rows and records for the files of each split, of what `rows_of` has found in some
    lines; how many examples that are, and how often something was dropped or shortened."""
    parts: dict[str, list[bytes]] = defaultdict(list)
    counts = Counter()
    for key, groups, met, record in found:
        split = draw_split(key.encode(), val_fraction)
        counts.update({**met, split: len(groups)})
        if record:
            parts[f"{split}.records"].append(f"{record}\n".encode())
        for lang, margin, group in groups:
            for i, (ids, mask) in enumerate(group):
                learn = np.where(np.array(mask, bool), LEARN, np.uint32(0))
                row = len(ids), lang.encode(), margin, i == 0
                parts[f"{split}.words"].append((np.array(ids, np.uint32) | learn).tobytes())
                parts[f"{split}.rows"].append(np.array(row, ROW).tobytes())
    return {name: b"".join(pieces) for name, pieces in parts.items()}, counts

"""
Scores of a reward model: of rows while it learns, and of files, a JSON line for each of theirs.

    {"score": 1.25, "normalised": 0.4}                                             a chat
    {"chosen": 1.25, "rejected": 0.5, "normalised": [0.4, -0.2], "right": true}    a pair
    {"ranking": [1.25, 0.5, 0.75], "normalised": [0.4, -0.2, 0.0], "right": false}
    {"score": null, "why": "too long: 301 tokens, the model reads 256"}

`normalised` counts in standard deviations, as train_rl.py does. The rest may be skipped.
"""
import json
import sys
from contextlib import redirect_stdout
from itertools import pairwise

import torch
from torch import Tensor, nn

from plumbing.chats import read_chat, read_comparison
from plumbing.corpus import find_files, read_batches
from plumbing.examples import Row, pad_right, reply_row
from plumbing.jsonl import BadLine, parse_records
from plumbing.loading import load_reward_model
from plumbing.runtime import Dist


def score_rows(model: nn.Module, rows: list[Row], dist: Dist) -> Tensor:
    """(len(rows),) scores, each read at the last token of its row, on the device."""
    idx, _, lengths = pad_right(rows, 0)
    with dist.autocast():
        return model(idx.to(dist.device), lengths.to(dist.device))


@torch.no_grad()
def print_scores(files: str, init_from: str, dist: Dist) -> None:
    """Score the chats, pairs and rankings in `files` with the reward model `init_from`. What is too
    long has no score: the part of it that fits would have another. Raises ValueError for a line
    that cannot be read."""
    out = sys.stdout
    with redirect_stdout(sys.stderr):  # stdout holds the scores and nothing else
        model, tok = load_reward_model(init_from, dist)
        limit = model.backbone.config.max_seq_len

        def read(record: dict) -> dict:
            if "chosen" in record or "ranking" in record:
                prompt, replies, _ = read_comparison(record)
            else:
                *prompt, last = read_chat(record)
                replies = [last["content"]]
            rows = [reply_row(tok, prompt, reply) for reply in replies]
            if (longest := max(len(row.ids) for row in rows)) > limit:
                why = f"too long: {longest} tokens, the model reads {limit}"
                return {"score": None, "why": why}
            scores = score_rows(model, rows, dist)
            normed = [round(x, 4) for x in ((scores - model.mean) / model.std).tolist()]
            rounded = [round(x, 4) for x in scores.tolist()]
            right = {"right": all(a > b for a, b in pairwise(scores.tolist()))}
            if "ranking" in record:
                return {"ranking": rounded, "normalised": normed, **right}
            if "chosen" in record:
                return {"chosen": rounded[0], "rejected": rounded[1], "normalised": normed, **right}
            return {"score": rounded[0], "normalised": normed[0]}

        n = without = 0
        for batch in read_batches(find_files(files)):
            for line in parse_records(batch, read):
                if isinstance(line, BadLine):
                    raise ValueError(f"{line}")
                print(json.dumps(line), file=out)
                n, without = n + 1, without + ("why" in line)
        print(f"{n:,} lines, {without:,} of them without a score")

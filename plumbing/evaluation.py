"""
What a validation reports: the loss of held-out text, and samples. The rest may be skipped.
"""
import math
from collections.abc import Iterable

import torch
from torch import Tensor

from model import Transformer, token_logps
from plumbing.examples import Row, Rows, evenly_spaced
from plumbing.runtime import Dist, all_sum, print0
from plumbing.tokenfiles import IGNORE
from tokenizer import Tokenizer

Batches = Iterable[tuple[Tensor, Tensor]]  # inputs and targets, (B, T) each
Scores = dict[str, tuple[float, float]]  # nats per token and bits per byte of each language


def by_language(rows: Rows, most: int | None) -> dict[str, list[int]]:
    """Evenly spaced examples of each language, at most `most`, the shortest first."""
    found: dict[str, list[int]] = {}
    for i in range(len(rows)):
        found.setdefault(rows.lang(i), []).append(i)
    return {lang: sorted(evenly_spaced(all_, most), key=rows.longest)
            for lang, all_ in sorted(found.items())}


@torch.no_grad()
def score_text(model: Transformer, tok: Tokenizer, texts: Iterable[tuple[str, Batches]],
               dist: Dist) -> Scores:
    """Nats per token and bits per byte of UTF-8 text, from (language, batches). A nat is a factor
    of e in probability, a bit one of 2. Bits per byte compare models with different tokenizers.
    Each process takes its share of the batches."""
    sums, n_bytes = {}, torch.tensor(tok.token_bytes())
    for lang, batches in texts:
        of_lang = sums.setdefault(lang, torch.zeros(3, dtype=torch.float64))
        for i, (x, y) in enumerate(batches):
            if i % dist.world != dist.rank:
                continue
            with dist.autocast():
                hidden = model(x.to(dist.device), hidden=True)
                nats = -token_logps(hidden, model.lm_head.weight, y.to(dist.device), "sum")
            real = y[y != IGNORE]
            of_lang += torch.tensor([float(nats), len(real), int(n_bytes[real].sum())])
    scores = {}
    for lang, own in sorted(sums.items()):
        nats, tokens, total = all_sum(dist, *own)
        scores[lang] = nats / max(tokens, 1), nats / math.log(2) / max(total, 1)
    return scores


def print_samples(tok: Tokenizer, langs: list[str], rows: list[Row],
                  scores: Tensor | None = None) -> None:
    """Print the first prompt and reply of each language, and its score if there are scores."""
    for i, (lang, (ids, mask)) in enumerate(zip(langs, rows)):
        if lang not in langs[:i]:
            start = mask.index(1)
            text = f"{tok.decode(ids[:start])}»{tok.decode(ids[start:])}".replace("\n", "⏎")
            score = "" if scores is None else f" score {scores[i]:.2f}"
            print0(f"sample {lang} | {text}{score}")


def score_line(scores: Scores) -> str:
    return " | ".join(f"{lang} {nats:.4f} nats/token, {bits:.4f} bits/byte"
                      for lang, (nats, bits) in scores.items())

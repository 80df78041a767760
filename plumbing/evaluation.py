"""
Judges models by held-out text, log P of replies, scores of a reward model; may be skipped.

`print_scores` writes a JSON line for each line of the files it reads:

    {"score": 1.25, "normalised": 0.4}                                             a chat
    {"chosen": 1.25, "rejected": 0.5, "normalised": [0.4, -0.2], "right": true}    a pair
    {"ranking": [1.25, 0.5, 0.75], "normalised": [0.4, -0.2, 0.0], "right": false}
    {"score": null, "why": "too long: 301 tokens, the model reads 256"}

`normalised` counts in standard deviations, as train_rl.py does.
"""
import json
import math
import sys
from collections.abc import Iterable
from contextlib import redirect_stdout
from functools import partial
from itertools import islice

import torch
from torch import Tensor, nn

from model import RewardModel, Transformer, token_logps
from plumbing.chats import read_chat, read_comparison
from plumbing.corpus import find_files, good_records
from plumbing.examples import Row, Rows, evenly_spaced, in_batches, pad_right, reply_row
from plumbing.loading import load_reward_model
from plumbing.prompts import read_prompts_once
from plumbing.runtime import Dist, all_sum, print0
from plumbing.tokenfiles import IGNORE
from tokenizer import Tokenizer

Batches = Iterable[tuple[Tensor, Tensor]]  # inputs and targets, (B, T) each
Scores = dict[str, tuple[float, float]]  # nats per token and bits per byte of each language


def by_language(rows: Rows, most: int | None) -> dict[str, list[int]]:
    """Evenly spaced examples of each language, at most `most`, the shortest first."""
    langs = [rows.lang(i) for i in range(len(rows))]
    return {lang: sorted(evenly_spaced([i for i, own in enumerate(langs) if own == lang], most),
                         key=rows.longest) for lang in sorted(set(langs))}


def documents(ids: Tensor, tok: Tokenizer) -> Tensor:
    """The number of its document for each token of the windows (B, T), for `Transformer.forward`.
    Between documents stands <|endoftext|>, which counts with the one after it."""
    return (ids == tok.endoftext).cumsum(dim=1)


@torch.no_grad()
def score_text(model: Transformer, tok: Tokenizer, texts: Iterable[tuple[str, Batches]],
               dist: Dist, apart: bool = False) -> Scores:
    """Nats per token and bits per byte of UTF-8 text, from (language, batches). A nat is a factor
    of e in probability, a bit one of 2. Bits per byte compare models with different tokenizers.
    Each process takes its share of the batches. `apart`: no document sees another."""
    sums, n_bytes = {}, torch.tensor(tok.token_bytes())
    for lang, batches in texts:
        of_lang = sums.setdefault(lang, torch.zeros(3, dtype=torch.float64))
        for x, y in islice(batches, dist.rank, None, dist.world):
            ids = x.to(dist.device)
            with dist.autocast():
                hidden = model(ids, hidden=True, segments=documents(ids, tok) if apart else None)
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


@torch.no_grad()
def row_logps(model: Transformer, rows: list[Row], batch_size: int, dist: Dist) -> Tensor:
    """(B, T) log P of the tokens of each reply, on the CPU, where `pad_right` has the targets of
    all rows; 0 elsewhere. A prompt is read once for all its replies in a batch."""
    found = torch.zeros(len(rows), max(len(row.ids) for row in rows))
    for some in in_batches(range(len(rows)), batch_size):
        begins = [rows[i].mask.index(1) for i in some]
        said = [rows[i].ids[begin:] for i, begin in zip(some, begins)]
        targets = nn.utils.rnn.pad_sequence([*map(torch.tensor, said)], batch_first=True,
                                            padding_value=IGNORE).to(dist.device)
        with dist.autocast():
            cache, state = read_prompts_once(
                model, [rows[i].ids[:begin] for i, begin in zip(some, begins)], targets.size(1))
            states = torch.cat((state, model(targets.clamp(min=0), cache, hidden=True)), dim=1)
            logps = token_logps(states[:, :-1], model.lm_head.weight, targets)
        for i, begin, ids, own in zip(some, begins, said, logps.cpu()):
            found[i, begin - 1:begin - 1 + len(ids)] = own[:len(ids)]
    return found


def score_rows(model: nn.Module, rows: list[Row], dist: Dist) -> Tensor:
    """(len(rows),) scores, each read at the last token of its row, on the device."""
    idx, _, lengths = pad_right(rows, 0)
    with dist.autocast():
        return model(idx.to(dist.device), lengths.to(dist.device))


@torch.no_grad()
def row_scores(reward: RewardModel, rows: list[Row], batch_size: int, dist: Dist) -> Tensor:
    """(B,) scores of a reward model, on the CPU."""
    return torch.cat([score_rows(reward, list(some), dist).cpu()
                      for some in in_batches(rows, batch_size)])


@torch.no_grad()
def scores_of(record: dict, model: RewardModel, tok: Tokenizer, dist: Dist) -> dict:
    """The line that `print_scores` prints for a record. Raises LineError."""
    if kind := next((name for name in ("ranking", "chosen") if name in record), ""):
        prompt, replies, _ = read_comparison(record)
    else:
        *prompt, last = read_chat(record)
        replies = [last["content"]]
    rows = [reply_row(tok, prompt, reply) for reply in replies]
    longest, limit = max(len(row.ids) for row in rows), model.backbone.config.max_seq_len
    if longest > limit:
        return {"score": None, "why": f"too long: {longest} tokens, the model reads {limit}"}
    found = score_rows(model, rows, dist)
    scores, normed = ([round(x, 4) for x in some.tolist()]
                      for some in (found, (found - model.mean) / model.std))
    if not kind:
        return {"score": scores[0], "normalised": normed[0]}
    named = {"ranking": scores} if kind == "ranking" else dict(zip(("chosen", "rejected"), scores))
    return named | {"normalised": normed, "right": bool((found[:-1] > found[1:]).all())}


def print_scores(cfg, dist: Dist) -> None:
    """Score the chats, pairs and rankings in the files cfg.score with the reward model
    cfg.init_from. What is too long has no score: the part of it that fits would have another.
    Raises ValueError for a line that cannot be read."""
    out = sys.stdout
    with redirect_stdout(sys.stderr):  # stdout holds the scores and nothing else
        model, tok = load_reward_model(cfg.init_from, dist)
        read = partial(scores_of, model=model, tok=tok, dist=dist)
        n = without = 0
        for line in good_records(find_files(cfg.score), read):
            print(json.dumps(line), file=out)
            n, without = n + 1, without + ("why" in line)
        print(f"{n:,} lines, {without:,} of them without a score")


def rl_line(now: dict, unit: str) -> str:
    """What a validation of train_rl.py says, r in this unit, of pass@k the first and the last."""
    rates = [f", {name} {now[name]:.1%}" for name in now if name.startswith("pass@")]
    limit = f" of at most {now['best']:+.3f} ± {now['best_error']:.3f}" if "best" in now else ""
    return (f"reward {now['reward']:+.3f}{unit} (score {now['raw']:.3f})"
            f"{''.join(rates[:1] + rates[1:][-1:])}, KL {now['kl']:.3f}, J {now['J']:+.3f}{limit}, "
            f"{now['length']:.1f} tokens, {now['ended']:.1%} end")


def rl_warnings(start: dict, now: dict, mean: dict, kl_budget: float, dist: Dist) -> list[str]:
    """What goes wrong, told from validations at the start and now and from the last rollout."""
    found = []
    if mean["mismatch"] > (1e-3 if dist.dtype == torch.float32 else 0.1):
        found.append(f"sampling and training disagree by {mean['mismatch']:.4f} nats on a token")
    if mean["equal"] > 0.5:
        found.append(f"in {mean['equal']:.0%} of the groups all replies have the same reward: they "
                     "teach nothing")
    if now["kl"] > kl_budget:
        found.append(f"KL {now['kl']:.2f} is over the budget of {kl_budget}: raise --beta")
    if now["kl"] < -3 * now["kl_error"]:
        found.append(f"KL {now['kl']:.3f} is below 0: what is sampled from is not what is scored")
    if "best" in now and now["J"] > now["best"] + 3 * math.hypot(now["J_error"], now["best_error"]):
        found.append(f"J {now['J']:.2f} is over the {now['best']:.2f} that any policy can reach: "
                     "the KL or the reward is not what it should be")
    if now["ended"] < 0.95:
        found.append(f"only {now['ended']:.0%} of the replies end by themselves")
    if not 0.5 <= now["length"] / start["length"] <= 1.5:
        found.append(f"replies went from {start['length']:.0f} to {now['length']:.0f} tokens")
    return found

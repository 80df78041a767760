"""
What a reward model is held against on pairs: words, length, and chance.

    w = learn(train, tok)                                   a bag of words
    right = bags_of(held_out, tok) @ w > 0
    often = drawn(prompts_of(held_out))
    mean(right, often)                                      its accuracy, "0.62 (0.56 … 0.68)"
    mean(right, balanced(often, longer))                    if half of the chosen are the longer

The bag of words is a logistic regression. With n_t and m_t, how often a term (search/topics.py)
stands in the chosen and in the rejected reply,

    P(chosen is better) = sigmoid(sum over terms t of w_t (log(1 + n_t) - log(1 + m_t)))
"""
import math
from collections import Counter
from zlib import crc32

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from plumbing.examples import Rows, prompt_of
from plumbing.order import hash64
from search.topics import terms
from tokenizer import Tokenizer

TERMS = 1 << 16  # numbers that terms are hashed to
PENALTIES = (1e-3, 3e-3, 1e-2, 3e-2)  # on |w|²


def prompts_of(rows: Rows) -> np.ndarray:
    """A number for the prompt of each pair."""
    return np.array([hash64(*prompt_of(rows.example(i)[0])) for i in range(len(rows))], np.uint64)


def bags_of(rows: Rows, tok: Tokenizer) -> Tensor:
    """(pairs, TERMS), sparse: log(1 + n) - log(1 + m) of the terms of each pair."""
    found: dict[tuple[int, int], float] = {}
    for i in range(len(rows)):
        texts = (tok.decode(ids[mask.index(1):-1]) for ids, mask in rows.example(i))
        n, m = (Counter(crc32(term.encode()) % TERMS for term in terms(text)) for text in texts)
        found |= {(i, t): math.log1p(n[t]) - math.log1p(m[t]) for t in n | m}
    return torch.sparse_coo_tensor(torch.tensor([*found], dtype=torch.long).view(-1, 2).t(),
                                   [*found.values()], (len(rows), TERMS), check_invariants=True
                                   ).coalesce()


def fit(bags: Tensor, used: Tensor, penalty: float) -> Tensor:
    """w, (TERMS,), of the pairs that are `used`, (pairs,) bool."""
    w = torch.zeros(TERMS, requires_grad=True)
    optimizer = torch.optim.LBFGS([w], max_iter=100, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = F.softplus(-(bags @ w))[used].mean() + penalty * w.square().sum()
        value.backward()
        return value
    optimizer.step(loss)
    return w.detach()


def learn(rows: Rows, tok: Tokenizer) -> Tensor:
    """w of all pairs. Its penalty is the one that is best for the pairs of every tenth prompt when
    w comes from the others. Raises ValueError if there are none."""
    apart = torch.from_numpy(prompts_of(rows) % 10 == 0)
    if apart.all() or not apart.any():
        raise ValueError(f"{rows.name}: {len(rows)} pairs are too few to learn from")
    bags = bags_of(rows, tok)
    losses = [F.softplus(-(bags @ fit(bags, ~apart, penalty)))[apart].mean()
              for penalty in PENALTIES]
    return fit(bags, torch.ones_like(apart), PENALTIES[int(torch.stack(losses).argmin())])


def drawn(groups: np.ndarray) -> np.ndarray:
    """(1001, n) how often each of n examples counts: once, and in 1,000 bootstraps of groups."""
    names, which = np.unique(groups, return_inverse=True)
    often = np.random.default_rng(0).multinomial(len(names), [1 / len(names)] * len(names), 1000)
    return np.concatenate((np.ones((1, len(which))), often[:, which]))


def balanced(often: np.ndarray, longer: np.ndarray) -> np.ndarray:
    """The same, if the pairs whose chosen reply is `longer`, by so many tokens, count together as
    much as those where it is shorter. NaN where one of the two is missing."""
    with np.errstate(invalid="ignore"):
        return sum(often * side / (often * side).sum(1, keepdims=True)
                   for side in (longer > 0, longer < 0))


def mean(values: np.ndarray, often: np.ndarray) -> str:
    """The mean of values that count so often, and its interval of 95 % over the draws."""
    found = often @ values / often.sum(1)
    if not len(found := found[~np.isnan(found)]):
        return "-"
    low, high = np.quantile(found, (0.025, 0.975))
    return f"{found[0]:.2f} ({low:.2f} … {high:.2f})"

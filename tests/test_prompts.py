"""A prompt that is there several times is read once, and nothing else changes."""
import pytest
import torch
from test_stages import ALONE
from torch.testing import assert_close

from generate import replies
from model import ModelConfig, Transformer, token_logps
from plumbing.evaluation import row_logps
from plumbing.examples import Row, pad_right
from plumbing.prompts import read_prompts_once

PROMPTS = [[5, 6, 7], [8, 9], [5, 6, 7], [8, 9, 10, 11, 12], [5, 6, 7]]
ENDS = [[1], [2, 3, 4], [13, 14], [6], [3, 3, 3, 3]]


@pytest.fixture(scope="module")
def model() -> Transformer:
    torch.manual_seed(0)
    return Transformer(ModelConfig(32, 2, 4, 2, 32, 8, 48, max_seq_len=32)).eval()


@pytest.fixture
def seen(model, monkeypatch):
    """How many rows, and tokens of each, the model reads from here on."""
    shapes, forward = [], model.forward
    monkeypatch.setattr(model, "forward", lambda idx, *args, **kwargs: (
        shapes.append(tuple(idx.shape)), forward(idx, *args, **kwargs))[1])
    return shapes


@torch.no_grad()
def test_equal_prompts_are_read_once_and_go_on_apart(model, seen):
    """The cache of each row continues as a cache of its own would."""
    cache, state = read_prompts_once(model, PROMPTS, 4)
    assert seen == [(3, 5)]
    more = torch.tensor([[1], [2], [3], [4], [5]])
    after = model(more, cache, hidden=True)
    for i, ids in enumerate(PROMPTS):
        alone = model(torch.tensor([[*ids, int(more[i])]]), hidden=True)[0]
        assert_close(state[i, 0], alone[-2])
        assert_close(after[i, 0], alone[-1])


def test_a_reply_is_the_same_beside_others_to_its_prompt(model, seen):
    """Each with its own chance. Seen to fail when the cache keeps the rows in another order."""
    noise = torch.rand(5, 6, generator=torch.Generator().manual_seed(1))
    together = replies(model, PROMPTS, 6, noise=noise)
    assert seen[0] == (3, 5) and seen[1] == (5, 1)
    assert together == [replies(model, [ids], 6, noise=noise[i:i + 1])[0]
                        for i, ids in enumerate(PROMPTS)]
    assert len({tuple(together[i]) for i in (0, 2, 4)}) > 1  # of one prompt


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_log_p_of_replies_is_that_of_a_full_pass(model, batch_size):
    """Where `pad_right` has the targets, and 0 everywhere else."""
    rows = [Row(p + end, [0] * len(p) + [1] * len(end)) for p, end in zip(PROMPTS, ENDS)]
    idx, targets, _ = pad_right(rows, 0)
    with torch.no_grad():
        want = token_logps(model(idx, hidden=True), model.lm_head.weight, targets)
    assert_close(row_logps(model, rows, batch_size, ALONE), want, atol=1e-5, rtol=0)

"""train_sft.py: only replies are learnt, packing and splitting change nothing."""
import math
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

import train_sft
from data import Packed
from model import ModelConfig, Transformer, token_logps
from plumbing import runtime
from plumbing.examples import Row, load_examples, pad_right, window_batch
from plumbing.loading import load_model
from tokenizer import render
from train_sft import sft_loss

ALONE = runtime.Dist(0, 1, torch.device("cpu"), torch.float32)
LENGTH = 64


@pytest.fixture
def model() -> Transformer:
    """In fp64, so that sums in another order still agree to 1e-9."""
    torch.manual_seed(1)
    return Transformer(ModelConfig(260, 2, 2, 1, 32, 16, 64, LENGTH)).double()


def rows(seed: int = 0, n: int = 8) -> list[Row]:
    r = random.Random(seed)
    found = []
    for _ in range(n):
        length = r.randint(3, 30)
        found.append(Row([r.randrange(260) for _ in range(length)],
                         [0] + [r.randint(0, 1) for _ in range(length - 2)] + [1]))
    return found


def loss_and_grads(model, bins, length=LENGTH, n=None):
    tokens, mask, segments = window_batch(bins, length)
    model.zero_grad()
    hidden = model(tokens, hidden=True, segments=segments)
    loss = sft_loss(hidden, model.lm_head.weight, tokens, mask) / (n or int(mask.sum()))
    loss.backward()
    return loss.item(), [p.grad.clone() for p in model.parameters()]


def test_loss_is_the_cross_entropy_of_the_supervised_tokens(model):
    """torch's own cross entropy, one row at a time, averaged over all supervised tokens."""
    some = rows()
    loss, _ = loss_and_grads(model, [[row] for row in some])
    nats = n = 0.0
    for ids, mask in some:
        logits = model(torch.tensor([ids]))[0, :-1]
        each = F.cross_entropy(logits, torch.tensor(ids[1:]), reduction="none")
        nats += (each @ torch.tensor(mask[1:]).double()).item()
        n += sum(mask[1:])
    assert loss == pytest.approx(nats / n, rel=1e-9)


def test_packed_is_unpacked(model):
    """Loss and every gradient to 1e-9. Seen to fail without restarted positions, and with a mask
    that is causal only."""
    some = rows(1)
    loss, grads = loss_and_grads(model, [[row] for row in some])
    two, packed = loss_and_grads(model, [some[i:i + 2] for i in range(0, 8, 2)])
    assert loss == pytest.approx(two, rel=1e-9)
    for a, b in zip(grads, packed):
        assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_a_packed_neighbour_changes_not_one_bit(model):
    a, b, c = rows(2, 3)
    model.float()
    other = Row([(i + 7) % 260 for i in a.ids], a.mask)
    with torch.no_grad():
        one, two = (model(window_batch([[x, b]], LENGTH)[0],
                          segments=window_batch([[x, b]], LENGTH)[2]) for x in (a, other))
    at = slice(len(a.ids), len(a.ids) + len(b.ids))
    assert torch.equal(one[:, at], two[:, at]) and not torch.equal(one[:, 0], two[:, 0])


def test_what_is_not_supervised_has_no_gradient(model):
    """A state has a gradient if the next token is supervised, and else exactly none."""
    tokens, mask, segments = window_batch([rows(3, 2)], LENGTH)
    hidden = model(tokens, hidden=True, segments=segments).detach().requires_grad_()
    sft_loss(hidden, model.lm_head.weight, tokens, mask).backward()
    next_is_supervised = F.pad(mask[:, 1:], (0, 1))
    assert not hidden.grad[~next_is_supervised].any()
    assert hidden.grad[next_is_supervised].any(-1).all()
    nothing = torch.zeros_like(mask)
    assert sft_loss(hidden, model.lm_head.weight, tokens, nothing) == 0.0  # and not nan


def test_several_turns_cost_what_they_cost_one_by_one(model, tiny):
    chat = [{"role": role, "content": text} for role, text in (
        ("user", "hi"), ("assistant", "yo"), ("user", "你"), ("assistant", "好"))]
    ids, mask = render(tiny.tok, chat)
    whole, _ = loss_and_grads(model, [[Row(ids, mask)]], n=1)
    first, mask_1 = render(tiny.tok, chat[:2])
    one, _ = loss_and_grads(model, [[Row(first, mask_1)]], n=1)
    two, _ = loss_and_grads(model, [[Row(ids, [0] * len(first) + mask[len(first):])]], n=1)
    assert whole == pytest.approx(one + two, abs=1e-9)


@pytest.mark.parametrize("split", [(1,) * 8, (5, 3), (7, 1)])
def test_micro_batches_do_not_change_the_update(model, split):
    """Divided by the number of the whole step; a mean of means fails the same comparison."""
    some = [[row] for row in rows(4)]
    n = sum(sum(row.mask[1:]) for row, in some)
    _, want = loss_and_grads(model, some)
    total = [torch.zeros_like(g) for g in want]
    means = [torch.zeros_like(g) for g in want]
    at = 0
    for size in split:
        part = some[at:at + size]
        for sums, grads in ((total, loss_and_grads(model, part, n=n)[1]),
                            (means, loss_and_grads(model, part)[1])):
            for s, g in zip(sums, grads):
                s += g
        at += size
    for a, b in zip(total, want):
        assert_close(a, b, rtol=1e-9, atol=1e-12)
    assert any((a / len(split) - b).abs().max() > 1e-4 for a, b in zip(means, want))


def config(tiny, out_dir, **changes) -> train_sft.Config:
    return replace(train_sft.Config(
        init_from=tiny.pt, data=tiny.chat, out_dir=str(out_dir), val_fraction=0.2, max_len=128,
        batch_tokens=1024, batch_size=4, learning_rate=3e-3, max_steps=6, warmup_steps=1,
        eval_every=3, save_every=3, log_every=2, eval_answers=2, answer_tokens=8), **changes)


def test_ten_chats_are_learnt_by_heart(tiny, tmp_path, capsys):
    """Greedy answers are then word for word those of the file, and end."""
    few = tmp_path / "few.jsonl"
    few.write_text("".join(open(tiny.chat, encoding="utf-8").readlines()[:10]), encoding="utf-8")
    train_sft.train(config(tiny, tmp_path / "run", data=str(few), val_data=str(few), max_steps=120,
                           max_len=200, batch_tokens=1600, learning_rate=1e-2, eval_every=120,
                           save_every=120, eval_answers=10, answer_tokens=72), ALONE)
    out = capsys.readouterr().out
    for lang in ("en", "zh"):
        assert f"answers at step 120 | {lang} exact 100.0%, stops 100.0%" in out
    model, tok = load_model(str(tmp_path / "run"), torch.device("cpu"), torch.float32)
    assert model.kind == "sft"


def test_forgetting_is_the_loss_of_ordinary_text(tiny, tmp_path, capsys):
    """By torch's cross entropy over all of the same held-out windows."""
    import data
    from plumbing.files import write_text
    from plumbing.jobs import Progress
    (tmp_path / "t.txt").write_text("some words\n" * 3000)
    write_text(tmp_path / "tok.txt", tiny.tok.text)
    data.prepare(data.Config(str(tmp_path / "t.txt"), str(tmp_path / "tok.txt"),
                             str(tmp_path / "data"), val_fraction=0.5, workers=1), Progress())
    cfg = config(tiny, tmp_path / "run", pt_data=str(tmp_path / "data"))
    model, tok = load_model(tiny.pt, torch.device("cpu"), torch.float32)
    found = train_sft.forgetting(model, tok, cfg, ALONE)
    ids = torch.from_numpy(data.open_data(cfg.pt_data)[1]["val"][0].ids.astype("int64"))
    T = model.config.max_seq_len
    nats = [F.cross_entropy(model(ids[None, i:i + T])[0, :len(ids) - 1 - i], ids[i + 1:i + T + 1],
                            reduction="sum").item() for i in range(0, len(ids) - 1, T)]
    loss, bits = found["en"]
    assert loss == pytest.approx(sum(nats) / (len(ids) - 1), rel=1e-4)
    n_bytes = len(tok.decode_bytes([i for i in ids[1:].tolist() if i != tok.endoftext]))
    assert bits == pytest.approx(sum(nats) / math.log(2) / n_bytes, rel=1e-4)


def test_a_prompt_that_leaves_no_room_for_an_answer_is_counted(tiny, tmp_path, capsys):
    """With long prompts the validation answered fewer chats than --eval_answers and said nothing;
    with none left it has nothing to report, and must not divide by their number."""
    for answer_tokens, left in ((170, True), (250, False)):
        train_sft.train(config(tiny, tmp_path / f"{answer_tokens}", max_steps=1, warmup_steps=0,
                               eval_answers=100, answer_tokens=answer_tokens), ALONE)
        out = capsys.readouterr().out
        assert "held-out prompts are not answered: they leave fewer than" in out
        assert ("answers at step 1 |" in out) == left and "val at step 1 | en" in out


def test_density_of_packing_is_printed(tiny, tmp_path, capsys):
    train_sft.train(config(tiny, tmp_path / "run"), ALONE)
    out = capsys.readouterr().out
    assert "% supervised, in" in out and "% full" in out and "memory:" in out
    splits = load_examples(tiny.chat, "chat", tiny.tok, 128, str(tmp_path / "again"), 0.2)
    packed, lengths = Packed(splits["train"], 128, 0), splits["train"].lengths()
    assert f"{lengths.sum() / len(packed.bins) / 128:.0%} full" in out
    fewest = max((lengths > 64).sum(), lengths.sum() / 128)  # no window holds two of the first kind
    assert fewest <= len(packed.bins) < 1.05 * fewest


@pytest.mark.parametrize("change, message", [
    (dict(batch_tokens=1000), "try 1024"), (dict(max_len=999), "256 tokens that the model reads"),
    (dict(max_len=1), "between 2 and"), (dict(warmup_steps=9), "less than the 6 steps"),
    (dict(data="nowhere.jsonl"), "no such file"), (dict(init_from="nowhere"), "no such file")])
def test_a_mistake_is_one_line(tiny, tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        train_sft.train(config(tiny, tmp_path / "run", **change), ALONE)
    assert not list(Path(tmp_path).glob("run/step*"))


def test_pad_right_gives_each_row_what_it_gives_alone(model):
    """The evaluation pads where training packs: the same loss."""
    some = rows(5)
    idx, targets, _ = pad_right(some, 3)
    padded = -token_logps(model(idx, hidden=True), model.lm_head.weight, targets, "sum")
    alone = sum(sft_loss(model(tokens, hidden=True), model.lm_head.weight, tokens, mask)
                for tokens, mask, _ in (window_batch([[row]], len(row.ids)) for row in some))
    assert padded.item() == pytest.approx(alone.item(), rel=1e-9)

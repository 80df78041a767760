"""What baselines.py counts, against slow dictionaries, closed forms and the lzma module by hand."""
import json
import lzma
import math
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

import data
from bench import baselines
from bench.baselines import BASE, END, fit, ngram_bits, pack, probability, symbols, xz_bits
from plumbing import terminal

HERE = Path(__file__).parent.parent


def random_text(n: int, seed: int, alphabet: int = 6) -> np.ndarray:
    """Symbols with some order in them: each is drawn near the one before; a few ENDs."""
    rng = np.random.default_rng(seed)
    walk = np.abs(rng.geometric(0.4, n).cumsum() % (2 * alphabet) - alphabet)
    return np.where(rng.random(n) < 0.02, END, 97 + walk).astype(np.uint16)


def slow_probability(text: list[int], history: list[int], x: int, order: int) -> float:
    """The formula of the docstring, with dictionaries and recursion instead of sorted arrays."""
    padded = [END] * order + text
    counts = [Counter() for _ in range(order + 1)]
    for i in range(order, len(padded)):
        counts[order][tuple(padded[i - order:i + 1])] += 1
    for k in range(order - 1, -1, -1):
        for gram in counts[k + 1]:
            counts[k][gram[1:]] += 1

    def p(k: int, h: tuple, x: int) -> float:
        if k < 0:
            return 1 / 257
        n = Counter(counts[k].values())
        if min(n[i] for i in (1, 2, 3, 4)) == 0:
            d = [0, 0.5, 0.5, 0.5]
        else:
            y = n[1] / (n[1] + 2 * n[2])
            d = [0] + [max(0.1, i - (i + 1) * y * n[i + 1] / n[i]) for i in (1, 2, 3)]
        after = {gram[-1]: c for gram, c in counts[k].items() if gram[:-1] == h}
        if not after:
            return p(k - 1, h[1:], x)
        c = after.get(x, 0)
        mass = sum(d[min(v, 3)] for v in after.values())
        return (c - d[min(c, 3)] + mass * p(k - 1, h[1:], x)) / sum(after.values())

    return p(order, tuple(history), x)


@pytest.mark.parametrize("order", [0, 1, 3, 5])
def test_ngram_agrees_with_dictionaries(order):
    train, val = random_text(1500, 1), random_text(120, 2)
    history = [END] * order + val.tolist()
    slow = sum(-math.log2(slow_probability(train.tolist(), history[i:i + order], x, order))
               for i, x in enumerate(val.tolist()))
    assert ngram_bits(train, val, order) == pytest.approx(slow, rel=1e-9)  # rounding of float64


def test_discounts_are_estimated_and_never_take_nothing():
    """Y = 10/12; D(2) would be -248: a context could then give nothing to what it never saw."""
    d = baselines.discounts(np.repeat([1, 2, 3, 4], [10, 1, 100, 1]))
    assert d == pytest.approx([0, 1 - 2 / 12, 0.1, 3 - 4 / 120])
    estimated = [level.discount.tolist() for level in fit(random_text(1500, 1), 3)]
    assert any(d != [0, 0.5, 0.5, 0.5] for d in estimated)  # so the comparison above saw some


def test_probabilities_sum_to_one_after_any_context():
    levels = fit(random_text(3000, 3), 5)
    rng = np.random.default_rng(0)
    seen = pack(random_text(3000, 3), 5)[rng.integers(0, 3000, 20)] // BASE
    never = rng.integers(0, BASE**5, 20)
    for context in np.concatenate((seen, never)).tolist():
        p = probability(levels, context * BASE + np.arange(BASE))
        assert p.min() > 0
        assert p.sum() == pytest.approx(1, abs=1e-12)


def test_order_0_costs_the_entropy():
    """All n_i are 0, so D is 0.5: P(x) = (c - 0.5 + 3 * 0.5 / 257) / N for 3 symbols."""
    text = np.repeat(np.array([97, 98, 99], np.uint16), [5000, 3000, 2000])
    entropy = -sum(p * math.log2(p) for p in (0.5, 0.3, 0.2))
    assert ngram_bits(text, text, 0) / len(text) == pytest.approx(entropy, abs=1e-3)
    exact = -sum(c * math.log2((c - 0.5 + 1.5 / 257) / 10_000) for c in (5000, 3000, 2000))
    assert ngram_bits(text, text, 0) == pytest.approx(exact, rel=1e-12)


def test_what_was_read_before_costs_little():
    rng = np.random.default_rng(4)
    train = rng.integers(0, 256, 20_000).astype(np.uint16)  # 8 bits a byte to a first reader
    again, fresh = train[5000:9000], rng.integers(0, 256, 4000).astype(np.uint16)
    assert ngram_bits(train, again, 5) < 0.3 * 8 * len(again)
    assert ngram_bits(train, fresh, 5) > 0.98 * 8 * len(fresh)
    assert xz_bits(train, again) < 0.1 * 8 * len(again)  # in pieces of 273
    assert xz_bits(train, fresh) > 0.98 * 8 * len(fresh)


def test_scoring_in_chunks_changes_nothing(monkeypatch):
    train, val = random_text(2000, 5), random_text(500, 6)
    whole = ngram_bits(train, val, 4)
    monkeypatch.setattr(baselines, "CHUNK", 7)
    assert ngram_bits(train, val, 4) == pytest.approx(whole, rel=1e-12)


def test_xz_is_the_lzma_module():
    train, val = random_text(30_000, 7), random_text(3000, 8)
    a, b = (bytes(0 if s == END else s for s in t.tolist()) for t in (train, val))
    by_hand = len(lzma.compress(a + b, preset=9 | lzma.PRESET_EXTREME)) - len(
        lzma.compress(a, preset=9 | lzma.PRESET_EXTREME))
    assert xz_bits(train, val) == 8 * by_hand


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A folder as data.py makes it, and the texts of its documents by (split, lang)."""
    from plumbing.jobs import Progress
    from tokenizer import HAN_PATTERN, count_pieces, dump, train_bpe
    folder = tmp_path_factory.mktemp("baselines")
    rng = np.random.default_rng(9)
    texts = [("en", " ".join(rng.choice(["cat", "naïve", "the", "\0x"], 30))) for _ in range(60)]
    texts += [("zh", "".join(rng.choice(["山", "水", "人。"], 30))) for _ in range(60)]
    (folder / "text.jsonl").write_text("".join(
        json.dumps({"text": f"{t} {i}", "lang": lang}) + "\n" for i, (lang, t) in enumerate(texts)))
    ranks = train_bpe(count_pieces(t for _, t in texts), 300)
    (folder / "tok.txt").write_text(dump(ranks, HAN_PATTERN))
    data.prepare(data.Config(input=str(folder / "text.jsonl"), tokenizer=str(folder / "tok.txt"),
                             out_dir=str(folder / "data"), val_fraction=0.2, workers=1), Progress())
    return str(folder / "data"), [f"{t} {i}" for i, (_, t) in enumerate(texts)]


def test_token_files_give_back_the_documents(prepared):
    folder, texts = prepared
    tok, splits = data.open_data(folder)
    found = []
    for file in splits["train"] + splits["val"]:
        text = symbols(tok, file)
        *documents, rest = np.split(text, np.flatnonzero(text == END) + 1)
        assert len(documents) == file.n_docs and len(rest) == 0
        found += [bytes(d[:-1].tolist()).decode() for d in documents]
    assert sorted(found) == sorted(texts)


def test_command_line_scores_both_languages(prepared):
    folder, _ = prepared
    done = subprocess.run([sys.executable, "-m", "bench.baselines", f"--data_dir={folder}"],
                          cwd=HERE, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()[-8:]
    assert [line[:13] for line in lines if line[0] != "{"] == [
        "en      n-gra", "en      xz -9", "zh      n-gra", "zh      xz -9"]
    found = [json.loads(line) for line in lines if line[0] == "{"]
    tok, splits = data.open_data(folder)
    files = {(split, f.lang): f for split in splits for f in splits[split]}
    for ngram, xz in (found[:2], found[2:]):
        lang = ngram["job"]
        train, val = (symbols(tok, files[split, lang]) for split in ("train", "val"))
        n_bytes = sum(s < END for s in val.tolist())  # END costs bits and has no byte
        assert ngram["value"] == pytest.approx(ngram_bits(train, val, 5) / n_bytes, rel=1e-12)
        assert xz["value"] == pytest.approx(xz_bits(train, val) / n_bytes, rel=1e-12)


def test_a_mistake_is_one_line_and_exit_code_2(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["baselines.py", "--data_dir=/no/such/folder"])
    with pytest.raises(SystemExit) as end:
        terminal.run(baselines.main)
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert "no prepared data here" in error and error.count("\n") == 1


def test_a_language_without_training_text_is_an_error(prepared, monkeypatch):
    tok, splits = data.open_data(prepared[0])
    only_en = {"train": splits["train"][:1], "val": splits["val"]}
    monkeypatch.setattr(baselines, "open_data", lambda folder: (tok, only_en))
    monkeypatch.setattr(sys, "argv", ["baselines.py"])
    with pytest.raises(ValueError, match="no training text in the language zh"):
        baselines.main()


def test_a_header_that_counts_other_bytes_is_an_error(prepared):
    tok, splits = data.open_data(prepared[0])
    splits["val"][0].n_bytes += 1
    with pytest.raises(ValueError, match="its tokens spell"):
        symbols(tok, splits["val"][0])

"""Token files as a model reads them: refused when damaged, windows in an order that is a pure
function of seed and index, and passages that score every token once."""
import hashlib
import time

import numpy as np
import pytest

from data import IGNORE, Windows, hash64, passages, prefetch
from plumbing import tokenfiles
from plumbing.order import permuted
from plumbing.tokenfiles import open_token_file, pack_header


def write(path, ids, vocab_size=100, lang="en"):
    raw = np.asarray(ids, "<u2").tobytes()
    path.write_bytes(pack_header(2, len(ids), vocab_size, 7, 3, "00" * 32,
                                 hashlib.sha256(raw).digest(), lang) + raw)
    return open_token_file(str(path))


def test_any_damage_to_a_token_file_is_refused_by_name(tmp_path, monkeypatch):
    path = tmp_path / "x.bin"
    file = write(path, range(90), lang="zh-hant")
    assert (file.vocab_size, file.n_bytes, file.n_docs, file.lang) == (100, 7, 3, "zh-hant")
    assert file.ids.tolist() == list(range(90)) and path.stat().st_size == 256 + 2 * 90
    good = path.read_bytes()
    bad = [good[:n] for n in range(0, len(good), 5)] + [good + b"\0\0", b"x" * len(good)]
    for raw in bad + [good[:i] + bytes([good[i] ^ 4]) + good[i + 1:] for i in range(len(good))]:
        path.write_bytes(raw)
        with pytest.raises(ValueError, match="x.bin: "):
            open_token_file(str(path))
    monkeypatch.setattr(tokenfiles, "HASHED_BYTES", 99)
    open_token_file(str(path))  # of a large file header and size only, and this is the last id


@pytest.mark.parametrize("n", [1, 2, 3, 5, 64, 100, 1000, 1024, 65537])
def test_an_epoch_is_a_permutation_and_any_is_about_as_likely(n):
    orders = [permuted(np.arange(n), n, hash64(1, epoch)) for epoch in range(4)]
    assert all(sorted(order.tolist()) == list(range(n)) for order in orders)
    assert permuted(np.array([n - 1]), n, hash64(1, 0)) == orders[0][-1]  # each by itself
    assert n < 64 or max((a == b).mean() for a in orders for b in orders if a is not b) < 0.1
    if n <= 100:  # chi² of where each window comes, over its degrees of freedom: 1 by chance
        counts = np.zeros((n, n))
        for key in range(20 * n):
            counts[np.arange(n), permuted(np.arange(n), n, hash64(key))] += 1
        chi2 = ((counts - 20) ** 2 / 20).sum() / max(1, n - 1) ** 2
        assert chi2 < (1.15 if n >= 64 else 4)  # of few windows some come 20 % too often


@pytest.mark.parametrize("length", [1, 7, 16])
def test_windows_stay_in_their_file_and_cover_it(tmp_path, length):
    for size in (length + 1, 2 * length, 2 * length + 1, 3 * length - 1, 5 * length + 3):
        windows = Windows([write(tmp_path / "a.bin", np.arange(size)),
                           write(tmp_path / "b.bin", np.arange(length)),  # too short for a window
                           write(tmp_path / "c.bin", np.arange(1000, 1001 + length), 2000)],
                          length, seed=3)
        assert windows.n == max(size // length - 1, 1) + 1
        offsets = set()
        for epoch in range(200):
            x, y = windows.batch(epoch * windows.n, windows.n)
            *firsts, last = sorted(x[:, 0].tolist())
            assert last == 1000 and firsts == list(range(firsts[0], size - length, length))[
                :windows.n - 1]  # each window once
            assert ((x - x[:, :1]).numpy() == np.arange(length)).all() and (y == x + 1).all()
            offsets.add(firsts[0])
        assert len(offsets) == min(length, size - length)  # all that there is room for


def test_a_batch_depends_on_seed_and_index_only(tmp_path):
    r = np.random.default_rng(0)
    files = [write(tmp_path / f"{n}.bin", r.integers(0, 100, n)) for n in (40_000, 9_000)]
    windows, again = Windows(files, 32, seed=1), Windows(files, 32, seed=1)
    assert all(np.shares_memory(ids, f.ids) for ids, f in zip(windows.ids, files))  # no copy
    for start in (0, windows.n - 5, 3 * windows.n - 1, 1020):  # also across epochs and blocks
        x, y = windows.batch(start, 8)
        parts = [again.batch(start + 3, 5), again.batch(start, 3)]  # two ranks, in any order
        assert (x[3:] == parts[0][0]).all() and (y[:3] == parts[1][1]).all()
    for other in (Windows(files, 32, seed=2).batch(0, 8), windows.batch(windows.n, 8)):
        assert not (other[0] == windows.batch(0, 8)[0]).all()


def test_bad_ids_and_too_short_files_are_refused_by_name(tmp_path):
    good, bad = write(tmp_path / "a.bin", [0] * 99), write(tmp_path / "b.bin", [100] * 99)
    for use in (lambda: Windows([good, bad], 7, 0).batch(0, 99), lambda: [*passages(bad, 7, 2)]):
        with pytest.raises(ValueError, match="b.bin: holds the id 100, outside its vocabulary"):
            use()
    with pytest.raises(ValueError, match=f"{tmp_path}: the training split is shorter than one"):
        Windows([good], 99, 0)


def test_a_language_too_short_for_a_window_is_named(tmp_path, capsys):
    """It was left out without a word."""
    Windows([write(tmp_path / "en.bin", [0] * 99), write(tmp_path / "zh.bin", [0] * 7)], 7, 0)
    assert capsys.readouterr().out == (
        f"{tmp_path}/zh.bin is shorter than a window of 7 tokens: not learnt from\n")


@pytest.mark.parametrize("size", [0, 1, 2, 15, 16, 17, 100])
def test_passages_score_every_token_but_the_first_once(tmp_path, size):
    file, n = write(tmp_path / "a.bin", np.arange(size) % 50 + 1), max(size - 1, 0)
    batches = list(passages(file, 5, batch_size=2))
    assert all(x.shape == y.shape == (len(x), 5) and len(x) <= 2 for x, y in batches)
    inputs, targets = ([t for xy in batches for t in xy[i].flatten().tolist()] for i in (0, 1))
    assert targets == file.ids[1:].tolist() + [IGNORE] * (-n % 5)
    assert inputs[:n] == file.ids[:n].tolist() and min(inputs, default=0) >= 0
    assert sum(len(x) for x, _ in passages(file, 5, 2, max_tokens=25)) == min(-(-n // 5), 5)


def test_a_corpus_of_100_billion_tokens_opens_in_a_second(tmp_path):
    """A sparse file: 200 GB of zeros that take no room. Header, windows and a batch from anywhere.
    With its contents hashed it had not ended after 150 s."""
    path, n = tmp_path / "huge.bin", 100_000_000_000
    with open(path, "wb") as f:
        f.write(pack_header(2, n, 65_536, 7, 3, "00" * 32, b"\0" * 32, "en"))
        f.truncate(256 + 2 * n)
    begin = time.perf_counter()
    windows = Windows([open_token_file(str(path))], 2048, seed=0)
    for start in (0, windows.n // 2, 3 * windows.n):
        x, y = windows.batch(start, 4)
        assert x.shape == y.shape == (4, 2048) and not x.any()
    assert time.perf_counter() - begin < 1 and windows.n == n // 2048 - 1


class SlowDisk:
    """Token ids on a disk of 200 MB/s that reads 128 KiB ahead at each place, as Linux does."""

    def __init__(self, ids):
        self.ids = ids

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, where):
        time.sleep(max(131_072, 2 * (where.stop - where.start)) / 200e6)
        return self.ids[where]


def waiting_share(windows: Windows, plain: list) -> float:
    """Share of the time that a loop with 100 ms of work a step waits for its batches, but the
    first."""
    begin, waited, asked = time.perf_counter(), 0.0, 0.0
    for i, (x, y) in enumerate(prefetch(windows.batch, ((16 * i, 16) for i in range(len(plain))))):
        if i:
            waited += time.perf_counter() - asked
        assert (x == plain[i][0]).all() and (y == plain[i][1]).all()
        time.sleep(0.1)
        asked = time.perf_counter()
    return waited / (time.perf_counter() - begin)


def test_a_disk_of_200_mb_a_second_does_not_keep_training_waiting(tmp_path):
    """Batches are made while the one before is learnt from. 16 windows cost 10.5 ms of disk: 9 % of
    the time if one came after the other, and less than 1 % here. The best of five rounds: other
    programs can only make it slower."""
    windows = Windows([write(tmp_path / "a.bin", np.arange(90_000) % 100)], 32, seed=0)
    plain = [windows.batch(16 * i, 16) for i in range(12)]
    windows.ids = [SlowDisk(ids) for ids in windows.ids]
    assert any(waiting_share(windows, plain) < 0.01 for _ in range(5))


def test_what_goes_wrong_ahead_is_raised_where_it_is_asked_for():
    found = prefetch(lambda n: 1 // n, ((n,) for n in (2, 1, 0)))
    assert [next(found), next(found)] == [0, 1]
    with pytest.raises(ZeroDivisionError):
        next(found)

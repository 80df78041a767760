"""The index: the scores of the formula, whatever its history, and old or new after a crash."""
import builtins
import json
import math
import os
import random
import shutil
import sys
import tracemalloc
import zlib

import numpy as np
import pytest

from search import manifest as manifest_module
from search.index import Index, blend, top
from search.segment import Chunk, split
from search.topics import terms

WORDS = "apple pear 猫 狗 鸭子 red blue river 山 水 北京 上海 rain snow moon 太阳 tea rice".split()


def chunk(doc, text, start=0):
    name = f"{doc}/{zlib.crc32(text.encode())}"
    return Chunk(name, doc, start, start + len(text), 1, "", "", text)


def document(seed, n=3):
    r = random.Random(seed)
    return [chunk(f"d{seed}", " ".join(r.choices(WORDS, k=12)), 20 * i) for i in range(n)]


def hashing(texts, kind):
    """An embedder: counted terms, hashed."""
    rows = np.zeros((len(texts), 64), np.float32)
    for row, text in zip(rows, texts):
        for term in terms(text):
            row[zlib.crc32(term.encode()) % 64] += 1
    return rows


def scores(index, question):
    return index.bm25(index.postings(question))


def fill(folder, seeds, **settings):
    with Index(str(folder), True, **settings) as made:
        for seed in seeds:
            made.put(f"d{seed}", str(seed), document(seed))
            made.commit()
    return Index(str(folder), **settings)


def test_bm25_is_the_formula(tmp_path):
    made = fill(tmp_path, range(5))
    texts = [c.text for seed in range(5) for c in document(seed)]
    bags = [terms(t) for t in texts]
    mean = sum(map(len, bags)) / len(bags)
    for question in ("apple 北京", "鸭子 and a river", "nothing known", ""):
        want = []
        for bag in bags:
            score = 0.0
            for term in set(terms(question)):
                df, tf = sum(term in b for b in bags), bag.count(term)
                idf = math.log(1 + (len(bags) - df + 0.5) / (df + 0.5))
                score += idf * tf / (tf + 1.2 * (1 - 0.75 + 0.75 * len(bag) / mean))
            want.append(score)
        assert np.allclose(scores(made, question), want, atol=1e-6)


def test_a_history_of_changes_leaves_what_a_rebuild_would(tmp_path):
    """Ten additions, changes, removals and a compaction; scores to the last bit, order and all."""
    with Index(str(tmp_path / "a"), True) as made:
        for seed in range(10):
            made.put(f"d{seed}", "x", document(seed + 50))
            made.commit()
        for seed in range(0, 10, 2):
            made.put(f"d{seed}", "y", document(seed))
            made.commit()
        for seed in range(1, 10, 2):
            made.remove(f"d{seed}")
        made.commit()
        assert len(made.segments) < 8
    rebuilt = fill(tmp_path / "b", range(0, 10, 2))
    for compacted in (False, True):
        if compacted:
            with Index(str(tmp_path / "a"), True) as made:
                made.compact()
                assert not made.manifest["dead"] and len(made.alive) == 15
        grown = Index(str(tmp_path / "a"))
        assert len(grown) == len(rebuilt) == 15
        for question in ("apple 北京 tea", "太阳 moon", "red blue river 山 水"):
            a, b = grown.search(question, 10), rebuilt.search(question, 10)
            assert [(h.chunk, h.score, h.coverage) for h in a] == [
                (h.chunk, h.score, h.coverage) for h in b] and a


def test_an_answer_needs_the_question_in_it(tmp_path):
    with Index(str(tmp_path), True) as made:
        made.put("a", "", [chunk("a", "the red river flows to Beijing")])
        made.put("b", "", [chunk("b", "北京的茶很好喝")])
        made.commit()
        good, = made.search("Where does the red river flow?", 1)
        poor, = made.search("the red elephant of the circus", 1)
        assert good.coverage == pytest.approx(1) or good.coverage > 0.6
        assert poor.coverage < 0.5
        assert made.search("xyzzy", 3) == []


def test_near_duplicates_are_shown_once_and_come_back_when_the_first_is_gone(tmp_path):
    question = "Who serviced the pump in the cellar?"
    text = "The pump in the cellar must be serviced each spring by two people with a lamp"
    with Index(str(tmp_path), True) as made:
        made.put("a", "", [chunk("a", text)])
        made.put("b", "", [chunk("b", text + "!")])
        made.put("c", "", [chunk("c", "Another pump stands in the yard, it needs no service")])
        made.commit()
        assert [h.chunk.doc for h in made.search(question, 3)] == ["a", "c"]
        made.remove("a")
        made.commit()
        assert [h.chunk.doc for h in made.search(question, 3)] == ["b", "c"]


# ------------------------------------------------------------------------ vectors

def test_vectors_rank_fuse_and_are_not_made_twice(tmp_path):
    with Index(str(tmp_path), True, hashing, "hash") as made:
        for seed in range(4):
            made.put(f"d{seed}", "", document(seed))
        assert made.commit() == 12
        made.put("d1", "changed", [*document(1)[:2], chunk("d1", "a new sentence about tea")])
        assert made.commit() == 1  # the two that stayed keep their vectors
        made.compact()
    made = Index(str(tmp_path), False, hashing, "hash")
    question = document(2)[1].text
    cosines = made.cosines(question)
    assert made.chunk(int(cosines.argmax())) == document(2)[1] == made.search(question, 1)[0].chunk
    assert cosines.max() == pytest.approx(1, abs=1e-5)
    want = hashing([c.full for c in [made.chunk(i) for i in range(12)]], "passage")
    want /= np.linalg.norm(want, axis=1, keepdims=True)
    assert np.allclose(np.array(made.vectors), want, atol=1e-6)


def test_a_blend_weighs_both_scores_and_leaves_out_the_dead():
    """By hand. Seen to fail with ranks, and with a scale over the dead as well."""
    lexical, cosines = np.array([4.0, 0.0, 2.0, 9.0]), np.array([0.6, 0.8, 0.7, -1.0])
    alive = np.array([True, True, True, False])
    assert blend(lexical, cosines, alive) == pytest.approx([0.5, 0.5, 0.5, 0.0], abs=2e-6)
    assert blend(lexical, 10 * cosines, alive) == pytest.approx([0.5, 0.5, 0.5, 0.0], abs=2e-6)
    assert (blend(lexical[:1], cosines[:1], alive[:1]) > 0).all()  # alone, and found
    assert not blend(lexical, cosines, ~alive & alive).any()


def test_a_dense_search_copies_no_vectors_and_ranks_as_double_precision_does(tmp_path):
    """One fp32 product of the mapped file: at its peak a search holds some numbers a chunk and not
    the vectors, which at 100,000 chunks of 384 numbers are 154 MB. To fail with
    np.array(self.vectors) @ …, and with the question's vector as float64, which converts all."""
    wide = lambda texts, kind: np.repeat(hashing(texts, kind), 16, axis=1)  # 1024 numbers
    with Index(str(tmp_path), True, wide, "wide") as made:
        for seed in range(20):
            made.put(f"d{seed}", "", document(seed, 50))
        made.commit()
        question = "apple 北京 tea"
        top(made.cosines(question), 20)
        tracemalloc.start()
        top(made.cosines(question), 20)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert made.vectors.nbytes == 1000 * 1024 * 4 and peak < made.vectors.nbytes / 8
        cosines = made.cosines(question)
        q = wide([question], "query")[0].astype(np.float64)
        want = np.asarray(made.vectors, np.float64) @ (q / np.linalg.norm(q))
        assert cosines.dtype == np.float32 and np.allclose(cosines, want, atol=1e-6)
        for k in (1, 7, 20, 999, 1000, 2000):
            order, least = np.argsort(-cosines, kind="stable"), np.sort(cosines)[-min(k, 1000)]
            want = [i for i in order if cosines[i] >= least and cosines[i] > 0][:2 * k]
            assert top(cosines, k) == want


def test_another_embedder_is_refused_by_name(tmp_path):
    fill(tmp_path / "v", range(3), embed=hashing, embed_name="hash")
    wide = lambda texts, kind: np.ones((len(texts), 32), np.float32)
    twisted = lambda texts, kind: hashing(texts, kind)[:, ::-1]
    for other, why in ((wide, r"hash \(64 numbers.*other \(32\)"), (twisted, "made with hash")):
        with pytest.raises(ValueError, match=why):
            Index(str(tmp_path / "v"), False, other, "other")
    with pytest.raises(ValueError, match="--embed=hash"):  # adding without it
        Index(str(tmp_path / "v"), True)
    fill(tmp_path / "n", range(3))
    with pytest.raises(ValueError, match="without an embedder"):
        Index(str(tmp_path / "n"), True, hashing, "hash")


def test_a_question_of_unknown_words_is_answered_by_vectors(tmp_path):
    """That is what vectors are for. The sums of BM25 were those of nothing, which numpy makes of
    integers, and the blend of both scores ended in an OverflowError."""
    made = fill(tmp_path, range(5), embed=hashing, embed_name="hash")
    made.embed = lambda texts, kind: hashing(["tea"] * len(texts), kind)
    best = int(np.argmax(made.cosines("tea")))
    assert made.search("unheard", 1)[0].chunk == made.chunk(best)


def test_documents_are_removed_without_the_embedder(tmp_path):
    """Forgetting a note needed the server or the model that had made its vectors. Four of five go,
    so that the index is written anew, and the vectors that stay are those that were there."""
    with fill(tmp_path, range(5), embed=hashing, embed_name="hash") as made:
        names, before = sorted(made.manifest["documents"]), made.cosines("tea")[made.alive]
    with Index(str(tmp_path), True, only_remove=True) as index:
        for name in names[1:]:
            index.remove(name)
        index.commit()
        assert index.manifest["generation"] == 1
    after = Index(str(tmp_path), False, hashing, "hash")
    assert list(after.manifest["documents"]) == names[:1]
    assert np.allclose(after.cosines("tea"), before[:len(after)]) and after.search("tea")


def test_an_embedder_that_does_not_speak_the_language_is_refused(tmp_path):
    """It gives every Chinese text the same vector, as a model does that knows none of its words."""
    def english(texts, kind):
        return hashing(["".join(c if c < "\u3400" else "?" for c in t) + " x" for t in texts], kind)

    with Index(str(tmp_path), True, english, "english-only") as made:
        made.put("a", "", [chunk("a", "The river is red")])
        made.commit()
        made.put("b", "", [chunk("b", "北京的茶很好喝，大家都喜欢")])
        with pytest.raises(ValueError, match="english-only does not speak zh.*bge-small-zh"):
            made.commit()
    assert len(Index(str(tmp_path), False, english, "english-only")) == 1


def test_vectors_that_are_not_numbers_are_never_found(tmp_path):
    def broken(texts, kind):
        rows = hashing(texts, kind)
        rows[[i for i, t in enumerate(texts) if "snow" in t]] = np.nan
        return rows

    with Index(str(tmp_path), True, broken, "broken") as made:
        made.put("a", "", [chunk("a", "snow and rain"), chunk("a", "rain and tea", 30)])
        made.commit()
        assert made.cosines("rain")[0] == 0 and made.search("rain")[0].chunk.text == "rain and tea"


def test_a_single_note_can_be_asked(tmp_path):
    """A word that all of one note's chunks hold tells little by its idf; a word that none holds
    would outweigh it, and everything be refused. Seen to fail without FEW."""
    with Index(str(tmp_path), True) as made:
        made.put("a.md", "", split("# Dog\n\nThe dog ran to the fog.", "a.md", count=len))
        made.commit()
        assert made.search("Where did the dog go?")[0].coverage >= 0.3
        assert all(hit.coverage < 0.3 for hit in made.search("How tall is the tower in Paris?"))


# ------------------------------------------------------------------------ crashes and damage

class Crash(BaseException):
    """What a power cut is to the program: nothing behind it runs."""


def crash_at(monkeypatch, n):
    """Raise Crash at the n-th call that touches the disk; returns a list of the calls so far."""
    calls = []

    def counted(name, real):
        def call(*args, **kwargs):
            calls.append(name)
            if len(calls) == n:
                raise Crash(name)
            return real(*args, **kwargs)
        return call

    for name in ("fsync", "replace", "truncate", "open", "unlink"):
        monkeypatch.setattr(os, name, counted(name, getattr(os, name)))
    real_open = builtins.open

    class File:
        def __init__(self, f):
            self.f = f

        def __getattr__(self, name):
            got = getattr(self.f, name)
            return counted(name, got) if name in ("write", "truncate", "flush") else got

        def __enter__(self):
            return self

        def __exit__(self, *error):
            self.f.close()

    def opened(path, mode="r", *args, **kwargs):
        f = real_open(path, mode, *args, **kwargs)
        if n and ("w" in mode or "+" in mode):
            calls.append("open")
            if len(calls) == n:
                raise Crash("open")
            return File(f) if not str(path).endswith((".npz", ".lock")) else f
        return f
    monkeypatch.setattr(builtins, "open", opened)
    return calls


def test_a_crash_at_any_call_leaves_the_old_index_or_the_new(tmp_path, monkeypatch):
    old, new = "old", "new"
    fill(tmp_path / old, range(4)).close()
    shutil.copytree(tmp_path / old, tmp_path / new)
    with Index(str(tmp_path / new), True) as made:
        made.remove("d0")
        made.put("d9", "", document(9))
        made.commit()
    def state(folder):
        with Index(str(folder)) as made:
            return [(h.chunk, h.score) for h in made.search("apple tea 北京 moon", 20)]
    states = [state(tmp_path / old), state(tmp_path / new)]
    assert states[0] != states[1]
    n = seen_old = seen_new = 0
    while True:
        n += 1
        place = tmp_path / f"try{n}"
        shutil.copytree(tmp_path / old, place)
        with monkeypatch.context() as patch:
            calls = crash_at(patch, n)
            try:
                with Index(str(place), True) as made:
                    made.remove("d0")
                    made.put("d9", "", document(9))
                    made.commit()
                crashed = False
            except Crash:
                crashed = True
        now = state(place)
        assert now in states, calls
        seen_old, seen_new = seen_old + (now == states[0]), seen_new + (now == states[1])
        with Index(str(place), True) as made:  # and it can go on from there
            made.remove("d0")
            made.put("d9", "", document(9))
            made.commit()
        assert state(place) == states[1]
        if not crashed:
            break
    assert n > 15 and seen_old > 10 and seen_new > 1
    print(f"\n{n - 1} calls, old {seen_old}, new {seen_new}")


def interrupt_at(n):
    """Ctrl-C at the n-th line of the methods of an index that change it, from here on. Returns the
    lines left."""
    left, methods = [n], ("commit", "_write", "compact", "_map", "_append", "_add_segment",
                          "_replace_manifest")

    def trace(frame, event, argument):
        if frame.f_code.co_name not in methods:
            return None
        left[0] -= event == "line"
        if event == "line" and left[0] == 0:
            sys.settrace(None)
            raise KeyboardInterrupt
        return trace
    sys.settrace(trace)
    return left


def test_ctrl_c_at_any_line_of_a_commit_leaves_another_one_right(tmp_path, monkeypatch):
    """The chunks of the commit that was stopped were written once more by the next, and the index
    was damaged for good: each search ended with an IndexError. Six chunks of 15 are dead then, so
    that all is written anew as well. To fail without the way back in `commit`; without the one step
    of `compact`, documents are lost."""
    def commit(made):
        for seed in (0, 1):
            made.remove(f"d{seed}")
        made.put("d9", "", document(9))
        return made

    def state(made):
        return sorted(made.manifest["documents"]), [
            (hit.chunk, hit.score) for hit in made.search("apple tea 北京 moon", 20)]

    monkeypatch.setattr(os, "fsync", lambda number: None)  # which takes most of the time
    embed = {"embed": hashing, "embed_name": "hash"}
    fill(tmp_path / "old", range(4), **embed).close()
    shutil.copytree(tmp_path / "old", tmp_path / "want")
    with Index(str(tmp_path / "want"), True, **embed) as made:
        commit(made).commit()
        assert made.manifest["generation"] == 1
        want = state(made)
    n, left = 0, [0]
    while left[0] <= 0:
        n, place = n + 1, tmp_path / f"try{n}"
        shutil.copytree(tmp_path / "old", place)
        with Index(str(place), True, **embed) as made:
            commit(made)
            left = interrupt_at(n)
            try:
                made.commit()
            except KeyboardInterrupt:
                assert left == [0]
            finally:
                sys.settrace(None)
            made.commit()
            assert state(made) == want, n
        assert state(Index(str(place), **embed)) == want, n
        shutil.rmtree(place)
    assert n > 100


def test_two_threads_that_read_do_not_move_each_others_place(tmp_path):
    """Two questions at a server at once, and one was answered from a wrong passage, or with an
    error of JSON: both sought in the same file. Here the second reads whenever the first has."""
    made = fill(tmp_path, range(3))
    text, want = made._text, [made.chunk(i) for i in range(9)]

    class Shared:
        def __getattr__(self, name):
            def call(*arguments):
                found = getattr(text, name)(*arguments)
                made._text = text
                assert made.chunk(5) == want[5]
                made._text = self
                return found
            return call

        def __getitem__(self, at):
            return text[at]

    made._text = Shared()
    assert [made.chunk(i) for i in range(9)] == want


def another_format(raw):
    manifest = json.loads(raw)[1] | {"format": 7}
    return json.dumps([manifest_module.sha256_of(manifest), manifest]).encode()


def test_damage_is_named(tmp_path):
    """Seen to fail with the checks of size only, as they once were."""
    fill(tmp_path, range(4)).close()
    for path, change, why in (
            (next(tmp_path.glob("terms-*")), lambda b: b[:50] + b"\1" + b[51:], "terms-.*checksum"),
            (next(tmp_path.glob("chunks-*")), lambda b: b[:-5], "chunks-.*bytes where"),
            (next(tmp_path.glob("chunks-*")), lambda b: b[:9] + b"x" + b[10:], "chunks-.*damaged"),
            (next(tmp_path.glob("starts-*")), lambda b: b[:9] + b"x" + b[10:], "starts-.*damaged"),
            (tmp_path / "manifest.json", lambda b: b.replace(b'"d0"', b'"e0"'), "checksum"),
            (tmp_path / "manifest.json", lambda b: b[:-2], "manifest.json: damaged"),
            (tmp_path / "manifest.json", another_format, "format 7")):
        whole = path.read_bytes()
        path.write_bytes(change(whole))
        with pytest.raises(ValueError, match=why):
            Index(str(tmp_path))
        path.write_bytes(whole)
    assert len(Index(str(tmp_path))) == 12
    with pytest.raises(ValueError, match="no index here"):
        Index(str(tmp_path / "nowhere"))


def test_only_one_process_writes(tmp_path):
    with Index(str(tmp_path), True):
        with pytest.raises(ValueError, match="another process"):
            Index(str(tmp_path), True)
    Index(str(tmp_path), True).close()


@pytest.mark.parametrize("good", range(4))
def test_a_full_disk_leaves_the_old_index(tmp_path, monkeypatch, good):
    """And once there is room again, the same commit writes what a first one would. To fail without
    the way back: the second time the chunks that had fitted were there twice."""
    fill(tmp_path / "full", range(2)).close()
    before = json.loads((tmp_path / "full/manifest.json").read_text())
    with Index(str(tmp_path / "full"), True) as made:
        made.put("d7", "", document(7))
        done, real = [], os.fsync

        def full(*args):
            done.append(args)
            if len(done) > good:
                raise OSError(28, "No space left on device")
            return real(*args)
        monkeypatch.setattr(manifest_module.os, "fsync", full)
        with pytest.raises(OSError, match="No space left|was not written"):
            made.commit()
        monkeypatch.undo()
        assert json.loads((tmp_path / "full/manifest.json").read_text()) == before
        assert len(Index(str(tmp_path / "full"))) == 6
        made.commit()
    with Index(str(tmp_path / "want"), True) as made:
        for seed, sha in ((0, "0"), (1, "1"), (7, "")):
            made.put(f"d{seed}", sha, document(seed))
            made.commit()
    for path in (tmp_path / "want").iterdir():
        assert path.read_bytes() == (tmp_path / "full" / path.name).read_bytes(), path.name

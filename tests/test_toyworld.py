"""The tiny world: its floor against brute force, its answers against a reader of its own text."""
import json
import os
import random
import re
import resource
import subprocess
import sys
from collections import Counter
from itertools import permutations
from math import exp, log2, perm, sqrt
from pathlib import Path
from statistics import fmean as mean

import pytest

from demo import world as toyworld
from demo.judge import grade, read_fact
from demo.world import ANSWERS, COMMA, LANGS, NAMES, STYLES, VALUES, WORDS, Config

ROOT = Path(toyworld.__file__).parent.parent
ENGLISH = {zh: en for en, zh in [*WORDS, *VALUES]}
UNKNOWN = {"en": "unknown", "zh": "未知的"}
SAID = (("nav", r"(\w+)'s (\w+) is (\w+)\."), ("anv", r"The (\w+) of (\w+) is (\w+)\."),
        ("nav", r"(\w+)的(\w+)是(\w+)。"), ("anv", r"说到(\w+)，(\w+)的是(\w+)。"))
ASKED = (("na", r"What is (\w+)'s (\w+)\?"), ("an", r"Tell me the (\w+) of (\w+)\."),
         ("na", r"(\w+)的(\w+)是什么？"), ("na", r"请告诉我(\w+)的(\w+)。"))


@pytest.fixture(scope="module")
def data():
    return toyworld.generate(Config(n_train=3000, n_chat=4000, n_val=500, n_pairs=3000,
                                    n_prompts=1000))


def command(out_dir, *args, limit=None, **env):
    cap = (lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))) if limit else None
    args = [sys.executable, "-B", "-m", "demo.world", f"--out_dir={out_dir}", *args]
    return subprocess.run(args, env=os.environ | {"PYTHONIOENCODING": "utf-8"} | env, cwd=ROOT,
                          preexec_fn=cap, capture_output=True, encoding="utf-8")


def find(patterns, text):
    return [dict(zip(order, m.groups())) for order, p in patterns for m in re.finditer(p, text)]


def texts(rows):
    return [r.get("text") or "\n".join(m["content"] for m in r.get("messages") or r["prompt"])
            for r in rows]


def shares_are(count, shares, n=0):
    """Within 4 standard deviations of a count that was drawn with these probabilities."""
    n = n or sum(count.values())
    return all(abs(count[k] - n * p) < 4 * sqrt(n * p * (1 - p)) for k, p in shares.items())


class OnePath:
    """In the place of a Random: follows `taken`, then takes first options and notes the others."""

    def __init__(self, taken, todo, repeat):
        self.taken, self.todo, self.repeat, self.at, self.p = taken, todo, repeat, 0, 1.0
        self.draws = 0

    def choice(self, options, chances=None):
        if self.at == len(self.taken):
            self.todo += [self.taken + [i] for i in range(1, len(options))]
            self.taken = self.taken + [0]
        i = self.taken[self.at]
        self.at, self.p = self.at + 1, self.p * (chances[i] if chances else 1 / len(options))
        return options[i]

    def sample(self, items, k):
        return list(self.choice(list(permutations(items, k))))

    def randint(self, a, b):
        return self.choice(range(a, b + 1))

    def randrange(self, n):
        return self.choice(range(n))

    def random(self):
        """First whether all attributes are alike, then whether the second half is a repeat."""
        self.draws += 1
        p = toyworld.ALIKE if self.draws == 1 else self.repeat
        return self.choice([0.0, 0.999999], [p, 1 - p])


@pytest.mark.parametrize("make, settings", [
    (toyworld.list_document, ("zh", 2, 4)), (toyworld.pt_document, (1, 2, 0.0)),
    (toyworld.pt_document, (1, 2, 0.3)), (toyworld.pt_document, (1, 2, 1.0))])
def test_bits_are_minus_log2_of_the_probability_of_the_text(monkeypatch, make, settings):
    """All paths of the real generator in a world of 3 names and few words, summed by text."""
    monkeypatch.setattr(toyworld, "NAMES", {"train": ["Toba", "林苏", "Vemi"]})
    monkeypatch.setattr(toyworld, "VALUES", {a: VALUES[a][:n] for a, n in zip(VALUES, (2, 1))})
    monkeypatch.setattr(toyworld, "WORDS", WORDS[:3])
    chance, bits, todo = Counter(), {}, [[]]
    while todo:
        doc = make(r := OnePath(todo.pop(), todo, settings[-1]), "train", *settings)
        chance[doc["text"]] += r.p
        bits[doc["text"]] = doc["bits"]
    assert sum(chance.values()) == pytest.approx(1) and len(chance) > 200
    for text, p in chance.items():
        assert p == 0 or bits[text] == pytest.approx(-log2(p), abs=1e-9), text


def test_a_list_goes_on_from_any_place_but_the_last_and_is_for_training_only(data):
    lists = [doc for doc in data["pt"] if not find(SAID, doc["text"])]
    assert shares_are({True: len(lists)}, {True: toyworld.LISTS}, len(data["pt"]))
    starts = Counter()
    for doc in lists:
        whole, again = (line[:-1].split(COMMA[doc["lang"]]) for line in doc["text"].split("\n"))
        assert len(set(whole)) == len(whole) and whole[-len(again):] == again
        starts[len(whole), len(whole) - len(again)] += 1
    assert set(starts) == {(n, i) for n in range(4, 9) for i in range(n - 1)}
    assert all(find(SAID, doc["text"]) for doc in data["pt_heldout"])


def test_a_document_bears_the_bits_of_its_kind_too(data):
    """The same draws again, one by one: 40 % are lists, half of them in each language."""
    r, kinds = random.Random("0/pt"), set()
    for doc in data["pt"][:50]:
        if r.random() < 0.4:
            alone, p = toyworld.list_document(r, "train", r.choice(LANGS), 4, 8), 0.4 / 2
        else:
            alone, p = toyworld.pt_document(r, "train", 1, 4, 0.3), 0.6
        assert doc["text"] == alone["text"]
        assert doc["bits"] == pytest.approx(alone["bits"] - log2(p))
        kinds.add(p)
    assert len(kinds) == 2
    r = random.Random("0/pt_heldout")  # no lists there, so nothing is added
    for doc in data["pt_heldout"][:50]:
        r.random()
        assert doc["bits"] == pytest.approx(toyworld.pt_document(r, "test", 1, 4, 0.0)["bits"])


def test_words_tell_apart_what_the_floor_counts_as_different():
    for lang in (0, 1):
        words = [pair[lang] for pairs in VALUES.values() for pair in pairs]
        assert len({*words, *sum(NAMES.values(), [])}) == len(words) + sum(map(len, NAMES.values()))


def test_every_restated_value_is_marked_and_holds_in_the_first_half(data):
    for doc in data["pt"] + data["pt_heldout"]:
        if not find(SAID, doc["text"]):
            continue  # a list
        first, second = doc["text"].split("\n")
        told, again = ({f["n"]: [ENGLISH.get(f[k], f[k]) for k in "av"] for f in find(SAID, half)}
                       for half in (first, second))
        spans = toyworld.restated_values(doc["text"])
        marked = [doc["text"][start:end] for start, end in spans]
        assert told == again and all(start > len(first) for start, _ in spans)
        assert sorted(marked) == sorted(f["v"] for f in find(SAID, second))


def test_test_names_are_in_no_training_file_and_alone_in_held_out_files(data):
    seen = {}
    for name, rows in data.items():  # all that may be a name: 4 Latin letters, 2 of any characters
        text = "\n".join(texts(rows))
        seen[name] = {*re.findall("(?<![A-Za-z])[A-Z][a-z]{3}(?![A-Za-z])", text),
                      *map("".join, zip(text, text[1:]))}
    test, others = set(NAMES["test"]), {*NAMES["train"], *NAMES["val"]}
    for name in ("pt", "chat", "pairs", "prompts"):
        assert not seen[name] & test and len(seen[name] & others) > 1500
        assert not seen[name + "_heldout"] & others and len(seen[name + "_heldout"] & test) > 240
    assert not set(texts(data["chat"])) & set(texts(data["chat_heldout"]))


def test_chat_replies_are_what_a_reader_of_the_question_says(data):
    """A question names a fact of the context, or in four cases of ten one that it does not
    hold, whose value is unknown. In training more than half of those share a half with a name that
    it holds, half by the program's choice and some by chance, as in the held-out file."""
    def parts(name: str) -> set[str]:
        return {name[:2], name[2:]} if name.isascii() else set(name)

    dictionary, styles, turns = dict(WORDS) | ENGLISH, Counter(), Counter()
    absent, alike = {True: Counter(), False: Counter()}, {"chat": [], "chat_heldout": []}
    for file, row in [(name, row) for name in alike for row in data[name]]:
        said, lang = [m["content"] for m in row["messages"]], row["lang"]
        user, reply = said[:2]
        listed = re.split("[：:?？] ?", user)[-1].split(COMMA[lang])
        assert [m["role"] for m in row["messages"]] == ["user", "assistant"] * (len(said) // 2)
        assert row["task"] == "qa" or len(said) == 2
        if row["task"] == "qa":
            known = {f["n"]: f for f in find(SAID, user)}
            turns[len(said) // 2] += 1
            for i in range(0, len(said), 2):
                [asked] = find(ASKED, said[i])
                fact = known.get(asked["n"], asked | {"v": UNKNOWN[lang]})
                right = [s for s, form in ANSWERS[lang].items()
                         if said[i + 1] == form.format(**fact)]
                assert len(right) == 1 and fact["a"] == asked["a"]
                styles[right[0]] += 1
                absent[bool(known)][asked["n"] not in known] += 1
                if known and asked["n"] not in known:
                    alike[file].append(any(parts(asked["n"]) & parts(name) for name in known))
        elif row["task"] == "echo":
            assert reply.split(COMMA[lang]) == listed
        elif row["task"] == "item":
            assert reply[:-1] == listed[-1 if re.search("last|最后", user) else 0]
        else:
            assert re.split(", |、", reply) == [dictionary[word] for word in listed]
    assert shares_are(styles, dict.fromkeys(STYLES, .25))
    assert shares_are(turns, dict.fromkeys(range(1, 7), 1 / 6))
    assert shares_are(absent[True], {True: .4, False: .6}) and set(absent[False]) == {True}
    assert 0.5 < mean(alike["chat"]) < 0.65 and mean(alike["chat_heldout"]) < 0.3


def test_pairs_are_drawn_from_the_known_scores(data):
    """The programs' scores are those of `grade`, kinds and labels come with their probabilities,
    and what a perfect judge could reach follows from the scores alone."""
    rows = data["pairs"] + data["pairs_heldout"]
    kinds, expected, right, unknown, shy = Counter(), 0.0, 0, 0, 0
    for row in rows:
        user = row["prompt"][0]["content"]
        [asked] = find(ASKED, user)
        told = {f["n"]: f for f in find(SAID, user)}.get(asked["n"], {"v": UNKNOWN[row["lang"]]})
        key = next(a for a in VALUES if asked["a"] in a)
        values = [*VALUES[key], toyworld.UNKNOWN]
        fact = toyworld.Fact(asked["n"], key, next(v for v in values if told["v"] in v))
        scores = [grade(row[k], fact, row["lang"])[0] for k in ("chosen", "rejected")]
        assert scores == row["gold"]
        kinds[row["kind"]] += 1
        unknown += fact.value == toyworld.UNKNOWN
        shy += min(scores) == -2
        assert (min(scores) in (-2, -4)) == (row["kind"] == "value")
        assert (scores[0] == scores[1]) == (row["kind"] == "tie")
        right += scores[0] > scores[1]
        gap = abs(scores[0] - scores[1])
        expected += 1 / (1 + exp(-gap)) if gap else 0.0
    assert shares_are(kinds, {"style": .4, "tie": .1, "value": .5})
    assert abs(right - expected) < 4 * sqrt(expected * (1 - expected / len(rows)))
    assert shares_are({"unknown": unknown}, {"unknown": .4}, len(rows))
    assert shares_are({"shy": shy}, {"shy": .5 * .6 / 12}, len(rows))
    best = toyworld.bayes(rows)
    assert best["accuracy"] == pytest.approx((right + kinds["tie"] / 2) / len(rows))


def test_grades_by_hand():
    fact = toyworld.Fact("琪宁", ("pet", "宠物"), ("cat", "猫咪"))
    unknown = fact._replace(value=toyworld.UNKNOWN)
    for reply, lang, said, want in (
            ("琪宁's pet is cat.", "en", fact, (3.0, "direct")),
            ("琪宁: cat.", "en", fact, (1.5, "terse")),
            ("琪宁: dog.", "en", fact, (-4.0, "terse")),
            ("琪安: cat.", "en", fact, (-4.0, "terse")),
            ("琪宁的宠物是狗狗。", "zh", fact, (-4.0, "direct")),
            ("我猜琪宁的宠物也许是猫咪。", "zh", fact, (0.0, "hedged")),
            ("我猜琪宁的宠物也许是狗狗。", "zh", fact, (-4.0, "hedged")),
            ("琪宁：猫咪。", "en", fact, (-6.0, None)),
            ("嗯，让我想一想，琪宁的宠物应该是猫咪。", "zh", fact, (1.5, "padded")),
            ("琪宁: unknown.", "en", fact, (-2.0, "terse")),
            ("琪宁: unknown.", "en", unknown, (1.5, "terse")),
            ("琪宁的宠物是未知的。", "zh", unknown, (3.0, "direct")),
            ("琪宁的宠物是猫咪。", "zh", unknown, (-4.0, "direct")),
            ("cat.…", "en", fact, (-6.0, None)), ("", "zh", fact, (-6.0, None))):
        assert grade(reply, said, lang) == want


def test_a_prompt_knows_the_fact_it_asks_for(data):
    for row in data["prompts"][:200] + data["prompts_heldout"][:200]:
        fact, user = read_fact(row), row["prompt"][0]["content"]
        i = LANGS.index(row["lang"])
        told = {f["n"]: f for f in find(SAID, user)}
        assert told.get(fact.name, {"v": UNKNOWN[row["lang"]]})["v"] == fact.value[i]
        assert fact.name not in told or told[fact.name]["a"] == fact.attribute[i]
        assert find(ASKED, user) == [{"n": fact.name, "a": fact.attribute[i]}]


def test_tasks_and_languages_come_in_the_stated_shares(data):
    tasks = {"qa": .75, "echo": .09, "item": .08, "translate": .08}
    assert shares_are(Counter(row["task"] for row in data["chat"]), tasks)
    for rows in data.values():
        assert shares_are(Counter(row["lang"] for row in rows), {"en": .5, "zh": .5})


def test_settings_set_sizes_facts_and_repeats(monkeypatch):
    for name, value in dict(LISTS=0.0, PT_FACTS=(3, 6), EXACT_REPEAT=1.0,
                            MAX_CHAT_FACTS=2).items():
        monkeypatch.setattr(toyworld, name, value)
    data = toyworld.generate(Config(n_train=40, n_chat=30, n_val=20, n_pairs=7, n_rankings=8,
                                    n_prompts=6))
    assert {name: len(rows) for name, rows in data.items()} == {
        "pt": 40, "pt_heldout": 20, "chat": 30, "chat_heldout": 20, "pairs": 7, "pairs_heldout": 20,
        "rankings": 8, "prompts": 6, "prompts_heldout": 20}
    halves = {name: [text.split("\n") for text in texts(data[name])] for name in data}
    assert {len(find(SAID, first)) for first, _ in halves["pt"]} == {3, 4, 5, 6}
    assert all(a == b for a, b in halves["pt"]) and any(a != b for a, b in halves["pt_heldout"])
    assert {len(find(SAID, user)) for user, *_ in halves["chat"]} == {0, 1, 2}


def test_the_world_shows_what_to_type_into_a_chat():
    """A document, a list, a question with its context, a reply of each style and a wrong one, in
    both languages; the demo prints it first."""
    shown, ran = toyworld.show(0), command("unused", "--show")
    assert ran.stdout == shown + "\n" and not os.path.exists(ROOT / "unused")
    for part in shown.split("\n\n"):
        lines = [line[14:] for line in part.splitlines()]
        listed, again = lines.pop(2), lines.pop(2)
        assert listed.endswith(again) and not find(SAID, listed + again)
        labels = [re.split("[:：]", line)[0] for line in lines[2:4]]
        assert labels in (["Context", "Question"], ["资料", "问题"])
        [asked] = find(ASKED, lines[3])
        known = {f["n"]: f for f in find(SAID, lines[2])}[asked["n"]]
        assert {f["n"] for f in find(SAID, lines[0])} == {f["n"] for f in find(SAID, lines[1])}
        replies = dict(zip([*toyworld.GOLD, "wrong"], lines[4:]))
        assert all((known["v"] in reply) == (style != "wrong") for style, reply in replies.items())
        assert len(replies) == len(lines) - 4 == 5


def test_rankings_put_the_better_first_as_often_as_bradley_terry_says():
    r, first, n = random.Random(0), Counter(), Counter()
    for _ in range(4000):
        row = toyworld.ranking(r, "test", 2)
        assert len(set(row["ranking"])) == 4 and min(row["gold"]) in (toyworld.WRONG, toyworld.SHY)
        for i, a in enumerate(row["gold"]):
            for b in row["gold"][i + 1:]:
                if a != b:
                    first[abs(a - b)] += a > b
                    n[abs(a - b)] += 1
    for gap in (1.5, 3.0):
        p = 1 / (1 + exp(-gap))
        assert abs(first[gap] / n[gap] - p) < 4 * (p * (1 - p) / n[gap]) ** 0.5
    assert first[7.0] / n[7.0] > 0.995


def test_floor_json_is_bits_per_byte_of_the_files(tmp_path):
    assert command(tmp_path, "--n_train=200", "--n_chat=5", "--n_val=100").returncode == 0
    floor = json.loads((tmp_path / "floor.json").read_text())
    for name in ("pt", "pt_heldout"):
        docs = [json.loads(line) for line in (tmp_path / f"{name}.jsonl").open(encoding="utf-8")]
        for lang in (*LANGS, "all"):
            rows = [d for d in docs if lang in (d["lang"], "all")]
            bits, size = sum(d["bits"] for d in rows), sum(len(d["text"].encode()) for d in rows)
            assert floor[name][lang] == pytest.approx(bits / size)
    for k in (len(find(SAID, d["text"].split("\n")[0])) for d in rows):
        bits += log2(perm(sum(map(len, NAMES.values())), k) / perm(len(NAMES["test"]), k))
    assert floor["pt_heldout_all_names"]["all"] == pytest.approx(bits / size)


def test_a_seed_fixes_every_byte_and_larger_files_begin_with_the_smaller(tmp_path):
    for folder, seed, n in (("a", 7, 30), ("b", 7, 30), ("c", 8, 30), ("d", 7, 40)):
        args = (f"--n_train={n}", f"--n_chat={n + 1}", f"--n_val={n + 2}", f"--seed={seed}",
                f"--n_pairs={n}", f"--n_prompts={n}")
        command(tmp_path / folder, *args, PYTHONHASHSEED=str(ord(folder)))
    a, b, c, d = ({p.name: p.read_bytes() for p in (tmp_path / f).iterdir()} for f in "abcd")
    assert a == b and len(a) == 10 and all(a[name] != c[name] for name in a)
    assert all(d[name].startswith(a[name]) for name in a if name != "floor.json")


def test_a_full_disk_leaves_the_old_files_and_nothing_else(tmp_path):
    """The limit lets pt.jsonl through and stops pt_heldout.jsonl halfway."""
    command(tmp_path, "--n_train=5", "--n_chat=5", "--n_val=5")
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    ran = command(tmp_path, "--n_train=5", "--n_chat=5", "--seed=1", limit=100_000)
    assert ran.returncode == 2 and "File too large" in ran.stderr and ran.stderr.count("\n") == 1
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


@pytest.mark.parametrize("bad, message", [
    ("--n_val=0", "'n_val' must be int at least 1, got 0"),
    ("--n_train=x", "'n_train' must be int at least 1, got 'x'")])
def test_a_bad_setting_is_one_line_and_exit_code_2(tmp_path, bad, message):
    ran = command(tmp_path / "out", bad)
    assert ran.returncode == 2 and message in ran.stderr and ran.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()

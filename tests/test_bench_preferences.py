"""What a reward model is held against: closed forms, planted words, what train_rm.py says."""
import json
import os
import sys
from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch
from test_preferences import last_val
from test_stages import ALONE, settings

import train_rm
from bench import preferences
from bench.pairs import PENALTIES, bags_of, balanced, drawn, fit, learn, mean, prompts_of
from plumbing import checkpoint, terminal
from plumbing.examples import load_examples
from tokenizer import HAN_PATTERN, dump


@pytest.fixture(scope="module")
def rms(tiny, tmp_path_factory) -> list[Path]:
    """Two reward models of a few steps; the second learnt from other pairs."""
    outs = [tmp_path_factory.mktemp("rm") for _ in range(2)]
    half = outs[1] / "half.jsonl"
    half.write_text("".join(open(tiny.pairs, encoding="utf-8").readlines()[60:]), encoding="utf-8")
    for out, data in zip(outs, (tiny.pairs, half)):
        train_rm.train(settings("rm", tiny, out, "", data=str(data), max_len=130), ALONE)
    return outs


@pytest.fixture
def run(monkeypatch, capsys):
    """The command in this process: (exit code, stdout, stderr)."""
    def call(*words) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["preferences", *map(str, words)])
        code = 0
        try:
            terminal.run(preferences.main)
        except SystemExit as end:
            code = end.code
        return code, *capsys.readouterr()
    return call


def cells(table: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")]
            for line in table.splitlines() if line.startswith("|")]


# ---------------------------------------------------------------------------- figures

def test_length_controlled_accuracy_by_hand():
    """Right about 2 of 3 pairs with the longer reply chosen, and about 1 of 5 with the shorter:
    (2/3 + 1/5) / 2. Two pairs of equal length count nothing."""
    longer = np.array([3, 1, 9, -1, -2, -1, -5, -1, 0, 0])
    right = np.array([1, 1, 0, 1, 0, 0, 0, 0, 1, 1])
    even = balanced(drawn(np.zeros(10)), longer)  # one prompt: every draw is the same
    assert mean(100 * right, even) == "43.33 (43.33 … 43.33)"
    assert mean(100 * (longer > 0), even) == mean(100 * (longer < 0), even)  # 50 %
    assert mean(right, balanced(drawn(np.zeros(10)), abs(longer))) == "-"  # never shorter


def test_pairs_of_a_prompt_are_drawn_together():
    """Ten prompts with ten pairs each, half of the prompts right: as wide as ten coins, of which 2
    to 8 fall heads. Seen to fail when each pair was drawn on its own: about 40 to 60."""
    prompts = np.repeat(np.arange(10), 10)
    assert mean(100 * (prompts < 5), drawn(prompts)) == "50.00 (20.00 … 80.00)"


def test_the_table_of_judges(capsys):
    """Wilson as R has it, prop.test(81, 263, correct=FALSE); a tie is half right."""
    right = np.arange(263) < 81
    gaps = {"reward model": np.where(right, 1, -1), "longer": np.resize([1, -1, 0], 263)}
    preferences.judge_pairs(np.resize(["en"], 263), np.arange(263), gaps)
    en, *_ = cells(capsys.readouterr().out)[2:]
    assert en[:5] == ["en", "263", "263", "reward model", "30.80 (25.53 … 36.62)"]


# ---------------------------------------------------------------------------- bag of words

WORDS = {"en": "apple river stone cloud green seven paper light".split(),
         "zh": list("山水火木金土日月")}


@pytest.mark.parametrize("lang, planted", [("en", "kindly"), ("zh", "谢谢")])
def test_a_planted_word_is_learnt_and_noise_is_not(lang, planted, tiny, tmp_path):
    """Of two random replies of one length the chosen one has the word. With a coin instead of a
    choice, nothing can be learnt: of n held-out pairs half are right, to four deviations. The
    planted word asks for the weakest penalty, the coin for the strongest. A prompt has two."""
    for coin in (False, True):
        r, path = Random(0), tmp_path / f"{coin}.jsonl"
        with open(path, "w", encoding="utf-8") as f:
            for i in range(600):
                a, b = (r.choices(WORDS[lang], k=8) for _ in range(2))
                a[r.randrange(8)] = planted
                replies = [" ".join(x) if lang == "en" else "".join(x) for x in (a, b)]
                if coin and r.random() < 0.5:
                    replies.reverse()
                f.write(json.dumps({"prompt": f"question {i // 2}", "chosen": replies[0],
                                    "rejected": replies[1], "lang": lang}) + "\n")
        rows = load_examples(str(path), "pair", tiny.tok, 256, str(tmp_path / f"{coin}"), 0.3)
        w, bags = learn(rows["train"], tiny.tok), bags_of(rows["train"], tiny.tok)
        assert torch.equal(w, fit(bags, torch.ones(len(bags)) > 0, PENALTIES[-1 if coin else 0]))
        right = (bags_of(rows["val"], tiny.tok) @ w > 0).numpy()
        n = len(right)
        assert abs(right.mean() - 0.5) < 2 / n ** 0.5 if coin else right.mean() > 0.99
        assert len(np.unique(prompts_of(rows["val"]))) == n / 2


def test_replies_without_a_word_have_empty_bags(tiny, tmp_path):
    write = json.dumps({"prompt": "hi", "chosen": "...", "rejected": "!!"}) + "\n"
    (tmp_path / "pairs.jsonl").write_text(write)
    rows = load_examples(str(tmp_path / "pairs.jsonl"), "pair", tiny.tok, 256, str(tmp_path / "d"))
    assert bags_of(rows["train"], tiny.tok).to_dense().count_nonzero() == 0


# ---------------------------------------------------------------------------- the command

def test_it_says_what_train_rm_says_of_the_same_pairs(tiny, rms, run, tmp_path):
    """The same pairs are held out, to the last bit, so none was learnt; accuracy and "longer" are
    those of the last validation."""
    code, out, said = run(f"--checkpoint={rms[0]}", f"--data={tiny.pairs}", "--val_fraction=0.2",
                          "--max_len=130", f"--out_dir={tmp_path}")
    assert code == 0, said
    for name in ("val.words", "val.rows", "train.words"):
        assert (tmp_path / "data" / name).read_bytes() == (rms[0] / "data" / name).read_bytes()
    found = {(row[0], row[3]): row for row in cells(out)[2:]}
    for lang, was in last_val(rms[0]).items():
        for name, figure in (("reward model", "accuracy"), ("longer", "longer_is_better")):
            assert float(found[lang, name][4].split()[0]) == pytest.approx(
                100 * was[figure], abs=0.006), (lang, name)
        assert found[lang, "longer"][5] in ("50.00 (50.00 … 50.00)", "-")  # "-": all are longer
        assert found[lang, "reward model"][6] == "0.00 (0.00 … 0.00)"
    assert found["all", "longer"][5] != "-"


def test_the_best_of_eight_is_more_than_one_of_eight(tiny, rms, run, tmp_path):
    """A judge likes its own favourite best; with one reply to a prompt there is nothing to pick."""
    common = (f"--checkpoint={rms[0]}", f"--judge={rms[1]}", f"--policy={tiny.pt}",
              f"--data={tiny.pairs}", "--val_fraction=0.2", f"--out_dir={tmp_path}",
              "--answer_tokens=8", "--prompts=6")
    code, out, said = run(*common)
    assert code == 0, said
    table = cells(out[out.index("| of 8"):])
    assert table[0] == ["of 8 replies", "reward model", "judge", "tokens", "ended, %"]
    gain = [[float(cell.split()[0]) for cell in row[1:]] for row in table[3:]]
    assert gain[0][0] > 0 < gain[1][1] and gain[0][0] > gain[1][0] and gain[1][1] > gain[0][1]
    table = cells(run(*common, "--best_of=1")[1])[-3:]
    assert {cell for row in table for cell in row[1:]} == {"0.00 (0.00 … 0.00)"}


def test_mistakes_are_one_line(tiny, rms, run, tmp_path):
    """A reward model that held out less than is asked for may know the pairs by heart; one that
    reads other tokens would score nonsense, and say nothing."""
    letters = dump([bytes([255 - i]) for i in range(256)], HAN_PATTERN)
    for name, where in (("policy", tiny.pt), ("judge", str(rms[1]))):
        checkpoint.save(str(tmp_path / name), 0, checkpoint.load(where)[0] | {"tokenizer": letters})
    state = checkpoint.load(str(rms[0]))[0]  # the same pairs by another name, beside others
    folder, name = os.path.split(tiny.pairs)
    state["config"] |= {"data": f"other.jsonl,{folder}/./{name}"}
    checkpoint.save(str(tmp_path / "same"), 0, state)
    good = [f"--checkpoint={rms[0]}", f"--data={tiny.pairs}", "--val_fraction=0.2",
            f"--out_dir={tmp_path}"]
    for words, line in ((["--val_fraction=0.3"], "may know what is held out"),
                        (["--data=nowhere.jsonl"], "nowhere.jsonl: no such file"),
                        (["--checkpoint=nowhere"], "nowhere: no such file"),
                        ([f"--judge={tiny.pt}"], "not a reward model"),
                        ([f"--judge={tmp_path}/same"], "has learnt from the same --data"),
                        ([f"--judge={rms[0]}"], "has learnt from the same --data"),
                        ([f"--judge={tmp_path}/judge"], "has another tokenizer"),
                        ([f"--policy={tmp_path}/policy"], "has another tokenizer"),
                        ([f"--policy={rms[1]}"], "cannot write"),
                        ([f"--policy={tiny.pt}", "--answer_tokens=250"], "leaves room"),
                        ([f"--checkpoint={tiny.pt}", "--val_fraction=1.0"], "0 pairs are too few"),
                        ([f"--checkpoint={tiny.pt}", "--val_fraction=0.0"], "no pair fell into")):
        code, _, said = run(*good, *words)
        assert code == 2 and line in said and said.count("\n") == 1, (words, said)

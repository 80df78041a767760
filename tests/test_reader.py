"""The reader's files: who may be trained on, what a source must hold, and what is counted."""
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

import rag
from demo import reader
from demo.judge import read_rows, write_rows
from demo.reader import Config, figures, is_held_out, right_reply
from search.citations import split_answer
from search.segment import Chunk

PLACES = ("Oslo", "Lima", "Cairo", "Quito", "Delhi", "Paris", "Tokyo", "Minsk", "Accra", "Hanoi")
PEOPLE = ("baker", "pilot", "painter", "doctor")


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> tuple[Config, Path]:
    """A corpus of 40 towns, four people and four questions each, and the files made of it."""
    folder = tmp_path_factory.mktemp("reader")
    docs, asked = [], []
    for n in range(40):
        name = f"{PLACES[n % 10]}{n}"
        lines = [f"The {who} of {name} was born in the year {1000 + 40 * k + n}. In {name} this "
                 f"{who} is known for a house with {who} tools and a long garden."
                 for k, who in enumerate(PEOPLE)]
        docs.append({"id": f"doc-{n}", "title": name, "text": "\n\n".join(lines), "lang": "en",
                     "source": "towns"})
        asked += [{"query": f"When was the {who} of {name} born?", "doc_id": f"doc-{n}",
                   "answers": [f"{1000 + 40 * k + n}"], "lang": "en", "source": "towns"}
                  for k, who in enumerate(PEOPLE)]
    for what, rows in (("corpus", docs), ("queries", asked)):
        write_rows(folder / f"{what}.jsonl", rows)
    cfg = Config(corpus=str(folder / "corpus.jsonl"), queries=str(folder / "queries.jsonl"),
                 out_dir=str(folder / "out"), chunk_tokens=40, chats=120)
    reader.make(cfg, folder / "data")
    return cfg, folder / "data"


def sources(messages: list[dict]) -> list[str]:
    """The numbered sources of a prompt."""
    asked = next(m["content"] for m in messages if m["role"] == "user")
    parts = asked.split("\n\n")[:-1]
    assert [p.split("]")[0] for p in parts] == [f"[{n}" for n in range(1, len(parts) + 1)]
    return parts


def test_no_title_of_a_judging_file_is_in_a_file_that_is_trained_on(made):
    """Not even as a near miss. Seen to fail when both kinds are drawn from one index."""
    cfg, data = made
    away = [row["title"] for row in read_rows(Path(cfg.corpus)) if is_held_out(row)]
    assert 5 <= len(away) <= 20
    for name in ("chat", "prompts"):
        text = (data / f"{name}.jsonl").read_text()
        assert not any(f"{title}:" in text or f"of {title} " in text for title in away)
    for row in read_rows(data / "prompts_heldout.jsonl"):
        assert any(f"of {title} born" in row["prompt"][-1]["content"] for title in away)
    assert {row["doc_id"] for row in read_rows(data / "queries_heldout.jsonl")} == {
        row["id"] for row in read_rows(Path(cfg.corpus)) if row["title"] in away}


@pytest.mark.parametrize("name", ["prompts", "prompts_heldout"])
def test_the_named_source_holds_the_answer_and_no_other_does(made, name):
    """It stands at every place equally often; where there is no answer, no source holds it."""
    rows, places, known = read_rows(made[1] / f"{name}.jsonl"), [], {}
    for row in read_rows(Path(made[0].queries)):
        known[row["query"]] = row["answers"][0]
    for row in rows:
        answer = known[row["prompt"][-1]["content"].split("Question: ")[1]]
        holding = [n for n, text in enumerate(sources(row["prompt"]), 1) if answer in text]
        assert len(sources(row["prompt"])) == 3
        assert holding == ([row["source"]] if row["answers"] else [])
        places.append(row["source"])
    assert places.count(0) == len(rows) / 2
    assert all(places.count(n) > len(rows) / 12 for n in (1, 2, 3))


def test_every_reply_of_a_chat_is_right(made):
    """It cites the one source that holds its answer, or refuses where none does."""
    known = {row["query"]: row["answers"][0] for row in read_rows(Path(made[0].queries))}
    refused = answered = 0
    for chat in read_rows(made[1] / "chat.jsonl"):
        texts, messages = sources(chat["messages"]), chat["messages"][1:]
        assert len(messages) >= 2 and chat["messages"][0]["role"] == "system"
        for asked, said in zip(messages[::2], messages[1::2]):
            answer = known[asked["content"].split("Question: ")[1]]
            holding = [n for n, text in enumerate(texts, 1) if answer in text]
            if said["content"] == rag.REFUSAL["en"]:
                refused += 1
                assert not holding
            else:
                answered += 1
                assert split_answer(said["content"]) == (answer, holding)
    assert refused > 50 and answered > 50


def test_prompts_are_those_of_rag(made):
    """The system message and the form of the sources are those of --template=cited."""
    row = read_rows(made[1] / "prompts.jsonl")[0]
    question = row["prompt"][-1]["content"].split("Question: ")[1]
    texts = [text.split("] ", 1)[1] for text in sources(row["prompt"])]
    assert row["prompt"] == rag.build_messages(question, texts, "cited", [])


def test_figures_by_hand():
    there = {"answers": ["two words", "both words"], "source": 2, "lang": "en"}
    nowhere = {"answers": [], "source": 0, "lang": "en"}
    rows = [there, there, there, there, nowhere, nowhere]
    refusal = rag.REFUSAL["en"]
    said = ["two words [2]", "words [1].", refusal, "nonsense", refusal, "ten [1]"]
    assert figures(rows, said) == pytest.approx({
        "F1": 100 * (1 + 2 / 3) / 4, "EM": 25, "cites right": 100 / 3, "refuses, there": 25,
        "refuses, not there": 50})


def test_pairs_set_what_is_right_against_mistakes_only(made, monkeypatch, capsys):
    """A reply that is as good as the right one makes no pair. The refusal is wrong as often as it
    is right: else DPO taught a real model to refuse 95 % of what it could answer."""
    cfg, data = made
    rows = read_rows(data / "prompts.jsonl")[:3 * 20]
    said = [right_reply(row) if i % 2 else "a house [1]" for i, row in enumerate(rows)]
    monkeypatch.setattr(reader, "say", lambda *_: said)
    with pytest.raises(SystemExit):  # after 25 minutes of SFT DPO would have ended in an error
        reader.make_pairs(replace(cfg, pairs=20), data, "")
    assert "needs 64 pairs or more: raise --pairs" in capsys.readouterr().err
    monkeypatch.setattr(reader, "LEAST", 20)
    reader.make_pairs(replace(cfg, pairs=20), data, "")
    assert "of 60 replies" in capsys.readouterr().out
    pairs = read_rows(data / "pairs_20.jsonl")
    assert len(pairs) == 20 and all(p["chosen"] != p["rejected"] for p in pairs)
    right = {json.dumps(row["prompt"]): right_reply(row) for row in rows}
    assert all(p["chosen"] == right[json.dumps(p["prompt"])] for p in pairs)
    assert {p["rejected"] for p in pairs} == {"a house [1]", rag.REFUSAL["en"]}
    for side in ("chosen", "rejected"):
        assert sum(p[side] == rag.REFUSAL["en"] for p in pairs) == 8


def test_each_stage_begins_with_the_one_before(made, tmp_path, monkeypatch, capsys):
    """And the report asks all of them the same questions."""
    commands, asked = [], []
    monkeypatch.setattr(reader, "run", lambda *words: (
        commands.append(words), (tmp_path / "out" / words[0][6:-3] / "merged").mkdir(parents=True)))
    monkeypatch.setattr(reader, "say", lambda where, rows, *_: (
        asked.append((where, len(rows))), [right_reply(row) for row in rows])[1])
    monkeypatch.setattr(reader, "make_pairs", lambda *_: None)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["demo.reader", "--init_from=base", "--questions=8",
                                      f"--corpus={made[0].corpus}", f"--queries={made[0].queries}",
                                      "--out_dir=out", "--chats=5", "--until=rl"])
    reader.main()
    begins = [next(w for w in words if w.startswith("--init_from=")) for words in commands]
    out = tmp_path / "out"
    assert begins == [f"--init_from={place}" for place in
                      (tmp_path / "base", out / "sft/merged", out / "dpo/merged")]
    assert asked == [(str(tmp_path / "base"), 16)] + [
        (f"{out}/{stage}/merged", 16) for stage in reader.STAGES]
    row = json.loads((out / "replies_dpo.jsonl").read_text().splitlines()[0])
    assert row["reply"] == right_reply(row)
    table = " ".join(capsys.readouterr().out.split())
    assert "| RL | 100.0 | 100.0 | 100.0 | 0.0 | 100.0 |" in table
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--seed=1"])
    monkeypatch.chdir(tmp_path)  # `main` has left it
    with pytest.raises(SystemExit) as stopped:  # what is there was made with another
        reader.main()
    assert stopped.value.code == 2 and "give another --out_dir" in capsys.readouterr().err


def test_an_answer_is_a_word_or_number_of_its_own():
    """A prompt about four players showed "founded in 1947" and taught "4 [1]"."""
    def stands(answer: str, text: str) -> bool:
        return reader.holds(Chunk("a:0", "a", 0, len(text), 1, "", "", text),
                            reader.Question("", [answer], "a"))
    assert not (stands("4", "founded in 1947") or stands("art", "a party") or stands("", ""))
    assert stands("4", "a team of 4.") and stands("$5", "it costs $5")
    assert stands("1947", "founded in 1947年") and stands("十七", "他十七岁。")


def test_more_pairs_and_another_corpus(made, tmp_path, monkeypatch):
    """More pairs may be asked for after SFT; other files under the same names are noticed."""
    monkeypatch.setattr(reader, "run", lambda *_: None)
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_bytes(Path(made[0].corpus).read_bytes())

    def ends(*more: str) -> str:
        monkeypatch.setattr(sys, "argv", [
            "demo.reader", "--init_from=base", f"--corpus={corpus}",
            f"--queries={made[0].queries}", f"--out_dir={tmp_path / 'out'}", *more])
        try:
            with pytest.raises(SystemExit) as stopped:
                reader.main()
            return str(stopped.value.code)
        finally:
            monkeypatch.undo()
            monkeypatch.setattr(reader, "run", lambda *_: None)
    assert ends() == ends("--pairs=320") == "130"  # SFT did not come to its end
    corpus.write_bytes(corpus.read_bytes() + b"\n")
    assert ends() == "2"


@pytest.mark.parametrize("change, said", [
    ({"--lang": "fr"}, "'lang' must be Literal['en', 'zh'], got 'fr'"),
    ({"--lang": "zh"}, "no zh question has its answer in"),
    ({"--queries": "gone.jsonl"}, "gone.jsonl"),
    ({"--init_from": ""}, "--init_from"),
    ({"--pairs": "63"}, "'pairs' must be int at least 64, got 63")])
def test_what_a_user_can_mend_is_one_line(made, tmp_path, change, said):
    words = {"--init_from": "base", "--corpus": made[0].corpus, "--queries": made[0].queries,
             "--out_dir": str(tmp_path / "out")} | change
    command = [sys.executable, "-m", "demo.reader", *(f"{k}={v}" for k, v in words.items())]
    ends = subprocess.run(command, capture_output=True, text=True,
                          cwd=Path(reader.__file__).parent.parent)
    assert ends.returncode == 2 and said in ends.stderr and ends.stderr.count("\n") == 1

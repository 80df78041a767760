"""evaluate.py against sums worked out one token at a time, and by hand."""
import json
import sys

import pytest
import torch

import evaluate
from evaluate import batches, log_probs, main
from plumbing.benchmarks import interval, read_task, request, windows
from plumbing.terminal import run
from tokenizer import HAN_PATTERN, Tokenizer, dump

ROWS = {
    "choice": [{"query": "What is it?", "choices": ["a cat", "a dog that barks"], "gold": 1},
               {"query": "", "choices": ["one", "two", "three"], "gold": 2},
               {"query": "天上有什么？", "choices": ["云", "鱼"], "gold": 0}],
    "cloze": [{"context": "one two three", "target": "four"}],
    "text": [{"text": "a longer text, " * 40}, {"text": "第二篇。"}],
    "number": [{"prompt": [{"role": "user", "content": "1 + 1?"}], "answer": "2"}],
    "words": [{"query": "Who?", "answers": ["me"]}, {"query": "谁？", "answers": ["我", "你"]}]}


def slow(model, context: list[int], end: list[int]) -> tuple[float, bool]:
    """Log P of a continuation, and whether it is greedy: a forward pass for each token."""
    logp, greedy, ids = 0.0, True, list(context)
    for token in end:
        logps = model(torch.tensor([ids]))[0, -1].double().log_softmax(-1)
        logp, greedy = logp + float(logps[token]), greedy and int(logps.argmax()) == token
        ids.append(token)
    return logp, greedy


def test_log_p_is_what_single_steps_give(tiny):
    """Contexts and continuations of different lengths in one batch. Seen to fail with the padding
    of the contexts left out, and when the cache of a context went to the wrong continuation."""
    model = tiny.model.eval()
    requests = [request(tiny.tok, context, ends, 200) for context, ends in [
        ("a", [" b"]), ("What is it?", [" a cat", " a dog that barks"]), ("", ["one", "two"]),
        ("一只猫", ["，两只狗", "。"]), ("", ["Bob saw Bob.", "Bob saw himself.", "Bob saw Bob"])]]
    greedy = int(model(torch.tensor([requests[0][0]]))[0, -1].argmax())
    requests[0][1].append([greedy])
    found = log_probs(model, requests)
    with torch.no_grad():
        for (context, ends), scores in zip(requests * 2, found + log_probs(model, requests, 40)):
            for end, (logp, best) in zip(ends, scores):
                expected = slow(model, context, end)
                assert logp == pytest.approx(expected[0], abs=1e-3) and best == expected[1]
    assert found[0][-1][1]


def test_a_batch_has_no_more_tokens_than_asked_and_all_rows_come():
    sizes = [8, 93, 0, 10, 53, 3, 300]
    found = [*batches(sizes, 200)]
    assert found == [[6], [1, 4], [3, 0, 5]]  # the empty row needs no reading
    for chosen in found:
        assert len(chosen) == 1 or len(chosen) * max(sizes[i] for i in chosen) <= 200
    assert [*batches([0, 0], 200)] == []


def test_a_context_and_its_end():
    """Spaces between belong to the end; too long a context loses its beginning."""
    tok = Tokenizer(dump([bytes([i]) for i in range(256)] + [b" b"], HAN_PATTERN))
    assert request(tok, "a ", ["b"], 9) == ([97], [[256]])
    assert request(tok, "a\n", ["b"], 9) == ([97], [[10, 98]])
    assert request(tok, "a", [" b", "c"], 9) == ([97], [[256], [99]])
    assert request(tok, "", ["c"], 9) == ([tok.endoftext], [[99]])
    assert request(tok, "abcdefgh", ["xyz"], 6) == ([*b"efgh"], [[*b"xyz"]])


def test_windows_predict_every_token_once_with_as_much_context_as_fits():
    tok = Tokenizer(dump([bytes([i]) for i in range(256)], HAN_PATTERN))
    assert windows(tok, "abcdefgh", 3) == [
        ([tok.endoftext], [[*b"abc"]]), ([*b"c"], [[*b"def"]]), ([*b"ef"], [[*b"gh"]])]


def test_perplexity_is_that_of_single_steps(tiny, tmp_path):
    model, text = tiny.model.eval(), "a longer text, " * 20
    parts = windows(tiny.tok, text, 100)
    nats = -sum(scores[0][0] for part in parts for scores in log_probs(model, [part]))
    with torch.no_grad():
        assert nats == pytest.approx(-sum(slow(model, c, e)[0] for c, (e,) in parts), rel=1e-5)


def test_wilson():
    assert interval([1.0] * 81 + [0.0] * 182) == [30.8, 25.53, 36.62]  # R: prop.test(81, 263, c=F)
    assert interval([1.0] * 5)[1:] == [56.55, 100.0]


def write(path, rows) -> str:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
    return str(path)


def ask(capsys, monkeypatch, *settings: str) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *settings])
    code = 0
    try:
        run(main)
    except SystemExit as end:
        code = end.code
    out, err = capsys.readouterr()
    return code, out, err


def test_every_kind_of_task_and_what_is_done_is_not_done_again(tiny, tmp_path, capsys, monkeypatch):
    for name, rows in ROWS.items():
        write(tmp_path / f"{name}.jsonl", rows)
    settings = (f"--checkpoint={tiny.pt}", f"--tasks={tmp_path}", f"--out={tmp_path}/new/out.log",
                "--max_tokens=5", "--window=100")
    code, table, said = ask(capsys, monkeypatch, *settings)
    assert code == 0, said
    lines = [json.loads(line) for line in open(tmp_path / "new/out.log", encoding="utf-8")]
    assert [(line["task"], line["lang"], line["n"]) for line in lines] == [
        ("choice", "en", 2), ("choice", "zh", 1), ("cloze", "en", 1), ("number", "en", 1),
        ("text", "en", 1), ("text", "zh", 1), ("words", "en", 1), ("words", "zh", 1)]
    one = lines[0]
    assert one["chance"] == round(100 * (1 / 2 + 1 / 3) / 2, 2) and one["longest"][0] == 100
    assert lines[4]["perplexity"] == pytest.approx(
        2 ** lines[4]["bits_per_byte"][0], rel=1e-3)  # a token is a byte
    assert table.count("\n") == 2 + len(lines)
    monkeypatch.setattr(evaluate.Judge, "scores", None)  # nothing may be asked again
    monkeypatch.setattr(evaluate, "complete", None)
    assert ask(capsys, monkeypatch, *settings)[1] == table


def test_half_a_line_is_passed_over_and_nothing_is_written_behind_it(tiny, tmp_path, capsys,
                                                                     monkeypatch):
    """Seen to fail: the next record went on in the same line, and no later run could read it."""
    path, out = write(tmp_path / "t.jsonl", ROWS["cloze"]), tmp_path / "out.log"
    settings = f"--checkpoint={tiny.pt}", f"--tasks={path}", f"--out={out}"
    out.write_bytes('{"task": "中'.encode()[:-1])
    for _ in range(2):
        code, _, said = ask(capsys, monkeypatch, *settings)
        assert code == 0, said
    _, whole, end = out.read_bytes().split(b"\n")
    assert json.loads(whole)["task"] == "t" and end == b""


def test_a_small_window_is_left_to_the_prompt(tiny, monkeypatch, capsys):
    """Seen to fail: of a model that reads 256 tokens one was left to the question, for the answer
    might have 256. What fits is whole; of more, half a window, and that is said."""
    judge = evaluate.Judge(evaluate.Config(checkpoint=tiny.pt))
    limit, seen = judge.model.config.max_seq_len, []
    monkeypatch.setattr(evaluate, "complete", lambda model, tok, prompts, room, **_: (
        seen.append((max(map(len, prompts)), room)), [""] * len(prompts))[1])
    for n, said in ((limit // 4, ""), (2 * limit, "the beginning of 1 prompts does not fit")):
        judge.answer([{"prompt": [{"role": "user", "content": "a" * n}], "answer": "1"}], "")
        assert said in capsys.readouterr().err
    (short, _), (long, room) = seen
    assert limit // 4 <= short < limit // 2 and (long, room) == (limit - limit // 2, limit // 2)


def test_two_files_of_one_name_are_two_tasks(tiny, tmp_path, capsys, monkeypatch):
    """Seen to fail: the second got the figures of the first. So did a file that had changed."""
    paths = [tmp_path / lang / "x.jsonl" for lang in ("one", "two")]
    for path, end in zip(paths, ("four", "five")):
        path.parent.mkdir()
        write(path, [{"context": "one two three", "target": end}])
    settings = (f"--checkpoint={tiny.pt}", f"--tasks={tmp_path}", f"--out={tmp_path}/out.log")
    first = ask(capsys, monkeypatch, *settings)[1].splitlines()
    assert [line.split(" | ")[0] for line in first[2:]] == ["| one/x (en)", "| two/x (en)"]
    assert first[2].split(" | ")[2] != first[3].split(" | ")[2]
    write(paths[0], [{"context": "one two three", "target": "six"}])
    again = ask(capsys, monkeypatch, *settings)[1].splitlines()
    assert again[3] == first[3] and again[2] != first[2]


def test_acc_and_acc_norm_by_hand(tiny, tmp_path, monkeypatch):
    """-3 for "ab", -4 for "abcdefgh": acc takes the first, acc_norm the second."""
    judge = evaluate.Judge(evaluate.Config(checkpoint=tiny.pt))
    monkeypatch.setattr(judge, "scores", lambda asked: [[(-3.0, False), (-4.0, False)]] * 4)
    rows = [{"query": "q", "choices": ["ab", "abcdefgh"], "gold": gold} for gold in (0, 0, 0, 1)]
    found = judge.choice(rows, " ")
    assert found["acc"][0] == 75 and found["acc_norm"][0] == 25 and found["longest"][0] == 25
    assert found["acc_byte"][0] == found["acc_token"][0] == 25


def test_samples_of_the_harness(tmp_path):
    pair = {f"gen_args_{i}": {"arg_0": "Q", "arg_1": end} for i, end in enumerate([" a", " b"])}
    path = write(tmp_path / "s.jsonl", [{"arguments": pair, "target": "1", "doc_id": 0},
                                        {"arguments": [["Q", " a"], ["Q", " b"]], "target": 0}])
    rows, kind = read_task(path)
    assert kind == "choice" and [row["gold"] for row in rows] == [1, 0]
    assert all((r["query"], r["choices"], r["joint"]) == ("Q", [" a", " b"], "") for r in rows)


@pytest.mark.parametrize("rows, said", [
    ([], "no rows"), ([{"a": 1}], "not a row of a task"),
    ([{"query": "a", "choices": ["b"], "gold": 0}], "two strings or more"),
    ([{"query": "a", "choices": ["b", "c"], "gold": 2}], "the right one, from 0"),
    ([{"query": "a", "choices": ["b", ""], "gold": 0}], "two strings or more"),
    ([{"text": 1}], "'text' must be a string"),
    ([{"text": "a"}, {"context": "a", "target": "b"}], "a task has one kind"),
    ([{"arguments": [], "target": 0}], "wanted multiple choice"),
    ([{"prompt": "a"}], "not a row of a task"),
    ([{"prompt": "a", "answer": "Paris"}], "words belong into a list")])
def test_a_bad_task_is_one_line(tiny, tmp_path, capsys, monkeypatch, rows, said):
    path = write(tmp_path / "t.jsonl", rows)
    code, out, err = ask(capsys, monkeypatch, f"--checkpoint={tiny.pt}", f"--tasks={path}",
                         f"--out={tmp_path}/out.log")
    assert code == 2 and said in err.splitlines()[-1] and out == ""

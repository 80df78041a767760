"""The command line of generate.py, from a checkpoint on disk to text on the screen."""
import os
import re
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from test_generate import PROMPTS, small_tokenizer, sure_model

import generate as script
from generate import Config, answer, complete
from plumbing import checkpoint
from plumbing.loading import load_model
from tokenizer import render

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def tok():
    return small_tokenizer()


@pytest.fixture(scope="module")
def model(tok):
    return sure_model(tok)


@pytest.fixture(scope="module")
def saved(tok, model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    checkpoint.save(str(folder), 0, {
        "format": 1, "kind": "pt", "step": 0, "model": model.state_dict(), "optimizer": [],
        "model_config": asdict(model.config), "config": {}, "tokenizer": tok.text})
    return str(folder)


def test_a_loaded_model_has_one_matrix_for_embedding_and_head(saved, model):
    """load_state_dict(assign=True) makes two parameters, and .to(bfloat16) then two matrices."""
    loaded, _ = load_model(saved, torch.device("cpu"), torch.bfloat16)
    assert loaded.lm_head.weight is loaded.embed_tokens.weight and not loaded.training
    assert loaded.lm_head.weight.dtype == torch.bfloat16


def test_what_is_printed_ends_as_the_text_does(tok, model, capsys):
    """Of 40 lengths some end within a character, which shows as U+FFFD."""
    stop = tok.endoftext, tok.im_end
    for n in range(1, 40):
        text, = complete(model, tok, [tok.encode_ordinary("a")], n, temperature=0.0, stop=stop)
        for stream in (False, True):
            cfg = Config(max_tokens=n, temperature=0.0, stream=stream)
            assert answer(model, tok, ["a"], cfg) == [f"a{text}"]
            assert capsys.readouterr().out == f"a{text}\n"


def test_without_max_tokens_a_text_has_the_room_there_is(tok, model, capsys):
    """The model reads 64 tokens: 200, the usual length, would be refused."""
    ids = tok.encode_ordinary("The cat")
    text, = complete(model, tok, [ids], 64 - len(ids), temperature=0.0,
                     stop=(tok.endoftext, tok.im_end))
    answer(model, tok, ["The cat"], Config(temperature=0.0))
    assert capsys.readouterr().out == f"The cat{text}\n"
    with pytest.raises(ValueError, match="a prompt of 66 tokens .* shorten the prompt"):
        answer(model, tok, ["a\n" * 33], Config())


def cli(*args, text="", code=0):
    """What generate.py prints: the text on stdout, the talk on stderr."""
    run = subprocess.run([sys.executable, ROOT / "generate.py", *args, "--max_tokens=20"],
                         input=text.encode(), capture_output=True, timeout=300,
                         env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert run.returncode == code, run.stderr.decode()
    return run.stdout.decode(), run.stderr.decode()


@pytest.mark.parametrize("args", [
    ("--prompt=The cat",), ("--file=-",), ("--file={file}", "--stream"), ("--stream",),
    ("--prompt=The cat", "--cache=False")])
def test_the_command_writes_the_same_text_however_asked(args, tok, model, saved, tmp_path):
    (tmp_path / "prompt.txt").write_text("\ufeffThe cat\n", encoding="utf-8")
    args = [a.format(file=tmp_path / "prompt.txt") for a in args]
    shown, talk = cli(*args, f"--checkpoint={saved}", "--top_p=0.9", "--seed=5", text="The cat\n")
    stop = tok.endoftext, tok.im_end
    settings = dict(stop=stop, temperature=0.8, top_p=0.9, seed=5)
    text, = complete(model, tok, [tok.encode_ordinary("The cat")], 20, **settings)
    assert (shown, talk) == (f"The cat{text}\n", "")


def test_a_batch_is_a_prompt_per_line(tok, model, saved, tmp_path):
    (tmp_path / "prompts.txt").write_text("\n\n".join(PROMPTS), encoding="utf-8")
    shown, timing = cli(f"--file={tmp_path / 'prompts.txt'}", "--batch", "--temperature=0",
                        f"--checkpoint={saved}", "--stop=False", "--timing")
    texts = complete(model, tok, [tok.encode_ordinary(p) for p in PROMPTS], 20, temperature=0.0)
    assert shown == "".join(f"{p}{text}\n" for p, text in zip(PROMPTS, texts))
    n = sum(len(tok.encode_ordinary(p)) for p in PROMPTS)
    assert re.fullmatch(rf"read {n} tokens at [\d,]+ tok/s, wrote 60 at [\d,.]+ tok/s\n", timing)


def test_a_long_batch_is_run_in_portions_and_a_long_prompt_is_said(tok, model, saved, tmp_path,
                                                                   monkeypatch, capsys):
    """A cache for all lines at once took 11 GB for a thousand, and Ctrl-C lost every text; one long
    line left "The cat" three tokens, without a word."""
    (tmp_path / "lines.txt").write_text("a\n" * 70, encoding="utf-8")
    sizes: list[int] = []
    monkeypatch.setattr(script, "answer", lambda *words: sizes.append(len(words[2])))
    monkeypatch.setattr(sys, "argv", ["generate.py", f"--file={tmp_path}/lines.txt", "--batch",
                                      f"--checkpoint={saved}"])
    script.main()
    assert sizes == [32, 32, 6]
    answer(model, tok, ["The cat", "a\n" * 30], Config(temperature=0.0))
    assert "the longest of 2 prompts leaves each text 4 tokens" in capsys.readouterr().err


def test_interactive_answers_each_line_and_outlives_a_mistake(tok, model, saved):
    shown, talk = cli("--interactive", f"--checkpoint={saved}", "--temperature=0", "--stop=False",
                      text="The cat\n\n" + "cat " * 64 + "\na")
    a, b = (complete(model, tok, [tok.encode_ordinary(p)], 20, temperature=0.0)[0]
            for p in ("The cat", "a"))
    assert shown == f"The cat{a}\na{b}\n"
    assert re.fullmatch(r".*stage pt. continues .*\n\n> \n> \n> a prompt of \d+ tokens.*prompt\n"
                        r"\n> \n> \n", talk)


def test_a_mistake_is_one_line_and_exit_code_2(saved, monkeypatch, capsys):
    """Bad settings, files and checkpoints alike, and never a traceback."""
    broken = {"format": 1, "model": {}, "model_config": {"vocab_size": 5}}
    torch.save(broken, f"{saved}/../broken.pt")
    prompt, model = "--prompt=a", f"--checkpoint={saved}"
    for args, message in [
            ([prompt, model, "--max_tokens=64"], "--max_tokens=63 fits"),
            ([prompt, "--checkpoint=no/such"], "no/such: no such file"),
            ([prompt, f"--checkpoint={ROOT}"], "no checkpoint in this folder"),
            ([prompt, f"--checkpoint={saved}/../broken.pt"], "holds no language model"),
            ([prompt, "--file=x"], "give one of"), ([prompt, "--interactive"], "give one of"),
            ([prompt, "--batch"], "--batch takes its prompts from the lines of a file"),
            (["--file=x", "--batch", "--stream"], "choose one"),
            ([prompt, model, "--system=x"], "--system belongs to a chat"),
            (["--file=no/such"], "no/such: "), ([f"--file={os.devnull}"], "no prompt in it"),
            ([prompt, "--temperature=-1"], "'temperature' must be float at least 0"),
            ([prompt, "--top_k=-1"], "'top_k' must be int at least 0"),
            ([prompt, "--top_p=0"], "'top_p' must be float above 0, at most 1"),
            ([prompt, "--min_p=1.1"], "'min_p' must be float between 0 and 1"),
            ([prompt, "--max_tokens=0"], "int at least 1"),
            ([prompt, "--repetition_penalty=0"], "'repetition_penalty' must be float above 0"),
            ([prompt, "--device=tpu"], "'device' must be"),
            ([prompt, "--tempratur=1"], "did you mean")]:
        monkeypatch.setattr(sys, "argv", ["generate.py", *args])
        with pytest.raises(SystemExit) as exit:
            script.main()
        shown = capsys.readouterr().err
        assert exit.value.code == 2 and shown.count("\n") == 1 and message in shown, (args, shown)
    shown, line = cli("--file=-", model, text="cat " * 64, code=2)
    assert shown == "" and re.fullmatch(r"a prompt of \d+ tokens .*; shorten the prompt\n", line)


def test_a_conversation_remembers_and_forgets_the_oldest_first(tiny, capsys, monkeypatch):
    """What the model is given is the rendered history; the system message is never forgotten, a
    question goes with its reply, and what was dropped is said."""
    given = []

    def fake(model, prompts, max_tokens, **settings):
        given.append(prompts[0])
        yield [ord("y")]
        yield [tiny.tok.im_end]

    monkeypatch.setattr(script, "generate", fake)
    cfg = Config(chat=True, system="be kind", max_tokens=180)
    history = [{"role": "system", "content": "be kind"}]
    for line in ("one", "two", "三"):
        script.converse(tiny.model, tiny.tok, line, history, cfg)
    said = [m["content"] for m in history]
    assert said[0] == "be kind" and said[-4:] == ["two", "y", "三", "y"] and "one" not in said
    want = render(tiny.tok, history[:-1], add_generation_prompt=True)[0]
    assert given[-1] == want and len(want) <= 256 - 180
    shown = capsys.readouterr()
    assert shown.out == "y\n" * 3 and "forgotten" in shown.err


def test_a_question_that_is_too_long_costs_no_history(tiny):
    history = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]
    before = list(history)
    with pytest.raises(ValueError, match="shorten the prompt"):
        script.converse(tiny.model, tiny.tok, "x" * 300, history, Config(chat=True))
    assert history == before


def test_chat_of_the_command_line_is_the_rendered_prompt(tiny):
    """With a prompt: one reply, without the prompt; without: a conversation from standard input."""
    ids, _ = render(tiny.tok, [{"role": "user", "content": "hi 你"}], add_generation_prompt=True)
    want, = complete(tiny.model, tiny.tok, [ids], 20, temperature=0.0,
                     stop=(tiny.tok.im_end, tiny.tok.endoftext))
    args = f"--checkpoint={tiny.pt}", "--chat", "--temperature=0"
    assert cli(*args, "--prompt=hi 你") == (want + "\n", "")
    shown, talk = cli(*args, "--stream", text="hi 你\n")
    assert shown == want + "\n"
    assert talk.endswith("answers what you type; Ctrl-C ends it\n\n> \n> \n")

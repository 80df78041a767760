"""`python generate.py` as people type it, in a folder with an `out`: nothing else is said."""
import os
import re
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import pytest

import generate as script
from configurator import configure
from generate import complete
from plumbing import checkpoint
from plumbing.loading import newest_checkpoint
from tokenizer import render

ROOT = Path(__file__).parent.parent


def save(tiny, folder: Path, kind: str, age: float) -> str:
    """A checkpoint of this stage, so many seconds old."""
    path = checkpoint.save(str(folder), 7, {
        "format": 1, "kind": kind, "step": 7, "model": tiny.model.state_dict(), "optimizer": [],
        "model_config": asdict(tiny.model.config), "config": {}, "tokenizer": tiny.tok.text})
    os.utime(path, (time.time() - age,) * 2)
    return str(path)


def command(*args: str, cwd: Path, **more) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, ROOT / "generate.py", "--temperature=0", *args],
                            env=os.environ | {"OMP_NUM_THREADS": "1"}, stderr=subprocess.PIPE,
                            cwd=cwd, **more)


def test_the_newest_checkpoint_is_found_that_can_write(tiny, tmp_path, monkeypatch, capsys):
    """The user's own runs come before the demo's, however old they are; reward models and damaged
    files are passed over; of a run the newest step that is whole is taken."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="^out/ holds no checkpoint .* python -m demo .* train_pt"):
        newest_checkpoint()
    out = tmp_path / "out"
    demo = save(tiny, out / "demo" / "sft", "sft", 20)
    save(tiny, out / "demo" / "rm", "rm", 10)
    (out / "notes").mkdir()
    (out / "notes" / "step1.pt").write_text("not a checkpoint's name")
    (out / "notes" / "step00000009-0123456789abcdef.pt").symlink_to("nowhere")
    assert tmp_path / newest_checkpoint() == Path(demo) and capsys.readouterr() == ("", "")
    own = save(tiny, out / "my" / "try 2" / "pt", "pt", 1000)
    assert tmp_path / newest_checkpoint() == Path(own)
    newer = save(tiny, out / "my" / "dpo", "dpo", 5)
    assert tmp_path / newest_checkpoint() == Path(newer)
    with open(newer, "r+b") as f:
        f.write(b"XX")
    checkpoint._known_good.clear()
    assert tmp_path / newest_checkpoint() == Path(own)
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 1 and "damaged" in said.err


def test_without_any_checkpoint_one_line_says_what_makes_one(tmp_path):
    done = command(cwd=tmp_path, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    out, err = done.communicate(b"hello")
    assert (done.returncode, out, err.count(b"\n")) == (2, b"", 1) and b"python -m demo" in err


@pytest.mark.parametrize("kind", ["pt", "sft"])
def test_piped_input_is_a_prompt_and_stdout_has_the_text_only(tiny, tmp_path, kind):
    """Continued, with itself before it, by a model that has not learnt to answer; answered by one
    that has. The settings, once 22 lines before the first word, are shown on wish, on stderr."""
    path = save(tiny, tmp_path / "out" / kind, kind, 0)
    ids = {"pt": tiny.tok.encode_ordinary("hi 你"),
           "sft": render(tiny.tok, [{"role": "user", "content": "hi 你"}], True)[0]}[kind]
    want, = complete(tiny.model, tiny.tok, [ids], 20, temperature=0.0,
                     stop=(tiny.tok.endoftext, tiny.tok.im_end))
    done = command("--stream", "--settings", "--max_tokens=20", cwd=tmp_path,
                   stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    out, err = done.communicate("hi 你\n".encode())
    assert out.decode() == ("hi 你" if kind == "pt" else "") + want + "\n"
    *settings, found = err.decode().splitlines()
    assert len(settings) == len(script.fields(script.Config)) and "temperature" in err.decode()
    assert os.path.relpath(path, tmp_path) in found and f"stage {kind}" in found


def test_a_prompt_may_be_the_word_none():
    """`--prompt=None` was refused: "must be str, got None"."""
    assert script.read_prompts(configure(script.Config, ["--prompt=None"], show=False)) == ["None"]


@pytest.mark.parametrize("redirect, encoding", [("| head -c 5", "utf-8"), (">/dev/null", "gbk")])
def test_neither_head_nor_a_character_ends_it_with_a_traceback(tiny, redirect, encoding):
    """What tiny writes at this temperature is full of U+FFFD, which GBK does not have."""
    words = f"generate.py --checkpoint={tiny.pt} --prompt=a --temperature=9 --max_tokens=200"
    done = subprocess.run(["bash", "-c", f"$0 {words} {redirect}; exit ${{PIPESTATUS[0]}}",
                           sys.executable], cwd=ROOT, capture_output=True,
                          env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONIOENCODING": encoding})
    assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.parametrize("kind, flags", [("pt", ()), ("sft", ()), ("sft", ("--interactive",)),
                                         ("pt", ("--chat",))])
def test_on_a_terminal_it_talks(tiny, tmp_path, kind, flags):
    """A chat for a model that has learnt to answer, prompts for one that has not, unless the flags
    say otherwise. What tiny writes is noise with control characters in it: none may reach the
    terminal, whose answer to some of them would be typed into the next prompt."""
    pty = pytest.importorskip("pty")  # not on Windows
    save(tiny, tmp_path / "out" / "x", kind, 0)
    ours, theirs = pty.openpty()
    done = command("--max_tokens=40", "--temperature=3", *flags, cwd=tmp_path, stdin=theirs,
                   stdout=theirs)
    os.close(theirs)
    talk = b""
    for n, line in enumerate(("hi 你\n", "and?\n", "\x04")):  # the last is Ctrl-D
        while talk.count(b"\n> ") <= n:
            talk += os.read(done.stderr.fileno(), 1 << 16)
        os.write(ours, line.encode())
    assert done.wait(60) == 0
    got = os.read(ours, 1 << 16).decode().replace("\r\n", "\n")
    os.close(ours)

    chat = kind == "sft" and not flags or "--chat" in flags
    assert f"(stage {kind}) {'answers' if chat else 'continues'}" in talk.decode()
    tok, want, history = tiny.tok, "", []
    for line in ("hi 你", "and?"):
        history.append({"role": "user", "content": line})
        ids = render(tok, history, True)[0] if chat else tok.encode_ordinary(line)
        reply, = complete(tiny.model, tok, [ids], 40, stop=(tok.endoftext, tok.im_end),
                          temperature=3.0)
        history.append({"role": "assistant", "content": reply})
        want += f"{line}\n{'' if chat else line}{reply}\n"
    clean = re.sub("[\x00-\x08\x0b-\x1f\x7f-\x9f]", "", want)
    assert got == clean != want

"""What a script prints can neither end it nor command the terminal."""
import os
import subprocess
import sys
from pathlib import Path

import pytest

from plumbing.terminal import printable, say, show

ROOT = Path(__file__).resolve().parent.parent


def test_every_script_starts_so_that_nothing_it_prints_can_end_it():
    rooms = ("demo", "bench", "faults")
    files = [*ROOT.glob("*.py"), *(path for room in rooms for path in ROOT.glob(f"{room}/*.py"))]
    starts = {path.name: path.read_text().rpartition('if __name__ == "__main__":')[2].strip()
              for path in files if "\ndef main()" in path.read_text()}
    assert len(starts) > 12 and {start.removeprefix("terminal.") for start in starts.values()} == {
        "run(main)"}, starts


def script(body: str, redirect: str = "", **env: str) -> subprocess.CompletedProcess:
    """`body` as the main of a script, run by a shell with `redirect` behind the command."""
    code = ("import sys\nfrom plumbing.terminal import fail, run\n"
            f"def main():\n    {body}\nrun(main)")
    return subprocess.run(["bash", "-c", f'"$0" -c "$1" {redirect}', sys.executable, code],
                          cwd=ROOT, env=os.environ | env, capture_output=True, timeout=60)


@pytest.fixture(params=["", "1"], autouse=True)
def unbuffered(request, monkeypatch):
    """What cannot be written stays in the buffer, or there is none."""
    monkeypatch.setenv("PYTHONUNBUFFERED", request.param)


@pytest.mark.parametrize("encoding", ["gbk", "ascii", "cp1252"])
def test_no_character_ends_a_script(encoding):
    """A Chinese Windows redirects output in GBK, which has no U+FFFD, no emoji and no U+23CE:
    generation, answers and the sample line of every training died there."""
    done = script("print('a \\ufffd \\U0001f642 \\u23ce b'); print('\\ufffd', file=sys.stderr)",
                  PYTHONIOENCODING=encoding)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"a ? ? ? b\n", b"?\n")


def test_what_is_typed_in_another_encoding_does_not_end_a_script():
    done = script("print(len(input()))", "<<< $'a\\xff'", PYTHONIOENCODING="utf-8")
    assert (done.returncode, done.stdout, done.stderr) == (0, b"2\n", b"")


@pytest.mark.parametrize("redirect", ["| head -1", "2>&1 | head -1"])
@pytest.mark.parametrize("n", [3, 100_000])
def test_a_reader_who_has_had_enough_is_no_error(n, redirect):
    """`generate.py … | head` ended with a traceback, or with "Exception ignored" when all of it
    was still in the buffer."""
    done = script(f"for i in range({n}): print(i, flush=i % 2)",
                  redirect + "; exit ${PIPESTATUS[0]}")
    assert (done.returncode, done.stdout, done.stderr) == (0, b"0\n", b"")
    done = script(f"for i in range({n}): print(i, file=(sys.stdout, sys.stderr)[i % 2])",
                  redirect + " >/dev/null; exit ${PIPESTATUS[0]}")
    assert done.returncode == 0 and b"Error" not in done.stderr


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_under_the_output_is_one_line():
    done = script("print('a')", ">/dev/full")
    assert done.returncode == 3
    assert done.stderr == b"the output cannot be written: No space left on device\n"


@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&-", ">&- 2>&- <&-"])
def test_a_stream_that_was_closed_is_no_error(closed):
    done = script("sys.stdin.isatty(), sys.stdin.read(), sys.stdout.isatty(), print('a'); "
                  "print('b', file=sys.stderr); raise SystemExit(7)", closed)
    assert done.returncode == 7
    assert done.stdout == (b"" if " >&-" in f" {closed}" else b"a\n")
    assert done.stderr == (b"" if "2>&-" in closed else b"b\n")


def test_a_mistake_keeps_its_line_and_its_exit_code():
    done = script("print('a'); fail('no\\nsuch \\x1b[31mfile')", "| cat; exit ${PIPESTATUS[0]}")
    assert (done.returncode, done.stdout) == (2, b"a\n")
    assert done.stderr == b"no such \\x1b[31mfile\n"
    done = script("print('a'); fail('no')", "| true; exit ${PIPESTATUS[0]}", PYTHONUNBUFFERED="")
    assert (done.returncode, done.stderr) == (2, b"no\n")


def test_ctrl_c_is_no_traceback():
    done = script("print('a'); raise KeyboardInterrupt")
    assert (done.returncode, done.stdout, done.stderr) == (130, b"a\n", b"")


@pytest.mark.parametrize("terminal", [True, False])
def test_text_from_outside_does_not_command_the_terminal(terminal, monkeypatch, capsys):
    """A model can write any byte, and so can whoever names a file: ESC [ 2 J clears the screen. A
    file gets the text as it is."""
    text = "a\x1b[2J\r\n\tb\x9b1m\u202e 中\u3000🙂"
    monkeypatch.setattr("sys.stdout.isatty", lambda: terminal, raising=False)
    show(text)
    assert capsys.readouterr() == ("a[2J\n\tb1m 中\u3000🙂" if terminal else text, "")
    say(text)
    assert capsys.readouterr() == ("", printable(text) + "\n")
    assert printable(text) == "a\\x1b[2J   b\\x9b1m\\u202e 中 🙂"

"""What a script prints can neither end it nor command the terminal."""
import json
import os
import signal
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
@pytest.mark.parametrize("before", ["", "from plumbing.terminal import only_talk; only_talk(); "])
def test_a_full_disk_under_the_output_is_one_line(before):
    done = script(before + "print('a')", ">/dev/full")
    assert done.returncode == 3
    assert done.stderr == b"the output cannot be written: No space left on device\n"


def test_a_file_that_was_not_written_is_one_line():
    """What `write_text` raises has its reason in its text."""
    done = script("raise OSError('pt.jsonl was not written: File too large')")
    assert (done.returncode, done.stderr) == (2, b"pt.jsonl was not written: File too large\n")


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


@pytest.mark.parametrize("redirect", ["2>&1 | head -0", "2>&1 >&- | head -0", "2>/dev/full"])
def test_a_mistake_keeps_its_exit_code_when_nobody_reads_it(redirect):
    """`train_pt.py --max_steps=0 2>&1 | head -0` ended with exit code 0, as if it had trained: the
    line of the mistake could not be written, and that was taken for a reader who has had enough."""
    wait = "import time; time.sleep(0.3); "
    for body in ("fail('no')", "print('a'); fail('no')"):
        done = script(wait + body, f"{redirect}; exit ${{PIPESTATUS[0]}}", PYTHONUNBUFFERED="")
        assert (done.returncode, done.stderr) == (2, b""), body


def test_the_result_is_written_whole_though_nobody_reads_the_talk():
    """What a script says beside its result must not cost the result."""
    done = script("import time; time.sleep(0.3); from plumbing.terminal import murmur, say; "
                  "print('a'); say('talk'); murmur('more'); say('and more'); print('b')",
                  "2> >(head -c 0)")
    assert (done.returncode, done.stdout, done.stderr) == (0, b"a\nb\n", b"")


def test_work_whose_result_is_a_file_goes_on_when_nobody_reads_what_it_says():
    """`data.py … | head -3` stopped where the fourth line was said, with exit code 0 and half of
    the files; `rag.py add … | head -1` left the index as it was."""
    done = script("from plumbing.terminal import only_talk; only_talk(); "
                  "[print(i, flush=True) for i in range(100_000)]; raise SystemExit(7)",
                  "| head -1; exit ${PIPESTATUS[0]}")
    assert (done.returncode, done.stdout, done.stderr) == (7, b"0\n", b"")


def test_that_stdout_is_talk_may_be_said_any_number_of_times():
    """Each note that a server took in said it once more, and put a stream around the stream: after
    the 498th every print was a RecursionError."""
    done = script("from plumbing.terminal import only_talk; [only_talk() for i in range(2_000)]; "
                  "print('a')")
    assert (done.returncode, done.stdout, done.stderr) == (0, b"a\n", b"")


def test_ctrl_c_is_no_traceback():
    done = script("print('a'); raise KeyboardInterrupt")
    assert (done.returncode, done.stdout, done.stderr) == (130, b"a\n", b"")


@pytest.mark.parametrize("name", ["convert", "data", "generate", "rag", "tokenizer"])
def test_ctrl_c_during_the_imports_is_one_line(name, tmp_path):
    """They take seconds, in which people change their minds: the answer was thirty lines of
    torch. Whatever is imported may swallow an exception, so this is none."""
    for package in ("numpy", "regex", "torch"):
        (tmp_path / f"{package}.py").write_text(
            "import time\nprint('imports', flush=True)\ntry: time.sleep(60)\n"
            "except BaseException: time.sleep(60)")
    with subprocess.Popen([sys.executable, f"{name}.py"], cwd=ROOT, stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE, env=os.environ | {"PYTHONPATH": str(tmp_path)}
                          ) as started:
        assert started.stdout.readline() == b"imports\n"
        started.send_signal(signal.SIGINT)
        assert started.communicate(timeout=20) == (b"", b"stopped\n")
    assert started.returncode == 130


@pytest.mark.parametrize("encoding", ["gbk", "ascii", "utf-8"])
def test_json_lines_lose_no_character(encoding):
    """A Chinese Windows redirects output in GBK. `rag.py split … > chunks.jsonl` wrote "?" for each
    character that GBK lacks, and our own readers refuse the file, which is not UTF-8."""
    done = script("from plumbing.terminal import show_json; show_json({'a': '键 \\U0001f642'})",
                  PYTHONIOENCODING=encoding)
    assert json.loads(done.stdout.decode()) == {"a": "键 🙂"}
    assert (b"\\u" in done.stdout) == (encoding != "utf-8")


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

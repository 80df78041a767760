"""
The scoreboard: break the shipped scripts in every way we know, and count what is lost.

    make reliability                     writes docs/reliability.md
    python -m faults --kills=2000        the long form of the first row
    python -m faults --only=hostile_files,disk_full --out=

A row is a test, run in full here and with smaller numbers by `make test`. Its docstring says what
it does, and with which deliberate break it was seen to fail. tests/lab.py has the tools.
"""
import os
import platform
import re
import subprocess
import sys
import time
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import NamedTuple

import torch

from configurator import Count, configure, fail
from plumbing import files, terminal

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Config:
    kills: Count = 300  # of the SIGKILL storm
    only: str = ""  # names of the rows to run, comma-separated; empty: all
    out: str = "docs/reliability.md"  # the report; empty: none


class Row(NamedTuple):
    name: str
    what: str
    target: str
    file: str  # in tests/
    words: str  # that stand in the names of its tests


ROWS = [
    Row("kill_storm", "SIGKILL storm on the five training scripts",
        "300 kills, 0 corrupt checkpoints, 0 differing bits",
        "test_reliability.py", "kill_storm"),
    Row("crash_at_every_call", "crash at every I/O call: checkpoint, token shards, rows, index",
        "all calls, 0 bad states", "test_damage.py", "crash_at_every_call"),
    Row("damaged_files", "damaged files detected and named", "1,500 of 1,500",
        "test_damage.py", "damaged_files"),
    Row("disk_full", "full disk (file size limit)", "100 %, 0 temporary files",
        "test_damage.py", "disk_full"),
    Row("resume_anywhere", "resume at every step of 30", "all equal",
        "test_reliability.py", "resume_anywhere"),
    Row("signals", "SIGTERM or SIGINT at random moments, imports and saves too",
        "20 of 20, each within 2 s", "test_reliability.py", "test_signals"),
    Row("ranks", "a rank is killed, raises, hangs: all gone, rank and step named",
        "3 s, 3 s, timeout + 2 s", "test_reliability.py", "test_ranks"),
    Row("restarts", "torchrun --max-restarts=3", "3 of 3, trace equal",
        "test_nodes.py", "killed_ranks"),
    Row("not_finite", "NaN and infinity: weights unchanged; a streak stops", "100 %",
        "test_reliability.py", "not_finite"),
    Row("bad_lines", "bad JSONL lines located", "13 of 13 kinds, 0 good lines lost",
        "test_corpus.py", "all_damage"),
    Row("typos", "misspelt settings refused; suggestion right", "100 %; 98 %",
        "test_configurator.py", "every_slip"),
    Row("hostile_files", "hostile model files refused", "30 of 30, below 200 MB and 1 s each",
        "test_damage.py", "hostile_files"),
    Row("injections", "special tokens typed by users", "0 of 5,000",
        "test_tokenizer.py", "forge_a_turn"),
    Row("worst_strings", "worst strings for the tokenizer", "below 2 s per MB",
        "test_tokenizer.py", "worst_cases"),
    Row("http", "serve.py: 5,300 random requests, 200 clients that hang up, SIGTERM in a stream",
        "0 errors of the server, rows free, memory level, the stream ends",
        "test_serve.py", "noise or hangs_up or ends_a_stream"),
]
HEAD = "| # | what | target | measured | on, took | passed |\n|---|---|---|---|---|---|"


def measure(file: str, words: str, kills: int) -> tuple[str, bool]:
    """What the tests of a file whose names hold these words say that they have measured, else how
    many passed; and whether all did, for a test that is skipped proves nothing."""
    run = subprocess.run([sys.executable, "-m", "pytest", "-m", "", "-s", f"tests/{file}", "-k",
                          words], cwd=ROOT, env=os.environ | {"KILLS": str(kills)},
                         stdout=subprocess.PIPE, text=True)
    end = run.stdout.splitlines()[-1].strip("= ")  # 4 passed, 36 deselected in 3.13s
    count = f"{file} -k {words}: {re.sub(r', [0-9]+ deselected| in .*', '', end)}"
    told = re.findall(r"^measured: (.*)", run.stdout, re.M) or [count]
    return told[-1], run.returncode == 0 and "skipped" not in end


def old_rows(path: str) -> dict[int, str]:
    """The rows of an earlier report, which stay until they are run again."""
    text = Path(path).read_text() if path and Path(path).exists() else ""
    return {int(line.split()[1]): line for line in text.splitlines() if re.match(r"\| \d+ ", line)}


def write_report(path: str, board: dict[int, str]) -> None:
    cpu = Path("/proc/cpuinfo").read_text().partition("model name\t: ")[2].partition("\n")[0]
    head = (f"# Faults survived\n\nWritten by `make reliability`, or row by row by `python -m "
            f"faults --only=ROW`, last on {os.cpu_count()} cores of {cpu}, "
            f"{platform.system()} {platform.release()}; Python {platform.python_version()}, torch "
            f"{torch.__version__}.\nA row is a test in `tests/`, whose docstring says what it does "
            "and with which deliberate break\nit was seen to fail. Times depend on what else the "
            "machine does.\n")
    files.write_text(path, "\n".join([head, HEAD, *(board[i] for i in sorted(board)), ""]))


def main() -> None:
    cfg = configure(Config)
    if not hasattr(os, "pidfd_open"):
        fail("python -m faults needs Linux: it forks the scripts and looks into /proc")
    names = [row.name for row in ROWS]
    wanted = cfg.only.split(",") if cfg.only else names
    if unknown := set(wanted) - set(names):
        fail(f"--only={cfg.only}: there is no {', '.join(unknown)} among {', '.join(names)}")
    begin, passed, board = time.time(), 0, old_rows(cfg.out)
    print(HEAD, flush=True)
    for i, row in enumerate(ROWS, 1):
        if row.name not in wanted:
            continue
        start = time.time()
        measured, good = measure(row.file, row.words, cfg.kills)
        passed += good
        board[i] = (f"| {i} | {row.what} | {row.target} | {measured} | {date.today()}, "
                    f"{time.time() - start:.0f} s | {'yes' if good else '**NO**'} |")
        print(board[i], flush=True)
        if cfg.out:  # after each row: what is known is not lost if this is stopped
            write_report(cfg.out, board)
    print(f"{passed} of {len(wanted)} rows passed in {time.time() - begin:.0f} s")
    raise SystemExit(passed < len(wanted))


if __name__ == "__main__":
    terminal.run(main)

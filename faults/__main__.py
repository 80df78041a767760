"""
The scoreboard: break the shipped scripts in every way we know, and count what is lost.

    make reliability                     5 minutes; writes docs/reliability.md
    python -m faults --kills=2000        the long form of the first row
    python -m faults --only=hostile_files,disk_full --out=

A row is a function: it returns what was measured, and whether that is what is promised. Its
docstring says with which deliberate break it was seen to fail. Rows about files are in damage.py.
tests/test_reliability.py calls the same functions with smaller numbers; where a test proves a row
better, the row is that test.
"""
import os
import platform
import re
import shutil
import signal
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from functools import partial
from pathlib import Path
from random import Random

import torch

from configurator import Count, configure, fail
from faults.damage import crash_at_every_call, damaged_files, disk_full, hostile_files, kill_storm
from faults.lab import (ROOT, STAGES, Child, Lab, Result, die_after_save, instead, same_bits,
                        same_run, side_by_side)
from plumbing import checkpoint, files, runtime, terminal

TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")


@dataclass(frozen=True)
class Config:
    kills: Count = 300  # of the SIGKILL storm
    only: str = ""  # rows to run, comma-separated names of their functions; empty: all
    out: str = "docs/reliability.md"  # the report; empty: none


def resume_anywhere(lab: Lab, steps: int = 30, stages: tuple[str, ...] = STAGES) -> Result:
    """Each stage in as many lives as it has steps, one step each: so every step is resumed at, and
    all but the first by a run that was itself resumed. Pre-training also goes from each step to the
    end in one life. Losses, weights and moments against those of one long life. Seen to fail when
    the batch depended on the first step of the process, and when the optimizer was not restored."""
    def lives(stage: str) -> list[int]:
        """Runs that are equal, and all."""
        good = total = 0
        whole, _ = lab.whole(stage, max_steps=steps)
        out = lab.new("lives")
        for step in range(1, steps + 1):
            lab.start(stage, out, die_after_save(step), resume=True, max_steps=steps).wait()
            if stage == "pt" and step < steps:
                copy = lab.new("copy")
                shutil.copytree(out, copy)
                lab.start(stage, copy, resume=True, max_steps=steps).well()
                good += same_run(copy, whole)
                total += 1
                shutil.rmtree(copy)
        return [good + same_run(out, whole), total + 1]

    good, total = map(sum, zip(*side_by_side([partial(lives, stage) for stage in stages])))
    return (f"{good} of {total} runs ({len(stages)} stages x {steps} resumes in a row; pt from "
            "each step to the end) equal to the last bit", good == total)


def signals(lab: Lab, moments: int = 20) -> Result:
    """SIGTERM and SIGINT, in turn, at random moments of each stage: a third of them while Python
    still imports torch (a process of its own), a sixth in the middle of a save, the others anywhere
    between the first instruction of main() and the end. The exit code must be 0 without a
    traceback, within 2 s, and --resume must give the run that nothing disturbed. Seen to fail
    without `end_quietly` (exit code -15), and when the handler raised instead of setting a flag."""
    def hears_sigterm(pid: int) -> bool:
        caught = Path(f"/proc/{pid}/status").read_text().split("SigCgt:")[1].split()[0]
        return bool(int(caught, 16) >> (signal.SIGTERM - 1) & 1)

    r, good, slowest = Random(2), 0, 0.0
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # else a fork is born with the handler of a test
    whole = {stage: lab.whole(stage, max_steps=8) for stage in STAGES}
    for i in range(moments):
        stage, number = STAGES[i % 5], (signal.SIGTERM, signal.SIGINT)[i // 5 % 2]
        out, (expected, seconds) = lab.new("signal"), whole[stage]
        settings: dict = dict(max_steps=8, resume=True, save_every=3)
        if i % 3 == 0:
            run: Child = lab.python(f"train_{stage}.py", *lab.arguments(stage, out, **settings))
            seconds = 0.9
        else:
            run = lab.start(stage, out, terminal.end_quietly, **settings)
        while not run.ends(0) and not hears_sigterm(run.pid):  # its first lines see to that, then
            pass  # come the imports
        if i % 6 == 1:
            while not list(out.glob(".tmp-*")) and not run.ends(0.0002):
                pass
        else:
            run.ends(r.uniform(0, seconds))
        start = time.perf_counter()
        run.send(number)
        quiet = run.wait() == 0 and "Traceback" not in run.text
        slowest = max(slowest, time.perf_counter() - start)
        lab.start(stage, out, **settings).wait()
        good += quiet and same_run(out, expected)
    return (f"{good} of {moments} exit with 0 and go on to the last bit; the slowest took "
            f"{slowest:.1f} s", good == moments and slowest <= 2)


def break_rank(how: str, at: int, note: Path) -> Callable[[], None]:
    """For a Run: at step `at` rank 1 is killed, raises or hangs (sleeps, as on a dead network
    drive). `note` gets the time."""
    def allows(real, guard, norm: float, step: int, *rest) -> bool:
        if os.environ["RANK"] == "1" and step == at:
            note.write_text(str(time.time()))
            if how == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            if how == "raises":
                raise RuntimeError("deliberate")
            time.sleep(1000)
        return real(guard, norm, step, *rest)
    return instead(runtime.GradientGuard, "allows", allows)


FAULTY = """import sys
from pathlib import Path
sys.path.insert(0, {root!r})
import train_pt
from faults.__main__ import break_rank
break_rank({how!r}, 5, Path({note!r}))()
train_pt.main()
"""


def ranks(lab: Lab, timeout: float = 4.0) -> Result:
    """Under torchrun with gloo, at step 5 rank 1 of 2 is killed, raises, or hangs. From then until
    no process is left it may take 3 s, 3 s, dist_timeout + 2 s, and what is printed must say which
    rank failed and at which step. Seen to fail without end_if_hanging (torchrun waits 30 s more for
    the rank that hangs), and before messages named rank and step."""
    took, named = {}, 0
    for how, line in (("killed", r"rank 0 of 2, step [56]: lost contact"),
                      ("raises", r"rank 1 of 2, step 5: failed"),
                      ("hangs", r"rank 1 of 2, step 5: hangs")):
        note, script = lab.new("note"), lab.new("fault").with_suffix(".py")
        script.write_text(FAULTY.format(root=str(ROOT), how=how, note=str(note)))
        run = lab.python(*TORCHRUN, str(script), *lab.arguments(
            "pt", lab.new(), max_steps=5000, save_every=5000, dist_timeout=timeout))
        failed = run.wait(120) != 0
        took[how] = time.time() - float(note.read_text())
        named += failed and bool(re.search(line, run.text) and re.search(
            r"Root Cause.*?rank +: \d", run.text, re.S))
    return (", ".join(f"{how} {seconds:.1f} s" for how, seconds in took.items())
            + f" (timeout {timeout:.0f} s); rank and step named in {named} of 3", named == 3
            and max(took["killed"], took["raises"]) <= 3 and took["hangs"] <= timeout + 2)


def poisoned(kind: str, steps: range) -> list[Callable[[], None]]:
    """For a Run: at these steps the loss, one gradient, or (after the guard) one weight is not
    finite."""
    def clip(real, parameters, most):
        parameters = list(parameters)
        learnt = [p for p in parameters if p.grad is not None][-1]
        now = runtime.RankState.step in steps
        if now and kind in ("nan", "inf"):
            learnt.grad.view(-1)[0] = float(kind)
        norm = real(parameters, most)
        if now and kind == "weight":
            learnt.data.view(-1)[0] = float("nan")
        return norm

    def backward(real, loss, *args, **more):
        poison = kind == "loss" and runtime.RankState.step in steps
        return real(loss * float("nan") if poison else loss, *args, **more)
    return [instead(torch.nn.utils, "clip_grad_norm_", clip),
            instead(torch.Tensor, "backward", backward)]


def not_finite(lab: Lab, stages: tuple[str, ...] = STAGES) -> Result:
    """At step 2 of each stage the loss is NaN, or one number of one gradient is NaN or infinite.
    Weights and moments at step 3 must be those of step 2, bit for bit (and those of an undisturbed
    run are not). If that lasts from step 2 on, or a weight is NaN: exit code 4, and the checkpoint
    that is named is whole and finite. Seen to fail when the guard looked at the loss instead of the
    norm, when it let the optimizer step, and when the message named the folder only."""
    def still(out: Path) -> bool:
        checkpoint._known_good.clear()
        new, old = (checkpoint.load(str(p))[0] for p in checkpoint.list_checkpoints(str(out))[:2])
        for state in (new, old):  # a reward model notes, at its end, how its scores are spread
            state["model"].pop("mean", None), state["model"].pop("std", None)
            state["optimizer"] = [moments["state"] for moments in state["optimizer"]]
        return (new["step"], old["step"]) == (3, 2) and all(
            same_bits(new[key], old[key]) for key in ("model", "optimizer"))

    def inject(stage: str) -> list[int]:
        """Injections that went well, and all."""
        good, moves = 0, not still(lab.whole(stage, max_steps=3)[0])
        for kind in ("loss", "nan", "inf"):
            out = lab.new("nan")
            run = lab.start(stage, out, *poisoned(kind, range(2, 3)), max_steps=3)
            good += run.wait() == 0 and "skipped 1/3" in run.text and moves and still(out)
        for kind in ("nan", "weight"):
            run = lab.start(stage, lab.new("nan"), *poisoned(kind, range(2, 99)), max_steps=20)
            code = run.wait()
            name = re.search(r"the last good checkpoint: (\S+\.pt)", run.text)
            good += bool(code == 4 and name and "Traceback" not in run.text
                         and checkpoint.damage(Path(name[1])) is None
                         and all(torch.isfinite(t).all()
                                 for t in checkpoint.load(name[1])[0]["model"].values()))
        return [good, 5]

    good, total = map(sum, zip(*side_by_side([partial(inject, stage) for stage in stages])))
    return f"{good} of {total} injections in {len(stages)} stages", good == total


def by_test(name: str, file: str, words: str) -> Callable[..., Result]:
    """The row of that name: pytest runs the tests of a file whose names hold these words."""
    def row(lab: Lab) -> Result:
        run = lab.python("-m", "pytest", "-m", "", f"tests/{file}", "-k", words)
        code, said = run.wait(600), run.text.splitlines()[-1]  # 4 passed, 36 deselected in 3.13s
        figure = re.sub(r", \d+ deselected| in .*", "", said.strip("= "))
        return f"{file} -k {words}: {figure}", code == 0 and "skipped" not in said
    row.__name__, row.test = name, (file, words)  # type: ignore[attr-defined]
    return row


ROWS: list[tuple[Callable[..., Result], str, str]] = [
    (kill_storm, "SIGKILL storm on the five training scripts",
     "300 kills, 0 corrupt checkpoints, 0 differing bits"),
    (crash_at_every_call, "crash at every I/O call: checkpoint, token shards, rows, index",
     "all calls, 0 bad states"),
    (damaged_files, "damaged files detected and named", "1,500 of 1,500"),
    (disk_full, "full disk (file size limit)", "100 %, 0 temporary files"),
    (resume_anywhere, "resume at every step of 30", "all equal"),
    (signals, "SIGTERM or SIGINT at random moments, imports and saves too",
     "20 of 20, each within 2 s"),
    (ranks, "a rank is killed, raises, hangs: all gone, rank and step named",
     "3 s, 3 s, timeout + 2 s"),
    (by_test("restarts", "test_nodes.py", "killed_ranks"),
     "torchrun --max-restarts=3", "3 of 3, trace equal"),
    (not_finite, "NaN and infinity: weights unchanged; a streak stops", "100 %"),
    (by_test("bad_lines", "test_corpus.py", "all_damage"),
     "bad JSONL lines located", "13 of 13 kinds, 0 good lines lost"),
    (by_test("typos", "test_configurator.py", "every_slip"),
     "misspelt settings refused; suggestion right", "100 %; 98 %"),
    (hostile_files, "hostile model files refused", "30 of 30, below 200 MB and 1 s each"),
    (by_test("injections", "test_tokenizer.py", "forge_a_turn"),
     "special tokens typed by users", "0 of 5,000"),
    (by_test("worst_strings", "test_tokenizer.py", "worst_cases"),
     "worst strings for the tokenizer", "below 2 s per MB"),
    (by_test("http", "test_serve.py", "noise or hangs_up or ends_a_stream"),
     "serve.py: 5,300 random requests, 200 clients that hang up, SIGTERM in a stream",
     "0 errors of the server, rows free, memory level, the stream ends"),
]
HEAD = "| # | what | target | measured | on, took | passed |\n|---|---|---|---|---|---|"


def old_rows(path: str) -> dict[int, str]:
    """The rows of an earlier report, which stay until they are run again."""
    text = Path(path).read_text() if path and Path(path).exists() else ""
    return {int(line.split()[1]): line for line in text.splitlines() if re.match(r"\| \d+ ", line)}


def write_report(path: str, board: dict[int, str]) -> None:
    cpu = Path("/proc/cpuinfo").read_text().partition("model name\t: ")[2].partition("\n")[0]
    head = (f"# Faults survived\n\nWritten by `make reliability`, or row by row by `python -m "
            f"faults --only=ROW` (the function's name), last on {os.cpu_count()} cores of {cpu}, "
            f"{platform.system()} {platform.release()}; Python {platform.python_version()}, torch "
            f"{torch.__version__}.\nWhat each row does, and with which deliberate break it was "
            "seen to fail, is said by its function\nin `faults/`, or by its test in `tests/`. "
            "Times depend on what else the machine does.\n")
    files.write_text(path, "\n".join([head, HEAD, *(board[i] for i in sorted(board)), ""]))


def main() -> None:
    cfg = configure(Config)
    if not hasattr(os, "pidfd_open"):
        fail("python -m faults needs Linux: it forks the scripts and looks into /proc")
    names = [row.__name__ for row, *_ in ROWS]
    wanted = cfg.only.split(",") if cfg.only else names
    if unknown := set(wanted) - set(names):
        fail(f"--only={cfg.only}: there is no {', '.join(unknown)} among {', '.join(names)}")
    begin, passed, board = time.time(), 0, old_rows(cfg.out)
    print(HEAD, flush=True)
    with tempfile.TemporaryDirectory() as folder:
        lab = Lab(Path(folder))
        for i, (row, what, target) in enumerate(ROWS, 1):
            if row.__name__ not in wanted:
                continue
            start = time.time()
            measured, good = row(lab, cfg.kills) if row is kill_storm else row(lab)
            passed += good
            board[i] = (f"| {i} | {what} | {target} | {measured} | {date.today()}, "
                        f"{time.time() - start:.0f} s | {'yes' if good else '**NO**'} |")
            print(board[i], flush=True)
            if cfg.out:  # after each row: what is known is not lost if this is stopped
                write_report(cfg.out, board)
    print(f"{passed} of {len(wanted)} rows passed in {time.time() - begin:.0f} s")
    raise SystemExit(passed < len(wanted))


if __name__ == "__main__":
    terminal.run(main)

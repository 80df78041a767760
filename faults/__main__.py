"""
The scoreboard: break the shipped scripts in every way we know, and count what is lost.

    make reliability                          5 minutes; writes docs/reliability.md
    python -m faults --kills=2000        the long form of the first row
    python -m faults --only=hostile_files,disk_full --out=

One function per row: its docstring says what is done and with which deliberate break the row was
seen to fail. They return what was measured and whether that is what is promised; tests/
test_reliability.py calls the same functions with smaller numbers. The rows about files are in
damage.py, those about what people write and what strangers send in hostile.py.
"""
import argparse
import contextlib
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from datetime import date
from functools import partial
from pathlib import Path
from random import Random

import numpy as np
import tiktoken
import torch

from plumbing import checkpoint
from plumbing import files
import data
from plumbing import interrupts
from faults.damage import crash_at_every_call, damaged_files, disk_full, kill_storm
from faults.lab import (ROOT, STAGES, Lab, Result, Run, die_after_save, places, same_bits, same_run,
                    side_by_side, trace)
from faults.hostile import bad_lines, hostile_files, injections, typos, worst_strings

TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")


# ---------------------------------------------------------------------------- stops

def resume_anywhere(lab: Lab, steps: int = 30, stages: tuple[str, ...] = STAGES) -> Result:
    """Each stage in as many lives as it has steps, one step each: so every step is resumed at, and
    all but the first by a run that was itself resumed. Pre-training also goes from each step to the
    end in one life. Losses, weights and moments against those of one long life. Then 4 steps on one
    process, 4 on two, 4 on one: the same samples in the same order, losses to 1e-5. Seen to fail
    when the batch depended on the first step of the process, when the optimizer was not restored,
    and when ranks took their rows from a stream of their own."""
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
                lab.must("train_pt", lab.arguments(stage, copy, resume=True, max_steps=steps))
                good += same_run(copy, whole)
                total += 1
                shutil.rmtree(copy)
        return [good + same_run(out, whole), total + 1]

    good, total = map(sum, zip(*side_by_side([partial(lives, stage) for stage in stages])))
    order = [same_order(lab, stage) for stage in ("pt", "sft") if stage in stages]
    return (f"{good} of {total} runs ({len(stages)} stages x {steps} resumes in a row; pt from "
            f"each step to the end) equal to the last bit; order with 1, 2, 1 processes the same "
            f"in {sum(order)} of {len(order)}", good == total and all(order))


def same_order(lab: Lab, stage: str) -> bool:
    """4 steps on one process, 4 on two, 4 on one: are samples and losses those of 12 on one?"""
    def recording(to: Path, then=lambda: None):
        def before() -> None:
            real = data.Order.take

            def take(self, start, size):
                found = real(self, start, size)
                with open(to, "a") as f:
                    f.write(json.dumps([start, found]) + "\n")
                return found
            data.Order.take = take
            then()
        return before

    def taken(*files: Path) -> list[tuple[int, int]]:
        """(place in the stream, sample), sorted."""
        rows = [json.loads(line) for f in files for line in f.read_text().splitlines()]
        return sorted({(start + i, sample) for start, found in rows
                       for i, sample in enumerate(found)})

    one, torn = lab.new("order"), lab.new("order")
    notes = [lab.new("note") for _ in range(4)]
    lab.start(stage, one, recording(notes[0]), max_steps=12).wait()
    lab.start(stage, torn, recording(notes[1], die_after_save(4)), max_steps=12).wait()
    ranks = two_ranks(lab, stage, torn, recording(notes[2], die_after_save(8)), resume=True,
                      max_steps=12)
    codes = [run.wait() for run in ranks]
    lab.start(stage, torn, recording(notes[3]), resume=True, max_steps=12).wait()
    a, b = ([float.fromhex(x) for _, x in trace(out)] for out in (one, torn))
    return (codes == [-9, 6] and len(a) == len(b) == 12 and taken(notes[0]) == taken(*notes[1:])
            and bool(np.allclose(a, b, rtol=1e-5)))


def two_ranks(lab: Lab, stage: str, out: Path, before=lambda: None, **changes) -> list[Run]:
    """A run on two gloo processes, forked instead of started by torchrun."""
    return [lab.start(stage, out, before, place, **changes) for place in places(2)]


def signals(lab: Lab, moments: int = 20) -> Result:
    """SIGTERM and SIGINT, in turn, at random moments of each stage: a third of them while Python
    still imports torch (a process of its own), a sixth in the middle of a save, the others anywhere
    between the first instruction of main() and the end. The exit code must be 0 without a
    traceback, within 2 s, and --resume must give the run that nothing disturbed. Seen to fail
    without interrupts.py (exit code -15), and when the handler raised instead of setting a flag."""
    r, good, slowest = Random(2), 0, 0.0
    whole = {stage: lab.whole(stage, max_steps=8) for stage in STAGES}
    for i in range(moments):
        stage, number = STAGES[i % 5], (signal.SIGTERM, signal.SIGINT)[i // 5 % 2]
        out, (expected, seconds) = lab.new("signal"), whole[stage]
        settings = dict(max_steps=8, resume=True, save_every=3)
        if i % 3 == 0:
            code, text, took = signal_while_importing(lab, stage, out, settings, number, r)
        else:
            run = lab.start(stage, out, interrupts.end_quietly, **settings)
            if i % 6 == 1:
                while not list(out.glob(".tmp-*")) and not run.ends(0.0002):
                    pass
            else:
                run.ends(r.uniform(0.01, seconds))
            start = time.perf_counter()
            run.send(number)
            code, text, took = run.wait(), run.text, time.perf_counter() - start
        slowest = max(slowest, took)
        lab.start(stage, out, **settings).wait()
        good += code == 0 and "Traceback" not in text and same_run(out, expected)
    return (f"{good} of {moments} exit with 0 and go on to the last bit; the slowest took "
            f"{slowest:.1f} s", good == moments and slowest <= 2)


def signal_while_importing(lab: Lab, stage: str, out: Path, settings: dict, number: int,
                           r: Random) -> tuple[int, str, float]:
    """Exit code, output and seconds of a script that gets the signal before it has begun."""
    process = subprocess.Popen(
        [sys.executable, f"train_{stage}.py", *lab.arguments(stage, out, **settings)], cwd=ROOT,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    caught = 0  # before the script's first line Python itself has no handler for SIGTERM
    while not caught >> (signal.SIGTERM - 1) & 1:
        status = Path(f"/proc/{process.pid}/status").read_text()
        caught = int(re.search(r"SigCgt:\s*(\w+)", status)[1], 16)
    time.sleep(r.uniform(0, 0.9))
    start = time.perf_counter()
    process.send_signal(number)
    text = process.communicate(timeout=60)[0]
    return process.returncode, text, time.perf_counter() - start


# ---------------------------------------------------------------------------- processes

FAULT = """import os, sys, time
sys.path.insert(0, {root!r})
from plumbing import runtime
allows = runtime.GradientGuard.allows
def faulty(self, norm, step, *rest):
    if os.environ["RANK"] == "1" and step == 5:
        open({note!r}, "w").write(str(time.time()))
        {fault}
    return allows(self, norm, step, *rest)
runtime.GradientGuard.allows = faulty
import train_pt
train_pt.main()
"""


def ranks(lab: Lab, timeout: float = 4.0) -> Result:
    """Under torchrun with gloo, at step 5 rank 1 of 2 is killed, raises, or hangs (sleeps for ever,
    as on a dead network drive). From then until no process is left: 3 s, 3 s, dist_timeout + 2 s;
    and what is printed must say which rank failed and at which step. Seen to fail without
    end_if_hanging (torchrun waits 30 s more for the rank that hangs), and before messages named
    rank and step."""
    took, named = {}, {}
    for name, fault, wanted in (
            ("killed", "os.kill(os.getpid(), 9)", r"rank 0 of 2, step [56]: lost contact"),
            ("raises", "raise RuntimeError('deliberate')", r"rank 1 of 2, step 5: failed"),
            ("hangs", "time.sleep(1000)", r"rank 1 of 2, step 5: hangs")):
        note, script = lab.new("note"), lab.new("fault").with_suffix(".py")
        script.write_text(FAULT.format(root=str(ROOT), note=str(note), fault=fault))
        process = subprocess.run(
            [*TORCHRUN, script, *lab.arguments("pt", lab.new(), max_steps=5000, save_every=5000,
                                               dist_timeout=timeout)],
            cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=120,
            env=os.environ | {"OMP_NUM_THREADS": "1"})
        took[name] = time.time() - float(note.read_text())
        root_cause = re.search(r"Root Cause.*?rank +: (\d)", process.stdout, re.S)
        named[name] = (process.returncode != 0 and bool(re.search(wanted, process.stdout))
                       and bool(root_cause))
    good = (took["killed"] <= 3 and took["raises"] <= 3 and took["hangs"] <= timeout + 2
            and all(named.values()))
    return (", ".join(f"{name} {seconds:.1f} s" for name, seconds in took.items())
            + f" (timeout {timeout:.0f} s); rank and step named in {sum(named.values())} of 3",
            good)


def children(parent: int) -> dict[str, int]:
    """{rank: pid} of the workers of a torchrun."""
    found = {}
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if int((entry / "stat").read_text().rpartition(")")[2].split()[1]) == parent:
                for word in (entry / "environ").read_bytes().split(b"\0"):
                    if word.startswith(b"RANK="):
                        found[word[5:].decode()] = int(entry.name)
    return found


def restarts(lab: Lab, kills: int = 3) -> Result:
    """torchrun --max-restarts: rank 1 of 2 is killed, each time after a few more steps; torchrun
    starts both again, they resume from the newest valid checkpoint. The losses must be those of two
    processes that nobody disturbed, to the last bit. Seen to fail without the prefix of the store
    (the new processes wait for the dead), and when the step was not taken from the checkpoint."""
    steps = 6 * kills + 12
    whole, out = lab.new("two"), lab.new("restarted")
    for run in two_ranks(lab, "pt", whole, max_steps=steps):
        run.wait()
    process = subprocess.Popen(
        [*TORCHRUN, f"--max-restarts={kills}", "train_pt.py",
         *lab.arguments("pt", out, max_steps=steps, resume=True)], cwd=ROOT,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        env=os.environ | {"OMP_NUM_THREADS": "1"})
    killed: list[int] = []
    log, start = out / "log.jsonl", time.time()
    while len(killed) < kills and process.poll() is None and time.time() - start < 120:
        time.sleep(0.01)
        pid = children(process.pid).get("1")
        lines = log.read_text().count("\n") if log.exists() else 0
        if pid and pid not in killed and lines > 6 * len(killed) + 3:
            os.kill(pid, signal.SIGKILL)
            killed.append(pid)
    try:
        code = process.wait(60)
    except subprocess.TimeoutExpired:
        process.terminate()  # and its workers
        code = process.wait()
    good = code == 0 and len(killed) == kills and same_run(out, whole)
    equal = "equal" if good else "NOT equal"
    return f"{len(killed)} kills, exit code {code}, the trace is {equal}", good


# ---------------------------------------------------------------------------- numbers

def poisoned(kind: str, steps: range):
    """For Lab.start: at these steps the loss, one gradient, or (behind the guard) one weight is not
    finite."""
    def before() -> None:
        calls = iter(range(10**6))
        clip, backward, now = torch.nn.utils.clip_grad_norm_, torch.Tensor.backward, [0]

        def count_and_clip(parameters, most):
            parameters = list(parameters)
            step = now[0] = next(calls)
            learnt = [p for p in parameters if p.grad is not None]
            if step in steps and kind in ("nan", "inf"):
                learnt[-1].grad.view(-1)[0] = float(kind)
            norm = clip(parameters, most)
            if step in steps and kind == "weight":
                learnt[-1].data.view(-1)[0] = float("nan")
            now[0] = step + 1
            return norm

        def count_and_go_back(self, *args, **more):
            if now[0] in steps and kind == "loss":
                self = self * float("nan")
            return backward(self, *args, **more)
        torch.nn.utils.clip_grad_norm_ = count_and_clip
        torch.Tensor.backward = count_and_go_back
    return before


def not_finite(lab: Lab, stages: tuple[str, ...] = STAGES) -> Result:
    """At step 2 of each stage the loss is NaN, or one number of one gradient is NaN or infinite:
    weights and moments at step 3 must be those of step 2, bit for bit (and those of an undisturbed
    run are not). From step 2 on, or with a weight that is NaN: exit code 4, and the checkpoint it
    names is whole and finite. Seen to fail when the guard looked at the loss instead of the norm,
    when it let the optimizer step, and when the message named the folder only."""
    def both(out: Path) -> list[dict]:
        checkpoint._known_good.clear()
        return [checkpoint.load(p)[0] for p in checkpoint.list_checkpoints(out)[:2]]

    def still(out: Path) -> bool:
        new, old = both(out)
        for state in (new, old):  # a reward model notes, at its end, how its scores are spread
            state["model"].pop("mean", None), state["model"].pop("std", None)
        return (new["step"], old["step"]) == (3, 2) and same_bits(new["model"], old["model"]) and (
            same_bits([o["state"] for o in new["optimizer"]],
                      [o["state"] for o in old["optimizer"]]))

    def inject(stage: str) -> list[int]:
        good = total = 0
        moves = not still(lab.whole(stage, max_steps=3)[0])
        for kind in ("loss", "nan", "inf"):
            out = lab.new("nan")
            run = lab.start(stage, out, poisoned(kind, range(2, 3)), max_steps=3)
            good += run.wait() == 0 and "skipped 1/3" in run.text and moves and still(out)
            total += 1
        for kind in ("nan", "weight"):
            out = lab.new("nan")
            run = lab.start(stage, out, poisoned(kind, range(2, 99)), max_steps=20)
            code = run.wait()
            name = re.search(r"the last good checkpoint: (\S+\.pt)", run.text)
            good += bool(code == 4 and name and "Traceback" not in run.text
                         and checkpoint.damage(Path(name[1])) is None
                         and all(torch.isfinite(t).all()
                                 for t in checkpoint.load(name[1])[0]["model"].values()))
            total += 1
        return [good, total]

    good, total = map(sum, zip(*side_by_side([partial(inject, stage) for stage in stages])))
    return f"{good} of {total} injections in {len(stages)} stages", good == total


# ---------------------------------------------------------------------------- the board

ROWS = [
    (kill_storm, "SIGKILL storm on the five training scripts",
     "300 kills, 0 corrupt checkpoints, 0 differing bits"),
    (crash_at_every_call, "crash at every I/O call: checkpoint, token shards, rows, index",
     "all calls, 0 bad states"),
    (damaged_files, "damaged files detected and named", "1,500 of 1,500"),
    (disk_full, "full disk (file size limit, tmpfs)", "100 %, 0 temporary files"),
    (resume_anywhere, "resume at every step of 30; 1, 2, 1 processes", "all equal"),
    (signals, "SIGTERM or SIGINT at random moments, imports and saves too",
     "20 of 20, each within 2 s"),
    (ranks, "a rank is killed, raises, hangs: all gone, rank and step named",
     "3 s, 3 s, timeout + 2 s"),
    (restarts, "torchrun --max-restarts=3", "3 of 3, trace equal"),
    (not_finite, "NaN and infinity: weights unchanged; a streak stops", "100 %"),
    (bad_lines, "bad JSONL lines located", "12 of 12 kinds, 0 good lines lost"),
    (typos, "misspelt settings refused; suggestion right", "100 %; 98 %"),
    (hostile_files, "hostile model files refused", "30 of 30, below 200 MB and 1 s each"),
    (injections, "special tokens typed by users", "0 of 5,000"),
    (worst_strings, "worst strings for the tokenizer", "below 2 s per MB"),
]


def machine() -> str:
    cpu = next((line.partition(":")[2].strip() for line in open("/proc/cpuinfo")
                if line.startswith("model name")), platform.processor())
    return f"{os.cpu_count()} cores of {cpu}, {platform.system()} {platform.release()}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0],
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=300, help="of the SIGKILL storm")
    parser.add_argument("--only", default="", help="rows, comma-separated: "
                        + ", ".join(row.__name__ for row, *_ in ROWS))
    parser.add_argument("--out", default="docs/reliability.md", help="report; empty: none")
    args = parser.parse_args()
    wanted = args.only.split(",") if args.only else [row.__name__ for row, *_ in ROWS]
    begin, passed = time.time(), 0
    board = old_rows(args.out)
    print(HEAD, flush=True)
    with tempfile.TemporaryDirectory() as folder:
        lab = Lab(Path(folder))
        for i, (row, what, target) in enumerate(ROWS, 1):
            if row.__name__ not in wanted:
                continue
            start = time.time()
            measured, good = row(lab, args.kills) if row is kill_storm else row(lab)
            passed += good
            board[i] = (f"| {i} | {what} | {target} | {measured} | {date.today()}, "
                        f"{time.time() - start:.0f} s | {'yes' if good else '**NO**'} |")
            print(board[i], flush=True)
            if args.out:  # behind each row: what is known is not lost if this is stopped
                write_report(args.out, board)
    print(f"{passed} of {len(wanted)} rows passed in {time.time() - begin:.0f} s")
    raise SystemExit(passed < len(wanted))


HEAD = "| # | what | target | measured | on, took | passed |\n|---|---|---|---|---|---|"


def old_rows(path: str) -> dict[int, str]:
    """The rows of an earlier report, which stay until they are run again."""
    text = Path(path).read_text() if path and Path(path).exists() else ""
    return {int(line.split()[1]): line for line in text.splitlines() if re.match(r"\| \d+ ", line)}


def write_report(path: str, board: dict[int, str]) -> None:
    head = (f"# Faults survived\n\nWritten by `make reliability`, or row by row by `python "
            f"-m faults --only=ROW` (the function's name), on {machine()}; Python "
            f"{platform.python_version()}, torch {torch.__version__}, numpy {np.__version__}, "
            f"tiktoken {tiktoken.__version__}.\nWhat each row does, and with which deliberate "
            "break it was seen to fail, stands in its function\nin `faults/`. "
            "Times depend on what else the machine does.\n")
    files.write_text(path, "\n".join([head, HEAD, *(board[i] for i in sorted(board)), ""]))


if __name__ == "__main__":
    main()

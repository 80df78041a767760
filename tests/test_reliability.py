"""Rows of docs/reliability.md about processes that are killed, stopped, lost or fed with NaN, and
the board itself. `python -m faults` runs the rows in full, `make test` with smaller numbers."""
import ast
import os
import re
import shutil
import signal
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from random import Random

import pytest
import torch
from lab import (ROOT, STAGES, Child, break_rank, damaged, die_after_save, instead, newest, places,
                 same_bits, same_run, side_by_side)

from faults import __main__ as board
from plumbing import checkpoint, runtime, terminal

TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forks and kills as Linux does")


def test_kill_storm(lab, full, measured):
    """SIGKILL at random moments from the first instruction of main() on, each life resuming where
    the last one was shot, until the run ends; then the next of the five stages. After each kill
    every checkpoint is read back; at the end losses, weights and moments are compared bit by bit
    with a run that nothing disturbed. Seen to fail when checkpoint.save wrote in place, and when
    the optimizer was not restored."""
    kills = int(os.environ["KILLS"]) if full else 15

    def storm(stage: str) -> list[int]:
        """Kills, runs, corrupt checkpoints, runs that differ."""
        r, done, runs, corrupt, differ = Random(stage), 0, 0, 0, 0
        expected, seconds = lab.whole(stage, max_steps=12)
        while done < kills / len(STAGES):
            out, patience = lab.new("storm"), 0.4 * seconds
            while True:
                run = lab.start(stage, out, resume=True, max_steps=12)
                if run.ends(r.uniform(0.002, patience)):
                    break
                run.send(signal.SIGKILL)
                run.wait()
                done += 1
                patience *= 1.02  # a run must end some time, even on a busy machine
                corrupt += len(damaged(out))
            differ += run.code != 0 or not same_run(out, expected)
            runs += 1
            shutil.rmtree(out)
        return [done, runs, corrupt, differ]

    found = side_by_side([partial(storm, stage) for stage in STAGES])
    done, runs, corrupt, differ = map(sum, zip(*found))
    measured(f"{done:,} kills in {runs:,} runs: {corrupt} corrupt checkpoints, {differ} runs that "
             "differ by a bit", not corrupt and not differ)


def test_resume_anywhere(lab, full, measured):
    """Each stage in as many lives as it has steps, one step each: so every step is resumed at, and
    all but the first by a run that was itself resumed. Pre-training also goes from each step to the
    end in one life. Losses, weights and moments against those of one long life. Seen to fail when
    the batch depended on the first step of the process, and when the optimizer was not restored."""
    steps, stages = (30, STAGES) if full else (4, ("pt", "dpo"))

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
    measured(f"{good} of {total} runs ({len(stages)} stages x {steps} resumes in a row; pt from "
             "each step to the end) equal to the last bit", good == total)


def test_signals(lab, full, measured):
    """SIGTERM and SIGINT, in turn, at random moments of each stage: a third of them while Python
    still imports torch (a process of its own), a sixth in the middle of a save, the others anywhere
    between the first instruction of main() and the end. The exit code must be 0 without a
    traceback, within 2 s, and --resume must give the run that nothing disturbed. Seen to fail
    without `end_quietly` (exit code -15), and when the handler raised instead of setting a flag."""
    def hears_sigterm(pid: int) -> bool:
        caught = Path(f"/proc/{pid}/status").read_text().split("SigCgt:")[1].split()[0]
        return bool(int(caught, 16) >> (signal.SIGTERM - 1) & 1)

    r, good, slowest, moments = Random(2), 0, 0.0, 20 if full else 4
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
    measured(f"{good} of {moments} exit with 0 and go on to the last bit; the slowest took "
             f"{slowest:.1f} s", good == moments and slowest <= 2)


FAULTY = """import sys
from pathlib import Path
sys.path[:0] = [{root!r}, {root!r} + "/tests"]
import train_pt
from lab import break_rank
break_rank({how!r}, 5, Path({note!r}))()
train_pt.main()
"""


@pytest.mark.slow
def test_ranks(lab, measured):
    """Under torchrun with gloo, at step 5 rank 1 of 2 is killed, raises, or hangs. From then until
    no process is left it may take 3 s, 3 s, dist_timeout + 2 s, and what is printed must say which
    rank failed and at which step. Seen to fail without end_if_hanging (torchrun waits 30 s more for
    the rank that hangs), and before messages named rank and step."""
    took, named, timeout = {}, 0, 4.0
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
    measured(", ".join(f"{how} {seconds:.1f} s" for how, seconds in took.items())
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


def test_not_finite(lab, full, measured):
    """At step 2 of each stage the loss is NaN, or one number of one gradient is NaN or infinite.
    Weights and moments at step 3 must be those of step 2, bit for bit (and those of an undisturbed
    run are not). If that lasts from step 2 on, or a weight is NaN: exit code 4, and the checkpoint
    that is named is whole and finite. Seen to fail when the guard looked at the loss instead of the
    norm, when it let the optimizer step, and when the message named the folder only."""
    stages = STAGES if full else ("sft", "rm")

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
    measured(f"{good} of {total} injections in {len(stages)} stages", good == total)


@pytest.mark.parametrize("how, line", [
    ("killed", "rank 0 of 2, step [23]: lost contact with another process"),
    ("raises", "rank 1 of 2, step 2: failed, see the traceback"),
    ("hangs", "rank 1 of 2, step 2: hangs for")])
def test_all_ranks_end_and_say_which_and_where(lab, how, line):
    """Without torchrun, which only adds the time to import torch twice. Seen to fail without
    end_if_hanging, and before messages named rank and step."""
    out, note = lab.new(), lab.new()
    ranks = [lab.start("pt", out, break_rank(how, 2, note), environ=place, dist_timeout=1.5,
                       max_steps=2000, save_every=2000) for place in places(2)]
    codes, said = [run.wait(30) for run in ranks], "".join(run.text for run in ranks)
    assert re.search(line, said) and codes[0] == 6, said[-2000:]
    assert codes[1] == (-9 if how == "killed" else 1)


def test_a_restarted_group_does_not_wait_for_the_dead(lab):
    """The second attempt of torchrun finds the same store: seen to hang without the prefix."""
    import torch.distributed as dist

    from plumbing.runtime import setup
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)

    def attempt(n: int, rank: int) -> list:
        os.environ.update(RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2",
                          MASTER_ADDR="127.0.0.1", MASTER_PORT=str(store.port),
                          TORCHELASTIC_RESTART_COUNT=str(n), TORCHELASTIC_USE_AGENT_STORE="True")
        setup("cpu", timeout=10)
        return [rank]  # and dies without a word to the other
    for n in (0, 1):
        assert side_by_side([partial(attempt, n, rank) for rank in (0, 1)]) == [[0], [1]]


def test_a_run_killed_after_a_save_has_that_checkpoint(lab):
    """The other tool: what the kills rest on."""
    out = lab.new()
    assert lab.start("pt", out, die_after_save(2), max_steps=6).wait() == -signal.SIGKILL
    assert newest(out)["step"] == 2 and not damaged(out)
    (path,) = list(out.glob("step00000002-*"))
    path.write_bytes(path.read_bytes()[:-1])
    assert damaged(out) == [path] and newest(out)["step"] == 1


def test_the_board_and_its_report_have_every_row():
    """As make reliability wrote it: all rows, and none that failed."""
    report = (ROOT / "docs/reliability.md").read_text()
    lines = [line for line in report.splitlines() if line.startswith("| ") and line[2].isdigit()]
    assert len(lines) == len(board.ROWS) == 15
    assert all(line.endswith("| yes |") for line in lines)
    for row, line in zip(board.ROWS, lines):
        assert f"| {row.what} | {row.target} |" in line
        for story in docstrings(row.file, row.words):
            assert "Seen to fail" in re.sub(r"\s+", " ", story), row.name


def docstrings(file: str, words: str) -> list[str]:
    """Of the tests in a file whose names hold these words."""
    tree = ast.parse((ROOT / "tests" / file).read_text(encoding="utf-8"))
    found = [ast.get_docstring(f) or "" for f in tree.body
             if any(word in getattr(f, "name", "") for word in words.split(" or "))]
    assert found
    return found


@pytest.mark.parametrize("body, good, told", [
    ("pass", True, "test_it.py -k it: 1 passed"),
    ("print('\\nmeasured: 3 of 3')", True, "3 of 3"),
    ("assert False", False, "test_it.py -k it: 1 failed"),
    ("pytest.skip('here not')", False, "test_it.py -k it: 1 skipped")])
def test_a_row_passes_only_if_its_tests_do(tmp_path, body, good, told, monkeypatch):
    """A test that is skipped proves nothing."""
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests/test_it.py").write_text(f"import pytest\ndef test_it(): {body}\n")
    monkeypatch.setattr(board, "ROOT", tmp_path)
    assert board.measure("test_it.py", "it", 1) == (told, good)

"""The rows of docs/reliability.md with smaller numbers. The function of a row, in faults/, says
what it does and with which deliberate break it was seen to fail."""
import ast
import os
import re
import signal
import sys
from functools import partial
from pathlib import Path

import pytest

from faults import __main__ as reliability
from faults.__main__ import ROWS, break_rank, by_test
from faults.lab import crash_everywhere, damaged, die_after_save, newest, places, side_by_side

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forks and kills as Linux does")


@pytest.mark.parametrize("row, more", [
    (reliability.kill_storm, dict(kills=15)),
    (reliability.crash_at_every_call, dict(every=7)),
    (reliability.damaged_files, dict(n=120)),
    (reliability.disk_full, dict(shares=(0.5,), stages=("pt", "rl"))),
    (reliability.resume_anywhere, dict(steps=4, stages=("pt", "dpo"))),
    (reliability.signals, dict(moments=4)),
    (reliability.not_finite, dict(stages=("sft", "rm"))),
    (reliability.hostile_files, {}),
], ids=lambda x: getattr(x, "__name__", ""))
def test_row(lab, row, more):
    measured, passed = row(lab, **more)
    assert passed, measured


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


def test_an_operation_that_is_not_atomic_is_found_out(tmp_path):
    """The tool itself: writing in place leaves bad states, writing aside and renaming does not."""
    path = tmp_path / "x"

    def in_place() -> None:
        path.write_text("new" * 1000)

    def aside() -> None:
        (tmp_path / "y").write_text("new" * 1000)
        os.replace(tmp_path / "y", path)

    def reset() -> None:
        path.write_text("old")

    def right() -> bool:
        return path.read_text() in ("old", "new" * 1000)
    assert crash_everywhere(in_place, right, reset)[1] > 0
    crashes, bad = crash_everywhere(aside, right, reset)
    assert crashes >= 8 and bad == 0


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
    report = (Path(reliability.ROOT) / "docs/reliability.md").read_text()
    rows = [line for line in report.splitlines() if line.startswith("| ") and line[2].isdigit()]
    assert len(rows) == len(ROWS) == 15 and all(line.endswith("| yes |") for line in rows)
    for (row, what, target), line in zip(ROWS, rows):
        assert f"| {what} | {target} |" in line
        for story in [row.__doc__] if row.__doc__ else docstrings(*row.test):
            assert "Seen to fail" in re.sub(r"\s+", " ", story), row.__name__


def docstrings(file: str, words: str) -> list[str]:
    """Of the tests in a file whose names hold these words."""
    tree = ast.parse((Path(reliability.ROOT) / "tests" / file).read_text(encoding="utf-8"))
    found = [ast.get_docstring(f) or "" for f in tree.body
             if any(word in getattr(f, "name", "") for word in words.split(" or "))]
    assert found
    return found


@pytest.mark.parametrize("body, good", [("pass", True), ("assert False", False),
                                        ("pytest.skip('here not')", False)])
def test_a_row_by_test_passes_only_if_it_does(lab, body, good, monkeypatch):
    """A test that is skipped proves nothing."""
    (lab.folder / "tests").mkdir(exist_ok=True)
    (lab.folder / "tests/test_it.py").write_text(f"import pytest\ndef test_it(): {body}\n")
    monkeypatch.setattr("faults.lab.ROOT", lab.folder)
    measured, passed = by_test("it", "test_it.py", "it")(lab)
    assert passed == good and measured.startswith("test_it.py -k it: 1 ")

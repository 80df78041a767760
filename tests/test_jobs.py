"""Work on several processes: in order, none waited for in vain; and a line that says how far."""
import os
import re
import signal
import time

import pytest

from plumbing.jobs import Progress, parallel


def double(x):
    time.sleep(0.002 * (x % 3))
    if x == 1_000:
        os.kill(os.getpid(), signal.SIGKILL)
    if x == 2_000:
        raise ValueError("file:7:1: wrong")
    return 2 * x


@pytest.mark.parametrize("workers", [1, 3])
def test_results_come_in_order_and_little_is_read_ahead(workers):
    read = []
    results = parallel(double, (read.append(x) or x for x in range(60)), workers)
    for done, result in enumerate(results):
        assert result == 2 * done and len(read) <= done + 2 * workers
    assert len(read) == 60


@pytest.mark.parametrize("last, message", [(1_000, "a worker process was killed"),
                                           (2_000, "^file:7:1: wrong$")])
def test_a_worker_that_dies_or_fails_ends_the_run(last, message):
    """multiprocessing.Pool waits for ever for the result of a process that was killed."""
    with pytest.raises(ValueError, match=message):
        list(parallel(double, [1, 2, last, *range(100)], 2))


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_never_sticks_to_the_next_line(monkeypatch, capsys, terminal):
    monkeypatch.setattr("sys.stdout.isatty", lambda: terminal, raising=False)
    now = iter(range(100))
    monkeypatch.setattr(time, "monotonic", lambda: next(now))
    progress = Progress()
    for i in range(20):
        progress.show(f"{i} of 20")
    progress.end()
    progress.end()
    out = capsys.readouterr().out
    assert out.endswith("\n") and "\n\n" not in out
    assert out.count("\r") == (20 if terminal else 0)
    assert terminal or re.fullmatch(r"(\d+ of 20\n){2,7}", out)

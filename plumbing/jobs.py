"""
Work spread over processes, its results in order, and a line of progress; the rest may be skipped.

    for result in parallel(work, batches, workers):      # as map(work, batches)
        progress.show("12 of 40")
"""
import os
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import parent_process
from threading import Thread
from typing import Any, TextIO


class Progress:
    """One line that says how far it is: rewritten on a terminal, a new one every 5 s elsewhere."""

    def __init__(self, to: TextIO | None = None) -> None:
        self.to, self.shown, self.open = to or sys.stdout, time.monotonic(), False

    def show(self, text: str) -> None:
        terminal = self.to.isatty()
        if time.monotonic() - self.shown >= (0.1 if terminal else 5):
            print(f"\r\033[K{text}" if terminal else text, end="" if terminal else "\n",
                  flush=True, file=self.to)
            self.shown, self.open = time.monotonic(), terminal

    def end(self) -> None:
        """What is printed next, a result or an error, starts on a line of its own."""
        if self.open:
            print(flush=True, file=self.to)
        self.open = False


def parallel(work: Callable[[Any], Any], batches: Iterable, workers: int) -> Iterator:
    """map(work, batches) in order on `workers` processes (0: one per core), with no more than two
    batches per process in memory. Raises ValueError when a process dies."""
    workers = min(workers or os.cpu_count() or 1, 61)  # Windows allows no more
    if workers == 1:
        yield from map(work, batches)
        return
    pool = ProcessPoolExecutor(workers, initializer=_start_worker)
    waiting: deque = deque()
    try:
        for batch in batches:
            with no_interrupt():  # it may start a worker, which must not hear one
                waiting.append(pool.submit(work, batch))
            if len(waiting) == 2 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool:
        raise ValueError("a worker process was killed, perhaps because memory ran out; the same "
                         "command with fewer --workers needs less") from None
    finally:
        pool.shutdown(cancel_futures=True)


@contextmanager
def no_interrupt() -> Iterator[None]:
    """Ctrl-C waits until the block has ended; on Windows it does not."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _start_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends its workers

    def follow() -> None:  # a worker would wait for ever for the next batch of a killed parent
        if parent := parent_process():
            parent.join()
        os._exit(1)

    Thread(target=follow, daemon=True).start()

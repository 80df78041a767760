"""
Timing on a machine that does other things too.

The contenders of a job take turns (A B A B …) in one process. A sample is work repeated for
`sample_s` seconds. One during which other processes used more than `max_foreign` of a core is
thrown away and counted. Figures are medians; "x" is calls per second relative to the first.
"""
import json
import os
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

from plumbing.terminal import fail


def chosen(only: str, jobs: dict[str, Any]) -> Iterator[Any]:
    """The jobs that --only names, with commas between."""
    if unknown := set(only.split(",")) - set(jobs):
        fail(f"--only={only}: there is no {', '.join(unknown)} among {', '.join(jobs)}")
    return map(jobs.__getitem__, only.split(","))


def figure(job: str, name: str, value: float, unit: str, **notes: float | str) -> None:
    """Print a figure as a line of a table and as a line of JSON, which knows no nan."""
    shown = (f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in notes.items())
    number = f"{value:.4g}" if value < 10 else f"{value:,.1f}"
    print(f"{job:<7} {name:<30} {number:>12} {unit:<8}", *shown, sep=" | ")
    row = {"job": job, "name": name, "value": value, "unit": unit, **notes}
    print(json.dumps({k: None if v != v else v for k, v in row.items()}), flush=True)


def used_by_others() -> float:
    """CPU seconds used so far by all processes but this one and its children that have ended; 0
    where there is no /proc/stat: then every sample is good."""
    try:
        with open("/proc/stat") as f:
            user, nice, system, _, _, irq, softirq, steal = map(int, f.readline().split()[1:9])
    except OSError:
        return 0.0
    ticks = user + nice + system + irq + softirq + steal  # all but idle and iowait
    return ticks / os.sysconf("SC_CLK_TCK") - sum(os.times()[:4])


class Race:
    """Contenders that take turns until each has enough good samples, or four times as many were
    taken. `seconds[name]` is the median for one call, nan if no sample was good. Of the settings
    it reads `repeats`, `sample_s` and `max_foreign`."""

    def __init__(self, job: str, contenders: dict[str, Callable[[], object]], cfg):
        self.job, self.rejected = job, dict.fromkeys(contenders, 0)
        self.good: dict[str, list[float]] = {name: [] for name in contenders}
        for work in contenders.values():
            work()  # compiles, fills caches
        for _ in range(4 * cfg.repeats):
            for name, work in contenders.items():
                before, start, calls, elapsed = used_by_others(), time.perf_counter(), 0, 0.0
                while not calls or elapsed < cfg.sample_s:
                    work()
                    calls, elapsed = calls + 1, time.perf_counter() - start
                quiet = used_by_others() - before <= cfg.max_foreign * elapsed
                self.good[name] += [elapsed / calls] * quiet
                self.rejected[name] += not quiet
            if min(map(len, self.good.values())) >= cfg.repeats:
                break
        self.seconds = {k: float(np.median(v)) if v else torch.nan for k, v in self.good.items()}

    def speed(self, name: str, amount: float, unit: str, **notes: float) -> None:
        """`row` of how much of something a call does in a second."""
        self.row(name, amount / self.seconds[name], unit, **notes)

    def row(self, name: str, value: float, unit: str, **notes: float) -> None:
        """Print one figure."""
        figure(self.job, name, value, unit, **notes,
               x=next(iter(self.seconds.values())) / self.seconds[name],
               samples=len(self.good[name]), rejected=self.rejected[name])

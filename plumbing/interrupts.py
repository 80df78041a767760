"""
A stop that comes before a run has begun: SIGTERM or Ctrl-C during the imports or the reading of
data. Nothing is lost then, so the process ends at once with exit code 0, and without a traceback.

    if __name__ == "__main__":
        interrupts.end_quietly()        # before `import torch`, which takes seconds

When the loop begins, `runtime.StopSignals` takes over: from then on a signal saves first.
"""
import os
import signal
from types import FrameType


def end_quietly() -> None:
    """From now on SIGTERM and SIGINT end the process with exit code 0 and one line."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _leave)


def _leave(number: int, frame: FrameType | None) -> None:
    # not sys.exit: raised inside an import or a callback it could be swallowed, and the run go on
    os.write(2, f"stopped by {signal.Signals(number).name} before the first step: nothing is lost, "
                "the same command starts again\n".encode())
    os._exit(0)

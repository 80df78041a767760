"""
Lets Ctrl-C end a script quietly while torch is still being imported. The rest may be skipped.

    from plumbing import interrupts
    interrupts.end_quietly(__name__)        # before `import torch`, which takes seconds

Nothing is lost before the first step, so SIGTERM or Ctrl-C then ends the process at once, with exit
code 0 and one line instead of a traceback. When the loop begins, `runtime.StopSignals` takes over:
from then on a signal saves a checkpoint first.
"""
import os
import signal
from contextlib import suppress
from types import FrameType


def end_quietly(name: str = "__main__") -> None:
    """From now on SIGTERM and SIGINT end the process, if `name` says that it runs as a script."""
    if name == "__main__":
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, _leave)


def _leave(number: int, frame: FrameType | None) -> None:
    with suppress(OSError):  # whoever reads stderr may be gone
        os.write(2, f"stopped by {signal.Signals(number).name} before the first step: nothing is "
                    "lost, the same command starts again\n".encode())
    os._exit(0)  # not sys.exit: an import or a callback could swallow it, and the run would go on

"""
What surrounds a training loop: settings, processes, signals, errors. The rest may be skipped.

    dist = setup()                                  # with torchrun or without
    total, = all_sum(dist, loss)                    # over all processes

Processes on GPUs exchange tensors by NCCL, those on CPUs by gloo.
"""
import errno
import faulthandler
import math
import os
import signal
import sys
import time
import timeit
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from threading import Thread
from typing import Any, Literal

import torch
import torch.distributed
from torch.distributed.elastic.multiprocessing.errors import record

from configurator import Count, FilePath, Natural, NotNegative, Positive, Share
from plumbing.terminal import Talk, fail


@dataclass(frozen=True)
class Settings:
    """What every training script can be told; its own Config adds to it and may change defaults."""
    init_from: FilePath = ""  # checkpoint to start from: a file, or a folder's newest
    out_dir: FilePath = "out/run"  # checkpoints and log.jsonl go here
    resume: bool = False  # continue from the newest valid checkpoint in out_dir
    batch_size: Count = 8  # rows that a process puts through the model at once
    optimizer: Literal["adamw", "muon"] = "adamw"  # muon: for the blocks' matrices, AdamW elsewhere
    learning_rate: Positive = 1e-5  # of AdamW
    muon_lr: Positive = 0.02  # of Muon: length of a step, relative to an orthogonal matrix
    schedule: Literal["cosine", "wsd"] = "cosine"  # wsd: warm-up, stable, decay
    warmup_steps: Natural = 5  # steps of linear warm-up
    final_lr: Share = 0.1  # learning rate at the end, as a share of the full one
    decay_fraction: Share = 0.2  # wsd: share of the steps in which the rate decays
    weight_decay: NotNegative = 0.0  # of matrices
    adam_beta1: Share = 0.9  # AdamW: memory of the mean gradient
    adam_beta2: Share = 0.95  # AdamW: memory of its square
    grad_clip: Positive = 1.0  # largest norm of the gradient
    eval_every: Count = 100  # steps between validations
    save_every: Count = 100  # steps between checkpoints
    log_every: Count = 10  # steps between log lines
    seed: int = 0  # of everything random: first weights, order of the data, sampling
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"  # where to compute
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of products; auto: what is fast there
    shard: bool = False  # each process keeps a part of every matrix (FSDP2) instead of a copy (DDP)
    recompute: bool = False  # keep only a block's input and run the block again: saves memory
    dist_timeout: Positive = 120.0  # seconds of silence from another process that end the run


@dataclass(frozen=True)
class Dist:
    """Which process this is, and where and in what precision it computes."""
    rank: int
    world: int  # how many processes there are
    device: torch.device
    dtype: torch.dtype  # of activations; parameters stay fp32

    @property
    def meeting(self) -> torch.device:
        """Where tensors lie that processes exchange: for gloo on the CPU. (MPS has no float64.)"""
        return self.device if self.device.type == "cuda" else torch.device("cpu")

    def autocast(self) -> torch.autocast:
        """Where the products of a batch are computed. Who begins one does not hang."""
        RankState.heard = RankState.heard and time.monotonic()
        return torch.autocast(self.device.type, self.dtype, self.dtype != torch.float32)


@record  # lets torchrun name the process that failed first
def launch(job: Callable[[Any, Dist], None], cfg: Settings, trains: bool = True) -> None:
    """Run a stage, `job(cfg, dist)`, in this process and those that torchrun started with it. What
    a user can mend ends it in one line with an exit code: 2 for a mistake, 3 for a disk that is
    full, 4 for numbers that are not finite, 5 for too little memory, 6 for another process that is
    gone. Anything else is a bug and keeps its traceback. A process of several says its rank."""
    try:
        if os.path.isfile(cfg.out_dir):
            raise ValueError(f"--out_dir={cfg.out_dir} is a file, and must be a folder")
        dist = setup(cfg.device, cfg.dtype, cfg.dist_timeout)
        if trains and cfg.dtype == "auto" and dist.device.type == "cpu":  # scores stay in fp32
            dist = fast_dtype(dist)
        chosen: Any = str(dist.dtype).removeprefix("torch.")
        job(replace(cfg, dtype=chosen), dist)  # a checkpoint remembers it: --resume says a change
        finish(dist)
    except BrokenPipeError:
        raise  # nobody reads what is printed before the loop: `terminal.run` ends it quietly
    except Exception as error:
        if found := in_one_line(error, str(error), cfg.out_dir):
            fail(f"{who()}{found[1]}", found[0])
        if who():
            print(f"{who()}failed, see the traceback", file=sys.stderr, flush=True)
        raise


def fast_dtype(dist: Dist) -> Dist:
    """--dtype=auto on a CPU: bfloat16 if all processes multiply it clearly faster. (A model 64 wide
    has few products and loses a tenth by it: the configs of the demo ask for float32.)"""
    times = -all_max(dist, -multiplies_bf16())
    name = "bfloat16" if times > 1.3 else "float32"
    print0(f"--dtype=auto: {name}, because this CPU multiplies bfloat16 {times:.2g} times as fast "
           "as float32")
    return replace(dist, dtype=getattr(torch, name))


def multiplies_bf16() -> float:
    """How many times as fast as in fp32 this CPU multiplies in bf16: about 2 with AVX512-BF16 or
    AMX, 0.01 without. It takes milliseconds, and counts the best of several tries."""
    def seconds(kind: torch.dtype) -> float:
        a, b = torch.ones(512, 128, dtype=kind), torch.ones(128, 128, dtype=kind)
        return min(timeit.repeat(lambda: a @ b, number=1))
    return seconds(torch.float32) / seconds(torch.bfloat16)


def setup(device: str = "auto", dtype: str = "auto", timeout: float = 120) -> Dist:
    """Join the other processes if torchrun started us. A process that is silent for `timeout`
    seconds ends the run. Raises ValueError for a device or type that is not there."""
    rank, world, local = (int(os.environ.get(k, d)) for k, d in
                          (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    if device == "auto":
        device = ("cpu" if dtype in ("int8", "int4") else
                  "cuda" if torch.cuda.is_available() else
                  "mps" if torch.backends.mps.is_available() else "cpu")
    if device == "cuda":
        if not torch.cuda.is_available():
            raise ValueError("--device=cuda: no CUDA device here; try --device=cpu")
        device = f"cuda:{local}"
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
    if dtype == "auto":
        dtype = "bfloat16" if device.startswith("cuda") else "float32"
    if (int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)) > 0
            and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"):
        # a restarted process would read there where its dead predecessors listened
        raise ValueError("--max-restarts needs TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in the "
                         "environment of torchrun")
    if world > 1:
        backend = "nccl" if device.startswith("cuda") else "gloo"
        store, *_ = next(torch.distributed.rendezvous("env://", timeout=timedelta(seconds=timeout)))
        if world == int(os.environ.get("LOCAL_WORLD_SIZE", 0)):
            # torchrun keeps one store over --max-restarts: with the addresses of the dead in it the
            # next processes would wait for ever. (Several machines count restarts apart: there
            # TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 gives a new store each time.)
            attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
            store = torch.distributed.PrefixStore(f"attempt {attempt}", store)
        torch.distributed.init_process_group(backend, store=store, rank=rank, world_size=world,
                                             timeout=timedelta(seconds=timeout))
        Thread(target=end_if_hanging, args=(timeout,), daemon=True).start()
    RankState.program = of_process("VmRSS") if device == "cpu" else 0.0
    return Dist(rank, world, torch.device(device), getattr(torch, dtype))


class RankState:
    """Where this process is, for messages and for the watchdog."""
    step: int | str = "start"
    heard: float | None = None  # time.monotonic() of the last exchange with the other processes
    gap: float = 0.0  # longest time between two exchanges, in seconds
    program: float = 0.0  # bytes that Python, torch and the scripts took before there was a model


def of_process(key: str) -> float:
    """Bytes of this process in memory now (VmRSS) or at most (VmHWM). Without /proc it is always
    the most so far, and 0 on Windows. (On Linux getrusage would include whoever started us.)"""
    with suppress(OSError):
        status = Path("/proc/self/status").read_text()
        return 1024.0 * int(status.split(f"{key}:")[1].split()[0])
    with suppress(ImportError):
        import resource
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return 0.0


def who() -> str:
    """How a message of one process of several begins, "rank 1 of 2, step 37: "; else ""."""
    world = int(os.environ.get("WORLD_SIZE", 1))
    return f"rank {os.environ['RANK']} of {world}, step {RankState.step}: " if world > 1 else ""


def end_if_hanging(timeout: float) -> None:
    """A rank that never comes to the next exchange says where it is and ends itself, once the
    others have waited long enough and given up. (torchrun would wait for it another 30 s.)"""
    while True:
        time.sleep(0.1)
        since = time.monotonic() - (RankState.heard or math.inf)
        if since > timeout + 0.5 + 1.5 * RankState.gap:
            print(f"{who()}hangs for {since:.1f} s, here:", file=sys.stderr, flush=True)
            faulthandler.dump_traceback()
            os._exit(1)


def finish(dist: Dist) -> None:
    """Leave together: a rank that leaves early makes the others fail. Everything is saved by now,
    so a signal has nothing left to stop and must not change the exit code."""
    if dist.world > 1:
        torch.distributed.barrier()
        RankState.heard = None
        torch.distributed.destroy_process_group()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


@contextmanager
def first_rank_first(dist: Dist) -> Iterator[None]:
    """The others wait until rank 0 has done the work, which may take hours, and find it done."""
    if dist.world > 1:
        patient = torch.distributed.new_group(backend="gloo", timeout=timedelta(days=1))
    if dist.rank:
        torch.distributed.barrier(patient)
    yield
    if dist.world > 1 and not dist.rank:
        torch.distributed.barrier(patient)


def print0(*args) -> None:
    """Print, on rank 0 only. If nobody reads the output any more, the run continues in silence."""
    if int(os.environ.get("RANK", 0)) == 0:
        print(*args, file=Talk(sys.stdout, BrokenPipeError), flush=True)


def all_sum(dist: Dist, *values: float | torch.Tensor) -> list[float]:
    """Each value summed over the ranks, in one exchange."""
    total = torch.tensor([float(v) for v in values], dtype=torch.float64)
    if dist.world > 1:
        total = total.to(dist.meeting)
        torch.distributed.all_reduce(total)
        now = time.monotonic()
        RankState.gap, RankState.heard = max(RankState.gap, now - (RankState.heard or now)), now
    return total.tolist()


def all_max(dist: Dist, value: float) -> float:
    """The largest value of all ranks."""
    if dist.world == 1:
        return value
    found = torch.tensor(value, dtype=torch.float64).to(dist.meeting)
    torch.distributed.all_reduce(found, torch.distributed.ReduceOp.MAX)
    return float(found)


class StopSignals:
    """SIGTERM and SIGINT ask the loop to stop after the current step; a second one ends it at once.
    Messages are written past `print`, because the signal may come in the middle of one."""

    def __init__(self) -> None:
        self.name = ""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._ask)

    def _ask(self, number: int, frame) -> None:
        if self.name:
            self._say("ended by a second signal; --resume continues from the newest checkpoint")
            os._exit(128 + number)
        self.name = signal.Signals(number).name
        self._say(f"{self.name}: stops after this step; once more ends it at once")

    @staticmethod
    def _say(text: str) -> None:
        with suppress(OSError):  # whoever reads stderr may be gone; the checkpoint must be saved
            os.write(2, f"{who()}{text}\n".encode())

    def report(self, step: int) -> None:
        """Say at which step the run stopped, and how it continues."""
        print0(f"stopped by {self.name or 'a signal to another process'} at step {step:,}; the "
               "same command with --resume continues")


class GradientGuard:
    """Skips steps whose gradient is not finite; three in a row end the run. All ranks decide alike,
    because the norm is that of the averaged gradient."""
    limit, streak = 3, 0

    def allows(self, norm: float, step: int, loss: float, samples: str) -> bool:
        """Whether to take the step. Raises FloatingPointError at the limit."""
        self.streak = 0 if math.isfinite(norm) else self.streak + 1
        if self.streak:
            print0(f"step {step:,}: gradient not finite (loss {loss:.4f}, norm {norm}), {samples}, "
                   f"skipped {self.streak}/{self.limit}")
        if self.streak == self.limit:
            raise FloatingPointError(f"{self.limit} steps in a row had no finite gradient")
        return not self.streak


# how gloo and NCCL say that another process is gone or silent
LOST_CONTACT = ("Connection closed by peer", "Connection reset", "Timed out waiting", "Broken pipe",
                "Socket Timeout", "NCCL communicator was aborted", "Connection refused")
LESS_MEMORY = ("halve --batch_size (the update stays the same), then how long texts may be, then "
               "the model")
DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS)  # a disk is full or ill


def in_one_line(error: Exception, said: str, out_dir: str) -> tuple[int, str] | None:
    """Exit code and message, None for a bug."""
    match error:
        case ValueError():
            return 2, said
        case OSError() if out_dir in said:
            return 3, said
        case OSError() if error.errno in DISK:
            return 3, f"{out_dir}: {said}"
        case OSError():
            return 2, f"{error.filename}: {error.strerror}" if error.filename else said
        case FloatingPointError():
            # newest by name: the steps have leading zeros, and only finite weights are saved
            saved = max(Path(out_dir).glob("step*.pt"), default=f"none, {out_dir} is empty")
            return 4, f"{error}; the last good checkpoint: {saved}; try a lower learning rate"
        case MemoryError() | torch.OutOfMemoryError():
            return 5, f"out of memory: {LESS_MEMORY}"
        case RuntimeError() if "allocate memory" in said:  # the CPU allocator's
            return 5, f"out of memory: {LESS_MEMORY}"
        case RuntimeError() if who() and any(words in said for words in LOST_CONTACT):
            return 6, (f"lost contact with another process ({said.splitlines()[0][-120:]}); the "
                       "first failure, which torchrun names as the root cause, is the one to mend")
    return None

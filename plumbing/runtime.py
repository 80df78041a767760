"""
What a training script needs around its loop: device, processes, signals, learning rate, log.

    dist = setup()                                  # under torchrun or not
    total, = all_sum(dist, loss)

On CUDA the processes speak NCCL, on a CPU gloo. Everything here may be skipped on a first reading.
"""
import faulthandler
import json
import math
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from threading import Thread

import torch
import torch.distributed

from configurator import fail

# dense bf16 FLOP/s from the makers' data sheets
GPU_PEAK = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12, "4090": 165e12,
            "3090": 71e12}


@dataclass(frozen=True)
class Dist:
    rank: int
    world: int
    device: torch.device
    dtype: torch.dtype  # of activations; parameters stay fp32

    def autocast(self) -> AbstractContextManager:
        if self.dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self.device.type, self.dtype)


def setup(device: str = "auto", dtype: str = "auto", timeout: float = 120) -> Dist:
    """Join the other processes if torchrun started us. Seconds without word from one of them end
    the run. Raises ValueError for a device or type that is not there."""
    rank, world, local = (int(os.environ.get(k, d)) for k, d in
                          (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    if device == "auto":
        device = ("cuda" if torch.cuda.is_available() else
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
    """Where this process is: `step`; `heard`, when it last exchanged something with the others
    (time.monotonic; None: not yet, or no longer); `gap`, the longest time between two exchanges."""
    step: int | str = "start"
    heard: float | None = None
    gap: float = 0.0
    program: float = 0.0  # bytes of this process before it had a model: Python, torch and the scripts


def who() -> str:
    """What a message of one process of several begins with: "rank 1 of 2, step 37: "; else ""."""
    world = int(os.environ.get("WORLD_SIZE", 1))
    return f"rank {os.environ['RANK']} of {world}, step {RankState.step}: " if world > 1 else ""


def end_if_hanging(timeout: float) -> None:
    """A rank that does not come to the next exchange ends itself and says where it is, when the
    others have come to theirs and given up: torchrun would wait for it another 30 s."""
    while True:
        time.sleep(0.1)
        since = time.monotonic() - (RankState.heard or math.inf)
        if since > timeout + 0.5 + 1.5 * RankState.gap:
            print(f"{who()}hangs for {since:.1f} s, here:", file=sys.stderr, flush=True)
            faulthandler.dump_traceback()
            os._exit(1)


def logits_at_once(head: torch.Tensor) -> torch.nn.LinearCrossEntropyOptions:
    """How many rows of logits exist at a time: torch's choice, made for little memory, but on a GPU
    0.5 GB of them, which took 30 instead of 63 ms for the loss of 8,192 tokens and its gradients
    (head of 65,536 x 2,048, H100). The memory line does not count them."""
    if head.device.type != "cuda":
        return torch.nn.LinearCrossEntropyOptions()
    return torch.nn.LinearCrossEntropyOptions(batch_chunk_size=max(128, (1 << 27) // len(head)))


def finish(dist: Dist) -> None:
    """Leave together: a rank that goes early makes the others fail. All is saved by now, so a
    signal has nothing left to stop, and must not turn the exit code 0 into another."""
    if dist.world > 1:
        torch.distributed.barrier()
        RankState.heard = None
        torch.distributed.destroy_process_group()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


@contextmanager
def first_rank_first(dist: Dist) -> Iterator[None]:
    """The others wait until rank 0 has done the work, and find it done."""
    if dist.rank and dist.world > 1:
        torch.distributed.barrier()
    yield
    if not dist.rank and dist.world > 1:
        torch.distributed.barrier()


def print0(*args) -> None:
    if int(os.environ.get("RANK", 0)) == 0:
        print(*args, flush=True)


def all_sum(dist: Dist, *values: float | torch.Tensor) -> list[float]:
    """Each value summed over the ranks, in one exchange."""
    total = torch.tensor([float(v) for v in values], dtype=torch.float64)
    if dist.world > 1:
        total = total.to(dist.device)
        torch.distributed.all_reduce(total)
        now = time.monotonic()
        RankState.gap, RankState.heard = max(RankState.gap, now - (RankState.heard or now)), now
    return total.tolist()


class StopSignals:
    """SIGTERM and SIGINT ask the loop to stop at the next step; a second one ends it at once. What
    it says goes past print, in the middle of which the signal may come."""

    def __init__(self):
        self.name = ""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._ask)

    def _ask(self, number: int, frame) -> None:
        if self.name:
            os.write(2, f"{who()}ended by a second signal; --resume goes on from the newest "
                        "checkpoint\n".encode())
            os._exit(128 + number)
        self.name = signal.Signals(number).name
        os.write(2, (f"{who()}{self.name}: stops behind this step; once more ends it at once\n"
                     ).encode())


class GradientGuard:
    """Counts steps whose gradient is not finite; they are skipped, three in a row end the run.
    The norm is that of the averaged gradient, so every rank decides alike."""

    def __init__(self, limit: int = 3):
        self.limit, self.streak = limit, 0

    def allows(self, norm: float, step: int, loss: float, samples: str) -> bool:
        """Whether to take the step. Raises FloatingPointError at the limit."""
        if math.isfinite(norm):
            self.streak = 0
            return True
        self.streak += 1
        print0(f"step {step:,}: gradient not finite (loss {loss:.4f}, norm {norm}), {samples}, "
               f"skipped {self.streak}/{self.limit}")
        if self.streak == self.limit:
            raise FloatingPointError(f"{self.limit} steps in a row had no finite gradient")
        return False


def lr_factor(step: int, max_steps: int, warmup: int, schedule: str, final: float,
              decay: float) -> float:
    """Factor on the learning rate: linear warm-up, then a cosine to `final`; or (wsd) level, and
    over the last share `decay` of the steps linear to `final` (Hu et al. 2024)."""
    if step < warmup:
        return (step + 1) / warmup
    if schedule == "cosine":
        t = (step - warmup) / max(1, max_steps - warmup)
        return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * min(1.0, t)))
    t = (step - (1 - decay) * max_steps) / max(1.0, decay * max_steps)
    return 1 - (1 - final) * min(1.0, max(0.0, t))


class Log:
    """Writes the log line, and out_dir/log.jsonl: one JSON object a line, on rank 0. Records of
    steps that a resumed run does again are dropped first."""

    def __init__(self, out_dir: str, dist: Dist, step: int, max_steps: int, tokens: int,
                 flops: int):
        """`tokens` go into an optimizer step of the whole run, `flops` into a token. Raises
        ValueError for a run that is past its end."""
        if step > max_steps:
            raise ValueError(f"{out_dir}: its run is at step {step:,}, past the {max_steps:,} steps "
                             "asked for")
        self.max_steps, self.tokens, self.file = max_steps, tokens, None
        RankState.step = step
        peak = peak_flops(dist)
        self.mfu = flops / peak / dist.world if peak else None  # per token/s
        self.start_clock()
        if dist.rank == 0:
            os.makedirs(out_dir, exist_ok=True)
            path = Path(out_dir) / "log.jsonl"
            lines = path.read_text().splitlines() if path.exists() else []
            whole = [line for line in lines if line.startswith("{") and line.endswith("}")]
            kept = [line for line in whole if json.loads(line)["step"] < step + ('"val"' in line)]
            temporary = path.with_suffix(".tmp")
            temporary.write_text("".join(line + "\n" for line in kept))
            os.replace(temporary, path)
            self.file = open(path, "a", buffering=1)

    def start_clock(self) -> None:
        """The time since then is spread over the steps of the next line."""
        self.since, self.steps, self.seen = time.perf_counter(), 0, 0

    def write(self, **record) -> None:
        """A record with a loss is that of a step; its `tokens`, if not always the same, too."""
        self.steps += "loss" in record
        RankState.step = record["step"] + ("loss" in record)
        self.seen += record.get("tokens", self.tokens) * ("loss" in record)
        if self.file:
            self.file.write(json.dumps(record) + "\n")

    def line(self, step: int, loss: float, lr: float, norm: float, **more: float) -> None:
        """`more` are figures of the stage, printed behind the loss."""
        seconds = (time.perf_counter() - self.since) / self.steps
        speed = self.seen / self.steps / seconds
        mfu = f"{speed * self.mfu:.0%}" if self.mfu else "n/a"
        stage = "".join(f"{name} {value:.3f} | " for name, value in more.items())
        print0(f"step {step:>6,}/{self.max_steps:,} | loss {loss:.4f} | {stage}lr {lr:.1e} | "
               f"norm {norm:.2f} | {1000 * seconds:,.0f} ms | {speed:,.0f} tok/s | mfu {mfu} | "
               f"eta {eta(seconds * (self.max_steps - step))}")
        self.start_clock()


def eta(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f}s"
    return f"{seconds / 60:.0f}m" if seconds < 6000 else f"{seconds / 3600:.1f}h"


def peak_flops(dist: Dist) -> float | None:
    """FLOP/s the device can do at best: from the data sheet for a known GPU, measured with a square
    fp32 or bf16 product on a CPU, None for a device we do not know."""
    if dist.device.type == "cuda":
        name = torch.cuda.get_device_name(dist.device)
        return next((peak for key, peak in GPU_PEAK.items() if key in name), None)
    if dist.device.type != "cpu":
        return None
    a, best = torch.randn(1024, 1024).to(dist.dtype), math.inf
    for _ in range(8):
        start = time.perf_counter()
        a @ a
        best = min(best, time.perf_counter() - start)
    return 2 * 1024**3 / best


def free_memory(device: torch.device) -> float:
    """Bytes that can still be allocated."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        with open("/proc/meminfo") as f:
            return next(1024.0 * int(line.split()[1]) for line in f if line.startswith("MemAvail"))
    except (OSError, StopIteration):
        return math.inf  # not Linux: unknown


def of_process(key: str) -> float:
    """Bytes of this process in memory now (VmRSS) or at most (VmHWM); where there is no /proc, at
    most. getrusage is no substitute on Linux: it starts with the peak of whoever started us."""
    try:
        status = Path("/proc/self/status").read_text()
        return 1024.0 * int(status.split(f"{key}:")[1].split()[0])
    except OSError:
        try:
            import resource
        except ImportError:
            return 0.0
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def peak_memory(device: torch.device) -> float:
    """Most bytes in use so far: of the GPU, or of this process, beside what it had before it made a
    model."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return of_process("VmHWM") - RankState.program


def peak_line(dist: Dist) -> str:
    """What a run needed, to be held against `memory_line`."""
    beside = f", beside {RankState.program / 1e9:.2f} GB of Python and torch" if RankState.program else ""
    return f"peak memory {peak_memory(dist.device) / 1e9:.2f} GB{beside}"


def resume_command() -> str:
    """The command that started us, with --resume."""
    words = [shlex.quote(a) for a in sys.argv if not a.startswith("--resume")]
    world, here = (int(os.environ.get(name, 1)) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"))
    start = f"torchrun --nproc_per_node={here}" if world > 1 else "python"
    if world > here:
        start = "on each machine, with the same --nnodes and address as before: " + start
    return f"{start} {' '.join(words)} --resume"


def name_rank() -> None:
    """Before a traceback, whose it is."""
    if who():
        print(f"{who()}failed, see the traceback", file=sys.stderr, flush=True)


# how gloo and NCCL say that another process is gone or silent
LOST_CONTACT = ("Connection closed by peer", "Connection reset", "Timed out waiting", "Broken pipe",
                "Socket Timeout", "NCCL communicator was aborted", "Connection refused")
LESS_MEMORY = ("halve --batch_size (the update stays the same), then how long texts may be, then "
               "the model")


def memory_line(parts: dict[str, int], dist: Dist) -> str:
    """What a run will need, by what needs it, beside what is free; a warning past 90 %."""
    need, free = sum(parts.values()), free_memory(dist.device)
    text = " + ".join(f"{k} {v / 1e9:.2f}" for k, v in parts.items())
    text = f"memory: {need / 1e9:.2f} GB = {text}; {free / 1e9:.1f} GB are free"
    return text + (f"\nWARNING: that may not fit: {LESS_MEMORY}" if need > 0.9 * free else "")


@contextmanager
def errors_in_one_line(out_dir: str) -> Iterator[None]:
    """What a user can mend ends a run with one line: exit code 2 for a mistake, 3 for a full disk,
    4 for numbers that are not finite, 5 for too little memory, 6 for another process that is gone.
    Else it is a bug: a traceback. One process of several says which it is, and at which step."""
    try:
        if os.path.isfile(out_dir):
            raise ValueError(f"--out_dir={out_dir} is a file, and must be a folder")
        yield
        return
    except ValueError as error:
        fail(f"{who()}{error}")
    except OSError as error:
        text = f"{error}"
        code, text = 3, text if out_dir in text else f"{out_dir}: {text}"
    except FloatingPointError as error:
        code = 4
        # newest first by name: the steps have leading zeros, and only finite weights are saved
        saved = max(Path(out_dir).glob("step*.pt"), default=f"none, {out_dir} is empty")
        text = f"{error}; the last good checkpoint: {saved}; try a lower learning rate"
    except (MemoryError, torch.OutOfMemoryError):
        code, text = 5, f"out of memory: {LESS_MEMORY}"
    except RuntimeError as error:
        said = str(error)
        if "allocate memory" in said:  # what the CPU allocator says
            code, text = 5, f"out of memory: {LESS_MEMORY}"
        elif who() and any(words in said for words in LOST_CONTACT):
            code = 6
            text = (f"lost contact with another process ({said.splitlines()[0][-120:]}); the first "
                    "failure, which torchrun names as the root cause, is the one to mend")
        else:
            name_rank()
            raise
    except Exception:
        name_rank()
        raise
    print(f"{who()}{text}", file=sys.stderr, flush=True)
    raise SystemExit(code)


def describe_run(dist: Dist) -> str:
    """Command, commit, versions and device: what one needs to run it again."""
    git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True,
                         cwd=Path(__file__).parent)
    name = torch.cuda.get_device_name(dist.device) if dist.device.type == "cuda" else (
        f"{dist.device} with {torch.get_num_threads()} threads")
    return (f"{' '.join(sys.argv)}\ncommit {git.stdout.strip() or 'unknown'}, python "
            f"{sys.version.split()[0]}, torch {torch.__version__}, {dist.world} x {name}, "
            f"{str(dist.dtype).removeprefix('torch.')}")

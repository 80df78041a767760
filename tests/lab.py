"""
Tools to break a training run with.

    lab = Lab(folder)                                  # toy data, a model and a reward model
    run = lab.start("sft", out_dir, max_steps=6)       # main() of train_sft.py, in a child
    run.ends(0.1);  run.send(signal.SIGKILL);  run.wait();  run.text

A run is a fork that sets sys.argv and runs main(): torch is imported once, so a kill costs a
fraction of a second. The child does not measure how fast the CPU is. Linux only.
"""
import ctypes
import importlib
import json
import os
import random
import select
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from demo import world
from plumbing import checkpoint, log, runtime, terminal
from tokenizer import HAN_PATTERN, dump

ROOT = Path(__file__).resolve().parent.parent
STAGES = ("pt", "sft", "rm", "dpo", "rl")
SHORT = dict(warmup_steps=1, eval_every=1000, save_every=1, log_every=1, learning_rate=1e-3,
             dtype="float32")  # auto differs between a Python of its own and a Run, see below
LATER = dict(answer_tokens=4, val_fraction=0.2, batch_size=2)
SETTINGS: dict[str, dict] = {
    "pt": dict(n_layer=1, n_embd=16, n_head=2, n_kv_head=1, max_seq_len=32, batch_tokens=256,
               batch_size=4, eval_tokens=100, sample_every=0),
    "sft": LATER | dict(max_len=256, batch_tokens=1024, eval_answers=1, eval_rows=2),
    "rm": LATER | dict(batch_pairs=4, norm_samples=2, eval_pairs=4),
    "dpo": LATER | dict(batch_pairs=4, eval_samples=1, eval_pairs=4),
    "rl": LATER | dict(prompts_per_step=2, group=2, eval_prompts=2, rollout_size=4)}


class Child:
    """A forked child that does `work` and ends, whatever happens: it never comes back into the
    caller's code. It exits with 0, with the code of a SystemExit, or with 1 after a traceback."""

    def __init__(self, work: Callable[[], object], said: Path | None = None):
        """What the child prints goes to the file `said`; without one, where ours goes."""
        if said:
            said.write_bytes(b"")  # a reader may come before the child writes
        self.said, self.peak, self.seconds = said, 0, 0.0  # most bytes, CPU time: known at its end
        self.code: int | None = None
        sys.stdout.flush()
        self.pid = os.fork()
        if self.pid:
            self.exit = os.pidfd_open(self.pid)
            return
        code = 1
        try:
            ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: we die, it dies
            if said:
                for number in (1, 2):
                    os.dup2(os.open(said, os.O_WRONLY | os.O_APPEND), number)
                sys.stdout, sys.stderr = os.fdopen(1, "w", 1), os.fdopen(2, "w", 1)
            work()
            code = 0
        except SystemExit as end:
            code = int(end.code or 0)
        except BaseException:
            traceback.print_exc()
        finally:
            try:
                sys.stdout.flush()
            finally:
                os._exit(code)

    def well(self) -> "Child":
        """Wait for a child that must not fail."""
        if self.wait() != 0:
            raise RuntimeError(f"it fails without any fault: {self.text[-2000:]}")
        return self

    def ends(self, seconds: float) -> bool:
        """Wait up to so many seconds; whether the child has ended."""
        if self.code is None and select.select([self.exit], [], [], max(seconds, 0))[0]:
            _, status, used = os.wait4(self.pid, 0)
            self.code, self.peak = os.waitstatus_to_exitcode(status), 1024 * used.ru_maxrss
            self.seconds = used.ru_utime + used.ru_stime
            os.close(self.exit)
        return self.code is not None

    def wait(self, seconds: float = 60) -> int:
        """The exit code, negative for a signal. Kills the child and raises TimeoutError if it takes
        longer."""
        if not self.ends(seconds):
            self.send(signal.SIGKILL)
            self.ends(10)
            raise TimeoutError(f"{sys.argv[0]} still ran after {seconds} s: {self.text[-500:]}")
        return self.code or 0

    def send(self, number: int) -> None:
        if self.code is None:
            signal.pidfd_send_signal(self.exit, number)

    @property
    def text(self) -> str:
        return self.said.read_text(errors="replace") if self.said else ""


class Run(Child):
    """main() of a script in a child, which calls each `before` first."""

    def __init__(self, script: str, arguments: list[str], said: Path, *before: Callable[[], None],
                 **environ: str):
        def main() -> None:
            os.environ.update(environ)
            sys.argv = [f"{script}.py", *arguments]
            log.peak_flops, runtime.multiplies_bf16 = lambda dist: None, lambda: 0.0
            for change in before:
                change()
            terminal.run(importlib.import_module(script).main)
        super().__init__(main, said)


class Lab:
    """Toy data and what the later stages start from, in `folder`, and runs of the five stages."""

    def __init__(self, folder: Path):
        torch.set_num_threads(1)  # children inherit it, and that no thread was started
        importlib.import_module("torch._dynamo")  # else the first optimizer of every child does it
        self.folder, self.count = folder, 0
        folder.mkdir(parents=True, exist_ok=True)
        self.write("pt", 150, world.pt_document, 2, 3, 0.3)
        for name, make in (("sft", world.chat), ("rm", world.pair), ("rl", world.rl_prompt)):
            self.write(name, 40, make, 1)
        (folder / "tok.txt").write_text(dump([bytes([i]) for i in range(256)], HAN_PATTERN))
        self.run("data", [f"--input={folder}/pt.jsonl", f"--tokenizer={folder}/tok.txt",
                          f"--out_dir={folder}/data", "--val_fraction=0.1", "--workers=1"]).well()
        self.start("pt", folder / "base", max_steps=2, max_seq_len=256, batch_tokens=512,
                   batch_size=2).well()
        self.start("rm", folder / "reward", max_steps=2).well()

    def write(self, name: str, n: int, make: Callable[..., dict], *args) -> None:
        r = random.Random(name)
        (self.folder / f"{name}.jsonl").write_text("".join(
            json.dumps(make(r, "train", *args), ensure_ascii=False) + "\n" for _ in range(n)),
            encoding="utf-8")

    def arguments(self, stage: str, out_dir: Path, **changes) -> list[str]:
        """The command line of a stage at toy size."""
        folder = self.folder
        base: dict[str, Any] = {"data_dir": folder / "data"}
        if stage != "pt":
            file = "rm" if stage == "dpo" else stage
            base = {"data": folder / f"{file}.jsonl", "init_from": folder / "base"}
        if stage == "rl":
            base["reward_from"] = folder / "reward"
        settings = base | SHORT | SETTINGS[stage] | dict(out_dir=out_dir, max_steps=6) | changes
        return [f"--{key}={value}" for key, value in settings.items()]

    def run(self, script: str, arguments: list[str], *before: Callable[[], None],
            environ: dict | None = None) -> Run:
        return Run(script, arguments, self.new("said"), *before, **(environ or {}))

    def python(self, *words: str) -> Child:
        """A Python of its own, started in the folder of the scripts."""
        def execute() -> None:
            os.chdir(ROOT)
            os.environ.update(OMP_NUM_THREADS="1", TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1")
            os.execv(sys.executable, [sys.executable, *words])
        return Child(execute, self.new("said"))

    def start(self, stage: str, out_dir: Path, *before: Callable[[], None],
              environ: dict | None = None, **changes) -> Run:
        return self.run(f"train_{stage}", self.arguments(stage, out_dir, **changes), *before,
                        environ=environ)

    def new(self, name: str = "run") -> Path:
        """A folder name that is not in use."""
        self.count += 1
        return self.folder / f"{name}{os.getpid()}.{self.count}"

    def whole(self, stage: str, **changes) -> tuple[Path, float]:
        """Out_dir of a run that nothing disturbs, and its seconds."""
        out, start = self.new(f"whole_{stage}"), time.perf_counter()
        self.start(stage, out, **changes).well()
        return out, time.perf_counter() - start


def places(world: int) -> list[dict[str, str]]:
    """What torchrun would tell each of so many processes on this machine."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    return [{"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1",
             "MASTER_PORT": str(port), "RANK": str(rank), "LOCAL_RANK": str(rank)}
            for rank in range(world)]


def instead(owner: Any, name: str, function: Callable) -> Callable[[], None]:
    """For a Run: `function(real, …)` takes the place of owner.name, which it gets as `real`."""
    def before() -> None:
        real = getattr(owner, name)
        setattr(owner, name, lambda *args, **more: function(real, *args, **more))
    return before


def die_after_save(step: int) -> Callable[[], None]:
    """For a Run: it kills itself right after it has saved the checkpoint of this step."""
    def save(real, out_dir, at, state, **more):
        path = real(out_dir, at, state, **more)
        if at == step:
            os.kill(os.getpid(), signal.SIGKILL)
        return path
    return instead(checkpoint, "save", save)


def break_rank(how: str, at: int, note: Path) -> Callable[[], None]:
    """For a Run: at step `at` rank 1 is killed, raises or hangs (sleeps, as on a dead network
    drive). `note` gets the time."""
    def allows(real, guard, norm: float, step: int, *rest) -> bool:
        if os.environ["RANK"] == "1" and step == at:
            note.write_text(str(time.time()))
            if how == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            if how == "raises":
                raise RuntimeError("deliberate")
            time.sleep(1000)
        return real(guard, norm, step, *rest)
    return instead(runtime.GradientGuard, "allows", allows)


def side_by_side(jobs: list[Callable[[], list]], workers: int = 2) -> list[list]:
    """What each job returns (numbers and strings), run in forked children, `workers` at once.
    Raises RuntimeError if one fails; its traceback is printed."""
    children: list[Child] = []
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder, str(i)) for i in range(len(jobs))]
        for job, file in zip(jobs, files):
            while sum(not child.ends(0) for child in children) == workers:
                time.sleep(0.01)
            children.append(Child(lambda: file.write_text(json.dumps(job()))))
        for i, child in enumerate(children):
            if child.wait(10**6):
                raise RuntimeError(f"job {i} of {len(jobs)} failed")
        return [json.loads(file.read_text()) for file in files]


def trace(out_dir: Path) -> list[tuple[int, str]]:
    """(step, loss to the last bit) of every step in the log."""
    rows = map(json.loads, (out_dir / "log.jsonl").read_text().splitlines())
    return [(row["step"], row["loss"].hex()) for row in rows if "loss" in row]


def newest(out_dir: Path) -> dict:
    """The newest checkpoint, as a new process finds it."""
    checkpoint._known_good.clear()
    return checkpoint.load(str(out_dir))[0]


def bits(state):
    """A state with (type, shape, bytes) in the place of each tensor."""
    if isinstance(state, torch.Tensor):
        return state.dtype, state.shape, state.numpy().tobytes()
    if isinstance(state, dict):
        return {key: bits(value) for key, value in state.items()}
    return [bits(value) for value in state] if isinstance(state, (list, tuple)) else state


def same_bits(a, b) -> bool:
    """Whether two states hold the same tensors, bit for bit, and the same of everything else."""
    return bits(a) == bits(b)


def same_run(a: Path, b: Path) -> bool:
    """The same losses, and the same weights and optimizer at the end, to the last bit."""
    return trace(a) == trace(b) and all(
        same_bits(newest(a)[key], newest(b)[key]) for key in ("step", "model", "optimizer"))


def damaged(out_dir: Path) -> list[Path]:
    """Checkpoints that a new process would find damaged."""
    checkpoint._known_good.clear()
    return [path for path in checkpoint.list_checkpoints(str(out_dir)) if checkpoint.damage(path)]

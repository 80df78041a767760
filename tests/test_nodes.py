"""torchrun around the scripts: two agents as on two machines, and restarts after a killed rank."""
import contextlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from lab import places

import data
import train_pt
from demo.world import pt_document
from plumbing import checkpoint
from plumbing.jobs import Progress

ROOT = Path(train_pt.__file__).parent
pytestmark = pytest.mark.slow  # 100 s; in make test-all
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
STEPS = 16
SIZES = ("--n_layer=2 --n_embd=32 --n_head=2 --n_kv_head=1 --max_seq_len=32 --batch_tokens=512 "
         f"--batch_size=4 --max_steps={STEPS} --warmup_steps=2 --eval_every=16 --eval_tokens=500 "
         "--save_every=4 --sample_every=0 --log_every=1 --dist_timeout=30 --shard --resume "
         "--dtype=float32").split()


@pytest.fixture(scope="module")
def text(tiny, tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("nodes")
    docs = [pt_document(random.Random(i), "train", 2, 3, 0.3) for i in range(100)]
    (folder / "pt.jsonl").write_text("".join(json.dumps(d) + "\n" for d in docs))
    (folder / "tok.txt").write_text(tiny.tok.text)
    data.prepare(data.Config(str(folder / "pt.jsonl"), str(folder / "tok.txt"),
                             str(folder / "text"), val_fraction=0.1, workers=1), Progress())
    return str(folder / "text")


@pytest.fixture(scope="module")
def whole(text, tmp_path_factory) -> list[str]:
    """The losses of two processes that nobody disturbs."""
    out = tmp_path_factory.mktemp("whole")
    run = agent(text, out, "--standalone", "--nproc_per_node=2")
    said = run.communicate(timeout=400)[0]
    assert run.returncode == 0, said
    return losses(out)


def agent(text: str, out: Path, *how: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "torch.distributed.run", *how, "train_pt.py", *SIZES,
               f"--data_dir={text}", f"--out_dir={out}"]
    return subprocess.Popen(command, cwd=ROOT, text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT, env=os.environ | ENVIRONMENT)


def losses(out: Path) -> list[str]:
    rows = [json.loads(line) for line in open(out / "log.jsonl")]
    return [row["loss"].hex() for row in rows if "loss" in row]


def workers(torchrun: int) -> list[int]:
    """Process ids of the ranks that a torchrun has started, in their order."""
    found = []
    for pid in Path(f"/proc/{torchrun}/task/{torchrun}/children").read_text().split():
        with contextlib.suppress(OSError):  # it has just ended
            if b"train_pt.py" in Path(f"/proc/{pid}/cmdline").read_bytes():
                found.append(int(pid))
    return found


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_killed_ranks_are_restarted_and_the_losses_are_the_same_to_the_last_bit(text, whole,
                                                                                tmp_path):
    """Ranks die between two checkpoints, three times. Seen to fail without the variable: the new
    ranks looked for the dead ones."""
    run = agent(text, tmp_path, "--standalone", "--nproc_per_node=2", "--max-restarts=3")
    victims, said = {5: 1, 10: 0, 14: 1}, ""
    for line in run.stdout:
        said += line
        step = re.match(r"step +(\d+)/", line)
        if step and (victim := victims.pop(int(step[1]), None)) is not None:
            os.kill(workers(run.pid)[victim], signal.SIGKILL)
    assert run.wait(400) == 0, said[-3000:]
    assert not victims and said.count("\nloaded ") == 3
    assert losses(tmp_path) == whole and len(whole) == STEPS
    assert checkpoint.load(str(tmp_path))[0]["step"] == STEPS


def test_two_agents_with_a_static_rendezvous_are_one_run(text, whole, tmp_path):
    """One process each, as on two machines. The losses are those of two processes of one agent, to
    the last bit."""
    port = places(2)[0]["MASTER_PORT"]
    nodes = [agent(text, tmp_path, "--nnodes=2", f"--node_rank={rank}", "--nproc_per_node=1",
                   "--master_addr=127.0.0.1", f"--master_port={port}") for rank in (0, 1)]
    try:
        said = [node.communicate(timeout=400)[0] for node in nodes]
    finally:
        for node in nodes:
            node.kill()
    assert [node.returncode for node in nodes] == [0, 0], said
    assert "2 x cpu" in said[0] and losses(tmp_path) == whole


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_two_agents_with_an_elastic_rendezvous_restart_after_a_killed_rank(text, whole, tmp_path):
    """The second command of docs/scale.md for several machines: the rank of one agent dies; both
    agents start theirs again, and the losses are the same to the last bit."""
    port = places(2)[0]["MASTER_PORT"]
    nodes = [agent(text, tmp_path, "--nnodes=2", "--nproc_per_node=1", "--max-restarts=3",
                   "--rdzv_backend=c10d", "--rdzv_id=run", f"--rdzv_endpoint=127.0.0.1:{port}",
                   f"--rdzv_conf=is_host={int(first)}") for first in (True, False)]
    log, begin = tmp_path / "log.jsonl", time.monotonic()
    try:
        while not log.exists() or log.read_text().count("\n") < 7:
            assert time.monotonic() - begin < 400 and nodes[1].poll() is None
            time.sleep(0.01)
        os.kill(workers(nodes[1].pid)[0], signal.SIGKILL)
        said = [node.communicate(timeout=400)[0] for node in nodes]
    finally:
        for node in nodes:
            node.kill()
    assert [node.returncode for node in nodes] == [0, 0], said
    assert "".join(said).count("\nloaded ") == 1 and losses(tmp_path) == whole

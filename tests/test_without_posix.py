"""What Windows lacks, taken away: `resource`, `fcntl`, `os.fork` and their kin do not exist, new
processes import everything again, text files get other line ends, and are UTF-8 only if told so."""
import json
import os
import subprocess
import sys
from pathlib import Path
from random import Random

import pytest

from demo import world
from plumbing import checkpoint

ROOT = Path(checkpoint.__file__).resolve().parent.parent
POOR = """
import builtins, io, multiprocessing, os, signal, sys
for name in ("resource", "fcntl", "termios", "pwd", "grp"):
    sys.modules[name] = None
for name in ("fork", "forkpty", "mkfifo", "getuid", "geteuid", "sysconf", "pidfd_open", "wait4",
             "O_DIRECTORY", "O_NOFOLLOW", "O_NONBLOCK"):
    delattr(os, name)
for name in ("SIGHUP", "pidfd_send_signal"):
    delattr(signal, name)
multiprocessing.set_start_method("spawn")
real = open
def windows_open(file, mode="r", buffering=-1, encoding=None, errors=None, newline=None, **more):
    if str(file).startswith("/proc/"):
        raise FileNotFoundError(2, "No such file or directory", file)
    if newline is None and set(mode) & set("wax") and not set(mode) & set("b+"):
        newline = "\\r\\n"
    return real(file, mode, buffering, encoding, errors, newline, **more)
builtins.open = io.open = windows_open
"""
IN_TURN = """
import runpy, sys
for words in {commands!a}:
    print("$", *words)
    sys.argv = words
    try:
        runpy.run_path(words[0], run_name="__main__")
    except SystemExit as end:
        if end.code:
            raise
"""


@pytest.fixture(scope="module")
def poor(tmp_path_factory):
    """Run a command there: exit code, what is said, and what is said of mistakes."""
    folder = tmp_path_factory.mktemp("poor")
    (folder / "sitecustomize.py").write_text(POOR)
    env = os.environ | {"PYTHONPATH": str(folder), "LC_ALL": "C", "PYTHONCOERCECLOCALE": "0",
                        "PYTHONUTF8": "0", "OMP_NUM_THREADS": "1"}

    def run(*words: str) -> tuple[int, str, str]:
        done = subprocess.run([sys.executable, *words], cwd=ROOT, env=env, capture_output=True,
                              text=True, timeout=300)
        return done.returncode, done.stdout, done.stderr
    return run


def test_data_training_generation_and_rag_run(poor, tmp_path):
    """Seen to fail when runtime.py imported resource at its top: every training script ended there
    on Windows."""
    r, out = Random(0), str(tmp_path)
    docs = [world.pt_document(r, "train", 2, 3, 0.3) for _ in range(200)]
    (tmp_path / "text.jsonl").write_text(
        "".join(json.dumps(d, ensure_ascii=False) + "\n" for d in docs), encoding="utf-8")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes/a.md").write_text("# 宠物\n\n琪宁的宠物是猫。\n", encoding="utf-8")
    code, _, error = poor("tokenizer.py", f"--input={out}/text.jsonl", f"--out={out}/tok.txt",
                          "--vocab_size=300", "--workers=2")
    assert code == 0, error
    training = ["train_pt.py", f"--data_dir={out}/data", f"--out_dir={out}/pt", "--n_layer=1",
                "--n_embd=32", "--n_head=2", "--n_kv_head=1", "--max_seq_len=32",
                "--warmup_steps=1", "--batch_tokens=128", "--batch_size=2", "--eval_tokens=64"]
    add = ["rag.py", "add", f"{out}/notes", f"--index={out}/index"]
    commands = [
        ["data.py", f"--input={out}/text.jsonl", f"--tokenizer={out}/tok.txt",
         f"--out_dir={out}/data", "--val_fraction=0.1", "--workers=1"],
        [*training, "--max_steps=2"], [*training, "--max_steps=3", "--resume"],
        ["generate.py", f"--checkpoint={out}/pt", "--prompt=琪宁", "--max_tokens=8"],
        add, add, ["rag.py", "ask", "琪宁的宠物是什么？", f"--index={out}/index"]]
    code, said, error = poor("-c", IN_TURN.format(commands=commands))
    assert code == 0, error[-2000:]
    assert list((tmp_path / "pt").glob("step00000003-*"))
    assert "a.md" in said.partition("$ rag.py ask")[2]


def test_the_fault_board_says_in_one_line_that_it_needs_linux(poor):
    code, said, error = poor("-m", "faults")
    assert code == 2 and said == "" and error.count("\n") == 1 and "needs Linux" in error

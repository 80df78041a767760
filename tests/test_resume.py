"""What a training script says to an out_dir that does not suit it, and to a second signal: one
line, with the exit code that README.md gives."""
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from lab import STAGES, Lab, instead, newest, places, same_run

from plumbing import checkpoint, splits, terminal
from tokenizer import HAN_PATTERN, dump

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forks as Linux does")


def can_mount(folder: Path) -> bool:
    """Whether we have the right to mount a tmpfs."""
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        with tmpfs(folder / "tmpfs", 1 << 16):
            return True
    return False


@contextlib.contextmanager
def tmpfs(at: Path, size: int) -> Iterator[Path]:
    at.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", at], check=True,
                   capture_output=True)
    try:
        yield at
    finally:
        subprocess.run(["umount", at], check=True)


@pytest.fixture(scope="module", params=STAGES)
def done(request, lab) -> tuple[str, Path]:
    """A stage, and a run of three steps of it."""
    return request.param, lab.whole(request.param, max_steps=3)[0]


def resume(lab: Lab, stage: str, out: Path, before=lambda: None, **changes) -> tuple[int, str]:
    """Exit code, and what is said after the settings."""
    run = lab.start(stage, out, before, resume=True, **dict(max_steps=4) | changes)
    return run.wait(), run.text.partition("\n\n")[2] or run.text


def refused(lab: Lab, done: tuple, out: Path, line: str, code: int = 2, **changes) -> None:
    """No step is done, and `line` is in the only line that names a fault."""
    found, said = resume(lab, done[0], out, **changes)
    assert found == code and line in said.splitlines()[-1], said
    assert "Traceback" not in said and "\nstep " not in said, said


@pytest.mark.parametrize("change, line", [
    (dict(kind="other"), "is a checkpoint of stage other, not of "),
    (dict(tokenizer=dump([bytes([255 - i]) for i in range(256)], HAN_PATTERN)),
     "made with another tokenizer than that of the data"),
    (dict(model_config=dict(n_embd=8)), "its model has another shape: n_embd is 8, asked for 16")])
def test_the_checkpoint_of_another_run_is_refused(lab, done, tmp_path, change, line):
    """Seen to fail before the later stages compared the shape: they went on with the weights."""
    state = newest(done[1])
    change = {key: state[key] | value if key == "model_config" else value
              for key, value in change.items()}
    checkpoint.save(str(tmp_path / "out"), 3, {**state, **change})
    before = os.listdir(tmp_path / "out")
    refused(lab, done, tmp_path / "out", line)
    assert set(before) <= set(os.listdir(tmp_path / "out"))


def test_fewer_steps_than_are_done_are_refused(lab, done):
    """Seen to fail before Log compared them: nothing was done, with exit code 0."""
    refused(lab, done, done[1], "its run is at step 3, past the 2 steps asked for", max_steps=2)


def test_a_finished_run_learns_no_more(lab, done, tmp_path):
    """It is judged again, and its weights and losses stay what they are to the last bit."""
    shutil.copytree(done[1], tmp_path / "out")
    code, said = resume(lab, done[0], tmp_path / "out", max_steps=3)
    assert code == 0 and "\nstep " not in said and same_run(tmp_path / "out", done[1])


def test_changed_settings_and_data_are_said_and_gone_on_with(lab, done, tmp_path):
    """Once only: the next checkpoint knows the new ones. Seen to fail before the checkpoint held a
    hash of the data."""
    stage, out = done[0], tmp_path / "out"
    shutil.copytree(done[1], out)
    changes = dict(learning_rate=2e-3)
    if stage == "pt":
        changes["data_dir"] = tmp_path / "data"
        lab.run("data", [f"--input={lab.folder}/pt.jsonl", f"--tokenizer={lab.folder}/tok.txt",
                         f"--out_dir={tmp_path}/data", "--val_fraction=0.2", "--workers=1"]).well()
    else:
        changes["data"] = tmp_path / "changed.jsonl"
        file = lab.folder / {"dpo": "rm.jsonl"}.get(stage, f"{stage}.jsonl")
        changes["data"].write_text("".join(file.read_text().splitlines(True)[:30]))
    code, said = resume(lab, stage, out, **changes)
    assert code == 0 and "\n  learning_rate was 0.001, now 0.002\n" in said
    assert "\nWARNING: the training data, the reference or the reward is not what this run" in said
    code, said = resume(lab, stage, out, max_steps=5, **changes)
    assert code == 0 and "learning_rate was" not in said and "WARNING: the training" not in said


@pytest.mark.parametrize("stage, setting", [
    ("dpo", "init_from"), ("rl", "init_from"), ("rl", "reward_from")])
def test_a_reference_or_reward_that_was_trained_on_is_said(lab, tmp_path, stage, setting):
    """The settings name a folder, whose newest checkpoint is another one by now. Seen to fail: the
    run went on without a word, with the margins, KL and rewards of another model."""
    where, out = tmp_path / "where", tmp_path / "out"
    shutil.copytree(lab.folder / ("reward" if setting == "reward_from" else "base"), where)
    lab.start(stage, out, max_steps=2, **{setting: where}).well()
    state, _ = checkpoint.load(str(where))
    for step, said_so in ((3, False), (4, True)):
        code, said = resume(lab, stage, out, max_steps=step, **{setting: where})
        assert code == 0 and ("the reference or the reward is not what" in said) == said_so, said
        checkpoint.save(str(where), state["step"] + 1, state | {"step": state["step"] + 1})


def test_others_wait_for_the_first_as_long_as_it_prepares_the_data(lab, tmp_path):
    """Seen to fail: past --dist_timeout they gave up, and so did the next try."""
    def slow(real, *args, **more):
        time.sleep(8 * (os.environ["RANK"] == "0"))
        return real(*args, **more)
    both = [lab.start("sft", tmp_path / "out", instead(splits, "load_examples", slow),
                      environ=place, max_steps=1, warmup_steps=0, dist_timeout=6.0)
            for place in places(2)]
    assert [run.wait() for run in both] == [0, 0], both[0].text + both[1].text


def test_an_out_dir_that_is_a_file_is_refused(lab, done, tmp_path):
    (tmp_path / "out").write_text("mine")
    refused(lab, done, tmp_path / "out", "out is a file, and must be a folder")
    assert (tmp_path / "out").read_text() == "mine"


def test_an_out_dir_that_cannot_be_written_is_named(lab, done, tmp_path):
    """A file system that is full, and one that is read-only. Seen to fail when the reason was said
    without the place, and when rows that could not be written were taken for a mistake (code 2)."""
    if not can_mount(tmp_path):
        pytest.skip("no right to mount a tmpfs")
    with tmpfs(tmp_path / "at", 8 << 20) as at:
        out = at / "out"
        shutil.copytree(done[1], out)
        shutil.rmtree(out / "data", ignore_errors=True)
        with open(at / "full", "wb", 0) as full, contextlib.suppress(OSError):
            while full.write(bytes(4096)):
                pass
        for reason in ("No space left on device", "Read-only file system"):
            code, said = resume(lab, done[0], out)
            last = said.splitlines()[-1]
            assert code == 3 and reason in last and str(out) in last and "Traceback" not in said
            assert newest(out)["step"] == 3
            subprocess.run(["mount", "-o", "remount,ro", at], check=True)


def test_one_signal_stops_after_the_step_and_a_second_at_once(lab, done, tmp_path):
    """Seen to fail before anything was said to the first one."""
    def before() -> None:
        terminal.end_quietly()
        from plumbing import log
        write = log.Log.write

        def slow(self, **record):
            write(self, **record)
            if "loss" in record and record["step"] == 4:
                for _ in range(2):
                    os.kill(os.getpid(), signal.SIGINT)
        log.Log.write = slow
    shutil.copytree(done[1], tmp_path / "out")
    code, said = resume(lab, done[0], tmp_path / "out", before, max_steps=9)
    assert code == 128 + signal.SIGINT
    assert said.splitlines()[-2:] == [
        "SIGINT: stops after this step; once more ends it at once",
        "ended by a second signal; --resume continues from the newest checkpoint"]
    rows = [json.loads(line) for line in (tmp_path / "out/log.jsonl").read_text().splitlines()]
    assert rows[-1]["step"] == 4 and newest(tmp_path / "out")["step"] == 4
    assert resume(lab, done[0], tmp_path / "out", max_steps=5)[0] == 0


def test_another_rank_of_lora_is_refused(lab, tmp_path):
    """Seen to fail with a traceback of torch, and with a KeyError."""
    ranks = {rank: lab.whole("sft", max_steps=3, lora_rank=rank)[0] for rank in (0, 2)}
    for was, now in ((0, 2), (2, 0), (2, 4)):
        refused(lab, ("sft",), ranks[was], f"was trained with --lora_rank={was}, asked for {now}",
                lora_rank=now)

"""checkpoint.py keeps its promise: a file is whole or not there, a damaged one is never used."""
import os
import random
import resource
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from plumbing import checkpoint


def state(step: int, size: int = 300) -> dict:
    w = torch.arange(size, dtype=torch.float32) + step
    return {"format": 1, "step": step, "model": {"w": w, "tied": w}, "optimizer": [{"m": w / 7}],
            "name": "小"}


def test_load_gives_back_every_bit_and_shared_storage(tmp_path):
    path = checkpoint.save(tmp_path, 7, state(7))
    found, where = checkpoint.load(tmp_path)
    assert where == path and found["name"] == "小" and found["step"] == 7
    assert torch.equal(found["model"]["w"], state(7)["model"]["w"])
    assert torch.equal(found["optimizer"][0]["m"], state(7)["optimizer"][0]["m"])
    assert found["model"]["w"].data_ptr() == found["model"]["tied"].data_ptr()


def test_the_newest_two_valid_files_are_kept(tmp_path):
    """Counting damaged files as kept ones would delete the last good one."""
    paths = [checkpoint.save(tmp_path, s, state(s)) for s in (1, 2)]
    raw = bytearray(paths[1].read_bytes())
    raw[len(raw) // 2] ^= 1
    paths[1].write_bytes(raw)
    third = checkpoint.save(tmp_path, 3, state(3))
    assert checkpoint.list_checkpoints(tmp_path) == [third, paths[1], paths[0]]  # 1 is still needed
    fourth = checkpoint.save(tmp_path, 4, state(4))
    assert checkpoint.list_checkpoints(tmp_path)[:2] == [fourth, third]
    assert paths[0] not in checkpoint.list_checkpoints(tmp_path)


def test_what_was_just_saved_is_never_the_one_to_go(tmp_path):
    """Seen to fail: a step before two others was written and deleted."""
    later = [checkpoint.save(tmp_path, s, state(s)) for s in (8, 9)]
    early = checkpoint.save(tmp_path, 0, state(0))
    assert checkpoint.list_checkpoints(tmp_path) == [*later[::-1], early]


def test_every_mutation_is_detected_and_named(tmp_path, capsys):
    """400 flipped bits, cut ends and zeroed pages; torch.load alone accepts most of the flips."""
    good = checkpoint.save(tmp_path, 1, state(1, 5000))
    bad = checkpoint.save(tmp_path, 2, state(2, 5000))
    raw, r = bad.read_bytes(), random.Random(0)
    for i in range(400):
        damaged = bytearray(raw)
        at = r.randrange(len(raw))
        if i % 4 == 0:
            damaged = damaged[:at]
        elif i % 4 == 1:
            if not any(damaged[at:at + 4096]):
                continue
            damaged[at:at + 4096] = bytes(len(damaged[at:at + 4096]))
        else:
            damaged[at] ^= 1 << r.randrange(8)
        bad.write_bytes(damaged)
        found, where = checkpoint.load(tmp_path)
        assert where == good and found["step"] == 1
        assert bad.name in capsys.readouterr().err  # stdout is for results


def test_a_renamed_file_is_checked_by_its_inner_checksums(tmp_path):
    path = checkpoint.save(tmp_path, 1, state(1, 5000)).rename(tmp_path / "mine.pt")
    assert checkpoint.load(path)[0]["step"] == 1
    raw = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as z:
        biggest = max(z.infolist(), key=lambda i: i.file_size)
    raw[biggest.header_offset + 200 + biggest.file_size // 2] ^= 1
    path.write_bytes(raw)
    with pytest.raises(ValueError, match="mine.pt.*checksum"):
        checkpoint.load(path)


def in_child(work) -> int:
    """Run `work` in a forked child, which may die any way it likes; its exit code."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
            os._exit(0)
        except BaseException as error:
            print(f"child: {error}", flush=True)
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def test_a_crash_at_any_call_leaves_the_old_or_the_new_state(tmp_path, monkeypatch):
    """SQLite's method: die at the k-th call that touches the disk, for every k."""
    checkpoint.save(tmp_path, 1, state(1))
    crashes, seen = 0, set()
    for k in range(1000):
        def save_and_die_at_call_k():
            calls = 0

            def dying(function):
                def wrapper(*args, **kwargs):
                    nonlocal calls
                    calls += 1
                    if calls > k:
                        os._exit(9)
                    return function(*args, **kwargs)
                return wrapper
            for name in ("replace", "fsync", "unlink", "open", "close"):
                setattr(os, name, dying(getattr(os, name)))
            checkpoint._HashingFile.write = dying(checkpoint._HashingFile.write)
            checkpoint._HashingFile.flush = dying(checkpoint._HashingFile.flush)
            checkpoint.save(tmp_path, 2, state(2), keep=1)
        code = in_child(save_and_die_at_call_k)
        checkpoint._known_good.clear()
        found, path = checkpoint.load(tmp_path)
        assert torch.equal(found["model"]["w"], state(found["step"])["model"]["w"])
        seen.add(found["step"])
        if code == 0:
            break
        assert code == 9
        crashes += 1
        for p in checkpoint.list_checkpoints(tmp_path):
            if p != path or found["step"] == 2:
                p.unlink()
        if found["step"] == 2:
            checkpoint.save(tmp_path, 1, state(1))
    assert crashes >= 8 and seen == {1, 2}
    assert not list(tmp_path.glob(".tmp-*"))  # what the dead left behind is swept by the next save


def test_a_full_disk_leaves_the_old_file_and_says_why(tmp_path, capfd):
    old = checkpoint.save(tmp_path, 1, state(1))

    def save_too_much():
        import signal
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
        checkpoint.save(tmp_path, 2, state(2, 100_000))
    assert in_child(save_too_much) == 1
    said = capfd.readouterr().out
    assert "step 2 was NOT written" in said and "File too large" in said and "intact" in said
    assert [p.name for p in tmp_path.iterdir()] == [old.name]
    assert checkpoint.load(tmp_path)[0]["step"] == 1


def test_weights_that_are_not_finite_are_never_saved(tmp_path):
    for value in (float("nan"), float("inf")):
        bad = state(1)
        bad["optimizer"][0]["m"][3] = value
        with pytest.raises(FloatingPointError, match=r"NOT written: state.optimizer.0.m is not"):
            checkpoint.save(tmp_path, 1, bad)
    assert not list(tmp_path.iterdir())


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_a_file_with_code_inside_is_refused_and_not_run(tmp_path):
    marker = tmp_path / "marker"
    torch.save({"format": 1, "x": Evil(marker)}, tmp_path / "evil.pt")
    with pytest.raises(ValueError, match="evil.pt"):
        checkpoint.load(tmp_path / "evil.pt")
    assert not marker.exists()


def test_what_is_not_there_is_said_in_one_line(tmp_path):
    with pytest.raises(ValueError, match="no checkpoint in this folder"):
        checkpoint.load(tmp_path)
    with pytest.raises(ValueError, match="no such file or folder"):
        checkpoint.load(tmp_path / "nothing")
    (tmp_path / "text.pt").write_text("hello")
    with pytest.raises(ValueError, match="text.pt: damaged"):
        checkpoint.load(tmp_path / "text.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(ValueError, match="not a checkpoint of this program"):
        checkpoint.load(tmp_path / "list.pt")


def test_a_model_from_elsewhere_does_not_come_to_lie_beside_another(tiny, monkeypatch, capsys):
    """convert.py into the folder of a training run: its step 0 lay below the run's last step, so
    generate.py went on with the old model, and a second conversion left two models of step 0."""
    import convert
    before = sorted(Path(tiny.pt).iterdir())
    for words in (["--input=model.gguf", f"--out_dir={tiny.pt}"],
                  [f"--checkpoint={tiny.pt}", "--to=int8", f"--out={tiny.pt}"]):
        monkeypatch.setattr(sys, "argv", ["convert.py", *words])
        with pytest.raises(SystemExit) as stop:
            convert.main()
        assert stop.value.code == 2 and "holds a model already" in capsys.readouterr().err
        assert sorted(Path(tiny.pt).iterdir()) == before


@pytest.mark.parametrize("file", ["mine.gguf", "hf/model.safetensors.index.json"])
def test_an_export_replaces_nothing(tiny, tmp_path, monkeypatch, capsys, file):
    """Beside the index of a model in parts, the new weights were never read: the old ones were."""
    import convert
    path = tmp_path / file
    path.parent.mkdir(exist_ok=True)
    path.write_text("precious")
    out, to = (path, "gguf") if path.suffix == ".gguf" else (path.parent, "hf")
    monkeypatch.setattr(sys, "argv", ["convert.py", f"--checkpoint={tiny.pt}", f"--to={to}",
                                      f"--out={out}"])
    with pytest.raises(SystemExit) as stop:
        convert.main()
    assert stop.value.code == 2 and "holds a model already" in capsys.readouterr().err
    assert path.read_text() == "precious" and [*path.parent.iterdir()] == [path]

"""train_pt.py config/pt_7b.py and config/pt_13b.py themselves, in several gloo processes: parts,
blocks run again and compiled, as on eight GPUs; only sizes, steps and paths are others."""
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from lab import Run, places

from plumbing import checkpoint

ROOT = Path(checkpoint.__file__).parent.parent
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forks as Linux does")
SMALL = ("--n_layer=2 --n_head=4 --n_kv_head=2 --n_embd=64 --n_hidden=96 --max_seq_len=32 "
         "--batch_tokens=512 --batch_size=2 --max_steps=6 --warmup_steps=1 --eval_every=3 "
         "--eval_tokens=300 --save_every=3 --sample_every=6 --log_every=1").split()


def in_processes(world: int, config: str, out: Path, text: Path, backend: str, *more: str) -> str:
    """What such a run says; all processes must end well."""
    compiled = torch.compile

    def traced(graph, inputs):
        print("traced a graph")
        return graph.forward

    def before() -> None:
        torch.compile = lambda f: compiled(f, backend=traced if backend == "eager" else backend)
        if not backend:
            torch.compile = lambda f: f
    given = [str(ROOT / config), *SMALL, f"--data_dir={text}", f"--out_dir={out}", *more]
    run = [Run("train_pt", given, out.with_suffix(f".{world}.{place['RANK']}"), before, **place)
           for place in places(world)]
    codes, said = [one.wait(500) for one in run], "".join(one.text for one in run)
    assert codes == [0] * world, said[-3000:]
    return said


def losses(out: Path) -> list[float]:
    rows = map(json.loads, (out / "log.jsonl").read_text().splitlines())
    return [row["loss"] for row in rows if "loss" in row]


# on a GPU --dtype=auto is bfloat16: rounding to 8 bits, in sums of another order
@pytest.mark.parametrize("name, dtype, close, backend", [
    ("7b", "auto", 1e-5, "eager"), ("13b", "bfloat16", 1e-4, ""),
    pytest.param("7b", "auto", 1e-5, "inductor", marks=pytest.mark.slow)])
def test_a_large_config_in_parts_gives_the_losses_of_one_process_and_goes_on_with_others(
        name, dtype, close, backend, lab, tmp_path):
    """With two processes; and gone on with by four and by one, as if killed before the end was
    saved. The back end eager traces the blocks as inductor does, and leaves out the C++ compiler
    ("": nothing is traced; what goes on never is, to save time).
    Seen to fail without `dist.world` before backward, with moments that a resume forgets, and with
    ranks that all take the first rows of the batch; with blocks compiled where they write, too, for
    55 graphs."""
    config, one, two = f"config/pt_{name}.py", tmp_path / "one", tmp_path / "two"
    text = lab.folder / "data"
    in_processes(1, config, one, text, "", f"--dtype={dtype}", "--shard=False",
                 "--recompute=False", "--compile=False")
    said = in_processes(2, config, two, text, backend, f"--dtype={dtype}")
    assert "2 x cpu" in said
    if backend == "eager":  # the blocks are alike: one graph in each process, and none to write
        assert said.count("traced a graph") == 2
    for world in (4, 1):
        out = tmp_path / f"then{world}"
        shutil.copytree(two, out)
        checkpoint.list_checkpoints(str(out))[0].unlink()
        said = in_processes(world, config, out, text, "", f"--dtype={dtype}", "--resume")
        assert f"{world} x cpu" in said and f"loaded {out}/step00000003-" in said
    assert len(losses(one)) == 6
    for out in (two, tmp_path / "then4", tmp_path / "then1"):
        assert losses(out) == pytest.approx(losses(one), rel=close)
        state = checkpoint.load(str(out))[0]
        assert state["step"] == 6 and state["model_config"]["tied"] is False
        assert all(state["config"][key] for key in ("shard", "recompute", "compile"))

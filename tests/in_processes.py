"""
What the tests of sharding.py do in several processes, forked once for many jobs:

    found = run(2, [("share", dict(shape=SHAPE)), …], folder)      # found[rank][job]

A job is the name of a function below and its arguments; the first is given to it by its process.
"""
import ctypes
import gc
import importlib
import sys
from pathlib import Path

import torch
import torch._dynamo  # noqa: F401, once instead of in every child
from lab import Run, places

import train_pt
from generate import replies
from model import ModelConfig, Transformer
from plumbing import checkpoint, runtime, sharding
from plumbing.optim import make_optimizers


def train(dist: runtime.Dist, stage: str, settings: dict) -> None:
    script = importlib.import_module(f"train_{stage}")
    script.train(script.Config(**settings), dist)


def local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def example(dist: runtime.Dist, shape: dict, optimizer: str = "adamw", shard: bool = True):
    """A model in parts, and its optimizers, behind two steps."""
    torch.manual_seed(0)
    model = Transformer(ModelConfig(**shape))
    net = sharding.wrap(model, dist, shard)
    optimizers = make_optimizers(model, train_pt.Config(optimizer=optimizer))
    for _ in range(2):
        net(torch.arange(8)[None] + dist.rank).square().mean().backward()
        norm = sharding.clip_gradients(net, 1.0)
        for o in optimizers:
            o.step()
            o.zero_grad()
    return model, optimizers, norm


def share(dist: runtime.Dist, shape: dict) -> dict[str, int]:
    """Bytes that this process holds between steps."""
    model, optimizers, _ = example(dist, shape)
    moments = [v for o in optimizers for of_one in o.state.values() for v in of_one.values()]
    return {"parameters": sum(local(p).untyped_storage().nbytes() for p in model.parameters()),
            "moments": sum(local(m).untyped_storage().nbytes() for m in moments if m.dim()),
            "gathered": sum(b.numel() for m in sharding.parts_of(model) for b in m.parameters()
                            if not hasattr(b, "to_local"))}


def round_trip(dist: runtime.Dist, path: str, shard: bool, optimizer: str) -> dict | None:
    """What a checkpoint becomes when it is loaded into parts and gathered again."""
    state, _ = checkpoint.load(path)
    model = Transformer(ModelConfig(**state["model_config"]))
    sharding.wrap(model, dist, shard)
    optimizers = make_optimizers(model, train_pt.Config(optimizer=optimizer))
    sharding.load(model, optimizers, state)
    held = [v for o in optimizers for of_one in o.state.values() for v in of_one.values()]
    assert all(hasattr(v, "to_local") == shard for v in held if v.dim()), "moments not in parts"
    tensors, moments = sharding.gather(model, optimizers)
    return {"model": tensors, "optimizer": moments} if dist.rank == 0 else None


def save(dist: runtime.Dist, shape: dict, optimizer: str, out_dir: str) -> None:
    model, optimizers, _ = example(dist, shape, optimizer)
    tensors, moments = sharding.gather(model, optimizers)
    if dist.rank == 0:
        checkpoint.save(out_dir, 2, {
            "format": 1, "kind": "pt", "step": 2, "model": tensors, "optimizer": moments,
            "model_config": shape, "config": {}, "tokenizer": ""})


def steps(dist: runtime.Dist, shape: dict, **how) -> list[float]:
    """The norms of three steps, each on other rows; `how` goes to `wrap`."""
    torch.manual_seed(0)
    model, norms = Transformer(ModelConfig(**shape)), []
    net = sharding.wrap(model, dist, **how)
    optimizers = make_optimizers(model, train_pt.Config())
    for step in range(3):
        idx = torch.randint(96, (8, 16), generator=torch.Generator().manual_seed(step))
        with dist.autocast():
            own = net(idx[dist.rank::dist.world], hidden=True)
        (own.float().pow(3).sum() / 8 * dist.world).backward()
        norms.append(sharding.clip_gradients(net, 1.0))
        for o in optimizers:
            o.step()
            o.zero_grad()
    return norms


def write(dist: runtime.Dist, shape: dict) -> list:
    """A reply by the last rank alone, then one by each, of another length; another behind a step;
    last, how many parameters of the blocks a call without gradients leaves gathered."""
    model, optimizers, _ = example(dist, shape)
    with sharding.unsharded(model, dist):
        if dist.rank == dist.world - 1:
            replies(model, [[1, 2, 3]], 2)
        said = replies(model, [[1, 2, 3]], 4 + 3 * dist.rank, temperature=0)
    model(torch.arange(8)[None]).square().mean().backward()
    for o in optimizers:
        o.step()
    with sharding.unsharded(model, dist):
        said += replies(model, [[1, 2, 3]], 5, temperature=0)
    with torch.no_grad():
        model(torch.arange(8)[None])
    return [*said, [not hasattr(p, "to_local") for p in model.layers.parameters()].count(True)]


def memory(key: str) -> int:
    return 1024 * int(Path("/proc/self/status").read_text().split(key)[1].split()[0])


def grown(dist: runtime.Dist, shape: dict, batch_size: int, recompute: bool) -> int:
    """Bytes by which a process grows at most over two steps in parts, of two micro-steps each. The
    first, small model loads torch's code; writing 5 to clear_refs forgets the peak so far."""
    for changes in (dict(n_layer=1, vocab_size=96), {}):
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)  # what is free goes back, or the next model would fill it
        before = memory("VmRSS:")
        model = Transformer(ModelConfig(**shape | changes))
        net = sharding.wrap(model, dist, True, recompute)
        optimizers = make_optimizers(model, train_pt.Config())
        Path("/proc/self/clear_refs").write_text("5")
        for micro_step in range(4):
            x = torch.zeros(batch_size, model.config.max_seq_len, dtype=torch.long)
            train_pt.pt_loss(net(x, hidden=True), model.lm_head.weight, x).backward()
            if micro_step % 2:
                for o in optimizers:
                    o.step()
                    o.zero_grad()
        peak = memory("VmHWM:")
        del model, net, optimizers
    return peak - before


def run(world: int, jobs: list[tuple[str, dict]], folder: Path) -> list[list]:
    """What each rank returns for each job."""
    file = folder / f"jobs{world}"
    torch.save(jobs, file)
    started = [Run("in_processes", [str(file)], folder / f"said{world}.{place['RANK']}", **place)
               for place in places(world)]
    codes = [one.wait(500) for one in started]
    assert codes == [0] * world, "".join(one.text for one in started)[-5000:]
    return [torch.load(f"{file}.{rank}", weights_only=True) for rank in range(world)]


def main() -> None:
    """Of a process: argv has the file with the jobs."""
    ctypes.CDLL(None).mallopt(-3, 1 << 16)  # M_MMAP_THRESHOLD: what is freed leaves the process
    dist = runtime.setup("cpu", "float32", 500)
    jobs = torch.load(sys.argv[1], weights_only=True)
    found = [globals()[name](dist, **arguments) for name, arguments in jobs]
    torch.save(found, f"{sys.argv[1]}.{dist.rank}")
    runtime.finish(dist)

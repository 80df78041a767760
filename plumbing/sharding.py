"""
One model over several processes: a copy in each, or a part in each. The rest may be skipped.

    net = wrap(model, dist, shard=True)         # call `net` for a loss, it exchanges gradients
    with unsharded(model, dist): ...            # all weights are here: to evaluate, to write
    save(cfg, "pt", step, model, ...)           # a checkpoint, by all processes together

A copy (DDP) costs each of N processes 16 bytes a parameter: weight, gradient and two moments. A
part (--shard: FSDP2; ZeRO, Rajbhandari et al. 2020) costs 16 / N: each process keeps 1/N of the
rows of every matrix. A block's weights are gathered just before it is used and freed right after;
its gradient is summed and split at once. Both make the same update, and a checkpoint does not
depend on the number of processes or on which of the two wrote it.
"""
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, replace
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import checkpoint

from model import Block
from plumbing import adapters
from plumbing import checkpoint as checkpoints
from plumbing.loss import Nats, gradient
from plumbing.runtime import Dist, Settings, all_max, print0
from tokenizer import Tokenizer


def wrap(model: nn.Module, dist: Dist, shard: bool = False, recompute: bool = False,
         compiled: bool = False) -> nn.Module:
    """Put the model on its device and return the module to call for a loss: it exchanges gradients
    with the other processes. A frozen model (a reference, a reward model) is only sharded. Make the
    optimizers afterwards, because `shard` replaces parameters by DTensors. With `recompute` a block
    keeps only its input and is run again in the backward pass: a third more operations, but the
    activations of one block at a time."""
    blocks = [m for m in model.modules() if isinstance(m, Block)]
    if any(p.requires_grad for p in model.parameters()):
        Nats.gradient = staticmethod(torch.compile(gradient) if compiled else gradient)
    shard = shard and dist.world > 1
    for block in blocks:
        plain = learn = block.forward
        if compiled:  # once for all blocks; the hooks of FSDP stay outside
            learn = torch.compile(learn)
        if recompute:
            learn = partial(checkpoint, learn, use_reentrant=False, preserve_rng_state=False)
        if learn is not plain:
            block.forward = to_learn(learn, plain)
    if shard:
        # Autocast would round a block's matrices to dist.dtype anyway: they travel in it. The
        # inputs stay fp32, else the sum x and the angles of RoPE would be rounded as well.
        policy = MixedPrecisionPolicy(dist.dtype, torch.float32, cast_forward_inputs=False)
        mesh = init_device_mesh(dist.device.type, (dist.world,))
        for block in blocks:
            fully_shard(block, mesh=mesh, mp_policy=policy)
        # embedding, last norm and head: used first and last, gathered in fp32
        return fully_shard(model, mesh=mesh, mp_policy=replace(policy, param_dtype=torch.float32))
    model.to(dist.device)
    if dist.world == 1 or not any(p.requires_grad for p in model.parameters()):
        return model
    return DistributedDataParallel(model)


def to_learn(learn: Callable, plain: Callable) -> Callable:
    """`learn` where gradients are wanted, else `plain`: without gradients nothing needs to run
    again, and a compiled model would be compiled anew for every length that it writes."""
    return lambda *args: (learn if torch.is_grad_enabled() else plain)(*args)


def parts_of(model: nn.Module) -> list[FSDPModule]:
    """The blocks and the rest of a sharded model, [] of another."""
    return [m for m in model.modules() if isinstance(m, FSDPModule)]


@contextmanager
def unsharded(model: nn.Module, dist: Dist) -> Iterator[None]:
    """Inside, every process holds all weights and may call the model on its own; with parts alone a
    call is an exchange that all processes must make. All enter and leave together. A model that is
    not sharded stays as it is."""
    parts = parts_of(model)
    for part in parts:
        part.set_reshard_after_forward(False, recurse=False)
        part.unshard()
    try:  # the gathered matrices are of dist.dtype, what meets them is not
        with dist.autocast() if parts else nullcontext():
            yield
    finally:
        for part in parts:
            part.set_reshard_after_forward(part is not model, recurse=False)
            part.reshard()


def same_weights(model: nn.Module, dist: Dist) -> None:
    """Raises RuntimeError if the processes no longer hold the same weights."""
    with unsharded(model, dist):
        own = sum(float(p.detach().sum()) for p in model.parameters())
    if all_max(dist, own) != -all_max(dist, -own):
        raise RuntimeError("the processes no longer hold the same weights")


def exchange_gradients(net: nn.Module, now: bool) -> None:
    """Whether copies exchange their gradients in the next backward pass; once a step is enough.
    Parts exchange in every pass, because no process has room for a whole gradient."""
    if isinstance(net, DistributedDataParallel):
        net.require_backward_grad_sync = now


def clip_gradients(net: nn.Module, largest: float) -> float:
    """Scale the gradients down to a norm of `largest`. Returns the norm before, of all ranks."""
    norm = nn.utils.clip_grad_norm_(net.parameters(), largest)
    return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)


def save(cfg: Settings, kind: str, step: int, model: nn.Module,
         optimizers: list[torch.optim.Optimizer], tok: Tokenizer, data_id: int, dist: Dist,
         last: bool = False) -> None:
    """Write a checkpoint of stage `kind` into cfg.out_dir, called by all processes. LoRA keeps only
    its update, and with --lora_merge also writes the whole model after the `last` step."""
    tensors, moments = gather(model, optimizers)
    if dist.rank == 0:
        print0("saved", checkpoints.save(cfg.out_dir, step, {
            "format": 1, "kind": kind, "step": step,
            **adapters.contents(model, tensors, cfg.out_dir), "optimizer": moments,
            "model_config": shape_of(model), "config": asdict(cfg), "tokenizer": tok.text,
            "data": data_id}))
        if last and getattr(cfg, "lora_merge", False):
            print0("saved", adapters.write_merged(cfg.out_dir))


def resume(cfg: Settings, kind: str, model: nn.Module, optimizers: list[torch.optim.Optimizer],
           tok: Tokenizer, data_id: int) -> int:
    """The step at which a run starts: 0, or where its newest checkpoint stands, which --resume
    loads. Prints which settings have changed, and whether the training data has. Raises ValueError
    if that checkpoint does not fit, or if a fresh run would be mixed with an older one."""
    found = checkpoints.list_checkpoints(cfg.out_dir)
    if found and not cfg.resume:
        raise ValueError(f"{cfg.out_dir} holds a run already: continue it with --resume, or give "
                         "another --out_dir")
    if not found:
        if cfg.resume:
            print0(f"nothing to resume in {cfg.out_dir}: starting at step 0")
        return 0
    state, path = checkpoints.load(cfg.out_dir)
    if state["kind"] != kind:
        raise ValueError(f"{path}: is a checkpoint of stage {state['kind']}, not of {kind}")
    checkpoints.fits(path, state, tok.text, shape_of(model))
    if len(state["optimizer"]) != len(optimizers):
        raise ValueError(f"{path}: was trained with another --optimizer")
    for key, value in state["config"].items():
        if getattr(cfg, key, value) != value and key not in ("resume", "device"):
            print0(f"  {key} was {value!r}, now {getattr(cfg, key)!r}")
    if state.get("data", data_id) != data_id:
        print0("WARNING: the training data, the reference or the reward is not what this run began "
               "with: examples may repeat, and KL or reward have another zero")
    print0(f"loaded {path}")
    adapters.check_same(cfg, model, state)
    load(model, optimizers, state)
    return state["step"]


def shape_of(model: nn.Module) -> dict:
    """The ModelConfig of a Transformer, or of the one in a reward model, as a checkpoint has it."""
    return asdict(getattr(model, "backbone", model).config)


def gather(model: nn.Module, optimizers: list[torch.optim.Optimizer]) -> tuple[dict, list[dict]]:
    """The state of the model and its optimizers as one process alone would have it, on the CPU of
    rank 0. The other processes must call this too, and must not use what they get."""
    moments = [o.state_dict() for o in optimizers]
    if not parts_of(model):
        return model.state_dict(), moments

    @cache  # a tied matrix, which has two names, is one matrix in the file too
    def collect(part: DTensor) -> Tensor | None:
        full = part.detach().full_tensor()  # by all ranks, one tensor at a time
        return full.cpu() if torch.distributed.get_rank() == 0 else None
    return tree_map_only(DTensor, collect, (model.state_dict(keep_vars=True), moments))


def load(model: nn.Module, optimizers: list[torch.optim.Optimizer], state: dict) -> None:
    """Give a model and its optimizers, sharded or not, the weights, or those that LoRA trained, and
    the moments of a checkpoint that every rank has opened; rates and decay stay this run's."""
    load_model(model, state.get("adapter") or state["model"], strict="adapter" not in state)
    for optimizer, saved in zip(optimizers, state["optimizer"]):
        params = [p for group in optimizer.param_groups for p in group["params"]]
        moments = {i: {key: split(value, params[i]) for key, value in of_one.items()}
                   for i, of_one in saved["state"].items()}
        groups = [told | {"lr": was["lr"]} for told, was in zip(
            optimizer.state_dict()["param_groups"], saved["param_groups"])]
        optimizer.load_state_dict({"state": moments, "param_groups": groups})


def load_model(model: nn.Module, state: dict[str, Tensor], strict: bool = True) -> None:
    """Give a model, sharded or not, the weights of a checkpoint."""
    for part in parts_of(model):
        part.reshard()  # a call without gradients leaves the embedding and the head gathered
    own = model.state_dict()
    model.load_state_dict({name: split(t, own.get(name)) for name, t in state.items()}, strict)


def split(value: Any, own: Tensor | None) -> Any:
    """This process's part of a tensor in the file, if its `own` weight is but a part."""
    if isinstance(own, DTensor) and isinstance(value, Tensor) and value.shape == own.shape:
        # src_data_rank None: each rank cuts its part out of the file, nothing is sent
        return distribute_tensor(value.to(own.device), own.device_mesh, own.placements,
                                 src_data_rank=None)
    return value

"""
Opens a checkpoint as a model that can write, or as a reward model. The rest may be skipped.
"""
import math
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from kernels import quantised
from model import ModelConfig, RewardModel, Transformer
from plumbing import checkpoint, runtime
from plumbing.adapters import merged, open_state, with_extra
from plumbing.lora import LoraSettings, add_lora, hold
from plumbing.runtime import Dist
from plumbing.terminal import say
from tokenizer import Tokenizer


NO_BF16 = torch.backends.cpu.get_cpu_capability() == "AVX2"
Precision = Literal["auto", "float32", "bfloat16", "int8", "int4"]  # of a model that writes


def load_writer(where: str, device: str, dtype: Precision) -> tuple[Transformer, Tokenizer]:
    """`load_model` for what `--device` and `--dtype` say."""
    place = runtime.setup(device, dtype)
    return load_model(where, place.device, None if dtype == "auto" else place.dtype)


def load_model(where: str, device: torch.device,
               dtype: torch.dtype | None) -> tuple[Transformer, Tokenizer]:
    """Model and tokenizer of a checkpoint, ready to write: in 8 or 4 bits for torch.int8 or int4,
    which can only write, and if dtype is None in what is best. What LoRA trained is added to the
    matrices. Raises ValueError naming the file."""
    state, path = open_writer(where)

    def build(config: ModelConfig) -> Transformer:
        weights = merged(state)
        return quantised.writer(config, weights, dtype, device) or plain(config, weights)
    model, tok = assemble(state, path, build)
    if isinstance(model, quantised.Quantised):
        return model.eval(), tok
    stored = model.norm.weight.dtype if device.type == "cpu" else torch.float32
    kind = dtype or (torch.bfloat16 if device.type == "cuda" else stored)  # stored: stays on disk
    return captured(model.to(device, kind if kind.is_floating_point else torch.float32).eval()), tok


def captured(model: Transformer) -> Transformer:
    """On a GPU the same model, whose steps are recorded, if Triton and a C compiler are there."""
    if model.norm.weight.is_cuda:
        try:
            from kernels import gpu
            return gpu.capture(model)
        except Exception as error:
            say(f"written without kernels/gpu.py, which is slower: {str(error)[:200]}")
    return model


def load_to_train(cfg: LoraSettings) -> tuple[Transformer, Tokenizer]:
    """What a stage starts from, on the CPU: a model in fp32; with --lora_rank a frozen one, its
    matrices as they were stored, and an update to train. Raises ValueError naming the file."""
    if not cfg.lora_rank:
        if cfg.lora_extra or cfg.lora_merge:
            raise ValueError("--lora_extra and --lora_merge belong to LoRA: give --lora_rank")
        return load_model(cfg.init_from, torch.device("cpu"), torch.float32)
    if cfg.lora_extra and cfg.shard:
        raise ValueError("--lora_extra keeps a copy of what it trains, which --shard would take "
                         "apart: give one of the two")
    model, tok = frozen(*open_writer(cfg.init_from), cfg.shard)
    torch.manual_seed(cfg.seed)
    add_lora(model, cfg.lora_rank, cfg.lora_extra)
    return model, tok


def load_reference(cfg: LoraSettings, model: Transformer, dist: Dist) -> Transformer:
    """The `model` as it is before its first step: a frozen copy, from the file that it began from.
    With LoRA it is the model itself, for whoever asks it inside `lora.adapter_off`."""
    from plumbing import sharding  # takes a second, which who only writes need not wait
    if cfg.lora_rank:
        return model
    copy, _ = load_model(cfg.init_from, torch.device("cpu"), torch.float32)
    return sharding.wrap(copy.requires_grad_(False), dist, cfg.shard)


def open_writer(where: str) -> tuple[dict, Path]:
    """As `open_state`. Raises ValueError for a reward model."""
    state, path = open_state(where)
    if state.get("kind") == "rm":
        raise ValueError(f"{path}: a reward model gives scores, it cannot write; give a checkpoint "
                         "of another stage")
    return state, path


def frozen(state: dict, path: Path, shard: bool) -> tuple[Transformer, Tokenizer]:
    """A base, and the updates that it has already beside its matrices, which are held as they were
    stored. Those of one block must be of one type to be sharded: fp32."""
    model, tok = assemble(state, path, lambda config: plain(config, with_extra(state)))
    hold(model.float() if shard else model)
    for adapter in state.get("adapters", []):
        low = {name: t for name, t in adapter.items() if name.endswith((".a", ".b"))}
        add_lora(model, next(len(t) for name, t in low.items() if name.endswith(".a")))
        model.load_state_dict(low, strict=False)
    return model.requires_grad_(False).eval(), tok


def assemble(state: dict, path: Path, build: Callable[[ModelConfig], Transformer]
             ) -> tuple[Transformer, Tokenizer]:
    """Model and tokenizer of a state. Raises ValueError naming the file."""
    try:
        model = build(ModelConfig(**state["model_config"]))
        tok = Tokenizer(state["tokenizer"], str(path))
        if tok.n_vocab > model.config.vocab_size:  # fewer are allowed: some models have spare rows
            raise ValueError(f"{path}: its tokenizer has {tok.n_vocab:,} tokens, its model "
                             f"{model.config.vocab_size:,}")
        model.kind, model.path = state["kind"], str(path)
    except (KeyError, TypeError, AttributeError, RuntimeError) as error:
        if "allocate memory" in str(error):
            raise
        raise ValueError(f"{path}: holds no language model of this program: "
                         f"{str(error)[:200]}") from None
    return model, tok


def plain(config: ModelConfig, weights: dict[str, Tensor]) -> Transformer:
    """A Transformer with these weights, which may be stored in 8 or 4 bits."""
    model = empty(config)
    model.load_state_dict(quantised.unpack(config, weights) if "lm_head.q" in weights else weights,
                          assign=True)
    if config.tied:  # assigning has made two parameters of the one matrix
        model.lm_head.weight = model.embed_tokens.weight
    read_weights_with_all_threads(model)
    return model


def newest_checkpoint(folder: str = "out") -> str:
    """The newest checkpoint in a folder, at any depth, whose model can write: of the user's own
    runs if there is one, else of the demo's. Raises ValueError if there is none."""
    found = [(Path(folder, "demo") not in path.parents, path.stat().st_mtime, path)
             for path in Path(folder).rglob("step*.pt")
             if path.is_file() and checkpoint.NAME.fullmatch(path.name)]
    for *_, path in sorted(found, reverse=True):
        try:
            if checkpoint.load(str(path))[0].get("kind") != "rm":
                return str(path)
        except ValueError as error:
            say(f"{error}; passed over")
    raise ValueError(f"{folder}/ holds no checkpoint that can write: python -m demo makes small "
                     "ones, python train_pt.py one of your own; --checkpoint=FILE names another")


def load_reward_model(where: str, dist: Dist, shard: bool = False) -> tuple[RewardModel, Tokenizer]:
    """A frozen reward model and its tokenizer. Raises ValueError naming the file."""
    from plumbing import sharding  # takes a second, which who only writes need not wait
    state, path = open_state(where)
    if state.get("kind") != "rm":
        raise ValueError(f"{path}: not a reward model, but of stage {state.get('kind')}; "
                         "train_rm.py makes one")
    adapted = "adapters" in state
    backbone, tok = frozen(state, path, shard) if adapted else assemble(state, path, Transformer)
    model = RewardModel(backbone)
    model.load_state_dict(state["adapters"][-1] if adapted else state["model"], strict=not adapted)
    if (float(model.mean), float(model.std)) == (0, 1):  # they are measured at the end of a run
        say(f"WARNING: {path} was saved before its run had ended: its scores are not normalised")
    model.eval().requires_grad_(False)
    return sharding.wrap(model, dist, shard), tok


def empty(config: ModelConfig) -> Transformer:
    """A model whose tensors have shapes and no memory."""
    with torch.device("meta"), Undrawn():
        return Transformer(config)


class Undrawn(TorchFunctionMode):
    """Weights that are about to be loaded are not drawn at random before."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, "__module__", "") == "torch.nn.init":
            return args[0] if args else (kwargs or {})["tensor"]
        return func(*args, **kwargs or {})


def read_weights_with_all_threads(model: nn.Module) -> None:
    """Let every matrix of a model that writes on a CPU multiply few rows as `FewRows` does."""
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = FewRows


class FewRows(nn.Linear):
    """x W^T for few rows x, in fp32 on a CPU. To write one token, all of W is read for a single
    row, and BLAS then reads it with one thread. Splitting W lets every thread read: at one row 3
    times as fast, at 8 still faster (2 cores; `python -m bench --only=decode`). A CPU without
    AVX-512 has no product of bf16 matrices, and of many rows the one in fp32 is faster."""

    def forward(self, x: Tensor) -> Tensor:
        n_out, n_in = self.weight.shape
        rows = x.numel() // n_in
        if rows > 32 and NO_BF16 and self.weight.dtype == torch.bfloat16 and (
                not torch.is_grad_enabled() and x.device.type == "cpu"):
            y = nn.functional.linear(x.float(), self.weight.float())
            return (y if self.bias is None else y + self.bias).to(x.dtype)
        if rows > 32 or torch.is_grad_enabled() or x.device.type != "cpu" or (
                self.weight.dtype != torch.float32):
            return super().forward(x)
        slices = self.weight.view(math.gcd(n_out, torch.get_num_threads()), -1, n_in)
        columns = x.reshape(rows, n_in).t().expand(len(slices), -1, -1)
        y = torch.bmm(slices, columns)  # (threads, n_out / threads, rows)
        y = y.view(n_out, rows).t().reshape(*x.shape[:-1], n_out)
        return y if self.bias is None else y + self.bias

"""
LoRA (Hu et al. 2021): a frozen model and a small update that is trained in its place, see
train_sft.py. The rest may be skipped.

    add_lora(model, rank=16)            # from here on only the update is trained
    with adapter_off(model): ...        # the model without it: a reference that costs no memory

How an update gets into a file, and comes together with its base again: adapters.py.
"""
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from configurator import Natural
from plumbing.runtime import Settings

LORA_ALPHA = 32  # an update is scaled by LORA_ALPHA / rank: by 2 at rank 16, by 4 at rank 8


@dataclass(frozen=True)
class LoraSettings(Settings):
    """What every stage but pre-training can be told of LoRA."""
    lora_rank: Natural = 0  # train an update of this rank for each block matrix; 0: all weights
    lora_extra: bool = False  # LoRA trains norms, embedding and head too, for new special tokens
    lora_merge: bool = False  # LoRA: at the end write the whole model as well, to out_dir/merged


class LowRank(nn.Module):
    """y = W x + LORA_ALPHA / rank B A x. `base`, W (n_out, n_in), is frozen; A (rank, n_in) and B
    (n_out, rank) are trained. B starts at zero, so that the model starts as it was. `base` may be a
    LowRank itself: then W has an update already, of an earlier stage."""

    def __init__(self, base: "nn.Linear | LowRank", rank: int):
        super().__init__()
        self.base, self.scale, self.on = base.requires_grad_(False), LORA_ALPHA / rank, True
        (n_out, n_in), device = base.weight.shape, base.weight.device
        self.a = nn.Parameter(torch.randn(rank, n_in, device=device) / math.sqrt(n_in))
        self.b = nn.Parameter(torch.zeros(n_out, rank, device=device))

    @property
    def weight(self) -> Tensor:
        return self.base.weight

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x)
        return y + F.linear(F.linear(x, self.a) * self.scale, self.b) if self.on else y


def add_lora(model: nn.Module, rank: int, extra: bool = False) -> None:
    """Freeze a Transformer and put a LowRank around every matrix of its blocks. `extra` trains
    copies of its norms, embedding and head as well, without which new special tokens such as
    <|im_start|> stay as they are."""
    model.requires_grad_(False)
    for parent in [m for m in model.layers.modules() if not isinstance(m, LowRank)]:
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear | LowRank):
                setattr(parent, name, LowRank(child, rank))
    model.originals = []
    for module in model.modules() if extra else ():
        whole = isinstance(module, nn.RMSNorm | nn.Embedding) or module is model.lm_head
        if whole and not module.weight.requires_grad:  # a tied head is trained already
            p = module.weight.requires_grad_()
            model.originals.append((p, p.data))
            p.data = p.data.to(torch.float32, copy=True)


def updates(model: nn.Module) -> list[LowRank]:
    """The trained updates of a model, [] of one that is trained itself."""
    return [m for m in model.modules() if isinstance(m, LowRank) and m.b.requires_grad]


@contextmanager
def adapter_off(model: nn.Module) -> Iterator[None]:
    """Inside, a model with an update is the one that it began as. Any other stays as it is."""
    found = updates(model)
    with torch.no_grad():
        switch(model, found)
        try:
            yield
        finally:
            switch(model, found)


def switch(model: nn.Module, found: list[LowRank]) -> None:
    for update in found:
        update.on = not update.on
    originals = getattr(model, "originals", []) if found else []
    for i, (p, other) in enumerate(originals):
        originals[i] = p, p.data
        p.data = other.to(p.device)


# ---------------------------------------------------------------------------- in few bits

class Widen(torch.autograd.Function):
    """x W^T where W has fewer bits than x. The wide copy of W lives only while it multiplies, which
    autograd by itself would keep for the backward pass."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(weight)
        return F.linear(x, weight.to(x.dtype))

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return grad @ ctx.saved_tensors[0].to(grad.dtype), None


class HeldLinear(nn.Linear):
    """A frozen matrix that is held as it was stored."""

    def forward(self, x: Tensor) -> Tensor:
        if self.weight.dtype == x.dtype or torch.is_autocast_enabled(x.device.type):
            return super().forward(x)
        y = Widen.apply(x, self.weight)
        return y if self.bias is None else y + self.bias


class HeldEmbedding(nn.Embedding):
    def forward(self, idx: Tensor) -> Tensor:
        return super().forward(idx).float()


def hold(model: nn.Module) -> None:
    """Let a frozen model of bf16 matrices compute in fp32. Its vectors become fp32."""
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Embedding) and module.weight.dtype != torch.float32:
            module.__class__ = HeldLinear if isinstance(module, nn.Linear) else HeldEmbedding
    for p in model.parameters():
        if p.dim() == 1:
            p.data = p.data.float()

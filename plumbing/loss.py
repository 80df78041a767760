"""
-log P of tokens without ever holding all logits, for `model.token_logps`; may be skipped.

torch's `linear_cross_entropy` does that, but on a CPU it multiplies in fp32 whatever it is given.
Under autocast `Nats` multiplies in bf16, in 0.6 of the time. Compiled it is faster on a GPU, too.
"""
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LOGITS, LEAST = 1 << 22, 64  # that `Nats` holds at a time, and of so many rows at least


def token_nats(hidden: Tensor, head: Tensor, targets: Tensor, summed: bool) -> Tensor:
    """-log P of each target, (N,), or their sum; 0 for one below 0. hidden (N, C), head (V, C)."""
    scored = (targets >= 0).nonzero()[:, 0]  # in SFT a tenth: prompts and padding need no logits
    x, y = hidden.index_select(0, scored), targets[scored]
    worth = x.device.type == "cpu" or Nats.gradient is not gradient  # on a GPU if it is compiled
    if worth and torch.is_autocast_enabled(x.device.type):
        nats = Nats.apply(x, head, y, summed, torch.is_grad_enabled())
    else:
        nats = F.linear_cross_entropy(x, head.to(x.dtype), y, options=rows_at_once(head),
                                      reduction="sum" if summed else "none")
    return nats if summed else nats.new_zeros(len(targets)).index_copy(0, scored, nats)


def rows_at_once(head: Tensor) -> nn.LinearCrossEntropyOptions:
    """How many rows of logits torch holds at a time: 32 MB of them on a CPU are 1.3 to 5 times as
    fast as its own choice, 0.5 GB on a GPU twice as fast."""
    most, least = ((1 << 27), 128) if head.device.type == "cuda" else ((1 << 23), 1)
    return nn.LinearCrossEntropyOptions(batch_chunk_size=max(least, most // len(head)))


class Nats(torch.autograd.Function):
    """What `token_nats` says, in bf16. The gradients of a sum are computed while its logits are
    there; other gradients need the logits once more. `sharding.wrap` may compile `gradient`."""
    gradient: Callable[..., tuple[Tensor, Tensor]]

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Tensor, targets: Tensor, summed: bool,
                learning: bool) -> Tensor:
        low, ctx.summed = (hidden.bfloat16(), head.bfloat16(), targets), summed
        ones = hidden.new_ones(len(hidden), dtype=torch.float32) if summed and learning else None
        nats, *gradients = portions(*low, ones, ctx.needs_input_grad[1])
        if learning:
            ctx.save_for_backward(*(gradients if summed else low))
        return nats.sum() if summed else nats

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        learns = ctx.needs_input_grad[1]
        if ctx.summed:
            d_hidden, d_head = (t.mul_(g) for t in ctx.saved_tensors)
        else:
            hidden, head, targets = ctx.saved_tensors
            _, d_hidden, d_head = portions(hidden, head, targets, g, learns)
        return d_hidden, d_head if learns else None, None, None, None


def gradient(logits: Tensor, target: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """-log P of each target, (N,), and its gradient times `scale`, (N, V): P, less 1 there. It is
    written over the logits."""
    logps = logits.log_softmax(-1, dtype=torch.float32)
    logp = logps.gather(1, target)
    torch.mul(logps.exp_(), scale, out=logits)
    return -logp[:, 0], logits.scatter_(1, target, (logp.expm1() * scale).to(logits.dtype))


Nats.gradient = staticmethod(gradient)


def portions(hidden: Tensor, head: Tensor, targets: Tensor, scale: Tensor | None,
             learns: bool) -> tuple[Tensor, Tensor, Tensor]:
    """-log P of each target in fp32, and the gradients of `scale` (N,) times them: that of hidden,
    and that of the head, in fp32, if it `learns`. Without `scale` there are no gradients."""
    nats = torch.empty(len(hidden), device=head.device)
    d_hidden = torch.empty_like(hidden)
    d_head = torch.zeros(head.shape if learns else 0, device=head.device)
    rows = max(LEAST, LOGITS * (64 if head.is_cuda else 1) // len(head))
    for i in range(0, len(hidden), rows):
        some = slice(i, i + rows)
        x = hidden[some]
        logits = x @ head.t()  # (rows, V)
        if scale is None:
            nats[some] = F.cross_entropy(logits.float(), targets[some], reduction="none")
        else:
            nats[some], p = Nats.gradient(logits, targets[some, None], scale[some, None])
            torch.mm(p, head, out=d_hidden[some])
            if learns:
                if d_head.is_cuda:  # adds in fp32, and in the product itself
                    torch.addmm(d_head, p.t(), x, out_dtype=torch.float32, out=d_head)
                else:
                    d_head += p.t() @ x
    return nats, d_hidden, d_head

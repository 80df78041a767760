"""
-log P of tokens without ever holding all logits, for `model.token_logps`; may be skipped.

torch's `linear_cross_entropy` does that, but on a CPU it multiplies in fp32 whatever it is given.
Under autocast `Nats` multiplies in bf16 there, in 0.6 of the time.
"""
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LOGITS, LEAST = 1 << 22, 64  # that `Nats` holds at a time, and of so many rows at least


def token_nats(hidden: Tensor, head: Tensor, targets: Tensor, summed: bool) -> Tensor:
    """-log P of each target, (N,), or their sum; 0 for one below 0. hidden (N, C), head (V, C)."""
    if hidden.device.type == "cpu" and torch.is_autocast_enabled("cpu"):
        scored = targets >= 0  # in SFT a tenth: prompts and padding need no logits
        nats = Nats.apply(hidden[scored], head, targets[scored], summed, torch.is_grad_enabled())
        return nats if summed else nats.new_zeros(len(targets)).masked_scatter(scored, nats)
    return F.linear_cross_entropy(hidden, head.to(hidden.dtype), targets,
                                  reduction="sum" if summed else "none",
                                  options=rows_at_once(head))


def rows_at_once(head: Tensor) -> nn.LinearCrossEntropyOptions:
    """How many rows of logits torch holds at a time. 0.5 GB of them on a GPU are twice as fast as
    its own choice (30 instead of 63 ms for 8,192 tokens, H100), 32 MB on a CPU 1.3 to 5 times."""
    most, least = ((1 << 27), 128) if head.device.type == "cuda" else ((1 << 23), 1)
    return nn.LinearCrossEntropyOptions(batch_chunk_size=max(least, most // len(head)))


class Nats(torch.autograd.Function):
    """What `token_nats` says, in bf16. The gradients of a sum are computed while its logits are
    there; other gradients need the logits once more."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Tensor, targets: Tensor, summed: bool,
                learning: bool) -> Tensor:
        low, ctx.summed = (hidden.bfloat16(), head.bfloat16(), targets), summed
        ones = torch.ones(len(hidden)) if summed and learning else None
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


def portions(hidden: Tensor, head: Tensor, targets: Tensor, scale: Tensor | None,
             learns: bool) -> tuple[Tensor, Tensor, Tensor]:
    """-log P of each target in fp32, and the gradients of `scale` (N,) times them: that of hidden,
    and that of the head, in fp32, if it `learns`. Without `scale` there are no gradients."""
    nats = torch.empty(len(hidden))
    d_hidden, d_head = torch.empty_like(hidden), torch.zeros(head.shape if learns else 0)
    rows = max(LEAST, LOGITS // len(head))
    for i in range(0, len(hidden), rows):
        some = slice(i, i + rows)
        x, target = hidden[some], targets[some, None]
        logits = (x @ head.t()).float()  # (rows, V)
        log_sum = logits.logsumexp(-1, keepdim=True)
        nats[some] = (log_sum - logits.gather(1, target))[:, 0]
        if scale is not None:
            p = logits.sub_(log_sum).exp_()
            p.scatter_add_(1, target, -torch.ones(target.shape))  # the gradient is P, less 1 there
            p = p.mul_(scale[some, None]).to(x.dtype)
            torch.mm(p, head, out=d_hidden[some])
            if learns:
                d_head += p.t() @ x
    return nats, d_hidden, d_head

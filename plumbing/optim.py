"""
Optimizers and their learning rate: AdamW, or Muon for the matrices. The rest may be skipped.
"""
import math

import torch
from torch import nn

from plumbing.runtime import Settings


def make_optimizers(model: nn.Module, cfg: Settings) -> list[torch.optim.Optimizer]:
    """AdamW for all trained parameters, or Muon (Jordan et al. 2024) for the matrices inside the
    blocks and AdamW for the rest. Matrices decay, except an untied embedding: rows of rare tokens
    would shrink to nothing. Each group keeps its full learning rate as `base`."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    muon = {name: p for name, p in trained.items()
            if cfg.optimizer == "muon" and "layers." in name and p.dim() == 2}
    # a tied head is the embedding by another name, which named_parameters leaves out
    untied = any("lm_head" in name for name, _ in model.named_parameters())
    rest = {name: p for name, p in trained.items() if name not in muon}
    decay = {name for name, p in rest.items()
             if p.dim() == 2 and not (untied and "embed_tokens" in name)}
    groups = [{"params": [p for name, p in rest.items() if (name in decay) == yes],
               "weight_decay": cfg.weight_decay * yes, "base": cfg.learning_rate}
              for yes in (True, False)]
    optimizers: list[torch.optim.Optimizer] = [torch.optim.AdamW(
        groups, lr=cfg.learning_rate, betas=(cfg.adam_beta1, cfg.adam_beta2), fused=True)]
    if muon:
        group = {"params": [*muon.values()], "base": cfg.muon_lr}
        optimizers.append(torch.optim.Muon([group], cfg.muon_lr, cfg.weight_decay))
    return optimizers


def lr_factor(step: int, max_steps: int, warmup: int, schedule: str, final: float,
              decay: float) -> float:
    """What the full learning rate is multiplied by at a step. After a linear warm-up it follows a
    cosine down to `final`; or, with "wsd" (warm-up, stable, decay; Hu et al. 2024), it stays level
    and falls in a line to `final` over the last share `decay` of the steps."""
    if step < warmup:
        return (step + 1) / warmup
    if schedule == "cosine":
        t = (step - warmup) / max(1, max_steps - warmup)
        return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * min(1.0, t)))
    t = (step - (1 - decay) * max_steps) / max(1.0, decay * max_steps)
    return 1 - (1 - final) * min(1.0, max(0.0, t))


def set_learning_rate(optimizers: list[torch.optim.Optimizer], cfg: Settings, step: int,
                      max_steps: int) -> float:
    """Give every optimizer the rate of this step. Returns that of AdamW, for the log."""
    factor = lr_factor(step, max_steps, cfg.warmup_steps, cfg.schedule, cfg.final_lr,
                       cfg.decay_fraction)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["base"] * factor
    return factor * cfg.learning_rate

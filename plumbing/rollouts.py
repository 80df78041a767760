"""
Reads the replies of a rollout, and knows what often goes wrong in RL. The rest may be skipped.
"""
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from model import RewardModel, Transformer, token_logps
from plumbing import sharding
from plumbing.examples import Row, in_batches, pad_right
from plumbing.runtime import Dist
from plumbing.scoring import score_rows


@torch.no_grad()
def row_logps(model: Transformer, rows: list[Row], batch_size: int, dist: Dist) -> Tensor:
    """(B, T) log P of the tokens of each reply by a full pass, on the CPU, where `pad_right` has
    the targets of all rows; 0 elsewhere."""
    found, longest = [], max(len(row.ids) for row in rows)
    for some in in_batches(rows, batch_size):
        idx, targets, _ = (t.to(dist.device) for t in pad_right(list(some), 0))
        with dist.autocast():
            logps = token_logps(model(idx, hidden=True), model.lm_head.weight, targets)
        found.append(F.pad(logps.cpu(), (0, longest - idx.size(1))))
    return torch.cat(found)


@torch.no_grad()
def row_scores(reward: RewardModel, rows: list[Row], batch_size: int, dist: Dist) -> Tensor:
    """(B,) scores of a reward model, on the CPU."""
    return torch.cat([score_rows(reward, list(some), dist).cpu()
                      for some in in_batches(rows, batch_size)])


def all_max(dist: Dist, value: float) -> float:
    """The largest value of all ranks."""
    if dist.world == 1:
        return value
    found = torch.tensor(value, dtype=torch.float64, device=dist.device)
    torch.distributed.all_reduce(found, torch.distributed.ReduceOp.MAX)
    return float(found)


def same_weights(model: Transformer, dist: Dist) -> None:
    """Raises RuntimeError if the processes no longer hold the same weights."""
    with sharding.unsharded(model, dist):
        own = sum(float(p.detach().sum()) for p in model.parameters())
    if all_max(dist, own) != -all_max(dist, -own):
        raise RuntimeError("the processes no longer hold the same weights")


def warnings(start: dict, now: dict, mean: dict, kl_budget: float, dist: Dist) -> list[str]:
    """What goes wrong, told from validations at the start and now and from the last rollout."""
    found = []
    if mean["mismatch"] > (1e-3 if dist.dtype == torch.float32 else 0.1):
        found.append(f"sampling and training disagree by {mean['mismatch']:.4f} nats on a token")
    if mean["equal"] > 0.5:
        found.append(f"in {mean['equal']:.0%} of the groups all replies have the same reward: they "
                     "teach nothing")
    if now["kl"] > kl_budget:
        found.append(f"KL {now['kl']:.2f} is over the budget of {kl_budget}: raise --beta")
    if now["kl"] < -3 * now["kl_error"]:
        found.append(f"KL {now['kl']:.3f} is below 0: what is sampled from is not what is scored")
    if "best" in now and now["J"] > now["best"] + 3 * math.hypot(now["J_error"], now["best_error"]):
        found.append(f"J {now['J']:.2f} is over the {now['best']:.2f} that any policy can reach: "
                     "the KL or the reward is not what it should be")
    if now["ended"] < 0.95:
        found.append(f"only {now['ended']:.0%} of the replies end by themselves")
    if not 0.5 <= now["length"] / start["length"] <= 1.5:
        found.append(f"replies went from {start['length']:.0f} to {now['length']:.0f} tokens")
    return found

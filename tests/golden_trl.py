"""Writes golden_trl.json: inputs, and what the loss code of TRL makes of them.

TRL is a second source for the formulas of train_rm.py, train_dpo.py and train_rl.py and no
dependency: this script runs in an environment of its own, test_losses.py reads what it wrote.
Made with trl 1.16.0, transformers 5.23.0 and torch 2.13.0 on the CPU:

    pip install trl==1.16.0 transformers==5.23.0
    python tests/golden_trl.py

Methods of TRL's trainers are called with a stand-in for `self` that holds the attributes they
read; models and samplers are functions that return given numbers, in float64. What is not TRL's:
the sum of old log P that RLOO's loss takes, the log-ratios that CPOTrainer's loss takes for cDPO
(gone from DPOTrainer), and the mean over its pairs. No KL: beta is 0 in RLOO and GRPO."""
import json
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import accelerate
import torch
import torch.nn.functional as F
import transformers
import trl
from torch import Tensor
from trl.experimental.cpo import CPOTrainer

B, T = 4, 7
rng = torch.Generator().manual_seed(0)
accelerator = accelerate.Accelerator(cpu=True)


def numbers(*shape: int, low: float = -3.0, high: float = 0.0) -> Tensor:
    """Uniform, with 6 decimals: the JSON says exactly what TRL got."""
    x = low + (high - low) * torch.rand(*shape, generator=rng, dtype=torch.float64)
    return x.round(decimals=6)


def reply_mask() -> Tensor:
    """(B, T), 1 on replies of 2 to 7 tokens that start at token 0, 1 or 2."""
    start, end = (torch.randint(*ends, (B, 1), generator=rng) for ends in ((0, 3), (4, T + 1)))
    return ((start <= torch.arange(T)) & (torch.arange(T) < end)).long()


def pairs() -> dict[str, Tensor]:
    x = {k: numbers(B, T) for k in ("chosen", "rejected", "ref_chosen", "ref_rejected")}
    return {**x, "chosen_mask": reply_mask(), "rejected_mask": reply_mask()}


def replies() -> dict[str, Tensor]:
    """Row 0 is clipped from above, row 1 from below, the others hardly."""
    old, change = numbers(B, T), numbers(B, T, low=-0.3, high=0.3)
    change[:2] += torch.tensor([[0.4], [-0.4]])
    return {"logps": (old + change).round(decimals=6), "old_logps": old, "mask": reply_mask(),
            "advantage": torch.tensor([1.3, -0.7, -1.6, 0.9], dtype=torch.float64)}


def stand_in(**attributes) -> SimpleNamespace:
    """The `self` of a trainer."""
    return SimpleNamespace(
        model=SimpleNamespace(training=True, is_gradient_checkpointing=False),
        accelerator=accelerator, _metrics={"train": defaultdict(list)}, _total_train_tokens=0,
        _tp_size=1, aux_loss_enabled=False, use_vllm=False, alpha=0.0, **attributes)


def dpo(x: dict[str, Tensor], nll_coef: float, loss: str, beta: float) -> Tensor:
    def model_of(logps: Tensor):
        def model(labels: Tensor, **_) -> SimpleNamespace:  # TRL's models give 0 where it is -100
            zeros = torch.zeros_like(logps)
            return SimpleNamespace(log_probs=logps.where(labels[:, 1:] != -100, zeros),
                                   entropy=zeros, mean_logits=zeros, is_top1=zeros.bool())
        return model
    policy = model_of(torch.cat([x["chosen"], x["rejected"]]))
    reference = model_of(torch.cat([x["ref_chosen"], x["ref_rejected"]]))
    mask = F.pad(torch.cat([x["chosen_mask"], x["rejected_mask"]]), (1, 0))  # token 0: no target
    self = stand_in(
        ref_model=reference, precompute_ref_logps=False, ld_alpha=None, use_weighting=False,
        f_divergence_type="reverse_kl", label_smoothing=0.0, loss_types=[loss, "sft"], beta=beta,
        loss_weights=[1.0, nll_coef], args=SimpleNamespace(gradient_checkpointing_kwargs=None))
    inputs = {"input_ids": torch.zeros_like(mask), "attention_mask": torch.ones_like(mask)}
    return trl.DPOTrainer._compute_loss(self, policy, {**inputs, "completion_mask": mask}, False)


def cpo(x: dict[str, Tensor], nll_coef: float, loss: str, beta: float, label_smoothing: float = 0.0,
        gamma: float = 0.0) -> Tensor:
    """SimPO and, as "sigmoid" of log-ratios, cDPO."""
    def logps(name: str, mask: Tensor) -> Tensor:
        """(B,) means for SimPO, else sums. TRL wants logits and gets those of a vocabulary of two,
        where token 0 is the one that was written."""
        logits = torch.stack([x[name], torch.log(-torch.expm1(x[name]))], -1)
        labels = F.pad(torch.where(mask == 1, 0, -100), (1, 0), value=-100)
        return CPOTrainer.get_batch_logps(F.pad(logits, (0, 0, 0, 1)), labels, loss == "simpo")
    chosen, rejected = (logps(k, x[k + "_mask"]) for k in ("chosen", "rejected"))
    if loss == "sigmoid":
        chosen = chosen - logps("ref_chosen", x["chosen_mask"])
        rejected = rejected - logps("ref_rejected", x["rejected_mask"])
    assert nll_coef == 0
    self = stand_in(loss_type=loss, beta=beta, label_smoothing=label_smoothing, simpo_gamma=gamma)
    return CPOTrainer.cpo_loss(self, chosen, rejected)[0].mean()


def rm(x: dict[str, Tensor], center_coef: float) -> Tensor:
    scores = torch.cat([x["chosen"], x["rejected"]])[:, None]
    self = stand_in(args=SimpleNamespace(center_rewards_coefficient=center_coef))
    return trl.RewardTrainer.compute_loss(self, lambda **_: SimpleNamespace(logits=scores), {
        "attention_mask": torch.ones_like(scores), "margin": x["margin"]})


def rl(x: dict[str, Tensor], eps_low: float, eps_high: float, per_token: bool) -> Tensor:
    scored = x["logps"], torch.zeros_like(x["logps"]), None
    self = stand_in(
        _get_per_token_logps_and_entropies=lambda *_, **__: scored, epsilon_low=eps_low,
        epsilon_high=eps_high, beta=0.0, loss_type="grpo", importance_sampling_level="token",
        top_entropy_quantile=1.0, off_policy_mask_threshold=None, _entropy_bonus_enabled=False,
        args=SimpleNamespace(delta=None), current_gradient_accumulation_steps=1)
    ids = torch.zeros_like(x["mask"])
    loss = (trl.GRPOTrainer if per_token else trl.RLOOTrainer)._compute_loss(self, None, {
        "prompt_ids": ids, "prompt_mask": ids, "completion_ids": ids, "completion_mask": x["mask"],
        "old_logps": (x["old_logps"] * x["mask"]).sum(1), "old_per_token_logps": x["old_logps"],
        "advantages": x["advantage"]})
    assert all(self._metrics["train"][f"clip_ratio/{k}_mean"][0] > 0 for k in ("low", "high"))
    return loss


def advantages(x: dict[str, Tensor], kind: str) -> Tensor:
    """Inside the method that samples and scores; the replies are of one token."""
    n, G = x["rewards"].numel(), x["rewards"].size(1)
    ids, texts, zeros = [[0]] * n, [""] * n, torch.zeros(n, 1)
    trainer, written = (trl.RLOOTrainer, (ids, ids, texts)) if kind == "rloo" else (
        trl.GRPOTrainer, (ids, ids, None, texts, None, {}, None, None))
    self = stand_in(
        _generate=lambda _: written, _calculate_rewards=lambda *_: x["rewards"].view(n, 1),
        _get_per_token_logps_and_entropies=lambda *_, **__: (zeros, zeros, None),
        num_generations=G, scale_rewards="group" if kind == "grpo" else "none", beta=0.0,
        normalize_advantages=False, multi_objective_aggregation="sum_then_normalize",
        reward_weights=torch.ones(1), reward_func_names=["reward"], reward_clip_range=None,
        environment_factories=None, environments=None, tools=None, mask_truncated_completions=False,
        pad_to_multiple_of=None, num_iterations=1, _pending_extra_logs={}, _pending_metrics={},
        _logs=defaultdict(list, rewards={"reward": []}), _tokenizer=SimpleNamespace(pad_token_id=0),
        args=SimpleNamespace(per_device_train_batch_size=n, gradient_checkpointing_kwargs=None,
                             gradient_accumulation_steps=1, steps_per_generation=1))
    return trainer._generate_and_score_completions(self, [{"prompt": ""}] * n)["advantages"]


scored = {"chosen": numbers(B), "rejected": numbers(B), "margin": numbers(B, low=0.0, high=2.0)}
# wide apart, equal, and so close that the 1e-4 beside the deviation matters
rewards = torch.stack([numbers(4), torch.ones(4), 1e-4 * numbers(4)]).round(decimals=6)
clip, no_nll = dict(eps_low=0.2, eps_high=0.28), dict(nll_coef=0.0)
CASES = [  # name, kind, TRL, inputs, settings of our loss, what the trainer adds to it
    ("sigmoid", "dpo", dpo, pairs(), dict(loss="sigmoid", beta=0.3), no_nll),
    ("sigmoid and nll", "dpo", dpo, pairs(), dict(loss="sigmoid", beta=0.1), dict(nll_coef=0.2)),
    ("ipo", "dpo", dpo, pairs(), dict(loss="ipo", beta=0.2), no_nll),
    ("cdpo", "dpo", cpo, pairs(), dict(loss="sigmoid", beta=0.3, label_smoothing=0.1), no_nll),
    ("simpo", "dpo", cpo, pairs(), dict(loss="simpo", beta=2.0, gamma=1.2), no_nll),
    ("margin and centring", "rm", rm, scored, dict(center_coef=0.05), {}),
    ("rloo", "rl", rl, replies(), dict(clip, per_token=False), {}),
    ("grpo", "rl", rl, replies(), dict(clip, per_token=True), {}),
    *((f"advantages {kind}", "adv", advantages, {"rewards": rewards}, dict(kind=kind), {})
      for kind in ("rloo", "grpo", "grpo_mean")),
]

if __name__ == "__main__":
    cases = [{"name": name, "kind": kind, "settings": settings, **more,
              "inputs": {k: v.tolist() for k, v in x.items()},
              "result": of_trl(x, **settings, **more).tolist()}
             for name, kind, of_trl, x, settings, more in CASES]
    versions = json.dumps({m.__name__: m.__version__ for m in (trl, torch, transformers)})
    rows = ",\n".join(map(json.dumps, cases))
    Path(__file__).with_suffix(".json").write_text(
        f'{{"versions": {versions},\n"cases": [\n{rows}]}}\n')

"""
GRPO on the models of the demo, with two updates from each rollout and a clip that is wider above
than below (DAPO, Yu et al. 2025). 2 CPU cores, a few minutes.

    python train_rl.py config/rl_grpo.py

In the second update the policy has moved: a token that has become 1.28 times as likely as when it
was written, or 0.8 times, is pushed no further. Watch `clipped`, the share of replies in which that
happens: a few percent here, none with one update, half with --updates_per_rollout=8.
"""
init_from = "out/demo/sft"
reward_from = "out/demo/rm"
data = "out/demo/world/prompts.jsonl"
out_dir = "out/grpo/rl"

advantage = "grpo"
eps_high = 0.28
updates_per_rollout = 2
beta = 0.25
prompts_per_step = 16
batch_size = 64
answer_tokens = 48
max_steps = 50
learning_rate = 3e-4
warmup_steps = 5
eval_every = 10
eval_prompts = 400
save_every = 50

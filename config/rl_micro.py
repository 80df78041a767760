"""
The demo's reinforcement learning: 100 steps of 16 questions, each answered 8 times.
2 CPU cores, about 2 minutes.

At beta = 0.2 a KL of 1.71 nats a reply was worth its price, more than the budget, since the reward
model sees wrong values; 0.3 left a third of the budget unused.

    python train_rl.py config/rl_micro.py
"""
init_from = "out/demo/sft"
reward_from = "out/demo/rm"
data = "out/demo/world/prompts.jsonl"
out_dir = "out/demo/rl"

beta = 0.25
kl_budget = 1.59
group = 8
prompts_per_step = 16
batch_size = 64
answer_tokens = 48
max_steps = 100
learning_rate = 3e-4
warmup_steps = 5
eval_every = 20
eval_prompts = 400
save_every = 20
log_every = 5

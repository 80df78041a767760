"""
The demo's reinforcement learning: 60 steps of 16 questions, each answered 8 times. 2 CPU
cores, about 2 minutes: reward +1.36 sd, KL 1.56 nats a reply.

    python train_rl.py config/rl_micro.py
"""
init_from = "out/demo/sft"
reward_from = "out/demo/rm"
data = "out/demo/world/prompts.jsonl"
val_data = "out/demo/world/prompts_heldout.jsonl"
out_dir = "out/demo/rl"

beta = 0.2
kl_budget = 1.59
group = 8
prompts_per_step = 16
batch_size = 64
answer_tokens = 48
max_steps = 60
learning_rate = 3e-4
warmup_steps = 5
eval_every = 20
eval_prompts = 400
save_every = 20
log_every = 5

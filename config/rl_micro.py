"""
The demo's reinforcement learning: 16 questions a step, 8 replies each. 2 CPU cores, 2 to 3 minutes.

    python train_rl.py config/rl_micro.py

beta is the price of a nat of KL, and the demo allows 1.59 nats a reply: log 4 puts all mass on one
of the four styles, and 0.2 remain. At beta = 0.25 two seeds spent 1.23 and 1.40.
"""
init_from = "out/demo/sft"
reward_from = "out/demo/rm"
data = "out/demo/world/prompts.jsonl"
out_dir = "out/demo/rl"

beta = 0.25
kl_budget = 1.59
prompts_per_step = 16
batch_size = 64
answer_tokens = 48
max_steps = 100
learning_rate = 3e-4
warmup_steps = 5
eval_prompts = 400
dtype = "float32"  # a model 64 wide does not gain by bfloat16

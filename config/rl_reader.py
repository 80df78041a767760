"""
The reader's reinforcement learning with the reward of config/reward_reader.py. 2 CPU cores, 10
minutes. The model learns to invent less, and to refuse more of what is there (docs/results.md).

    python -m demo.reader --until=rl --init_from=…        says the whole command
"""
init_from = "out/reader/dpo/merged"
reward_from = "config/reward_reader.py"
data = "out/reader/data/prompts.jsonl"
out_dir = "out/reader/rl"

lora_rank = 16
lora_merge = True
beta = 0.02
group = 4
prompts_per_step = 16
batch_size = 16
rollout_size = 64
answer_tokens = 40
max_steps = 10
learning_rate = 2e-4
warmup_steps = 2
eval_every = 1000
eval_prompts = 32
log_every = 1

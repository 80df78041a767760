"""
RL on the sums of `python -m demo.sums`, judged by a reward file. 2 CPU cores, a minute.

    python train_rl.py config/rl_sums.py
"""
init_from = "out/sums/sft"
reward_from = "config/reward_numbers.py"
data = "out/sums/data/prompts.jsonl"
val_data = "out/sums/data/prompts_heldout.jsonl"
out_dir = "out/sums/rl"

advantage = "grpo"
beta = 0.02
prompts_per_step = 32
batch_size = 64
answer_tokens = 6
max_steps = 40
learning_rate = 5e-4
warmup_steps = 5
eval_prompts = 200

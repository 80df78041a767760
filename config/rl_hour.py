"""
Reinforcement learning of the model of config/sft_hour.py. 2 CPU cores, a quarter of an hour.

    python train_rl.py config/rl_hour.py --data=pairs.jsonl

A file of pairs serves as a file of prompts. The reward model is small and easily fooled: the model
learns to end its answers, not to please (docs/results.md).
"""
init_from = "out/real/sft"
reward_from = "out/real/rm"
out_dir = "out/real/rl"

beta = 0.1
group = 4
prompts_per_step = 16
answer_tokens = 96
max_steps = 40
learning_rate = 1e-4
eval_prompts = 200

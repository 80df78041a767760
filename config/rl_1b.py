"""
Reinforcement learning of the 1B SFT model on the 1B reward model.

    torchrun --nproc_per_node=8 train_rl.py config/rl_1b.py --data=prompts.jsonl

For a node of 8 GPUs with 80 GB; not tried. Each GPU holds policy, reference and reward model at
once, 24 GB before activations.
"""
init_from = "out/1b/sft"
reward_from = "out/1b/rm"
out_dir = "out/1b/rl"

beta = 0.05
group = 8
prompts_per_step = 64
batch_size = 8
rollout_size = 64
answer_tokens = 512
max_steps = 200
learning_rate = 1e-6
warmup_steps = 10

"""
Reinforcement learning of the 1B SFT model, for a node of 8 GPUs with 80 GB; not tried.

    torchrun --nproc_per_node=8 train_rl.py config/rl_1b.py --data=prompts.jsonl

Each GPU holds policy, reference and reward model at once, 24 GB before activations.
"""
init_from = "out/1b/sft"
reward_from = "out/1b/rm"
out_dir = "out/1b/rl"

batch_size = 8
rollout_size = 64
answer_tokens = 512

"""
The reward model on top of the 1B SFT model, for a node of 8 GPUs with 80 GB; not tried.

    torchrun --nproc_per_node=8 train_rm.py config/rm_1b.py --data=pairs.jsonl

Every pair is seen once: a second time usually overfits.
"""
init_from = "out/1b/sft"
out_dir = "out/1b/rm"

batch_size = 4
warmup_steps = 10
answer_tokens = 256

"""
The reward model on top of the 1B SFT model.

    torchrun --nproc_per_node=8 train_rm.py config/rm_1b.py --data=pairs.jsonl

For a node of 8 GPUs with 80 GB; not tried. Every pair is seen once: a second time usually overfits.
"""
init_from = "out/1b/sft"
out_dir = "out/1b/rm"

batch_pairs = 64
batch_size = 4
epochs = 1.0
learning_rate = 1e-5
warmup_steps = 10
eval_every = 100
answer_tokens = 256

"""
Preference optimisation of the 1B SFT model.

    torchrun --nproc_per_node=8 train_dpo.py config/dpo_1b.py --data=pairs.jsonl

For a node of 8 GPUs with 80 GB; not tried. If the margin does not grow, raise the rate: 3e-7 to
1e-6 is usual. If the chosen replies become less likely, set nll_coef = 0.2.
"""
init_from = "out/1b/sft"
out_dir = "out/1b/dpo"

beta = 0.1
batch_pairs = 64
batch_size = 4
epochs = 1.0
learning_rate = 5e-7
warmup_steps = 20
eval_every = 50
answer_tokens = 256

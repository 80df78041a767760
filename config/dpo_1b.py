"""
Preference optimisation of the 1B SFT model, for a node of 8 GPUs with 80 GB; not tried.

    torchrun --nproc_per_node=8 train_dpo.py config/dpo_1b.py --data=pairs.jsonl

If the margin does not grow, raise the rate: 3e-7 to 1e-6 is usual. If the chosen replies become
less likely, set nll_coef = 0.2.
"""
init_from = "out/1b/sft"
out_dir = "out/1b/dpo"

batch_size = 4
warmup_steps = 20
answer_tokens = 256

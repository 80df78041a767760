"""
Preference optimisation of the model of config/sft_hour.py. 2 CPU cores, a quarter of an hour.

    python train_dpo.py config/dpo_hour.py --data=pairs.jsonl

A model this small cannot tell the replies apart: the margin hardly moves (docs/results.md).
"""
init_from = "out/real/sft"
out_dir = "out/real/dpo"

nll_coef = 0.2
batch_pairs = 32
batch_size = 16
max_steps = 100
learning_rate = 5e-5
answer_tokens = 96
save_every = 50

"""
Preference optimisation of the model of config/sft_hour.py, from real pairs. 2 CPU cores, a quarter
of an hour.

    python train_dpo.py config/dpo_hour.py --data=pairs.jsonl

The margin on held-out pairs hardly moves: a model this small cannot tell the replies apart
(docs/results.md).
"""
init_from = "out/real/sft"
out_dir = "out/real/dpo"

beta = 0.1
nll_coef = 0.2
batch_pairs = 32
batch_size = 16
max_steps = 100
learning_rate = 5e-5
eval_every = 50
answer_tokens = 96
save_every = 50

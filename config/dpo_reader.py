"""
The reader's preferences: what is right against the mistakes of the model. 2 CPU cores, 6 minutes.

    python -m demo.reader --init_from=…        says the whole command

nll_coef keeps the right replies as likely as they were: else both sides of a pair get less likely.
"""
init_from = "out/reader/sft/merged"
data = "out/reader/data/pairs_160.jsonl"
out_dir = "out/reader/dpo"

lora_rank = 16
lora_merge = True
nll_coef = 0.2
batch_pairs = 16
learning_rate = 4e-4
warmup_steps = 2
eval_every = 1000
eval_samples = 0
log_every = 2

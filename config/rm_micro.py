"""
The demo's reward model: 8,000 pairs whose labels were drawn from known scores.

    python train_rm.py config/rm_micro.py
"""
init_from = "out/demo/sft"
data = "out/demo/world/pairs.jsonl"
val_data = "out/demo/world/pairs_heldout.jsonl"
out_dir = "out/demo/rm"

batch_pairs = 32
batch_size = 32
max_steps = 250
learning_rate = 1e-3
warmup_steps = 10
eval_every = 125
answer_tokens = 48
save_every = 125
log_every = 25

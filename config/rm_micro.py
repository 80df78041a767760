"""
The demo's reward model: 16,000 pairs whose labels were drawn from known scores. 2 CPU cores, about
2 minutes. It learns the styles (100 %) and not yet the values (51 %).

    python train_rm.py config/rm_micro.py
"""
init_from = "out/demo/sft"
data = "out/demo/world/pairs.jsonl"
val_data = "out/demo/world/pairs_heldout.jsonl"
out_dir = "out/demo/rm"

batch_pairs = 32
batch_size = 32
max_steps = 500
learning_rate = 1e-3
warmup_steps = 10
eval_every = 250
answer_tokens = 48
save_every = 250
log_every = 25

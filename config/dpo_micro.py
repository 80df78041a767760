"""
The demo's preference optimisation, on pairs of the reward model's world. 2 CPU cores, about
4 minutes.

With beta = 0.1 the replies that were learnt are good and their neighbours garbled: 70 to 75 % wins
and up to 4 points of right answers lost, at any rate and with or without a likelihood term. With
0.5 it is 75 % and nothing lost.

    python train_dpo.py config/dpo_micro.py
"""
init_from = "out/demo/sft"
data = "out/demo/world/pairs.jsonl"
val_data = "out/demo/world/pairs_heldout.jsonl"
out_dir = "out/demo/dpo"

beta = 0.5
batch_pairs = 32
batch_size = 32
max_steps = 400
learning_rate = 3e-4
warmup_steps = 5
eval_every = 200
answer_tokens = 48
save_every = 200
log_every = 25

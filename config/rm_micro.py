"""
The demo's reward model: 24,000 rankings of four replies, whose order was drawn from known scores.
2 CPU cores, about 5 minutes.

    python train_rm.py config/rm_micro.py

The styles are learnt within 100 steps. That a value is wrong can only be seen by comparing it with
the context, and from plain pairs over contexts of all lengths that was not learnt at all (51 %
after 1,000 steps). Short contexts first and three wrong-against-right comparisons for each context
make it form.
"""
init_from = "out/demo/sft"
data = "out/demo/world/rankings.jsonl"
out_dir = "out/demo/rm"

batch_pairs = 16
batch_size = 16
curriculum = 0.6
max_steps = 1800
optimizer = "muon"
learning_rate = 5e-3
muon_lr = 0.01
schedule = "wsd"
decay_fraction = 0.25
final_lr = 0.05
warmup_steps = 20
eval_every = 500
answer_tokens = 48
save_every = 500
log_every = 50

"""
The demo's reward model, from 24,000 rankings of four replies. 2 CPU cores, about 2 minutes.

    python train_rm.py config/rm_micro.py

The model learns the styles within 100 steps. To see that a value is wrong it must find the fact in
the context again, which pre-training teaches with documents that repeat themselves (EXACT_REPEAT in
demo/world.py): once, without these, it was at 72 % after 500 steps (docs/results.md). Contexts grow
from short to long (curriculum), and each brings the comparisons of a ranking.
"""
init_from = "out/demo/sft"
data = "out/demo/world/rankings.jsonl"
out_dir = "out/demo/rm"

batch_pairs = 16
batch_size = 16
curriculum = 0.8
max_steps = 1000
optimizer = "muon"
learning_rate = 5e-3
muon_lr = 0.01
schedule = "wsd"
decay_fraction = 0.25
final_lr = 0.05
warmup_steps = 20
eval_every = 250
answer_tokens = 48
save_every = 500
log_every = 50
dtype = "float32"  # a model 64 wide does not gain by bfloat16

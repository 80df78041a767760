"""
The demo's preference optimisation. 2 CPU cores, about 2 minutes.

    python train_dpo.py config/dpo_micro.py

In half of the pairs one reply has a wrong value. Plain DPO pushes it down without end, and similar
words with it: in an earlier world it garbled 5 % of the replies. label_smoothing makes no margin
worth more than logit(0.9) = 2.2, so beta can be low enough for the styles, whose margins are small:
with 0.25 instead of 0.15 seed 0 won 78.5 % against SFT instead of 80.3 %.
"""
init_from = "out/demo/sft"
data = "out/demo/world/pairs.jsonl"
out_dir = "out/demo/dpo"

beta = 0.15
label_smoothing = 0.1
batch_pairs = 32
batch_size = 32
max_steps = 400
learning_rate = 4e-4
eval_every = 200
answer_tokens = 48
save_every = 200
log_every = 25
dtype = "float32"  # a model 64 wide does not gain by bfloat16

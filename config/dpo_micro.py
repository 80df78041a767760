"""
The demo's preference optimisation, on pairs of the reward model's world. 2 CPU cores, about
3 minutes.

Of the pairs 40 % differ in the value, and there the loss never has enough: the wrong one is pushed
down without end, and what is near it in the vocabulary with it, so that 5 % of the replies are
garbled (seed 0, beta 0.3). label_smoothing is the cure: no pair is worth more than a margin of
logit(0.9) = 2.2, and beta can be low enough for the styles, whose margins are small.

    python train_dpo.py config/dpo_micro.py
"""
init_from = "out/demo/sft"
data = "out/demo/world/pairs.jsonl"
out_dir = "out/demo/dpo"

beta = 0.25
label_smoothing = 0.1
batch_pairs = 32
batch_size = 32
max_steps = 500
learning_rate = 4e-4
warmup_steps = 5
eval_every = 200
answer_tokens = 48
save_every = 200
log_every = 25

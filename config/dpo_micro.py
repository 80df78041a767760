"""
The demo's preference optimisation, on pairs drawn like the rankings of the reward model. 2 CPU
cores, about 3 minutes.

    python train_dpo.py config/dpo_micro.py

In 40 % of the pairs the rejected reply has a wrong value, and there plain DPO never has enough: it
pushes the wrong value down without end, and similar words with it, until 5 % of the replies are
garbled (seed 0, beta 0.3). label_smoothing is the cure. It makes no margin worth more than
logit(0.9) = 2.2, so that beta can be low enough for the styles, whose margins are small.
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

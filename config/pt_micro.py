"""
The demo: 0.25M parameters on the toy world, 2 CPU cores, about 5 minutes.

    python train_pt.py config/pt_micro.py --data_dir=out/demo/data --out_dir=out/demo/pt

Small model, small vocabulary, a high rate and Muon are what lets the copying circuit form quickly:
the loss falls to "format known, values guessed" within 200 steps and then, slowly, below it. With
AdamW alone 2,400 steps restate 71 % of the values. While the circuit forms, the rate must not fall:
it is level until the last 30 %.

Numbers come last, all at once and at the mercy of chance: where a digit is due all are equally
likely, so a head's rows for them become one row, and a row for all copies none. While the embedding
was the head too, and no document stated one fact only, they came between step 800 and never. With a
head of its own, gradients averaged over more steps, and documents in which there is one value to
look for, it was between step 1,000 and 1,100 with the seed that had none at 1,600 without the last.
"""
data_dir = "out/demo/data"
out_dir = "out/demo/pt"

n_layer = 4
n_head = 4
n_kv_head = 2
n_embd = 64
n_hidden = 176
max_seq_len = 256
tied = False

batch_tokens = 4096
batch_size = 16
max_steps = 2500
optimizer = "muon"
learning_rate = 1e-2
adam_beta1 = 0.97
adam_beta2 = 0.99
muon_lr = 0.02
schedule = "wsd"
decay_fraction = 0.3
final_lr = 0.0
warmup_steps = 50
eval_every = 400
save_every = 400
sample_every = 800
log_every = 50

"""
The demo's pre-training: 0.25M parameters on the toy world. 2 CPU cores, about 5 minutes.

    python train_pt.py config/pt_micro.py --data_dir=out/demo/data --out_dir=out/demo/pt

To copy a value, a model must first build a copying circuit (attention that finds the fact, and
another head that repeats its value). A small model, a small vocabulary, a high rate and Muon build
it quickly. The loss falls to "form known, values guessed" within 200 steps and then, slowly, below
it. With AdamW alone, 2,400 steps restate 71 % of the values. The rate must not fall while the
circuit forms, so it is level until the last 30 % of the steps.

Numbers come last. Where a digit is due all digits are equally likely, so the rows of the head for
them become one and the same row, and such a row cannot copy. Three things help: a head that is not
the embedding (tied = False), gradients averaged over more steps (adam_beta1, adam_beta2), and
documents with a single fact, which leave only one value to look for. With all three, one seed had
its numbers between steps 1,000 and 1,100; without the documents of one fact it had none at 1,600.
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

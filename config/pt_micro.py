"""
The demo: 0.22M parameters on the toy world, 2 CPU cores, about 8 minutes.

    python train_pt.py config/pt_micro.py --data_dir=out/demo/data --out_dir=out/demo/pt

Small model, small vocabulary, a high rate and Muon are what lets the copying circuit form quickly:
the loss falls to "format known, values guessed" within 200 steps and then, slowly, below it. With
AdamW alone 2,400 steps restate 71 % of the values. Numbers come last, for they are copied digit by
digit. By step 2,000 they were there in three runs of five, and in three of four with three numbers
to a colour (toyworld.py --numbers), else 1 to 15 % of them; which, rounding decides: the same seed
differed with one thread and with two. So there are 3,000 steps, level until the last 30 %.
"""
data_dir = "out/demo/data"
out_dir = "out/demo/pt"

n_layer = 4
n_head = 4
n_kv_head = 2
n_embd = 64
n_hidden = 176
max_seq_len = 256

batch_tokens = 4096
batch_size = 16
max_steps = 3000
optimizer = "muon"
learning_rate = 1e-2
muon_lr = 0.02
schedule = "wsd"
decay_fraction = 0.3
final_lr = 0.0
warmup_steps = 50
eval_every = 400
save_every = 400
sample_every = 800
log_every = 50
